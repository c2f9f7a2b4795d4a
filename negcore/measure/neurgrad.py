"""NeurGrad: the estimated neuron empirical gradient (NEG) of all neurons for all labels, one backward pass a batch.

Shapes: P prompts, O options (labels), L layers, N neurons a layer (with experts: those of a prompt, the active ones),
K experts of a prompt, B rows of a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negcore.arrays import Floats, Ints, count_nonfinite
from negcore.measure.answers import AnswerBatch, measure_answers
from negcore.measure.forward import (
    CausalBatch,
    PassingBatch,
    ProbedBatch,
    label_log_probabilities,
    measure_batches,
    on_device,
    stacked_layers,
)
from negcore.measure.hooks import zero_shifts
from negcore.measure.memory import BatchLimit
from negcore.model.encoding import EncodedPrompts, Labels, encode
from negcore.model.experts import Routing
from negcore.model.language_model import LanguageModel
from negcore.model.layer_shapes import LayerShape
from negcore.targets import DEFAULT_TARGET, Target, check_options, checked_target, own_values, target_values

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
    """Target per unit of activation, in the direction away from zero."""
    activations_PLN: Floats
    """Activation of every neuron at the probed token."""
    probs_PO: Floats
    """Probability of every label, softmax over the whole vocabulary."""
    label_ids_PO: Ints
    """Token id that each label became; the first, where labels are several tokens."""
    experts_PLK: Ints | None = None
    """Numbers of the experts that each prompt was routed to, rising; -1 where a layer has none. Dense models: None.

    N then counts the neurons of these alone, expert after expert, and those that every prompt has behind them:
    `LayerShape.active_neurons` tells their numbers. In layers with fewer, zeros stand behind.
    """
    router_weights_PLK: Floats | None = None
    """The router's weight of each of them; 0 where there is none."""
    target: Target = DEFAULT_TARGET
    """The number of each label that NEGs are slopes of."""

    def experts(self, shapes: Sequence[LayerShape]) -> dict[int, Ints]:
        """Return the experts of the prompts, (P, K), by layer of experts.

        Parameters
        ----------
        shapes : sequence of LayerShape
            Of the model's layers.
        """
        if self.experts_PLK is None:
            return {}
        return {n: self.experts_PLK[:, n, : shape.top_k] for n, shape in enumerate(shapes) if shape.n_experts}

    def nonfinite(self) -> list[Nonfinite]:
        """Count each prompt's NaN and infinite values as float32, which shards hold; list affected prompts."""
        in_negs_PL = np.stack([count_nonfinite(layer_PON) for layer_PON in self.negs_POLN.transpose(2, 0, 1, 3)], 1)
        in_activations_PL = np.stack([count_nonfinite(layer_PN) for layer_PN in self.activations_PLN.swapaxes(0, 1)], 1)
        by_layer_PL = in_negs_PL + in_activations_PL
        counts_P = by_layer_PL.sum(axis=1) + count_nonfinite(self.probs_PO)
        if self.router_weights_PLK is not None:
            counts_P += count_nonfinite(self.router_weights_PLK)
        return [
            Nonfinite(row, tuple(np.flatnonzero(by_layer_PL[row]).tolist()), int(counts_P[row]))
            for row in np.flatnonzero(counts_P).tolist()
        ]


