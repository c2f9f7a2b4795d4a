"""Interventions on many neurons at once, to compare the true change with the sum of single predictions.

Shapes: P prompts, O options (labels), D shifts of sets, M sets of neurons, K neurons of a set, R shifted rows,
L layers, N neurons a layer (with experts: those of a prompt), V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.measure.active import Chosen, Experts, active_places, experts_of
from negcore.measure.forward import (
    TOKEN_BUDGET,
    ProbedBatch,
    copies,
    label_log_probabilities,
    probed_batches,
)
from negcore.measure.memory import BatchLimit
from negcore.measure.neurgrad import away_from_zero, neurgrad
from negcore.measure.question import Question, asked
from negcore.measure.spread import checked_spreads
from negcore.measure.sweeps import checked_shifts, choose_neurons, every_neuron
from negcore.measure.virtual_tokens import HookedAnswers
from negcore.model.encoding import EncodedPrompts, Labels
from negcore.model.experts import Routing
from negcore.model.language_model import LanguageModel
from negcore.model.precision import in_float32
from negcore.targets import DEFAULT_TARGET, Target, check_probabilities, checked_target, target_values

NeuronSet = Sequence[tuple[int, int]] | Ints

SET_SIZES = tuple(2**power for power in range(13))
"""1 to 4096 neurons: the sizes of the paper."""

# Most bytes of the shifts and logits of one forward pass.
_ROW_BYTES = 2**28


@dataclass(frozen=True)
class InterventionResult:
    """True and predicted changes of a label's target, each set of neurons shifted together."""

    sizes_M: Ints
    """Neurons of each set."""
    shifts_D: Floats
    """Size of each shift in units of activation, or of spreads; positive asks every neuron for a higher target."""
    base_P: Floats
    """Target of the label without a shift: its probability, or another."""
    values_PDM: Floats
    """Target of the label with the set shifted: `base_P` plus the change within one pass."""
    predicted_PDM: Floats
    """Sum over the set of NEG times shift: the change if neurons did not influence each other."""
    label_ids_P: Ints
    """Token id that each label became."""
    target: Target = DEFAULT_TARGET
    """The number that the values are."""
    n_shifted_PM: Ints | None = None
    """Neurons of each set that a prompt has, of a mixture of experts: only they are shifted. None for other models."""

    @property
    def base_probs_P(self) -> Floats:
        """Probability of the label without a shift; `NegError` if the target is another."""
        check_probabilities(self.target)
        return self.base_P

    @property
    def probs_PDM(self) -> Floats:
        """Probability of the label with the set shifted; `NegError` if the target is another."""
        check_probabilities(self.target)
        return self.values_PDM

    @property
    def changes_PDM(self) -> Floats:
        """True change of the target."""
        return self.values_PDM.astype(np.float64) - self.base_P.astype(np.float64)[:, None, None]


def random_sets(lm: LanguageModel, sizes: Sequence[int] = SET_SIZES, *, seed: int = 0) -> list[Ints]:
    """Draw sets of neurons from the whole model; each set holds the smaller ones.

    Raises
    ------
    NegError
        If a size is not positive or the model has fewer neurons.
    """
    n_total = sum(shape.n_neurons for shape in lm.layer_shapes)
    for size in sizes:
        if not 1 <= size <= n_total:
            raise NegError(f"a set of {size} neurons cannot be drawn; {lm.card.name} has 1 to {n_total}")
    every_K2 = every_neuron(lm.layer_shapes)[np.random.default_rng(seed).permutation(n_total)]
    return [every_K2[:size] for size in sizes]


