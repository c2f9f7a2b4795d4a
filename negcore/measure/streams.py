"""The residual stream that a layer's feed-forward joins, found by running the model with that feed-forward silent.

No family is named here: with nothing written, what comes out of a layer is what the feed-forward's output would have
been added to. That is the layer's input plus its attention output, whether attention runs before the feed-forward or
beside it. Layers that normalise the sum (BERT) are told by their result, which is the output of a normalisation.

In a layer of experts, the router's weights and the gates of shared experts decide how much of a neuron is written. All
that happens behind the neurons is linear, so its derivatives by them are what each writes.

Shapes: B rows of a batch, T tokens, L layers, N neurons a layer (with experts: those of a prompt), H hidden width.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from negcore.errors import ModelError
from negcore.measure.forward import ProbedBatch, copies
from negcore.model.experts import stacked_experts
from negcore.model.language_model import LanguageModel
from negcore.model.placement import with_weights


class Stream(NamedTuple):
    """One layer's hidden values at one prompt's probed token."""

    acts_N: Tensor
    """Input of the down projection."""
    joined_H: Tensor
    """The stream that the feed-forward's output is added to: the layer's input plus its attention output."""
    scale_H: Tensor
    """Factor of each coordinate of the down projection's output on its way there."""
    norm: nn.Module | None
    """Normalisation of the sum, in layers that end with one."""
    rows_NH: Tensor | None = None
    """What one unit of each input adds to the feed-forward's output, in layers of experts; else the down projection's
    rows."""

    def join(self, written_RH: Tensor) -> Tensor:
        """Return what leaves the layer if the down projection writes these rows: shape (R, H)."""
        sum_RH = self.joined_H + written_RH * self.scale_H
        if self.norm is None:
            return sum_RH
        with with_weights(self.norm):
            weights = {name: tensor.to(sum_RH.dtype) for name, tensor in self.norm.named_parameters()}
        result: Tensor = torch.func.functional_call(self.norm, weights, (sum_RH,))
        return result


def streams(prompt: ProbedBatch, tokens: Sequence[int]) -> list[Stream]:
    """Record the stream of every layer for the one prompt of a batch."""
    lm = prompt.lm
    written, writers = _of_experts(prompt), [_writer(layer, lm) for layer in lm.layers]
    downs = {number: lm.down(number) for number in range(lm.n_layers) if number not in written}
    with _recorded(prompt, {*downs.values(), *writers}) as whole:
        prompt.predict()
    norms = [_norms(layer) for layer in lm.layers]
    silent = copies(prompt, tokens, lm.n_layers)
    with _silenced(silent, writers), _recorded(silent, {*lm.layers, *(norm for of in norms for norm in of)}) as values:
        silent.predict()
    result = []
    for row, layer in enumerate(lm.layers):
        left_H = values[layer].made_BH[row]
        ran = (norm for norm in norms[row] if norm in values)  # that of a cross attention does not
        last = next((norm for norm in ran if torch.equal(values[norm].made_BH[row], left_H)), None)
        joined_H = left_H if last is None else values[last].given_BH[row]
        scale_H = _scale(layer, whole[writers[row]] if writers[row] is _post_norm(layer, lm) else None, left_H)
        acts_N, rows_NH = written[row] if row in written else (whole[downs[row]].given_BH[0], None)
        result.append(Stream(acts_N, joined_H, scale_H, last, rows_NH))
    return result


class _Written(NamedTuple):
    """A layer of experts at one prompt's probed token."""

    acts_N: Tensor
    """Inputs of its down projections."""
    rows_NH: Tensor
    """What one unit of each adds to its output."""


