"""Accuracy of skill neurons: how few are enough, whether they transfer, how deep a ranking reaches, and whether they
need each other.

Plain functions of neuron scores and NEG splits. The rows they return hold test accuracies with their 95 % interval
(Wilson). Only the columns of the chosen neurons are read from a split.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053), properties of skill neurons.

Axes: M neurons of the model (flat index, layer-major), K neurons in rank order (best first; ranks count from 0),
P prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from negcore.arrays import Ints
from negcore.measure.votes import Ranking, Vote
from negcore.probing.evaluation import Accuracy, accuracy
from negcore.probing.fitted import FittedProbe, FittedVote, fit_vote, forest_features, random_vote
from negcore.probing.forest import Forest
from negcore.probing.probes import MAX_KEPT, TreeProbe
from negcore.store.reader import NegSplit

Order = Literal["best", "random"]

TREES = (1, 4, 16, 64, 256)
DEPTHS = (1, 2, 4, 8, None)
"""Numbers of trees and depths of the grid of forests; `None` means trees of any depth."""


@dataclass(frozen=True)
class NeuronCountRow:
    """Efficiency in neurons: test accuracy of the best neurons, or of as many random ones."""

    probe: str
    order: Order
    """"best": the top of the ranking. "random": drawn from all neurons; each draw contains the smaller ones."""
    n_neurons: int
    accuracy: float
    low: float
    """Lower end of the 95 % interval (Wilson)."""
    high: float


@dataclass(frozen=True)
class TrainingRowsRow:
    """Efficiency in prompts: test accuracy of a probe fitted on the first training rows only."""

    probe: str
    n_train: int
    """Prompts: rows, and each order of a row where these were asked in several."""
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
    """Rank after that of the band's last neuron."""
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class ForestRow:
    """Interdependency: test accuracy of a forest, by its number of trees and their depth."""

    n_trees: int
    depth: int | None
    """Most neurons that a tree may ask in turn, from its root to a leaf; `None` means no limit."""
    n_neurons: int
    """Neurons that its trees choose from."""
    accuracy: float
    low: float
    high: float


# Efficiency


def accuracy_by_neurons(
    vote: Vote, scores_M: Ints, test: NegSplit, *, max_neurons: int = MAX_KEPT, seed: int
) -> list[NeuronCountRow]:
    """Measure test accuracy of the best 1, 2, 4, ... neurons, and of as many random ones (one draw).

    Every neuron has the polarity of its own score. The last row has all neurons of the model, if these are no more
    than ``max_neurons``.

    Raises
    ------
    NegError
        As `FittedVote.predict`; also if ``max_neurons`` is below 1.
    """
    ranking = Ranking.from_scores(scores_M)
    best = FittedVote(vote, ranking.top(max_neurons), test.n_options, len(ranking.order_K))
    random = random_vote(best, scores_M, seed=seed, layer_shapes=test.layer_shapes)
    voters: dict[Order, FittedVote] = {"best": best, "random": random}
    return [
        NeuronCountRow(vote.name, order, k, result.value, *result.interval)
        for order, voter in voters.items()
        for k, result in _accuracy_by_k(voter, test).items()
    ]


def _accuracy_by_k(voter: FittedVote, test: NegSplit) -> dict[int, Accuracy]:
    """Measure accuracy at every power of two, and at all neurons of the model if the voter keeps them all."""
    curve = voter.accuracy_by_k(test)
    if voter.n_kept == voter.n_all and voter.n_all not in curve:
        curve[voter.n_all] = accuracy(test.gold_P, voter.predict(test), test.answers.row_P)
    return curve


def training_sizes(n_rows: int) -> list[int]:
    """Return the numbers of training rows to try: 16, 32, 64, ... and all."""
    return [*(2**power for power in range(4, (n_rows - 1).bit_length())), n_rows]


def accuracy_by_rows(
    vote: Vote, scores_by_size: Mapping[int, Ints], valid: NegSplit, test: NegSplit, *, max_neurons: int
) -> list[TrainingRowsRow]:
    """Measure test accuracy of probes fitted on the first rows, for each number of rows.

    Parameters
    ----------
    scores_by_size : mapping of int to array of int, shape (M,)
        Scores over the first rows, by the number of rows; see `negcore.probing.rankings.training_scores`.
    valid : NegSplit
        All its rows choose the number of neurons.

    Raises
    ------
    NegError
        As `fit_vote` and `FittedVote.predict`.
    """
    rows = []
    for n_train, scores_M in scores_by_size.items():
        voter = fit_vote(vote, scores_M, valid, max_neurons=max_neurons)
        result = accuracy(test.gold_P, voter.predict(test), test.answers.row_P)
        rows.append(TrainingRowsRow(vote.name, n_train, voter.n_kept, result.value, *result.interval))
    return rows


# Robustness and flexibility


def transfer(probe: str, fitted: Mapping[str, FittedProbe], tests: Mapping[str, NegSplit]) -> list[TransferRow]:
    """Measure test accuracy of the probe of every condition under every condition, including its own.

    Parameters
    ----------
    fitted : mapping of condition to FittedProbe
        Probes fitted on the train and valid splits of their condition.
    tests : mapping of condition to NegSplit
        The test prompts under each condition; the options must be the same ones, in the same order.

    Raises
    ------
    NegError
        As `FittedProbe.predict`.
    """
    rows = []
    for (trained_on, one), (tested_on, test) in product(fitted.items(), tests.items()):
        result = accuracy(test.gold_P, one.predict(test), test.answers.row_P)
        rows.append(TransferRow(probe, trained_on, tested_on, one.n_kept, result.value, *result.interval))
    return rows


def band_starts(n_all: int, width: int) -> list[int]:
    """Return the first ranks of disjoint bands of equal width: 0, W, 2W, 4W, ... and the last W of the ranking.

    If two bands do not fit, only the first is returned.
    """
    last = n_all - width
    starts, start = [0], width
    while start + width <= last:
        starts.append(start)
        start *= 2
    return [*starts, last] if last >= width else starts


def bands(vote: Vote, scores_M: Ints, test: NegSplit, *, width: int = 64) -> list[BandRow]:
    """Measure test accuracy of each band of the ranking alone; bands have no neuron in common.

    The first band is the probe with ``width`` neurons. Neurons of score 0, at the end of a ranking, favour no option.

    Raises
    ------
    NegError
        As `FittedVote.predict`; also if ``width`` is below 1.
    """
    ranking = Ranking.from_scores(scores_M)
    width = len(ranking.top(width).order_K)
    rows, n_all = [], len(ranking.order_K)
    for first in band_starts(n_all, width):
        end = first + width
        band = Ranking(ranking.order_K[first:end], ranking.polarity_K[first:end])
        voter = FittedVote(vote, band, test.n_options, n_all)
        result = accuracy(test.gold_P, voter.predict(test), test.answers.row_P)
        rows.append(BandRow(vote.name, first, end, result.value, *result.interval))
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
    """Measure test accuracy of forests by their number of trees and depth, all on the same neurons.

    A neuron that tells something only together with others helps a deep tree, but no vote. For each depth one forest
    with the largest number of trees is grown; with one seed, its first trees are exactly the smaller forests.

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
            result = accuracy(test.gold_P, predicted_P, test.answers.row_P)
            rows.append(ForestRow(n_trees, depth, len(order_K), result.value, *result.interval))
    return rows