def intervene(
    lm: LanguageModel,
    prompts: Sequence[str] | EncodedPrompts,
    labels: str | Labels | None = None,
    *,
    answers: Sequence[int] | Ints | None = None,
    target: Target = DEFAULT_TARGET,
    sets: Sequence[NeuronSet],
    shifts: ArrayLike,
    spreads: Sequence[ArrayLike] | None = None,
    negs_PLN: ArrayLike | None = None,
) -> InterventionResult:
    """Shift sets of neurons together, each neuron in the direction of its NEG.

    A neuron with gradient g and activation a moves to a + d * s(a), where d = shift * sign(g): a positive shift asks
    every neuron for a higher target, a negative one for a lower. The prediction is the sum of g * d. Activations
    and directions are those of the unshifted pass; the effect of shifts in earlier layers on later neurons is part of
    the true change.

    Parameters
    ----------
    lm, prompts, labels, answers, target
        As for `sweep`.
    sets : M sequences of (layer, neuron)
        For instance from `random_sets`.
    shifts : float array of shape (D,)
        Sizes other than zero in units of activation.
    spreads : M float arrays, optional
        Units of activation in a shift of 1, for each neuron of each set; by default 1. Neurons with a spread of zero do
        not move.
    negs_PLN : float array of shape (P, L, N), optional
        NEG in target per unit of activation; by default NeurGrad's estimate, and of a mixture of experts always.

    Raises
    ------
    PromptError, LabelError
        As for `neurgrad`.
    NegError
        If there is no set or shift, a shift is zero or not finite, a neuron does not exist, or the NEGs do not fit.

    References
    ----------
    Zhao, Jiang, Yoshinaga (ACL 2025), arXiv 2412.18053: multi-neuron intervention.
    """
    shifts_D = checked_shifts(shifts)
    chosen = [choose_neurons(lm, np.asarray(neurons)) for neurons in sets]
    if not chosen:
        raise NegError("no sets were given; at least one is needed")
    question = asked(lm, prompts, labels, answers, checked_target(target))
    n_prompts = len(question.ids)
    negs, n_there_PM = _negs_of_sets(lm, question, chosen, None if negs_PLN is None else np.asarray(negs_PLN))
    units = _units(spreads, chosen)
    by_set = (np.abs(negs_PK) * unit_K for negs_PK, unit_K in zip(negs, units, strict=True))
    sums_PM = np.stack([of_set_PK.sum(1, dtype=np.float64) for of_set_PK in by_set], axis=1)
    result = InterventionResult(
        sizes_M=np.array([len(neurons_K2) for neurons_K2 in chosen]),
        shifts_D=shifts_D,
        base_P=np.empty(n_prompts, lm.result_type),
        values_PDM=np.empty((n_prompts, len(shifts_D), len(chosen)), lm.result_type),
        predicted_PDM=shifts_D[:, None] * sums_PM[:, None],
        label_ids_P=question.answer_ids_P,
        target=question.target,
        n_shifted_PM=n_there_PM,
    )

    def rows_of(prompt: int) -> list[JointShift]:
        sizes = [np.sign(negs_PK[prompt]) * unit_K for negs_PK, unit_K in zip(negs, units, strict=True)]
        return [
            JointShift(neurons_K2[:, 0], neurons_K2[:, 1], shift * sizes_K)
            for shift in shifts_D.tolist()
            for neurons_K2, sizes_K in zip(chosen, sizes, strict=True)
        ]

    with in_float32(lm):
        for prompt, base_O, values_RO in shift_together(lm, question.prompts, rows_of, question.target):
            answer = question.answers_P[prompt]
            result.base_P[prompt] = base_O[answer]
            result.values_PDM[prompt] = values_RO[:, answer].reshape(len(shifts_D), len(chosen))
    return result


class _SetNegs(NamedTuple):
    """NEGs of the neurons of each set, (P, K), zero where a prompt does not have the neuron; and how many it has."""

    negs: list[Floats]
    n_there_PM: Ints | None


