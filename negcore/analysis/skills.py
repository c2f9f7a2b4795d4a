"""What skill neurons are like: how few are enough, whether they carry over, how far down the ranking they reach, whom
they need, and which of them several datasets share.

Plain functions of neuron scores and NEG splits. The rows they return hold test accuracies with their 95 % interval
(Wilson), or counts of neurons with what chance would give. Of a split only the columns of chosen neurons are read.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053), properties of skill neurons.

Axes: M neurons of the model (flat index, layer-major), K neurons in rank order (best first; ranks count from 0),
P prompts, L layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hypergeom

from negcore.measure.votes import Ints, Ranking, Vote
from negcore.probing.evaluation import Accuracy, accuracy
from negcore.probing.fitted import FittedProbe, FittedVote, Forest, fit_vote, forest_features, random_vote
from negcore.probing.probes import MAX_NEURONS, TreeProbe
from negcore.store.reader import NegSplit

Order = Literal["best", "random"]

TREES = (1, 4, 16, 64, 256)
DEPTHS = (1, 2, 4, 8, None)
"""The grid of forests; `None`: trees of any depth."""


@dataclass(frozen=True)
class NeuronCountRow:
    """Efficiency in neurons: test accuracy of the best, or of as many random neurons."""

    probe: str
    order: Order
    """"best": the top of the ranking. "random": drawn from all neurons, each draw holding the smaller ones."""
    n_neurons: int
    accuracy: float
    low: float
    """Lower end of the 95 % interval (Wilson)."""
    high: float


@dataclass(frozen=True)
class TrainingRowsRow:
    """Efficiency in prompts: test accuracy of a probe fitted on the first training rows alone."""

    probe: str
    n_train: int
    n_neurons: int
    """Chosen on validation, for this number of training rows."""
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class TransferRow:
    """Robustness: a probe fitted under one condition (wording, shots, demonstrations), tested under another."""

    probe: str
    trained_on: str
    tested_on: str
    """Another condition, or the same one."""
    n_neurons: int
    """Chosen on validation prompts of the condition it was trained on."""
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class BandRow:
    """Flexibility: test accuracy of the neurons of one band of the ranking, without those above it."""

    probe: str
    first_rank: int
    """Rank of the band's best neuron; 0 is the best of all."""
    end_rank: int
    """Rank behind its last."""
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class ForestRow:
    """Interdependency: test accuracy of a forest, by its trees and how many neurons each may ask one after another."""

    n_trees: int
    depth: int | None
    """Most questions from a tree's root to a leaf; `None`: no limit."""
    n_neurons: int
    """Neurons that its trees choose from."""
    accuracy: float
    low: float
    high: float


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
    """Shared neurons over those of either: 1 for the same set."""
    chance: float
    """Expected Jaccard index of two independent random sets of this size."""
    chance_high: float
    """97.5 % quantile of it: two random sets share more in at most one of forty cases."""


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
    """Where a dataset's skill neurons lie."""

    probe: str
    top: int
    layer: int
    share: float
    """Part of the top neurons that lies in this layer; adds up to 1 over the layers."""
    uniform: float
    """What every layer would have if they were spread evenly: 1/L."""


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
    """Datasets in which it has the polarity that it has in most of them."""


# Efficiency


def accuracy_by_neurons(
    vote: Vote, scores_M: Ints, test: NegSplit, *, max_neurons: int = MAX_NEURONS, seed: int
) -> list[NeuronCountRow]:
    """Test accuracy of the best 1, 2, 4, ... neurons and of as many random ones (one draw), each with its own polarity.

    Ends with all neurons of the model, where they are no more than ``max_neurons``.

    Raises
    ------
    NegError
        As `FittedVote.predict`; also if ``max_neurons`` is below 1.
    """
    best = FittedVote(vote, Ranking.from_scores(scores_M).top(max_neurons), test.n_options, len(scores_M))
    voters: dict[Order, FittedVote] = {"best": best, "random": random_vote(best, scores_M, seed=seed)}
    return [
        NeuronCountRow(vote.name, order, k, *_measured(result))
        for order, voter in voters.items()
        for k, result in _accuracy_by_k(voter, test).items()
    ]


def _accuracy_by_k(voter: FittedVote, test: NegSplit) -> dict[int, Accuracy]:
    """At every power of two, and at all neurons of the model where the voter has them."""
    curve = voter.accuracy_by_k(test)
    if voter.n_neurons == voter.n_all and voter.n_all not in curve:
        curve[voter.n_all] = accuracy(test.gold_P, voter.predict(test))
    return curve


