"""Checkpoints whose weights are stored quantised: read by the quantisers of transformers, and measured as plain floats.

Gradients, sweeps and the neurons' output vectors need weights that are ordinary numbers, and many quantised kernels
have no backward pass. So a model is measured with the numbers that its quantised weights stand for, in the type that it
computes in. Where transformers has no way from a method's weights to numbers (GPTQ, AWQ), a layer's own code tells
them: it is asked what it makes of unit vectors. A GGUF file is converted when it is first used, see
`negcore.model.language_model`.
"""

import copy
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

from negcore.errors import ModelError, one_line

_REMEDY = "or give the model as it was before it was quantised"

_PACKAGES = MappingProxyType(
    {
        "aqlm": ("aqlm",),
        "auto-round": ("auto-round",),
        "awq": ("gptqmodel",),
        "bitsandbytes_4bit": ("bitsandbytes",),
        "bitsandbytes_8bit": ("bitsandbytes",),
        "compressed-tensors": ("compressed-tensors",),
        "eetq": ("kernels",),
        "fouroversix": ("fouroversix",),
        "fp_quant": ("fp-quant",),
        "gptq": ("optimum", "gptqmodel"),
        "hqq": ("hqq",),
        "quanto": ("optimum-quanto",),
        "quark": ("amd-quark",),
        "sinq": ("sinq",),
        "torchao": ("torchao",),
        "vptq": ("vptq",),
    }
)
"""Packages that read a method's weights, by the names that pip knows. FP8 and MXFP4 take none."""
_WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OWN_PACKAGES = {"torch", "transformers"}
_UNIT_ROWS = 1024
"""Unit vectors that go through a layer at once."""
_MOST_ERROR = 0.3
"""Most that a layer's output may differ from that of the numbers read out of it, relative: it may round its input."""


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
    missing = list(filter(_is_missing, _PACKAGES.get(method, ())))
    if missing:
        raise ModelError(
            f"its weights are quantised ({method}), and to read them takes what is not installed: pip install "
            f"{' '.join(missing)}; {_REMEDY}"
        )
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
        _refuse_split_rows(model)
        with suppress(NotImplementedError):
            model = model.dequantize()
    for path, module in list(_packed_layers(model)):
        model.set_submodule(path, linear_of(module, dtype))
    if not _is_plain(model):
        raise ModelError(
            f"its weights stay quantised ({_method(settings)}): transformers cannot make floats of them; {_REMEDY[3:]}"
        )
    # Weights are plain by now, but transformers refuses to move or save a model that is still marked.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
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


def _refuse_split_rows(model: nn.Module) -> None:
    """Refuse what bitsandbytes 0.50 reads wrongly on a CPU: 4-bit numbers in blocks that reach into the next row."""
    for path, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None and weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise ModelError(
                f"{path} has rows of {state.shape[-1]} numbers in blocks of {state.blocksize}, which bitsandbytes "
                f"reads wrongly on a CPU: load it on a GPU, {_REMEDY}"
            )


def _is_missing(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return True
    return False


def _is_plain(model: nn.Module) -> bool:
    """Tell whether all weights are floats, and multiplied by nothing but the code of PyTorch and transformers."""
    modules = list(model.modules())
    weights = [getattr(module, "weight", None) for module in modules]
    packages = {type(module).__module__.partition(".")[0] for module in modules if isinstance(module, nn.Linear)}
    tensors = [*model.parameters(), *(weight for weight in weights if isinstance(weight, Tensor))]
    return all(one.dtype in _WIDE for one in tensors) and packages <= _OWN_PACKAGES and not any(_packed_layers(model))


def _packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and module of linear layers whose weights are no matrix of floats."""
    for path, module in model.named_modules():
        if isinstance(getattr(module, "in_features", None), int) and isinstance(
            getattr(module, "out_features", None), int
        ):
            weight = getattr(module, "weight", None)
            shape = (module.out_features, module.in_features)
            if not isinstance(weight, Tensor) or weight.shape != shape or weight.dtype not in _WIDE:
                yield path, module


@torch.no_grad()
def linear_of(packed: Any, dtype: torch.dtype) -> nn.Linear:
    """Return a plain linear layer with the numbers that a quantised one multiplies by, found with unit vectors.

    Parameters
    ----------
    packed : module
        With `in_features`, `out_features` and perhaps a `bias`, which is left as it was.
    dtype : torch.dtype
        Type of the new weights; where the layer does not compute in it, it is asked in a half type.

    Raises
    ------
    ModelError
        If it computes in no type, or does something else than multiplying by a matrix.
    """
    bias = packed.bias if isinstance(getattr(packed, "bias", None), Tensor) else None
    width, device = packed.in_features, next(tensor.device for tensor in (*packed.parameters(), *packed.buffers()))
    if bias is not None:
        packed.bias = None  # what is added would round the numbers
    try:
        asked = _answering_type(packed, width, dtype, device)
        units = torch.eye(width, dtype=asked, device=device)
        parts = [packed(units[first : first + _UNIT_ROWS]).to(dtype) for first in range(0, width, _UNIT_ROWS)]
        weight = torch.cat(parts).T.contiguous()
        probe = torch.linspace(-1, 1, width, dtype=asked, device=device)[None]
        answer, expected = packed(probe).double(), probe.double() @ weight.double().T
    finally:
        if bias is not None:
            packed.bias = bias
    if not (answer - expected).norm() <= _MOST_ERROR * expected.norm():
        raise ModelError(f"a {type(packed).__name__} does not multiply by a matrix; {_REMEDY[3:]}")
    made = nn.Linear(width, packed.out_features, bias=bias is not None, dtype=dtype, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return made


def _answering_type(packed: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the first type that a quantised layer computes in."""
    problem = ""
    for asked in dict.fromkeys((dtype, torch.float16, torch.bfloat16)):
        try:
            packed(torch.zeros(1, width, dtype=asked, device=device))
            return asked
        except Exception as error:  # a kernel's own code says no in its own way
            problem = problem or one_line(error)
    raise ModelError(f"a {type(packed).__name__} does not run here ({problem:.150}); {_REMEDY[3:]}")
