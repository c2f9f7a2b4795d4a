"""Neurons of one run matched with those of another over the same rows, dataset by dataset, and what layers have."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from negcore.analysis.matching import N_SHUFFLES, NeuronMatch, match_neurons
from negcore.arrays import Floats, Ints
from negcore.errors import NegError, RunError
from negcore.measure.sweeps import draw_neurons
from negcore.measure.votes import Ranking, Vote
from negcore.model.layer_shapes import LayerShape
from negcore.probing.rankings import rank_layers
from negcore.store.identity import RunIdentity
from negcore.store.reader import NegSplit
from tasks.config.recipes import RECIPES
from tasks.run_negs import StoredSplit, only_model, stored_splits, units_of

SPLITS = ("train", "valid", "test")
N_DRAWN = 1024
"""Neurons that are matched by default, drawn evenly from all layers."""
CHANCES = (0.05, 0.01)
"""Shares of neurons that have a p as small by chance: a neuron is matched if its p is at most the first."""


@dataclass(frozen=True)
class Choice:
    """The neurons of the first run that are matched: at most one of these is given; by default some of every layer."""

    layers: Sequence[int] = ()
    """All neurons of these layers."""
    top: int | None = None
    """The best of the ranking of a probe on the training rows."""
    neurons: int | None = None
    """So many, drawn evenly from all layers; 0 for all."""


@dataclass(frozen=True)
class MatchRow:
    """A neuron of the first run with its best match in the second; see `negcore.analysis.matching.NeuronMatch`."""

    dataset: str
    model: str
    revision: str
    """Commit, or checksum of local files; with random weights, their seed behind it."""
    other_model: str
    other_revision: str
    layer: int
    neuron: int
    other_layer: int | None
    other_neuron: int | None
    r: float | None
    chance: float | None
    p: float | None
    is_mutual: bool | None


@dataclass(frozen=True)
class LayerMatches:
    """The matches of the neurons of one layer, or of all layers."""

    layer: int | None
    """None for all layers together."""
    n_neurons: int
    """Neurons that vary over the rows; the others have no match."""
    r: float
    """Median of the highest correlations."""
    chance: float
    """Median of their 95 % quantiles after shuffles of the rows."""
    shares: tuple[float, ...]
    """Share of neurons whose p is at most each of `CHANCES`."""
    mutual: float
    """Share of neurons that are matched, and the best match of their match."""
    other_layers: tuple[float, float, float] | None
    """Quartiles of the layers in which the matches of matched neurons lie; None if there are none."""


class Matches(NamedTuple):
    """The matches on one dataset."""

    title: str
    identity: RunIdentity
    other_identity: RunIdentity
    n_rows: int
    n_shuffles: int
    rows: list[MatchRow]
    n_units: int | None = None
    """Units that were shuffled, whose rows stayed together; None if no rows share one, or units are not known."""
    units_missing: str = ""
    """Why units are not known, so that rows were shuffled one by one; empty if they are."""

    @property
    def layers(self) -> Iterator[LayerMatches]:
        """Sums of the matches by layer, and last of all layers together."""
        known = [row for row in self.rows if row.p is not None]
        for layer in sorted({row.layer for row in known}):
            yield _layer_matches(layer, [row for row in known if row.layer == layer])
        yield _layer_matches(None, known)

    @property
    def depth_correlation(self) -> float:
        """Spearman's correlation between the layers of matched neurons and of their matches; NaN if there is none."""
        pairs = [(row.layer, row.other_layer) for row in self.rows if row.p is not None and row.p <= CHANCES[0]]
        if min((len(set(layers)) for layers in zip(*pairs, strict=True)), default=0) < 2:
            return float("nan")
        return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _layer_matches(layer: int | None, rows: Sequence[MatchRow]) -> LayerMatches:
    p_K, r_K, chance_K = (_column(rows, name) for name in ("p", "r", "chance"))
    is_matched_K = p_K <= CHANCES[0]
    layers = [row.other_layer for row, is_matched in zip(rows, is_matched_K, strict=True) if is_matched]
    return LayerMatches(
        layer=layer,
        n_neurons=len(rows),
        r=float(np.median(r_K)),
        chance=float(np.median(chance_K)),
        shares=tuple(float((p_K <= chance).mean()) for chance in CHANCES),
        mutual=float((is_matched_K & (_column(rows, "is_mutual") > 0)).mean()),
        other_layers=tuple(np.quantile(layers, [0.25, 0.5, 0.75]).tolist()) if layers else None,  # type: ignore[arg-type]
    )


def _column(rows: Sequence[MatchRow], name: str) -> Floats:
    return np.array([getattr(row, name) for row in rows], np.float64)


