"""NEGs of one model's revisions over the same rows: their size, their signs, and which neurons have the largest.

A neuron of one revision is compared with the same neuron (layer and number) of another, so the revisions must be of one
architecture. NEGs are those for the right option. One layer of three revisions is held at a time.

Axes: R revisions, P rows, N neurons a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from negcore.analysis.same_rows import row_order
from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.probing.rankings import finite_numbers
from negcore.store.reader import NegSplit


@dataclass(frozen=True)
class RevisionLayer:
    """The NEGs for the right option of one layer of a revision, or of all its layers, beside other revisions'."""

    revision: int
    """Place of the revision in the series, from 0."""
    layer: int | None
    """None for all layers together."""
    mean_size: float
    """Mean |NEG| over rows and neurons."""
    same_as_previous: float | None
    """Share of rows and neurons in which the NEG has the sign that it has in the revision before; None for the
    first."""
    same_as_last: float
    """The same of the last revision."""
    rank_correlation: float
    """Spearman's correlation, over neurons, of the mean NEG over rows with that of the last revision; NaN if one of
    them does not vary."""


class _Layer(NamedTuple):
    """Signs and means of the NEGs in one layer of one revision."""

    signs_PN: NDArray[np.int8]
    means_N: Floats
    mean_size: float


def revision_profiles(series: Sequence[NegSplit]) -> list[RevisionLayer]:
    """Profile the NEGs of revisions by layer, and as a whole.

    Parameters
    ----------
    series : sequence of NegSplit
        The same rows of each revision, in order of training.

    Returns
    -------
    list of RevisionLayer
        By revision: its layers in order, then all together.

    Raises
    ------
    NegError
        If rows differ (see `row_order`), models have other numbers of layers or neurons or another site, the shards
        hold no values, or a NEG is NaN or infinite.
    """
    _check_one_shape(series)
    orders = [row_order(series[-1], split) for split in series]
    by_layer = [_profile_layer(series, orders, layer) for layer in range(series[0].n_layers)]
    means_RLN = np.array([[kept.means_N for kept in layer.kept] for layer in by_layer]).transpose(1, 0, 2)
    found: list[RevisionLayer] = []
    for revision in range(len(series)):
        rows = [layer.rows[revision] for layer in by_layer]
        found += [*rows, _whole(rows, means_RLN[revision].ravel(), means_RLN[-1].ravel())]
    return found


def _check_one_shape(series: Sequence[NegSplit]) -> None:
    first, *others = series
    shape = first.n_layers, first.n_neurons, first.identity.site
    for other in others:
        if (theirs := (other.n_layers, other.n_neurons, other.identity.site)) != shape:
            raise NegError(
                f"{other.identity.model!r} has {theirs[0]} layers of {theirs[1]} neurons at the site {theirs[2]!r}, "
                f"{first.identity.model!r} {shape[0]} of {shape[1]} at {shape[2]!r}: neurons are compared by layer and "
                "number, so give revisions of one model"
            )
    if first.layer_shapes is not None:
        raise NegError(
            f"{first.identity.model!r} is a mixture of experts: rows have other neurons in every revision, as they are "
            "routed to others, and are not compared"
        )


class _ProfiledLayer(NamedTuple):
    rows: list[RevisionLayer]
    kept: list[_Layer]
    """Of every revision, without signs."""


def _profile_layer(series: Sequence[NegSplit], orders: Sequence[Ints], layer: int) -> _ProfiledLayer:
    last, before = _read_layer(series[-1], orders[-1], layer), None
    rows, kept = [], []
    for revision, (split, order_P) in enumerate(zip(series, orders, strict=True)):
        own = last if split is series[-1] else _read_layer(split, order_P, layer)
        rows.append(
            RevisionLayer(
                revision=revision,
                layer=layer,
                mean_size=own.mean_size,
                same_as_previous=None if before is None else float((own.signs_PN == before.signs_PN).mean()),
                same_as_last=float((own.signs_PN == last.signs_PN).mean()),
                rank_correlation=spearman(own.means_N, last.means_N),
            )
        )
        kept.append(own._replace(signs_PN=own.signs_PN[:0]))
        before = own
    return _ProfiledLayer(rows, kept)


def _read_layer(split: NegSplit, order_P: Ints, layer: int) -> _Layer:
    """Read the signs and means of the NEGs for the right option, shard by shard."""
    signs_PN = np.empty((split.n_rows, split.n_neurons), np.int8)
    sums_N, sizes = np.zeros(split.n_neurons), 0.0
    for rows_P, negs_PN in _gold_negs(split, layer):
        signs_PN[rows_P] = np.sign(negs_PN)
        sums_N += negs_PN.sum(axis=0, dtype=np.float64)
        sizes += float(np.abs(negs_PN).sum(dtype=np.float64))
    return _Layer(signs_PN[order_P], sums_N / split.n_rows, sizes / signs_PN.size)


def _gold_negs(split: NegSplit, layer: int) -> Iterator[tuple[slice, Floats]]:
    """Yield the rows of each shard, and their NEGs for the right option."""
    flat_N = layer * split.n_neurons + np.arange(split.n_neurons)
    for shard in split.shards():
        gold_P = shard.numbers("gold").astype(np.int64)
        negs_PN = shard.negs_PON(layer)[np.arange(len(gold_P)), gold_P]
        yield shard.rows, finite_numbers(shard, negs_PN, "NEG", flat_N)


def _whole(rows: Sequence[RevisionLayer], means_M: Floats, last_M: Floats) -> RevisionLayer:
    """Put the layers of a revision together: all have as many rows and neurons."""
    previous = [row.same_as_previous for row in rows if row.same_as_previous is not None]
    return RevisionLayer(
        revision=rows[0].revision,
        layer=None,
        mean_size=float(np.mean([row.mean_size for row in rows])),
        same_as_previous=float(np.mean(previous)) if previous else None,
        same_as_last=float(np.mean([row.same_as_last for row in rows])),
        rank_correlation=spearman(means_M, last_M),
    )


def spearman(first_N: Floats, second_N: Floats) -> float:
    """Return Spearman's correlation, ties at their mean rank; NaN if one side does not vary."""
    ranks = [rankdata(values) for values in (first_N, second_N)]
    if min(np.ptp(one) for one in ranks) == 0:
        return float("nan")
    if np.array_equal(*ranks):
        return 1.0  # without rounding
    return float(np.corrcoef(*ranks)[0, 1])
