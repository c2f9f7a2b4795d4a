"""Spread of neurons over prompts, so that shifts can be multiples of it.

Shapes: P prompts, K chosen neurons.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.measure.question import read_activations
from negcore.model.language_model import LanguageModel
from negcore.model.precision import in_float32


def activation_spreads(lm: LanguageModel, ids: Sequence[list[int]], neurons_K2: Ints) -> Floats:
    """Return the standard deviation of neurons' activations at the probed tokens of prompts: shape (K,), float64.

    It is that of these very prompts (the mean square is over P), and exactly zero where all activations are equal. Of a
    mixture of experts, it is that of the prompts that have the neuron, and zero if none does.

    Parameters
    ----------
    ids : token ids of every prompt, at least two

    Raises
    ------
    NegError
        If there is one prompt.
    """
    if len(ids) < 2:
        raise NegError("one prompt has no spread of activations; give two or more, or shifts in units of activation")
    with in_float32(lm):
        activations_PK = read_activations(lm, ids, neurons_K2)
    ptp: Any = np.ma.ptp if np.ma.isMaskedArray(activations_PK) else np.ptp
    varies_K = np.ma.filled(ptp(activations_PK, axis=0) > 0, False)  # exact, while a mean of equal numbers is rounded
    return np.where(varies_K, np.ma.filled(activations_PK.std(axis=0), 0.0), 0.0)


def checked_spreads(spreads: ArrayLike, n_neurons: int) -> Floats:
    """Return spreads as an array of shape (K,), float64.

    Raises
    ------
    NegError
        If they are not one for each neuron, or one is negative or not finite.
    """
    spreads_K = np.asarray(spreads, np.float64)
    if spreads_K.shape != (n_neurons,):
        raise NegError(f"spreads of shape {spreads_K.shape} do not fit {n_neurons} neurons; give one for each")
    for spread in spreads_K[~(np.isfinite(spreads_K) & (spreads_K >= 0))]:
        raise NegError(f"spread {spread} is none; give finite numbers from 0, such as `activation_spreads` returns")
    return spreads_K