def training_sizes(n_rows: int) -> list[int]:
    """Numbers of training rows that are tried: 16, 32, 64, ... and all."""
    return [*(2**power for power in range(4, (n_rows - 1).bit_length())), n_rows]


def accuracy_by_rows(
    vote: Vote, scores_by_size: Mapping[int, Ints], valid: NegSplit, test: NegSplit, *, max_neurons: int
) -> list[TrainingRowsRow]:
    """Test accuracy of probes fitted on the first rows, for each number of rows.

    Parameters
    ----------
    scores_by_size : mapping of int to array of int, shape (M,)
        Scores over the first rows, by their number; see `negcore.probing.rankings.training_scores`.
    valid : NegSplit
        Chooses the number of neurons, always with all its rows.

    Raises
    ------
    NegError
        As `fit_vote` and `FittedVote.predict`.
    """
    rows = []
    for n_train, scores_M in scores_by_size.items():
        voter = fit_vote(vote, scores_M, valid, max_neurons=max_neurons)
        result = accuracy(test.gold_P, voter.predict(test))
        rows.append(TrainingRowsRow(vote.name, n_train, voter.n_neurons, *_measured(result)))
    return rows


# Robustness and flexibility


def transfer(probe: str, fitted: Mapping[str, FittedProbe], tests: Mapping[str, NegSplit]) -> list[TransferRow]:
    """Test accuracy of the probe of every condition under every condition, its own included.

    Parameters
    ----------
    fitted : mapping of condition to FittedProbe
        Fitted on the train and valid split of that condition.
    tests : mapping of condition to NegSplit
        The test prompts under each condition; the options must be the same ones, in the same order.

    Raises
    ------
    NegError
        As `FittedProbe.predict`.
    """
    return [
        TransferRow(probe, trained_on, tested_on, one.n_neurons, *_measured(accuracy(test.gold_P, one.predict(test))))
        for trained_on, one in fitted.items()
        for tested_on, test in tests.items()
    ]


def band_starts(n_all: int, width: int) -> list[int]:
    """First ranks of disjoint bands of equal width: 0, W, 2W, 4W, ... and the last W of the ranking.

    Where fewer than two fit, there is the first alone.
    """
    last = n_all - width
    starts, start = [0], width
    while start + width <= last:
        starts.append(start)
        start *= 2
    return [*starts, last] if last >= width else starts


def bands(vote: Vote, scores_M: Ints, test: NegSplit, *, width: int = 64) -> list[BandRow]:
    """Test accuracy of bands of the ranking that have no neuron in common, each alone.

    The first band is the probe with ``width`` neurons. Neurons of score 0, at the end of a ranking, favour no option.

    Raises
    ------
    NegError
        As `FittedVote.predict`; also if ``width`` is below 1.
    """
    ranking = Ranking.from_scores(scores_M)
    width = len(ranking.top(width).order_K)
    rows = []
    for first in band_starts(len(scores_M), width):
        end = first + width
        band = Ranking(ranking.order_K[first:end], ranking.polarity_K[first:end])
        voter = FittedVote(vote, band, test.n_options, len(scores_M))
        rows.append(BandRow(vote.name, first, end, *_measured(accuracy(test.gold_P, voter.predict(test)))))
    return rows


# Interdependency


def forest_grid(
    train: NegSplit,
    test: NegSplit,
    order_K: Ints,
    *,
    seed: int,
    trees: Sequence[int] = TREES,
    depths: Sequence[int | None] = DEPTHS,
) -> list[ForestRow]:
    """Test accuracy of forests by their trees and depth, all on the same neurons.

    A neuron that only tells something together with others is of use to a deep tree, and to no vote. One forest of
    the most trees is grown a depth: its first trees are the smaller forests of the same seed, tree by tree.

    Parameters
    ----------
    order_K : array of int64, shape (K,)
        Flat indices of the neurons.
    trees : sequence of int
        Rising numbers of trees.
    depths : sequence of int or None
    """
    train_PF, test_PF = forest_features(train, order_K), forest_features(test, order_K)
    gold_P = train.gold_P.astype(np.int64)
    rows = []
    for depth in depths:
        probe = TreeProbe(n_trees=trees[-1], max_depth=depth, random_state=seed).fit(train_PF, gold_P)
        predicted_PJ = Forest.of(probe.forest_).predict_by_trees(test_PF, trees)
        for n_trees, predicted_P in zip(trees, predicted_PJ.T, strict=True):
            result = accuracy(test.gold_P, predicted_P)
            rows.append(ForestRow(n_trees, depth, len(order_K), *_measured(result)))
    return rows


