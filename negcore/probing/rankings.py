"""How well every neuron tells the gold option, over a whole split: sums over shards, one block of layers at a time.

What is read of a split at any moment is one layer of one shard; what comes out is a number or two for each neuron.
Blocks of layers concatenate, so they can be scored anywhere.

Axes: P prompts, O options, C classes (distinct gold options), S binary questions between classes, N neurons a layer,
M neurons of a block of layers (layer-major), K chosen neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from negcore.errors import NegError
from negcore.measure.votes import Ints, Numbers, Signal, Vote, add_votes, check_finite, halvings, signed_rank_effect
from negcore.store.reader import NegSplit, RowBlock, Selection


@dataclass(frozen=True, eq=False)
class ActScores:
    """What an Act-Probe needs of each neuron, for every binary question in `halvings`' order.

    Attributes
    ----------
    scores_SM : array of int64, shape (S, M)
        2n * (accuracy - 0.5) of "above the threshold means the upper half".
    thresholds_SM : array of float64, shape (S, M), activation
        Mean activation over the prompts of the question's classes.
    """

    scores_SM: Ints
    thresholds_SM: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rankings:
    """Scores of a block of layers."""

    votes_M: Mapping[Vote, Ints]
    act: ActScores | None

    @classmethod
    def joined(cls, blocks: Sequence[Rankings]) -> Rankings:
        """Blocks of consecutive layers, in their order, as one."""
        acts = [block.act for block in blocks if block.act is not None]
        act = None
        if acts:
            act = ActScores(
                np.concatenate([one.scores_SM for one in acts], axis=1),
                np.concatenate([one.thresholds_SM for one in acts], axis=1),
            )
        votes_M = {vote: np.concatenate([block.votes_M[vote] for block in blocks]) for vote in blocks[0].votes_M}
        return cls(votes_M, act)


def effect(signal: Signal, negs_PON: Numbers, activations_PN: Callable[[], Numbers]) -> Numbers:
    """A signal's values, shape (P, O, N), from NEGs and, where it needs them, activations.

    As NEG is the gradient times s(a), with s(a) = 1 if a > 0 and else -1, the plain gradient is NEG * s(a), and
    gradient x activation is NEG * |a|.
    """
    if signal == "neg":
        return negs_PON
    activations = activations_PN()[:, None]
    if signal == "gradient":
        return np.where(activations > 0, negs_PON, -negs_PON)
    return np.asarray(negs_PON * np.abs(activations))


def chosen_effects(block: RowBlock, signal: Signal, selection: Selection) -> Numbers:
    """A signal's values for K chosen neurons of a block of rows: float32 (P, O, K)."""
    return effect(signal, block.negs(selection), lambda: block.activations(selection))


def chosen_signed_ranks(block: RowBlock, signal: Signal, selection: Selection) -> Numbers:
    """What stands for a signal's values in order and sign, for K chosen neurons of a block of rows: (P, O, K)."""
    return signed_rank_effect(signal, block.signed_ranks(selection), lambda: block.activations(selection))


def rank_layers(split: NegSplit, layers: range, votes: Collection[Vote], *, act: bool) -> Rankings:
    """Score every neuron of some layers on all prompts of a split, or add up the vote sums that its shards hold.

    Parameters
    ----------
    layers : range
        Consecutive layers.
    votes : collection of Vote
        Scores for Polar- and Magn-like probes.
    act : bool
        Whether to score activations too.

    Raises
    ------
    NegError
        If a NEG or activation is NaN or infinite: its prompt, layer and neuron are named. With storage "stats" also
        if activations are to be scored, or the shards hold chosen neurons instead of sums.
    """
    if split.level.has_vote_sums:
        votes_M = _added_sums(split, layers, votes)
    else:
        votes_M = training_scores(split, layers, votes, [split.n_rows])[split.n_rows].votes_M if votes else {}
    return Rankings(votes_M, act_scores(split, layers) if act else None)


def _added_sums(split: NegSplit, layers: range, votes: Collection[Vote]) -> Mapping[Vote, Ints]:
    chosen = slice(layers.start * split.n_neurons, layers.stop * split.n_neurons)
    scores_M = {vote: np.zeros(chosen.stop - chosen.start, np.int64) for vote in votes}
    for shard in split.shards():
        for vote, scores in scores_M.items():
            scores += shard.sums_M(vote)[chosen]
    return scores_M


