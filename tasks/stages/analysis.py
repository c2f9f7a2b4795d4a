"""Analyse what was measured."""

from collections.abc import Mapping

from negcore.model.language_model import ModelCard
from tasks.config.dataset_runs import SkillsRun
from tasks.config.linearity_run import LinearityRun
from tasks.linearity import Findings, analyse
from tasks.measure.shard_set import ShardSet
from tasks.plan import PlannedDataset
from tasks.plan_linearity import PlannedStudy
from tasks.skills import DatasetFindings, NeuronScores, analyse_dataset
from tasks.stages.task import step_task
from tasks.steps import Step


@step_task("analysis")
def analyse_study(step: Step, run: LinearityRun, study: PlannedStudy) -> Findings:
    """Make the tables of a linearity study."""
    return analyse(run, study)


@step_task("analysis")
def analyse_skills(
    step: Step,
    run: SkillsRun,
    planned: PlannedDataset,
    card: ModelCard,
    scores: NeuronScores,
    checks: Mapping[str, ShardSet],
    curves: Mapping[str, ShardSet],
) -> DatasetFindings:
    """Make the tables of a dataset's skill neurons."""
    findings = analyse_dataset(run, planned, card, scores, checks, curves)
    step.report(1, 1)
    return findings
