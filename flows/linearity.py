"""The linearity flow: sweep neurons, compute every estimator for them, compare, and write tables and figures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flows.flow_run import noted, one_line, run_session, run_work
from flows.prefect_flows import prefect_flow
from flows.show.linearity_figures import write_figures
from flows.show.linearity_tables import artifact_tables, linearity_tables, summary
from flows.show.report import RunResults, Section
from flows.stages import Stages
from negcore.errors import ModelError, NegError, RunError
from tasks.config.linearity_run import LinearityRun
from tasks.config.run_file import write_run_file
from tasks.linearity import Findings, analyse, write_findings
from tasks.measure.missing import Advance, Extracted, measure_missing
from tasks.measure.worker import model_pool
from tasks.plan_linearity import PlannedStudy, plan_linearity
from tasks.pool.base import Pool, Stopped
from tasks.rundir.layout import write_plan_file

_KINDS = ("interventions", "estimates", "sweeps")
"""Cheapest first."""


@dataclass
class LinearityResults(RunResults):
    """What a study produced, and what it could not."""

    findings: list[Findings] = field(default_factory=list)
    figures: dict[str, list[Path]] = field(default_factory=dict)
    """By model, SVG before PNG."""

    @property
    def sections(self) -> list[Section]:
        return [Section(summary(one), linearity_tables(one), self.figures.get(one.model, ())) for one in self.findings]


linearity = prefect_flow("linearity")
"""By this name, deployments that were registered earlier find the flow."""


@run_work
def run_linearity(run: LinearityRun, stages: Stages) -> LinearityResults:
    """Measure what is missing, then analyse every model that is whole."""
    studies = plan_linearity(run)
    write_run_file(run)
    write_plan_file(run.directory, [one for study in studies for one in study.shard_sets])
    results = LinearityResults(run.directory)
    with run_session(run):
        measured = [study for study in studies if _measure_study(run, stages, results, study)]
    for study in measured:
        _analyse(run, stages, results, study)
    if results.findings:
        with noted(results):
            _publish(run, stages, results)
    return results


def _measure_study(run: LinearityRun, stages: Stages, results: LinearityResults, study: PlannedStudy) -> bool:
    """Whether every shard of the study is there now."""
    try:
        with model_pool(run, study.card) as pool:
            complete = [_measure(run, stages, results, study, pool, kind) for kind in _KINDS]
    except (ModelError, RunError) as error:  # no worker can have this model; the others go on
        results.problems.append(f"{study.card.name}: {error}")
        return False
    return all(complete)


def _measure(
    run: LinearityRun, stages: Stages, results: LinearityResults, study: PlannedStudy, pool: Pool, kind: str
) -> bool:
    name = f"{study.card.name} {study.facts.name} {kind}"
    try:
        extracted = stages.run(name, kind, _computation(run, stages, study, pool, kind))
    except (Stopped, KeyboardInterrupt, ModelError, RunError):
        raise
    except Exception as error:
        results.problems.append(f"{name}: {one_line(error)}")
        return False
    results.extracted += extracted
    results.set_aside += [row for one in extracted for row in one.rows_set_aside]
    problems = [problem for one in extracted for problem in one.problems]
    results.problems += problems
    return not problems


def _computation(
    run: LinearityRun, stages: Stages, study: PlannedStudy, pool: Pool, kind: str
) -> Callable[[Advance], list[Extracted]]:
    return lambda advance: measure_missing(pool, study.of_kind(kind), run.directory, advance=advance, stop=stages.stop)


def _analyse(run: LinearityRun, stages: Stages, results: LinearityResults, study: PlannedStudy) -> None:
    name = f"{study.card.name} {study.facts.name} analysis"

    def body(advance: Advance) -> Findings:
        return analyse(run, study)

    try:
        results.findings.append(stages.run(name, "analysis", body))
    except NegError as error:
        results.problems.append(f"{name}: {error}")


def _publish(run: LinearityRun, stages: Stages, results: LinearityResults) -> None:
    folder = write_findings(run, results.findings)
    for findings in results.findings:
        results.figures[findings.model] = write_figures(findings, folder / "figures")
        for key, (title, rows) in artifact_tables(findings).items():
            stages.table(f"{key}-{findings.model}", rows, title)
