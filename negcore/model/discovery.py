"""Find the feed-forward neurons of a model type that is in no row, by a traced pass of the model without weights.

A feed-forward vector enters a projection back to the residual stream, and is made value by value from projections of
one and the same input: one projection behind a nonlinearity, or gate and up that are multiplied, fused or not.
Attention, state spaces, convolutions and experts mix, sort or scan tokens before their output projection, so their
vectors are never taken for one.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from negcore.errors import ModelError, one_line
from negcore.model.architectures import ARCHITECTURES, Architecture
from negcore.model.experts import TRACED_NAME, is_stacked, register_experts
from negcore.model.skeleton import has_language_head, skeleton

# Operations of values that bend them; beside these, sums and products with constants keep a value's line.
_BENDING = re.compile(r"silu|gelu|relu|sigmoid|tanh|pow|exp|erf|softplus|elu|mish|clamp|square|where|maximum|minimum")
_IN_LIST = re.compile(r"(.*?)\.(\d+)\.(.*)")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten._unsafe_view.default)
_N_TOKENS = 5


@dataclass(eq=False)
class _Value:
    """A tensor of the traced pass."""

    operation: Any
    inputs: list["_Value"]
    width: int
    projection: str = ""
    """Projection that it is the output of, or a view of that output."""
    offset: int = 0
    """First column, in a view of a projection's output."""
    modules: list[str] = field(default_factory=list)
    """Modules that returned it, inner ones first."""


class _Source(NamedTuple):
    """A projection's output, or the part of it that begins at a column."""

    projection: str
    offset: int


class _Place(NamedTuple):
    """Paths of the feed-forward in one kind of layer."""

    layers: str
    down: str
    up: str | None
    gate: str | None
    fused: bool
    post_norm: str | None

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items() if value)


class _Mixed(Exception):
    """A vector is not made value by value."""


def find_architecture(config: Any, kind: str | None = None) -> Architecture:
    """Return the row of a model's type, or search the model for its feed-forward neurons.

    Parameters
    ----------
    config : configuration of transformers
    kind : str, optional
        Class of the model; by default as its configuration names it.

    Raises
    ------
    ModelError
        If the type is in no row and the search finds nothing, or nothing that can be measured, or the model predicts
        next tokens where its type predicts masks.
    """
    row = ARCHITECTURES.get(config.model_type)
    if row is not None:
        _refuse_decoder(config, row)
        return row
    try:
        return _discovered(config, [kind] if kind else getattr(config, "architectures", None) or [])
    except ModelError as error:
        raise ModelError(
            f"architecture {config.model_type!r} is in no row of negcore/model/architectures.py, and a search for its "
            f"feed-forward layers was in vain: {error}"
        ) from error


def _refuse_decoder(config: Any, row: Architecture) -> None:
    if row.masked and getattr(config, "is_decoder", False):
        raise ModelError(
            f"its config.json says is_decoder, so that it predicts next tokens, and models of type "
            f"{config.model_type!r} are measured at a mask, of which it would see one side"
        )


def _discovered(config: Any, classes: Sequence[str]) -> Architecture:
    masked = _predicts_masks(config, classes)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError("it is an encoder-decoder, and only models of one stack are measured")
    if not has_language_head(config):
        raise ModelError("transformers knows no language model of this type")
    register_experts()
    model = skeleton(copy.deepcopy(config), masked=masked, attn_implementation="eager")
    experts = {_parts(path)[::2] for path, module in model.named_modules() if is_stacked(module) and _parts(path)[0]}
    if experts:
        return _with_experts(model, experts)
    if any("expert" in f"{name} {type(module).__name__}".lower() for name, module in model.named_modules()):
        raise ModelError(
            "it holds experts, whose weights are not stacked as transformers does (a row may name a dense layer of it)"
        )
    places = _same_but_for_norms(set(_places(model)))
    if not places:
        raise ModelError("it has no feed-forward layers (or none that are made value by value)")
    if len(places) > 1:
        found = "; ".join(sorted(map(str, places)))
        raise ModelError(f"it has several kinds of feed-forward layers ({found}); a row for one makes it measurable")
    return Architecture(**places.pop()._asdict(), masked=masked, way="whole", discovered=True)


