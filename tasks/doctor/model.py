"""The number type that a model can be compared in here: the most exact one that there is room for."""

import torch

from negcore.model.architectures import Dtype
from negcore.model.language_model import ModelCard
from tasks.forecast.needs import count_parameters
from tasks.machine import memory_bytes

_COPIES = 1.5
"""Room for a model in float64, in its own size: the weights, and a part of them again while they are read."""
_FLOAT64_BYTES = 8


def exact_type(card: ModelCard, device: str | None) -> Dtype:
    """Return float64 where a model fits in it, else float32.

    Parameters
    ----------
    device : str, optional
        A torch device; by default the first GPU if there is one, else the CPU.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    there = memory_bytes()
    if target.type == "cuda":
        there = min(there, torch.cuda.get_device_properties(target).total_memory)
    fits = _COPIES * _FLOAT64_BYTES * count_parameters(card).n_all <= there
    return "float64" if fits and target.type != "mps" else "float32"
