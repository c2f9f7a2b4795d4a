"""The flows: extract the NEGs of models on datasets, probe them, or both.

The functions that do the work take their `Steps`, so that the same steps run under Prefect and without it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property

from flows.extraction import WhenExtracted, extract_planned, fitted_to
from flows.flow_run import noted, run_session, run_work
from flows.prefect_flows import prefect_flow
from flows.show.accuracy_figures import accuracy_figures
from flows.show.accuracy_tables import accuracy_tables, asked, confusion_tables, rows_table, short
from flows.show.beyond_tables import beyond_tables
from flows.show.certificate_tables import certificate_tables
from flows.show.comparison_tables import comparison_tables
from flows.show.control_tables import control_tables
from flows.show.letter_bias_tables import letter_bias_tables
from flows.show.neuron_figures import neuron_figures
from flows.show.neuron_tables import top_table
from flows.show.report import RunResults, Section
from flows.show.resample_tables import resample_tables
from flows.show.sentences import accuracy_sentences
from negcore.errors import typed_line
from negcore.store.publish import receipts
from tasks.beyond_lm import BEYOND_FILE, BeyondRow
from tasks.certificates import CertificateRow
from tasks.comparisons import ComparisonRow, comparisons
from tasks.config.dataset_runs import EvaluationRun, SkillRun
from tasks.config.kinds import count_shards
from tasks.config.run_file import write_run_file
from tasks.controls import ControlRow
from tasks.floors import mass_warnings
from tasks.letter_bias import LETTER_BIAS_FILE, LetterBiasRow
from tasks.measure.missing import names_of
from tasks.model_plans import ModelPlans, all_problems
from tasks.neurons import NEURONS_FILE, NeuronRow
from tasks.plan import (
    Planned,
    PlannedDataset,
    PlannedModel,
    of_each_model,
    plan,
    plan_usable,
)
from tasks.pool.base import Stopped
from tasks.predictions import Predictions, write_predictions
from tasks.probe import AccuracyRow, Confusion, Probed, Prober, probe_steps
from tasks.rank import rank_pool
from tasks.resamples import ResampleRow
from tasks.results import Average, SplitAccount, averages, split_accounts
from tasks.rundir.tables import write_table
from tasks.stages.probe import probe as probe_task
from tasks.steps import Pending, Steps


@dataclass
class Results(RunResults):
    """The results of a run on datasets, and its problems."""

    scores: list[AccuracyRow] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list)
    """Averages of `scores`, if there are several datasets."""
    confusion: list[Confusion] = field(default_factory=list)
    predictions: list[Predictions] = field(default_factory=list)
    beyond: list[BeyondRow] = field(default_factory=list)
    """Probes beside the model's own answers."""
    comparisons: list[ComparisonRow] = field(default_factory=list)
    """Comparisons of the probes by their `predictions`."""
    resamples: list[ResampleRow] = field(default_factory=list)
    controls: list[ControlRow] = field(default_factory=list)
    """Accuracies of the probes under controls."""
    letter_bias: list[LetterBiasRow] = field(default_factory=list)
    """Accuracies by letter and by answer, if rows were asked in several orders of their options."""
    certificates: list[CertificateRow] = field(default_factory=list)
    """Bounds on large NEGs that the estimates miss."""
    neurons: list[NeuronRow] = field(default_factory=list)
    """Best neurons of the vote probes."""
    splits: list[SplitAccount] = field(default_factory=list)
    """Rows of the datasets in `scores`: released, used, left out."""
    n_datasets: int = 0
    """Datasets that were asked for, whether or not they could be used."""

    @cached_property
    def sections(self) -> list[Section]:
        if not self.scores:
            return []
        accuracy = accuracy_tables(self.scores, self.averages, self.n_datasets, self.controls)
        comparisons, confusion = comparison_tables(self.comparisons), confusion_tables(self.confusion)
        controls = control_tables(self.controls, self.scores)
        certificates = certificate_tables(self.certificates)
        resamples, neurons = resample_tables(self.resamples, self.scores), top_table(self.neurons, self.scores)
        beyond, bias = beyond_tables(self.beyond), letter_bias_tables(self.letter_bias)
        beside = (*beyond, *bias, *controls, *comparisons, *resamples, *certificates, *neurons, *confusion)
        return [
            Section(
                "",
                [rows_table(self.splits), *accuracy, *beside],
                figures=[*accuracy_figures(self.scores, self.averages), *neuron_figures(self.neurons)],
                sentences=list(accuracy_sentences(self.scores, self.averages, self.comparisons)),
                neurons=self.neurons,
            )
        ]


