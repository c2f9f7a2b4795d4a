"""Layers through which no gradient flows, one in each row of a batch: the GradDrop of AtP*.

Shapes: B rows of a batch, T tokens, H hidden width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from negcore.errors import NegError
from negcore.measure.relevance import is_norm
from negcore.model.language_model import LanguageModel


def n_blocks(lm: LanguageModel) -> int:
    """Return the number of all layers, those without neurons too."""
    return len(_blocks(lm))


@contextmanager
def dropping(lm: LanguageModel, dropped_B: Sequence[int]) -> Iterator[None]:
    """Let no gradient flow through what one layer writes, another in each row; predictions stay as they are.

    Parameters
    ----------
    dropped_B : sequence of int
        Layer that is dropped in each row; the number of layers for none.
    """
    with ExitStack() as hooks:
        for index, block in enumerate(_blocks(lm)):
            mask_B11 = (torch.tensor(dropped_B, device=lm.device) == index)[:, None, None]
            given: dict[nn.Module, Tensor] = {}
            made: dict[nn.Module, Tensor] = {}
            for norm in filter(is_norm, block.modules()):
                hooks.callback(norm.register_forward_hook(partial(_record, given, made)).remove)
            hook = partial(_drop, lm.card.name, mask_B11, given, made)
            hooks.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _blocks(lm: LanguageModel) -> list[nn.Module]:
    return list(lm.model.get_submodule(lm.arch.layers).children())


def _record(
    given: dict[nn.Module, Tensor], made: dict[nn.Module, Tensor], norm: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    given.pop(norm, None)  # so that the order is that of this pass
    given[norm], made[norm] = args[0].detach(), output.detach()


def _drop(
    name: str,
    mask_B11: Tensor,
    given: Mapping[nn.Module, Tensor],
    made: Mapping[nn.Module, Tensor],
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> Any:
    """Replace the layer's output, in its rows, by one of the same value whose graph is the residual stream alone."""
    stream = args[0] if args else kwargs["hidden_states"]
    left = output[0] if isinstance(output, tuple) else output
    if left.ndim != 3 or stream.shape != left.shape:
        raise NegError(
            f"AtP* does not exist for {name}, whose layers write to no single stream; leave this estimator out"
        )
    through = _stream_alone(block, stream, left, given, made)
    replaced = torch.where(mask_B11, left.detach() + (through - through.detach()), left)
    return (replaced, *output[1:]) if isinstance(output, tuple) else replaced


def _stream_alone(
    block: nn.Module,
    stream: Tensor,
    left: Tensor,
    given: Mapping[nn.Module, Tensor],
    made: Mapping[nn.Module, Tensor],
) -> Tensor:
    """Return what the residual stream becomes if all that is added to it is constant."""
    norms = [norm for norm, value in given.items() if value.shape == left.shape]
    if norms and torch.equal(made[norms[-1]], left.detach()):  # a layer that normalises its sums, such as BERT's
        for norm in norms:
            stream = norm.forward(stream + (given[norm] - stream).detach())
    return stream * getattr(block, "layer_scalar", 1.0)  # Gemma 4 multiplies the sum
