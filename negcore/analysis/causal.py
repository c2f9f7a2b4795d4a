"""The causal check of a ranking: do its best neurons move the answer more than random neurons, or than its last?

The best k neurons are shifted together towards or away from the gold option, and so are as many random neurons of
the same layers and the last k. A probe can read an answer from neurons that do not produce it, so only the part of the
effect that exceeds the random neurons' speaks for the ranking. The direction towards gold is taken in two ways. From
each neuron's NEG for the prompt's gold option: this moves the answer with any neurons and shows how far these could
move it. From the ranking's polarities: these do not know the answer, and are what the ranking claims.

Shapes: P prompts, O options, M conditions (a set of neurons and a shift), K neurons, L layers, N neurons a layer,
B bootstrap samples. Neurons are flat indices, layer-major: neuron n of layer l is l*N + n.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from negcore.analysis.linearity import bootstrap_weights
from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.measure.interventions import JointShift, shift_together
from negcore.measure.sweeps import checked_shifts
from negcore.measure.votes import Numbers, Ranking, Signs, check_finite, check_gold
from negcore.model.encoding import EncodedPrompts, Labels, encode
from negcore.model.language_model import LanguageModel
from negcore.model.precision import in_float32
from negcore.store.reader import NegSplit

SetKind = Literal["top", "random", "bottom"]
Direction = Literal["gold", "polarity"]
DIRECTIONS: tuple[Direction, ...] = ("gold", "polarity")


@dataclass(frozen=True)
class CausalRow:
    """The effect of shifting neurons of one kind and number; intervals hold the middle 95 % of bootstrap samples."""

    probe: str
    """Name of the probe that made the ranking."""
    neurons: str
    """top: the best of the ranking; random: drawn from the same layers, averaged over the draws; bottom: its last."""
    size: int
    """Neurons that were shifted together."""
    direction: str
    """Source of the direction towards gold. gold: each neuron's NEG for the prompt's gold option; polarity: the
    ranking, so that the direction is the same in every prompt."""
    shift: float
    """In units of activation; positive is towards the gold option, negative away from it."""
    n_prompts: int
    base_accuracy: float
    """Share of prompts whose most probable option is the gold one, without a shift."""
    accuracy: float
    """Accuracy with the shift."""
    accuracy_change: float
    change_low: float
    change_high: float
    prob_change: float
    """Mean change of the gold option's probability."""
    prob_low: float
    prob_high: float
    share_change: float
    """Mean change of the gold option's share of the probability of all options."""


@dataclass(frozen=True)
class CausalDifferenceRow:
    """The effect of a ranking's best neurons less that of random ones of the same layers, paired by prompt."""

    probe: str
    size: int
    direction: str
    """As in `CausalRow`."""
    shift: float
    n_prompts: int
    n_draws: int
    """Random sets; with one, intervals know nothing of how draws differ."""
    accuracy_difference: float
    """Accuracy with the best shifted, less the mean with random ones shifted."""
    accuracy_low: float
    accuracy_high: float
    prob_difference: float
    """The same of the gold option's probability."""
    prob_low: float
    prob_high: float


class Effect(NamedTuple):
    """The effect of a shift on prompts' answers; fields and intervals as in `CausalRow`."""

    n_prompts: int
    base_accuracy: float
    accuracy: float
    accuracy_change: float
    change_low: float
    change_high: float
    prob_change: float
    prob_low: float
    prob_high: float
    share_change: float


class SkillSet(NamedTuple):
    """Neurons that are shifted together."""

    kind: SetKind
    size: int
    draw: int
    """Number of the random draw; 0 for the other kinds."""
    neurons_K: Ints
    """Flat indices."""
    polarity_K: Signs
    """Polarities of the neurons in the ranking."""


