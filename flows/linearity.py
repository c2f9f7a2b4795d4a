"""The linearity flow: sweep neurons, compute every estimator for them, compare, and write tables and figures."""

from dataclasses import dataclass, field
from functools import cached_property

from flows.flow_run import attempt, fitted, noted, run_session, run_work
from flows.prefect_flows import prefect_flow
from flows.show.linearity_figures import linearity_figures
from flows.show.linearity_tables import linearity_tables, summary
from flows.show.report import RunResults, Section
from flows.show.sentences import linearity_sentences
from negcore.errors import ModelError, RunError
from tasks.config.linearity_run import LinearityRun
from tasks.config.run_file import write_run_file
from tasks.forecast.needs import least_needs
from tasks.linearity import Findings, write_findings
from tasks.measure.worker import model_pool
from tasks.plan_linearity import PlannedStudy, plan_linearity
from tasks.pool.base import Pool
from tasks.rundir.layout import write_plan_file
from tasks.stages.analysis import analyse_study
from tasks.stages.measure import measure
from tasks.steps import Steps

_KINDS = ("interventions", "estimates", "sweeps")
"""Cheapest first."""


@dataclass
class LinearityResults(RunResults):
    """The results of linearity studies, and their problems."""

    findings: list[Findings] = field(default_factory=list)

    @cached_property
    def sections(self) -> list[Section]:
        return [
            Section(
                summary(one),
                linearity_tables(one),
                figures=linearity_figures(one),
                sentences=list(linearity_sentences(one)),
                folder="linearity/figures",
            )
            for one in self.findings
        ]


linearity = prefect_flow("linearity")
"""By this name, deployments that were registered earlier find the flow."""


@run_work
def run_linearity(run: LinearityRun, steps: Steps) -> LinearityResults:
    """Measure what is missing, then analyse every model that is whole."""
    studies = steps.planned(plan_linearity, run)
    results = LinearityResults(run.directory)
    results.problems += studies.problems
    results.warnings += [study.warning for study in studies if study.warning]
    with run_session(run):
        run = fitted(
            run, lambda _: [least_needs(study.card, run.dtype) for study in studies], [run.directory], steps, results
        )
        write_run_file(run)
        write_plan_file(run.directory, [one for study in studies for one in study.shard_sets])
        measured = [study for study in studies if _measure_study(run, steps, results, study)]
    for study in measured:
        _analyse(run, steps, results, study)
    if results.findings:
        with noted(results):
            write_findings(run, results.findings)
    return results


def _measure_study(run: LinearityRun, steps: Steps, results: LinearityResults, study: PlannedStudy) -> bool:
    """Measure a study, and tell whether every shard is there now."""
    try:
        with model_pool(run, study.card) as pool:
            complete = [_measure(run, steps, results, study, pool, kind) for kind in _KINDS]
    except (ModelError, RunError) as error:  # no worker can have this model; the others go on
        results.problems.append(f"{study.card.name}: {error}")
        return False
    return all(complete)


def _measure(
    run: LinearityRun, steps: Steps, results: LinearityResults, study: PlannedStudy, pool: Pool, kind: str
) -> bool:
    name = f"{study.card.name} {study.facts.name} {kind}"
    args = (pool, study.of_kind(kind), run.directory)
    measured = attempt(steps, results, measure, name, *args, ends=(ModelError, RunError))
    for one in measured or ():
        results.add(one)
    return measured is not None and not any(one.failures for one in measured)


def _analyse(run: LinearityRun, steps: Steps, results: LinearityResults, study: PlannedStudy) -> None:
    name = f"{study.card.name} {study.facts.name} analysis"
    findings = attempt(steps, results, analyse_study, name, run, study)
    if findings is not None:
        results.findings.append(findings)
