"""The arithmetic of vote probes: pure functions of a block of prompts and a block of neurons, in numpy alone.

Shapes: P prompts, O options, M = L*N neurons (flat index, layer-major: neuron n of layer l is l*N + n),
K neurons in rank order, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from negcore.arrays import Ints
from negcore.errors import NegError

Numbers = NDArray[Any]
Signs = NDArray[np.int8]

# Values worked on at once: this bounds every temporary array and keeps sums of +-1 exact in float32.
_BLOCK_VALUES = 2**22


def polar_scores(negs_POM: Numbers, gold_P: ArrayLike) -> Ints:
    """Score neurons as the Polar-Probe does: sum over prompts of 2*sign(v_gold) - sum over options of sign(v).

    Parameters
    ----------
    negs_POM : array, shape (P, O, M), target per unit of activation
        NEGs of a block of prompts and a block of neurons.
    gold_P : array of int, shape (P,)
        Index of each prompt's gold option.

    Returns
    -------
    array of int64, shape (M,)
        Scores of blocks of prompts add up; scores of blocks of neurons concatenate.

    Raises
    ------
    NegError
        If a NEG is NaN or infinite (row and neuron are counted within the block), a gold option is not an
        option, or the shapes disagree.
    """
    return _sum_over_rows(_polar_block, negs_POM, gold_P)


def magn_scores(negs_POM: Numbers, gold_P: ArrayLike) -> Ints:
    """Score neurons as the Magn-Probe does: sum over prompts and options of sign(v_gold - v_option).

    Parameters, Returns, Raises: as `polar_scores`.
    """
    return _sum_over_rows(_magn_block, negs_POM, gold_P)


def row_scores(rule: Rule, negs_POM: Numbers, gold_P: ArrayLike) -> Numbers:
    """Score neurons on each prompt alone: `polar_scores` or `magn_scores` is the sum over prompts.

    Parameters, Raises: as `polar_scores`.

    Returns
    -------
    array of int32, shape (P, M)
    """
    n_rows, n_options, n_neurons = check_negs(negs_POM).shape
    gold = check_gold(gold_P, n_options)
    scores_PM = np.empty((n_rows, n_neurons), np.int32)
    for rows in row_blocks(negs_POM.shape):
        scores_PM[rows] = _ROW_BLOCKS[rule](negs_POM[rows], gold[rows])
    return scores_PM


Rule = Literal["polar", "magn"]
Signal = Literal["neg", "gradient", "gxa"]
"""A measure of a neuron's effect on an option: NEG, the plain gradient, or gradient x activation."""

SCORES: Mapping[Rule, Callable[[Numbers, ArrayLike], Ints]] = MappingProxyType(
    {"polar": polar_scores, "magn": magn_scores}
)


class Vote(NamedTuple):
    """A way to score neurons: the rule compares signs or sizes of the options' values, the signal is that value."""

    rule: Rule
    signal: Signal

    @property
    def name(self) -> str:
        """Name of the probe in run files: the rule, and the signal unless that is NEG."""
        return self.rule if self.signal == "neg" else f"{self.rule}-{self.signal}"

    @property
    def column(self) -> str:
        """Name of the column of its sums in a shard."""
        return f"sum_{self.rule}_{self.signal}"


VOTES = tuple(Vote(rule, signal) for rule, signal in product(get_args(Rule), get_args(Signal)))
"""All ways to score neurons."""


def vote_sums(negs_POLN: Numbers, activations_PLN: Numbers, gold_P: ArrayLike) -> dict[Vote, Ints]:
    """Score every neuron by every vote: a ranking needs nothing else of these prompts.

    Parameters
    ----------
    negs_POLN : array, shape (P, O, L, N), target per unit of activation
    activations_PLN : array, shape (P, L, N)
    gold_P : array of int, shape (P,)
        Index of each prompt's gold option.

    Returns
    -------
    dict of Vote to array of int64, shape (M,)
        Scores of blocks of prompts add up.

    Raises
    ------
    NegError
        As `polar_scores`, with the layer.
    """
    scores_LN = {vote: np.zeros(negs_POLN.shape[2:], np.int64) for vote in VOTES}
    for layer in range(negs_POLN.shape[2]):
        activations_PN = partial(activations_PLN.__getitem__, (slice(None), layer))
        try:
            add_votes(scores_LN, layer, negs_POLN[:, :, layer], activations_PN, gold_P)
        except NegError as error:
            raise NegError(f"layer {layer}: {error}") from None
    return {vote: scores.ravel() for vote, scores in scores_LN.items()}


def add_votes(
    scores_LN: Mapping[Vote, Ints],
    at: int,
    signed_ranks_PON: Numbers,
    activations_PN: Callable[[], Numbers],
    gold_P: ArrayLike,
) -> None:
    """Add the scores of one layer of some prompts to row `at` of each vote's scores; see `signed_rank_effect`."""
    for vote, scores in scores_LN.items():
        scores[at] += SCORES[vote.rule](signed_rank_effect(vote.signal, signed_ranks_PON, activations_PN), gold_P)


