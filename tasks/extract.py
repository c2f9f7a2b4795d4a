"""Compute and publish the NEG shards of a split: the worker, its jobs, and the loop that hands them out."""

import errno
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from negcore.datasets import Example
from negcore.errors import NegError, RunError
from negcore.measure.neurgrad import NeurGradBatch, Nonfinite, neurgrad
from negcore.model.architectures import Dtype, SiteChoice
from negcore.model.language_model import load_model
from negcore.store.files import is_remote
from negcore.store.identity import RunIdentity
from negcore.store.publish import Partition, Place, Receipt, SetAside, finished_shards, write_shard
from tasks.plan import PlannedSplit
from tasks.pool.base import Pool, PoolStatus
from tasks.pool.isolate import map_isolating, without_text
from tasks.rundir.layout import Part, note_failures

NonfinitePolicy = Literal["fail", "skip", "keep"]
"""What becomes of a row with NaN or infinite numbers: its shard fails, it is set aside, or it is stored all the same.

No part of a run's identity: it decides which rows are stored, never a number of theirs."""

_NO_PLACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""The disk is full, or this user's share of it, or it cannot be written to any more."""

_MOST_NAMED = 8
"""Rows, or layers of a row, that a message names."""


@dataclass(frozen=True)
class ExtractJob:
    """One shard to compute, or a trial: some of its rows, of which nothing is published."""

    root: Path
    partition: Partition
    identity: RunIdentity
    index: int
    n_shards: int
    examples: Sequence[Example]
    nonfinite: NonfinitePolicy = "fail"
    set_aside: tuple[SetAside, ...] = ()
    """Rows among `examples` that are not to be computed."""
    is_trial: bool = False
    neurons: tuple[int, ...] | None = None
    """Of which the numbers are stored, if not of all: see `negcore.store.publish.write_shard`."""

    @property
    def chosen(self) -> list[Example]:
        """The rows to compute."""
        set_aside = {row.id for row in self.set_aside}
        return [example for example in self.examples if example.id not in set_aside]

    def trial(self, examples: Sequence[Example]) -> "ExtractJob":
        """Compute some of the rows and publish nothing."""
        return replace(self, examples=examples, is_trial=True)

    def without(self, rows: Sequence[SetAside]) -> "ExtractJob":
        """Compute and publish the shard without some of its rows."""
        return replace(self, set_aside=tuple(rows))


class ExtractWorker:
    """Loads a model once and computes shards with it; becomes an actor only in the pool."""

    def __init__(
        self, model: str, *, dtype: Dtype, device: str | None, site: SiteChoice, batch_size: int | None, threads: int
    ) -> None:
        # The number of threads decides how sums are split, so it is part of what makes results repeatable.
        torch.set_num_threads(threads)
        self._lm = load_model(model, dtype=dtype, device=device, site=site)
        self._batch_size = batch_size

    def run(self, job: ExtractJob) -> Receipt | int:
        """Compute one shard, publish it and return its receipt; of a trial, return the number of its rows.

        Raises
        ------
        NegError
            If numbers are not finite and the job's policy is "fail": prompts and layers are named.
        """
        chosen = job.chosen
        batch = self._compute(chosen) if chosen else _no_rows(job)
        return len(chosen) if job.is_trial else _publish(job, chosen, batch)

    def _compute(self, examples: Sequence[Example]) -> NeurGradBatch:
        return neurgrad(
            self._lm,
            [example.prompt for example in examples],
            [example.labels for example in examples],
            batch_size=self._batch_size,
        )


def _publish(job: ExtractJob, examples: Sequence[Example], batch: NeurGradBatch) -> Receipt:
    """Publish computed rows as the policy for numbers that are not finite wants it."""
    found = batch.nonfinite()
    if found and job.nonfinite == "fail":
        raise _not_finite(examples, found)
    skipped = {one.row: one for one in found} if job.nonfinite == "skip" else {}
    kept = [row for row in range(len(examples)) if row not in skipped]
    if skipped:
        batch = batch.take(kept)
    set_aside = {row.id: row for row in (*job.set_aside, *(_skip(examples, one) for one in skipped.values()))}
    return write_shard(
        job.root,
        job.partition,
        job.index,
        job.n_shards,
        identity=job.identity,
        examples=[examples[row] for row in kept],
        label_ids_PO=batch.label_ids_PO,
        negs_POLN=batch.negs_POLN,
        activations_PLN=batch.activations_PLN,
        probs_PO=batch.probs_PO,
        set_aside=[set_aside[example.id] for example in job.examples if example.id in set_aside],
        n_nonfinite=sum(one.n_values for one in found if one.row not in skipped),
        neurons=job.neurons,
    )


def _no_rows(job: ExtractJob) -> NeurGradBatch:
    """What is published if every row is set aside."""
    n_options, n_layers, n_neurons = len(job.examples[0].labels), job.identity.n_layers, job.identity.n_neurons
    return NeurGradBatch(
        negs_POLN=np.empty((0, n_options, n_layers, n_neurons), np.float32),
        activations_PLN=np.empty((0, n_layers, n_neurons), np.float32),
        probs_PO=np.empty((0, n_options), np.float32),
        label_ids_PO=np.empty((0, n_options), np.int64),
    )


def _not_finite(examples: Sequence[Example], found: Sequence[Nonfinite]) -> NegError:
    named = "; ".join(f"{examples[one.row].id}: {_where(one)}" for one in found[:_MOST_NAMED])
    more = f"; and {len(found) - _MOST_NAMED} prompts more" if len(found) > _MOST_NAMED else ""
    return NegError(f"{named}{more}: use a wider dtype, or skip or keep such rows (nonfinite)")


