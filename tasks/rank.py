"""Score all neurons of a training split on the pool, and rank them in samples of its rows, in blocks of layers."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negcore.analysis.neurons import neurons_ahead, scores_in_samples
from negcore.arrays import Ints
from negcore.errors import RunError
from negcore.measure.votes import Vote
from negcore.probing.rankings import Rankings, rank_layers, training_scores
from negcore.store.publish import ShardPlace
from negcore.store.reader import NegSplit, open_negs
from tasks.config.run_file import RunFile
from tasks.machine import cores
from tasks.pool.base import Pool, Resources
from tasks.pool.opening import open_pool
from tasks.steps import Step


@dataclass(frozen=True)
class LayersJob:
    """Consecutive layers of a split to work on."""

    root: Path
    place: ShardPlace
    first_layer: int
    end_layer: int
    gold_P: NDArray[np.int16] | None = field(default=None, kw_only=True)
    """Gold options in place of those in the shards, if there are such."""

    @property
    def split(self) -> NegSplit:
        split = open_negs(self.root, verify=False).at(self.place)  # whoever made the job has read all of its bytes
        return split if self.gold_P is None else split.with_gold(self.gold_P)

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.end_layer)

    def work(self) -> Any:
        """Do the job; the result takes some bytes a neuron, whatever the prompts."""
        raise NotImplementedError


@dataclass(frozen=True)
class RankJob(LayersJob):
    """Layers whose neurons to score: the result is their `Rankings` by number of rows."""

    votes: tuple[Vote, ...]
    act: bool
    sizes: tuple[int, ...]
    """Numbers of first rows to score; empty for all rows."""

    def work(self) -> dict[int, Rankings]:
        split = self.split
        if self.sizes:
            return training_scores(split, self.layers, self.votes, self.sizes)
        return {split.n_rows: rank_layers(split, self.layers, self.votes, act=self.act)}


@dataclass(frozen=True)
class AheadJob(LayersJob):
    """Layers whose neurons to count that rank before chosen ones in samples of the rows: see `neurons_ahead`."""

    tops: Mapping[Vote, Ints]
    seed: int

    def work(self) -> dict[Vote, Ints]:
        return neurons_ahead(self.split, self.layers, self.tops, seed=self.seed)


@dataclass(frozen=True)
class SampleJob(LayersJob):
    """Layers whose neurons to score in samples of the rows: see `scores_in_samples`."""

    vote: Vote
    counts_BP: Ints
    """Number of times that each row is in each sample."""

    def work(self) -> Ints:
        return scores_in_samples(self.split, self.layers, self.vote, self.counts_BP)


class RankWorker:
    """A worker that needs neither a model nor a GPU: it reads one layer of one shard (or one vote's sums) at a time."""

    def run(self, job: LayersJob) -> Any:
        return job.work()


def ranking_workers(run: RunFile) -> int:
    """Return the number of workers that rank neurons: those with models, or one a core if these are as few as GPUs."""
    return run.workers if run.workers and not run.gpus else max(run.workers or 1, cores())


def rank_pool(run: RunFile) -> AbstractContextManager[Pool]:
    """Open a pool of ranking workers beside those with models; they reserve no CPUs, as they mostly read files."""
    resources = Resources(
        workers=ranking_workers(run), cpus=0, job_timeout_s=run.job_timeout_s, address=run.ray_address
    )
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
    layers = (0, split.n_layers)
    whole = RankJob(root, split.place, *layers, tuple(votes), act, tuple(sizes), gold_P=split.replaced_gold_P)
    in_order: list[dict[int, Rankings]] = _in_blocks(pool, whole, n_blocks, step)
    return {size: Rankings.joined([block[size] for block in in_order]) for size in in_order[0]}


def count_ahead(
    pool: Pool, root: Path, split: NegSplit, tops: Mapping[Vote, Ints], step: Step, *, seed: int, n_blocks: int
) -> dict[Vote, Ints]:
    """Count all neurons that rank before chosen ones in samples of the rows, in blocks of layers on the pool.

    Parameters
    ----------
    tops : mapping of Vote to array of int, shape (K,)
        Flat indices of the chosen neurons.

    Raises
    ------
    RunError
        If a block cannot be ranked.
    Stopped
        If the step is to stop.
    """
    whole = AheadJob(root, split.place, 0, split.n_layers, tops, seed)
    blocks: list[dict[Vote, Ints]] = _in_blocks(pool, whole, n_blocks, step)
    return {vote: sum((block[vote] for block in blocks[1:]), blocks[0][vote]) for vote in blocks[0]}


def sample_scores(
    pool: Pool, root: Path, split: NegSplit, vote: Vote, step: Step, *, counts_BP: Ints, n_blocks: int
) -> Ints:
    """Score all neurons in samples of the rows, in blocks of layers on the pool: int32 (samples, neurons).

    Parameters
    ----------
    counts_BP : array of int, shape (samples, rows)
        Number of times that each row is in each sample.

    Raises
    ------
    RunError
        If a block cannot be scored.
    Stopped
        If the step is to stop.
    """
    whole = SampleJob(root, split.place, 0, split.n_layers, vote, counts_BP)
    return np.concatenate(_in_blocks(pool, whole, n_blocks, step), axis=1)


def _in_blocks(pool: Pool, whole: LayersJob, n_blocks: int, step: Step) -> list[Any]:
    """Cut a job of all layers into blocks, and return their results in the order of the layers."""
    n_blocks = min(n_blocks, whole.end_layer)
    ends = [whole.end_layer * index // n_blocks for index in range(n_blocks + 1)]
    jobs = [replace(whole, first_layer=first, end_layer=end) for first, end in zip(ends, ends[1:], strict=False)]
    blocks: dict[int, Any] = {}
    for outcome in pool.map(jobs, stop=step.stop, on_tick=step.tick, tick_s=2.0):
        if outcome.result is None:
            layers = f"layers {outcome.job.first_layer}..{outcome.job.end_layer - 1}"
            raise RunError(f"{whole.place.dataset}: {layers} cannot be ranked: {outcome.error}")
        blocks[outcome.job.first_layer] = outcome.result
    return [blocks[first] for first in sorted(blocks)]
