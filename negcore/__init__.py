"""Neuron empirical gradients: the science, as a plain library.

Names are loaded on first use, so that importing a light part does not import torch.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from negcore.errors import NegError
    from negcore.measure.estimators import ESTIMATORS, estimate
    from negcore.measure.interventions import intervene
    from negcore.measure.neurgrad import NeurGradBatch, neurgrad
    from negcore.measure.sweeps import sweep
    from negcore.model.language_model import LanguageModel, load_model
    from negcore.store.reader import open_negs

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
        "ESTIMATORS": "negcore.measure.estimators",
        "LanguageModel": "negcore.model.language_model",
        "NegError": "negcore.errors",
        "NeurGradBatch": "negcore.measure.neurgrad",
        "estimate": "negcore.measure.estimators",
        "intervene": "negcore.measure.interventions",
        "load_model": "negcore.model.language_model",
        "neurgrad": "negcore.measure.neurgrad",
        "open_negs": "negcore.store.reader",
        "sweep": "negcore.measure.sweeps",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'negcore' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