def _skip(examples: Sequence[Example], one: Nonfinite) -> SetAside:
    return SetAside(id=examples[one.row].id, cause="nonfinite", reason=_where(one))


def _where(one: Nonfinite) -> str:
    named = ", ".join(map(str, one.layers[:_MOST_NAMED])) + ", ..." * (len(one.layers) > _MOST_NAMED)
    place = f"layer{'s' * (len(one.layers) > 1)} {named}" if one.layers else "its probabilities"
    return f"{one.n_values} NaN or infinite values, in {place}"


@dataclass(frozen=True)
class Failure:
    """Rows that are missing, and why."""

    partition: Place
    index: int
    n_rows: int
    error: str


@dataclass(frozen=True)
class Extracted:
    """What became of the shards of a directory."""

    partition: Place
    n_rows: int
    n_reused: int
    """Shards that were there already."""
    n_computed: int
    n_bytes: int
    failures: tuple[Failure, ...]
    set_aside: tuple[SetAside, ...] = ()
    """Rows that are not in their shards, whenever that was found, and why."""


Advance = Callable[[int, int, PoolStatus | None], None]
"""Told the finished shards, all shards, and what the pool is doing."""


P = TypeVar("P", bound=Part)


def extract_split(
    pool: Pool,
    split: PlannedSplit,
    root: Path,
    *,
    nonfinite: NonfinitePolicy = "fail",
    advance: Advance,
    stop: threading.Event,
) -> Extracted:
    """Compute the NEG shards of a split that are not there yet: see `compute`.

    A row that fails again and again, or kills its workers, is set aside, and so is one with numbers that are not
    finite if `nonfinite` is "skip". Shards that would be others under another policy are computed again under it.
    """

    def job(split: PlannedSplit, index: int) -> ExtractJob:
        shards = split.shards
        return ExtractJob(
            root,
            split.partition,
            split.identity,
            index,
            len(shards),
            shards[index],
            nonfinite,
            neurons=split.neurons,
        )

    def stands(receipt: Receipt) -> bool:
        has_skipped = any(row.cause == "nonfinite" for row in receipt.set_aside)
        return (nonfinite == "keep" or not receipt.n_nonfinite) and (nonfinite == "skip" or not has_skipped)

    (extracted,) = compute(pool, [split], root, job, stands=stands, advance=advance, stop=stop)
    return extracted


def compute(
    pool: Pool,
    parts: Sequence[P],
    root: Path,
    job_of: Callable[[P, int], Any],
    *,
    stands: Callable[[Receipt], bool] = lambda receipt: True,
    advance: Advance,
    stop: threading.Event,
) -> list[Extracted]:
    """Compute the shards of some directories that are not there yet, in one queue.

    Parameters
    ----------
    job_of : callable
        The job that computes and publishes a part's shard of that index; it has `partition`, `index` and `examples`.
        If it is `Divisible`, rows that make it fail are set aside.
    stands : callable, optional
        Whether a finished shard need not be computed again.

    Raises
    ------
    ShardError
        If a directory holds shards of another run.
    Stopped
        If `stop` is set; what is published by then stays.
    RunError
        If the run directory is full or cannot be written any more: what would be computed from then on is lost.
    """
    finished = {part.partition: _finished(root, part, stands) for part in parts}
    receipts = {place: dict(known) for place, known in finished.items()}
    failures: list[Failure] = []
    n_shards = sum(len(part.shards) for part in parts)

    def report(status: PoolStatus | None) -> None:
        advance(sum(map(len, receipts.values())) + len(failures), n_shards, status)

    jobs = [
        job_of(part, index)
        for part in parts
        for index in range(len(part.shards))
        if index not in finished[part.partition]
    ]
    report(None)
    with closing(map_isolating(pool, jobs, stop=stop, on_tick=report)) as outcomes:
        for outcome in outcomes if jobs else ():
            job = outcome.job
            if outcome.result is not None:
                receipts[job.partition][job.index] = outcome.result
            else:
                _check_place(root, outcome.exception)
                error = without_text(str(outcome.error), job.examples)
                failures.append(Failure(job.partition, job.index, len(job.examples), error))
            report(None)
    extracted = [
        _extracted(part.partition, len(finished[part.partition]), receipts[part.partition], failures) for part in parts
    ]
    for one in extracted:
        note_failures(root, one.partition, {failure.index: failure.error for failure in one.failures})
    return extracted


def _extracted(place: Place, n_reused: int, known: Mapping[int, Receipt], failures: Sequence[Failure]) -> Extracted:
    return Extracted(
        partition=place,
        n_rows=sum(receipt.n_rows for receipt in known.values()),
        n_reused=n_reused,
        n_computed=len(known) - n_reused,
        n_bytes=sum(receipt.n_bytes for receipt in known.values()),
        failures=tuple(failure for failure in failures if failure.partition == place),
        set_aside=tuple(row for _, receipt in sorted(known.items()) for row in receipt.set_aside),
    )


def _check_place(root: Path, error: Exception | None) -> None:
    """Stop where no shard can be written: the next ones would be computed for nothing.

    A bucket has no such end; there the disk that is full is one of a worker, where shards wait to be put.
    """
    if isinstance(error, OSError) and error.errno in _NO_PLACE and not is_remote(root):
        reason = os.strerror(error.errno)
        raise RunError(
            f"run directory {str(root)!r} takes no more shards ({reason}): finished ones are kept; make room there, or "
            "make it writable, and run the same command again"
        ) from error


def _finished(root: Path, part: Part, stands: Callable[[Receipt], bool]) -> dict[int, Receipt]:
    ids = [[example.id for example in shard] for shard in part.shards]
    known = finished_shards(root, part.partition, part.identity, ids)
    return {index: receipt for index, receipt in known.items() if stands(receipt)}
