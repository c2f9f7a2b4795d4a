"""Compute in float32 with weights that stay in a half type.

A sweep asks what a small shift changes, and a half type rounds most of that away: bfloat16 has 8 binary digits. The
weights are not the trouble, as float32 holds every half number exactly. So a layer's weights become float32 while the
layer runs, and half again behind it: the numbers are those of the model loaded in float32, in little more memory.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from negcore.model.language_model import DTYPES, LanguageModel

HALF_TYPES = ("bfloat16", "float16")
"""Number types in which differences between predictions are mostly rounding."""


@contextmanager
def in_float32(lm: LanguageModel) -> Iterator[None]:
    """Let a model of a half type compute in float32; models of other types are left as they are.

    Weights are widened layer by layer, so that one layer's (or the head's) are held twice at a time. Embeddings, and
    what stands beside the layers, stay wide: some models (DeBERTa) read such weights without running their modules. On
    leaving, the weights are the same tensors as before, even after an exception.
    """
    if lm.dtype not in HALF_TYPES:
        yield
        return
    blocks = list(lm.model.get_submodule(lm.arch.layers).children())
    within = {module for block in blocks for module in block.modules()}
    beside = {module for part in (lm.body_parts[-1], lm.model.get_input_embeddings()) for module in part.modules()}
    others = [module for module in lm.model.modules() if module not in within | beside]
    at_times = [(block, list(block.modules())) for block in blocks] + [(module, [module]) for module in others]
    with ExitStack() as hooks:
        hooks.enter_context(_wide_while_it_runs(None, list(beside - within)))
        for module, holders in at_times:
            if _half_tensors(holders):
                hooks.enter_context(_wide_while_it_runs(module, holders))
        yield


@contextmanager
def _wide_while_it_runs(module: nn.Module | None, holders: list[nn.Module]) -> Iterator[None]:
    """Widen the half tensors that some modules hold while a module runs, or all the time where there is none."""
    narrow = {place: tensor.data for place, tensor in _half_tensors(holders).items()}

    # Tensors are looked up anew each time: those of weights that wait on disk are others after each pass.
    def widen(*_: Any) -> None:
        for holder, name in narrow:
            tensor = getattr(holder, name)
            tensor.data = tensor.data.float()

    def restore(*_: Any) -> None:
        for (holder, name), data in narrow.items():
            getattr(holder, name).data = data

    handles = []
    if module is None:
        widen()
    else:
        handles = [module.register_forward_pre_hook(widen), module.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        restore()


def _half_tensors(holders: list[nn.Module]) -> dict[tuple[nn.Module, str], Tensor]:
    """Return the parameters and buffers of a half type that some modules hold themselves, each once."""
    half = [DTYPES[name] for name in HALF_TYPES]
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for holder in holders:
        for name, tensor in (*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False)):
            if tensor.dtype in half and all(tensor is not other for other in found.values()):
                found[holder, name] = tensor
    return found
