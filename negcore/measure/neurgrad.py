"""NeurGrad: the estimated neuron empirical gradient (NEG) of all neurons for all labels, one backward pass a batch.

Shapes: P prompts, O options (labels), L layers, N neurons a layer, B rows of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from negcore.arrays import Floats, Ints, count_nonfinite
from negcore.measure.forward import CausalBatch, ProbedBatch, label_probabilities, measure_batches, on_device
from negcore.measure.hooks import zero_shifts
from negcore.measure.memory import BatchLimit
from negcore.model.encoding import EncodedPrompts, Labels, encode
from negcore.model.language_model import LanguageModel

# Most bytes of the gradients of a batch's logits: options x rows x vocabulary.
_LOGIT_BYTES = 2**28
# Most bytes of one array that are locked in the host's memory.
_PINNED_BYTES = 2**32


class Nonfinite(NamedTuple):
    """NaN and infinite values of one prompt."""

    row: int
    layers: tuple[int, ...]
    """Layers with such NEGs or activations; empty if only probabilities are affected."""
    n_values: int
    """Count over NEGs, activations and probabilities."""


@dataclass(frozen=True, slots=True)
class NeurGradBatch:
    """NEG estimates of some prompts; float32, or float64 from a float64 model."""

    negs_POLN: Floats
    """Probability per unit of activation, in the direction away from zero."""
    activations_PLN: Floats
    """Activation of every neuron at the probed token."""
    probs_PO: Floats
    """Probability of every label, softmax over the whole vocabulary."""
    label_ids_PO: Ints
    """Token id that each label became."""

    def nonfinite(self) -> list[Nonfinite]:
        """Count each prompt's NaN and infinite values as float32, which shards hold; list affected prompts."""
        in_negs_PL = np.stack([count_nonfinite(layer_PON) for layer_PON in self.negs_POLN.transpose(2, 0, 1, 3)], 1)
        in_activations_PL = np.stack([count_nonfinite(layer_PN) for layer_PN in self.activations_PLN.swapaxes(0, 1)], 1)
        by_layer_PL = in_negs_PL + in_activations_PL
        counts_P = by_layer_PL.sum(axis=1) + count_nonfinite(self.probs_PO)
        return [
            Nonfinite(row, tuple(np.flatnonzero(by_layer_PL[row]).tolist()), int(counts_P[row]))
            for row in np.flatnonzero(counts_P).tolist()
        ]


def neurgrad(
    lm: LanguageModel,
    prompts: Sequence[str] | EncodedPrompts,
    labels: Labels | None = None,
    *,
    batch_size: int | None = None,
) -> NeurGradBatch:
    """Estimate the NEG of every feed-forward neuron for every label.

    NeurGrad = dp/da * s(a), with s(a) = +1 where the activation a is positive and -1 elsewhere: the slope, at no
    shift, of the label's probability p against a shift that moves the neuron away from zero.

    Parameters
    ----------
    lm : LanguageModel
    prompts : sequence of str, length P, or EncodedPrompts
        Each ends where its label is to follow; masked models' prompts hold one mask. Encoded prompts bring
        their labels.
    labels : sequence of str, or one such sequence for each prompt
        Encoded exactly as given: a leading space is part of a label.
    batch_size : int, optional
        Prompts whose last tokens, or which as a whole, run side by side; by default chosen by length. It changes
        memory, speed and the last digits of the result. Where memory runs out, the batch and all after it are halved.

    Returns
    -------
    NeurGradBatch
        Rows in the order of `prompts`.

    Raises
    ------
    PromptError
        If a prompt is empty or too long, or a masked model's prompt does not hold exactly one mask.
    LabelError
        If a label is not exactly one token, or two labels of a prompt are the same token.
    ModelError
        If the model's gradients failed its check at load.
    RuntimeError
        If memory does not suffice for a single prompt (for CUDA, `torch.OutOfMemoryError`).

    References
    ----------
    Zhao, Jiang, Yoshinaga (ACL 2025), arXiv 2412.18053: NeurGrad.

    Differs from the paper: a neuron whose activation is exactly zero moves in the negative direction here and in the
    sweep alike; the released sweep never moves it.
    """
    encoded = encode(lm.card, prompts, labels)
    n_prompts, n_options = encoded.label_ids_PO.shape
    results = _Results(
        negs_POLN=_host_tensor(lm, n_prompts, n_options, lm.n_layers, lm.layer_width),
        activations_PLN=_host_tensor(lm, n_prompts, lm.n_layers, lm.layer_width),
        probs_PO=_host_tensor(lm, n_prompts, n_options),
    )

    def measure(batch: ProbedBatch, rows: list[int]) -> None:
        _fill(results, rows, batch, encoded.label_ids_PO[rows])

    measure_batches(
        lm,
        encoded.ids,
        measure,
        BatchLimit("prompts"),
        batch_size=batch_size,
        max_rows=_LOGIT_BYTES // (4 * n_options * lm.card.vocab_size),
        n_shared=encoded.n_shared,
    )
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)  # the last numbers may still be on their way
    negs_POLN, activations_PLN, probs_PO = (tensor.numpy() for tensor in results)
    return NeurGradBatch(negs_POLN, activations_PLN, probs_PO, encoded.label_ids_PO)


