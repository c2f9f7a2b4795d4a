"""Neurons of two models that do the same: matched by their NEGs over the same rows.

A neuron's NEGs for every row and option are a vector that knows nothing of the model's shape, so that neurons of
different models can be compared. Each neuron of the first model is matched with the neuron of the second whose vector
has the highest correlation with its own (Pearson), after each option's mean over the rows was taken off: what a neuron
does to a letter whatever is asked is no match. The best of tens of thousands is high by chance, so the same search is
made after the rows of the first model were shuffled, many times: a match counts if few of the shuffles reach it. What
belongs together stays together in a shuffle (`shuffled_rows`).

Axes: P rows of all splits together, O options, D = P * O entries, K chosen neurons of the first model, N neurons of a
block of the second, S shuffles.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negcore.analysis.same_rows import row_order
from negcore.analysis.shuffles import shuffled_rows
from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.probing.rankings import chosen_effects
from negcore.store.reader import NegSplit

N_SHUFFLES = 99
"""Shuffles of the rows by default: the least number that can tell a match at 1 %."""
_MOST_NUMBERS = 2**25
"""Most numbers of a block of vectors (128 MiB)."""
_MOST_NEURONS = 2048
"""Most neurons of a block."""
_ROUNDING = 1e-5
"""Two correlations that differ by less are taken for equal."""

Vectors = NDArray[np.float32]
Part = tuple[NegSplit, Ints | None]
"""A split, and its rows in the order of the other model's; None if it is the one that gives the order."""


@dataclass(frozen=True)
class NeuronMatch:
    """A neuron of one model and the neuron of another whose NEGs are most like its own."""

    layer: int
    neuron: int
    other_layer: int | None = None
    """None, as all that follows, if the neuron's NEG for each option is the same in every row."""
    other_neuron: int | None = None
    r: float | None = None
    """Correlation (Pearson) of the two over rows, within options: the highest of all neurons of the other model."""
    chance: float | None = None
    """95 % quantile of that highest correlation after shuffles of the rows."""
    p: float | None = None
    """Share of shuffles, the rows as they are among them, whose highest correlation is at least as high."""
    is_mutual: bool | None = None
    """True if this neuron is also the best match of the other one among all neurons of its model."""


class _Best(NamedTuple):
    """The best of the other model's neurons for each of K neurons."""

    flat_K: Ints
    r_K: Vectors
    shuffled_SK: Vectors


def match_neurons(
    first: Sequence[NegSplit],
    second: Sequence[NegSplit],
    chosen: Ints | None = None,
    *,
    units: Sequence[str] | None = None,
    n_shuffles: int = N_SHUFFLES,
    seed: int = 0,
) -> list[NeuronMatch]:
    """Find for neurons of one model those of another whose NEGs over the same rows are most like theirs.

    Parameters
    ----------
    first, second : sequence of NegSplit
        Splits of two models, pair by pair of the same rows, with the same number of options.
    chosen : array of int, shape (K,), optional
        Flat indices of neurons of the first model. By default all.
    units : sequence of str, length P, optional
        Unit of each row of `first`, such as the sentence that several rows are about; empty for a row of its own. By
        default all are.
    n_shuffles : int
        Shuffles of the rows. Each searches all neurons of the other model again, so p accounts for how many they are;
        it is exact for units that could have come in any order, as the rows of each, and at least 1 / (n_shuffles + 1).
        Units of which no other has as many rows stay where they are.
    seed : int
        Seed of the shuffles.

    Returns
    -------
    list of NeuronMatch
        In the order asked for.

    Raises
    ------
    NegError
        If the rows are not the same (see `row_order`), a neuron does not exist, the shards hold no values, a number is
        NaN or infinite, there are fewer than 2 rows or no shuffles, or not as many units as rows.

    Notes
    -----
    Multiplies K by all neurons of the other model by D numbers, for the rows as they are and each shuffle, in blocks.
    """
    one, other = _parts(first, second)
    n_rows = sum(split.n_rows for split in first)
    if n_rows < 2 or n_shuffles < 1:
        raise NegError(f"{n_rows} rows and {n_shuffles} shuffles tell nothing of a match: give 2 rows and 1 shuffle")
    flat_K = np.arange(_n_neurons(first)) if chosen is None else np.asarray(chosen, np.int64)
    if units is not None and len(units) != n_rows:
        raise NegError(f"{len(units)} units were given for {n_rows} rows: give each row its own")
    rows = [(number, row) for number, split in enumerate(first) for row in split.answers.row_P.tolist()]
    shuffles_SP = shuffled_rows(rows, _named(rows, units), n_shuffles=n_shuffles, seed=seed)
    return [
        match
        for block_K in _blocks(flat_K, n_rows * first[0].n_options)
        for match in _match_block(one, other, block_K, shuffles_SP)
    ]


def _parts(first: Sequence[NegSplit], second: Sequence[NegSplit]) -> tuple[list[Part], list[Part]]:
    """Check that two models have the same rows, and return how to read them in one order."""
    for splits in (first, second):
        if splits[0].layer_shapes is not None:
            raise NegError(
                f"{splits[0].identity.model!r} is a mixture of experts, whose neurons are absent from most rows: they "
                "have no vector over all of them to be matched by"
            )
    pairs = list(zip(first, second, strict=True))
    return [(split, None) for split in first], [(other, row_order(split, other)) for split, other in pairs]


