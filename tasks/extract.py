"""Compute and publish the NEG shards of a split: the worker, its jobs, and the loop that hands them out."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from negcore.architectures import Dtype, SiteChoice
from negcore.datasets import Example
from negcore.gradients import neurgrad
from negcore.identity import RunIdentity
from negcore.models import load_model
from negcore.shards import Partition, Receipt, finished_shards, write_shard
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

    partition: Partition
    index: int
    n_rows: int
    error: str


@dataclass(frozen=True)
class Extracted:
    """What became of a split."""

    partition: Partition
    n_rows: int
    n_reused: int
    """Shards that were there already."""
    n_computed: int
    n_bytes: int
    failures: tuple[Failure, ...]


Advance = Callable[[int, int, PoolStatus | None], None]
"""Told the finished shards, all shards, and what the pool is doing."""


def extract_split(pool: Pool, split: PlannedSplit, root: Path, *, advance: Advance, stop: threading.Event) -> Extracted:
    """Compute the shards of a split that are not there yet.

    Raises
    ------
    ShardError
        If the directory holds shards of another run.
    Stopped
        If `stop` is set; what is published by then stays.
    """
    shards = split.shards
    finished = finished_shards(root, split.partition, split.identity, [[e.id for e in shard] for shard in shards])
    receipts = dict(finished)
    failures: list[Failure] = []

    def tick(status: PoolStatus) -> None:
        advance(len(receipts) + len(failures), len(shards), status)

    jobs = [
        ExtractJob(root, split.partition, split.identity, index, len(shards), examples)
        for index, examples in enumerate(shards)
        if index not in finished
    ]
    advance(len(receipts), len(shards), None)
    for outcome in pool.map(jobs, stop=stop, on_tick=tick, tick_s=2.0) if jobs else ():
        job = outcome.job
        if outcome.result is not None:
            receipts[job.index] = outcome.result
        else:
            failures.append(Failure(job.partition, job.index, len(job.examples), str(outcome.error)))
        advance(len(receipts) + len(failures), len(shards), None)
    return Extracted(
        partition=split.partition,
        n_rows=sum(receipt.n_rows for receipt in receipts.values()),
        n_reused=len(finished),
        n_computed=len(receipts) - len(finished),
        n_bytes=sum(receipt.n_bytes for receipt in receipts.values()),
        failures=tuple(failures),
    )
