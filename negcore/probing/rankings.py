"""Scores of all neurons over a whole split: how well each tells the gold option, one block of layers at a time.

Scores are sums over shards. One layer of one shard is in memory at a time, and each neuron gets a number or two.
Blocks of layers concatenate, so any worker can score any block.

Axes: P prompts, O options, C classes (distinct gold options), S binary questions between classes, L layers,
N neurons a layer, M neurons of a block of layers (layer-major), K chosen neurons.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from negcore.arrays import Ints
from negcore.errors import NegError
from negcore.measure.votes import (
    Numbers,
    Ranking,
    Rule,
    Signal,
    Vote,
    add_votes,
    check_finite,
    neuron_pairs,
    signed_rank_effect,
)
from negcore.probing.act_scores import ActScores, above_scores, class_sums, mean_thresholds
from negcore.store.reader import NegSplit, Selection, Shard


@dataclass(frozen=True, eq=False)
class Rankings:
    """Scores of a block of layers."""

    votes_M: Mapping[Vote, Ints]
    act: ActScores | None

    @classmethod
    def joined(cls, blocks: Sequence[Rankings]) -> Rankings:
        """Join the scores of consecutive blocks of layers, in their order."""
        acts = [block.act for block in blocks if block.act is not None]
        votes_M = {vote: np.concatenate([block.votes_M[vote] for block in blocks]) for vote in blocks[0].votes_M}
        return cls(votes_M, ActScores.joined(acts) if acts else None)


@dataclass(frozen=True, slots=True, eq=False)
class RankedNeurons(Ranking):
    """A ranking of a model's neurons that knows the layer of each."""

    scores_K: Ints
    """Their scores: shape (K,)."""
    layer_width: int
    """Neurons of a layer."""

    @property
    def neurons_K2(self) -> Ints:
        """Layer and neuron of each, best first: shape (K, 2)."""
        return neuron_pairs(self.order_K, self.layer_width)

    def top(self, n_kept: int) -> RankedNeurons:
        """Return the best neurons (all, if there are fewer); raise `NegError` unless ``n_kept`` is at least 1."""
        best = Ranking.top(self, n_kept)
        return RankedNeurons(best.order_K, best.polarity_K, self.scores_K[:n_kept], self.layer_width)


def rank(split: NegSplit, rule: Rule = "magn", signal: Signal = "neg") -> RankedNeurons:
    """Rank all neurons by how well they tell the gold option of a split's prompts.

    Parameters
    ----------
    split : NegSplit
        Training prompts.
    rule : Rule
        "magn": by the order of the options' values; "polar": by their signs.
    signal : Signal
        The values that are compared.

    Returns
    -------
    RankedNeurons
        All neurons, best first; `negcore.top_neurons` also tells how sure their places are.

    Raises
    ------
    NegError
        As `rank_layers`.

    Examples
    --------
    >>> from negcore import open_negs, rank
    >>> ranking = rank(open_negs("RUN").select("smollm2-135m", "agnews", "train"))  # doctest: +SKIP
    >>> ranking.top(2).neurons_K2.tolist()  # layer and neuron, best first  # doctest: +SKIP
    [[20, 322], [19, 693]]
    """
    vote = Vote(rule, signal)
    scores_M = rank_layers(split, range(split.n_layers), [vote], act=False).votes_M[vote]
    ranking = Ranking.from_scores(of_neurons(split, scores_M))
    return RankedNeurons(ranking.order_K, ranking.polarity_K, scores_M[ranking.order_K], split.n_neurons)


def of_neurons(split: NegSplit, scores_M: Ints) -> Ints:
    """Return scores of all layers with those masked that are of no neuron, where layers of experts differ in width.

    Axes before the last stay as they are. `Ranking.from_scores` leaves masked ones out.
    """
    shapes = split.layer_shapes
    if shapes is None or all(shape.n_neurons == split.n_neurons for shape in shapes):
        return scores_M
    absent_M = np.concatenate([np.arange(split.n_neurons) >= shape.n_neurons for shape in shapes])
    masked_M: Ints = np.ma.masked_array(scores_M, np.broadcast_to(absent_M, scores_M.shape))
    return masked_M


def chosen_effects(shard: Shard, signal: Signal, selection: Selection) -> Numbers:
    """Return a signal's values for K chosen neurons of a shard: float32, shape (P, O, K).

    As NEG is the gradient times s(a), with s(a) = 1 if a > 0 and else -1, the plain gradient is NEG * s(a), and
    gradient x activation is NEG * |a|.

    Raises
    ------
    NegError
        If a number is NaN or infinite, or the shard does not hold it.
    """
    negs_POK = finite_numbers(shard, shard.negs(selection), "NEG", selection)
    if signal == "neg":
        return negs_POK
    activations = finite_numbers(shard, shard.activations(selection), "activation", selection)[:, None]
    if signal == "gradient":
        return np.where(activations > 0, negs_POK, -negs_POK)
    return np.asarray(negs_POK * np.abs(activations))


def chosen_signed_ranks(shard: Shard, signal: Signal, selection: Selection) -> Numbers:
    """Return numbers with the order and signs of a signal's values, for K chosen neurons of a shard: (P, O, K).

    Raises
    ------
    NegError
        As `chosen_effects`.
    """
    signed_ranks_POK = finite_numbers(shard, shard.signed_ranks(selection), "NEG", selection)
    return signed_rank_effect(
        signal,
        signed_ranks_POK,
        lambda: finite_numbers(shard, shard.activations(selection), "activation", selection),
    )


