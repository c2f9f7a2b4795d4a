"""The flows: extract the NEGs of models on datasets, probe them, or both.

The functions that do the work take their `Stages`, so that the same steps run under Prefect and without it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from flows.flow_run import noted, one_line, run_session, run_work
from flows.prefect_flows import prefect_flow
from flows.show.accuracy_tables import artifact_tables, confusion_tables, result_tables, rows_table
from flows.show.report import RunResults, Section
from flows.stages import Pending, Stages
from negcore.errors import ModelError, RunError
from negcore.store.publish import receipts
from negcore.store.reader import NegSplit, open_negs
from tasks.config.dataset_runs import EvaluationRun, SkillRun
from tasks.config.kinds import count_shards
from tasks.config.recipes import choose_neurons
from tasks.config.run_file import write_run_file
from tasks.forecast.capacity import check_room
from tasks.measure.missing import Advance, Extracted, measure_missing
from tasks.measure.shard_set import ShardSet
from tasks.measure.worker import model_pool
from tasks.plan import SUMS, PlannedDataset, PlannedModel, choosing, n_chosen, plan
from tasks.pool.base import Pool, Stopped
from tasks.probe import Confusion, Probed, Prober, Score, probe_steps
from tasks.rank import rank_pool
from tasks.results import Average, SplitAccount, averages, split_accounts
from tasks.rundir.layout import write_plan_file
from tasks.rundir.tables import write_table


@dataclass
class Results(RunResults):
    """What a run on datasets produced, and what it could not."""

    scores: list[Score] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list)
    """Of `scores`, where there are several datasets."""
    confusion: list[Confusion] = field(default_factory=list)
    splits: list[SplitAccount] = field(default_factory=list)
    """What became of the rows of the datasets in `scores`."""
    n_datasets: int = 0
    """Datasets that were asked for, whether or not they could be used."""

    @property
    def sections(self) -> list[Section]:
        if not self.scores:
            return []
        accuracy = result_tables(self.scores, self.averages, self.n_datasets)
        return [Section("", [rows_table(self.splits), *accuracy, *confusion_tables(self.confusion)])]


extract, probe, pipeline, mceval8k = map(prefect_flow, ("extract", "probe", "pipeline", "mceval8k"))
"""By these names, deployments that were registered earlier find the flows."""

Planned = Sequence[tuple[SkillRun, tuple[PlannedModel, ...]]]
"""Runs that differ in their prompts alone, each with its plan."""


def count_probe_steps(run: SkillRun, models: Sequence[PlannedModel]) -> int:
    """Return the number of rankings and fits that the probes of a run take."""
    return probe_steps(run) * sum(len(model.datasets) for model in models)


def count_pipeline_steps(run: SkillRun, models: Sequence[PlannedModel]) -> int:
    """Return the number of shards and of steps of the probes."""
    return count_shards(run, models) + count_probe_steps(run, models)


def plan_mceval8k(run: EvaluationRun) -> Planned:
    """Plan the run of every number of demonstrations, without the datasets that cannot be used."""
    return [(settings, plan(settings, tolerant=True)) for settings in run.settings]


def count_mceval8k_steps(run: EvaluationRun, planned: Planned) -> int:
    """Return the number of steps of all settings."""
    return sum(count_pipeline_steps(settings, models) for settings, models in planned)


@run_work
def run_extract(run: SkillRun, stages: Stages) -> Results:
    """Compute every missing NEG shard of the run."""
    results = Results(run.directory)
    with run_session(run):
        extract_planned([(run, plan(run))], stages, results, when_extracted=lambda run, dataset: None)
    return results


@run_work
def run_probe(run: SkillRun, stages: Stages) -> Results:
    """Fit and score probes on NEG shards that are already there."""
    results = Results(run.directory, n_datasets=len(run.dataset))
    models = plan(run)
    with _probing(run, stages, results) as probe:
        for model in models:
            for dataset in model.datasets:
                for split in dataset.splits:
                    known = receipts(split.place.path(run.directory))
                    rows = [row for receipt in known for row in receipt.set_aside]
                    results.set_aside += [f"{split.title}: {row.id}: {row.reason}" for row in rows]
                probe(run, dataset)
    return results


@run_work
def run_pipeline(run: SkillRun, stages: Stages) -> Results:
    """Extract, and probe each dataset as soon as its splits are there, beside the next extraction."""
    results = Results(run.directory, n_datasets=len(run.dataset))
    planned = [(run, plan(run))]
    with _probing(run, stages, results) as probe:
        extract_planned(planned, stages, results, when_extracted=probe)
    return results


@run_work
def run_mceval8k(run: EvaluationRun, stages: Stages) -> Results:
    """The pipeline for every number of demonstrations; a dataset that cannot be used is a problem, not an end."""
    results = Results(run.directory, n_datasets=len(run.dataset))
    planned = plan_mceval8k(run)
    results.problems += dict.fromkeys(
        problem for _, models in planned for model in models for problem in model.problems
    )
    write_run_file(run)
    with _probing(planned[0][0], stages, results) as probe:
        extract_planned(planned, stages, results, when_extracted=probe)
    return results


Probe = Callable[[SkillRun, PlannedDataset], None]


@contextmanager
def _probing(run: SkillRun, stages: Stages, results: Results) -> Iterator[Probe]:
    """Probe in the background the datasets that are handed over inside the block, and collect the results after it."""
    pending: list[_PendingProbe] = []
    with run_session(run), rank_pool(run) as pool:
        prober = Prober(pool, stages.stop)
        try:
            yield lambda settings, dataset: pending.append(_submit_probe(settings, stages, prober, dataset))
            _collect(stages, results, pending)
        except BaseException:
            stages.stop.set()  # before the pool closes under those who still wait for it
            raise


def extract_planned(planned: Planned, stages: Stages, results: Results, *, when_extracted: Probe) -> None:
    """Compute every missing NEG shard; what is lost goes into the results' problems, each whole dataset is told."""
    check_room(planned)
    for run, models in planned:
        write_run_file(run)
        write_plan_file(run.directory, [split for m in models for dataset in m.datasets for split in dataset.splits])
    # The models outside: each is loaded once for all prompts.
    for of_model in zip(*(models for _, models in planned), strict=True):
        runs = [run for run, _ in planned]
        try:
            _extract_model(list(zip(runs, of_model, strict=True)), stages, results, when_extracted)
        except (ModelError, RunError) as error:  # no worker can have this model; the others go on
            results.problems.append(f"{of_model[0].card.name}: {error}")
    if results.set_aside:
        stages.table("set-aside", [{"row": line} for line in results.set_aside], "Rows set aside, and why")