# Shared neurons


def rank_by_lot(scores_by_dataset: Mapping[str, Ints], *, seed: int) -> dict[str, Ranking]:
    """Rankings in which equal neurons come in an order drawn for each dataset.

    `Ranking.from_scores` puts the lower flat index first, hence the earlier layer, in every dataset. Scores are whole
    numbers and often hundreds of neurons are equal where the top ends: their order would then look like a preference
    for early layers, and like neurons shared by datasets. What a draw gives depends on the seed and the dataset's
    name alone.
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
    """Exact, for sets of ``top`` of ``n_all`` neurons: the number they share is hypergeometric."""
    shared = np.arange(top + 1)
    mean = hypergeom.pmf(shared, n_all, top, top) @ _jaccard(shared, top)
    return JaccardChance(float(mean), float(_jaccard(hypergeom.ppf(0.975, n_all, top, top), top)))


def _jaccard(n_shared: ArrayLike, top: int) -> NDArray[np.float64]:
    """Of two sets of ``top`` neurons, by how many they share."""
    shared = np.asarray(n_shared)
    return np.asarray(shared / (2 * top - shared))


def overlaps(
    probe: str, rankings: Mapping[str, Ranking], genres: Mapping[str, str], tops: Sequence[int]
) -> list[OverlapRow]:
    """Top neurons that each two datasets share, for each size of the top (at most all neurons).

    Parameters
    ----------
    rankings : mapping of dataset to Ranking
        Of all neurons; see `rank_by_lot`.
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
    """Means over the pairs of datasets of each two genres (in alphabetical order), and of two datasets of one genre."""
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


def layer_shares(probe: str, ranking: Ranking, tops: Sequence[int], *, n_layers: int) -> list[LayerShareRow]:
    """Part of a dataset's top neurons in every layer, for each size of the top (at most all neurons)."""
    n_neurons = len(ranking.order_K) // n_layers
    return [
        LayerShareRow(probe, top, layer, float(n / top), 1 / n_layers)
        for top, orders in _tops({"": ranking}, tops)
        for layer, n in enumerate(np.bincount(orders[""] // n_neurons, minlength=n_layers))
    ]


def common_neurons(
    probe: str, rankings: Mapping[str, Ranking], tops: Sequence[int], *, n_neurons: int
) -> list[CommonNeuronRow]:
    """Neurons that are among the top of every dataset, for each size of the top: best worst rank first.

    Parameters
    ----------
    rankings : mapping of dataset to Ranking
        Of all neurons; see `rank_by_lot`.
    n_neurons : int
        Neurons of a layer.
    """
    rank_DM = np.array([np.argsort(ranking.order_K) for ranking in rankings.values()])
    polarity_DM = np.array([one.polarity_K[rank_M] for one, rank_M in zip(rankings.values(), rank_DM, strict=True)])
    worst_M = rank_DM.max(axis=0)
    n_same_M = np.maximum((polarity_DM > 0).sum(axis=0), (polarity_DM < 0).sum(axis=0))
    by_worst_M = np.argsort(worst_M, kind="stable")
    return [
        CommonNeuronRow(probe, top, int(m // n_neurons), int(m % n_neurons), int(worst_M[m]), int(n_same_M[m]))
        for top, _ in _tops(rankings, tops)
        for m in by_worst_M[worst_M[by_worst_M] < top]
    ]


def _tops(rankings: Mapping[str, Ranking], tops: Sequence[int]) -> Iterator[tuple[int, dict[str, Ints]]]:
    """The best neurons of every ranking for each size, which is at most that of the model."""
    for top in dict.fromkeys(min(top, _n_all(rankings)) for top in tops):
        yield top, {dataset: ranking.top(top).order_K for dataset, ranking in rankings.items()}


def _n_all(rankings: Mapping[str, Ranking]) -> int:
    return len(next(iter(rankings.values())).order_K)


class _Measured(NamedTuple):
    accuracy: float
    low: float
    high: float


def _measured(result: Accuracy) -> _Measured:
    return _Measured(result.value, *result.interval)
