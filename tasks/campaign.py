"""The comparison of a campaign's models: accuracy, linearity, and profiles of their depth.

Models differ in their number of layers, so a profile has one value for each tenth of a model's depth.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negcore.texts import public
from tasks.config.campaign_run import CampaignRun, CampaignStep
from tasks.linearity import Findings
from tasks.neg_profiles import NegProfileRow
from tasks.probe import AccuracyRow
from tasks.results import Average, averages
from tasks.rundir.tables import write_tables
from tasks.skills import SkillFindings

N_DEPTHS = 10
"""Number of equal parts into which a model's depth is divided."""


@dataclass(frozen=True)
class OutcomeRow:
    """The outcome of one study of one model."""

    model: str
    name: str
    """Name of the model's folder, and of the model in tables."""
    stage: str
    outcome: str
    """"whole", "in part", or "failed": there is nothing to compare."""
    n_problems: int
    reason: str
    """The first problem; empty if there is none."""


@dataclass(frozen=True)
class GainRow:
    """A model's best probe beside LM-Prob, on the average of datasets.

    The best probe has the highest accuracy over all genres, on the same test rows that are reported here. It is the
    same probe for every genre.
    """

    model: str
    shots: int
    genre: str
    """Genre of the datasets; empty for all of them."""
    probe: str
    accuracy: float
    low: float
    """Lower end of the 95 % interval, as in `Average`."""
    high: float
    lm: float
    """Accuracy of LM-Prob."""
    lm_low: float
    lm_high: float
    gain: float
    """Accuracy of the probe minus that of LM-Prob."""
    n_datasets: int
    majority: float
    random: float
    options_only: float | None = None
    calibrated: float | None = None
    label_mass: float | None = None


@dataclass(frozen=True)
class LinearityRow:
    """Linearity of a model's neurons and agreement of NeurGrad with their NEG, within one range of shifts."""

    model: str
    dataset: str
    range: float
    n_prompts: int
    n_neurons: int
    """Neurons swept in every prompt."""
    linear_share: float
    positive_share: float
    pearson: float | None
    """Pearson r between NeurGrad and NEG; None if NeurGrad was not computed."""
    pearson_low: float | None
    pearson_high: float | None


@dataclass(frozen=True)
class ProfileRow:
    """One measure in one tenth of a model's depth."""

    model: str
    measure: str
    """"linear_share" or "median_size" (of |NEG|): mean over the layers in the tenth. "skill_share": share of the skill
    neurons that lie in the tenth, mean over datasets; 0.1 if they are spread evenly."""
    probe: str
    """Probe that chose the skill neurons; empty for other measures."""
    top: int | None
    """Number of skill neurons."""
    low: float
    """Start of the tenth: 0 is the start of the first layer, 1 the end of the last."""
    high: float
    value: float | None
    """None if no layer in the tenth was measured."""


class Compared(NamedTuple):
    """The rows that one study of one model contributes to the comparison."""

    accuracy: Sequence[Average] = ()
    linearity: Sequence[LinearityRow] = ()
    profiles: Sequence[ProfileRow] = ()


@dataclass(frozen=True)
class Comparison:
    """The tables that compare a campaign's models."""

    outcomes: list[OutcomeRow] = field(default_factory=list)
    accuracy: list[Average] = field(default_factory=list)
    """Averages by model, number of demonstrations, genre and probe."""
    gains: list[GainRow] = field(default_factory=list)
    linearity: list[LinearityRow] = field(default_factory=list)
    profiles: list[ProfileRow] = field(default_factory=list)
    neg_profiles: list[NegProfileRow] = field(default_factory=list)
    """Of models that are revisions of one."""

    @property
    def names(self) -> dict[str, str]:
        """Short name of each model."""
        return {row.model: row.name for row in self.outcomes}


def compare(
    outcomes: Iterable[OutcomeRow], compared: Iterable[Compared], negs: Iterable[NegProfileRow] = ()
) -> Comparison:
    """Put the rows of all studies together."""
    comparison = Comparison(list(outcomes), neg_profiles=list(negs))
    for one in compared:
        comparison.accuracy.extend(one.accuracy)
        comparison.linearity.extend(one.linearity)
        comparison.profiles.extend(one.profiles)
    comparison.gains.extend(gains(comparison.accuracy))
    return comparison


def outcome(step: CampaignStep, compared: Compared | None, problems: Sequence[str]) -> OutcomeRow:
    """Tell whether a step of a campaign is whole, lacks something, or gave nothing to compare."""
    is_empty = compared is None or not any(compared)
    return OutcomeRow(
        model=step.model,
        name=step.folder,
        stage=step.study,
        outcome="failed" if is_empty else "in part" if problems else "whole",
        n_problems=len(problems),
        reason=public(problems[0]) if problems else "",
    )


def accuracy_rows(model: str, scores: Sequence[AccuracyRow]) -> Compared:
    """Average accuracy by number of demonstrations, genre and probe."""
    return Compared(accuracy=[replace(mean, model=model) for mean in averages(scores)])


