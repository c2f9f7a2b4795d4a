"""Measure the shards of some sets that are not there yet: the loop that hands jobs to workers."""

import errno
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from negcore.arrays import Ints
from negcore.errors import RunError
from negcore.store.files import is_remote, remove
from negcore.store.integrity import Finished, finished_shards
from negcore.store.publish import Receipt, SetAside, ShardPlace, receipt_path
from tasks.measure.shard_set import ShardJob, ShardSet
from tasks.pool.base import Outcome, Pool, PoolStatus
from tasks.pool.isolate import map_isolating, without_text
from tasks.pool.metrics import meter_of
from tasks.rundir.layout import note_failures
from tasks.steps import Step

_NO_PLACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""The disk is full, this user's share of it is used up, or it cannot be written to any more."""


@dataclass(frozen=True)
class Failure:
    """A shard that could not be measured."""

    index: int
    n_rows: int
    error: str


@dataclass(frozen=True)
class Extracted:
    """The shards of a set, counted once they are measured, with what is lost and what was set aside."""

    place: ShardPlace
    title: str
    n_rows: int
    n_reused: int
    """Shards that were there already."""
    n_computed: int
    n_bytes: int
    failures: tuple[Failure, ...]
    set_aside: tuple[SetAside, ...] = ()
    """Rows that are not in their shards, whenever that was found, and why."""
    damaged: tuple[str, ...] = ()
    """Faults of finished shards that were computed again, a line each."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Names of the rows set aside in messages, by id."""

    @property
    def problems(self) -> list[str]:
        """One line for every shard that is missing."""
        return [f"{self.title}: shard {one.index}, {one.n_rows} rows lost: {one.error}" for one in self.failures]

    @property
    def repairs(self) -> list[str]:
        """One line for every damaged shard that was computed again."""
        return [f"{self.title}: {line}: computed again" for line in self.damaged]

    @property
    def rows_set_aside(self) -> list[str]:
        """One line for every row that was set aside."""
        return [f"{self.title}: {line}" for line in self.named_set_aside()]

    def named_set_aside(self, known: Collection[SetAside] = ()) -> list[str]:
        """Return names and reasons of the rows that were set aside, without those that are known to be."""
        return [f"{self.named.get(row.id, row.id)}: {row.reason}" for row in self.set_aside if row not in known]


def measure_missing(
    pool: Pool, shard_sets: Sequence[ShardSet], root: Path, step: Step, turn: int = 0
) -> list[Extracted]:
    """Measure the shards of some sets that are not there yet or are damaged, in one queue, longest first.

    A row that fails again and again, or kills its workers, is set aside, and so is one with numbers that are not
    finite if the set's policy is "skip". Shards that would be others under another policy are measured again.

    Parameters
    ----------
    pool : Pool
        Of `tasks.measure.worker.ModelWorker`. Other threads may give it other sets at the same time.
    shard_sets : sequence of ShardSet
        In different directories.
    root : Path
        Run directory.
    step : Step
        Told how many shards are finished.
    turn : int
        As in `Pool.map`.

    Raises
    ------
    ShardError
        If a directory holds shards of another run.
    Stopped
        If the step is to stop; what is published by then stays.
    RunError
        If the run directory is full or cannot be written any more: what would be computed from then on is lost.
    """
    accounts = _accounts(root, shard_sets, step)
    progress = _Progress(root, step, accounts)
    progress.report()
    if jobs := _MissingJobs(root, accounts.values()):
        with closing(map_isolating(pool, jobs, stop=step.stop, on_tick=progress.report, turn=turn)) as outcomes:
            for outcome in outcomes:
                progress.note(outcome)
    for account in accounts.values():
        note_failures(root, account.place, {failure.index: failure.error for failure in account.failures})
    return [account.extracted() for account in accounts.values()]


