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
    at_times = [(block, _half_tensors(block, whole=True)) for block in blocks]
    at_times += [(module, _half_tensors(module, whole=False)) for module in others]
    always = [tensor for module in beside - within for tensor in _half_tensors(module, whole=False)]
    with ExitStack() as hooks:
        hooks.enter_context(_wide_while_it_runs(None, always))
        for module, tensors in at_times:
            if tensors:
                hooks.enter_context(_wide_while_it_runs(module, tensors))
        yield


@contextmanager
def _wide_while_it_runs(module: nn.Module | None, tensors: list[Tensor]) -> Iterator[None]:
    """Widen tensors while a module runs, or all the time where there is none."""
    narrow = [tensor.data for tensor in tensors]

    def widen(*_: Any) -> None:
        for tensor, data in zip(tensors, narrow, strict=True):
            tensor.data = data.float()

    def restore(*_: Any) -> None:
        for tensor, data in zip(tensors, narrow, strict=True):
            tensor.data = data

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


def _half_tensors(module: nn.Module, *, whole: bool) -> list[Tensor]:
    """Return the parameters and buffers of a half type that a module holds itself, or the whole of it."""
    half = [DTYPES[name] for name in HALF_TYPES]
    return [
        tensor for tensor in (*module.parameters(recurse=whole), *module.buffers(recurse=whole)) if tensor.dtype in half
    ]