def _of_experts(prompt: ProbedBatch) -> dict[int, _Written]:
    """Return what the neurons of every layer of experts write.

    Raises
    ------
    ModelError
        If experts normalise what they return, each for itself.
    """
    found = {layer: _expert_block(module, prompt.lm) for layer, module in enumerate(prompt.lm.layers)}
    blocks = {layer: block for layer, block in found.items() if block is not None}
    if any(getattr(prompt.lm.experts(layer), "has_post_expert_norm", False) for layer in blocks):
        raise ModelError("its experts normalise what each of them returns")
    before = copy(prompt)
    before.lm = lm = replace(prompt.lm, site="act")
    dtype = lm.model.get_input_embeddings().weight.dtype  # of half types that compute in float32 it is this
    shifts = {layer: torch.zeros(1, lm.layer_shapes[layer].n_active, dtype=dtype, device=lm.device) for layer in blocks}
    rows: dict[int, Tensor] = {}

    def derive(layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        """Differentiate a layer's output, while its weights are as they computed it, and cut the graph behind it."""
        made, *others = output if isinstance(output, tuple) else (output,)
        made_H = _at_probed(before, made)[0]
        if made_H.requires_grad:  # not in a pass that finds the routing of another
            unit_HH = torch.eye(len(made_H), dtype=made_H.dtype, device=made_H.device)
            (rows_H1N,) = torch.autograd.grad(made_H, shifts[layer], unit_HH, is_grads_batched=True)
            rows[layer] = rows_H1N[:, 0].T
        return (made.detach(), *others) if others else made.detach()

    with ExitStack() as hooks, torch.enable_grad():
        for layer, block in blocks.items():
            shifts[layer].requires_grad_()
            hooks.callback(block.register_forward_hook(partial(derive, layer)).remove)
        activations_LN = before.predict(shifts).activations_BLN[0] if blocks else torch.empty(0)
    return {layer: _Written(activations_LN[layer, : len(of)], of) for layer, of in rows.items()}


def _expert_block(layer: nn.Module, lm: LanguageModel) -> nn.Module | None:
    """Return the whole feed-forward of a layer of experts; None for a dense layer."""
    if lm.arch.experts is None or stacked_experts(layer, lm.arch) is None:
        return None
    return layer.get_submodule(lm.arch.experts.rpartition(".")[0])


class _Values(NamedTuple):
    """Input and output of a module at the probed tokens, a row each."""

    given_BH: Tensor
    made_BH: Tensor


def _writer(layer: nn.Module, lm: LanguageModel) -> nn.Module:
    """Return the module whose output joins the stream: the down projection or experts, or the norm behind them."""
    return _post_norm(layer, lm) or _expert_block(layer, lm) or layer.get_submodule(lm.arch.down)


def _post_norm(layer: nn.Module, lm: LanguageModel) -> nn.Module | None:
    """Return the normalisation of the feed-forward's output; some layers of a family have none."""
    return next((module for path, module in layer.named_modules() if path == lm.arch.post_norm), None)


def _norms(layer: nn.Module) -> list[nn.Module]:
    """Return the normalisations of a layer: its modules with a weight for each coordinate and nothing inside."""
    weights = ((module, getattr(module, "weight", None)) for module in layer.modules() if not list(module.children()))
    return [module for module, weight in weights if isinstance(weight, Tensor) and weight.ndim == 1]


def _scale(layer: nn.Module, post_norm: _Values | None, like_H: Tensor) -> Tensor:
    multiplier: float = getattr(layer, "residual_multiplier", 1.0)  # Granite
    if post_norm is None:
        return torch.full_like(like_H, multiplier)
    given_H, made_H = post_norm.given_BH[0], post_norm.made_BH[0]
    return multiplier * torch.where(given_H == 0, 0, made_H / given_H)


@contextmanager
def _recorded(batch: ProbedBatch, modules: set[nn.Module]) -> Iterator[dict[nn.Module, _Values]]:
    """Record inputs and outputs of modules at the probed tokens."""
    values: dict[nn.Module, _Values] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        values[module] = _Values(*(_at_probed(batch, one).detach() for one in (args[0], output)))

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(record).remove)
        yield values


@contextmanager
def _silenced(batch: ProbedBatch, writers: Sequence[nn.Module]) -> Iterator[None]:
    """Let the feed-forward of layer l write nothing at the probed token of row l."""

    def silence(row: int, module: nn.Module, args: Any, output: Any) -> Any:
        made, *others = output if isinstance(output, tuple) else (output,)  # experts may return their router's scores
        rows_BTH = made.reshape(len(batch.rows), -1, made.shape[-1]).clone()
        rows_BTH[row, int(batch.positions_B[row])] = 0
        return (rows_BTH.view_as(made), *others) if others else rows_BTH.view_as(made)

    with ExitStack() as hooks:
        for row, module in enumerate(writers):
            hooks.callback(module.register_forward_hook(partial(silence, row)).remove)
        yield


def _at_probed(batch: ProbedBatch, values: Any) -> Tensor:
    tensor: Tensor = values[0] if isinstance(values, tuple | list) else values
    rows = torch.arange(len(batch.rows), device=tensor.device)
    return tensor.reshape(len(rows), -1, tensor.shape[-1])[rows, batch.positions_B.to(rows.device)]