extract, probe, pipeline, mceval8k = map(prefect_flow, ("extract", "probe", "pipeline", "mceval8k"))
"""By these names, deployments that were registered earlier find the flows."""


def count_extract_steps(run: SkillRun, models: ModelPlans[PlannedModel]) -> int:
    """Return the number of shards, those of a control included."""
    return count_shards(run, models) * len(run.with_control)


def count_probe_steps(run: SkillRun, models: ModelPlans[PlannedModel]) -> int:
    """Return the number of rankings and fits that the probes of a run take."""
    return sum(map(probe_steps, run.with_control)) * _n_datasets(models)


def count_pipeline_steps(run: SkillRun, models: ModelPlans[PlannedModel]) -> int:
    """Return the number of shards and of steps of the probes."""
    return count_extract_steps(run, models) + count_probe_steps(run, models)


def plan_mceval8k(run: EvaluationRun) -> Planned:
    """Plan the run of every number of demonstrations, without the datasets that cannot be used."""
    return [(one, plan_usable(one)) for settings in run.settings for one in settings.with_control]


def count_mceval8k_steps(run: EvaluationRun, planned: Planned) -> int:
    """Return the number of steps of all settings."""
    return sum(count_shards(one, models) + probe_steps(one) * _n_datasets(models) for one, models in planned)


def _n_datasets(models: ModelPlans[PlannedModel]) -> int:
    return sum(len(model.datasets) for model in models)


def _planned(run: SkillRun, steps: Steps) -> Planned:
    """Plan a run, and its control if it has one."""
    return [(one, steps.planned(plan, one)) for one in run.with_control]


def _fitted(run: SkillRun, planned: Planned, steps: Steps, results: Results) -> Planned:
    """Return the plans of a run and its control with the workers that are chosen for them."""
    run = fitted_to(run, planned, steps, results)
    return [(one, models) for one, (_, models) in zip(run.with_control, planned, strict=True)]


@run_work
def run_extract(run: SkillRun, steps: Steps) -> Results:
    """Compute every missing NEG shard of the run."""
    results = Results(run.directory)
    planned = _planned(run, steps)
    with run_session(run):
        extract_planned(_fitted(run, planned, steps, results), steps, results, when_extracted=lambda run, dataset: None)
    return results


@run_work
def run_probe(run: SkillRun, steps: Steps) -> Results:
    """Fit and score probes on NEG shards that are already there."""
    results = Results(run.directory, n_datasets=len(run.dataset))
    planned = _planned(run, steps)
    results.problems += all_problems(models for _, models in planned)
    with _probing(planned, steps, results) as probe:
        for one, models in planned:
            for dataset in (dataset for model in models for dataset in model.datasets):
                results.set_aside += _known_set_aside(one, dataset)
                probe(one, dataset)
    return results


def _known_set_aside(run: SkillRun, dataset: PlannedDataset) -> Iterator[str]:
    """Yield a line for every row of a dataset that was set aside when it was extracted."""
    for split in dataset.splits:
        rows = [row for receipt in receipts(split.place.path(run.directory)) for row in receipt.set_aside]
        named = names_of(split, rows)
        yield from (f"{split.title}: {named[row.id]}: {row.reason}" for row in rows)


@run_work
def run_pipeline(run: SkillRun, steps: Steps) -> Results:
    """Extract, and probe each dataset as soon as its splits are there, beside the next extraction."""
    results = Results(run.directory, n_datasets=len(run.dataset))
    planned = _planned(run, steps)
    with run_session(run):
        planned = _fitted(run, planned, steps, results)
        with _probing(planned, steps, results) as probe:
            extract_planned(planned, steps, results, when_extracted=probe)
    return results


@run_work
def run_mceval8k(run: EvaluationRun, steps: Steps) -> Results:
    """Run the pipeline for every number of demonstrations, without the datasets that cannot be used."""
    results = Results(run.directory, n_datasets=len(run.dataset))
    planned = steps.planned(plan_mceval8k, run)
    results.problems += dict.fromkeys(
        problem for _, models in planned for model in models for problem in model.problems
    )
    with run_session(run):
        run = fitted_to(run, planned, steps, results)
        write_run_file(run)
        settings = (one for of_shots in run.settings for one in of_shots.with_control)
        planned = [(one, models) for one, (_, models) in zip(settings, planned, strict=True)]
        with _probing(planned, steps, results) as probe:
            extract_planned(planned, steps, results, when_extracted=probe)
    return results


