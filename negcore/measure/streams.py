"""The residual stream that a layer's feed-forward joins, found by running the model with that feed-forward silent.

No family is named here: with nothing written, what comes out of a layer is what the feed-forward's output would have
been added to. That is the layer's input plus its attention output, whether attention runs before the feed-forward or
beside it. Layers that normalise the sum (BERT) are told by their result, which is the output of a normalisation.

Shapes: B rows of a batch, T tokens, L layers, N neurons a layer, H hidden width.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from negcore.measure.forward import ProbedBatch, copies
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
    downs, writers = [lm.down(layer) for layer in range(lm.n_layers)], [_writer(layer, lm) for layer in lm.layers]
    with _recorded(prompt, {*downs, *writers}) as whole:
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
        scale_H = _scale(layer, whole[writers[row]] if writers[row] is not downs[row] else None, left_H)
        result.append(Stream(whole[downs[row]].given_BH[0], joined_H, scale_H, last))
    return result


class _Values(NamedTuple):
    """Input and output of a module at the probed tokens, a row each."""

    given_BH: Tensor
    made_BH: Tensor


def _writer(layer: nn.Module, lm: LanguageModel) -> nn.Module:
    """Return the module whose output joins the stream: the down projection, or the normalisation behind it."""
    norm = lm.arch.post_norm
    has_norm = norm is not None and any(path == norm for path, _ in layer.named_modules())  # some layers have none
    return layer.get_submodule(norm if norm and has_norm else lm.arch.down)


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
        values[module] = _Values(*(_at_probed(batch, one) for one in (args[0], output)))

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(record).remove)
        yield values


@contextmanager
def _silenced(batch: ProbedBatch, writers: Sequence[nn.Module]) -> Iterator[None]:
    """Let the feed-forward of layer l write nothing at the probed token of row l."""

    def silence(row: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rows_BTH = output.reshape(len(batch.rows), -1, output.shape[-1]).clone()
        rows_BTH[row, int(batch.positions_B[row])] = 0
        return rows_BTH.view_as(output)

    with ExitStack() as hooks:
        for row, module in enumerate(writers):
            hooks.callback(module.register_forward_hook(partial(silence, row)).remove)
        yield


def _at_probed(batch: ProbedBatch, values: Any) -> Tensor:
    tensor: Tensor = values[0] if isinstance(values, tuple | list) else values
    rows = torch.arange(len(batch.rows), device=tensor.device)
    return tensor.reshape(len(rows), -1, tensor.shape[-1])[rows, batch.positions_B.to(rows.device)].detach()
