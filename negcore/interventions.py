"""Interventions on many neurons at once: does the sum of single predictions foretell the true change?

Shapes: P prompts, M sets of neurons, K neurons of a set, L layers, N neurons a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from negcore.encoding import encode_labels, encode_prompts
from negcore.errors import NegError
from negcore.forward import ProbedBatch, label_probabilities, probed_batches
from negcore.gradients import away_from_zero, neurgrad
from negcore.models import LanguageModel
from negcore.sweeps import Floats, choose_neurons, one_label_each

Array = NDArray[Any]
NeuronSet = Sequence[tuple[int, int]] | NDArray[np.int64]

SET_SIZES = tuple(2**power for power in range(13))
"""1 to 4096 neurons: the sizes of the paper."""


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
    if not np.isfinite(shift) or shift == 0:
        raise NegError(f"shift {shift} cannot be measured; give a finite size other than zero")
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
    result = InterventionResult(
        sizes_M=np.array([len(neurons) for neurons in chosen]),
        base_probs_P=np.empty(len(ids), kind),
        probs_PM=np.empty((len(ids), len(chosen)), kind),
        predicted_PM=np.empty((len(ids), len(chosen))),
        label_ids_P=label_ids_P1[:, 0],
    )
    for index, tokens in enumerate(ids):
        _fill(result, lm, index, tokens, chosen, shift, negs[index])
    return result


def _fill(
    result: InterventionResult,
    lm: LanguageModel,
    index: int,
    tokens: list[int],
    sets: list[NDArray[np.int64]],
    shift: float,
    negs_LN: Array,
) -> None:
    for column, neurons_K2 in enumerate(sets):
        chosen_K = negs_LN[tuple(neurons_K2.T)].astype(np.float64)
        result.predicted_PM[index, column] = shift * np.abs(chosen_K).sum()
    # Every row is the same prompt, so all its tokens but the last run once.
    for batch in probed_batches(lm, [tokens] * len(sets)):
        label_B1 = torch.full((len(batch.rows), 1), int(result.label_ids_P[index]), device=lm.device)
        with torch.no_grad():
            logits_BV, activations_BLN = batch.predict()
            result.base_probs_P[index] = label_probabilities(logits_BV[:1], label_B1[:1]).item()
            steps = _steps(batch, activations_BLN[0], [sets[row] for row in batch.rows], shift, negs_LN)
            probs_B1 = label_probabilities(batch.predict(steps).logits_BV, label_B1)
        result.probs_PM[index, batch.rows] = probs_B1[:, 0].cpu().numpy()


def _steps(
    batch: ProbedBatch, activations_LN: torch.Tensor, sets: list[NDArray[np.int64]], shift: float, negs_LN: Array
) -> dict[int, torch.Tensor]:
    """What each row adds to the neurons of its set, by layer."""
    signs_LN = torch.from_numpy(np.sign(negs_LN)).to(activations_LN)
    step_LN = shift * signs_LN * away_from_zero(activations_LN)
    steps_LBN = torch.zeros(batch.lm.n_layers, len(sets), batch.lm.n_neurons).to(activations_LN)
    for row, neurons_K2 in enumerate(sets):
        layers_K, neurons_K = torch.from_numpy(neurons_K2.T).to(batch.lm.device)
        steps_LBN[layers_K, row, neurons_K] = step_LN[layers_K, neurons_K]
    return dict(enumerate(steps_LBN))
