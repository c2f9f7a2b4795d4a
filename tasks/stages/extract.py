"""Extract the NEGs of a split."""

from pathlib import Path

from tasks.measure.missing import Extracted, measure_missing
from tasks.measure.shard_set import ShardSet
from tasks.pool.base import Pool
from tasks.stages.task import step_task
from tasks.steps import Step


@step_task("extract")
def extract(step: Step, pool: Pool, split: ShardSet, root: Path, turn: int) -> Extracted:
    """Measure the NEG shards of a split that are missing, behind those of splits with a lower turn."""
    (extracted,) = measure_missing(pool, [split], root, step, turn)
    return extracted
