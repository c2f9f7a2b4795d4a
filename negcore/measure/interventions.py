"""Interventions on many neurons at once: does the sum of single predictions foretell the true change?

Shapes: P prompts, O options (labels), M sets of neurons, K neurons of a set, R shifted rows, L layers,
N neurons a layer, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from negcore.errors import NegError
from negcore.measure.forward import (
    TOKEN_BUDGET,
    CausalBatch,
    MaskedBatch,
    ProbedBatch,
    label_probabilities,
    probed_batches,
)
from negcore.measure.neurgrad import away_from_zero, neurgrad
from negcore.measure.sweeps import Floats, choose_neurons, one_label_each
from negcore.model.encoding import encode_labels, encode_prompts
from negcore.model.language_model import LanguageModel

Array = NDArray[Any]
NeuronSet = Sequence[tuple[int, int]] | NDArray[np.int64]

SET_SIZES = tuple(2**power for power in range(13))
"""1 to 4096 neurons: the sizes of the paper."""

# Bytes that the shifts and logits of the rows of one forward pass may take.
_ROW_BYTES = 2**28


@dataclass(frozen=True)
class InterventionResult:
    """True and predicted changes of a label's probability, each set of neurons shifted together."""

    sizes_M: NDArray[np.int64]
    """Neurons of each set."""
    base_probs_P: Array
    """Probability of the label without a shift."""
    probs_PM: Array
    """Probability of the label with the set shifted."""
    predicted_PM: Floats
    """Sum over the set of NEG times shift: the change if neurons did not meet."""
    label_ids_P: NDArray[np.int64]
    """Token id that each label became."""

    @property
    def changes_PM(self) -> Floats:
        """True change of the probability."""
        return self.probs_PM.astype(np.float64) - self.base_probs_P.astype(np.float64)[:, None]

    def correlations(self) -> dict[int, float]:
        """Pearson r between predicted and true changes, over the prompts and sets of each size.

        Returns
        -------
        dict of set size to r
            NaN where there are fewer than two changes, or all are equal.
        """
        return {int(size): self._correlation(self.sizes_M == size) for size in np.unique(self.sizes_M)}

    def _correlation(self, sets_M: NDArray[np.bool_]) -> float:
        predicted, true = self.predicted_PM[:, sets_M].ravel(), self.changes_PM[:, sets_M].ravel()
        if np.ptp(predicted) == 0 or np.ptp(true) == 0:
            return float("nan")
        return float(np.corrcoef(predicted, true)[0, 1])


def random_sets(lm: LanguageModel, sizes: Sequence[int] = SET_SIZES, *, seed: int = 0) -> list[NDArray[np.int64]]:
    """Sets of neurons drawn from the whole model, each holding the smaller ones.

    Raises
    ------
    NegError
        If a size is not positive or the model has not so many neurons.
    """
    n_total = lm.n_layers * lm.n_neurons
    for size in sizes:
        if not 1 <= size <= n_total:
            raise NegError(f"a set of {size} neurons cannot be drawn; {lm.card.name} has 1 to {n_total}")
    order = np.random.default_rng(seed).permutation(n_total)
    return [np.stack(np.divmod(order[:size], lm.n_neurons), axis=1) for size in sizes]


def intervene(
    lm: LanguageModel,
    prompts: Sequence[str],
    labels: str | Sequence[str],
    *,
    sets: Sequence[NeuronSet],
    shift: float,
    negs_PLN: ArrayLike | None = None,
) -> InterventionResult:
    """Shift sets of neurons together, each neuron in the direction of its NEG.

    A neuron with gradient g and activation a moves to a + d * s(a), where d = shift * sign(g): a positive shift asks
    every neuron for a higher probability, a negative one for a lower. The prediction is the sum of g * d. Activations
    and directions are those of the unshifted pass; what shifts in earlier layers do to later neurons is left in.

    Parameters
    ----------
    lm : LanguageModel
    prompts : sequence of str, length P
    labels : str, or sequence of str, length P
        The target of all prompts or of each; encoded exactly as given.
    sets : M sequences of (layer, neuron)
        For instance of `random_sets`.
    shift : float
        In units of activation.
    negs_PLN : float array of shape (P, L, N), optional
        NEG in probability per unit of activation; by default NeurGrad's estimate.

    Raises
    ------
    PromptError, LabelError
        As for `neurgrad`.
    NegError
        If the shift is zero or not finite, there is no set, a neuron does not exist, or the gradients do not fit.

    References
    ----------
    Zhao, Jiang, Yoshinaga (ACL 2025), arXiv 2412.18053: multi-neuron intervention.
    """
    check_shift(shift)
    chosen = [choose_neurons(lm, np.asarray(neurons)) for neurons in sets]
    if not chosen:
        raise NegError("no sets were given; at least one is needed")
    each = one_label_each(labels, len(prompts))
    ids = encode_prompts(lm.card, prompts)
    label_ids_P1 = encode_labels(lm.tokenizer, each, len(prompts))
    expected = (len(ids), lm.n_layers, lm.n_neurons)
    negs = neurgrad(lm, prompts, each).negs_POLN[:, 0] if negs_PLN is None else np.asarray(negs_PLN)
    if negs.shape != expected:
        raise NegError(f"gradients of shape {negs.shape} do not fit; these prompts and {lm.card.name} need {expected}")
    kind = np.float64 if lm.dtype == "float64" else np.float32
    places = [(neurons_K2[:, 0], neurons_K2[:, 1]) for neurons_K2 in chosen]
    result = InterventionResult(
        sizes_M=np.array([len(neurons) for neurons in chosen]),
        base_probs_P=np.empty(len(ids), kind),
        probs_PM=np.empty((len(ids), len(chosen)), kind),
        predicted_PM=np.stack([shift * np.abs(negs[:, *place]).sum(1, dtype=np.float64) for place in places], axis=1),
        label_ids_P=label_ids_P1[:, 0],
    )

    def rows_of(prompt: int) -> list[JointShift]:
        return [JointShift(*place, shift * np.sign(negs[prompt, *place])) for place in places]

    for prompt, base_probs_1, probs_M1 in shift_together(lm, ids, label_ids_P1, rows_of):
        result.base_probs_P[prompt] = base_probs_1[0]
        result.probs_PM[prompt] = probs_M1[:, 0]
    return result


