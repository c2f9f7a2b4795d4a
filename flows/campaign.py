"""The campaign flow: take several models through several stages and compare them.

What goes wrong in one stage with one model is a problem of that part alone: all others go on.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prefect import flow, runtime
from prefect.task_runners import ThreadPoolTaskRunner

from flows import skills
from flows.flow_run import listed, noted, one_line, run_session, run_work, under_prefect
from flows.linearity import LinearityResults, run_linearity
from flows.pipeline import Results, n_parts, run_mceval8k
from flows.show.campaign_tables import artifact_tables, campaign_tables
from flows.show.report import RunResults, Section
from flows.stages import Stages
from negcore.errors import NegError
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
from tasks.config.run_file import (
    RUN_FILE,
    CampaignPart,
    CampaignRun,
    EvaluationRun,
    LinearityRun,
    SkillsRun,
    StageName,
    write_run_file,
)
from tasks.measure.missing import Extracted
from tasks.plan import plan
from tasks.plan_linearity import plan_linearity
from tasks.pool.base import Stopped
from tasks.skills import plan_skills


@dataclass
class CampaignResults(RunResults):
    """What a campaign produced, and what it could not: problems are named by model and stage."""

    comparison: Comparison = field(default_factory=Comparison)

    @property
    def sections(self) -> list[Section]:
        return [Section("", list(campaign_tables(self.comparison)))]


def _flow_run_name() -> str:
    run = CampaignRun.model_validate(runtime.flow_run.parameters["run"])
    return f"campaign {', '.join(run.stage)} of {listed(list(run.folders.values()))}"


@flow(  # type: ignore[untyped-decorator]
    name="campaign", flow_run_name=_flow_run_name, task_runner=ThreadPoolTaskRunner(max_workers=8)
)
def campaign(run: CampaignRun) -> CampaignResults:
    """Take several models through several stages and compare them."""
    return under_prefect(run_campaign, run)


def n_campaign_parts(run: CampaignRun) -> int:
    """Shards and steps of everything that can be planned: what a campaign's progress is counted in."""
    return sum(map(_n_parts, run.parts))


def _n_parts(part: CampaignPart) -> int:
    try:
        return _STAGES[part.stage].n_parts(part.run)
    except Exception:  # the campaign says so when it comes to this part
        return 0


@run_work
def run_campaign(run: CampaignRun, stages: Stages) -> CampaignResults:
    """Carry out every stage with every model, then compare what there is."""
    _write_run_files(run)
    results = CampaignResults(run.directory)
    compared: list[Compared] = []
    outcomes: list[OutcomeRow] = []
    with run_session(run):
        for part in run.parts:
            found, problems = _carry_out(part, stages, results)
            compared.append(found)
            outcomes.append(outcome(part, found, problems))
            results.problems += [f"{part.folder}, {part.stage}: {problem}" for problem in problems]
    results.comparison = compare(outcomes, compared)
    with noted(results):
        _publish(run, stages, results.comparison)
    return results


def _write_run_files(run: CampaignRun) -> None:
    """Those of the parts too, at once: who watches the directory sees what is to come."""
    write_run_file(run)
    for part in run.parts:
        if n_bytes(part.run.directory / RUN_FILE) is None:  # it may be another driver's by now
            write_run_file(part.run)


def _carry_out(part: CampaignPart, stages: Stages, results: CampaignResults) -> tuple[Compared, list[str]]:
    """What a part has for the comparison, and its problems."""
    stage = _STAGES[part.stage]
    try:
        done = stage.work(part.run, _own_stages(stages))
        results.extracted += done.extracted
        results.set_aside += _set_aside(part, done.extracted)
        return stage.compared(part.model, part.run, done), done.problems
    except (Stopped, KeyboardInterrupt):
        raise
    except NegError as error:
        return Compared(), [str(error)]
    except Exception as error:
        return Compared(), [one_line(error)]


def _set_aside(part: CampaignPart, extracted: Sequence[Extracted]) -> list[str]:
    rows = (row for one in extracted for row in one.set_aside)
    return list(dict.fromkeys(f"{part.folder}, {part.stage}: {row.id}: {row.reason}" for row in rows))


def _own_stages(stages: Stages) -> Stages:
    """The same stages for one part, which may stop its own work, but nobody else's."""
    own = copy.copy(stages)
    own.stop = _PartStop(stages.stop)
    return own


class _PartStop(threading.Event):
    """Set when its part or the whole campaign is to stop."""

    def __init__(self, whole: threading.Event) -> None:
        super().__init__()
        self._whole = whole

    def is_set(self) -> bool:
        return self._whole.is_set() or super().is_set()


class _Stage(NamedTuple):
    """How a stage is counted, carried out, and compared."""

    n_parts: Callable[[Any], int]
    work: Callable[[Any, Stages], Any]
    compared: Callable[[str, Any, Any], Compared]
    """Of a model, the stage's run and its results."""


def _n_evaluation_parts(run: EvaluationRun) -> int:
    return sum(n_parts(settings, plan(settings, tolerant=True)) for settings in run.settings)


def _n_linearity_parts(run: LinearityRun) -> int:
    return sum(study.n_shards for study in plan_linearity(run))


def _n_skills_parts(run: SkillsRun) -> int:
    return skills.n_parts(run, plan_skills(run))


def _evaluated(model: str, run: EvaluationRun, results: Results) -> Compared:
    return accuracy_rows(model, results.scores)


def _linear(model: str, run: LinearityRun, results: LinearityResults) -> Compared:
    (study,) = plan_linearity(run)
    return linearity_rows(model, results.findings[0], study.card.n_layers) if results.findings else Compared()


def _skilled(model: str, run: SkillsRun, results: skills.SkillResults) -> Compared:
    return skill_rows(model, results.findings[0]) if results.findings else Compared()


_STAGES: dict[StageName, _Stage] = {
    "mceval8k": _Stage(_n_evaluation_parts, run_mceval8k, _evaluated),
    "linearity": _Stage(_n_linearity_parts, run_linearity, _linear),
    "skills": _Stage(_n_skills_parts, skills.run_skills, _skilled),
}


def _publish(run: CampaignRun, stages: Stages, comparison: Comparison) -> None:
    """Write the comparison as Arrow tables and show it."""
    write_comparison(run, comparison)
    for key, (title, rows) in artifact_tables(comparison).items():
        stages.table(f"campaign-{key}", rows, title)
