"""Gradients of models whose weights pass through their device: nothing of a block is held from forward to backward.

A batch of prompts runs block by block, all tokens together, and what each block makes of the last tokens is kept. Their
pass with gradients starts from that. Where the gradient comes to a block, the block runs again, with a graph, and is
forgotten: so each weight is read twice for a batch, once forward and once backward.

References
----------
Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost" (2016), whose blocks are recomputed.

Shapes: B rows of a batch, T tokens, H hidden width, N neurons a layer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from negcore.errors import ModelError
from negcore.model.language_model import LanguageModel
from negcore.model.placement import running, weights_pass


def passes(lm: LanguageModel) -> bool:
    """Tell whether a model's gradients are taken block by block; with experts, only its forward passes are."""
    return not lm.has_experts and weights_pass(lm.model)


@contextmanager
def recorded(lm: LanguageModel, positions_B: Tensor) -> Iterator[dict[nn.Module, Tensor]]:
    """Record what every block makes of one token of each row: shape (B, 1, H)."""
    made: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        values_BTH = _first(output)
        rows = torch.arange(len(positions_B), device=values_BTH.device)
        made[module] = values_BTH[rows, positions_B.to(rows.device)][:, None].clone()

    with ExitStack() as hooks:
        for block in _blocks(lm):
            hooks.callback(block.register_forward_hook(record).remove)
        yield made


@contextmanager
def replayed(lm: LanguageModel, made: Mapping[nn.Module, Tensor], shifts: dict[int, Tensor]) -> Iterator[None]:
    """Let every block return what it made before, and run when the gradient comes to it.

    Parameters
    ----------
    made : mapping of block to Tensor of shape (B, 1, H)
    shifts : dict of layer to Tensor of shape (B, N)
        Leaves of the graph, which hooks inside the blocks read from here; while a block runs again, it holds others.
    """
    layers = {module: layer for layer, module in enumerate(lm.layers)}
    with ExitStack() as blocks:
        for block, values in made.items():
            blocks.enter_context(running(block, partial(_replay, block.forward, values, shifts, layers.get(block))))
        yield


@contextmanager
def recomputed(lm: LanguageModel) -> Iterator[None]:
    """Let blocks whose weights pass run again in the backward pass; others are left as they are."""
    with ExitStack() as blocks:
        for block in _blocks(lm) if passes(lm) else ():
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            blocks.enter_context(running(block, again))
        yield


def _blocks(lm: LanguageModel) -> list[nn.Module]:
    return list(lm.model.get_submodule(lm.arch.layers).children())


def _first(output: Any) -> Tensor:
    """Return the hidden values of a block's output."""
    values: Tensor = output[0] if isinstance(output, tuple) else output
    return values


def _replay(
    own: Callable[..., Any], made: Tensor, shifts: dict[int, Tensor], layer: int | None, *args: Any, **kwargs: Any
) -> Tensor:
    hidden, *others = args if args else (kwargs.pop("hidden_states"),)

    def again(hidden: Tensor, shift: Tensor) -> Tensor:
        if layer is not None:
            shifts[layer] = shift
        return _first(own(hidden, *others, **kwargs))

    if any(isinstance(one, Tensor) and one.requires_grad for one in (*others, *kwargs.values())):
        raise ModelError("its blocks hand on more than one stream, so that its weights cannot pass through a device")
    shift = hidden.new_zeros(0) if layer is None else shifts[layer]
    result: Tensor = _Again.apply(again, made.to(hidden.device), hidden, shift)  # type: ignore[no-untyped-call]
    return result


class _Again(torch.autograd.Function):
    """A block that has run: its result is known, and for its gradient it runs again."""

    @staticmethod
    def forward(ctx: Any, again: Callable[..., Tensor], made: Tensor, hidden: Tensor, shift: Tensor) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(hidden, shift)
        return made.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, shift = (one.detach().requires_grad_() for one in ctx.saved_tensors)
        with torch.enable_grad():
            result = ctx.again(hidden, shift)
            grads = torch.autograd.grad(result, (hidden, shift), gradient.to(result.device), materialize_grads=True)
        return None, None, *grads
