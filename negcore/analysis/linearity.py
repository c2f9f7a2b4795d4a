"""Findings from sweeps: how many neurons are linear, how stable their NEG is, and which estimator predicts it.

Every result is a list of plain rows, one for each line of a table; `layer` is None for the whole model. Of a mixture of
experts, arrays (P, K) are masked where a prompt does not have a neuron: such pairs are in no number of any row.

Shapes: P prompts, K chosen neurons, S shifts, B bootstrap samples (the first is the sample itself), M sets, D shifts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from negcore.arrays import Floats, Ints
from negcore.measure.sweeps import SweepResult
from negcore.measure.votes import Numbers

TOP_SHARE = 0.01
"""Share of neurons that count as the top of a prompt."""
MEASURED_EFFECTS = MappingProxyType(dict.fromkeys(("attribution_patching", "atp_star", "relp"), "resample_ablation"))
"""Estimators of an effect that is measured too, and its name."""
PER_ACTIVATION = frozenset({"neurgrad", "gradient"})
"""Estimators in target per unit of activation, the unit of NEG: only they can be wrong in size."""


def nested_grid(ranges: Sequence[float], points: int) -> Floats:
    """Return shifts that contain, for every range, `points` evenly spaced sizes on each side of zero."""
    sizes = np.unique(np.round([largest * step / points for largest in ranges for step in range(1, points + 1)], 12))
    return np.concatenate([-sizes[::-1], sizes])


@dataclass(frozen=True)
class RangeRow:
    """Linearity within a range of shifts."""

    range: float
    """Largest size of a shift, in units of activation."""
    layer: int | None
    n: int
    """Prompts times neurons that they have."""
    n_constant: int
    """Number of these where the label's target never changes. They have no r and count as not linear."""
    linear_share: float
    """Share of all n where |Pearson r| >= 0.95 between shift and change."""
    positive_share: float
    """Share of positive NEGs among those that are not zero."""


def ranges_table(sweep: SweepResult, ranges: Sequence[float]) -> list[RangeRow]:
    """Compute the share of linear neurons and of positive NEGs by range, for the model and each layer."""
    return [
        _range_row(sweep.within(largest), largest, layer, chosen_K)
        for largest in ranges
        for layer, chosen_K in layers_of(sweep.neurons_K2, sweep.active_PK)
    ]


def _range_row(part: SweepResult, largest: float, layer: int | None, chosen_K: Numbers) -> RangeRow:
    negs, pearson = there(part.negs_PK[:, chosen_K]), there(part.pearson_PK[:, chosen_K])
    moved, linear = negs[negs != 0], part.linear_PK[:, chosen_K]
    return RangeRow(
        range=largest,
        layer=layer,
        n=negs.size,
        n_constant=int(np.isnan(pearson).sum()),
        linear_share=float((linear if part.active_PK is None else linear[part.active_PK[:, chosen_K]]).mean()),
        positive_share=float((moved > 0).mean()) if moved.size else float("nan"),
    )


@dataclass(frozen=True)
class SizeRow:
    """Distribution of |NEG|, target per unit of activation, over prompts and neurons."""

    layer: int | None
    n: int
    mean: float
    q05: float
    q25: float
    q50: float
    q75: float
    q95: float
    largest: float


def sizes_table(negs_PK: Numbers, neurons_K2: Ints) -> list[SizeRow]:
    """Describe the sizes of NEGs, in the model and each layer."""
    rows = []
    for layer, chosen_K in layers_of(neurons_K2, active_of(negs_PK)):
        sizes = np.abs(there(negs_PK[:, chosen_K]))
        q05, q25, q50, q75, q95 = map(float, np.quantile(sizes, (0.05, 0.25, 0.5, 0.75, 0.95)))
        rows.append(SizeRow(layer, sizes.size, float(sizes.mean()), q05, q25, q50, q75, q95, float(sizes.max())))
    return rows


class Facts(NamedTuple):
    """Names that tell which prompts belong together; each is a sequence of P strings."""

    facts: Sequence[str]
    """Subject and relation: MyriadLAMA's whole `uuid`. Its first part names the relation alone."""
    wordings: Sequence[str]
    """Template of the prompt, such as `P37-d2cd...`: MyriadLAMA's `tpl`, an example's `group`."""
    answers: Sequence[str]

    @property
    def relations(self) -> list[str]:
        """Part of each wording before its dash, such as `P37`."""
        return [wording.split("-", 1)[0] for wording in self.wordings]


