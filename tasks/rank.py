"""Score all neurons of a training split on the pool: each job scores one block of layers."""

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from negcore.errors import RunError
from negcore.measure.votes import Vote
from negcore.probing.rankings import Rankings, rank_layers, training_scores
from negcore.store.publish import ShardPlace
from negcore.store.reader import NegSplit, open_negs
from tasks.config.run_file import RunFile
from tasks.pool.base import Pool, Resources
from tasks.pool.opening import open_pool
from tasks.steps import Step


@dataclass(frozen=True)
class RankJob:
    """Consecutive layers of a split to score."""

    root: Path
    place: ShardPlace
    first_layer: int
    end_layer: int
    votes: tuple[Vote, ...]
    act: bool
    sizes: tuple[int, ...]
    """Numbers of first rows to score; empty for all rows."""


class RankWorker:
    """A worker that needs neither a model nor a GPU: it reads one layer of one shard (or one vote's sums) at a time."""

    def run(self, job: RankJob) -> dict[int, Rankings]:
        """Score the job's layers, by number of rows; the result takes some bytes a neuron, whatever the prompts."""
        split = open_negs(job.root, verify=False).at(job.place)  # whoever made the job has read all of its bytes
        layers = range(job.first_layer, job.end_layer)
        if job.sizes:
            return training_scores(split, layers, job.votes, job.sizes)
        return {split.n_rows: rank_layers(split, layers, job.votes, act=job.act)}


def rank_pool(run: RunFile) -> AbstractContextManager[Pool]:
    """Open a pool of ranking workers beside those with models; they reserve no CPUs, as they mostly read files."""
    resources = Resources(workers=run.workers, cpus=0, job_timeout_s=run.job_timeout_s, address=run.ray_address)
    return open_pool(run.backend, RankWorker, {}, resources, label="ranking")


def rank_split(
    pool: Pool,
    root: Path,
    split: NegSplit,
    votes: Collection[Vote],
    step: Step,
    *,
    act: bool = False,
    sizes: Collection[int] = (),
    n_blocks: int,
) -> dict[int, Rankings]:
    """Score all neurons of a split by number of rows, in blocks of layers on the pool.

    Parameters
    ----------
    act : bool
        True to score activations too, if there are no `sizes`.
    sizes : collection of int
        Numbers of first rows; by default all rows alone.

    Raises
    ------
    RunError
        If a block cannot be scored.
    Stopped
        If the step is to stop.
    """
    whole = RankJob(root, split.place, 0, split.n_layers, tuple(votes), act, tuple(sizes))
    n_blocks = min(n_blocks, split.n_layers)
    ends = [split.n_layers * index // n_blocks for index in range(n_blocks + 1)]
    jobs = [replace(whole, first_layer=first, end_layer=end) for first, end in zip(ends, ends[1:], strict=False)]
    blocks: dict[int, dict[int, Rankings]] = {}
    for outcome in pool.map(jobs, stop=step.stop, on_tick=step.tick, tick_s=2.0):
        if outcome.result is None:
            layers = f"layers {outcome.job.first_layer}..{outcome.job.end_layer - 1}"
            raise RunError(f"{split.place.dataset}: {layers} cannot be ranked: {outcome.error}")
        blocks[outcome.job.first_layer] = outcome.result
    in_order = [blocks[first] for first in sorted(blocks)]
    return {size: Rankings.joined([block[size] for block in in_order]) for size in in_order[0]}
