"""Rank the neurons of a dataset."""

from tasks.config.dataset_runs import SkillsRun
from tasks.plan import PlannedDataset
from tasks.pool.base import Pool
from tasks.skills import NeuronScores, rank_dataset
from tasks.stages.task import step_task
from tasks.steps import Step


@step_task("rank")
def rank(step: Step, pool: Pool, run: SkillsRun, planned: PlannedDataset) -> NeuronScores:
    """Score all neurons under every condition, and on growing numbers of training rows."""
    scores = rank_dataset(pool, run, planned, step)
    step.report(1, 1)
    return scores
