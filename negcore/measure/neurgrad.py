"""NeurGrad: the estimated neuron empirical gradient of all neurons for all labels, in one backward pass a batch.

Shapes: P prompts, O options (labels), L layers, N neurons a layer, B rows of a batch.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negcore.measure.forward import ProbedBatch, label_probabilities, probed_batches
from negcore.model.encoding import Labels, encode_labels, encode_prompts
from negcore.model.language_model import LanguageModel

# Bytes that the gradients of a batch's logits may take: options x rows x vocabulary.
_LOGIT_BYTES = 2**28

# How PyTorch begins to say that memory ran out, where it has no exception of its own for it.
_OUT_OF_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "MPS backend out of memory")
_OUT_OF_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"

logger = logging.getLogger(__name__)

Array = NDArray[Any]


class Nonfinite(NamedTuple):
    """NaN and infinite values of one prompt."""

    row: int
    layers: tuple[int, ...]
    """Layers that hold some among their NEGs or activations; none if only probabilities do."""
    n_values: int
    """How many, among NEGs, activations and probabilities."""


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

    def nonfinite(self) -> list[Nonfinite]:
        """Where NaN and infinite values would be in a shard, which holds float32, by prompt; empty if nowhere."""
        in_negs_PL = np.stack([_count_nonfinite(layer_PON) for layer_PON in self.negs_POLN.transpose(2, 0, 1, 3)], 1)
        in_activations_PL = np.stack(
            [_count_nonfinite(layer_PN) for layer_PN in self.activations_PLN.swapaxes(0, 1)], 1
        )
        by_layer_PL = in_negs_PL + in_activations_PL
        counts_P = by_layer_PL.sum(axis=1) + _count_nonfinite(self.probs_PO)
        return [
            Nonfinite(row, tuple(np.flatnonzero(by_layer_PL[row]).tolist()), int(counts_P[row]))
            for row in np.flatnonzero(counts_P).tolist()
        ]

    def take(self, rows: Sequence[int]) -> Self:
        """The chosen prompts, in this order."""
        chosen = np.array(rows, dtype=np.int64)
        return type(self)(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


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
        Prompts a batch; by default chosen by length. It changes memory and speed, and of the result only the last
        digits. A batch for which memory does not suffice is halved, and so are all after it.

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
    RuntimeError
        If memory does not suffice for a single prompt (of CUDA, `torch.OutOfMemoryError`).

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
    sizes = {"batch_size": min(batch_size, n_prompts)} if batch_size else {"max_rows": min(max_rows, n_prompts)}
    todo, halved = list(range(n_prompts)), False
    while not _fill_all(result, lm, ids, todo, sizes):
        sizes, halved = {name: size // 2 for name, size in sizes.items()}, True
        torch.cuda.empty_cache()
    if halved:
        logger.warning("out of memory: batches were halved until they fit, to %d prompts", *sizes.values())
    return result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch says by this error that memory did not suffice, on a GPU or on the host."""
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and (message.startswith(_OUT_OF_MEMORY) or _OUT_OF_HOST_MEMORY in message)
    )


def away_from_zero(activations: Tensor) -> Tensor:
    """The direction s(a) of a positive shift: +1 where a > 0, else -1."""
    return torch.where(activations > 0, 1.0, -1.0).to(activations.dtype)


def _fill_all(
    result: NeurGradBatch,
    lm: LanguageModel,
    ids: Sequence[Sequence[int]],
    todo: list[int],
    sizes: Mapping[str, int],
) -> bool:
    """Compute the prompts `todo` batch by batch, and strike off those that are done: whether memory sufficed."""
    given = list(todo)
    try:
        for batch in probed_batches(lm, [ids[row] for row in given], **sizes):
            rows = [given[place] for place in batch.rows]
            _fill(result, rows, batch)
            todo[:] = [row for row in todo if row not in rows]
    except RuntimeError as error:
        if not is_out_of_memory(error) or max(sizes.values()) == 1:
            raise
        return False
    return True


def _count_nonfinite(values: Array) -> NDArray[np.int64]:
    """Of each prompt, as float32."""
    with np.errstate(over="ignore"):
        stored = values.astype(np.float32, copy=False)
    return np.asarray(np.count_nonzero(~np.isfinite(stored), axis=tuple(range(1, values.ndim))))


def _fill(result: NeurGradBatch, rows: Sequence[int], batch: ProbedBatch) -> None:
    lm = batch.lm
    label_ids_BO = torch.from_numpy(result.label_ids_PO[rows]).to(lm.device)
    n_rows, n_options = label_ids_BO.shape
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
        result.negs_POLN[rows, :, layer] = _numpy(negs_BON)
    result.activations_PLN[rows] = _numpy(activations_BLN)
    result.probs_PO[rows] = _numpy(probs_BO.detach())


def _numpy(tensor: Tensor) -> Array:
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    array: Array = wide.cpu().numpy()
    return array
