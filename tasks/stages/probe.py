"""Probe a dataset."""

from tasks.config.dataset_runs import SkillRun
from tasks.plan import PlannedDataset
from tasks.probe import Probed, Prober
from tasks.stages.task import step_task
from tasks.steps import Step


@step_task("probe")
def probe(step: Step, prober: Prober, run: SkillRun, planned: PlannedDataset) -> Probed:
    """Fit the probes of a run to a dataset and score them on its test split."""
    return prober.probe(run, planned, step)
