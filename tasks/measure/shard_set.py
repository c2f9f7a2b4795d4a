"""Examples cut into shards, and the job of measuring one shard."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, overload

import numpy as np

from negcore.arrays import Ints
from negcore.errors import NegError
from negcore.model.check import ModelCheck
from negcore.store.identity import RunIdentity
from negcore.store.integrity import shard_fault
from negcore.store.publish import Receipt, SetAside, ShardPlace, publish_shard, read_receipt
from tasks.measure.examples import EncodedExample
from tasks.measure.measurement import Columns, Measurement, Nonfinite

NonfinitePolicy = Literal["fail", "skip", "keep"]
"""Policy for a row with NaN or infinite numbers: its shard fails, it is set aside, or it is stored all the same.

It is no part of a run's identity: it decides which rows are stored, never a number of theirs."""

_MOST_NAMED = 8
"""Rows that a message names."""


class Shards(Sequence[Sequence[EncodedExample]]):
    """The examples of every shard, in order. They are cut when asked for: there may be a million shards."""

    def __init__(self, examples: Sequence[EncodedExample], shard_rows: int) -> None:
        self._examples, self._shard_rows = examples, shard_rows

    def __len__(self) -> int:
        return -(-len(self._examples) // self._shard_rows)

    @overload
    def __getitem__(self, index: int) -> Sequence[EncodedExample]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[EncodedExample]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[EncodedExample] | Sequence[Sequence[EncodedExample]]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self._shard_rows
        return self._examples[start : start + self._shard_rows]

    @property
    def n_tokens_S(self) -> Ints:
        """Tokens of every shard's prompts, shape (S,)."""
        n_tokens_P = np.fromiter((len(example.token_ids) for example in self._examples), np.int64, len(self._examples))
        return np.add.reduceat(n_tokens_P, np.arange(0, len(n_tokens_P), self._shard_rows))


@dataclass(frozen=True, eq=False)
class ShardSet:
    """The shards of one directory: some examples, and what is measured of them."""

    place: ShardPlace
    identity: RunIdentity
    examples: tuple[EncodedExample, ...]
    measurement: Measurement
    shard_rows: int
    nonfinite: NonfinitePolicy
    title: str
    """Name for people."""

    def __post_init__(self) -> None:
        self.place.check()

    @cached_property
    def shards(self) -> Shards:
        """The examples of every shard, in order."""
        return Shards(self.examples, self.shard_rows)

    def longest_first(self, indices: Ints) -> Ints:
        """Return the indices of some shards, those with the most tokens first: no long one is left for the end."""
        return indices[np.argsort(-self.shards.n_tokens_S[indices], kind="stable")]

    @property
    def n_options(self) -> int:
        """Options of every example."""
        return len(self.examples[0].labels)

    def job(self, root: Path, index: int) -> "ShardJob":
        """Return the job of measuring one shard."""
        n_shards, examples = len(self.shards), self.shards[index]
        return ShardJob(root, self.place, self.identity, index, n_shards, examples, self.measurement, self.nonfinite)

    def accepts(self, receipt: Receipt) -> bool:
        """Tell whether a finished shard is what it would be under this set's policy for NaN and infinity."""
        return _follows(receipt, self.nonfinite)


@dataclass(frozen=True, eq=False)
class ShardJob:
    """One shard to measure, or a trial: some of its rows, of which nothing is published."""

    root: Path
    place: ShardPlace
    identity: RunIdentity
    index: int
    n_shards: int
    examples: Sequence[EncodedExample]
    measurement: Measurement
    nonfinite: NonfinitePolicy = "fail"
    set_aside: tuple[SetAside, ...] = ()
    """Rows among `examples` that are not to be measured."""
    is_trial: bool = False
    was_tried: bool = False
    """True if a worker had it before, which may have published it and was lost before anybody knew."""

    def again(self) -> "ShardJob":
        """Return the job for another worker, after one was lost with it."""
        return replace(self, was_tried=True)

    def trial(self, examples: Sequence[EncodedExample]) -> "ShardJob":
        """Return the job of measuring some of the rows and publishing nothing."""
        return replace(self, examples=examples, is_trial=True)

    def without(self, rows: Sequence[SetAside]) -> "ShardJob":
        """Return the job with some of its rows set aside."""
        return replace(self, set_aside=tuple(rows))

    @property
    def n_options(self) -> int:
        """Options of every example."""
        return len(self.examples[0].labels)

    def published(self) -> Receipt | None:
        """Return the receipt of this very shard if it is there, whole and as the policy wants it."""
        folder = self.place.path(self.root)
        receipt = read_receipt(folder, self.index)
        if receipt is None or (receipt.digest, receipt.n_shards) != (self.identity.digest, self.n_shards):
            return None
        is_whole = shard_fault(folder, receipt, rows=self.examples) is None
        return receipt if is_whole and _follows(receipt, self.nonfinite) else None

    def publish(self, columns: Columns, set_aside: Sequence[SetAside], check: ModelCheck | None = None) -> Receipt:
        """Publish what was measured, as the policy for numbers that are not finite wants it.

        Parameters
        ----------
        columns : mapping of name to array (P, ...)
            Of the examples that are not set aside.
        set_aside : sequence of SetAside
        check : ModelCheck, optional
            Of the model that measured them; shards of earlier versions say nothing of it.

        Raises
        ------
        NegError
            If numbers are not finite and the policy is "fail"; rows are named, and where in them.
        """
        by_id = {row.id: row for row in set_aside}
        measured = [example for example in self.examples if example.id not in by_id]
        found = self.measurement.nonfinite(columns)
        if found and self.nonfinite == "fail":
            raise _not_finite(measured, found)
        skipped = {one.row for one in found} if self.nonfinite == "skip" else set()
        for one in found if skipped else ():
            row = SetAside(id=measured[one.row].id, cause="nonfinite", reason=_located(one))
            by_id[row.id] = row
        kept = [row for row in range(len(measured)) if row not in skipped]
        if skipped:
            columns = self.measurement.rows(columns, kept)
        return publish_shard(
            self.root,
            self.place,
            self.index,
            self.n_shards,
            identity=self.identity,
            batch=self.measurement.record_batch([measured[row] for row in kept], columns),
            about=self.measurement.about(self.n_options) | ({"check": check.metadata} if check else {}),
            set_aside=[by_id[example.id] for example in self.examples if example.id in by_id],
            n_nonfinite=sum(one.n_values for one in found if one.row not in skipped),
        )


def _follows(receipt: Receipt, nonfinite: NonfinitePolicy) -> bool:
    """Tell whether a shard is what it would be under a policy for NaN and infinity."""
    has_skipped = any(row.cause == "nonfinite" for row in receipt.set_aside)
    return (nonfinite == "keep" or not receipt.n_nonfinite) and (nonfinite == "skip" or not has_skipped)


def _not_finite(examples: Sequence[EncodedExample], found: Sequence[Nonfinite]) -> NegError:
    named = "; ".join(f"{examples[one.row].located}: {_located(one)}" for one in found[:_MOST_NAMED])
    more = f"; and {len(found) - _MOST_NAMED} prompts more" if len(found) > _MOST_NAMED else ""
    return NegError(f"{named}{more}: use a wider dtype, or skip or keep such rows (nonfinite)")


def _located(one: Nonfinite) -> str:
    return f"{one.n_values} NaN or infinite values, in {one.where}"