@dataclass(frozen=True)
class StabilityRow:
    """Similarity of the NEGs of the same neurons in two prompts, over pairs of prompts."""

    pairs: str
    n_pairs: int
    """Pairs that are compared: with experts, by the neurons that both have, if two or more of these have NEGs."""
    sign_agreement: float
    """Share of neurons whose NEG has the same sign, mean over pairs; neurons with a NEG of zero are left out."""
    sign_agreement_sd: float
    """Standard deviation over pairs."""
    pearson: float
    """r between the two prompts' NEGs, mean over pairs."""
    size_spearman: float
    """Rank correlation between the two prompts' |NEG|, mean over pairs."""


def stability_table(negs_PK: Numbers, facts: Facts) -> list[StabilityRow]:
    """Measure how stable sign and size of NEG are across prompts, and across wordings.

    The kinds of pairs are: all prompts; one fact in different wordings; one relation and answer in different wordings
    (the nearest substitute if a source words each fact once, as the released files of MyriadLAMA do); one wording,
    whatever the fact; different relations. A kind without a pair has no row. Every pair has equal weight.
    """
    alike = _pairwise(negs_PK) if active_of(negs_PK) is None else _pairwise_in_common(negs_PK)
    rows = []
    for name, pairs_PP in _kinds_of_pairs(facts).items():
        upper = np.triu(pairs_PP & alike.comparable_PP, 1)
        if upper.any():
            signs = alike.signs_PP[upper]
            pearson, sizes = (float(np.nanmean(r_PP[upper])) for r_PP in (alike.pearson_PP, alike.sizes_PP))
            rows.append(StabilityRow(name, int(upper.sum()), float(signs.mean()), float(signs.std()), pearson, sizes))
    return rows


def _kinds_of_pairs(facts: Facts) -> dict[str, Numbers]:
    def same(values: Sequence[str]) -> Numbers:
        array = np.array(values)
        equal: Numbers = array[:, None] == array
        return equal

    fact, wording, relation = same(facts.facts), same(facts.wordings), same(facts.relations)
    return {
        "all": np.ones_like(fact),
        "same fact, other wording": fact & ~wording,
        "same relation and answer, other wording": relation & same(facts.answers) & ~wording,
        "same wording": wording,
        "other relation": ~relation,
    }


class _Alike(NamedTuple):
    signs_PP: Floats
    pearson_PP: Floats
    sizes_PP: Floats
    comparable_PP: NDArray[np.bool_]


def _pairwise(negs_PK: Numbers) -> _Alike:
    signs_PK = np.sign(negs_PK).astype(np.float64)
    both_PP = np.abs(signs_PK) @ np.abs(signs_PK).T
    with np.errstate(invalid="ignore", divide="ignore"):
        agreeing_PP = (signs_PK @ signs_PK.T / both_PP + 1) / 2
        sizes_PP = np.corrcoef(rankdata(np.abs(negs_PK), axis=1))
        return _Alike(agreeing_PP, np.corrcoef(negs_PK), sizes_PP, np.ones_like(agreeing_PP, bool))


def _pairwise_in_common(negs_PK: Numbers) -> _Alike:
    """Compare two prompts by the neurons that both have; they are comparable if there are two with NEGs not zero."""
    n_prompts, values_PK, there_PK = len(negs_PK), np.ma.getdata(negs_PK), ~np.ma.getmaskarray(negs_PK)
    signs_PP, pearson_PP, sizes_PP = np.full((3, n_prompts, n_prompts), np.nan)
    for one, other in combinations(range(n_prompts), 2):
        pair = one, other
        common_2J = values_PK[pair, :][:, there_PK[one] & there_PK[other]]
        if (common_2J != 0).all(axis=0).sum() > 1:
            alike = _pairwise(common_2J)
            signs_PP[pair], pearson_PP[pair], sizes_PP[pair] = alike.signs_PP[0, 1], alike[1][0, 1], alike[2][0, 1]
    return _Alike(signs_PP, pearson_PP, sizes_PP, ~np.isnan(signs_PP))


