"""Models without weights, and where the feed-forward layers are in a model, with weights or without."""

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from negcore.errors import ModelError
from negcore.model.architectures import Architecture
from negcore.model.experts import experts_shape, stacked_experts
from negcore.model.layer_shapes import LayerShape


def auto_class(config: Any, *, masked: bool) -> Any:
    """Return the class of transformers that loads a model with its language head."""
    if masked:
        return transformers.AutoModelForMaskedLM
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText  # its language part is measured


def has_language_head(config: Any) -> bool:
    """Tell whether transformers knows a model of this type that predicts tokens."""
    known = (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return any(config.model_type in names for names in known)


def skeleton(config: Any, *, masked: bool, **options: Any) -> Any:
    """Make a model without weights: it takes no memory, and shows shapes and modules."""
    with torch.device("meta"):
        return auto_class(config, masked=masked).from_config(config, **options)


def feed_forwards(model: Any, arch: Architecture) -> dict[int, nn.Module]:
    """Return the layers that have feed-forward neurons, by their place among all layers.

    Layers of state spaces alone have none, nor have those of experts whose weights are not stacked.

    Raises
    ------
    ModelError
        If something else than a linear projection stands in a down projection's place, such as an adapter.
    """
    layers = enumerate(model.get_submodule(arch.layers))
    return {
        place: layer
        for place, layer in layers
        if dense_row(layer, arch) is not None or stacked_experts(layer, arch) is not None
    }


def dense_row(layer: nn.Module, arch: Architecture) -> Architecture | None:
    """Return the row with the places of the neurons that every token has in a layer: its own or its shared experts'.

    Raises
    ------
    ModelError
        As `feed_forwards`.
    """
    rows = [arch, *([arch.of_shared] if arch.shared else [])]
    return next((row for row in rows if _has_down(layer, row.down)), None)


def layer_shapes(layers: Iterable[nn.Module], arch: Architecture) -> tuple[LayerShape, ...]:
    """Return the counts of the neurons of each layer.

    Raises
    ------
    ModelError
        If no layer has neurons, or layers without experts differ in their number.
    """
    if arch.experts is None:
        layers = list(layers)
        return (LayerShape(common_width(layers, arch)),) * len(layers)
    shapes = []
    for layer in layers:
        row = dense_row(layer, arch)
        n_dense = len(down_rows(layer.get_submodule(row.down))) if row is not None else 0
        has_experts = stacked_experts(layer, arch) is not None
        shapes.append(experts_shape(layer, arch, n_dense) if has_experts else LayerShape(n_dense))
    if not shapes:
        raise ModelError(f"none of its layers has the feed-forward {arch.down!r} or the experts {arch.experts!r}")
    return tuple(shapes)


def unused_positions(model: nn.Module) -> int:
    """Return how many learned positions no token stands at: in RoBERTa they begin after the padding's."""
    tables = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    padded = [table.padding_idx for name, table in tables if "position" in name and table.padding_idx is not None]
    return max(padded, default=-1) + 1


def common_width(layers: Iterable[nn.Module], arch: Architecture) -> int:
    """Return the number of neurons of each layer.

    Raises
    ------
    ModelError
        If no layer has neurons, or they differ in their number.
    """
    widths = sorted({len(down_rows(layer.get_submodule(arch.down))) for layer in layers})
    if not widths:
        raise ModelError(f"none of its layers has the feed-forward {arch.down!r}; layers of experts are not measured")
    if len(widths) > 1:
        raise ModelError(f"its layers have {widths[0]} to {widths[-1]} neurons; only layers of one width are measured")
    return widths[0]


def down_rows(down: Any) -> Tensor:
    """Return what one unit of each neuron's `act` adds to the layer's output: shape (N, hidden)."""
    weight: Tensor = down.weight
    return weight if isinstance(down, Conv1D) else weight.T  # GPT-2 stores (in, out)


def _has_down(layer: nn.Module, path: str) -> bool:
    try:
        down = layer.get_submodule(path)
    except AttributeError:
        return False
    if not isinstance(down, nn.Linear | Conv1D):
        raise ModelError(f"the down projection {path!r} of a layer is a {type(down).__name__}; merge what wraps it")
    return True