def _with_experts(model: Any, experts: set[tuple[str, str]]) -> Architecture:
    """Return the places in a model with experts: theirs, those of dense layers and of shared experts."""
    if len(experts) > 1:
        raise ModelError(f"it has several kinds of experts ({sorted(experts)}); a row for one makes it measurable")
    ((layers, below),) = experts
    model.set_experts_implementation(TRACED_NAME)
    places = {place._replace(post_norm=None) for place in _places(model)}
    blocks = [block for block in model.get_submodule(layers) if _at(block, below) is not None]
    beside = {place for place in places if any(_at(block, place.down) is not None for block in blocks)}
    dense = places - beside or beside
    up = f"{below}.gate_up_proj" if _at(blocks[0], below).has_gate else None
    if (
        len(beside) > 1
        or len(dense) > 1
        or any(place.layers != layers or (place.up is None) != (up is None) for place in places)
    ):
        found = "; ".join(sorted(map(str, places)))
        raise ModelError(f"it has several kinds of feed-forward layers ({found}); a row for one makes it measurable")
    row = Architecture(layers, f"{below}.down_proj", up, experts=below, way="whole", discovered=True)
    for place in dense:
        row = replace(row, down=place.down, up=place.up, gate=place.gate, fused=place.fused)
    for place in beside - dense:
        row = replace(row, shared=place.down.rpartition(".")[0])
        if (row.of_shared.down, row.of_shared.up, row.fused) != (place.down, place.up, place.fused):
            raise ModelError(f"its shared experts ({place}) are not like its dense layers; a row makes it measurable")
    return row


def _at(block: nn.Module, path: str) -> Any:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def _same_but_for_norms(places: set[_Place]) -> set[_Place]:
    """Take layers for one kind that differ only in whether a normalisation follows."""
    bare = {place._replace(post_norm=None) for place in places}
    norms = {place.post_norm for place in places} - {None}
    return {place._replace(post_norm=norms.pop()) for place in bare} if len(bare) == len(norms) == 1 else places


def _predicts_masks(config: Any, classes: Sequence[str]) -> bool:
    """Tell which of its language models a type is: that which its checkpoint names, else the causal one."""
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        return not known or any("MaskedLM" in name for name in classes)
    return False


def _places(model: nn.Module) -> Iterator[_Place]:
    trace = _trace(model)
    entering = trace.entering
    for down, value in entering.items():
        try:
            sources = _sources(value)
        except _Mixed:
            continue
        read = {id(entering[source.projection]) for source in sources if source.projection in entering}
        together = len({_block(path) for path in (down, *(source.projection for source in sources))}) == 1
        if len(read) == 1 and together and _width_out(model, down) == entering[next(iter(sources)).projection].width:
            place = _place(down, value, sources)
            if place is not None:
                norm = trace.norms.get(down)
                yield place._replace(post_norm=_below(norm) if norm else None)


def _place(down: str, value: _Value, sources: set[_Source]) -> _Place | None:
    """Return the place of a feed-forward with one source behind a nonlinearity, or with a gate and an up source."""
    layers, _, below = _parts(down)
    if len(sources) == 1:
        return _Place(layers, below, None, None, False, None) if _bent(value) else None
    factors = _factors(value) if len(sources) == 2 else None
    if factors is None or _bent(factors[0]) == _bent(factors[1]):
        return None
    gate, up = sorted(factors, key=_bent, reverse=True)
    (up_source,), (gate_source,) = _sources(up), _sources(gate)
    fused = up_source.projection == gate_source.projection
    if fused and up_source.offset < gate_source.offset:
        return _Place(layers, below, None, None, False, None)  # `up` is read from the last columns
    functions = [_below(path) for path in gate.modules if _block(path) == _block(down)]
    function = functions[0] if functions else None
    return _Place(layers, below, _below(up_source.projection), function, fused, None)