@dataclass(frozen=True)
class AgreementRow:
    """Agreement of an estimator with the measured NEG; `_low` and `_high` end the 95 % interval over prompts."""

    estimator: str
    range: float
    """Range of shifts of the measured NEG."""
    layer: int | None
    n: int
    """Prompts times neurons that they have."""
    pearson: float
    pearson_low: float
    pearson_high: float
    spearman: float
    spearman_low: float
    spearman_high: float
    signs: float
    """Share of estimates with the sign of the NEG, of those where neither is zero."""
    signs_low: float
    signs_high: float
    mae: float | None
    """Mean absolute error, target per unit of activation; None if the estimator has another unit."""
    mae_low: float | None
    mae_high: float | None
    top: float
    """Overlap between the prompt's 1 % (at least 1) of neurons by |NEG| and by |estimate|, mean over prompts."""
    top_low: float
    top_high: float


def agreement_table(
    estimator: str,
    range_: float,
    negs_PK: Numbers,
    scores_PK: Numbers,
    neurons_K2: Ints,
    *,
    n_bootstrap: int,
    seed: int = 0,
) -> list[AgreementRow]:
    """Compare an estimator with the measured NEG over all prompts and neurons together, in the model and each layer.

    The bootstrap draws prompts `n_bootstrap` times, each with all its neurons; the interval holds the middle 95 %.
    Rank correlations of the samples use the ranks in the whole sample.
    """
    weights_BP = bootstrap_weights(len(negs_PK), n_bootstrap, seed)
    scores_PK, negs_PK = _in_both(scores_PK, negs_PK)
    rows = []
    for layer, chosen_K in layers_of(neurons_K2, active_of(negs_PK)):
        x_PK, y_PK = scores_PK[:, chosen_K].astype(np.float64), negs_PK[:, chosen_K].astype(np.float64)
        statistics = _agreement(x_PK, y_PK, weights_BP)
        if estimator not in PER_ACTIVATION:
            statistics |= dict.fromkeys(("mae", "mae_low", "mae_high"))
        rows.append(AgreementRow(estimator=estimator, range=range_, layer=layer, n=there(x_PK).size, **statistics))
    return rows


def _agreement(x_PK: Floats, y_PK: Floats, weights_BP: Floats) -> dict[str, Any]:
    signs = [np.sign(np.ma.filled(values_PK, 0)) for values_PK in (x_PK, y_PK)]
    same_PK = (signs[0] == signs[1]) & (signs[0] != 0)
    either_PK = (signs[0] != 0) & (signs[1] != 0)
    n_there_P = _n_there(x_PK)
    of_pairs_BP, of_prompts_BP = weights_BP * (n_there_P / n_there_P.max()), weights_BP * (n_there_P > 0)
    samples = {
        "pearson": weighted_pearson(x_PK, y_PK, weights_BP),
        "spearman": weighted_pearson(_ranks(x_PK), _ranks(y_PK), weights_BP),
        "signs": _ratio(weights_BP @ same_PK.sum(1), weights_BP @ either_PK.sum(1)),
        "mae": _ratio(of_pairs_BP @ np.ma.filled(np.abs(x_PK - y_PK).mean(1), 0), of_pairs_BP.sum(1)),
        "top": _ratio(of_prompts_BP @ top_overlap(x_PK, y_PK), of_prompts_BP.sum(1)),
    }
    return {key: value for name, values_B in samples.items() for key, value in _with_interval(name, values_B)}


@dataclass(frozen=True)
class EffectRow:
    """Agreement of an estimator with the very effect that it approximates; fields as of `AgreementRow`."""

    estimator: str
    measured: str
    """Name of the effect, which was measured neuron by neuron."""
    n: int
    pearson: float
    pearson_low: float
    pearson_high: float
    spearman: float
    signs: float
    mae: float
    """Mean absolute error, in target."""
    top: float


def effects_table(
    scores_PK: Mapping[str, Numbers], measured: Mapping[str, str] = MEASURED_EFFECTS, *, n_bootstrap: int, seed: int = 0
) -> list[EffectRow]:
    """Compare estimators with the effects that they approximate, over all prompts and neurons together.

    Parameters
    ----------
    scores_PK : mapping of estimator to array of shape (P, K)
        A pair of estimator and effect makes a row if both are here.
    """
    rows = []
    for estimator, effect in measured.items():
        if scores_PK.keys() >= {estimator, effect}:
            x_PK, y_PK = (np.asarray(scores_PK[name], np.float64) for name in (estimator, effect))
            statistics = _agreement(x_PK, y_PK, bootstrap_weights(len(x_PK), n_bootstrap, seed))
            kept = {one.name: statistics[one.name] for one in fields(EffectRow) if one.name in statistics}
            rows.append(EffectRow(estimator=estimator, measured=effect, n=x_PK.size, **kept))
    return rows


