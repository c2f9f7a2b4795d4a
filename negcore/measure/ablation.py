"""Predictions with many neurons silent at once: each is set to zero at the probed token, in every layer.

A silent neuron stays zero whatever the layers before it do. Other tokens keep theirs. What is measured are the
options' log-probabilities, and how far the whole prediction moves: the Kullback-Leibler divergence over the vocabulary.

Shapes: P prompts, O options, R sets of neurons (rows), L layers, N neurons a layer, M = L*N neurons, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negcore.arrays import Floats
from negcore.errors import NegError
from negcore.measure.forward import ProbedBatch, copies, probed_batches
from negcore.measure.hooks import hook_site
from negcore.measure.interventions import rows_of_a_pass
from negcore.measure.memory import BatchLimit
from negcore.model.encoding import EncodedPrompts, Labels, encode
from negcore.model.language_model import LanguageModel
from negcore.model.precision import in_float32


class AblationResult(NamedTuple):
    """Predictions with and without sets of silent neurons; float32, or float64 from a float64 model."""

    base_log_probs_PO: Floats
    """Log-probabilities of the options with all neurons; softmax over the whole vocabulary."""
    log_probs_PRO: Floats
    """With each set silent: `base_log_probs_PO` plus the change within one pass."""
    kl_PR: Floats
    """Kullback-Leibler divergence in nats: of the prediction with a silent set from that with all neurons."""


def silence_sets(
    lm: LanguageModel,
    prompts: Sequence[str] | EncodedPrompts,
    labels: Labels | None = None,
    *,
    silent_RM: NDArray[np.bool_],
) -> AblationResult:
    """Predict the options of prompts with each set of neurons silent.

    Parameters
    ----------
    lm : LanguageModel
    prompts : sequence of str, length P, or EncodedPrompts
        Encoded prompts bring their labels.
    labels : sequence of str, or one such sequence for each prompt
        Labels of the options, encoded exactly as given.
    silent_RM : bool array of shape (R, M)
        True where a neuron is silent; neuron n of layer l is l*N + n.

    Raises
    ------
    PromptError, LabelError
        As for `neurgrad`.
    NegError
        If there is no set, or the sets are not of this model's neurons; ModelError if it has experts.
    """
    lm.refuse_experts("curves of silent neurons")
    n_neurons = lm.n_layers * lm.layer_width
    if silent_RM.ndim != 2 or not len(silent_RM) or silent_RM.shape[1] != n_neurons or silent_RM.dtype != np.bool_:
        raise NegError(
            f"sets of shape {silent_RM.shape} ({silent_RM.dtype}) do not fit: {lm.card.name} has {n_neurons} neurons, "
            "so give (sets, neurons) of true and false"
        )
    encoded = encode(lm.card, prompts, labels)
    encoded.refuse_unusual("curves of silent neurons")
    n_prompts, n_options = encoded.label_ids_PO.shape
    result = AblationResult(
        np.empty((n_prompts, n_options), lm.result_type),
        np.empty((n_prompts, len(silent_RM), n_options), lm.result_type),
        np.empty((n_prompts, len(silent_RM)), lm.result_type),
    )
    limit = BatchLimit("rows of silent neurons")
    with in_float32(lm), torch.no_grad():
        for batch in probed_batches(lm, encoded.ids, batch_size=1):
            (index,) = batch.rows
            label_ids_O = torch.from_numpy(encoded.label_ids_PO[index]).to(lm.device)
            base_O, *parts = _silence_prompt(batch, encoded.ids[index], silent_RM, label_ids_O, limit)
            result.base_log_probs_PO[index] = base_O.numpy()
            result.log_probs_PRO[index] = (base_O + torch.cat([changes for changes, _ in parts])).numpy()
            result.kl_PR[index] = torch.cat([kl for _, kl in parts]).numpy()
    return result


def _silence_prompt(
    batch: ProbedBatch, tokens: Sequence[int], silent_RM: NDArray[np.bool_], label_ids_O: Tensor, limit: BatchLimit
) -> list[Any]:
    """Return the base log-probabilities (O,), then for each pass the changes (R, O) and divergences (R,)."""
    base_O = _log_probs(batch.predict().logits_BV)[0, label_ids_O].double().cpu()
    n_rows = rows_of_a_pass(batch.lm, len(tokens))
    parts = limit.compute(
        len(silent_RM), n_rows, lambda rows: _silence_rows(batch, tokens, silent_RM[rows], label_ids_O)
    )
    return [base_O, *parts]


def _silence_rows(
    batch: ProbedBatch, tokens: Sequence[int], silent_RM: NDArray[np.bool_], label_ids_O: Tensor
) -> tuple[Tensor, Tensor]:
    lm, n_rows = batch.lm, 1 + len(silent_RM)  # the first row is unchanged: differences are within one pass
    silent_RLN = torch.zeros(n_rows, lm.n_layers, lm.layer_width, dtype=torch.bool)
    silent_RLN[1:] = torch.from_numpy(silent_RM).view(-1, lm.n_layers, lm.layer_width)
    rows = copies(batch, tokens, n_rows)
    with _silenced(lm, rows.positions_B, silent_RLN.to(lm.device)):
        log_probs_RV = _log_probs(rows.predict().logits_BV)
    labels_RO = log_probs_RV[:, label_ids_O].double().cpu()
    base_V = log_probs_RV[:1]
    kl_R = (base_V.exp() * (base_V - log_probs_RV[1:])).sum(1).double().cpu()
    return labels_RO[1:] - labels_RO[:1], kl_R


def _log_probs(logits_RV: Tensor) -> Tensor:
    return logits_RV.log_softmax(1, dtype=torch.float64 if logits_RV.dtype == torch.float64 else torch.float32)


@contextmanager
def _silenced(lm: LanguageModel, positions_R: Tensor, silent_RLN: Tensor) -> Iterator[None]:
    """Set the neurons of every row's probed token to zero where they are silent; no hook remains on leaving."""
    rows = torch.arange(len(positions_R), device=lm.device)

    def silence(layer: int, values: Tensor) -> Tensor:
        first = values.shape[-1] - lm.layer_width  # a fused projection holds the gate first, then `up`
        changed_RTN = values.view(len(positions_R), -1, values.shape[-1]).clone()
        probed_RN = changed_RTN[rows, positions_R]
        probed_RN[:, first:] = probed_RN[:, first:].masked_fill(silent_RLN[:, layer], 0)
        changed_RTN[rows, positions_R] = probed_RN
        return changed_RTN.view_as(values)

    with ExitStack() as hooks:
        for layer in range(lm.n_layers):
            hooks.callback(hook_site(lm, layer, partial(silence, layer)).remove)
        yield
