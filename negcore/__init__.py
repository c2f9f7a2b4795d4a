"""Neuron empirical gradients: the science, as a plain library.

Names are loaded on first use, so that importing a light part does not import torch.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from negcore.errors import NegError
    from negcore.estimators import ESTIMATORS, estimate
    from negcore.gradients import NeurGradBatch, neurgrad
    from negcore.interventions import intervene
    from negcore.models import LanguageModel, load_model
    from negcore.reader import open_negs
    from negcore.sweeps import sweep

__all__ = [
    "ESTIMATORS",
    "LanguageModel",
    "NegError",
    "NeurGradBatch",
    "estimate",
    "intervene",
    "load_model",
    "neurgrad",
    "open_negs",
    "sweep",
]

_HOMES = MappingProxyType(
    {
        "ESTIMATORS": "negcore.estimators",
        "LanguageModel": "negcore.models",
        "NegError": "negcore.errors",
        "NeurGradBatch": "negcore.gradients",
        "estimate": "negcore.estimators",
        "intervene": "negcore.interventions",
        "load_model": "negcore.models",
        "neurgrad": "negcore.gradients",
        "open_negs": "negcore.reader",
        "sweep": "negcore.sweeps",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'negcore' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