def _negs_of_sets(lm: LanguageModel, question: Question, sets: Sequence[Ints], negs_PLN: Floats | None) -> _SetNegs:
    """Return the NEGs of sets, checked if they were given.

    Raises
    ------
    NegError
        If they do not fit; ModelError if they are given of a mixture of experts.
    """
    n_prompts = len(question.ids)
    if negs_PLN is not None:
        lm.refuse_experts("interventions by NEGs that are given")
        if negs_PLN.shape != (expected := (n_prompts, lm.n_layers, lm.layer_width)):
            raise NegError(
                f"NEGs of shape {negs_PLN.shape} do not fit; these prompts and {lm.card.name} need {expected}"
            )
        return _SetNegs([negs_PLN[:, *neurons_K2.T] for neurons_K2 in sets], None)
    batch = neurgrad(lm, question.prompts, target=question.target)
    negs_PLN = batch.negs_POLN[np.arange(n_prompts), question.answers_P]
    placed = [Chosen.of(lm, batch.experts(lm.layer_shapes), neurons_K2, n_prompts) for neurons_K2 in sets]
    negs = [one.values(torch.from_numpy(negs_PLN)).numpy() for one in placed]
    there_PM = np.stack([one.there_BK.sum(1) for one in placed], axis=1) if lm.has_experts else None
    return _SetNegs(negs, there_PM)


def _units(spreads: Sequence[ArrayLike] | None, chosen: Sequence[Ints]) -> Sequence[Floats | int]:
    """Return the units of activation in a shift of 1, for the neurons of each set.

    Raises
    ------
    NegError
        If there are not as many as sets, or they do not fit.
    """
    if spreads is None:
        return [1] * len(chosen)
    if len(spreads) != len(chosen):
        raise NegError(f"spreads of {len(spreads)} sets were given for {len(chosen)}; give one array for each set")
    return [checked_spreads(own, len(neurons_K2)) for own, neurons_K2 in zip(spreads, chosen, strict=True)]


class JointShift(NamedTuple):
    """Neurons that are shifted together in one row."""

    layers_K: Ints
    neurons_K: Ints
    sizes_K: Floats
    """In units of activation; positive is away from zero."""

    def among_active(self, lm: LanguageModel, experts: Experts) -> "JointShift":
        """Return the shift of the neurons that a prompt has, by their places among those: see `active_places`."""
        (places_K,) = active_places(lm, experts, self.layers_K, self.neurons_K)
        there_K = places_K >= 0
        return JointShift(self.layers_K[there_K], places_K[there_K], self.sizes_K[there_K])


class ShiftedTogether(NamedTuple):
    """The target of one prompt's labels, by default their probability; float32, or float64 from a float64 model."""

    prompt: int
    """Index of the prompt."""
    base_O: Floats
    """Without a shift."""
    values_RO: Floats
    """With each row's neurons shifted: `base_O` plus the change within one pass, so that a shift without effect
    changes nothing, exactly."""


def shift_together(
    lm: LanguageModel,
    prompts: EncodedPrompts,
    rows_of: Callable[[int], Sequence[JointShift]],
    target: Target = DEFAULT_TARGET,
) -> Iterator[ShiftedTogether]:
    """Shift sets of neurons at the probed token, one prompt at a time; its rows share what comes before that token.

    Of a mixture of experts, the neurons of a set that the prompt has are shifted: those of the experts of its unshifted
    pass. Where the shifts of earlier layers lead the router away from such an expert, its neurons do not run, and there
    is nothing to shift.

    Activations, and so the directions away from zero, are those of the unshifted pass.

    Parameters
    ----------
    prompts : EncodedPrompts
    rows_of : callable
        Returns the rows of the prompt with that index.

    Yields
    ------
    ShiftedTogether
        In no particular order of the prompts.
    """
    limit = BatchLimit("rows of shifted sets")
    if not prompts.is_usual:
        for index in range(len(prompts.ids)):
            yield _shift_answers(HookedAnswers(lm, prompts, index, None, limit), index, rows_of(index), target, limit)
        return
    for batch in probed_batches(lm, prompts.ids, batch_size=1):
        (index,) = batch.rows
        label_ids_1O = torch.from_numpy(prompts.label_ids_PO[index : index + 1]).to(lm.device)
        yield _shift_prompt(batch, prompts.ids[index], rows_of(index), _Read(label_ids_1O, target), limit)


