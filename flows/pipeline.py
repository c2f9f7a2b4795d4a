"""The flows: extract the NEGs of models on datasets, probe them, or both.

The functions that do the work take their `Stages`, so that the same steps run under Prefect and without it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
from prefect import flow, runtime
from prefect.task_runners import ThreadPoolTaskRunner

from flows.display import score_rows
from flows.stages import Pending, PrefectStages, Stages
from negcore.errors import NegError, RunError
from tasks.extract import Advance, Extracted, ExtractWorker, extract_split
from tasks.plan import PlannedDataset, PlannedModel, PlannedSplit, plan
from tasks.pool import Pool, Stopped, open_pool
from tasks.probe import Score, probe_dataset
from tasks.runfile import SkillRun, write_run_file
from tasks.session import ray_session


@dataclass
class Results:
    """What a run produced, and what it could not."""

    directory: Path
    extracted: list[Extracted] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One line for everything that is missing; empty if the run is whole."""


class Ended(Protocol):
    """Results of any flow."""

    problems: list[str]


E = TypeVar("E", bound=Ended)


class IncompleteRun(RunError):
    """A run ended with something missing; what there is, is in `results`."""

    def __init__(self, results: Any) -> None:
        super().__init__(f"the run is not whole: {'; '.join(results.problems)}")
        self.results = results


def _flow_run_name() -> str:
    """Flow, models and datasets, as far as they fit a line."""
    run = SkillRun.model_validate(runtime.flow_run.parameters["run"])
    return f"{runtime.flow_run.flow_name} {listed(run.model)} on {listed(run.dataset)}"


def listed(names: Sequence[str]) -> str:
    """Names, as far as they fit a line."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


_prefect_flow = partial(
    flow,
    flow_run_name=_flow_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=8),
    validate_parameters=True,
)


@_prefect_flow(name="extract")  # type: ignore[untyped-decorator]
def extract(run: SkillRun) -> Results:
    """Compute every missing NEG shard of a run."""
    return whole(run_extract(run, PrefectStages()))


@_prefect_flow(name="probe")  # type: ignore[untyped-decorator]
def probe(run: SkillRun) -> Results:
    """Fit and score skill-neuron probes on a run's NEG shards."""
    return whole(run_probe(run, PrefectStages()))


@_prefect_flow(name="pipeline")  # type: ignore[untyped-decorator]
def pipeline(run: SkillRun) -> Results:
    """Extract the NEGs of models on datasets and probe them."""
    return whole(run_pipeline(run, PrefectStages()))


def whole(results: E) -> E:
    """The results, if nothing is missing.

    Raises
    ------
    IncompleteRun
        Otherwise.
    """
    if results.problems:
        raise IncompleteRun(results)
    return results


def run_extract(run: SkillRun, stages: Stages) -> Results:
    """Compute every missing NEG shard of the run."""
    results = Results(run.directory)
    _extract(run, stages, results, when_extracted=lambda dataset: None)
    return results


def run_probe(run: SkillRun, stages: Stages) -> Results:
    """Fit and score probes on NEG shards that are already there."""
    results = Results(run.directory)
    pending = [_submit_probe(run, stages, dataset) for model in plan(run) for dataset in model.datasets]
    _collect(stages, results, pending)
    return results


def run_pipeline(run: SkillRun, stages: Stages) -> Results:
    """Extract, and probe each dataset as soon as its splits are there, beside the next extraction."""
    results = Results(run.directory)
    pending: list[tuple[str, Pending[list[Score]]]] = []
    _extract(run, stages, results, when_extracted=lambda d: pending.append(_submit_probe(run, stages, d)))
    _collect(stages, results, pending)
    return results


def _extract(
    run: SkillRun, stages: Stages, results: Results, *, when_extracted: Callable[[PlannedDataset], None]
) -> None:
    models = plan(run)
    write_run_file(run)
    session = ray_session(run.ray_address) if run.backend == "ray" else nullcontext()
    with session:
        for model in models:
            with _pool(run, model) as pool:
                for dataset in model.datasets:
                    if _extract_dataset(run, stages, results, pool, dataset):
                        when_extracted(dataset)


def _pool(run: SkillRun, model: PlannedModel) -> AbstractContextManager[Pool]:
    recipe = {
        "model": model.card.ref,
        "dtype": run.dtype,
        "device": run.worker_device,
        "site": run.site,
        "batch_size": run.batch_size,
        "threads": run.cpus,
    }
    return open_pool(run.backend, ExtractWorker, recipe, run.resources, label=model.card.name)


def _extract_dataset(run: SkillRun, stages: Stages, results: Results, pool: Pool, dataset: PlannedDataset) -> bool:
    """Whether every row of the dataset is there now."""
    whole = True
    for split in dataset.splits:
        try:
            extracted = stages.run(split.name, "extract", _extraction(pool, split, run.directory, stages))
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:
            results.problems.append(f"{split.name}: {one_line(error)}")
            whole = False
            continue
        results.extracted.append(extracted)
        for failure in extracted.failures:
            results.problems.append(f"{split.name}: shard {failure.index}, {failure.n_rows} rows lost: {failure.error}")
        whole = whole and not extracted.failures
    return whole


def _extraction(pool: Pool, split: PlannedSplit, root: Path, stages: Stages) -> Callable[[Advance], Extracted]:
    return lambda advance: extract_split(pool, split, root, advance=advance, stop=stages.stop)


def _submit_probe(run: SkillRun, stages: Stages, dataset: PlannedDataset) -> tuple[str, Pending[list[Score]]]:
    def body(advance: Advance) -> list[Score]:
        return probe_dataset(
            run.directory,
            dataset.model,
            dataset.dataset.name,
            run.probe,
            max_neurons=run.max_neurons,
            overlapping=dataset.dataset.split_report.is_overlapping,
        )

    return dataset.name, stages.submit(dataset.name, "probe", body)


def _collect(stages: Stages, results: Results, pending: Sequence[tuple[str, Pending[list[Score]]]]) -> None:
    for name, future in pending:
        try:
            results.scores += future.result()
        except NegError as error:
            results.problems.append(f"{name}: probes: {error}")
    if results.scores:
        _write_scores(results)
        stages.table("accuracy", score_rows(results.scores), "Accuracy of probes on test")


def _write_scores(results: Results) -> None:
    table = pa.Table.from_pylist([asdict(score) for score in results.scores])
    path = results.directory / "accuracy.arrow"
    draft = path.with_suffix(".tmp")
    with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    draft.replace(path)


def one_line(error: BaseException) -> str:
    """Type and message of an error."""
    return " ".join(f"{type(error).__name__}: {error}".split())