class _Account:
    """The shards of a set, counted as they come: there may be a million, so that receipts are not kept."""

    def __init__(self, shard_set: ShardSet, finished: Finished) -> None:
        self.set, self.place = shard_set, shard_set.place
        self.failures: list[Failure] = []
        self._is_there_S = np.zeros(len(shard_set.shards), bool)
        self._damaged = finished.damaged
        self._set_aside: dict[int, tuple[SetAside, ...]] = {}
        self._n_rows = self._n_bytes = self.n_there = 0
        for receipt in finished.receipts.values():
            if shard_set.accepts(receipt):
                self.add(receipt)
        self._n_reused = self.n_there

    def add(self, receipt: Receipt) -> None:
        """Count a shard that is there."""
        self._is_there_S[receipt.index] = True
        self.n_there += 1
        self._n_rows += receipt.n_rows
        self._n_bytes += receipt.n_bytes
        if receipt.set_aside:
            self._set_aside[receipt.index] = receipt.set_aside

    def fail(self, index: int, error: str) -> None:
        """Note a shard that is lost."""
        self.failures.append(Failure(index, len(self.set.shards[index]), error))

    @property
    def n_wanted(self) -> int:
        return len(self._is_there_S)

    def missing(self) -> Ints:
        """Return the indices of the shards that are not there, longest first."""
        return self.set.longest_first(np.flatnonzero(~self._is_there_S))

    def extracted(self) -> Extracted:
        """Return what became of the set."""
        set_aside = tuple(row for _, rows in sorted(self._set_aside.items()) for row in rows)
        mended = {index: fault for index, fault in self._damaged.items() if self._is_there_S[index]}
        return Extracted(
            place=self.place,
            title=self.set.title,
            n_rows=self._n_rows,
            n_reused=self._n_reused,
            n_computed=self.n_there - self._n_reused,
            n_bytes=self._n_bytes,
            failures=tuple(sorted(self.failures, key=lambda failure: failure.index)),
            set_aside=set_aside,
            damaged=tuple(f"shard {index}: {fault}" for index, fault in mended.items()),
            named=names_of(self.set, set_aside),
        )


class _MissingJobs:
    """The jobs of all shards that are missing, each made when a worker is free for it."""

    def __init__(self, root: Path, accounts: Collection[_Account]) -> None:
        self._root = root
        self._missing = [(account.set, account.missing()) for account in accounts]

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self._missing)

    def __iter__(self) -> Iterator[ShardJob]:
        for shard_set, indices in self._missing:
            for index in indices:
                yield shard_set.job(self._root, int(index))


class _Progress:
    """The progress of some sets, told to the step and as metrics."""

    def __init__(self, root: Path, step: Step, accounts: Mapping[ShardPlace, _Account]) -> None:
        self._root, self._step, self._accounts = root, step, accounts
        self._meter = meter_of(root)

    def note(self, outcome: Outcome) -> None:
        """Count a shard that is finished, or lost.

        Raises
        ------
        RunError
            If no shard can be written any more.
        """
        job: ShardJob = outcome.job
        if outcome.result is not None:
            self._accounts[job.place].add(outcome.result)
            self._meter.measured(job.place, outcome.result)
        else:
            _check_place(self._root, outcome.exception)
            self._accounts[job.place].fail(job.index, without_text(str(outcome.error), job.examples))
            self._meter.failed(job.place)
        self.report()

    def report(self, status: PoolStatus | None = None) -> None:
        """Tell how many shards are finished, and what the workers are doing."""
        accounts = self._accounts.values()
        n_done = sum(account.n_there + len(account.failures) for account in accounts)
        self._step.report(n_done, sum(account.n_wanted for account in accounts), status)
        for account in accounts:
            self._meter.shards(account.place, account.n_there, account.n_wanted)
        if status is not None:
            self._meter.workers(status)


def _accounts(root: Path, shard_sets: Sequence[ShardSet], step: Step) -> dict[ShardPlace, _Account]:
    """Check the shards that are there already, tell the step how far that is, and take back those that are damaged."""
    n_shards = sum(len(one.shards) for one in shard_sets)
    n_checked = 0

    def checked(n_bytes: int) -> None:
        nonlocal n_checked
        n_checked += 1
        step.check_stop()
        step.report(n_checked, n_shards, note="checking finished shards")

    accounts: dict[ShardPlace, _Account] = {}
    damaged: list[Path] = []
    for one in shard_sets:
        finished = finished_shards(root, one.place, one.identity, one.shards, checked=checked)
        damaged += [receipt_path(one.place.path(root), index) for index in finished.damaged]
        accounts[one.place] = _Account(one, finished)
    for path in damaged:  # once it is known that all directories are of this run
        remove(path)
    return accounts


def names_of(shard_set: ShardSet, rows: Iterable[SetAside]) -> dict[str, str]:
    """Return the names of some rows of a set in messages, by id."""
    ids = {row.id for row in rows}
    return {example.id: example.located for example in shard_set.examples if example.id in ids} if ids else {}


def _check_place(root: Path, error: Exception | None) -> None:
    """Stop where no shard can be written: the next ones would be measured for nothing.

    A bucket has no such end; there the disk that is full is one of a worker, where shards wait to be put.
    """
    if isinstance(error, OSError) and error.errno in _NO_PLACE and not is_remote(root):
        reason = os.strerror(error.errno)
        raise RunError(
            f"run directory {str(root)!r} takes no more shards ({reason}): finished ones are kept; make room there, or "
            "make it writable, and run the same command again"
        ) from error
