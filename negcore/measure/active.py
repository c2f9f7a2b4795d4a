"""Places of neurons among those that a prompt has: in a mixture of experts, those of the experts that it is routed to.

Shapes: K neurons, T tokens of a pass, R rows.
"""

from collections.abc import Mapping

import numpy as np

from negcore.arrays import Ints
from negcore.measure.hooks import Readings
from negcore.model.experts import Routing
from negcore.model.language_model import LanguageModel


def active_places(lm: LanguageModel, probed: Mapping[int, Routing], layers_K: Ints, neurons_K: Ints) -> Ints:
    """Return where neurons are among the active ones of their layers, -1 for those that a prompt does not have.

    Parameters
    ----------
    probed : mapping of layer to Routing
        Of the prompt's probed token, which is the first row.
    layers_K, neurons_K : int array (K,)

    Returns
    -------
    int array (K,)
        Without experts, the neurons' own numbers.
    """
    if not lm.has_experts:
        return neurons_K
    places_K = np.empty(len(neurons_K), np.int64)
    for layer in np.unique(layers_K).tolist():
        at = layers_K == layer
        experts_1K = probed[layer].experts_TK[:1].cpu().numpy() if layer in probed else np.empty((1, 0), np.int64)
        places_K[at] = lm.layer_shapes[layer].places_of(neurons_K[at], experts_1K)[0]
    return places_K


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