def match_runs(
    first: Path,
    second: Path,
    choice: Choice,
    *,
    models: tuple[str | None, str | None] = (None, None),
    datasets: Sequence[str] = (),
    probe: str = "magn",
    n_shuffles: int = N_SHUFFLES,
    seed: int = 0,
) -> Iterator[Matches]:
    """Match neurons of the first run with those of the second, on every dataset that both have.

    Parameters
    ----------
    models : pair of str or None
        Name of the model in each run; may be left out where there is one.
    datasets : sequence of str
        Names of datasets. By default all that both runs have.
    probe : str
        Vote probe by whose ranking the best neurons are chosen.
    n_shuffles, seed : int
        As for `match_neurons`; the seed also draws the neurons.

    Raises
    ------
    NegError
        If the runs have no dataset in common, rows differ, or a choice is not possible.
    """
    sides = [_by_dataset(root, model, datasets) for root, model in zip((first, second), models, strict=True)]
    common = [title for title in sides[0] if title in sides[1]]
    if not common:
        known = (", ".join(side) for side in sides)
        raise RunError(f"the runs have no dataset in common: the first has {next(known)}, the second {next(known)}")
    for title in common:
        yield _match_dataset(title, sides[0][title], sides[1][title], choice, probe, n_shuffles, seed)


def _by_dataset(root: Path, model: str | None, datasets: Sequence[str]) -> dict[str, dict[str, StoredSplit]]:
    """Return the splits of a run by dataset and name."""
    found = stored_splits(root, SPLITS, model=model, datasets=datasets)
    only_model(found)
    by_dataset: dict[str, dict[str, StoredSplit]] = {}
    for one in found:
        by_dataset.setdefault(one.title, {})[one.place.part] = one
    return by_dataset


def _match_dataset(
    title: str,
    one: dict[str, StoredSplit],
    other: dict[str, StoredSplit],
    choice: Choice,
    probe: str,
    n_shuffles: int,
    seed: int,
) -> Matches:
    if one.keys() != other.keys():
        lacks = ", ".join(sorted(one.keys() ^ other.keys()))
        raise RunError(f"{title}: only one of the runs has split {lacks}: rows must be the same")
    parts = [part for part in SPLITS if part in one]
    splits, others = ([side[part].open() for part in parts] for side in (one, other))
    chosen = _chosen(choice, splits, parts, probe, seed)
    identities = splits[0].identity, others[0].identity
    names = *_names(identities[0]), *_names(identities[1])
    units, missing = _units([one[part] for part in parts], [other[part] for part in parts])
    matches: list[NeuronMatch] = match_neurons(splits, others, chosen, units=units, n_shuffles=n_shuffles, seed=seed)
    if all(found.p is None for found in matches):
        raise NegError(f"{title}: no NEG of the chosen neurons varies over the rows, so that none has a match")
    n_rows = sum(split.n_rows for split in splits)
    rows = [MatchRow(title, *names, **asdict(found)) for found in matches]
    return Matches(title, *identities, n_rows, n_shuffles, rows, _n_units(units), missing)


def _units(*sides: Sequence[StoredSplit]) -> tuple[list[str] | None, str]:
    """Return the unit of each row, as the data of one of the runs tells, or else why none does."""
    reasons = []
    for splits in sides:
        try:
            return units_of(splits), ""
        except NegError as error:
            reasons.append(f"{error}")
    return None, reasons[0]


def _n_units(units: Sequence[str] | None) -> int | None:
    """Return how many units rows are of, those of none counted singly; None if no rows share one."""
    named = [unit for unit in units or () if unit]
    return None if units is None or len(set(named)) == len(named) else len(set(named)) + len(units) - len(named)


def _names(identity: RunIdentity) -> tuple[str, str]:
    return identity.model, identity.model_revision


def _chosen(choice: Choice, splits: Sequence[NegSplit], parts: Collection[str], probe: str, seed: int) -> Ints:
    """Return the flat indices of the neurons to match, in order."""
    first = splits[0]
    n_all = first.n_layers * first.n_neurons
    if choice.top is not None:
        return _best(choice.top, first, parts, probe)
    if choice.layers:
        first.locate([(layer, 0) for layer in choice.layers])
        flat = [layer * first.n_neurons + np.arange(first.n_neurons) for layer in sorted(set(choice.layers))]
        return np.concatenate(flat)
    count = N_DRAWN if choice.neurons is None else choice.neurons or n_all
    if count > n_all and choice.neurons is not None:
        raise RunError(f"{count} neurons cannot be drawn: {first.identity.model!r} has {n_all}")
    pairs_K2 = draw_neurons((LayerShape(first.n_neurons),) * first.n_layers, min(count, n_all), seed=seed)
    return np.asarray(pairs_K2[:, 0] * first.n_neurons + pairs_K2[:, 1])


def _best(top: int, train: NegSplit, parts: Collection[str], probe: str) -> Ints:
    votes = {name: recipe.vote for name, recipe in RECIPES.items() if recipe.kind == "vote" and recipe.vote}
    if probe not in votes:
        raise RunError(f"probe {probe!r} ranks no neurons by votes: give one of {', '.join(votes)}")
    if "train" not in parts:
        raise RunError("the best neurons are those of the training rows, which the runs do not have")
    vote: Vote = votes[probe]
    scores_M = rank_layers(train, range(train.n_layers), [vote], act=False).votes_M[vote]
    return Ranking.from_scores(scores_M).top(top).order_K
