"""Measure sweeps, estimates and interventions of a linearity study, or the causal checks of a dataset's rankings."""

from collections.abc import Sequence
from pathlib import Path

from tasks.measure.missing import Extracted, measure_missing
from tasks.measure.shard_set import ShardSet
from tasks.pool.base import Pool
from tasks.stages.task import step_task
from tasks.steps import Step


@step_task("measure")
def measure(step: Step, pool: Pool, shard_sets: Sequence[ShardSet], root: Path) -> list[Extracted]:
    """Measure the shards of some sets that are missing."""
    return measure_missing(pool, shard_sets, root, step)