def neurgrad(
    lm: LanguageModel,
    prompts: Sequence[str] | EncodedPrompts,
    labels: Labels | None = None,
    *,
    target: Target = DEFAULT_TARGET,
    batch_size: int | None = None,
) -> NeurGradBatch:
    """Estimate the NEG of every feed-forward neuron for every label.

    NeurGrad = dp/da * s(a), with s(a) = +1 where the activation a is positive and -1 elsewhere: the slope, at no
    shift, of the label's probability p (or another target) against a shift that moves the neuron away from zero.

    Parameters
    ----------
    lm : LanguageModel
    prompts : sequence of str, length P, or EncodedPrompts
        Each ends where its label is to follow; masked models' prompts hold one mask. Encoded prompts bring
        their labels and, where `encode` was told so, another probed token than the last, and labels of several tokens,
        whose probability is that of all of them one after the other.
    labels : sequence of str, or one such sequence for each prompt
        Encoded exactly as given: a leading space is part of a label.
    target : {"probability", "log-probability", "logit-difference"}
        The number of each label whose slope is estimated; the last is its logit minus the largest of the other labels.
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
        If a label is not exactly one token, two labels of a prompt are the same token, or "logit-difference" is asked
        of one label.
    NegError
        If the target is unknown.
    ModelError
        If the model's gradients failed its check at load.
    RuntimeError
        If memory does not suffice for a single prompt (for CUDA, `torch.OutOfMemoryError`).

    References
    ----------
    Zhao, Jiang, Yoshinaga (ACL 2025), arXiv 2412.18053: NeurGrad.

    Differs from the paper: a neuron whose activation is exactly zero moves in the negative direction here and in the
    sweep alike; the released sweep never moves it. Its target is the probability.
    """
    target, encoded = checked_target(target), encode(lm.card, prompts, labels)
    dtype = torch.float64 if lm.model.dtype == torch.float64 else torch.float32
    measured = measure_negs(lm, encoded, _everything, dtype=dtype, target=target, batch_size=batch_size)
    return NeurGradBatch(**measured, label_ids_PO=encoded.label_ids_PO, target=target)


class Negs(NamedTuple):
    """NEGs of a batch on the model's device, as wide as they are wanted."""

    negs_LOBN: Tensor
    activations_LBN: Tensor
    probs_BO: Tensor
    experts: "Experts | None" = None
    """None for a model without."""


class Experts(NamedTuple):
    """Experts of each row in every layer, as `NeurGradBatch` has them."""

    numbers_BLK: Tensor
    weights_BLK: Tensor

    @classmethod
    def of_routings(cls, lm: LanguageModel, n_rows: int, routings: Mapping[int, Routing], dtype: torch.dtype) -> Self:
        """Put the routings of all layers together."""
        shape = n_rows, lm.n_layers, max(one.top_k for one in lm.layer_shapes)
        numbers_BLK = torch.full(shape, -1, dtype=torch.int32, device=lm.device)
        weights_BLK = torch.zeros(shape, dtype=dtype, device=lm.device)
        for layer, routing in routings.items():
            count = routing.experts_TK.shape[1]
            numbers_BLK[:, layer, :count] = routing.experts_TK
            weights_BLK[:, layer, :count] = routing.weights_TK
        return cls(numbers_BLK, weights_BLK)

    @property
    def by_row(self) -> dict[str, Tensor]:
        """The arrays that are kept of them, by name."""
        return {"experts_PLK": self.numbers_BLK, "router_weights_PLK": self.weights_BLK}


class Kept(NamedTuple):
    """The arrays that are kept of a batch, by name: only they are copied to the host."""

    by_layer: Mapping[str, Tensor] = MappingProxyType({})
    """Shape (L, B, ..., N)."""
    by_row: Mapping[str, Tensor] = MappingProxyType({})
    """Shape (B, ...)."""
    sums: Mapping[str, Tensor] = MappingProxyType({})
    """Sums over rows, of any shape. They are whole numbers, so that no order of batches changes them."""


