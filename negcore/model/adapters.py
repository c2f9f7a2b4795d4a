"""PEFT adapters: small trained changes to a base model, merged into its weights before anything is measured.

Adapters are read from safetensors, never from pickles, and they must fit: each of their weights has a place in the
base model, and each place has its weight.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from xxhash import xxh3_128

from negcore.errors import ModelError
from negcore.model.checksums import checksums
from negcore.model.model_files import ADAPTER, check_file, read_object

_WEIGHTS = "adapter_model.safetensors"
_FILES = (ADAPTER, _WEIGHTS)


def adapter_digest(adapter: Path) -> str:
    """Return the xxh3-128 over the files of an adapter that decide its numbers.

    Raises
    ------
    ModelError
        If a file is missing or is not what its name says, or the adapter's weights are pickled.
    """
    if not (adapter / _WEIGHTS).exists() and any(adapter.glob("adapter_model.*")):
        raise ModelError(
            f"{str(adapter)!r} has its weights in a format that can hold code and is never read: save the adapter "
            f"again as {_WEIGHTS}"
        )
    for name in _FILES:
        check_file(adapter / name)
    read_object(adapter / ADAPTER)
    digest = xxh3_128()
    for name, found in zip(_FILES, checksums([(adapter / name, "xxh3") for name in _FILES]), strict=True):
        digest.update(f"{name}:{found};".encode())
    return digest.hexdigest()


def check_adapter(model: Any, adapter: Path) -> None:
    """Refuse an adapter that does not fit a model, which may be one without weights.

    Raises
    ------
    ModelError
        As for `merged`.
    """
    _wrapped(model, adapter)


def merged(model: Any, adapter: Path) -> Any:
    """Return a base model with an adapter merged into its weights.

    Parameters
    ----------
    model : transformers model
        With plain weights.
    adapter : Path
        Folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises
    ------
    ModelError
        If peft is not installed, or the adapter does not fit or cannot be merged.
    """
    wrapped, weights = _wrapped(model, adapter)
    import peft

    peft.set_peft_model_state_dict(wrapped, weights)
    result = wrapped.merge_and_unload(safe_merge=True)
    if hasattr(result, "peft_config"):
        del result.peft_config
    return result


def _wrapped(model: Any, adapter: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return a model with places for an adapter's weights, and those weights, which fit."""
    if find_spec("peft") is None:
        raise ModelError("an adapter takes the package peft, which is not installed: pip install peft")
    import peft

    config = peft.PeftConfig.from_pretrained(str(adapter))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ModelError(f"adapters of the type {_type_of(config)} have no weights that can be merged into a model's")
    config.inference_mode = True
    wrapped, weights = peft.PeftModel(model, config), load_file(adapter / _WEIGHTS)
    # An adapter may bring a copy of the embeddings.
    needed, known = (peft.get_peft_model_state_dict(wrapped, save_embedding_layers=both) for both in (False, True))
    for name in sorted(weights.keys() - known.keys()):
        raise ModelError(f"the adapter does not fit: the model has no place for its weight {name}")
    for name in sorted(needed.keys() - weights.keys()):
        raise ModelError(f"the adapter does not fit, or is not whole: it lacks the weight {name}")
    for name, weight in weights.items():
        if weight.shape != known[name].shape:
            here, there = (" x ".join(map(str, one.shape)) for one in (weight, known[name]))
            raise ModelError(f"the adapter does not fit: its weight {name} is {here}, and {there} in this model")
    return wrapped, weights


def _type_of(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))
