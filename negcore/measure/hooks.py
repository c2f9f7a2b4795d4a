"""Read and shift a model's neurons at the probed token, inside a `with` and nowhere else.

One mechanism serves every measurement: a shift is added to the site at the probed token. A shift of zero that
carries a graph gives gradients (NeurGrad), a finite one an intervention (sweeps, ablation), none at all a reading.

Shapes: B rows of the batch, T tokens, N neurons a layer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from negcore.model.language_model import LanguageModel

Shift = Callable[[Tensor], Tensor]


@contextmanager
def tapped(
    lm: LanguageModel, positions_B: Tensor, shifts: Mapping[int, Tensor] | None = None
) -> Iterator[dict[int, Tensor]]:
    """Tap the site of every layer at one token a row; on leaving, even by an exception, no hook remains.

    Parameters
    ----------
    lm : LanguageModel
    positions_B : int Tensor of shape (B,)
        The probed token's index in the tokens that the forward pass will be given.
    shifts : mapping of layer to Tensor of shape (B, N), in units of activation, optional
        Added to the site at the probed token.

    Yields
    ------
    dict of layer to Tensor of shape (B, N)
        Filled by the forward pass with the activations *before* the shift, detached.
    """
    activations: dict[int, Tensor] = {}
    shifts = shifts or {}
    with ExitStack() as hooks:
        for layer in range(lm.n_layers):
            tap = _Tap(lm, layer, positions_B, shifts.get(layer), activations)
            handle = tap.attach()
            hooks.callback(handle.remove)
        yield activations


class _Tap:
    """The hook of one layer."""

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        positions_B: Tensor,
        shift_BN: Tensor | None,
        activations: dict[int, Tensor],
    ) -> None:
        self.lm, self.layer, self.positions_B = lm, layer, positions_B
        self.shift_BN, self.activations = shift_BN, activations

    def attach(self) -> Any:
        module = self.lm.site_module(self.layer)
        if self.lm.site == "act":
            return module.register_forward_pre_hook(self._before)
        return module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._tap(args[0]), *args[1:])

    def _after(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._tap(output)

    def _tap(self, values: Tensor) -> Tensor:
        rows = torch.arange(len(self.positions_B), device=values.device)
        # Some layers (OPT) fold batch and tokens into one axis.
        values_BTN = values.view(len(rows), -1, values.shape[-1])
        first = values.shape[-1] - self.lm.n_neurons  # a fused projection holds the gate first, then `up`
        self.activations[self.layer] = values_BTN[rows, self.positions_B, first:].detach()
        if self.shift_BN is None:
            return values
        shift = nn.functional.pad(self.shift_BN.to(values.dtype), (first, 0))
        return values_BTN.index_put((rows, self.positions_B), shift, accumulate=True).view_as(values)
