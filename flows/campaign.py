"""The campaign flow: take several models through several studies and compare them.

An error in one study of one model is a problem of that step alone: all others go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from flows.flow_run import noted, run_session, run_work
from flows.linearity import LinearityResults
from flows.pipeline import Results
from flows.prefect_flows import prefect_flow
from flows.show.accuracy_figures import model_forests
from flows.show.campaign_tables import campaign_tables
from flows.show.report import RunResults, Section
from flows.show.sentences import campaign_sentences
from flows.show.training_figure import training_figures
from flows.skills import SkillResults
from negcore.errors import NegError, typed_line
from negcore.store.files import n_bytes
from tasks.campaign import (
    Compared,
    Comparison,
    OutcomeRow,
    accuracy_rows,
    compare,
    linearity_rows,
    outcome,
    skill_rows,
    write_comparison,
)
from tasks.config.campaign_run import CampaignRun, CampaignStep
from tasks.config.dataset_runs import EvaluationRun, SkillsRun
from tasks.config.kinds import RUN_KINDS, load
from tasks.config.linearity_run import LinearityRun
from tasks.config.run_file import RUN_FILE, write_run_file
from tasks.measure.missing import Extracted
from tasks.neg_profiles import neg_profiles
from tasks.pool.base import Stopped
from tasks.steps import Steps


@dataclass
class CampaignResults(RunResults):
    """The comparison of a campaign, and its problems, named by model and study."""

    comparison: Comparison = field(default_factory=Comparison)

    @cached_property
    def sections(self) -> list[Section]:
        found = self.comparison
        return [
            Section(
                title="",
                tables=list(campaign_tables(found)),
                figures=[*model_forests(found.accuracy, found.names), *training_figures(found)],
                sentences=list(campaign_sentences(found)),
                folder="campaign/figures",
            )
        ]


campaign = prefect_flow("campaign")
"""By this name, deployments that were registered earlier find the flow."""


def plan_campaign(run: CampaignRun) -> list[int]:
    """Plan every step of a campaign and return how many steps of its own each has.

    A step that cannot be planned has none: the campaign names the reason when it comes to that step.
    """
    return [_n_steps(step) for step in run.steps]


def _n_steps(step: CampaignStep) -> int:
    try:
        return RUN_KINDS[step.study].n_steps(step.run)
    except Exception:
        return 0


def count_campaign_steps(run: CampaignRun, n_steps: Sequence[int]) -> int:
    """Return the number of steps of everything that can be planned."""
    return sum(n_steps)


@run_work
def run_campaign(run: CampaignRun, steps: Steps) -> CampaignResults:
    """Carry out every study of every model, then compare what there is."""
    _write_run_files(run)
    results = CampaignResults(run.directory)
    compared: list[Compared] = []
    outcomes: list[OutcomeRow] = []
    with run_session(run):
        for step in run.steps:
            found, problems = _carry_out(step, steps, results)
            compared.append(found)
            outcomes.append(outcome(step, found, problems))
            results.problems += [f"{step.folder}, {step.study}: {problem}" for problem in problems]
    profiles = neg_profiles(run.steps)
    results.warnings += profiles.warnings
    results.comparison = compare(outcomes, compared, profiles.rows)
    with noted(results):
        write_comparison(run, results.comparison)
    return results


def _write_run_files(run: CampaignRun) -> None:
    """Write the run files of all steps at once: whoever watches the directory sees what is to come."""
    write_run_file(run)
    for step in run.steps:
        if n_bytes(step.run.directory / RUN_FILE) is None:  # it may be another driver's by now
            write_run_file(step.run)


def _carry_out(step: CampaignStep, steps: Steps, results: CampaignResults) -> tuple[Compared, list[str]]:
    """Carry out a step, and return its rows of the comparison and its problems."""
    kind = RUN_KINDS[step.study]
    try:
        done = load(kind.work)(step.run, steps.part())
        results.extracted += done.extracted
        results.set_aside += _set_aside(step, done.extracted)
        results.warnings += [f"{step.folder}, {step.study}: {warning}" for warning in done.warnings]
        return load(kind.compare)(step.model, step.run, done), done.problems
    except (Stopped, KeyboardInterrupt):
        raise
    except NegError as error:
        return Compared(), [f"{error}"]
    except Exception as error:
        return Compared(), [typed_line(error)]


def _set_aside(step: CampaignStep, extracted: Sequence[Extracted]) -> list[str]:
    lines = (line for one in extracted for line in one.named_set_aside())
    return list(dict.fromkeys(f"{step.folder}, {step.study}: {line}" for line in lines))


def compare_accuracy(model: str, run: EvaluationRun, results: Results) -> Compared:
    """Return the mean accuracies of a model."""
    return accuracy_rows(model, results.scores)


def compare_linearity(model: str, run: LinearityRun, results: LinearityResults) -> Compared:
    """Return how linear a model is, as a whole and by depth."""
    return linearity_rows(model, results.findings[0]) if results.findings else Compared()


def compare_skills(model: str, run: SkillsRun, results: SkillResults) -> Compared:
    """Return where in depth the skill neurons of a model are."""
    return skill_rows(model, results.findings[0]) if results.findings else Compared()
