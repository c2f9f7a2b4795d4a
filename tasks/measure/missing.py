"""Measure the shards of some sets that are not there yet: the loop that hands jobs to workers."""

import errno
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from negcore.errors import RunError
from negcore.store.files import is_remote, remove
from negcore.store.integrity import Finished, finished_shards
from negcore.store.publish import Receipt, SetAside, ShardPlace, receipt_path
from tasks.measure.shard_set import ShardSet
from tasks.pool.base import Pool, PoolStatus
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
    """What was wrong with finished shards that were computed again, a line each."""
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


def measure_missing(pool: Pool, shard_sets: Sequence[ShardSet], root: Path, step: Step) -> list[Extracted]:
    """Measure the shards of some sets that are not there yet or are damaged, in one queue.

    A row that fails again and again, or kills its workers, is set aside, and so is one with numbers that are not
    finite if the set's policy is "skip". Shards that would be others under another policy are measured again.

    Parameters
    ----------
    pool : Pool
        Of `tasks.measure.worker.ModelWorker`.
    shard_sets : sequence of ShardSet
        In different directories.
    root : Path
        Run directory.
    step : Step
        Told how many shards are finished.

    Raises
    ------
    ShardError
        If a directory holds shards of another run.
    Stopped
        If the step is to stop; what is published by then stays.
    RunError
        If the run directory is full or cannot be written any more: what would be computed from then on is lost.
    """
    n_shards = {one.place: len(one.shards) for one in shard_sets}
    finished = _all_finished(root, shard_sets, step, sum(n_shards.values()))
    for place, known in finished.items():
        for index in known.damaged:
            remove(receipt_path(place.path(root), index))
    receipts = {place: dict(known.receipts) for place, known in finished.items()}
    failures: dict[ShardPlace, list[Failure]] = {one.place: [] for one in shard_sets}
    meter = meter_of(root)

    def report(status: PoolStatus | None = None) -> None:
        step.report(sum(map(len, (*receipts.values(), *failures.values()))), sum(n_shards.values()), status)
        for place, n_wanted in n_shards.items():
            meter.shards(place, len(receipts[place]), n_wanted)
        if status is not None:
            meter.workers(status)

    jobs = [
        one.job(root, index)
        for one in shard_sets
        for index in range(len(one.shards))
        if index not in finished[one.place].receipts
    ]
    report()
    with closing(map_isolating(pool, jobs, stop=step.stop, on_tick=report)) as outcomes:
        for outcome in outcomes if jobs else ():
            job = outcome.job
            if outcome.result is not None:
                receipts[job.place][job.index] = outcome.result
                meter.measured(job.place, outcome.result)
            else:
                _check_place(root, outcome.exception)
                error = without_text(str(outcome.error), job.examples)
                failures[job.place].append(Failure(job.index, len(job.examples), error))
                meter.failed(job.place)
            report()
    for place, of_place in failures.items():
        note_failures(root, place, {failure.index: failure.error for failure in of_place})
    return [_extracted(one, finished[one.place], receipts[one.place], failures[one.place]) for one in shard_sets]


def _all_finished(root: Path, shard_sets: Sequence[ShardSet], step: Step, n_shards: int) -> dict[ShardPlace, Finished]:
    """Check the shards that are there already, and tell the step how far that is."""
    n_checked = 0

    def checked(n_bytes: int) -> None:
        nonlocal n_checked
        n_checked += 1
        step.check_stop()
        step.report(n_checked, n_shards, note="checking finished shards")

    return {one.place: _finished(root, one, checked) for one in shard_sets}


def _finished(root: Path, shard_set: ShardSet, checked: Callable[[int], None]) -> Finished:
    known, damaged = finished_shards(root, shard_set.place, shard_set.identity, shard_set.shards, checked=checked)
    return Finished({index: receipt for index, receipt in known.items() if shard_set.accepts(receipt)}, damaged)


def _extracted(
    shard_set: ShardSet, finished: Finished, known: Mapping[int, Receipt], failures: Sequence[Failure]
) -> Extracted:
    n_reused = len(finished.receipts)
    set_aside = tuple(row for _, receipt in sorted(known.items()) for row in receipt.set_aside)
    return Extracted(
        place=shard_set.place,
        title=shard_set.title,
        n_rows=sum(receipt.n_rows for receipt in known.values()),
        n_reused=n_reused,
        n_computed=len(known) - n_reused,
        n_bytes=sum(receipt.n_bytes for receipt in known.values()),
        failures=tuple(failures),
        set_aside=set_aside,
        damaged=tuple(f"shard {index}: {fault}" for index, fault in finished.damaged.items() if index in known),
        named=names_of(shard_set, set_aside),
    )


def names_of(shard_set: ShardSet, rows: Iterable[SetAside]) -> dict[str, str]:
    """Return the names of some rows of a set in messages, by id."""
    ids = {row.id for row in rows}
    return {example.id: example.located for example in shard_set.examples if example.id in ids}


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