def check_shift(shift: float) -> None:
    """Raise `NegError` unless a shift is a finite size other than zero."""
    if not np.isfinite(shift) or shift == 0:
        raise NegError(f"shift {shift} cannot be measured; give a finite size other than zero")


class JointShift(NamedTuple):
    """One row: neurons that are shifted together."""

    layers_K: NDArray[np.int64]
    neurons_K: NDArray[np.int64]
    sizes_K: Array
    """In units of activation; positive is away from zero."""


class ShiftedTogether(NamedTuple):
    """One prompt's probabilities of its labels; float32, or float64 from a float64 model."""

    prompt: int
    """Its index."""
    base_probs_O: Array
    """Without a shift."""
    probs_RO: Array
    """With the neurons of each row shifted."""


def shift_together(
    lm: LanguageModel,
    ids: Sequence[Sequence[int]],
    label_ids_PO: NDArray[np.int64],
    rows_of: Callable[[int], Sequence[JointShift]],
) -> Iterator[ShiftedTogether]:
    """Shift sets of neurons at the probed token, one prompt at a time; its rows share what comes before that token.

    Activations, and so the directions away from zero, are those of the unshifted pass.

    Parameters
    ----------
    ids : token ids of every prompt
    label_ids_PO : int array of shape (P, O)
    rows_of : callable
        The rows of the prompt with that index.

    Yields
    ------
    ShiftedTogether
        In no particular order of the prompts.
    """
    for prompt in probed_batches(lm, ids, batch_size=1):
        (index,) = prompt.rows
        label_ids_1O = torch.from_numpy(label_ids_PO[index : index + 1]).to(lm.device)
        with torch.no_grad():
            logits_1V, activations_1LN = prompt.predict()
            directions_LN = away_from_zero(activations_1LN[0])
            parts = [
                _shifted(prompt, ids[index], rows, directions_LN, label_ids_1O)
                for rows in _passes(lm, len(ids[index]), rows_of(index))
            ]
        base_probs_1O = label_probabilities(logits_1V, label_ids_1O)
        yield ShiftedTogether(index, base_probs_1O[0].cpu().numpy(), torch.cat(parts).numpy())


def _passes(lm: LanguageModel, n_tokens: int, rows: Sequence[JointShift]) -> Iterator[Sequence[JointShift]]:
    """The rows in parts that fit in memory beside their keys and values."""
    row_bytes = lm.model.dtype.itemsize * (lm.n_layers * lm.n_neurons + int(lm.card.text_config.vocab_size))
    step = max(1, min(TOKEN_BUDGET // n_tokens, _ROW_BYTES // row_bytes))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _shifted(
    prompt: ProbedBatch,
    tokens: Sequence[int],
    rows: Sequence[JointShift],
    directions_LN: Tensor,
    label_ids_1O: Tensor,
) -> Tensor:
    steps_LRN = directions_LN.new_zeros(prompt.lm.n_layers, len(rows), prompt.lm.n_neurons)
    for row, shift in enumerate(rows):
        layers_K, neurons_K = (torch.from_numpy(places).to(prompt.lm.device) for places in shift[:2])
        sizes_K = torch.from_numpy(shift.sizes_K).to(directions_LN)
        steps_LRN[layers_K, row, neurons_K] = sizes_K * directions_LN[layers_K, neurons_K]
    logits_RV = _copies(prompt, tokens, len(rows)).predict(dict(enumerate(steps_LRN))).logits_BV
    return label_probabilities(logits_RV, label_ids_1O.expand(len(rows), -1)).cpu()


def _copies(prompt: ProbedBatch, tokens: Sequence[int], n_rows: int) -> ProbedBatch:
    """The one prompt of a batch in so many rows; what comes before the probed token does not run again."""
    ids = [tokens] * n_rows
    if isinstance(prompt, CausalBatch):
        return CausalBatch(prompt.lm, range(n_rows), ids, prompt.cache, len(tokens) - 1)
    return MaskedBatch(prompt.lm, range(n_rows), ids)
