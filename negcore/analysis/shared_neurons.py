"""Skill neurons shared by datasets, and the layers they lie in.

Plain functions of rankings. The rows they return hold counts of neurons, beside the counts that chance would give.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053), properties of skill neurons.

Axes: D datasets, M neurons of the model (flat index, layer-major).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hypergeom

from negcore.arrays import Ints
from negcore.measure.votes import Ranking


@dataclass(frozen=True)
class OverlapRow:
    """Skill neurons that two datasets share."""

    probe: str
    top: int
    """Neurons that each dataset contributes: the best of its ranking."""
    dataset_a: str
    dataset_b: str
    genre_a: str
    genre_b: str
    n_shared: int
    jaccard: float
    """Number of shared neurons over the number in either set: 1 for equal sets."""
    chance: float
    """Expected Jaccard index of two independent random sets of this size."""
    chance_high: float
    """97.5 % quantile of that index: two random sets share more in at most one of forty cases."""


@dataclass(frozen=True)
class GenreOverlapRow:
    """Mean overlap over the pairs of different datasets, one of each genre."""

    probe: str
    top: int
    genre_a: str
    genre_b: str
    n_pairs: int
    jaccard: float
    chance: float


@dataclass(frozen=True)
class LayerShareRow:
    """Share of a dataset's skill neurons that lies in one layer."""

    probe: str
    top: int
    layer: int
    share: float
    """Number of top neurons in this layer over the number of all; adds up to 1 over the layers."""
    uniform: float
    """Share of every layer if the neurons were spread evenly: 1/L, or its share of the model's neurons."""


@dataclass(frozen=True)
class CommonNeuronRow:
    """A neuron that is among the top of every dataset."""

    probe: str
    top: int
    layer: int
    neuron: int
    worst_rank: int
    """Its worst rank over the datasets; 0 is the best."""
    n_same_polarity: int
    """Number of datasets in which it has its most frequent polarity."""
    name: str = ""
    """``layer.neuron``, or ``layer.expert.unit`` of a mixture of experts."""


def rank_with_random_ties(scores_by_dataset: Mapping[str, Ints], *, seed: int) -> dict[str, Ranking]:
    """Rank the neurons of every dataset; neurons with equal scores come in an order drawn for each dataset.

    `Ranking.from_scores` puts the lower flat index first, and so the earlier layer, in every dataset. Scores are whole
    numbers, and often hundreds of neurons have the score at which the top ends. Their fixed order would look like a
    preference for early layers, and like neurons shared by datasets. A draw depends only on the seed and the dataset's
    name.
    """
    return {
        dataset: _drawn(scores_M, np.random.default_rng([seed, *dataset.encode()]))
        for dataset, scores_M in scores_by_dataset.items()
    }


def _drawn(scores_M: Ints, rng: np.random.Generator) -> Ranking:
    shuffled_M = rng.permutation(len(scores_M))
    ranking = Ranking.from_scores(scores_M[shuffled_M])
    return Ranking(shuffled_M[ranking.order_K], ranking.polarity_K)


class JaccardChance(NamedTuple):
    """Jaccard index of two independent random sets of neurons."""

    mean: float
    high: float
    """Its 97.5 % quantile."""


def jaccard_chance(top: int, n_all: int) -> JaccardChance:
    """Return the exact index of sets of ``top`` of ``n_all`` neurons: the number they share is hypergeometric."""
    shared = np.arange(top + 1)
    mean = hypergeom.pmf(shared, n_all, top, top) @ _jaccard(shared, top)
    return JaccardChance(float(mean), float(_jaccard(hypergeom.ppf(0.975, n_all, top, top), top)))


def _jaccard(n_shared: ArrayLike, top: int) -> NDArray[np.float64]:
    """Return the index of two sets of ``top`` neurons, from the number they share."""
    shared = np.asarray(n_shared)
    return np.asarray(shared / (2 * top - shared))


