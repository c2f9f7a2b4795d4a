"""Experts of measured models: a token's routed experts side by side, open at their neurons.

transformers keeps the weights of all experts of a layer in one module, which takes each token's routed experts and
their weights. It lets that module's computation be replaced: here by one that is differentiable under vmap, exact in
any dtype, adds a token's experts up in the order of their numbers, and lets a measurement see and change both the
routing and the neurons.

Shapes: T tokens, K experts of a token, S = T*K slots, U units (neurons) of an expert, H hidden width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from negcore.errors import ModelError
from negcore.model.architectures import Architecture, Site
from negcore.model.layer_shapes import LayerShape

EXPERTS_NAME = "negcore"
TRACED_NAME = "negcore-traced"


class Routing(NamedTuple):
    """Experts of some tokens."""

    experts_TK: Tensor
    """Number of each routed expert, rising in every row."""
    weights_TK: Tensor
    """The router's weight of each of them."""

    def rows(self, which: Any) -> "Routing":
        """Return the routing of some of the tokens."""
        return Routing(self.experts_TK[which], self.weights_TK[which])


@dataclass(frozen=True)
class Tap:
    """The part of a measurement at the experts of one layer."""

    site: Site
    route: Callable[[Routing], Routing]
    """Is given the routing of all tokens of a pass, and returns the one to go by."""
    change: Callable[[Tensor], Tensor]
    """Is given the neurons, (T, K * U), and returns those to go on with."""


_taps: ContextVar[Mapping[nn.Module, Tap]] = ContextVar("taps", default={})  # noqa: B039  # never changed


@contextmanager
def tapped_experts(taps: Mapping[nn.Module, Tap]) -> Iterator[None]:
    """Tap modules of experts in every pass inside."""
    token = _taps.set(taps)
    try:
        yield
    finally:
        _taps.reset(token)


def register_experts() -> None:
    """Register the computation in transformers as `EXPERTS_NAME`; a second call changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, experts_forward)
    ALL_EXPERTS_FUNCTIONS.register(TRACED_NAME, _traced)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute what the routed experts of each token add up to.

    Parameters
    ----------
    module : module of experts
        As `transformers.integrations.moe.use_experts_implementation` makes it.
    hidden_states : Tensor of shape (T, H)
    top_k_index, top_k_weights : Tensor of shape (T, K)

    Returns
    -------
    Tensor of shape (T, H)
    """
    tap = _taps.get().get(module)
    order_TK = top_k_index.argsort(-1)
    routing = Routing(top_k_index.gather(-1, order_TK), top_k_weights.gather(-1, order_TK))
    if tap is not None:
        routing = tap.route(routing)
    slots = _Slots(routing.experts_TK)
    act_SU = _neurons(
        module, slots.project(hidden_states, *_weights(module, first=True), shared=True), tap, slots.top_k
    )
    out_SH = slots.project(act_SU, *_weights(module, first=False))
    if module.has_post_expert_norm:
        out_SH = module.post_expert_norm(out_SH)
    out_TKH = out_SH.view(*routing.experts_TK.shape, -1) * routing.weights_TK[..., None]
    return out_TKH.sum(1).to(hidden_states.dtype)


def up_columns(module: Any) -> slice:
    """Return where `up` is in what the first projection of gated experts computes."""
    return slice(module.down_proj.shape[1 if module.is_transposed else 2], None) if module.is_concatenated else _ODD


_ODD = slice(1, None, 2)


def stacked_experts(layer: nn.Module, arch: Architecture) -> Any | None:
    """Return the module of a layer's routed experts; None if it has none."""
    if arch.experts is None:
        return None
    try:
        return layer.get_submodule(arch.experts)
    except AttributeError:
        return None


def is_stacked(module: nn.Module) -> bool:
    """Tell whether a module holds the weights of experts so that its computation can be replaced."""
    down = getattr(module, "down_proj", None)
    return hasattr(module, "has_post_expert_norm") and isinstance(down, nn.Parameter) and down.ndim == 3


def experts_shape(layer: nn.Module, arch: Architecture, n_dense: int) -> LayerShape:
    """Return the counts of a layer that has experts.

    Raises
    ------
    ModelError
        If it does not say how many experts a token has.
    """
    module = stacked_experts(layer, arch)
    assert module is not None and arch.experts is not None
    n_units = module.down_proj.shape[1 if module.is_transposed else 2]
    block = layer.get_submodule(arch.experts.rpartition(".")[0])
    parts = (*block.modules(), module.config)
    named = (getattr(part, name, None) for part in parts for name in ("top_k", "num_experts_per_tok"))
    top_k = next((count for count in named if isinstance(count, int)), None)
    if top_k is None:
        raise ModelError(f"its experts {arch.experts!r} do not say how many of them a token has")
    return LayerShape(n_dense, len(module.down_proj), top_k, n_units)


class _Slots:
    """Pairs of a token and one of its experts, which are multiplied expert by expert."""

    def __init__(self, experts_TK: Tensor) -> None:
        experts_S = experts_TK.flatten()
        self.top_k = experts_TK.shape[1]
        order_S = experts_S.argsort(stable=True)
        counts = experts_S.bincount().tolist()
        self._experts = [expert for expert, count in enumerate(counts) if count]
        self._rows = torch.split(order_S, [count for count in counts if count])
        self._back = order_S.argsort()

    def project(self, values: Tensor, weight: Tensor, bias: Tensor | None, *, shared: bool = False) -> Tensor:
        """Multiply by each slot's expert: values are those of the slots, or, if shared, of their tokens."""
        parts = []
        for expert, rows in zip(self._experts, self._rows, strict=True):
            chosen = values[rows // self.top_k if shared else rows]
            parts.append(nn.functional.linear(chosen, weight[expert], None if bias is None else bias[expert]))
        return torch.cat(parts)[self._back]


def _weights(module: Any, *, first: bool) -> tuple[Tensor, Tensor | None]:
    """Return the weights (experts, out, in) and biases of the first or of the down projection."""
    name = "down_proj" if not first else "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name)
    return weight.mT if module.is_transposed else weight, getattr(module, f"{name}_bias") if module.has_bias else None


def _neurons(module: Any, first_SW: Tensor, tap: Tap | None, top_k: int) -> Tensor:
    """Return what enters the down projection, with what a measurement changes on the way."""
    if tap is not None and tap.site == "up":
        columns = up_columns(module)
        changed = _changed(tap, first_SW[:, columns], top_k)
        if columns is _ODD:
            first_SW = torch.stack([first_SW[:, ::2], changed], dim=-1).flatten(1)
        else:
            first_SW = torch.cat([first_SW[:, : columns.start], changed], dim=1)
    act_SU: Tensor = module._apply_gate(first_SW) if module.has_gate else module.act_fn(first_SW)
    return _changed(tap, act_SU, top_k) if tap is not None and tap.site == "act" else act_SU


def _changed(tap: Tap, values_SU: Tensor, top_k: int) -> Tensor:
    n_units = values_SU.shape[1]
    return tap.change(values_SU.reshape(-1, top_k * n_units)).view(-1, n_units)


def _traced(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Stand in for experts where only shapes count: a search knows them by their module."""
    return torch.zeros_like(hidden_states)