def bootstrap_weights(n_prompts: int, n_samples: int, seed: int) -> Floats:
    """Draw how often each prompt is in each sample: shape (B, P); the first row is the sample itself."""
    drawn = np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=n_samples)
    return np.concatenate([np.ones((1, n_prompts)), drawn])


def weighted_pearson(x_PK: Numbers, y_PK: Numbers, weights_BP: Floats) -> Floats:
    """Compute Pearson r over all values of each sample of prompts: shape (B,); NaN if either is constant."""
    x, y = _standard(x_PK), _standard(y_PK)
    moments_P5 = np.stack([values.sum(1) for values in (x, y, x * x, y * y, x * y)], axis=1)
    means_B5 = _ratio(weights_BP @ moments_P5, (weights_BP @ _n_there(x_PK))[:, None])
    mx, my, xx, yy, xy = means_B5.T
    spread = (xx - mx**2) * (yy - my**2)
    return _ratio(xy - mx * my, np.sqrt(np.maximum(spread, 0)))


def top_overlap(x_PK: Numbers, y_PK: Numbers) -> Floats:
    """Compute the share of each prompt's top neurons by |x| that are top by |y| too: (P,); ties go to the first.

    It is zero for a prompt that has none of the neurons.
    """
    if (active_PK := active_of(x_PK)) is not None:
        rows = zip(np.ma.getdata(x_PK), np.ma.getdata(y_PK), active_PK, strict=True)
        own = [top_overlap(x_K[None, on_K], y_K[None, on_K]) if on_K.any() else np.zeros(1) for x_K, y_K, on_K in rows]
        return np.concatenate(own)
    n_top = max(1, round(TOP_SHARE * x_PK.shape[1]))
    tops = [_top(values, n_top) for values in (x_PK, y_PK)]
    shares: Floats = (tops[0] & tops[1]).sum(1) / n_top
    return shares


@dataclass(frozen=True)
class InterventionRow:
    """Agreement of the summed NEGs of single neurons with the effect of the neurons together."""

    shift: float
    """Shift of each neuron in the direction of its NEG, in units of activation."""
    set_size: int
    n: int
    """Prompts times sets of which they have a neuron."""
    pearson: float
    """r between predicted and true change of the target."""
    pearson_low: float
    pearson_high: float
    signs: float
    """Share of changes in the predicted direction."""
    ratio: float
    """Sum of true over sum of predicted changes."""


def interventions_table(
    shifts_D: Sequence[float],
    sizes_M: Ints,
    predicted_PDM: Numbers,
    changes_PDM: Numbers,
    *,
    n_bootstrap: int,
    seed: int = 0,
) -> list[InterventionRow]:
    """Correlate predicted and true changes by shift and set size, with bootstrap intervals over prompts.

    Changes are masked where a prompt has no neuron of the set.
    """
    weights_BP = bootstrap_weights(len(predicted_PDM), n_bootstrap, seed)
    rows = []
    for index, shift in enumerate(shifts_D):
        for size in np.unique(sizes_M):
            predicted, true = (values[:, index, sizes_M == size] for values in (predicted_PDM, changes_PDM))
            if not there(predicted).size:
                continue
            pearson = dict(_with_interval("pearson", weighted_pearson(predicted, true, weights_BP)))
            signs = float((np.sign(there(predicted)) == np.sign(there(true))).mean())
            ratio = float(_ratio(true.sum(), predicted.sum()))
            rows.append(InterventionRow(shift, int(size), there(predicted).size, **pearson, signs=signs, ratio=ratio))
    return rows


@dataclass(frozen=True)
class ActiveRow:
    """Neurons of a mixture of experts that prompts have, among those that were drawn."""

    layer: int | None
    n: int
    """Prompts times neurons that were drawn."""
    n_active: int
    """Number of these where the prompt has the neuron, as it is routed to its expert or every prompt has it."""


def active_table(active_PK: NDArray[np.bool_], neurons_K2: Ints) -> list[ActiveRow]:
    """Count the neurons that prompts have, in the model and each layer."""
    return [
        ActiveRow(layer, active_PK[:, chosen_K].size, int(active_PK[:, chosen_K].sum()))
        for layer, chosen_K in layers_of(neurons_K2)
    ]