def overlaps(
    probe: str, rankings: Mapping[str, Ranking], genres: Mapping[str, str], tops: Sequence[int]
) -> list[OverlapRow]:
    """Count the top neurons that each two datasets share, for each size of the top (at most all neurons).

    Parameters
    ----------
    rankings : mapping of dataset to Ranking
        Rankings of all neurons; see `rank_with_random_ties`.
    genres : mapping of dataset to str
    """
    rows = []
    for top, orders in _tops(rankings, tops):
        chance = jaccard_chance(top, _n_all(rankings))
        for a, b in combinations(orders, 2):
            n_shared = len(np.intersect1d(orders[a], orders[b], assume_unique=True))
            found = float(_jaccard(n_shared, top))
            rows.append(OverlapRow(probe, top, a, b, genres[a], genres[b], n_shared, found, *chance))
    return rows


def genre_overlaps(rows: Sequence[OverlapRow]) -> list[GenreOverlapRow]:
    """Average the overlaps of each two genres (in alphabetical order), and of the datasets within one genre."""
    pairs: dict[tuple[str, int, str, str], list[OverlapRow]] = defaultdict(list)
    for row in rows:
        first, second = sorted((row.genre_a, row.genre_b))
        pairs[row.probe, row.top, first, second].append(row)
    return [
        GenreOverlapRow(
            *key,
            len(found),
            float(np.mean([row.jaccard for row in found])),
            float(np.mean([row.chance for row in found])),
        )
        for key, found in pairs.items()
    ]


def layer_shares(probe: str, ranking: Ranking, tops: Sequence[int], widths_L: Sequence[int]) -> list[LayerShareRow]:
    """Return the share of a dataset's top neurons in every layer, for each size of the top (at most all neurons).

    Parameters
    ----------
    widths_L : sequence of int
        Neurons of each layer. Flat indices count as many in each as the widest has.
    """
    return [
        LayerShareRow(probe, top, layer, float(n / top), widths_L[layer] / sum(widths_L))
        for top, orders in _tops({"": ranking}, tops)
        for layer, n in enumerate(np.bincount(orders[""] // max(widths_L), minlength=len(widths_L)))
    ]


def common_neurons(
    probe: str, rankings: Mapping[str, Ranking], tops: Sequence[int], *, layer_width: int
) -> list[CommonNeuronRow]:
    """Find the neurons that are among the top of every dataset, for each size of the top: best worst rank first.

    Parameters
    ----------
    rankings : mapping of dataset to Ranking
        Rankings of all neurons; see `rank_with_random_ties`.
    layer_width : int
        Neurons of a layer.
    """
    n_flat = 1 + max(int(ranking.order_K.max()) for ranking in rankings.values())
    rank_DM, polarity_DM = np.full((len(rankings), n_flat), n_flat), np.zeros((len(rankings), n_flat), np.int8)
    for rank_M, polarity_M, ranking in zip(rank_DM, polarity_DM, rankings.values(), strict=True):
        rank_M[ranking.order_K], polarity_M[ranking.order_K] = np.arange(len(ranking.order_K)), ranking.polarity_K
    worst_M = rank_DM.max(axis=0)
    n_same_M = np.maximum((polarity_DM > 0).sum(axis=0), (polarity_DM < 0).sum(axis=0))
    by_worst_M = np.argsort(worst_M, kind="stable")
    return [
        CommonNeuronRow(probe, top, int(m // layer_width), int(m % layer_width), int(worst_M[m]), int(n_same_M[m]))
        for top, _ in _tops(rankings, tops)
        for m in by_worst_M[worst_M[by_worst_M] < top]
    ]


def _tops(rankings: Mapping[str, Ranking], tops: Sequence[int]) -> Iterator[tuple[int, dict[str, Ints]]]:
    """Yield each size (at most that of the model) and the best neurons of every ranking."""
    for top in dict.fromkeys(min(top, _n_all(rankings)) for top in tops):
        yield top, {dataset: ranking.top(top).order_K for dataset, ranking in rankings.items()}


def _n_all(rankings: Mapping[str, Ranking]) -> int:
    return len(next(iter(rankings.values())).order_K)
