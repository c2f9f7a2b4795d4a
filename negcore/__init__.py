"""Neuron empirical gradients: the science, as a plain library.

Names are loaded on first use, so that importing a light part does not import torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from negcore.analysis.matching import match_neurons
    from negcore.analysis.neurons import TopNeuron, top_neurons
    from negcore.datasets import Dataset, PromptSettings, chat_prompts, list_datasets, load_dataset
    from negcore.errors import NegError
    from negcore.measure.estimators import ESTIMATORS, estimate
    from negcore.measure.interventions import intervene
    from negcore.measure.loading import as_language_model, load_model
    from negcore.measure.model_check import check_model
    from negcore.measure.neurgrad import NeurGradBatch, neurgrad
    from negcore.measure.steering import steer
    from negcore.measure.sweeps import SweepResult, sweep
    from negcore.model.language_model import LanguageModel, ModelCard, describe_model
    from negcore.probing.rankings import rank
    from negcore.probing.saved_probes import load_probe
    from negcore.store.reader import Negs, open_negs

if sys.platform == "win32":
    raise ImportError(
        "neg-at-scale does not run on Windows (it needs the file locks of Linux or macOS): "
        "run it in WSL, see https://learn.microsoft.com/windows/wsl/install"
    )

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "Dataset",
    "LanguageModel",
    "ModelCard",
    "NegError",
    "Negs",
    "NeurGradBatch",
    "PromptSettings",
    "SweepResult",
    "TopNeuron",
    "as_language_model",
    "chat_prompts",
    "check_model",
    "describe_model",
    "estimate",
    "intervene",
    "list_datasets",
    "load_dataset",
    "load_model",
    "load_probe",
    "match_neurons",
    "neurgrad",
    "open_negs",
    "rank",
    "steer",
    "sweep",
    "top_neurons",
]

_HOMES = {
    name: f"negcore.{module}"
    for module, names in {
        "analysis.matching": ("match_neurons",),
        "analysis.neurons": ("TopNeuron", "top_neurons"),
        "datasets": ("Dataset", "PromptSettings", "chat_prompts", "list_datasets", "load_dataset"),
        "errors": ("NegError",),
        "measure.estimators": ("ESTIMATORS", "estimate"),
        "measure.interventions": ("intervene",),
        "measure.loading": ("as_language_model", "load_model"),
        "measure.model_check": ("check_model",),
        "measure.neurgrad": ("NeurGradBatch", "neurgrad"),
        "measure.steering": ("steer",),
        "measure.sweeps": ("SweepResult", "sweep"),
        "model.language_model": ("LanguageModel", "ModelCard", "describe_model"),
        "probing.rankings": ("rank",),
        "probing.saved_probes": ("load_probe",),
        "store.reader": ("Negs", "open_negs"),
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'negcore' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
