"""NeurGrad: the estimated neuron empirical gradient of all neurons for all labels, in one backward pass a batch.

Shapes: P prompts, O options (labels), L layers, N neurons a layer, B rows of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negcore.encoding import Labels, encode_labels, encode_prompts
from negcore.forward import ProbedBatch, label_probabilities, probed_batches
from negcore.models import LanguageModel

# Bytes that the gradients of a batch's logits may take: options x rows x vocabulary.
_LOGIT_BYTES = 2**28

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class NeurGradBatch:
    """NEG estimates of some prompts; float32, or float64 from a float64 model."""

    negs_POLN: Array
    """Probability per unit of activation, in the direction away from zero."""
    activations_PLN: Array
    """Activation of every neuron at the probed token."""
    probs_PO: Array
    """Probability of every label, softmax over the whole vocabulary."""
    label_ids_PO: NDArray[np.int64]
    """Token id that each label became."""


def neurgrad(
    lm: LanguageModel, prompts: Sequence[str], labels: Labels, *, batch_size: int | None = None
) -> NeurGradBatch:
    """Estimate the NEG of every feed-forward neuron for every label.

    NeurGrad = dp/da * s(a), with s(a) = +1 where the activation a is positive and -1 elsewhere: the slope, at no
    shift, of the label's probability p against a shift that moves the neuron away from zero.

    Parameters
    ----------
    lm : LanguageModel
    prompts : sequence of str, length P
        Each ends where its label is to follow; masked models' prompts hold one mask.
    labels : sequence of str, or one such sequence for each prompt
        Encoded exactly as given: a leading space is part of a label.
    batch_size : int, optional
        Prompts a batch; by default chosen by length. It changes memory and speed, not the result.

    Returns
    -------
    NeurGradBatch
        Rows in the order of `prompts`.

    Raises
    ------
    PromptError
        If a prompt is empty or too long, or a masked model's has not exactly one mask.
    LabelError
        If a label is not exactly one token, or two labels of a prompt are the same token.

    References
    ----------
    Zhao, Jiang, Yoshinaga (ACL 2025), arXiv 2412.18053: NeurGrad.

    Differs from the paper: a neuron whose activation is exactly zero moves in the negative direction here and in the
    sweep alike; the released sweep never moves it.
    """
    ids = encode_prompts(lm.card, prompts)
    label_ids_PO = encode_labels(lm.tokenizer, labels, len(prompts))
    n_prompts, n_options = label_ids_PO.shape
    kind = np.float64 if lm.dtype == "float64" else np.float32
    result = NeurGradBatch(
        negs_POLN=np.empty((n_prompts, n_options, lm.n_layers, lm.n_neurons), kind),
        activations_PLN=np.empty((n_prompts, lm.n_layers, lm.n_neurons), kind),
        probs_PO=np.empty((n_prompts, n_options), kind),
        label_ids_PO=label_ids_PO,
    )
    max_rows = max(1, _LOGIT_BYTES // (4 * n_options * lm.card.text_config.vocab_size))
    for batch in probed_batches(lm, ids, batch_size=batch_size, max_rows=max_rows):
        _fill(result, batch, torch.from_numpy(label_ids_PO[batch.rows]).to(lm.device))
    return result


def away_from_zero(activations: Tensor) -> Tensor:
    """The direction s(a) of a positive shift: +1 where a > 0, else -1."""
    return torch.where(activations > 0, 1.0, -1.0).to(activations.dtype)


def _fill(result: NeurGradBatch, batch: ProbedBatch, label_ids_BO: Tensor) -> None:
    lm, (n_rows, n_options) = batch.lm, label_ids_BO.shape
    shifts = [
        torch.zeros(n_rows, lm.n_neurons, dtype=lm.model.dtype, device=lm.device, requires_grad=True)
        for _ in range(lm.n_layers)
    ]
    with torch.enable_grad():
        logits_BV, activations_BLN = batch.predict(dict(enumerate(shifts)))
        probs_BO = label_probabilities(logits_BV, label_ids_BO)
        # Rows do not see each other, so one unit vector an option asks for every row's gradient at once.
        unit_OBO = torch.eye(n_options, dtype=probs_BO.dtype, device=lm.device)[:, None].expand(-1, n_rows, -1)
        grads = torch.autograd.grad(probs_BO, shifts, unit_OBO, is_grads_batched=True)
    signs_BLN = away_from_zero(activations_BLN)
    for layer, grad_OBN in enumerate(grads):
        negs_BON = (grad_OBN * signs_BLN[:, layer]).transpose(0, 1)
        result.negs_POLN[batch.rows, :, layer] = _numpy(negs_BON)
    result.activations_PLN[batch.rows] = _numpy(activations_BLN)
    result.probs_PO[batch.rows] = _numpy(probs_BO.detach())


def _numpy(tensor: Tensor) -> Array:
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    array: Array = wide.cpu().numpy()
    return array