@dataclass(frozen=True)
class ActiveSetRow:
    """Neurons of random sets of a mixture of experts that prompts have: those that are shifted."""

    set_size: int
    n: int
    """Prompts times sets."""
    n_active: int
    """Number of these where the prompt has a neuron of the set."""
    mean_shifted: float
    """Neurons of a set that a prompt has, mean over these."""


def active_sets_table(n_shifted_PM: Ints, sizes_M: Ints) -> list[ActiveSetRow]:
    """Count the neurons of sets that prompts have, by set size."""
    rows = []
    for size in np.unique(sizes_M).tolist():
        counts = n_shifted_PM[:, sizes_M == size]
        some = counts[counts > 0]
        rows.append(ActiveSetRow(size, counts.size, some.size, float(some.mean()) if some.size else 0.0))
    return rows


def layers_of(neurons_K2: Ints, active_PK: NDArray[np.bool_] | None = None) -> Iterator[tuple[int | None, Numbers]]:
    """Yield masks of the chosen neurons: all of them (layer None), then those of each layer.

    Layers of which no prompt has a neuron are left out.
    """
    yield None, np.ones(len(neurons_K2), bool)
    for layer in np.unique(neurons_K2[:, 0]).tolist():
        chosen_K = neurons_K2[:, 0] == layer
        if active_PK is None or active_PK[:, chosen_K].any():
            yield layer, chosen_K


def active_of(values_PK: Numbers) -> NDArray[np.bool_] | None:
    """Return where prompts have neurons, from masked numbers of them; None for numbers of dense models."""
    return ~np.ma.getmaskarray(values_PK) if np.ma.isMaskedArray(values_PK) else None


def there(values: Numbers) -> Numbers:
    """Return numbers without those that are masked: then one axis, else as they are."""
    return values.compressed() if isinstance(values, np.ma.MaskedArray) else values


def _in_both(x_PK: Numbers, y_PK: Numbers) -> tuple[Numbers, Numbers]:
    """Mask what is masked in either; numbers of dense models stay as they are."""
    masks = [~active_PK for values in (x_PK, y_PK) if (active_PK := active_of(values)) is not None]
    if not masks:
        return x_PK, y_PK
    masked_PK = np.logical_or.reduce(masks)
    return np.ma.masked_array(x_PK, masked_PK), np.ma.masked_array(y_PK, masked_PK)


def _n_there(values_PK: Numbers) -> Ints:
    """Return how many numbers of each prompt are not masked."""
    active_PK = active_of(values_PK)
    return np.full(len(values_PK), values_PK.shape[1]) if active_PK is None else active_PK.sum(1)


def _with_interval(name: str, values_B: Floats) -> list[tuple[str, float]]:
    samples = values_B[1:][~np.isnan(values_B[1:])]
    low, high = np.quantile(samples, (0.025, 0.975)) if samples.size else (np.nan, np.nan)
    return [(name, float(values_B[0])), (f"{name}_low", float(low)), (f"{name}_high", float(high))]


def _ranks(values_PK: Floats) -> Floats:
    if (active_PK := active_of(values_PK)) is not None:
        ranks_PK = np.zeros(values_PK.shape)
        ranks_PK[active_PK] = rankdata(there(values_PK))
        return np.ma.masked_array(ranks_PK, ~active_PK)
    ranks: Floats = rankdata(values_PK).reshape(values_PK.shape)
    return ranks


def _standard(values: Numbers) -> Floats:
    """Centre and scale: probabilities are so small that their squares would lose digits. Masked ones become zero."""
    if np.ptp(there(values)) == 0:  # exactly: the mean of equal numbers may differ from them
        return np.zeros(values.shape)
    centred = values.astype(np.float64) - there(values).mean(dtype=np.float64)
    standard: Floats = np.ma.filled(centred / np.abs(centred).max(), 0)
    return standard


def _top(values_PK: Numbers, n_top: int) -> Numbers:
    order_PK = np.argsort(-np.abs(values_PK), axis=1, kind="stable")
    top_PK = np.zeros(values_PK.shape, bool)
    np.put_along_axis(top_PK, order_PK[:, :n_top], True, axis=1)
    return top_PK


def _ratio(above: Any, below: Any) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, np.divide(above, below), np.nan)