def measure_negs(
    lm: LanguageModel,
    encoded: EncodedPrompts,
    keep: Callable[[Negs, Sequence[int]], Kept],
    *,
    dtype: torch.dtype,
    target: Target = DEFAULT_TARGET,
    batch_size: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Measure NEGs as `neurgrad` does and keep something of them.

    Parameters
    ----------
    keep : callable
        Takes the NEGs of a batch and the indices of its prompts, and returns what is kept.
    dtype : torch.dtype
        Type in which it gets them.

    Returns
    -------
    dict of name to array
        Of what is kept by layer (P, ..., L, N), a layer's numbers side by side in memory; of what is kept by row
        (P, ...); and the sums.

    Raises
    ------
    LabelError, ModelError, RuntimeError
        As for `neurgrad`.
    """
    check_options(target, encoded.label_ids_PO.shape[1])
    results = Results(lm.device, len(encoded.ids))

    def measure(batch: ProbedBatch, rows: list[int]) -> None:
        labels_BO = on_device(lm, encoded.label_ids_PO[rows])
        _fill(results, rows, lm, lambda: label_gradients(batch, labels_BO, target), keep, dtype)

    def measure_answer(batch: AnswerBatch, rows: list[int]) -> None:
        _fill(results, rows, lm, lambda: answer_gradients(batch, target), keep, dtype)

    if not encoded.is_usual:
        measure_answers(lm, encoded, measure_answer, BatchLimit("prompts"), batch_size=batch_size)
        return results.arrays()
    measure_batches(
        lm,
        encoded.ids,
        measure,
        BatchLimit("prompts"),
        batch_size=batch_size,
        max_rows=_LOGIT_BYTES // (4 * encoded.label_ids_PO.shape[1] * lm.card.vocab_size),
        n_shared=encoded.n_shared,
    )
    return results.arrays()


def away_from_zero(activations: Tensor) -> Tensor:
    """Return the direction s(a) of a positive shift: +1 where a > 0, else -1."""
    return torch.where(activations > 0, 1.0, -1.0).to(activations.dtype)


class LabelGradients(NamedTuple):
    """Gradients of the target of each row's labels by its neurons."""

    grads_LOBN: tuple[Tensor, ...]
    """One tensor of shape (O, B, N) for each layer."""
    activations_BLN: Tensor
    probs_BO: Tensor
    routings: Mapping[int, Routing]
    """Experts of the rows, by layer of experts."""


def label_gradients(batch: ProbedBatch, label_ids_BO: Tensor, target: Target = DEFAULT_TARGET) -> LabelGradients:
    """Differentiate the target of every label by every neuron at the probed token, in one backward pass.

    Raises
    ------
    ModelError
        If the model's gradients failed its check at load.
    """
    batch.lm.require("neurgrad")
    if isinstance(batch, PassingBatch):
        return _passing_gradients(batch, label_ids_BO, target)
    if isinstance(batch, CausalBatch) and not computes_by_row(batch.lm.device):
        return _options_in_rows(batch, label_ids_BO, target)
    n_rows, n_options = label_ids_BO.shape
    shifts = zero_shifts(batch.lm, n_rows)
    with torch.enable_grad():
        logits_BV, activations_BLN, routings = batch.predict(shifts)
        log_probs_BO = label_log_probabilities(logits_BV, label_ids_BO)
        values_BO = target_values(target, log_probs_BO)
        # Rows do not see each other, so one unit vector for each option gives every row's gradient at once.
        unit_OBO = torch.eye(n_options, dtype=values_BO.dtype, device=batch.lm.device)[:, None].expand(-1, n_rows, -1)
        grads = _gradients(batch.lm, values_BO, list(shifts.values()), unit_OBO)
    return LabelGradients(grads, activations_BLN, log_probs_BO.detach().exp(), routings)


def _passing_gradients(batch: PassingBatch, label_ids_BO: Tensor, target: Target) -> LabelGradients:
    """Differentiate with a row for each option, block by block."""
    lm, (n_rows, n_options) = batch.lm, label_ids_BO.shape
    shifts = zero_shifts(lm, n_rows * n_options)
    leaves = list(shifts.values())
    with torch.enable_grad(), batch.repeated(n_options).with_graph(shifts) as (logits_RV, readings):
        log_probs_RO = label_log_probabilities(logits_RV, label_ids_BO.repeat_interleave(n_options, 0))
        grads_RN = torch.autograd.grad(own_values(target_values(target, log_probs_RO)).sum(), leaves)
    grads = tuple(grad_RN.view(n_rows, n_options, -1).transpose(0, 1) for grad_RN in grads_RN)
    activations_BLN = stacked_layers(lm, [readings[layer][::n_options] for layer in range(lm.n_layers)], dim=1)
    return LabelGradients(grads, activations_BLN, _own_probs(log_probs_RO, n_rows), {})


def computes_by_row(device: torch.device) -> bool:
    """Tell whether a pass of few tokens takes longer the more they are, as on a CPU.

    A GPU takes as long for hundreds of tokens as for one: it reads the same weights.
    """
    return device.type != "cuda"


def _options_in_rows(batch: CausalBatch, label_ids_BO: Tensor, target: Target) -> LabelGradients:
    """Differentiate with a row for each option: a plain backward pass, whose steps a GPU's host starts faster."""
    n_rows, n_options = label_ids_BO.shape
    shifts = zero_shifts(batch.lm, n_rows * n_options)
    with torch.enable_grad():
        logits_RV, activations_RLN, routings = batch.repeated(n_options).predict(shifts)
        log_probs_RO = label_log_probabilities(logits_RV, label_ids_BO.repeat_interleave(n_options, 0))
        grads_RN = torch.autograd.grad(own_values(target_values(target, log_probs_RO)).sum(), list(shifts.values()))
    grads = tuple(grad_RN.view(n_rows, n_options, -1).transpose(0, 1) for grad_RN in grads_RN)
    own = {layer: routing.rows(slice(None, None, n_options)) for layer, routing in routings.items()}
    return LabelGradients(grads, activations_RLN[::n_options], _own_probs(log_probs_RO, n_rows), own)


def _own_probs(log_probs_RO: Tensor, n_rows: int) -> Tensor:
    return own_values(log_probs_RO.detach().exp()).view(n_rows, -1)


def answer_gradients(batch: AnswerBatch, target: Target = DEFAULT_TARGET) -> LabelGradients:
    """Differentiate the target of every option by every neuron at the probed token, with a row for each option.

    A row's neurons move the log-probability of its own option; the target's slopes by all of these do the rest.

    Raises
    ------
    ModelError
        If the model's gradients failed its check at load.
    """
    lm, n_options = batch.lm, batch.n_options
    lm.require("neurgrad")
    shifts = zero_shifts(lm, batch.n_rows)
    with torch.enable_grad():
        log_probs_R, activations_RLN = batch.predict(shifts)
        # Rows do not see each other, so the gradient of their sum is each row's own.
        grads_RN = torch.autograd.grad(log_probs_R.sum(), list(shifts.values()))
        log_probs_BO = log_probs_R.detach().view(-1, n_options).requires_grad_()
        values_BO = target_values(target, log_probs_BO)
        slopes = [torch.autograd.grad(one, log_probs_BO, retain_graph=True)[0] for one in values_BO.sum(0)]
    grads = tuple(
        _of_target(torch.stack(slopes), grad_RN.view(-1, n_options, grad_RN.shape[-1])) for grad_RN in grads_RN
    )
    return LabelGradients(grads, activations_RLN[::n_options], log_probs_BO.detach().exp(), {})


def _of_target(slopes_OBO: Tensor, grads_BON: Tensor) -> Tensor:
    """Return the gradients of each option's target, from its slopes by all options' log-probabilities: (O, B, N)."""
    return (slopes_OBO[..., None, :].to(grads_BON) @ grads_BON)[..., 0, :]


class Results:
    """Arrays on the host that are filled batch by batch, while a GPU computes the next one."""

    def __init__(self, device: torch.device, n_prompts: int) -> None:
        self._device, self._n_prompts = device, n_prompts
        self._by_layer: dict[str, Tensor] = {}
        self._by_row: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def take(self, kept: Kept, rows: Sequence[int]) -> None:
        """Take over what is kept of some rows."""
        for name, values_LB in kept.by_layer.items():
            n_layers, _, *shape = values_LB.shape
            if name not in self._by_layer:
                self._by_layer[name] = self._empty(values_LB, n_layers, self._n_prompts, *shape)
            for result_P, values_B in zip(self._by_layer[name], values_LB, strict=True):
                _copy_rows(result_P, values_B, rows)
        for name, values_B in kept.by_row.items():
            if name not in self._by_row:
                self._by_row[name] = self._empty(values_B, self._n_prompts, *values_B.shape[1:])
            _copy_rows(self._by_row[name], values_B, rows)
        for name, sums in kept.sums.items():  # last, and without new memory: a batch that fails is measured again
            if name in self._sums:
                self._sums[name] += sums
            else:
                self._sums[name] = sums

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all arrays, once the last numbers have come."""
        sums = {name: values.cpu().numpy() for name, values in self._sums.items()}
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        by_layer = {name: np.moveaxis(values.numpy(), 0, -2) for name, values in self._by_layer.items()}
        return by_layer | {name: values.numpy() for name, values in self._by_row.items()} | sums

    def _empty(self, like: Tensor, *shape: int) -> Tensor:
        """Return an empty tensor on the host that a GPU can write to while it computes, unless that takes too much."""
        is_pinned = self._device.type == "cuda" and prod(shape) * like.itemsize <= _PINNED_BYTES
        return torch.empty(shape, dtype=like.dtype, pin_memory=is_pinned)


def _copy_rows(result_P: Tensor, values_B: Tensor, rows: Sequence[int]) -> None:
    """Copy rows to their places, as many at once as have their places side by side."""
    for start, stop in _stretches(rows):
        first = rows[start]
        result_P[first : first + stop - start].copy_(values_B[start:stop], non_blocking=True)


def _stretches(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where each stretch of consecutive numbers starts and stops."""
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or rows[stop] != rows[stop - 1] + 1:
            yield start, stop
            start = stop


def _fill(
    results: Results,
    rows: Sequence[int],
    lm: LanguageModel,
    take_gradients: Callable[[], LabelGradients],
    keep: Callable[[Negs, Sequence[int]], Kept],
    dtype: torch.dtype,
) -> None:
    grads, activations_BLN, probs_BO, routings = take_gradients()
    activations_LBN = activations_BLN.transpose(0, 1)
    negs_LOBN = stacked_layers(lm, grads, dim=0).mul_(away_from_zero(activations_LBN)[:, None])
    experts = Experts.of_routings(lm, len(rows), routings, dtype) if lm.has_experts else None
    negs = Negs(negs_LOBN.to(dtype), activations_LBN.to(dtype), probs_BO.to(dtype), experts)
    results.take(keep(negs, rows), rows)


def _everything(negs: Negs, rows: Sequence[int]) -> Kept:
    by_layer = {"negs_POLN": negs.negs_LOBN.transpose(1, 2), "activations_PLN": negs.activations_LBN}
    by_row = {} if negs.experts is None else negs.experts.by_row
    return Kept(contiguous(by_layer), {"probs_PO": negs.probs_BO, **by_row})


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that can be copied to the host without a detour."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _gradients(lm: LanguageModel, values_BO: Tensor, inputs: list[Tensor], unit_OBO: Tensor) -> tuple[Tensor, ...]:
    """Differentiate in one backward pass, or in one for each option where a model's code may not be batched."""
    if lm.batched_backward:
        return torch.autograd.grad(values_BO, inputs, unit_OBO, is_grads_batched=True)
    by_option = [torch.autograd.grad(values_BO, inputs, unit_BO, retain_graph=True) for unit_BO in unit_OBO]
    return tuple(torch.stack(grads) for grads in zip(*by_option, strict=True))