def _extract_model(
    planned: Sequence[tuple[SkillRun, PlannedModel]], stages: Stages, results: Results, when_extracted: Probe
) -> None:
    run, model = planned[0]
    with model_pool(run, model.card) as pool:
        for run, model in planned:
            for dataset in model.datasets:
                if _extract_dataset(run, stages, results, pool, dataset):
                    when_extracted(run, dataset)


def _extract_dataset(run: SkillRun, stages: Stages, results: Results, pool: Pool, dataset: PlannedDataset) -> bool:
    """Whether every row of the dataset is there now, or set aside."""
    whole, neurons = True, tuple[int, ...]()
    for split in dataset.splits:
        if n_chosen(split) is not None and not (whole or neurons):
            break  # there is no choice without all sums
        try:
            if n_chosen(split) is not None:
                neurons = neurons or choose_neurons(run, _sums(run, split))
                split = choosing(split, neurons)
            (extracted,) = stages.run(split.title, "extract", _extraction(run, pool, split, stages))
        except (Stopped, KeyboardInterrupt, ModelError, RunError):
            raise
        except Exception as error:
            results.problems.append(f"{split.title}: {one_line(error)}")
            whole = False
            continue
        results.extracted.append(extracted)
        results.set_aside += extracted.rows_set_aside
        results.problems += extracted.problems
        whole = whole and not extracted.failures
    return whole


def _sums(run: SkillRun, split: ShardSet) -> NegSplit:
    """Open the vote sums that the neurons of a split are chosen by."""
    return open_negs(run.directory).at(split.place._replace(part=SUMS))


def _extraction(run: SkillRun, pool: Pool, split: ShardSet, stages: Stages) -> Callable[[Advance], list[Extracted]]:
    return lambda advance: measure_missing(pool, [split], run.directory, advance=advance, stop=stages.stop)


@dataclass(frozen=True)
class _PendingProbe:
    run: SkillRun
    dataset: PlannedDataset
    probed: Pending[Probed]


def _submit_probe(run: SkillRun, stages: Stages, prober: Prober, dataset: PlannedDataset) -> _PendingProbe:
    # Named apart from the extraction of the same dataset.
    probed = stages.submit(f"{dataset.name} probes", "probe", lambda advance: prober.probe(run, dataset, advance))
    return _PendingProbe(run, dataset, probed)


def _collect(stages: Stages, results: Results, pending: Sequence[_PendingProbe]) -> None:
    for one in pending:
        try:
            probed = one.probed.result()
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:
            results.problems.append(f"{one.dataset.name}: probes: {one_line(error)}")
            continue
        results.scores += probed.scores
        results.confusion += probed.confusion
        known = {(account.dataset, account.shots) for account in results.splits}
        if (one.dataset.dataset.name, one.run.shots) not in known:
            results.splits += split_accounts(one.dataset, one.run.shots)
    if results.scores:
        with noted(results):
            _publish(stages, results)


def _publish(stages: Stages, results: Results) -> None:
    """Write the results as Arrow tables and show them."""
    if len({score.dataset for score in results.scores}) > 1:
        results.averages = averages(results.scores)
    write_table(results.directory / "accuracy.arrow", Score, [asdict(row) for row in results.scores])
    write_table(results.directory / "averages.arrow", Average, [asdict(row) for row in results.averages])
    write_table(results.directory / "splits.arrow", SplitAccount, [asdict(row) for row in results.splits])
    if results.confusion:
        write_table(results.directory / "confusion.arrow", Confusion, [asdict(row) for row in results.confusion])
    for key, (title, rows) in artifact_tables(results.scores, results.averages, results.splits).items():
        stages.table(key, rows, title)
