"""Places of neurons among those that a prompt has: in a mixture of experts, those of the experts that it is routed to.

Shapes: K neurons, B rows of a pass, L layers, N neurons a layer (with experts: those of a prompt).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negcore.arrays import Floats, Ints
from negcore.measure.hooks import Readings
from negcore.model.experts import Routing
from negcore.model.language_model import LanguageModel

Experts = Mapping[int, Ints]
"""Numbers of the routed experts of some rows, (B, top_k), by layer of experts."""


def experts_of(routings: Mapping[int, Routing]) -> Experts:
    """Return the experts of routings."""
    return {layer: one.experts_TK.cpu().numpy() for layer, one in routings.items()}


def active_places(lm: LanguageModel, experts: Experts, layers_K: Ints, neurons_K: Ints, n_rows: int = 1) -> Ints:
    """Return where neurons are among the active ones of their layers, -1 for those that a row does not have.

    Parameters
    ----------
    experts : mapping of layer to int array (B, top_k)
        Of the rows' probed tokens.
    layers_K, neurons_K : int array (K,)
    n_rows : int
        B.

    Returns
    -------
    int array (B, K)
        Without experts one row stands for all: the neurons' own numbers.
    """
    if not lm.has_experts:
        return neurons_K[None]
    places_BK = np.empty((n_rows, len(neurons_K)), np.int64)
    none = np.empty((n_rows, 0), np.int64)
    for layer in np.unique(layers_K).tolist():
        at = layers_K == layer
        places_BK[:, at] = lm.layer_shapes[layer].places_of(neurons_K[at], experts.get(layer, none))
    return places_BK


class Chosen(NamedTuple):
    """Some neurons of a model as the rows of a pass have them."""

    layers_K: Ints
    places_BK: Ints
    """See `active_places`."""
    has_experts: bool

    @classmethod
    def of(cls, lm: LanguageModel, experts: Experts, neurons_K2: Ints, n_rows: int) -> Self:
        """Find neurons, given by layer and number, in the rows of a pass."""
        layers_K, neurons_K = neurons_K2.T
        return cls(layers_K, active_places(lm, experts, layers_K, neurons_K, n_rows), lm.has_experts)

    @property
    def there_BK(self) -> NDArray[np.bool_]:
        """True where a row has the neuron."""
        there_BK: NDArray[np.bool_] = self.places_BK >= 0
        return there_BK

    def values(self, values_BLN: Tensor) -> Tensor:
        """Return their values, zero where a row does not have them: shape (B, K)."""
        if not self.has_experts:
            return values_BLN[:, self.layers_K, self.places_BK[0]]
        places_BK = torch.from_numpy(self.places_BK).to(values_BLN.device)
        rows_B1 = torch.arange(len(values_BLN), device=values_BLN.device)[:, None]
        values_BK = values_BLN[rows_B1, torch.from_numpy(self.layers_K).to(rows_B1.device), places_BK.clamp(min=0)]
        return values_BK.masked_fill(places_BK < 0, 0)

    def masked(self, values_BK: Floats) -> Floats:
        """Return values of them, masked where a row of a mixture of experts does not have them."""
        return np.ma.masked_array(values_BK, ~self.there_BK) if self.has_experts else values_BK


def empty_values(
    lm: LanguageModel, n_prompts: int, n_chosen: int, dtype: type[np.floating[Any]] | None = None
) -> Floats:
    """Return an array (P, K) to fill with values of neurons; of a mixture of experts, a masked one."""
    make: Any = np.ma.masked_all if lm.has_experts else np.empty
    values_PK: Floats = make((n_prompts, n_chosen), dtype or lm.result_type)
    return values_PK


def held_routings(lm: LanguageModel, unshifted: Readings, n_rows: int) -> Mapping[int, Routing] | None:
    """Return the routing to go by in a pass of copies of a prompt; None where each goes by its own router.

    Parameters
    ----------
    unshifted : Readings
        Of a pass of the prompt alone, without a shift.
    n_rows : int
        Copies of the prompt.
    """
    if not lm.has_experts or lm.router == "through":
        return None
    return {
        layer: Routing(*(one.repeat(n_rows, 1) for one in routing)) for layer, routing in unshifted.routings.items()
    }