class ExpertNeurons(NamedTuple):
    """Which neurons of a mixture of experts prompts have together, and which they have at all: arrays of shape (M,)."""

    groups_M: Ints
    """Rising number of the expert of each neuron, or of the neurons that every prompt has in its layer."""
    in_training_M: NDArray[np.bool_]
    """True if a training prompt has it."""

    @classmethod
    def of(cls, train: NegSplit) -> "ExpertNeurons | None":
        """Return those of a training split; None for a model without experts."""
        if train.layer_shapes is None:
            return None
        groups, there = [], []
        for layer, shape in enumerate(train.layer_shapes):
            groups_N = np.minimum(np.arange(train.n_neurons) // max(shape.n_units, 1), shape.n_experts)
            is_there_N = np.isin(groups_N, train.experts(layer)) | (groups_N == shape.n_experts)
            groups.append(groups_N + sum(one.n_experts + 1 for one in train.layer_shapes[:layer]))
            there.append(is_there_N & (np.arange(train.n_neurons) < shape.n_neurons))
        return cls(np.concatenate(groups), np.concatenate(there))


class Condition(NamedTuple):
    """A set of neurons, with the direction and size of its shift."""

    neurons: SetKind
    size: int
    draw: int
    direction: Direction
    shift: float


@dataclass(frozen=True, eq=False)
class CausalResult:
    """Probabilities of every option under every condition; float32, or float64 from a float64 model."""

    conditions: tuple[Condition, ...]
    """Conditions of the columns M."""
    gold_P: Ints
    """Index of each prompt's gold option."""
    base_probs_PO: Numbers
    """Probabilities without a shift; softmax over the whole vocabulary."""
    probs_PMO: Numbers
    """Probabilities with the condition's neurons shifted."""


def skill_sets(
    ranking: Ranking,
    sizes: Sequence[int],
    n_layers: int,
    layer_width: int,
    *,
    draws: int,
    seed: int,
    experts: "ExpertNeurons | None" = None,
) -> list[SkillSet]:
    """Choose the sets that check a ranking: for each size the best neurons, random ones of the same layers, the last.

    A random set has as many neurons in each layer as the best have there, and none of the best. If a layer has too
    few other neurons, all of them are taken and the rest are drawn from the best: only in such a layer do the two sets
    share neurons.

    Parameters
    ----------
    ranking : Ranking
        Ranking of all L*N neurons.
    sizes : sequence of int
        Numbers of neurons, each at most half of all, so that the best and the last share none.
    n_layers, layer_width : int
        L and N.
    draws : int
        Number of random sets of each size. A set depends only on the ranking, its size, its draw and the seed.
    experts : ExpertNeurons, optional
        Of a mixture of experts. Random sets then have as many neurons of each expert as the best have, so that every
        prompt has as many of them, and the last are among the neurons that training prompts have.

    Returns
    -------
    list of SkillSet
        By size; for each size the best, the draws, the last. The last have the smallest absolute scores; of equal
        scores, they are those that the ranking puts last.

    Raises
    ------
    NegError
        If the ranking leaves neurons out, a size or the number of draws is out of range.
    """
    n_total = n_layers * layer_width
    if len(ranking.order_K) != n_total:
        raise NegError(f"the ranking holds {len(ranking.order_K)} neurons of {n_total}; give one of all neurons")
    if draws < 1:
        raise NegError(f"{draws} random draws leave nothing to compare the best neurons with; give at least 1")
    groups_M, last_K = np.arange(n_total) // layer_width, ranking.order_K
    if experts is not None:
        groups_M, last_K = experts.groups_M, last_K[experts.in_training_M[last_K]]
    for size in sizes:
        if not 1 <= size <= len(last_K) // 2:
            there = f"{len(last_K)} neurons" + " that training prompts have" * (experts is not None)
            raise NegError(f"a set of {size} neurons cannot be checked; of {there} take 1 to {len(last_K) // 2}")
    return [one for size in dict.fromkeys(sizes) for one in _sets_of_size(ranking, size, groups_M, last_K, draws, seed)]


def chosen_neurons(sets: Sequence[SkillSet]) -> Ints:
    """Return the neurons of all sets together, in ascending order: flat indices, shape (K,)."""
    return np.unique(np.concatenate([one.neurons_K for one in sets]))


def conditions_of(sets: Sequence[SkillSet], shifts: Sequence[float]) -> tuple[Condition, ...]:
    """List the conditions that `shift_sets` measures, in its order: by set, then by direction, then by shift."""
    return tuple(
        Condition(one.kind, one.size, one.draw, direction, float(shift))
        for one in sets
        for direction in DIRECTIONS
        for shift in shifts
    )


def shift_sets(
    lm: LanguageModel,
    prompts: Sequence[str] | EncodedPrompts,
    labels: Labels | None = None,
    *,
    gold_P: ArrayLike,
    gold_negs_PK: ArrayLike,
    sets: Sequence[SkillSet],
    shifts: Sequence[float],
) -> CausalResult:
    """Shift sets of neurons together, towards each prompt's gold option or away from it.

    A shift d moves a neuron's activation a to a + d * g * s(a), where s(a) is +1 where a > 0, else -1, and g is the
    sign of its NEG for the gold option, or its polarity in the ranking. A positive shift asks every neuron to raise
    the gold option: its NEG is sure to, for each neuron alone; its polarity is a guess that does not know the answer.
    A neuron with g = 0 stays where it is. Directions are those of the unshifted pass.

    Parameters
    ----------
    lm : LanguageModel
    prompts : sequence of str, length P, or EncodedPrompts
        Encoded prompts bring their labels.
    labels : sequence of str, or one such sequence for each prompt
        Labels of the options, encoded exactly as given.
    gold_P : int array of shape (P,)
        Index of each prompt's gold option.
    gold_negs_PK : float array of shape (P, K), probability per unit of activation
        NEGs for the gold option of the neurons in `chosen_neurons(sets)`, in that order. Only signs matter.
    sets : sequence of SkillSet
    shifts : sequence of float
        Sizes other than zero, in units of activation.

    Returns
    -------
    CausalResult
        Rows in the order of `prompts`; conditions as in `conditions_of`.

    Raises
    ------
    PromptError, LabelError
        As for `neurgrad`.
    NegError
        If there are no sets or shifts, a shift is zero or not finite, a neuron does not exist, a gold option is not
        one of the options, or the NEGs do not fit or are not finite.
    """
    _check_settings(lm, sets, shifts)
    encoded = encode(lm.card, prompts, labels)
    n_prompts, n_options = encoded.label_ids_PO.shape
    gold = _checked_gold(gold_P, n_prompts, n_options)
    chosen_K = chosen_neurons(sets)
    signs_PK = np.sign(_checked_negs(gold_negs_PK, (n_prompts, len(chosen_K))))
    conditions = conditions_of(sets, shifts)
    result = CausalResult(
        conditions=conditions,
        gold_P=gold,
        base_probs_PO=np.empty((n_prompts, n_options), lm.result_type),
        probs_PMO=np.empty((n_prompts, len(conditions), n_options), lm.result_type),
    )
    places = [(*np.divmod(one.neurons_K, lm.layer_width), np.searchsorted(chosen_K, one.neurons_K)) for one in sets]

    def rows_of(prompt: int) -> list[JointShift]:
        return [
            JointShift(layers, neurons, shift * signs_K)
            for one, (layers, neurons, at) in zip(sets, places, strict=True)
            for signs_K in (signs_PK[prompt, at], one.polarity_K)
            for shift in shifts
        ]

    with in_float32(lm):
        for prompt, base_probs_O, probs_MO in shift_together(lm, encoded, rows_of):
            result.base_probs_PO[prompt] = base_probs_O
            result.probs_PMO[prompt] = probs_MO
    return result


def causal_rows(probe: str, result: CausalResult, *, n_bootstrap: int, seed: int = 0) -> list[CausalRow]:
    """Summarise the effect of each kind and number of neurons under each shift, over all prompts.

    The model answers with its most probable option (ties: the lowest, as for LM-Prob). Each prompt is compared with
    itself, and random draws are averaged within a prompt before anything else. The percentile bootstrap draws prompts,
    so its intervals say how the change would vary with other prompts, not with other draws.

    Parameters
    ----------
    probe : str
        Name of the probe that made the ranking.
    n_bootstrap : int
        Number of samples of prompts behind the intervals.

    Raises
    ------
    NegError
        If there are no prompts, or a probability is NaN or infinite.
    """
    if not len(result.gold_P):
        raise NegError(f"no prompts were shifted for the ranking of {probe!r}; a mean needs at least one")
    base = _answers(result.base_probs_PO[:, None], result.gold_P)
    shifted = _answers(result.probs_PMO, result.gold_P)
    weights_BP = bootstrap_weights(len(result.gold_P), n_bootstrap, seed)
    rows = []
    kinds = [one._replace(draw=0) for one in result.conditions]
    for kind in dict.fromkeys(kinds):
        drawn_M = [one == kind for one in kinds]
        effect = _effect(base, _Answers(*(values_PM[:, drawn_M] for values_PM in shifted)), weights_BP)
        rows.append(
            CausalRow(
                probe=probe,
                neurons=kind.neurons,
                size=kind.size,
                direction=kind.direction,
                shift=kind.shift,
                **effect._asdict(),
            )
        )
    return rows


def causal_differences(probe: str, result: CausalResult) -> list[CausalDifferenceRow]:
    """Compare the effect of the best neurons with that of random ones, for each number of neurons, rule and shift.

    In every prompt the best are compared with each draw; see `paired_difference`.

    Parameters
    ----------
    probe : str
        Name of the probe that made the ranking.

    Raises
    ------
    NegError
        As `causal_rows`.
    """
    n_prompts = len(result.gold_P)
    if not n_prompts:
        raise NegError(f"no prompts were shifted for the ranking of {probe!r}; a mean needs at least one")
    shifted = _answers(result.probs_PMO, result.gold_P)
    rows = []
    for at, best in enumerate(result.conditions):
        if best.neurons != "top":
            continue
        random = best._replace(neurons="random")
        drawn = [m for m, one in enumerate(result.conditions) if one._replace(draw=0) == random]
        accuracy, prob = (
            paired_difference(values_PM[:, [at]] - values_PM[:, drawn])
            for values_PM in (shifted.right_PM, shifted.prob_PM)
        )
        rows.append(
            CausalDifferenceRow(probe, best.size, best.direction, best.shift, n_prompts, len(drawn), *accuracy, *prob)
        )
    return rows


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_difference(differences_PD: Floats) -> Interval:
    """Return the mean difference over prompts and draws, for other prompts and other draws.

    Its variance is that of the means of prompts over P, plus that of the means of draws over D; the interval is
    Student's with Satterthwaite's degrees of freedom, as there are few draws. In simulations it holds in 95 % of
    cases from three draws on, with two in 88 %. With one draw, or one prompt, nothing is known of how others differ,
    and the interval says nothing of it.

    Parameters
    ----------
    differences_PD : float array of shape (P, D)

    References
    ----------
    Satterthwaite (1946), "An approximate distribution of estimates of variance components", Biometrics Bulletin 2.
    """
    mean = float(differences_PD.mean())
    parts = [
        (means.var(ddof=1) / len(means), len(means) - 1)
        for means in (differences_PD.mean(axis=1), differences_PD.mean(axis=0))
        if len(means) > 1
    ]
    variance = sum(part for part, _ in parts)
    if not variance > 0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    half = float(student.ppf(0.975, freedom)) * variance**0.5
    return Interval(mean, mean - half, mean + half)


def effect_of(
    gold_P: ArrayLike, base_probs_PO: Numbers, probs_PO: Numbers, *, n_bootstrap: int, seed: int = 0
) -> Effect:
    """Summarise the effect of one shift on prompts' answers, as `causal_rows` does.

    Parameters
    ----------
    gold_P : int array of shape (P,)
        Index of each prompt's gold option.
    base_probs_PO, probs_PO : float arrays of shape (P, O)
        Probability of every option without and with the shift.
    n_bootstrap : int
        Number of samples of prompts behind the intervals.

    Raises
    ------
    NegError
        If there are no prompts, a gold option is not one of the options, or a probability is NaN or infinite.
    """
    n_prompts, n_options = base_probs_PO.shape
    if not n_prompts:
        raise NegError("no prompts were shifted; a mean needs at least one")
    gold = _checked_gold(gold_P, n_prompts, n_options)
    base, shifted = (_answers(probs[:, None], gold) for probs in (base_probs_PO, probs_PO))
    return _effect(base, shifted, bootstrap_weights(n_prompts, n_bootstrap, seed))


def _sets_of_size(ranking: Ranking, size: int, groups_M: Ints, last_K: Ints, draws: int, seed: int) -> list[SkillSet]:
    top_K, bottom_K = ranking.order_K[:size], last_K[-size:]
    polarity_M = np.empty_like(ranking.polarity_K)
    polarity_M[ranking.order_K] = ranking.polarity_K
    drawn = [matched_neurons(top_K, groups_M, np.random.default_rng((seed, size, draw))) for draw in range(draws)]
    return [
        SkillSet("top", size, 0, top_K, polarity_M[top_K]),
        *(SkillSet("random", size, draw, one_K, polarity_M[one_K]) for draw, one_K in enumerate(drawn)),
        SkillSet("bottom", size, 0, bottom_K, polarity_M[bottom_K]),
    ]


def matched_neurons(top_K: Ints, groups_M: Ints, random: np.random.Generator) -> Ints:
    """Draw as many neurons of each group (its layer, say) as are in the top, and others before those of the top."""
    drawn = []
    for group, count in zip(*np.unique(groups_M[top_K], return_counts=True), strict=True):
        shuffled_N = random.permutation(np.flatnonzero(groups_M == group))
        others_first = np.argsort(np.isin(shuffled_N, top_K), kind="stable")
        drawn.append(shuffled_N[others_first[:count]])
    return np.concatenate(drawn)


def _check_settings(lm: LanguageModel, sets: Sequence[SkillSet], shifts: Sequence[float]) -> None:
    if not sets or not shifts:
        raise NegError(f"{len(sets)} sets and {len(shifts)} shifts were given; at least one of each is needed")
    checked_shifts(shifts)
    n_total = lm.n_layers * lm.layer_width
    for one in sets:
        for neuron in one.neurons_K[(one.neurons_K < 0) | (one.neurons_K >= n_total)]:
            layer, number = divmod(int(neuron), lm.layer_width)
            raise NegError(
                f"neuron {layer}.{number} does not exist; {lm.card.name} has layers 0..{lm.n_layers - 1} with neurons "
                f"0..{lm.layer_width - 1}"
            )


def _checked_gold(gold_P: ArrayLike, n_prompts: int, n_options: int) -> Ints:
    gold = check_gold(gold_P, n_options)
    if len(gold) != n_prompts:
        raise NegError(f"{len(gold)} gold options for {n_prompts} prompts: give one a prompt")
    return gold


def _checked_negs(gold_negs_PK: ArrayLike, expected: tuple[int, int]) -> Numbers:
    negs = np.asarray(gold_negs_PK)
    if negs.shape != expected:
        raise NegError(f"NEGs of shape {negs.shape} do not fit; these prompts and sets need {expected}")
    return check_finite(negs, "NEG", ("row", "chosen neuron"))


class _Answers(NamedTuple):
    right_PM: Floats
    prob_PM: Floats
    share_PM: Floats


def _answers(probs_PMO: Numbers, gold_P: Ints) -> _Answers:
    check_finite(probs_PMO, "probability", ("row", "condition", "option"))
    probs = probs_PMO.astype(np.float64)
    gold_PM = np.take_along_axis(probs, gold_P[:, None, None], axis=2)[:, :, 0]
    total_PM = probs.sum(axis=2)
    # A large shift can make all options too improbable for a float32: then no option is ahead.
    share_PM = np.divide(gold_PM, total_PM, out=np.full_like(total_PM, 1 / probs.shape[2]), where=total_PM > 0)
    return _Answers((probs.argmax(axis=2) == gold_P[:, None]).astype(np.float64), gold_PM, share_PM)


def _effect(base: _Answers, shifted: _Answers, weights_BP: Floats) -> Effect:
    """Compare the answers under one condition (M: its draws) with those without a shift (M: one)."""
    base_right_P, base_prob_P, base_share_P = (values_PM.mean(axis=1) for values_PM in base)
    right_P, prob_P, share_P = (values_PM.mean(axis=1) for values_PM in shifted)
    accuracy, prob = (_interval(change_P, weights_BP) for change_P in (right_P - base_right_P, prob_P - base_prob_P))
    return Effect(
        n_prompts=len(right_P),
        base_accuracy=float(base_right_P.mean()),
        accuracy=float(right_P.mean()),
        accuracy_change=accuracy.mean,
        change_low=accuracy.low,
        change_high=accuracy.high,
        prob_change=prob.mean,
        prob_low=prob.low,
        prob_high=prob.high,
        share_change=float((share_P - base_share_P).mean()),
    )


def _interval(changes_P: Floats, weights_BP: Floats) -> Interval:
    samples_B = weights_BP[1:] @ changes_P / len(changes_P)  # row 0 is the sample itself
    low, high = np.quantile(samples_B, (0.025, 0.975))
    return Interval(float(changes_P.mean()), float(low), float(high))