def chosen_activations(shard: Shard, selection: Selection) -> Numbers:
    """Return the activations of K chosen neurons of a shard, masked where a prompt does not have one: (P, K)."""
    activations_PK = shard.activations(selection)
    if shard.layer_shapes is None:
        return activations_PK
    masked: Numbers = np.ma.masked_array(activations_PK, ~shard.active(selection))
    return masked


def finite_numbers(shard: Shard, values: Numbers, what: str, selection: Selection) -> Numbers:
    """Return numbers of K chosen neurons, shape (P, ..., K); raise `NegError` for the first NaN or infinity."""
    finite = np.isfinite(values)
    if not finite.all():
        first = tuple(np.argwhere(~finite)[0])
        places, row = shard.split.locate(selection), shard.split.ids[shard.rows.start + first[0]]
        raise NegError(
            f"{shard.split.place.dataset}, row {row!r}: {what} of neuron "
            f"{places.layers_K[first[-1]]}.{places.neurons_K[first[-1]]} is {values[first]}: NaN and inf are refused, "
            "compute this row again"
        )
    return values


def rank_layers(split: NegSplit, layers: range, votes: Collection[Vote], *, act: bool) -> Rankings:
    """Score every neuron of some layers on all prompts of a split, or add up the vote sums in its shards.

    Parameters
    ----------
    layers : range
        Consecutive layers.
    votes : collection of Vote
        Scores for Polar- and Magn-like probes.
    act : bool
        True to score activations too.

    Raises
    ------
    NegError
        If a NEG or activation is NaN or infinite; the message names its prompts, layer and neuron. With storage
        "stats" also if ``act`` is true, or the shards hold chosen neurons instead of sums.
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

    Scores are sums over prompts, so each row up to the largest number is read once, and no later row.

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
        For each size, smallest first, the scores that `rank_layers` would give if the split had only those rows.

    Raises
    ------
    NegError
        As `rank_layers`; also if a size is not in 1..P.
    """
    for size in sizes:
        if not 1 <= size <= split.n_rows:
            raise NegError(
                f"cannot score the first {size} rows of {split.place.dataset}: give a number in 1..{split.n_rows}"
            )
    assert sizes, "no numbers of rows"
    scores = {vote: np.zeros((len(layers), split.n_neurons), np.int64) for vote in votes}
    found: dict[int, Rankings] = {}
    for shard, start, end in _row_pieces(split, sorted(set(sizes))):
        for at, layer in enumerate(layers):
            with _named(split, start, layer):
                _add_votes(scores, at, shard, slice(start - shard.rows.start, end - shard.rows.start), layer)
        if end in sizes:
            found[end] = Rankings({vote: scores_LN.flatten() for vote, scores_LN in scores.items()}, None)
    return found


def _row_pieces(split: NegSplit, sizes: Sequence[int]) -> Iterator[tuple[Shard, int, int]]:
    """Yield blocks of rows up to the last of the rising sizes, cut at each size: (shard, first row, end row)."""
    for shard in split.shards():
        end = min(shard.rows.stop, sizes[-1])
        if end <= shard.rows.start:
            return
        cuts = [shard.rows.start, *(size for size in sizes if shard.rows.start < size < end), end]
        yield from ((shard, *piece) for piece in pairwise(cuts))


def _add_votes(scores: Mapping[Vote, Ints], at: int, shard: Shard, rows: slice, layer: int) -> None:
    signed_ranks_PON, gold_P = shard.signed_ranks_PON(layer)[rows], shard.numbers("gold")[rows]
    add_votes(scores, at, signed_ranks_PON, lambda: shard.activations_PN(layer)[rows], gold_P)


def act_scores(split: NegSplit, layers: range) -> ActScores:
    """Score the neurons of an Act-Probe in two passes over the shards: first means, then counts above the means."""
    classes, class_P = np.unique(split.gold_P, return_inverse=True)
    sums_CM = np.zeros((len(classes), len(layers) * split.n_neurons))
    n_there_CM = np.zeros_like(sums_CM)
    for rows, columns, activations_PN, there_PN in _activations(split, layers):
        sums_CM[:, columns] += class_sums(activations_PN, class_P[rows], len(classes))
        n_there_CM[:, columns] += class_sums(there_PN, class_P[rows], len(classes))
    thresholds_SM = mean_thresholds(sums_CM, n_there_CM)
    scores_SM = np.zeros(thresholds_SM.shape, np.int64)
    for rows, columns, activations_PN, there_PN in _activations(split, layers):
        scores_SM[:, columns] += above_scores(activations_PN, there_PN, class_P[rows], thresholds_SM[:, columns])
    return ActScores(scores_SM, thresholds_SM)


def _activations(split: NegSplit, layers: range) -> Iterator[tuple[slice, slice, Numbers, NDArray[np.bool_]]]:
    """Yield the activations of every shard and layer, all finite, and which are there.

    Yields
    ------
    tuple
        Rows, columns of the layer, activations (P, N), and True where a prompt has the neuron: (P, N), or (P, 1) of a
        model without experts.
    """
    for shard in split.shards():
        every_P1 = np.ones((shard.n_rows, 1), np.bool_)
        for at, layer in enumerate(layers):
            activations_PN = shard.activations_PN(layer)
            with _named(split, shard.rows.start, layer):
                check_finite(activations_PN, "activation", ("row", "neuron"))
            there_PN = every_P1 if shard.layer_shapes is None else shard.active_PN(layer)
            yield shard.rows, slice(at * split.n_neurons, (at + 1) * split.n_neurons), activations_PN, there_PN


@contextmanager
def _named(split: NegSplit, start: int, layer: int) -> Iterator[None]:
    """Add the prompts and the layer to the message about a refused number."""
    try:
        yield
    except NegError as error:
        raise NegError(f"{split.place.dataset}, rows from {split.ids[start]!r} on, layer {layer}: {error}") from None
