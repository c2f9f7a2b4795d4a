"""Certificates of estimates: how many neurons that were only estimated can have a large NEG that the estimate missed.

A random sample of neurons of each layer is swept. A neuron is *missed* if in any of some prompts its measured |NEG| is
above one size while its estimate is below another. The sizes must not depend on the sweeps. From the missed neurons in
the sample follows, with a stated confidence, how many there can be among the others: nothing is assumed about how
estimates go wrong.

Axes: P prompts, K swept neurons, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, hypergeom

from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.measure.votes import check_finite

CONFIDENCE = 0.95


class Sizes(NamedTuple):
    """The sizes of NEGs that a certificate is about, in target per unit of activation."""

    above: float
    """A missed neuron is measured above this."""
    below: float
    """And estimated below this."""


@dataclass(frozen=True)
class Certificate:
    """A bound on the missed neurons among those that were not swept, in one layer or the whole model."""

    layer: int | None
    """None for the whole model."""
    n_swept: int
    n_others: int
    """Neurons that were not swept."""
    n_large: int
    """Swept neurons that are measured above the size in any prompt."""
    n_missed: int
    """Swept neurons that are missed."""
    most_missed: int
    """With the confidence, no more than so many of the others are missed."""
    share: float
    """The same as a share of the others."""
    confidence: float
    bound: str
    """"hypergeometric" (exact) of a layer, "Clopper-Pearson" of the whole model."""


def missed_neurons(measured_PK: ArrayLike, estimated_PK: ArrayLike, sizes: Sizes) -> NDArray[np.bool_]:
    """Tell which neurons are missed in any prompt: bool (K,).

    Parameters
    ----------
    measured_PK, estimated_PK : float arrays of shape (P, K), target per unit of activation
        NEGs of the same neurons in the same prompts.
    sizes : Sizes

    Raises
    ------
    NegError
        If the shapes differ, there is no prompt or neuron, or a NEG is NaN or infinite.
    """
    measured, estimated = np.asarray(measured_PK), np.asarray(estimated_PK)
    if measured.shape != estimated.shape or measured.ndim != 2 or not measured.size:
        raise NegError(f"measured NEGs {measured.shape} and estimates {estimated.shape} do not go together")
    for what, values in (("measured NEG", measured), ("estimate", estimated)):
        check_finite(values, what, ("row", "swept neuron"))
    missed: NDArray[np.bool_] = ((np.abs(measured) > sizes.above) & (np.abs(estimated) < sizes.below)).any(axis=0)
    return missed


def certificates(
    missed_K: ArrayLike,
    large_K: ArrayLike,
    layers_K: ArrayLike,
    *,
    n_layers: int,
    layer_width: int,
    confidence: float = CONFIDENCE,
) -> list[Certificate]:
    """Bound the missed neurons among those that were not swept: one certificate a layer, and one for the whole model.

    Each holds with the confidence by itself: of twenty layers at 95 %, one may be wrong.

    Parameters
    ----------
    missed_K, large_K : bool arrays of shape (K,)
        Which of the swept neurons are missed, and which are measured large.
    layers_K : int array of shape (K,)
        Their layers. Each layer's neurons are a random sample without replacement, as large in every layer.
    n_layers, layer_width : int
    confidence : float
        Between 0 and 1.

    Raises
    ------
    NegError
        If layers have samples of different sizes, all neurons were swept, or the confidence is not between 0 and 1.

    References
    ----------
    Buonaccorsi (1987), "A note on confidence intervals for proportions in finite populations", The American
    Statistician 41: exact bounds by the hypergeometric distribution.
    Clopper, Pearson (1934), "The use of confidence or fiducial limits illustrated in the case of the binomial".
    Hoeffding (1956), "On the distribution of the number of successes in independent trials": with the same mean, trials
    of different chances have a lighter lower tail than trials of one chance, so that the bound for these holds.
    """
    if not 0 < confidence < 1:
        raise NegError(f"confidence {confidence} is none; give a number between 0 and 1")
    missed, large, layers = np.asarray(missed_K, bool), np.asarray(large_K, bool), np.asarray(layers_K)
    n_swept_L = np.bincount(layers, minlength=n_layers)
    if len(set(n_swept_L.tolist())) != 1 or not 1 <= (n_swept := int(n_swept_L[0])) < layer_width:
        raise NegError(
            f"{n_swept_L.min()} to {n_swept_L.max()} swept neurons a layer of {layer_width}: sweep as many in each, at "
            "least 1 and not all"
        )
    n_missed_L, n_large_L = (np.bincount(layers[of_K], minlength=n_layers) for of_K in (missed, large))
    found = [
        _of_layer(layer, int(n_missed), int(n_large), n_swept, layer_width, confidence)
        for layer, (n_missed, n_large) in enumerate(zip(n_missed_L, n_large_L, strict=True))
    ]
    return [*found, _of_model(found, confidence)]


def most_in_population(n_hits: int, n_drawn: int, n_all: int, confidence: float = CONFIDENCE) -> int:
    """Return the largest number of hits in a population that a sample without replacement does not contradict.

    It is the largest K for which a sample has ``n_hits`` or fewer with a chance above 1 - confidence.
    """
    possible_K: Ints = np.arange(n_hits, n_all - n_drawn + n_hits + 1)
    chance_K: Floats = hypergeom.cdf(n_hits, n_all, possible_K, n_drawn)
    return int(possible_K[chance_K > 1 - confidence].max(initial=n_hits))


def largest_share(n_hits: int, n_drawn: int, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided Clopper-Pearson bound on the mean share of hits in layers of one size, sampled alike.

    Samples of different layers have different chances. The bound holds all the same where it leaves room for at least
    one hit more than there were; where it does not, the share is only known to be at most 1.
    """
    high = float(binomtest(n_hits, n_drawn, alternative="less").proportion_ci(confidence, method="exact").high)
    return high if n_hits <= n_drawn * high - 1 else 1.0


def _of_layer(
    layer: int, n_missed: int, n_large: int, n_swept: int, layer_width: int, confidence: float
) -> Certificate:
    n_others, most = layer_width - n_swept, most_in_population(n_missed, n_swept, layer_width, confidence) - n_missed
    share = most / n_others
    return Certificate(layer, n_swept, n_others, n_large, n_missed, most, share, confidence, "hypergeometric")


def _of_model(layers: Sequence[Certificate], confidence: float) -> Certificate:
    n_swept, n_others, n_large, n_missed = (
        sum(getattr(one, name) for one in layers) for name in ("n_swept", "n_others", "n_large", "n_missed")
    )
    n_all = n_swept + n_others
    most = min(n_others, int(largest_share(n_missed, n_swept, confidence) * n_all) - n_missed)
    share = most / n_others
    return Certificate(None, n_swept, n_others, n_large, n_missed, most, share, confidence, "Clopper-Pearson")