def away_from_zero(activations: Tensor) -> Tensor:
    """Return the direction s(a) of a positive shift: +1 where a > 0, else -1."""
    return torch.where(activations > 0, 1.0, -1.0).to(activations.dtype)


class LabelGradients(NamedTuple):
    """Gradients of each row's label probabilities by its neurons."""

    grads_LOBN: tuple[Tensor, ...]
    """One tensor of shape (O, B, N) for each layer."""
    activations_BLN: Tensor
    probs_BO: Tensor


def label_gradients(batch: ProbedBatch, label_ids_BO: Tensor) -> LabelGradients:
    """Differentiate the probability of every label by every neuron at the probed token, in one backward pass.

    Raises
    ------
    ModelError
        If the model's gradients failed its check at load.
    """
    batch.lm.require("neurgrad")
    if isinstance(batch, CausalBatch) and not computes_by_row(batch.lm.device):
        return _options_in_rows(batch, label_ids_BO)
    n_rows, n_options = label_ids_BO.shape
    shifts = zero_shifts(batch.lm, n_rows)
    with torch.enable_grad():
        logits_BV, activations_BLN = batch.predict(shifts)
        probs_BO = label_probabilities(logits_BV, label_ids_BO)
        # Rows do not see each other, so one unit vector for each option gives every row's gradient at once.
        unit_OBO = torch.eye(n_options, dtype=probs_BO.dtype, device=batch.lm.device)[:, None].expand(-1, n_rows, -1)
        grads = _gradients(batch.lm, probs_BO, list(shifts.values()), unit_OBO)
    return LabelGradients(grads, activations_BLN, probs_BO.detach())


def computes_by_row(device: torch.device) -> bool:
    """Tell whether a pass of few tokens takes longer the more they are, as on a CPU.

    A GPU takes as long for hundreds of tokens as for one: it reads the same weights.
    """
    return device.type != "cuda"


def _options_in_rows(batch: CausalBatch, label_ids_BO: Tensor) -> LabelGradients:
    """Differentiate with a row for each option: a plain backward pass, whose steps a GPU's host starts faster."""
    n_rows, n_options = label_ids_BO.shape
    shifts = zero_shifts(batch.lm, n_rows * n_options)
    with torch.enable_grad():
        logits_RV, activations_RLN = batch.repeated(n_options).predict(shifts)
        probs_R1 = label_probabilities(logits_RV, label_ids_BO.reshape(-1, 1))
        grads_RN = torch.autograd.grad(probs_R1.sum(), list(shifts.values()))
    grads = tuple(grad_RN.view(n_rows, n_options, -1).transpose(0, 1) for grad_RN in grads_RN)
    return LabelGradients(grads, activations_RLN[::n_options], probs_R1.detach().view(n_rows, n_options))


class _Results(NamedTuple):
    """Tensors on the host, as `NeurGradBatch` has them."""

    negs_POLN: Tensor
    activations_PLN: Tensor
    probs_PO: Tensor


def _host_tensor(lm: LanguageModel, *shape: int) -> Tensor:
    """Return an empty tensor on the host, one that a GPU can write to while it computes unless that takes too much."""
    result_type = torch.float64 if lm.model.dtype == torch.float64 else torch.float32
    is_pinned = lm.device.type == "cuda" and prod(shape) * result_type.itemsize <= _PINNED_BYTES
    return torch.empty(shape, dtype=result_type, pin_memory=is_pinned)


def _fill(results: _Results, rows: Sequence[int], batch: ProbedBatch, label_ids_BO: Ints) -> None:
    grads, activations_BLN, probs_BO = label_gradients(batch, on_device(batch.lm, label_ids_BO))
    negs_BOLN = torch.stack(grads, dim=2).transpose(0, 1) * away_from_zero(activations_BLN)[:, None]
    for result, values in zip(results, (negs_BOLN, activations_BLN, probs_BO), strict=True):
        wide = values.to(result.dtype).contiguous()
        for row, value in zip(rows, wide, strict=True):
            result[row].copy_(value, non_blocking=True)


def _gradients(lm: LanguageModel, probs_BO: Tensor, inputs: list[Tensor], unit_OBO: Tensor) -> tuple[Tensor, ...]:
    """Differentiate in one backward pass, or in one for each option where a model's code may not be batched."""
    if lm.batched_backward:
        return torch.autograd.grad(probs_BO, inputs, unit_OBO, is_grads_batched=True)
    by_option = [torch.autograd.grad(probs_BO, inputs, unit_BO, retain_graph=True) for unit_BO in unit_OBO]
    return tuple(torch.stack(grads) for grads in zip(*by_option, strict=True))