def training_scores(
    split: NegSplit, layers: range, votes: Collection[Vote], sizes: Collection[int]
) -> dict[int, Rankings]:
    """Score every neuron of some layers on the first rows of a split, for several numbers of rows at once.

    Scores are sums over prompts, so every row is read once, and none behind the largest number.

    Parameters
    ----------
    layers : range
        Consecutive layers.
    votes : collection of Vote
    sizes : collection of int
        Numbers of rows, 1..P; they may end within a shard.

    Returns
    -------
    dict of int to Rankings
        For each size, smallest first, what `rank_layers` gives of a split with only those rows.

    Raises
    ------
    NegError
        As `rank_layers`; also if a size is not in 1..P.
    """
    for size in sizes:
        if not 1 <= size <= split.n_rows:
            raise NegError(f"scores of the first {size} rows: {split.place.dataset} has 1..{split.n_rows}")
    assert sizes, "no numbers of rows"
    scores = {vote: np.zeros((len(layers), split.n_neurons), np.int64) for vote in votes}
    found: dict[int, Rankings] = {}
    for block, start, end in _row_pieces(split, sorted(set(sizes))):
        for at, layer in enumerate(layers):
            with _named(split, start, layer):
                _add_votes(scores, at, block, slice(start - block.rows.start, end - block.rows.start), layer)
        if end in sizes:
            found[end] = Rankings({vote: scores_LN.flatten() for vote, scores_LN in scores.items()}, None)
    return found


def _row_pieces(split: NegSplit, sizes: Sequence[int]) -> Iterator[tuple[RowBlock, int, int]]:
    """Blocks of rows up to the last of the rising sizes, cut at each: (block, first row, end row)."""
    for block in split.row_blocks():
        end = min(block.rows.stop, sizes[-1])
        if end <= block.rows.start:
            return
        cuts = [block.rows.start, *(size for size in sizes if block.rows.start < size < end), end]
        yield from ((block, *piece) for piece in pairwise(cuts))


def _add_votes(scores: Mapping[Vote, Ints], at: int, block: RowBlock, rows: slice, layer: int) -> None:
    signed_ranks_PON, gold_P = block.shard.signed_ranks_PON(layer)[rows], block.shard.numbers("gold")[rows]
    add_votes(scores, at, signed_ranks_PON, lambda: block.shard.activations_PN(layer)[rows], gold_P)


def act_scores(split: NegSplit, layers: range) -> ActScores:
    """Thresholds and scores of an Act-Probe's neurons, in two passes over the shards: means, then counts above."""
    classes, class_P = np.unique(split.gold_P, return_inverse=True)
    n_C = np.bincount(class_P, minlength=len(classes))
    questions = list(halvings(0, len(classes)))
    sums_CM = _class_sums(split, layers, class_P, len(classes))
    thresholds_SM = np.empty((len(questions), sums_CM.shape[1]))
    for at, (start, _, stop) in enumerate(questions):
        thresholds_SM[at] = sums_CM[start:stop].sum(axis=0) / n_C[start:stop].sum()
    return ActScores(_above_scores(split, layers, class_P, questions, thresholds_SM), thresholds_SM)


def _class_sums(split: NegSplit, layers: range, class_P: Ints, n_classes: int) -> NDArray[np.float64]:
    """Sum of activations of each class, float64: the sum of equal float32 values is then exact."""
    sums_CLN = np.zeros((n_classes, len(layers), split.n_neurons))
    for block in split.row_blocks():
        is_class_CP = class_P[block.rows] == np.arange(n_classes)[:, None]
        for at, layer in enumerate(layers):
            activations_PN = block.shard.activations_PN(layer)
            with _named(split, block.rows.start, layer):
                check_finite(activations_PN, "activation", ("row", "neuron"))
            for of_class, is_class_P in enumerate(is_class_CP):
                sums_CLN[of_class, at] += activations_PN[is_class_P].sum(axis=0, dtype=np.float64)
    return sums_CLN.reshape(n_classes, -1)


def _above_scores(
    split: NegSplit,
    layers: range,
    class_P: Ints,
    questions: Sequence[tuple[int, int, int]],
    thresholds_SM: NDArray[np.float64],
) -> Ints:
    """Right minus wrong answers of "above the threshold means the upper half"."""
    scores_SM = np.zeros(thresholds_SM.shape, np.int64)
    for block in split.row_blocks():
        here_P = class_P[block.rows]
        for at, layer in enumerate(layers):
            activations_PN = block.shard.activations_PN(layer)
            columns = slice(at * split.n_neurons, (at + 1) * split.n_neurons)
            for question, (start, middle, stop) in enumerate(questions):
                # +1 in the upper half, -1 in the lower, 0 where the question does not arise.
                side_P = np.where(here_P >= middle, 1, -1) * ((here_P >= start) & (here_P < stop))
                above_PN = activations_PN > thresholds_SM[question, columns]
                right_N = 2 * (side_P.astype(np.float32) @ above_PN.astype(np.float32)) - side_P.sum()
                scores_SM[question, columns] += right_N.astype(np.int64)
    return scores_SM


@contextmanager
def _named(split: NegSplit, start: int, layer: int) -> Iterator[None]:
    """Say of a refused number in which prompts and layer it is."""
    try:
        yield
    except NegError as error:
        raise NegError(f"{split.place.dataset}, rows from {split.ids[start]!r} on, layer {layer}: {error}") from None
