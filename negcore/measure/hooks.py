"""Read and shift a model's neurons at the probed token, inside a `with` and nowhere else.

One mechanism serves every measurement: a shift is added to the site at the probed token. A shift of zero that
carries a graph gives gradients (NeurGrad), a finite one is an intervention (sweeps, ablation), and without a shift
the neurons are only read.

Shapes: B rows of the batch, T tokens of all rows, N neurons a layer (with experts: the active ones), K experts of a
token.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from negcore.model.experts import Routing, Tap, tapped_experts
from negcore.model.language_model import LanguageModel


@dataclass(frozen=True)
class Readings:
    """The neurons at the probed tokens of a pass; indexed by layer."""

    routings: dict[int, Routing] = field(default_factory=dict)
    """Routing of all tokens of the pass, by layer of experts."""
    _parts: dict[tuple[int, bool], Tensor] = field(default_factory=dict)
    _probed: dict[int, Routing] = field(default_factory=dict)

    def __getitem__(self, layer: int) -> Tensor:
        """Return a layer's activations *before* the shift, detached: shape (B, N)."""
        parts = [self._parts[part] for part in ((layer, True), (layer, False)) if part in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len({layer for layer, _ in self._parts})

    @property
    def probed(self) -> Mapping[int, Routing]:
        """Routing of the probed tokens, (B, K), by layer of experts; without a graph."""
        return self._probed


@contextmanager
def tapped(
    lm: LanguageModel,
    positions_B: Tensor,
    shifts: Mapping[int, Tensor] | None = None,
    *,
    rows_B: Tensor | None = None,
    routings: Mapping[int, Routing] | None = None,
    shifted: Mapping[int, Routing] | None = None,
) -> Iterator[Readings]:
    """Tap the site of every layer at some tokens; no hook remains on leaving, even after an exception.

    Parameters
    ----------
    lm : LanguageModel
    positions_B : int Tensor of shape (B,)
        Index of the probed token among the tokens that the forward pass will be given.
    shifts : mapping of layer to Tensor of shape (B, N), in units of activation, optional
        Added to the site at the probed token. In a layer of experts they are of the token's active neurons, in the
        order of their numbers.
    rows_B : int Tensor of shape (B,), optional
        Rising row of each probed token in the batch, up to the last row; by default every row has one.
    routings : mapping of layer to Routing, optional
        Of all tokens of the pass, to go by in place of the router's.
    shifted : mapping of layer to Routing, optional
        Of the probed tokens: the experts whose neurons the shifts are of; by default those that the pass routes to.
        Where it routes a token away from one of them, that one's neurons do not run, and their shifts do nothing.

    Yields
    ------
    Readings
        Filled by the forward pass.
    """
    readings = Readings()
    shifts = shifts or {}
    rows = torch.arange(len(positions_B), device=lm.device) if rows_B is None else rows_B
    n_rows = len(positions_B) if rows_B is None else int(rows_B[-1]) + 1

    def tap(layer: int, columns: slice, values: Tensor) -> Tensor:
        # Some layers (OPT) fold batch and tokens into one axis.
        values_BTN = values.view(n_rows, -1, values.shape[-1])
        first = values.shape[-1] - (columns.stop - columns.start)  # a fused projection holds the gate first, then `up`
        has_others = values_BTN.shape[1] > 1
        probed = rows.to(values.device), positions_B.to(values.device)  # a layer may be on another device
        probed_BN = values_BTN[probed] if has_others else values_BTN[:, 0]
        readings._parts[layer, columns.start == 0] = probed_BN[:, first:].detach().to(lm.device)
        if layer not in shifts:
            return values
        shift = shifts[layer][:, columns].to(values)
        if shifted is not None and columns.start == 0 and layer in shifted:
            shift = _realigned(shift, shifted[layer].experts_TK, readings.probed[layer].experts_TK)
        shift = nn.functional.pad(shift, (first, 0)) if first else shift
        if not has_others:  # the same sum, for which a GPU needs one step instead of twenty
            return values + shift.view_as(values)
        return values_BTN.index_put(probed, shift, accumulate=True).view_as(values)

    def route(layer: int, routing: Routing) -> Routing:
        chosen = routing if routings is None else routings[layer]
        readings.routings[layer] = Routing(*(one.detach() for one in chosen))
        by_row = (
            one.view(n_rows, -1, one.shape[-1])[rows.to(one.device), positions_B.to(one.device)]
            for one in readings.routings[layer]
        )
        readings._probed[layer] = Routing(*by_row)
        return chosen

    with ExitStack() as hooks:
        for layer in range(lm.n_layers):
            shape = lm.layer_shapes[layer]
            if shape.n_dense:
                change = partial(tap, layer, slice(shape.n_routed, shape.n_active))
                hooks.callback(hook_site(lm, layer, change).remove)
        hooks.enter_context(_at_experts(lm, route, tap))
        yield readings


def _realigned(shift_BN: Tensor, from_BK: Tensor, to_BK: Tensor) -> Tensor:
    """Return shifts of the neurons of some experts as those of others: of experts in both, and zero of the rest."""
    same_BKK = to_BK[:, :, None] == from_BK[:, None].to(to_BK.device)
    shift_BKU = shift_BN.view(len(shift_BN), from_BK.shape[1], -1)
    slots_BKU = same_BKK.int().argmax(-1)[..., None].expand_as(shift_BKU)
    return shift_BKU.gather(1, slots_BKU).masked_fill(~same_BKK.any(-1, keepdim=True), 0).view_as(shift_BN)


def _at_experts(
    lm: LanguageModel, route: Callable[[int, Routing], Routing], change: Callable[[int, slice, Tensor], Tensor]
) -> AbstractContextManager[None]:
    """Tap the experts of every layer that has some."""
    if not lm.has_experts:
        return nullcontext()
    taps = {}
    for layer, shape in enumerate(lm.layer_shapes):
        if (module := lm.experts(layer)) is not None:
            taps[module] = Tap(lm.site, partial(route, layer), partial(change, layer, slice(0, shape.n_routed)))
    return tapped_experts(taps)


def hook_site(lm: LanguageModel, layer: int, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Replace the values of a layer's site, of its dense neurons, by what `change` makes of them, until removed."""
    module = lm.site_module(layer)
    assert module is not None, layer
    if lm.site == "act":
        return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    return module.register_forward_hook(lambda _, args, output: change(output))


def zero_shifts(lm: LanguageModel, n_rows: int) -> dict[int, Tensor]:
    """Return shifts of zero for every layer, (B, N) each, to take gradients by."""
    return {
        layer: torch.zeros(n_rows, shape.n_active, dtype=lm.model.dtype, device=lm.device, requires_grad=True)
        for layer, shape in enumerate(lm.layer_shapes)
    }
