"""Models on several devices, and models whose weights pass through one device from memory or disk.

accelerate infers which part goes where, and moves values and weights while the model runs. A part is never smaller than
a block, so that what a block computes stays on one device.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import align_module_device, compute_module_sizes
from torch import nn

from negcore.errors import ModelError
from negcore.model.architectures import DeviceMap
from negcore.store.temporary import temporary_directory


def resolved_map(
    model: Any, layers: str, wanted: DeviceMap | None, device: str, dtype: torch.dtype
) -> dict[str, str | int] | None:
    """Return the device of each part of a model; None for one device.

    Parameters
    ----------
    model : transformers model
        Without weights.
    layers : str
        Path of its blocks.
    wanted : DeviceMap, optional
    device : str
        Where it computes, if `wanted` does not say so.
    dtype : torch.dtype
        Of its weights.

    Raises
    ------
    ModelError
        If there are no GPUs, or the map leaves out a part or names a device that is not there.
    """
    if wanted is None:
        return None
    if wanted == "auto":
        count = torch.cuda.device_count()
        if not count:
            raise ModelError("a model is spread over GPUs, and there is none here: leave out --gpus and device_map")
        return even_map(model, layers, dtype, count) if count > 1 else None
    found = passing_map(model, layers, device, wanted) if isinstance(wanted, str) else named_map(wanted)
    _check_map(model, found)
    return found


def even_map(model: Any, layers: str, dtype: torch.dtype, count: int) -> dict[str, str | int]:
    """Return the device map that accelerate infers where each of some GPUs takes about the same share of a model."""
    blocks = {type(block).__name__ for block in model.get_submodule(layers)}
    n_bytes = compute_module_sizes(model, dtype=dtype)[""]
    share = step = n_bytes // (16 * count) + 1
    while True:
        limits = dict.fromkeys(range(count), share)
        found = infer_auto_device_map(model, limits, no_split_module_classes=sorted(blocks), dtype=dtype)
        if not {"cpu", "disk"} & set(found.values()):
            return dict(found)
        share += step


def passing_map(model: Any, layers: str, device: str, where: str) -> dict[str, str | int]:
    """Return the map of a model whose blocks' weights wait in `cpu` or on `disk`, all else on the device."""
    blocks = model.get_submodule(layers)
    beside = _beside(model, layers)
    return {**dict.fromkeys(beside, _plain(device)), **{f"{layers}.{index}": where for index in range(len(blocks))}}


def map_bytes(model: Any, device_map: Mapping[str, str | int], dtype: torch.dtype) -> dict[str | int, int]:
    """Return the bytes of the weights on each device of a map."""
    sizes = compute_module_sizes(model, dtype=dtype)
    found: dict[str | int, int] = {}
    for path, place in device_map.items():
        found[place] = found.get(place, 0) + sizes[path]
    return found


def placed(load: Callable[..., Any], device_map: dict[str, str | int], *, at_once: bool) -> Any:
    """Load a model with its parts where a map says.

    Parameters
    ----------
    load : callable
        Loads the model, with options of transformers' `from_pretrained`.
    at_once : bool
        True where each weight can go from its file to its place; else the model is in main memory first.
    """
    with ExitStack() as until:
        folder = until.enter_context(temporary_directory())  # for weights not in a file as they are computed with
        if at_once:
            model = load(device_map=device_map, offload_folder=str(folder))
        else:
            model = load()
            skipped = model._skip_keys_device_placement
            dispatch_model(model, device_map, offload_dir=str(folder), skip_keys=skipped)
        weakref.finalize(model, until.pop_all().close)
    _forget_addresses(model)
    return model


def _forget_addresses(model: nn.Module) -> None:
    """Let accelerate load every weight that waits by its name alone.

    It knows tied weights by their address in memory, and where that is given to another weight, later on, it takes the
    one for the other.
    """
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if isinstance(one, AlignDevicesHook):
                one.tied_params_map, one.tied_params_names = None, set()


def main_device(model: Any) -> torch.device:
    """Return the device that a model takes its tokens on and gives its logits on."""
    hook = getattr(model, "_hf_hook", None)
    return torch.device(model.device if hook is None else hook.execution_device)


def weights_pass(model: nn.Module) -> bool:
    """Tell whether weights of a model wait elsewhere and pass through its device."""
    return any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())


@contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run other code; what it ran before, accelerate's or its own, is put back."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def with_weights(module: nn.Module) -> Iterator[None]:
    """Have a module's own weights here, wherever they wait."""
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        with align_module_device(module):
            yield
    else:
        yield


def _beside(model: nn.Module, layers: str) -> list[str]:
    """Return the paths of the largest parts that hold no block."""
    path, found = layers.split("."), list[str]()
    for depth, on_the_way in enumerate(path):
        parent = model.get_submodule(".".join(path[:depth]))
        names = [name for name, _ in (*parent.named_children(), *parent.named_parameters(recurse=False))]
        found += [".".join([*path[:depth], name]) for name in names if name != on_the_way]
    return found


def named_map(wanted: Mapping[str, str | int]) -> dict[str, str | int]:
    """Return a device map with GPUs by their numbers."""
    return {path: _plain(place) for path, place in wanted.items()}


def _plain(place: str | int) -> str | int:
    """Return a GPU's number for its name, as accelerate likes it."""
    text = str(place)
    if text == "cuda":
        return 0
    number = text.removeprefix("cuda:")
    return int(number) if number.isdecimal() else text


def _check_map(model: nn.Module, device_map: Mapping[str, str | int]) -> None:
    for path, place in device_map.items():
        try:
            model.get_submodule(path)
        except AttributeError:
            if path not in dict(model.named_parameters()):
                raise ModelError(f"device_map names {path!r}, which the model does not have") from None
        if isinstance(place, int) and place >= torch.cuda.device_count():
            raise ModelError(f"device_map names GPU {place}, and there are {torch.cuda.device_count()} here")
        if isinstance(place, str) and place not in ("cpu", "disk"):
            raise ModelError(f"device_map says {place!r} for {path!r}; allowed are cuda:0, cuda:1 ..., cpu and disk")
    for name, _ in model.named_parameters():
        if not any(path == "" or name == path or name.startswith(f"{path}.") for path in device_map):
            raise ModelError(f"device_map says nothing of {name!r}: name it or a part around it, or '' for all")
