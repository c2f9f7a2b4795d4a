"""Neuron empirical gradients: the science, as a plain library.

Names are loaded on first use, so that importing a light part does not import torch.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from negcore.errors import NegError
    from negcore.models import LanguageModel, load_model
    from negcore.gradients import NeurGradBatch, neurgrad
    from negcore.reader import open_negs

__all__ = ["LanguageModel", "NegError", "NeurGradBatch", "load_model", "neurgrad", "open_negs"]

_HOMES = MappingProxyType(
    {
        "LanguageModel": "negcore.models",
        "NegError": "negcore.errors",
        "NeurGradBatch": "negcore.gradients",
        "load_model": "negcore.models",
        "neurgrad": "negcore.gradients",
        "open_negs": "negcore.reader",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'negcore' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
