"""The table of run kinds: everything that the command line, `neg serve`, campaigns and repair need to know of one.

The rows name classes and functions as ``module:name``. A module is imported when a run of its kind is carried out, so
that the command line starts without the heavy ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from inspect import cleandoc
from pkgutil import resolve_name
from typing import Any

from tasks.config.run_file import RunFile, kind_of


@dataclass(frozen=True)
class RunKind:
    """A kind of run: a command, a Prefect flow and, if it has something to compare, a study of a campaign."""

    run_file: str
    """Class of its run file. The fields are the options of the command."""
    plan: str
    """Function of the run that checks what can be checked beforehand, and returns what will be done."""
    work: str
    """Function of the run and its `tasks.steps.Steps` that carries it out and returns its results."""
    count_steps: str = f"{__name__}:count_shards"
    """Function of the run and its plan that returns the number of steps that the progress bar counts."""
    repair: str = ""
    """Function of the run that returns its `flows.repair.Repair`. By default the run is carried out once more."""
    compare: str = ""
    """Function of model, run and results that returns the rows that a campaign compares (`tasks.campaign.Compared`)."""
    help: str = ""
    """Help of the command. By default the docstring of the run file's class."""

    @property
    def run_class(self) -> type[RunFile]:
        """The class of the run file."""
        return load(self.run_file)  # type: ignore[no-any-return]

    @property
    def summary(self) -> str:
        """The first line of the help."""
        return self.full_help.partition("\n")[0]

    @property
    def full_help(self) -> str:
        """The help of the command, without indentation."""
        return cleandoc(self.help or self.run_class.__doc__ or "")

    def n_steps(self, run: RunFile) -> int:
        """Plan a run ahead and count its steps."""
        from tasks.steps import plan_ahead

        return load(self.count_steps)(run, plan_ahead(load(self.plan), run))  # type: ignore[no-any-return]


RUN_KINDS = {
    "pipeline": RunKind(
        run_file="tasks.config.dataset_runs:SkillRun",
        plan="tasks.plan:plan",
        count_steps="flows.pipeline:count_pipeline_steps",
        work="flows.pipeline:run_pipeline",
        repair="flows.repair:repair_extraction",
    ),
    "extract": RunKind(
        run_file="tasks.config.dataset_runs:SkillRun",
        plan="tasks.plan:plan",
        count_steps="flows.pipeline:count_extract_steps",
        work="flows.pipeline:run_extract",
        help="""Compute the NEG of every neuron for every option and write Arrow shards.

        Example: `neg extract --model smollm2-135m --dataset mini/fact --out runs/facts`
        """,
    ),
    "probe": RunKind(
        run_file="tasks.config.dataset_runs:SkillRun",
        plan="tasks.plan:plan",
        count_steps="flows.pipeline:count_probe_steps",
        work="flows.pipeline:run_probe",
        help="""Fit and score probes on shards that `neg extract` wrote.

        Example: `neg probe runs/facts --probe magn`
        """,
    ),
    "mceval8k": RunKind(
        run_file="tasks.config.dataset_runs:EvaluationRun",
        plan="flows.pipeline:plan_mceval8k",
        count_steps="flows.pipeline:count_mceval8k_steps",
        work="flows.pipeline:run_mceval8k",
        repair="flows.repair:refuse_repair",
        compare="flows.campaign:compare_accuracy",
    ),
    "linearity": RunKind(
        run_file="tasks.config.linearity_run:LinearityRun",
        plan="tasks.plan_linearity:plan_linearity",
        work="flows.linearity:run_linearity",
        compare="flows.campaign:compare_linearity",
    ),
    "skills": RunKind(
        run_file="tasks.config.dataset_runs:SkillsRun",
        plan="tasks.skills:plan_skills",
        count_steps="flows.skills:count_skills_steps",
        work="flows.skills:run_skills",
        compare="flows.campaign:compare_skills",
    ),
    "campaign": RunKind(
        run_file="tasks.config.campaign_run:CampaignRun",
        plan="flows.campaign:plan_campaign",
        count_steps="flows.campaign:count_campaign_steps",
        work="flows.campaign:run_campaign",
        repair="flows.repair:refuse_repair",
    ),
}
"""By command. `extract` and `probe` share the run files of `pipeline`, so each can continue the others' directory."""


def count_shards(run: RunFile, planned: Iterable[Any]) -> int:
    """Return the number of shards of all models."""
    return sum(of_model.n_shards for of_model in planned)


def load(name: str) -> Any:
    """Import a class or function that a row names."""
    return resolve_name(name)


def run_classes() -> dict[str, type[RunFile]]:
    """Return the classes of run files by the `kind` that they write."""
    classes = dict.fromkeys(row.run_class for row in RUN_KINDS.values())
    return {kind_of(one): one for one in classes}


def studies() -> dict[str, type[RunFile]]:
    """Return the classes of the run files that a campaign can carry out, by command."""
    return {name: row.run_class for name, row in RUN_KINDS.items() if row.compare}
