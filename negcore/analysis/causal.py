"""The causal check of a ranking: do its best neurons move the answer more than random neurons, or than its last?

The best k neurons are shifted together towards or away from the gold option, and so are as many random neurons of
the same layers and the last k. A probe can read an answer from neurons that do not produce it, so only the part of the
effect that exceeds the random neurons' speaks for the ranking. The direction towards gold is taken in two ways. From
each neuron's NEG for the prompt's gold option: this moves the answer with any neurons and shows how far these could
move it. From the ranking's polarities: these do not know the answer, and are what the ranking claims.

Shapes: P prompts, O options, M conditions (a set of neurons and a shift), K neurons, L layers, N neurons a layer.
Neurons are flat indices, layer-major: neuron n of layer l is l*N + n.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from negcore.arrays import Ints
from negcore.errors import NegError
from negcore.measure.interventions import JointShift, shift_together
from negcore.measure.sweeps import checked_shifts
from negcore.measure.votes import Numbers, Ranking, Signs, check_finite, check_gold
from negcore.model.encoding import EncodedPrompts, Labels, encode
from negcore.model.language_model import LanguageModel
from negcore.model.layer_shapes import neuron_groups
from negcore.model.precision import in_float32
from negcore.probing.draws import matched_neurons
from negcore.store.answers import AnswerView
from negcore.store.reader import NegSplit

SetKind = Literal["top", "random", "bottom"]
Direction = Literal["gold", "polarity"]
DIRECTIONS: tuple[Direction, ...] = ("gold", "polarity")


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
    """Number of each neuron's group: see `neuron_groups`."""
    in_training_M: NDArray[np.bool_]
    """True if a training prompt has it."""

    @classmethod
    def of(cls, train: NegSplit) -> "ExpertNeurons | None":
        """Return those of a training split; None for a model without experts."""
        if train.layer_shapes is None:
            return None
        groups_M, there = neuron_groups(train.layer_shapes), []
        for layer, groups_N in enumerate(groups_M.reshape(train.n_layers, -1)):
            own_N = groups_N - groups_N[0]
            there.append(np.isin(own_N, train.experts(layer)) | (own_N == train.layer_shapes[layer].n_experts))
        return cls(groups_M, np.concatenate(there))


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
    answers: AnswerView | None = None
    """Rows and orders of the prompts, if rows were asked in several orders of their options; None if each is a row."""

    def by_answer(self) -> "CausalResult":
        """Return the probabilities of answers, a row each: the mean over its orders, whatever letter each stood at.

        Raises
        ------
        NegError
            If no orders are known.
        """
        view = self.answers
        if view is None:
            raise NegError("these prompts have no orders of their options: ask them with --permutations")
        probs_PAM = view.by_answer(self.probs_PMO.transpose(0, 2, 1))
        return CausalResult(
            conditions=self.conditions,
            gold_P=view.gold_R(self.gold_P),
            base_probs_PO=view.means(view.by_answer(self.base_probs_PO)),
            probs_PMO=view.means(probs_PAM).transpose(0, 2, 1),
        )


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
        Ranking of all L*N neurons; where layers differ in width, of those that there are.
    sizes : sequence of int
        Numbers of neurons, each at most half of all, so that the best and the last share none.
    n_layers, layer_width : int
        L and N.
    draws : int
        Number of random sets of each size. A set depends only on the ranking, its size, its draw and the seed.
    experts : ExpertNeurons, optional
        Of a mixture of experts. Random sets then have as many neurons of each expert as the best have, so that every
        prompt has as many of them, and the best and the last are among the neurons that training prompts have.

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
    if experts is None and len(ranking.order_K) != n_total:
        raise NegError(f"the ranking holds {len(ranking.order_K)} neurons of {n_total}; give one of all neurons")
    if draws < 1:
        raise NegError(f"{draws} random draws leave nothing to compare the best neurons with; give at least 1")
    groups_M, order_K = np.arange(n_total) // layer_width, ranking.order_K
    if experts is not None:
        groups_M, order_K = experts.groups_M, order_K[experts.in_training_M[order_K]]
    for size in sizes:
        if not 1 <= size <= len(order_K) // 2:
            there = f"{len(order_K)} neurons" + " that training prompts have" * (experts is not None)
            raise NegError(f"a set of {size} neurons cannot be checked; of {there} take 1 to {len(order_K) // 2}")
    polarity_M = np.zeros(n_total, np.int8)
    polarity_M[ranking.order_K] = ranking.polarity_K
    return [
        one for size in dict.fromkeys(sizes) for one in _sets_of_size(order_K, polarity_M, size, groups_M, draws, seed)
    ]


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
    gold_negs_PK : float array of shape (P, K), target per unit of activation
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
    gold = checked_gold(gold_P, n_prompts, n_options)
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
        for prompt, base_O, values_MO in shift_together(lm, encoded, rows_of):
            result.base_probs_PO[prompt] = base_O
            result.probs_PMO[prompt] = values_MO
    return result


def _sets_of_size(order_K: Ints, polarity_M: Signs, size: int, groups_M: Ints, draws: int, seed: int) -> list[SkillSet]:
    top_K, bottom_K = order_K[:size], order_K[-size:]
    drawn = [matched_neurons(top_K, groups_M, np.random.default_rng((seed, size, draw))) for draw in range(draws)]
    return [
        SkillSet("top", size, 0, top_K, polarity_M[top_K]),
        *(SkillSet("random", size, draw, one_K, polarity_M[one_K]) for draw, one_K in enumerate(drawn)),
        SkillSet("bottom", size, 0, bottom_K, polarity_M[bottom_K]),
    ]


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


def checked_gold(gold_P: ArrayLike, n_prompts: int, n_options: int) -> Ints:
    """Return gold options, one for each prompt; `NegError` if they are not that."""
    gold = check_gold(gold_P, n_options)
    if len(gold) != n_prompts:
        raise NegError(f"{len(gold)} gold options for {n_prompts} prompts: give one a prompt")
    return gold


def _checked_negs(gold_negs_PK: ArrayLike, expected: tuple[int, int]) -> Numbers:
    negs = np.asarray(gold_negs_PK)
    if negs.shape != expected:
        raise NegError(f"NEGs of shape {negs.shape} do not fit; these prompts and sets need {expected}")
    return check_finite(negs, "NEG", ("row", "chosen neuron"))
