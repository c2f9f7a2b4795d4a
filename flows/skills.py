"""The skills flow: ask datasets in several ways, rank the neurons, check the rankings causally, analyse them.

Nothing is said about the neurons of a dataset whose causal check failed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from flows.extraction import extract_planned, fitted_to
from flows.flow_run import attempt, noted, run_session, run_work
from flows.pipeline import Results
from flows.prefect_flows import prefect_flow
from flows.show.accuracy_tables import short
from flows.show.faithfulness_tables import faithfulness_tables
from flows.show.report import RunResults, Section
from flows.show.sentences import skill_sentences
from flows.show.skill_figures import skill_figures
from flows.show.skill_tables import skill_tables, summary
from negcore.model.language_model import ModelCard
from tasks.config.dataset_runs import SkillRun, SkillsRun
from tasks.config.run_file import write_run_file
from tasks.floors import mass_warnings
from tasks.measure.faithfulness import plan_norms, read_norms
from tasks.measure.shard_set import ShardSet
from tasks.measure.worker import model_pool
from tasks.model_plans import ModelPlans
from tasks.plan import Planned, PlannedDataset
from tasks.pool.base import Pool
from tasks.rank import rank_pool
from tasks.skills import (
    DatasetFindings,
    NeuronScores,
    PlannedSkills,
    SkillFindings,
    compare_datasets,
    plan_checks,
    plan_ranking_curves,
    plan_skills,
    planned_test,
    write_findings,
)
from tasks.stages.analysis import analyse_skills
from tasks.stages.measure import measure
from tasks.stages.rank import rank
from tasks.steps import Steps


@dataclass
class SkillResults(RunResults):
    """The results of an analysis of skill neurons, and its problems."""

    findings: list[SkillFindings] = field(default_factory=list)

    @cached_property
    def sections(self) -> list[Section]:
        return [
            Section(
                summary(one),
                [*skill_tables(one), *faithfulness_tables(one)],
                figures=skill_figures(one),
                sentences=list(skill_sentences(one)),
                folder="skills/figures",
            )
            for one in self.findings
        ]


_Measured = dict[str, dict[str, ShardSet]]
"""Measurements of rankings, by dataset and probe."""

skills = prefect_flow("skills")
"""By this name, deployments that were registered earlier find the flow."""


def count_skills_steps(run: SkillsRun, planned: Iterable[PlannedSkills]) -> int:
    """Return the number of shards, and of steps of the analyses."""
    return sum(of_model.n_shards + _n_steps(run, of_model) for of_model in planned)


def _n_steps(run: SkillsRun, planned: PlannedSkills) -> int:
    """Count the ranking of every dataset, the shards of its causal checks and curves, and its analysis."""
    n_shards = sum(len(planned_test(dataset).shards) for dataset in planned.datasets)
    n_norms = len(planned.datasets) if run.curves else 0
    return 2 * len(planned.datasets) + len(run.probe) * n_shards * (1 + run.curves) + n_norms


@run_work
def run_skills(run: SkillsRun, steps: Steps) -> SkillResults:
    """Extract what is missing, then rank, check and analyse every dataset that is whole under all conditions."""
    planned = steps.planned(plan_skills, run)
    results = SkillResults(run.directory)
    with run_session(run):
        run = fitted_to(run, _by_condition(run, planned), steps, results)
        write_run_file(run)
        whole = _extract(run, steps, results, planned)
        for of_model in planned:
            datasets = [one for one in of_model.datasets if (one.model, one.dataset.name) in whole]
            _analyse_model(run, steps, results, of_model.card, datasets)
    if results.findings:
        with noted(results):
            write_findings(run, results.findings)
    results.warnings += mass_warnings(
        (of_model.model, short(one.dataset), one.reference.label_mass)
        for of_model in results.findings
        for one in of_model.datasets
    )
    return results


def _extract(
    run: SkillsRun, steps: Steps, results: SkillResults, planned: ModelPlans[PlannedSkills]
) -> set[tuple[str, str]]:
    """Extract what is missing; return the models and datasets of which every row is there under all conditions."""
    n_whole: Counter[tuple[str, str]] = Counter()
    extraction = Results(run.directory)

    def extracted(_: SkillRun, dataset: PlannedDataset) -> None:
        n_whole[dataset.model, dataset.dataset.name] += 1

    by_condition = _by_condition(run, planned)
    extract_planned(by_condition, steps, extraction, when_extracted=extracted)
    results.extracted += extraction.extracted
    results.problems += extraction.problems
    results.set_aside += extraction.set_aside
    results.warnings += extraction.warnings
    return {names for names, n in n_whole.items() if n == len(by_condition)}


def _by_condition(run: SkillsRun, planned: ModelPlans[PlannedSkills]) -> Planned:
    return [
        (condition.run, ModelPlans(tuple(one.models[condition.folder] for one in planned), planned.problems))
        for condition in run.conditions
    ]


def _analyse_model(
    run: SkillsRun, steps: Steps, results: SkillResults, card: ModelCard, datasets: Sequence[PlannedDataset]
) -> None:
    scores = _rank(run, steps, results, datasets)
    ranked = [one for one in datasets if one.dataset.name in scores]
    checks, curves = _check(run, steps, results, card, ranked, scores)
    found = [
        findings
        for one in ranked
        if (parts := checks.get(name := one.dataset.name))
        and (findings := _analyse(run, steps, results, one, card, scores[name], parts, curves.get(name, {})))
    ]
    if found:
        results.findings.append(compare_datasets(run, card, scores, found))


def _rank(
    run: SkillsRun, steps: Steps, results: SkillResults, datasets: Sequence[PlannedDataset]
) -> dict[str, NeuronScores]:
    with rank_pool(run) as pool:
        ranked = {
            one.dataset.name: attempt(steps, results, rank, f"{one.name} ranking", pool, run, one) for one in datasets
        }
    return {name: scores for name, scores in ranked.items() if scores is not None}


def _check(
    run: SkillsRun,
    steps: Steps,
    results: SkillResults,
    card: ModelCard,
    datasets: Sequence[PlannedDataset],
    scores: Mapping[str, NeuronScores],
) -> tuple[_Measured, _Measured]:
    """Check the rankings of every dataset; return the checks of those that are whole, and the curves if asked for."""
    checked, curved = _Measured(), _Measured()
    with model_pool(run, card) as pool:
        for one in datasets:
            name, own = one.dataset.name, scores[one.dataset.name]
            checks = plan_checks(run, one, card, own)
            if _is_measured(run, steps, results, pool, f"{one.name} causal check", checks):
                checked[name] = checks
            if run.curves and (curves := _curves(run, steps, results, pool, one, card, own)):
                curved[name] = curves
    return checked, curved


def _curves(
    run: SkillsRun,
    steps: Steps,
    results: SkillResults,
    pool: Pool,
    planned: PlannedDataset,
    card: ModelCard,
    scores: NeuronScores,
) -> dict[str, ShardSet]:
    """Measure the curves of a dataset's rankings; return them if they are whole."""
    norms = plan_norms(planned_test(planned))
    if not _is_measured(run, steps, results, pool, f"{planned.name} norms", {"": norms}):
        return {}
    norms_M = read_norms(run.conditions[0].run.directory, norms).astype(np.float64)
    curves = plan_ranking_curves(run, planned, card, scores, norms_M)
    return curves if _is_measured(run, steps, results, pool, f"{planned.name} curves", curves) else {}


def _is_measured(
    run: SkillsRun, steps: Steps, results: SkillResults, pool: Pool, name: str, sets: Mapping[str, ShardSet]
) -> bool:
    """Measure what is missing of some sets; tell whether all of them are whole then."""
    known = {row for one in results.extracted for row in one.set_aside}
    measured = attempt(steps, results, measure, name, pool, list(sets.values()), run.conditions[0].run.directory) or []
    results.problems += [problem for one in measured for problem in one.problems]
    lines = dict.fromkeys(line for one in measured for line in one.named_set_aside(known))
    results.set_aside += [f"{name}: {line}" for line in lines]
    return bool(measured) and not any(one.failures for one in measured)


def _analyse(
    run: SkillsRun,
    steps: Steps,
    results: SkillResults,
    planned: PlannedDataset,
    card: ModelCard,
    scores: NeuronScores,
    checks: Mapping[str, ShardSet],
    curves: Mapping[str, ShardSet],
) -> DatasetFindings | None:
    name = f"{planned.name} analysis"
    return attempt(steps, results, analyse_skills, name, run, planned, card, scores, checks, curves)
