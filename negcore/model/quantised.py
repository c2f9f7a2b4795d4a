"""Checkpoints whose weights are stored quantised: read as plain floats where transformers can, else refused.

Gradients, sweeps and the neurons' output vectors need weights that are ordinary numbers. A GGUF file is converted when
it is first used, see `negcore.model.language_model`.
"""

import copy
from contextlib import suppress
from inspect import signature
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

from negcore.errors import ModelError, one_line

_REMEDY = "or give the model as it was before it was quantised"


def plain_config(config: Any) -> Any:
    """Return the configuration with which transformers reads the weights as plain floats; a plain model's is its own.

    Raises
    ------
    ModelError
        If the weights are quantised by a method that transformers does not know, or that needs a package which is not
        installed.
    """
    settings = _settings(config)
    if not settings:
        return config
    method = _method(settings)
    if method not in AUTO_QUANTIZER_MAPPING:
        raise ModelError(f"its weights are quantised by {method!r}, which transformers cannot read; {_REMEDY[3:]}")
    if "dequantize" in signature(AUTO_QUANTIZATION_CONFIG_MAPPING[method]).parameters:
        settings = {**settings, "dequantize": True}
    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map=None)
    except ImportError as error:
        needed = f"its weights are quantised ({method}), and a package to read them is not installed"
        raise ModelError(f"{needed}: {one_line(error):.150}; install it, {_REMEDY}") from None
    except (RuntimeError, ValueError):
        pass  # what is wrong with this machine's devices may be right on the one that loads the model
    plain = copy.deepcopy(config)
    (plain if getattr(plain, "quantization_config", None) else plain.get_text_config()).quantization_config = settings
    return plain


def plain_model(model: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return a loaded model with plain weights of one type; a model that was never quantised is returned as it is.

    Parameters
    ----------
    config : configuration of transformers
        As it is in the model's files.

    Raises
    ------
    ModelError
        If its weights stay quantised.
    """
    settings = _settings(config)
    if not settings:
        return model
    if not _is_plain(model):
        with suppress(NotImplementedError):
            model = model.dequantize()
    if not _is_plain(model):
        raise ModelError(
            f"its weights stay quantised ({_method(settings)}): transformers cannot make floats of them; {_REMEDY[3:]}"
        )
    # Weights are plain by now, but transformers refuses to move or save a model that is still marked.
    model.hf_quantizer, model.is_quantized = None, False
    return model.to(dtype)


def storage_note(config: Any) -> str:
    """Return how a model's weights are quantised, in brackets behind its name; nothing for plain weights."""
    settings = _settings(config)
    return f" (weights quantised by {_method(settings)})" if settings else ""


def _settings(config: Any) -> dict[str, Any]:
    for one in (config, config.get_text_config()):
        settings = getattr(one, "quantization_config", None)
        if settings:
            return dict(settings) if isinstance(settings, dict) else dict(settings.to_dict())
    return {}


def _method(settings: dict[str, Any]) -> str:
    method = settings.get("quant_method")
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes" or settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return f"bitsandbytes_{4 if settings.get('load_in_4bit') else 8}bit"
    return method


def _is_plain(model: Any) -> bool:
    wide = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    linear = (module for module in model.modules() if isinstance(getattr(module, "weight", None), torch.Tensor))
    return all(module.weight.dtype in wide for module in linear) and all(
        one.dtype in wide for one in model.parameters()
    )
