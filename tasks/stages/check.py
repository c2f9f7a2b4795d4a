"""Check the rankings of a dataset causally."""

from collections.abc import Sequence
from pathlib import Path

from tasks.measure.missing import Extracted, measure_missing
from tasks.measure.shard_set import ShardSet
from tasks.pool.base import Pool
from tasks.stages.task import step_task
from tasks.steps import Step


@step_task("check")
def check(step: Step, pool: Pool, checks: Sequence[ShardSet], root: Path) -> list[Extracted]:
    """Measure the shards of causal checks that are missing."""
    return measure_missing(pool, checks, root, step)