class _Read(NamedTuple):
    """The numbers that are read from logits: the target of one prompt's labels."""

    label_ids_1O: Tensor
    target: Target

    def values(self, logits_RV: Tensor) -> Tensor:
        """Return the target of every label: shape (R, O)."""
        label_ids_RO = self.label_ids_1O.expand(len(logits_RV), -1)
        return target_values(self.target, label_log_probabilities(logits_RV, label_ids_RO))


def _shift_prompt(
    batch: ProbedBatch, tokens: Sequence[int], rows: Sequence[JointShift], read: _Read, limit: BatchLimit
) -> ShiftedTogether:
    lm = batch.lm
    with torch.no_grad():
        logits_1V, activations_1LN, probed = batch.predict()
        experts = experts_of(probed)
        rows = [row.among_active(lm, experts) for row in rows]
        directions_LN = away_from_zero(activations_1LN[0])
        parts = limit.compute(
            len(rows),
            rows_of_a_pass(lm, len(tokens)),
            lambda chosen: _shifted(batch, tokens, [rows[row] for row in chosen], directions_LN, probed, read),
        )
    base_1O = read.values(logits_1V).cpu()
    values_RO = (base_1O.double() + torch.cat(parts)).to(base_1O.dtype)
    return ShiftedTogether(batch.rows[0], base_1O[0].numpy(), values_RO.numpy())


def _shift_answers(
    prompt: HookedAnswers, index: int, rows: Sequence[JointShift], target: Target, limit: BatchLimit
) -> ShiftedTogether:
    directions_LN = away_from_zero(prompt.activations_LN)

    def shifted(chosen: Sequence[int]) -> Tensor:
        steps_LRN = _steps([rows[row] for row in chosen], directions_LN)
        log_probs_RO = prompt.shifted(dict(enumerate(steps_LRN)), 1 + len(chosen))
        values_RO = target_values(target, log_probs_RO.double())
        return (values_RO[1:] - values_RO[:1]).cpu()

    with torch.no_grad():
        parts = limit.compute(len(rows), min(prompt.max_rows, rows_of_a_pass(prompt.lm, 1)), shifted)
    base_1O = target_values(target, prompt.log_probs_O[None]).cpu()
    values_RO = (base_1O.double() + torch.cat(parts)).to(base_1O.dtype)
    return ShiftedTogether(index, base_1O[0].numpy(), values_RO.numpy())


def rows_of_a_pass(lm: LanguageModel, n_tokens: int) -> int:
    """Return how many shifted rows should fit in memory, with keys and values, beside the unshifted one."""
    row_bytes = np.dtype(lm.result_type).itemsize * (lm.n_layers * lm.active_width + lm.card.vocab_size)
    return max(1, min(TOKEN_BUDGET // n_tokens, _ROW_BYTES // row_bytes) - 1)


def _shifted(
    prompt: ProbedBatch,
    tokens: Sequence[int],
    rows: Sequence[JointShift],
    directions_LN: Tensor,
    probed: Mapping[int, Routing],
    read: _Read,
) -> Tensor:
    """Return the changes p(d) - p(0) of some rows: shape (R, O), on the CPU; an unshifted row runs in the same pass."""
    n_rows, steps_LRN = 1 + len(rows), _steps(rows, directions_LN)
    logits_RV = copies(prompt, tokens, n_rows).predict(dict(enumerate(steps_LRN)), probed).logits_BV
    values_RO = read.values(logits_RV).double()
    return (values_RO[1:] - values_RO[:1]).cpu()


def _steps(rows: Sequence[JointShift], directions_LN: Tensor) -> Tensor:
    """Return shifts as they are added to each layer, below a row without any: shape (L, 1 + R, N)."""
    n_layers, width = directions_LN.shape
    steps_LRN = directions_LN.new_zeros(n_layers, 1 + len(rows), width)
    for row, shift in enumerate(rows, start=1):
        layers_K, neurons_K = (torch.from_numpy(places).to(directions_LN.device) for places in shift[:2])
        sizes_K = torch.from_numpy(shift.sizes_K).to(directions_LN)
        steps_LRN[layers_K, row, neurons_K] = sizes_K * directions_LN[layers_K, neurons_K]
    return steps_LRN