@contextmanager
def _probing(planned: Planned, steps: Steps, results: Results) -> Iterator[WhenExtracted]:
    """Probe datasets in the background as they are handed over inside the block, and collect the results after it.

    They are collected in the order of the plan, whichever dataset was extracted first.
    """
    run, pending = planned[0][0], list[_PendingProbe]()
    models = (model for of_model in of_each_model(planned) for _, model in of_model)
    in_order = [id(dataset) for model in models for dataset in model.datasets]
    with run_session(run), rank_pool(run) as pool:
        prober = Prober(pool)
        try:
            yield lambda settings, dataset: pending.append(_submit_probe(settings, steps, prober, dataset))
            _collect(results, sorted(pending, key=lambda one: in_order.index(id(one.dataset))), run)
        except BaseException:
            steps.stop.set()  # before the pool closes under those who still wait for it
            raise


@dataclass(frozen=True)
class _PendingProbe:
    run: SkillRun
    dataset: PlannedDataset
    probed: Pending[Probed]


def _submit_probe(run: SkillRun, steps: Steps, prober: Prober, dataset: PlannedDataset) -> _PendingProbe:
    # Named apart from the extraction of the same dataset.
    probed = steps.submit(probe_task, f"{dataset.name} probes", prober, run, dataset)
    return _PendingProbe(run, dataset, probed)


def _collect(results: Results, pending: Sequence[_PendingProbe], run: SkillRun) -> None:
    """Collect what was probed; of a control of `run`, the accuracies alone."""
    for one in pending:
        try:
            probed = one.probed.result()
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:
            results.problems.append(f"{one.dataset.name}: probes: {typed_line(error)}")
            continue
        if (seed := one.run.random_weights) is not None and run.random_weights is None:
            results.controls += probed.of_random_weights(seed)
            continue
        results.scores += probed.scores
        results.confusion += probed.confusion
        results.predictions += probed.predictions
        results.beyond += probed.beyond
        results.resamples += probed.resamples
        results.controls += probed.controls
        results.letter_bias += probed.letter_bias
        results.certificates += probed.certificates
        results.neurons += probed.neurons
        results.warnings += probed.warnings
        known = {(account.dataset, account.shots) for account in results.splits}
        if (one.dataset.dataset.name, one.run.shots) not in known:
            results.splits += split_accounts(one.dataset, one.run.shots)
    results.warnings += mass_warnings(
        (asked(score.model, score.shots), short(score.dataset), score.label_mass)
        for score in results.scores
        if score.probe == "lm" and not score.group
    )
    if results.scores:
        with noted(results):
            _publish(results)


def _publish(results: Results) -> None:
    """Write the results as Arrow tables."""
    if len({score.dataset for score in results.scores}) > 1:
        results.averages = averages(results.scores)
    results.comparisons = comparisons(results.predictions)
    write_table(results.directory / "accuracy.arrow", AccuracyRow, [asdict(row) for row in results.scores])
    write_table(results.directory / "averages.arrow", Average, [asdict(row) for row in results.averages])
    write_predictions(results.directory, results.predictions)
    write_table(results.directory / BEYOND_FILE, BeyondRow, [asdict(row) for row in results.beyond])
    write_table(results.directory / "comparisons.arrow", ComparisonRow, [asdict(row) for row in results.comparisons])
    write_table(results.directory / NEURONS_FILE, NeuronRow, [asdict(row) for row in results.neurons])
    write_table(results.directory / "splits.arrow", SplitAccount, [asdict(row) for row in results.splits])
    if results.resamples:
        write_table(results.directory / "resamples.arrow", ResampleRow, [asdict(row) for row in results.resamples])
    if results.letter_bias:
        rows = [asdict(row) for row in results.letter_bias]
        write_table(results.directory / LETTER_BIAS_FILE, LetterBiasRow, rows)
    if results.certificates:
        rows = [asdict(row) for row in results.certificates]
        write_table(results.directory / "certificates.arrow", CertificateRow, rows)
    if results.controls:
        write_table(results.directory / "controls.arrow", ControlRow, [asdict(row) for row in results.controls])
    if results.confusion:
        write_table(results.directory / "confusion.arrow", Confusion, [asdict(row) for row in results.confusion])
