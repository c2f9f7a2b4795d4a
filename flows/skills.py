"""The skills flow: ask datasets in several ways, rank the neurons, check the rankings causally, analyse them.

Nothing is said about the neurons of a dataset whose causal check failed.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from flows.flow_run import noted, run_session, run_work
from flows.pipeline import Results, extract_planned
from flows.prefect_flows import prefect_flow
from flows.show.report import RunResults, Section
from flows.show.skill_figures import write_figures
from flows.show.skill_tables import skill_tables, summary
from flows.stages import Stages
from negcore.errors import typed_line
from negcore.model.language_model import ModelCard
from tasks.config.dataset_runs import SkillRun, SkillsRun
from tasks.config.run_file import write_run_file
from tasks.measure.missing import Advance, Extracted, measure_missing
from tasks.measure.shard_set import ShardSet
from tasks.measure.worker import model_pool
from tasks.plan import PlannedDataset, plan
from tasks.pool.base import Pool, Stopped
from tasks.rank import rank_pool
from tasks.skills import (
    DatasetFindings,
    NeuronScores,
    PlannedSkills,
    SkillFindings,
    analyse_dataset,
    compare_datasets,
    plan_checks,
    plan_skills,
    rank_dataset,
    write_findings,
)

T = TypeVar("T")


@dataclass
class SkillResults(RunResults):
    """What a run produced, and what it could not."""

    findings: list[SkillFindings] = field(default_factory=list)
    figures: dict[str, list[Path]] = field(default_factory=dict)
    """By model, SVG before PNG."""

    @cached_property
    def sections(self) -> list[Section]:
        return [Section(summary(one), skill_tables(one), self.figures.get(one.model, ())) for one in self.findings]


skills = prefect_flow("skills")
"""By this name, deployments that were registered earlier find the flow."""


def count_skills_steps(run: SkillsRun, planned: Sequence[PlannedSkills]) -> int:
    """Return the number of shards, and of steps of the analyses."""
    return sum(of_model.n_shards + _n_steps(run, of_model) for of_model in planned)


def _n_steps(run: SkillsRun, planned: PlannedSkills) -> int:
    """Count the ranking of every dataset, the shards of its causal checks, and its analysis."""
    checked = [split for dataset in planned.datasets for split in dataset.splits if split.place.part == "test"]
    return 2 * len(planned.datasets) + len(run.probe) * sum(len(split.shards) for split in checked)


@run_work
def run_skills(run: SkillsRun, stages: Stages) -> SkillResults:
    """Extract what is missing, then rank, check and analyse every dataset that is whole under all conditions."""
    planned = plan_skills(run)
    write_run_file(run)
    results = SkillResults(run.directory)
    with run_session(run):
        whole = _extract(run, stages, results)
        for of_model in planned:
            datasets = [one for one in of_model.datasets if (one.model, one.dataset.name) in whole]
            _analyse_model(run, stages, results, of_model.card, datasets)
    if results.findings:
        with noted(results):
            _publish(run, results)
    return results


def _extract(run: SkillsRun, stages: Stages, results: SkillResults) -> set[tuple[str, str]]:
    """Models and datasets of which every row is there, under all conditions."""
    planned = [(condition.run, plan(condition.run)) for condition in run.conditions]
    n_whole: Counter[tuple[str, str]] = Counter()
    extraction = Results(run.directory)

    def extracted(_: SkillRun, dataset: PlannedDataset) -> None:
        n_whole[dataset.model, dataset.dataset.name] += 1

    extract_planned(planned, stages, extraction, when_extracted=extracted)
    results.extracted += extraction.extracted
    results.problems += extraction.problems
    results.set_aside += extraction.set_aside
    return {names for names, n in n_whole.items() if n == len(planned)}


def _analyse_model(
    run: SkillsRun, stages: Stages, results: SkillResults, card: ModelCard, datasets: Sequence[PlannedDataset]
) -> None:
    scores = _rank(run, stages, results, datasets)
    ranked = [one for one in datasets if one.dataset.name in scores]
    checks = _check(run, stages, results, card, ranked, scores)
    found = [
        findings
        for one in ranked
        if (parts := checks.get(one.dataset.name))
        and (findings := _analyse(run, stages, results, one, card, scores[one.dataset.name], parts))
    ]
    if found:
        results.findings.append(compare_datasets(run, card, scores, found))


def _rank(
    run: SkillsRun, stages: Stages, results: SkillResults, datasets: Sequence[PlannedDataset]
) -> dict[str, NeuronScores]:
    scores = {}
    with rank_pool(run) as pool:
        for one in datasets:

            def body(advance: Advance, one: PlannedDataset = one) -> NeuronScores:
                ranked = rank_dataset(
                    pool,
                    run,
                    one.model,
                    one.dataset.name,
                    stop=stages.stop,
                    on_tick=lambda status: advance(0, 1, status),
                )
                advance(1, 1, None)
                return ranked

            ranked = _attempt(stages, results, f"{one.name} ranking", "rank", body)
            if ranked is not None:
                scores[one.dataset.name] = ranked
    return scores


def _check(
    run: SkillsRun,
    stages: Stages,
    results: SkillResults,
    card: ModelCard,
    datasets: Sequence[PlannedDataset],
    scores: Mapping[str, NeuronScores],
) -> dict[str, dict[str, ShardSet]]:
    """The finished causal checks of every dataset's probes."""
    finished = {}
    with model_pool(run, card) as pool:
        for one in datasets:
            parts = plan_checks(run, one, card, scores[one.dataset.name])
            body = _computation(run, stages, pool, list(parts.values()))
            extracted = _attempt(stages, results, f"{one.name} causal check", "check", body)
            problems = [problem for checked in extracted or () for problem in checked.problems]
            results.problems += problems
            if extracted and not problems:
                finished[one.dataset.name] = parts
    return finished


def _computation(
    run: SkillsRun, stages: Stages, pool: Pool, parts: Sequence[ShardSet]
) -> Callable[[Advance], list[Extracted]]:
    root = run.conditions[0].run.directory
    return lambda advance: measure_missing(pool, parts, root, advance=advance, stop=stages.stop)


def _analyse(
    run: SkillsRun,
    stages: Stages,
    results: SkillResults,
    planned: PlannedDataset,
    card: ModelCard,
    scores: NeuronScores,
    parts: Mapping[str, ShardSet],
) -> DatasetFindings | None:
    def body(advance: Advance) -> DatasetFindings:
        advance(0, 1, None)
        findings = analyse_dataset(run, planned, card, scores, parts)
        advance(1, 1, None)
        return findings

    return _attempt(stages, results, f"{planned.name} analysis", "analysis", body)


def _attempt(stages: Stages, results: SkillResults, name: str, kind: str, body: Callable[[Advance], T]) -> T | None:
    """What a stage gives, or nothing and a problem: the other datasets go on."""
    try:
        return stages.run(name, kind, body)
    except (Stopped, KeyboardInterrupt):
        raise
    except Exception as error:
        results.problems.append(f"{name}: {typed_line(error)}")
        return None


def _publish(run: SkillsRun, results: SkillResults) -> None:
    folder = write_findings(run, results.findings)
    for findings in results.findings:
        results.figures[findings.model] = write_figures(findings, folder / "figures")