def signed_rank_effect(signal: Signal, signed_ranks_PON: Numbers, activations_PN: Callable[[], Numbers]) -> Numbers:
    """Return numbers with the order and signs of a signal's values, shape (P, O, N), from such numbers for NEGs.

    Within a prompt, gradient x activation is NEG times a factor that is the same for every option and not negative.
    Signs and order of the options are therefore those of NEG, unless the neuron is at exactly zero, and so are Polar
    and Magn. Nothing is multiplied, as rounding a product could make neighbouring NEGs equal and small ones zero.

    Raises
    ------
    NegError
        If the signal needs activations and one is NaN or infinite.
    """
    if signal == "neg":
        return signed_ranks_PON
    activations = check_finite(activations_PN(), "activation", ("row", "neuron"))[:, None]
    if signal == "gradient":
        return np.where(activations > 0, signed_ranks_PON, -signed_ranks_PON)
    return np.where(activations != 0, signed_ranks_PON, 0)


def argmax_features(negs_POM: Numbers) -> NDArray[np.uint8]:
    """Return the Tree-Probe's features: for each prompt and neuron, the index of the option with the largest NEG.

    Parameters
    ----------
    negs_POM : array, shape (P, O, M), target per unit of activation
        NEGs of a block of prompts and a block of neurons; O in 2..256.

    Returns
    -------
    array of uint8, shape (P, M)
        Ties: the lowest option. With two options: 1 where option 0's NEG is larger, else 0.

    Raises
    ------
    NegError
        If a NEG is NaN or infinite, or the options do not fit in one byte.
    """
    n_options = check_negs(negs_POM).shape[1]
    if not 2 <= n_options <= 256:
        raise NegError(f"{n_options} options: features of one byte need 2..256 of them")
    if n_options == 2:
        return (negs_POM[:, 0] > negs_POM[:, 1]).view(np.uint8)
    largest_PM = negs_POM[:, 0].copy()
    features_PM = np.zeros(largest_PM.shape, np.uint8)
    for option in range(1, n_options):
        features_PM[negs_POM[:, option] > largest_PM] = option
        np.maximum(largest_PM, negs_POM[:, option], out=largest_PM)
    return features_PM


def _sum_over_rows(score_block: Callable[[Numbers, Ints], Ints], negs_POM: Numbers, gold_P: ArrayLike) -> Ints:
    n_rows, n_options, n_neurons = check_negs(negs_POM).shape
    gold = check_gold(gold_P, n_options)
    if gold.size != n_rows:
        raise NegError(f"{gold.size} gold options for {n_rows} rows of NEGs: give one a row")
    scores_M = np.zeros(n_neurons, np.int64)
    for rows in row_blocks(negs_POM.shape):
        scores_M += score_block(negs_POM[rows], gold[rows])
    return scores_M


def _polar_block(negs_POM: Numbers, gold_P: Ints) -> Ints:
    n_rows, n_options, n_neurons = negs_POM.shape
    # In 2*sign(v_gold) - sum of all signs the gold option counts +1 and every other one -1; a product does the sum.
    weights_PO = np.where(gold_P[:, None] == np.arange(n_options), 1, -1).astype(np.float32)
    signs = _signs(negs_POM).astype(np.float32).reshape(n_rows * n_options, n_neurons)
    return (weights_PO.ravel() @ signs).astype(np.int64)


def _magn_block(negs_POM: Numbers, gold_P: Ints) -> Ints:
    return np.asarray(_gold_ahead(negs_POM, gold_P).sum(axis=(0, 1), dtype=np.int64))


def _gold_ahead(negs_POM: Numbers, gold_P: Ints) -> Signs:
    """Return 1 where the gold option's NEG is above an option's, -1 where it is below, else 0: shape (P, O, M)."""
    gold_P1M = negs_POM[np.arange(len(gold_P)), gold_P][:, None]
    # NEGs are compared, not subtracted: a difference of tiny NEGs may be flushed to zero.
    return (gold_P1M > negs_POM).view(np.int8) - (gold_P1M < negs_POM).view(np.int8)


def _polar_rows(negs_POM: Numbers, gold_P: Ints) -> Numbers:
    signs_POM = _signs(negs_POM)
    gold_PM = signs_POM[np.arange(len(gold_P)), gold_P].astype(np.int32)
    return np.asarray(2 * gold_PM - signs_POM.sum(axis=1, dtype=np.int32))


def _magn_rows(negs_POM: Numbers, gold_P: Ints) -> Numbers:
    return np.asarray(_gold_ahead(negs_POM, gold_P).sum(axis=1, dtype=np.int32))


_ROW_BLOCKS: Mapping[Rule, Callable[[Numbers, Ints], Numbers]] = MappingProxyType(
    {"polar": _polar_rows, "magn": _magn_rows}
)


def polar_votes(negs_POK: Numbers, polarity_K: Signs) -> Signs:
    return _signs(negs_POK) * polarity_K