def _named(rows: Sequence[Hashable], units: Sequence[str] | None) -> list[Hashable]:
    """Return the unit of each row: the row itself where it is of none."""
    return [unit or row for row, unit in zip(rows, units or [""] * len(rows), strict=True)]


def _n_neurons(splits: Sequence[NegSplit]) -> int:
    return splits[0].n_layers * splits[0].n_neurons


def _blocks(flat_K: Ints, n_entries: int) -> Iterator[Ints]:
    step = max(1, min(_MOST_NEURONS, _MOST_NUMBERS // n_entries))
    for start in range(0, len(flat_K), step):
        yield flat_K[start : start + step]


def _match_block(one: list[Part], other: list[Part], flat_K: Ints, shuffles_SP: Ints) -> list[NeuronMatch]:
    vectors_KPO = _vectors(one, flat_K)
    is_constant_K = np.logical_not(np.any(vectors_KPO, axis=(1, 2))).tolist()
    best = _best(vectors_KPO, other, shuffles_SP)
    back_K = _best(_vectors(other, best.flat_K), one, shuffles_SP[:0]).flat_K
    n_as_high_K = (best.shuffled_SK >= best.r_K - _ROUNDING).sum(axis=0)
    p_K = (n_as_high_K + 1) / (len(shuffles_SP) + 1)
    chance_K = np.quantile(best.shuffled_SK, 0.95, axis=0, method="higher")
    exact_K = _exact(one, other, flat_K, best.flat_K)
    found = []
    for k, (flat, other_flat) in enumerate(zip(flat_K.tolist(), best.flat_K.tolist(), strict=True)):
        layer, neuron = divmod(flat, one[0][0].n_neurons)
        if is_constant_K[k]:
            found.append(NeuronMatch(layer, neuron))
            continue
        other_layer, other_neuron = divmod(other_flat, other[0][0].n_neurons)
        r, chance, p = float(exact_K[k]), float(chance_K[k]), float(p_K[k])
        is_mutual = bool(back_K[k] == flat)
        found.append(NeuronMatch(layer, neuron, other_layer, other_neuron, r, chance, p, is_mutual))
    return found


def _best(vectors_KPO: Vectors, parts: list[Part], shuffles_SP: Ints) -> _Best:
    """Search all neurons of a model, block by block, for the rows as they are and after each shuffle."""
    n_chosen, n_rows, n_options = vectors_KPO.shape
    best_K, r_K = np.zeros(n_chosen, np.int64), np.full(n_chosen, -np.inf, np.float32)
    shuffled_SK = np.full((len(shuffles_SP), n_chosen), -np.inf, np.float32)
    splits = [split for split, _ in parts]
    for flat_N in _blocks(np.arange(_n_neurons(splits)), n_rows * n_options):
        others_DN = _vectors(parts, flat_N).reshape(len(flat_N), -1).T
        r_KN = vectors_KPO.reshape(n_chosen, -1) @ others_DN
        at_K = r_KN.argmax(axis=1)
        highest_K = r_KN[np.arange(n_chosen), at_K]
        is_higher_K = highest_K > r_K
        best_K, r_K = np.where(is_higher_K, flat_N[at_K], best_K), np.where(is_higher_K, highest_K, r_K)
        for number, shuffle_P in enumerate(shuffles_SP):
            r_KN = vectors_KPO[:, shuffle_P].reshape(n_chosen, -1) @ others_DN
            shuffled_SK[number] = np.maximum(shuffled_SK[number], r_KN.max(axis=1))
    return _Best(best_K, r_K, shuffled_SK)


def _vectors(parts: list[Part], flat_K: Ints) -> Vectors:
    """Return the NEGs of neurons less each option's mean over rows, of norm 1 (0 if constant): shape (K, P, O)."""
    negs_POK = np.concatenate([_in_order(part, flat_K) for part in parts])
    # In double precision, so that a vector that is constant but for rounding is told from one that is not.
    wide_POK = negs_POK.astype(np.float64)
    wide_POK -= wide_POK.mean(axis=0)
    norms_K = np.sqrt((wide_POK**2).sum(axis=(0, 1)))
    is_constant_K = (np.ptp(negs_POK, axis=0) == 0).all(axis=0)
    wide_POK *= np.divide(1, norms_K, out=np.zeros_like(norms_K), where=~is_constant_K & (norms_K > 0))
    return np.ascontiguousarray(wide_POK.transpose(2, 0, 1), np.float32)


def _in_order(part: Part, flat_K: Ints) -> Floats:
    split, order_P = part
    negs_POK = np.concatenate([chosen_effects(shard, "neg", flat_K) for shard in split.shards()])
    return negs_POK if order_P is None else negs_POK[order_P]


def _exact(one: list[Part], other: list[Part], flat_K: Ints, best_K: Ints) -> Floats:
    """Return the correlations of pairs of neurons; the search's own are rounded."""
    first_KPO, second_KPO = (_vectors(*each).astype(np.float64) for each in ((one, flat_K), (other, best_K)))
    correlations_K: Floats = np.clip((first_KPO * second_KPO).sum(axis=(1, 2)), -1, 1)
    return correlations_K
