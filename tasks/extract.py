"""Compute and publish the NEG shards of a split: the worker, its jobs, and the loop that hands them out."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from negcore.architectures import Dtype, SiteChoice
from negcore.datasets import Example
from negcore.gradients import neurgrad
from negcore.identity import RunIdentity
from negcore.models import load_model
from negcore.shards import Partition, Place, Receipt, finished_shards, write_shard
from tasks.plan import PlannedSplit
from tasks.pool import Pool, PoolStatus


@dataclass(frozen=True)
class ExtractJob:
    """One shard to compute."""

    root: Path
    partition: Partition
    identity: RunIdentity
    index: int
    n_shards: int
    examples: Sequence[Example]


class ExtractWorker:
    """Loads a model once and computes shards with it; becomes an actor only in the pool."""

    def __init__(
        self, model: str, *, dtype: Dtype, device: str | None, site: SiteChoice, batch_size: int | None, threads: int
    ) -> None:
        # The number of threads decides how sums are split, so it is part of what makes results repeatable.
        torch.set_num_threads(threads)
        self._lm = load_model(model, dtype=dtype, device=device, site=site)
        self._batch_size = batch_size

    def run(self, job: ExtractJob) -> Receipt:
        """Compute one shard, publish it and return its receipt."""
        batch = neurgrad(
            self._lm,
            [example.prompt for example in job.examples],
            [example.labels for example in job.examples],
            batch_size=self._batch_size,
        )
        return write_shard(
            job.root,
            job.partition,
            job.index,
            job.n_shards,
            identity=job.identity,
            examples=job.examples,
            label_ids_PO=batch.label_ids_PO,
            negs_POLN=batch.negs_POLN,
            activations_PLN=batch.activations_PLN,
            probs_PO=batch.probs_PO,
        )


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


Advance = Callable[[int, int, PoolStatus | None], None]
"""Told the finished shards, all shards, and what the pool is doing."""


class Part(Protocol):
    """The shards of one directory, planned."""

    @property
    def partition(self) -> Place: ...
    @property
    def identity(self) -> RunIdentity: ...
    @property
    def shards(self) -> Sequence[Sequence[Example]]: ...


P = TypeVar("P", bound=Part)


def extract_split(pool: Pool, split: PlannedSplit, root: Path, *, advance: Advance, stop: threading.Event) -> Extracted:
    """Compute the NEG shards of a split that are not there yet: see `compute`."""

    def job(split: PlannedSplit, index: int) -> ExtractJob:
        shards = split.shards
        return ExtractJob(root, split.partition, split.identity, index, len(shards), shards[index])

    (extracted,) = compute(pool, [split], root, job, advance=advance, stop=stop)
    return extracted


def compute(
    pool: Pool,
    parts: Sequence[P],
    root: Path,
    job_of: Callable[[P, int], Any],
    *,
    advance: Advance,
    stop: threading.Event,
) -> list[Extracted]:
    """Compute the shards of some directories that are not there yet, in one queue.

    Parameters
    ----------
    job_of : callable
        The job that computes and publishes a part's shard of that index; it has `partition`, `index` and `examples`.

    Raises
    ------
    ShardError
        If a directory holds shards of another run.
    Stopped
        If `stop` is set; what is published by then stays.
    """
    finished = {
        part.partition: finished_shards(root, part.partition, part.identity, [[e.id for e in s] for s in part.shards])
        for part in parts
    }
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
    for outcome in pool.map(jobs, stop=stop, on_tick=report, tick_s=2.0) if jobs else ():
        job = outcome.job
        if outcome.result is not None:
            receipts[job.partition][job.index] = outcome.result
        else:
            failures.append(Failure(job.partition, job.index, len(job.examples), str(outcome.error)))
        report(None)
    return [
        Extracted(
            partition=part.partition,
            n_rows=sum(receipt.n_rows for receipt in receipts[part.partition].values()),
            n_reused=len(finished[part.partition]),
            n_computed=len(receipts[part.partition]) - len(finished[part.partition]),
            n_bytes=sum(receipt.n_bytes for receipt in receipts[part.partition].values()),
            failures=tuple(failure for failure in failures if failure.partition == part.partition),
        )
        for part in parts
    ]
