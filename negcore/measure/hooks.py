"""Read and shift a model's neurons at the probed token, inside a `with` and nowhere else.

One mechanism serves every measurement: a shift is added to the site at the probed token. A shift of zero that
carries a graph gives gradients (NeurGrad), a finite one is an intervention (sweeps, ablation), and without a shift
the neurons are only read.

Shapes: B rows of the batch, T tokens, N neurons a layer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from negcore.model.language_model import LanguageModel


@contextmanager
def tapped(
    lm: LanguageModel,
    positions_B: Tensor,
    shifts: Mapping[int, Tensor] | None = None,
    *,
    rows_B: Tensor | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Tap the site of every layer at some tokens; no hook remains on leaving, even after an exception.

    Parameters
    ----------
    lm : LanguageModel
    positions_B : int Tensor of shape (B,)
        Index of the probed token among the tokens that the forward pass will be given.
    shifts : mapping of layer to Tensor of shape (B, N), in units of activation, optional
        Added to the site at the probed token.
    rows_B : int Tensor of shape (B,), optional
        Rising row of each probed token in the batch, up to the last row; by default every row has one.

    Yields
    ------
    dict of layer to Tensor of shape (B, N)
        Filled by the forward pass with the activations *before* the shift, detached.
    """
    activations: dict[int, Tensor] = {}
    shifts = shifts or {}
    rows = torch.arange(len(positions_B), device=lm.device) if rows_B is None else rows_B
    n_rows = len(positions_B) if rows_B is None else int(rows_B[-1]) + 1

    def tap(layer: int, values: Tensor) -> Tensor:
        # Some layers (OPT) fold batch and tokens into one axis.
        values_BTN = values.view(n_rows, -1, values.shape[-1])
        first = values.shape[-1] - lm.layer_width  # a fused projection holds the gate first, then `up`
        has_others = values_BTN.shape[1] > 1
        probed_BN = values_BTN[rows, positions_B] if has_others else values_BTN[:, 0]
        activations[layer] = probed_BN[:, first:].detach()
        if layer not in shifts:
            return values
        shift = shifts[layer].to(values.dtype)
        shift = nn.functional.pad(shift, (first, 0)) if first else shift
        if not has_others:  # the same sum, for which a GPU needs one step instead of twenty
            return values + shift.view_as(values)
        return values_BTN.index_put((rows, positions_B), shift, accumulate=True).view_as(values)

    with ExitStack() as hooks:
        for layer in range(lm.n_layers):
            hooks.callback(hook_site(lm, layer, partial(tap, layer)).remove)
        yield activations


def hook_site(lm: LanguageModel, layer: int, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Replace the values of a layer's site by what `change` makes of them, until the handle is removed."""
    module = lm.site_module(layer)
    if lm.site == "act":
        return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    return module.register_forward_hook(lambda _, args, output: change(output))


def zero_shifts(lm: LanguageModel, n_rows: int) -> dict[int, Tensor]:
    """Return shifts of zero for every layer, (B, N) each, to take gradients by."""
    return {
        layer: torch.zeros(n_rows, lm.layer_width, dtype=lm.model.dtype, device=lm.device, requires_grad=True)
        for layer in range(lm.n_layers)
    }