def _factors(value: _Value) -> tuple[_Value, _Value] | None:
    """Return the two factors, of different sources, of the product that a vector is."""
    while not value.projection:
        made = [one for one in value.inputs if _sources(one)]
        if len(made) == 2 and not _sources(made[0]) & _sources(made[1]):
            return (made[0], made[1]) if "mul" in str(value.operation) else None
        if len(made) != 1:
            return None
        (value,) = made
    return None


def _bent(value: _Value) -> bool:
    """Tell whether anything but sums and products lies between a vector and its sources."""
    if value.projection or not value.inputs:
        return False
    return bool(_BENDING.search(str(value.operation))) or any(map(_bent, value.inputs))


def _parts(path: str) -> tuple[str, str, str]:
    """Split a path into the list of layers, the number of the layer and the path below it; empty outside of a list."""
    match = _IN_LIST.fullmatch(path)
    return (match[1], match[2], match[3]) if match else ("", "", "")


def _block(path: str) -> tuple[str, str]:
    return _parts(path)[:2]


def _below(path: str) -> str:
    return _parts(path)[2]


def _width_out(model: nn.Module, path: str) -> int:
    module: Any = model.get_submodule(path)
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)


def _trace(model: nn.Module) -> "_Trace":
    """Run a few tokens."""
    tokens = torch.zeros(1, _N_TOKENS, dtype=torch.long, device="meta")
    trace = _Trace()
    try:
        with torch.no_grad(), trace.attached(model), trace:
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    except Exception as error:  # any code of any model
        raise ModelError(f"a traced pass of it failed: {one_line(error):.200}") from error
    return trace


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record what every tensor is made of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entering: dict[str, _Value] = {}
        """The input of every projection inside a list of layers."""
        self.norms: dict[str, str] = {}
        """Normalisation of a projection's output, for projections that have one right behind them."""
        self._values: dict[int, _Value] = {}
        self._alive: list[Tensor] = []  # an id is a tensor's own only while the tensor lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # there are no values on the meta device; where one is asked, it is whether all tokens count
        result = func(*args, **(kwargs or {}))
        inputs = [self._values[id(one)] for one in _tensors((args, kwargs)) if id(one) in self._values]
        for tensor in _tensors(result):
            value = _Value(func, inputs, int(tensor.shape[-1]) if tensor.ndim else 0)
            if func.is_view and inputs and inputs[0].projection:
                value.projection, value.offset = inputs[0].projection, int(tensor.storage_offset())
            self._values[id(tensor)] = value
            self._alive.append(tensor)
        return result

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as hooks:
            for path, module in model.named_modules():
                if isinstance(module, nn.Linear | Conv1D) and _IN_LIST.fullmatch(path):
                    hooks.callback(module.register_forward_pre_hook(partial(self._enter, path)).remove)
                hooks.callback(module.register_forward_hook(partial(self._leave, path)).remove)
            yield

    def _enter(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if path in self.entering:
            raise ModelError(f"{path} runs more than once in a pass, so its neurons belong to no single layer")
        self.entering[path] = self._values[id(args[0])]

    def _leave(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = self._values.get(id(args[0])) if args else None
        if given is not None and given.projection and "norm" in type(module).__name__.lower() and _IN_LIST.match(path):
            self.norms.setdefault(given.projection, path)
        value = self._values.get(id(output))
        if value is None:
            return
        value.modules.append(path)
        if isinstance(module, nn.Linear | Conv1D):
            value.projection, value.offset = path, 0


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _sources(value: _Value) -> set[_Source]:
    """Return the projections that a vector is made from value by value.

    Raises
    ------
    _Mixed
        If anything else than operations on single values lies between.
    """
    if value.projection:
        return {_Source(value.projection, value.offset)}
    if not value.inputs:  # a constant, or made from parameters
        return set()
    if not _pointwise(value.operation):
        raise _Mixed
    return set().union(*map(_sources, value.inputs))


def _pointwise(operation: Any) -> bool:
    return operation.is_view or torch.Tag.pointwise in operation.tags or operation in _COPIES