def magn_votes(negs_POK: Numbers, polarity_K: Signs) -> Signs:
    # A polarity of 0 makes all options equal: each gets the neuron's vote, which decides nothing.
    directed_POK = negs_POK * polarity_K.astype(negs_POK.dtype)
    wins_POK: Numbers = directed_POK == directed_POK.max(axis=1, keepdims=True)
    return wins_POK.view(np.int8)


def _signs(values: Numbers) -> Signs:
    # This takes a quarter of the memory that np.sign takes for float32.
    return (values > 0).view(np.int8) - (values < 0).view(np.int8)


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Neurons in rank order: largest absolute score first, of equal ones the lower flat index first."""

    order_K: Ints
    """Flat indices of the neurons, best first: shape (K,)."""
    polarity_K: Signs
    """Sign of each one's score: -1, 0 or 1; shape (K,)."""

    @classmethod
    def from_scores(cls, scores_M: ArrayLike) -> Self:
        """Rank all neurons by their scores, array of int, shape (M,); raise `NegError` for any other array.

        Masked scores are not ranked: where layers differ in width, they stand for neurons that there are not.
        """
        scores, is_masked = np.asarray(scores_M), np.ma.isMaskedArray(scores_M)
        if scores.ndim != 1 or scores.dtype.kind != "i":
            raise NegError(f"scores have shape {scores.shape} and type {scores.dtype}: give one integer a neuron")
        order = np.argsort(-np.abs(scores.astype(np.int64)), kind="stable")
        if is_masked:
            order = order[~np.ma.getmaskarray(np.ma.asanyarray(scores_M))[order]]
        return cls(order, np.sign(scores[order]).astype(np.int8))

    def top(self, n_kept: int) -> Ranking:
        """Return the best neurons (all, if there are fewer); raise `NegError` unless ``n_kept`` is at least 1."""
        if n_kept < 1:
            raise NegError(f"n_kept is {n_kept}: keep at least 1 neuron")
        return Ranking(self.order_K[:n_kept], self.polarity_K[:n_kept])

    def shifts(self, size: float, layer_width: int) -> list[tuple[int, int, float]]:
        """Return (layer, neuron, size) of every neuron, for `negcore.steer`: each by its polarity, to raise the gold.

        Parameters
        ----------
        size : float
            In units of activation. A neuron of polarity 1 moves by it away from zero, one of -1 towards zero, and one
            of 0 stays.
        layer_width : int
            Neurons of a layer.
        """
        pairs, sizes = neuron_pairs(self.order_K, layer_width).tolist(), (size * self.polarity_K).tolist()
        return [(layer, neuron, own) for (layer, neuron), own in zip(pairs, sizes, strict=True)]


def neuron_pairs(flat_K: Ints, layer_width: int) -> Ints:
    """Return layer and neuron of flat indices: shape (K, 2)."""
    return np.stack(np.divmod(flat_K, layer_width), axis=-1)


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices of rows that hold about `_BLOCK_VALUES` values each, and at least one row."""
    step = max(1, _BLOCK_VALUES // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def check_negs(negs_POM: Numbers, neurons_M: Ints | None = None) -> Numbers:
    """Return the NEGs, or raise `NegError` unless they have three axes and are finite; see `check_finite`."""
    if negs_POM.ndim != 3:
        raise NegError(f"NEGs have shape {negs_POM.shape}: give (prompts, options, neurons)")
    return check_finite(negs_POM, "NEG", ("row", "option", "neuron"), neurons_M)


def check_finite(values: Numbers, what: str, axes: tuple[str, ...], neurons_M: Ints | None = None) -> Numbers:
    """Return the values; raise `NegError` for the first NaN or infinity (``neurons_M``: numbers of the last axis)."""
    for rows in row_blocks(values.shape):
        finite = np.isfinite(values[rows])
        if not finite.all():
            place = np.argwhere(~finite)[0]
            value = values[rows][tuple(place)]
            place[0] += rows.start
            place[-1] = place[-1] if neurons_M is None else neurons_M[place[-1]]
            where = ", ".join(f"{axis} {i}" for axis, i in zip(axes, place, strict=True))
            raise NegError(f"{what} of {where} is {value}: NaN and inf are refused, compute this row again")
    return values


def check_gold(gold_P: ArrayLike, n_options: int) -> NDArray[np.int64]:
    """Return gold options as int64; refuse any that is not the index of an option.

    Parameters
    ----------
    gold_P : array of int, shape (P,)
        Index of the gold option of each prompt.
    n_options : int
        Options of every prompt.

    Raises
    ------
    NegError
        If ``gold_P`` is not a vector of integers in 0..n_options-1.
    """
    gold = np.asarray(gold_P)
    if gold.ndim != 1 or gold.dtype.kind not in "iu":
        raise NegError(
            f"gold options have shape {gold.shape} and type {gold.dtype}: give one integer a prompt, "
            f"its gold option's index in 0..{n_options - 1}"
        )
    wrong = np.flatnonzero((gold < 0) | (gold >= n_options))
    if wrong.size:
        raise NegError(
            f"row {wrong[0]}: gold option {gold[wrong[0]]} is not one of the {n_options} options: "
            f"give an index in 0..{n_options - 1}"
        )
    return gold.astype(np.int64)