def gains(accuracy: Sequence[Average]) -> list[GainRow]:
    """Compare the best probe of each model and number of demonstrations with LM-Prob."""
    by_key = {(mean.model, mean.shots, mean.genre, mean.probe): mean for mean in accuracy}
    best: dict[tuple[str, int], Average] = {}
    for mean in accuracy:
        key = mean.model, mean.shots
        if not mean.genre and mean.probe != "lm" and (key not in best or mean.accuracy > best[key].accuracy):
            best[key] = mean
    return [
        _gain(mean, by_key[mean.model, mean.shots, mean.genre, "lm"])
        for mean in accuracy
        if (mean.model, mean.shots) in best and mean.probe == best[mean.model, mean.shots].probe
    ]


def _gain(probe: Average, lm: Average) -> GainRow:
    own = {one.name: getattr(probe, one.name) for one in fields(GainRow) if hasattr(probe, one.name)}
    return GainRow(**own, lm=lm.accuracy, lm_low=lm.low, lm_high=lm.high, gain=probe.accuracy - lm.accuracy)


def linearity_rows(model: str, findings: Findings) -> Compared:
    """Summarise linearity of the whole model within the main range, and of each tenth of its depth."""
    ranges = {row.layer: row for row in findings.ranges if row.range == findings.main_range}
    whole = [row for row in findings.agreement if row.layer is None and row.range == findings.main_range]
    neurgrad = next((row for row in whole if row.estimator == "neurgrad"), None)
    n_prompts, n_neurons, _ = findings.sweep.values_PKS.shape
    row = LinearityRow(
        model=model,
        dataset=findings.dataset,
        range=findings.main_range,
        n_prompts=n_prompts,
        n_neurons=n_neurons,
        linear_share=ranges[None].linear_share,
        positive_share=ranges[None].positive_share,
        pearson=neurgrad.pearson if neurgrad else None,
        pearson_low=neurgrad.pearson_low if neurgrad else None,
        pearson_high=neurgrad.pearson_high if neurgrad else None,
    )
    shares = {layer: row.linear_share for layer, row in ranges.items() if layer is not None}
    sizes = {row.layer: row.q50 for row in findings.sizes if row.layer is not None}
    profiles = _profile(model, "linear_share", by_depth(shares, findings.n_layers))
    profiles += _profile(model, "median_size", by_depth(sizes, findings.n_layers))
    return Compared(linearity=[row], profiles=profiles)


def skill_rows(model: str, findings: SkillFindings) -> Compared:
    """Compute the share of skill neurons in each tenth of depth, by probe and number of neurons, mean over datasets."""
    shares: dict[tuple[str, int], dict[int, list[float]]] = {}
    for one in findings.datasets:
        for row in one.layers:
            shares.setdefault((row.probe, row.top), {}).setdefault(row.layer, []).append(row.share)
    profiles: list[ProfileRow] = []
    for (probe, top), by_layer in shares.items():
        densities = {layer: float(np.mean(values)) * len(by_layer) for layer, values in by_layer.items()}
        values = [value and value / N_DEPTHS for value in by_depth(densities, len(by_layer))]
        profiles += _profile(model, "skill_share", values, probe, top)
    return Compared(profiles=profiles)


def by_depth(values: Mapping[int, float], n_layers: int) -> list[float | None]:
    """Average a measure over the layers of each tenth of a model's depth.

    Parameters
    ----------
    values : mapping of layer to float
        Layers may be missing.
    n_layers : int
        Layers of the model, all equally deep. A layer that lies in two tenths counts in both, by its share.

    Returns
    -------
    list of float or None
        `N_DEPTHS` means; None if no layer of the tenth has a value.
    """
    layers = sorted(values)
    weights_DL = _overlaps(n_layers)[:, layers]
    sums_D = weights_DL @ np.array([values[layer] for layer in layers])
    totals_D = weights_DL.sum(1)
    return [float(sum_ / total) if total else None for sum_, total in zip(sums_D, totals_D, strict=True)]


def _overlaps(n_layers: int) -> NDArray[np.int64]:
    """Return how much of each tenth each layer takes up, in whole numbers so that the ends meet: shape (D, L)."""
    begin_D, begin_L = np.arange(N_DEPTHS)[:, None] * n_layers, np.arange(n_layers)[None] * N_DEPTHS
    shared_DL = np.minimum(begin_D + n_layers, begin_L + N_DEPTHS) - np.maximum(begin_D, begin_L)
    overlaps_DL: NDArray[np.int64] = np.maximum(shared_DL, 0)
    return overlaps_DL


def _profile(
    model: str, measure: str, values: Sequence[float | None], probe: str = "", top: int | None = None
) -> list[ProfileRow]:
    return [
        ProfileRow(model, measure, probe, top, depth / N_DEPTHS, (depth + 1) / N_DEPTHS, value)
        for depth, value in enumerate(values)
    ]


def write_comparison(run: CampaignRun, comparison: Comparison) -> None:
    """Write the comparison as Arrow files into the campaign's directory.

    Raises
    ------
    RunError
        If they cannot be written.
    """
    write_tables(run.directory / "campaign", Comparison, [((), comparison)])
