"""Random neurons beside those of a ranking: what the best ones have to be better than.

Shapes: M neurons of the model (flat index, layer-major), K neurons.
"""

from __future__ import annotations

import numpy as np

from negcore.arrays import Ints
from negcore.model.layer_shapes import LayerShapes, neuron_groups


def random_neurons(n_all: int, n_kept: int, *, seed: int) -> Ints:
    """Draw neurons of a model whose prompts all have the same ones: flat indices, shape (K,)."""
    return np.random.default_rng(seed).choice(n_all, size=n_kept, replace=False).astype(np.int64)


def random_of_experts(best_K: Ints, shapes: LayerShapes, *, seed: int) -> Ints:
    """Draw as many neurons of each expert as are among the best, each at the place of one of them: shape (K,).

    Every prompt then has as many of the random neurons as of the best, and of the first of them as of the first best.
    Neurons that every prompt has are drawn from their own layer.
    """
    groups_M = neuron_groups(shapes)
    drawn_K = np.empty_like(best_K)
    drawn_K[np.argsort(groups_M[best_K], kind="stable")] = matched_neurons(
        best_K, groups_M, np.random.default_rng(seed)
    )
    return drawn_K


def matched_neurons(top_K: Ints, groups_M: Ints, random: np.random.Generator) -> Ints:
    """Draw as many neurons of each group (its layer, say) as are in the top, and others before those of the top.

    They come by rising group.
    """
    drawn = []
    for group, count in zip(*np.unique(groups_M[top_K], return_counts=True), strict=True):
        shuffled_N = random.permutation(np.flatnonzero(groups_M == group))
        others_first = np.argsort(np.isin(shuffled_N, top_K), kind="stable")
        drawn.append(shuffled_N[others_first[:count]])
    return np.concatenate(drawn)
