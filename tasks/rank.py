"""Score all neurons of a training split on the pool: a job a block of layers, whose result is its score vectors."""

import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from negcore.errors import RunError
from negcore.rankings import Rankings, Vote, rank_layers
from negcore.reader import NegSplit, open_negs
from negcore.shards import Partition
from tasks.pool import Pool, PoolStatus, Resources, open_pool
from tasks.runfile import RunFile


@dataclass(frozen=True)
class RankJob:
    """Consecutive layers of a split to score."""

    root: Path
    partition: Partition
    first_layer: int
    end_layer: int
    votes: tuple[Vote, ...]
    act: bool


class RankWorker:
    """Reads one layer of one shard at a time; needs neither a model nor a GPU."""

    def run(self, job: RankJob) -> Rankings:
        """Scores of the job's layers: some bytes a neuron, whatever the number of prompts."""
        split = open_negs(job.root).select(*job.partition)
        return rank_layers(split, range(job.first_layer, job.end_layer), job.votes, act=job.act)


def rank_pool(run: RunFile) -> AbstractContextManager[Pool]:
    """Workers for ranking beside those that hold models: they reserve nothing, as they mostly read files."""
    resources = Resources(workers=run.workers, cpus=0, job_timeout_s=run.job_timeout_s, address=run.ray_address)
    return open_pool(run.backend, RankWorker, {}, resources, label="ranking")


def rank_split(
    pool: Pool,
    root: Path,
    split: NegSplit,
    votes: Collection[Vote],
    *,
    act: bool,
    n_blocks: int,
    stop: threading.Event,
    on_tick: Callable[[PoolStatus], None] | None = None,
) -> Rankings:
    """Scores of all neurons, from blocks of layers scored on the pool.

    Raises
    ------
    RunError
        If a block cannot be scored.
    Stopped
        If `stop` is set.
    """
    n_blocks = min(n_blocks, split.n_layers)
    ends = [split.n_layers * index // n_blocks for index in range(n_blocks + 1)]
    jobs = [
        RankJob(root, split.partition, first, end, tuple(votes), act)
        for first, end in zip(ends, ends[1:], strict=False)
    ]
    blocks: dict[int, Rankings] = {}
    for outcome in pool.map(jobs, stop=stop, on_tick=on_tick, tick_s=2.0):
        if outcome.result is None:
            layers = f"layers {outcome.job.first_layer}..{outcome.job.end_layer - 1}"
            raise RunError(f"{split.partition.dataset}: {layers} cannot be ranked: {outcome.error}")
        blocks[outcome.job.first_layer] = outcome.result
    return Rankings.joined([blocks[first] for first in sorted(blocks)])
