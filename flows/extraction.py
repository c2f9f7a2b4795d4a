"""Extract the missing NEG shards of runs: the splits of all datasets of a model feed its workers from one queue."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple, TypeVar

from flows.flow_run import fitted
from flows.show.report import RunResults
from negcore.errors import ModelError, NegError, RunError, typed_line
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillRun
from tasks.config.recipes import choose_neurons
from tasks.config.run_file import RunFile, write_run_file
from tasks.forecast.capacity import check_disk
from tasks.forecast.needs import worker_needs
from tasks.measure.missing import Extracted
from tasks.measure.shard_set import ShardSet
from tasks.measure.worker import model_pool
from tasks.model_plans import all_problems
from tasks.plan import SUMS, Planned, PlannedDataset, PlannedModel, choosing, n_chosen, of_each_model
from tasks.pool.base import Pool, Stopped
from tasks.rundir.layout import write_plan_file
from tasks.stages.extract import extract as extract_task
from tasks.steps import Pending, Steps, Together

R = TypeVar("R", bound=RunFile)

_LOOK_S = 0.2
"""Time between two looks for workers that have nothing to do."""
_MOST_SPLITS = 64
"""Splits of a model under way at the same time. Each has a thread, and is a task run under Prefect."""

WhenExtracted = Callable[[SkillRun, PlannedDataset], None]


def extract_planned(planned: Planned, steps: Steps, results: RunResults, *, when_extracted: WhenExtracted) -> None:
    """Extract every missing NEG shard; losses become problems of the results, and whole datasets are handed on."""
    results.problems += all_problems(models for _, models in planned)
    check_disk(planned)
    results.warnings += _warnings(planned)
    for run, models in planned:
        write_run_file(run)
        write_plan_file(run.directory, [one for m in models for dataset in m.datasets for one in dataset.shard_sets])
    extractions = [_ModelExtraction(of_model, steps.part(), when_extracted) for of_model in of_each_model(planned)]
    _carry_out(extractions, steps)
    for extraction in extractions:
        extraction.tell(results)
    if results.set_aside:
        steps.table("set-aside", [{"row": line} for line in results.set_aside], "Rows set aside, and why")


def fitted_to(run: R, planned: Planned, steps: Steps, results: RunResults) -> R:
    """Return a run with the workers that are chosen for its plan; the runs in the plan have those that are given."""
    roots = [one.directory for one, _ in planned]
    return fitted(run, partial(worker_needs, planned), roots, steps, results)


def _warnings(planned: Planned) -> Iterable[str]:
    """Return what must be read with care of the datasets, each line once."""
    datasets = (dataset for _, models in planned for model in models for dataset in model.datasets)
    return dict.fromkeys(warning for dataset in datasets for warning in dataset.warnings)


def _carry_out(models: Sequence["_ModelExtraction"], steps: Steps) -> None:
    """Extract models one after the other; each loads workers once, and begins as the one before leaves some idle."""
    to_come, under_way = deque(models), deque[_ModelExtraction]()
    with ExitStack() as pools, steps.together() as together:
        while to_come or under_way:
            if to_come and (not under_way or under_way[-1].leaves_workers):
                under_way.append(to_come.popleft())
                under_way[-1].begin(pools, behind=under_way[-2] if len(under_way) > 1 else None)
            for model in under_way:
                model.start_splits(together)
            if (ended := together.ended(_LOOK_S if to_come else None)) is not None:
                ended.key.model.settle(*ended)
            for model in [one for one in under_way if one.is_over]:
                model.close()
                under_way.remove(model)
    if steps.stop.is_set():
        raise Stopped("stopped on request")


class _Key(NamedTuple):
    """A split under way."""

    model: "_ModelExtraction"
    dataset: "_DatasetExtraction"
    split: ShardSet


class _ModelExtraction:
    """The datasets of one model, those with the longest prompts first: no long shard is left for the end.

    An error that no worker of the model can survive ends all of them.
    """

    def __init__(
        self, of_model: Sequence[tuple[SkillRun, PlannedModel]], steps: Steps, when_extracted: WhenExtracted
    ) -> None:
        self._run, self._card = of_model[0][0], of_model[0][1].card
        self._planned = [_DatasetExtraction(run, dataset) for run, model in of_model for dataset in model.datasets]
        self._in_turn = sorted(self._planned, key=lambda dataset: dataset.n_tokens_a_row, reverse=True)
        self._steps = steps
        self._when_extracted = when_extracted
        self._pool: Pool | None = None
        self._closing = ExitStack()
        self._problem = ""

    def begin(self, pools: ExitStack, behind: "_ModelExtraction | None") -> None:
        """Open the pool of workers, to be closed at the latest with those of the other models."""
        pools.push(self._closing)
        try:
            self._pool = self._closing.enter_context(model_pool(self._run, self._card))
        except (ModelError, RunError) as error:
            self._fail(error)
            return
        if behind is not None and behind._pool is not None:
            self._pool.follow(behind._pool)

    def close(self) -> None:
        """Close the pool."""
        self._closing.close()

    @property
    def is_over(self) -> bool:
        """True if no split is under way or to come."""
        return not self._n_under_way and (bool(self._problem) or not self._n_to_come)

    @property
    def leaves_workers(self) -> bool:
        """True if workers have nothing to do, and will have nothing but what may be tried again."""
        return self._pool is not None and not self._n_to_come and self._pool.has_room(self._n_under_way)

    @property
    def _n_under_way(self) -> int:
        return sum(dataset.n_under_way for dataset in self._planned)

    @property
    def _n_to_come(self) -> int:
        return sum(dataset.n_to_come for dataset in self._planned)

    def start_splits(self, together: Together) -> None:
        """Start as many splits as keep all workers busy, in turn."""
        if self._problem or self._pool is None:
            return
        for turn, dataset in enumerate(self._in_turn):
            while dataset.todo and self._n_under_way < min(self._pool.calls_at_once, _MOST_SPLITS):
                split = dataset.start()
                args = (self._pool, split, dataset.run.directory, turn)
                together.start(_Key(self, dataset, split), self._steps, extract_task, split.title, *args)

    def settle(self, key: _Key, pending: Pending[Extracted]) -> None:
        """Note what became of a split, and hand its dataset on if that is whole now."""
        try:
            key.dataset.end(key.split, pending.result())
        except Stopped:
            key.dataset.drop()
            if not self._problem:
                raise
        except (ModelError, RunError) as error:  # no worker can have this model; the others go on
            key.dataset.drop()
            self._fail(error)
        except Exception as error:
            key.dataset.miss(key.split, error)
        if key.dataset.is_whole:
            self._when_extracted(key.dataset.run, key.dataset.planned)

    def _fail(self, error: Exception) -> None:
        """Stop the splits under way; the first error tells why."""
        self._problem = self._problem or f"{self._card.name}: {error}"
        self._steps.stop.set()

    def tell(self, results: RunResults) -> None:
        """Add what became of the model to the results, in the order of the plan."""
        for dataset in self._planned:
            dataset.tell(results)
        results.problems += [self._problem] * bool(self._problem)


class _DatasetExtraction:
    """The splits of a dataset: those of all neurons, then those of the neurons that are chosen by them."""

    def __init__(self, run: SkillRun, planned: PlannedDataset) -> None:
        self.run, self.planned = run, planned
        self.todo = deque(split for split in planned.shard_sets if n_chosen(split) is None)
        """Splits that can be started."""
        self.n_under_way = 0
        self._to_choose = [split for split in planned.splits if n_chosen(split) is not None]
        self._ended: dict[str, Extracted | str] = {}
        """Outcomes of splits, or the reasons why they are missing, by part."""

    @property
    def n_tokens_a_row(self) -> float:
        """Tokens of a prompt, the mean of the split with the longest ones."""
        return max(float(split.shards.n_tokens_S.sum()) / len(split.examples) for split in self.planned.splits)

    @property
    def n_to_come(self) -> int:
        """Splits that are not started yet."""
        return len(self.todo) + len(self._to_choose)

    @property
    def is_whole(self) -> bool:
        """True if every row is there now, or set aside."""
        return len(self._ended) == len(self.planned.shard_sets) and self._is_without_loss

    @property
    def _is_without_loss(self) -> bool:
        return all(isinstance(one, Extracted) and not one.failures for one in self._ended.values())

    def start(self) -> ShardSet:
        """Return the next split to start."""
        self.n_under_way += 1
        return self.todo.popleft()

    def drop(self) -> None:
        """Note that a split ended of which there is nothing to tell."""
        self.n_under_way -= 1

    def end(self, split: ShardSet, extracted: Extracted) -> None:
        """Note what became of a split."""
        self._note(split, extracted)

    def miss(self, split: ShardSet, error: Exception) -> None:
        """Note why a split is missing."""
        self._note(split, f"{split.title}: {typed_line(error)}")

    def _note(self, split: ShardSet, what: Extracted | str) -> None:
        self._ended[split.place.part] = what
        self.n_under_way -= 1
        if not (self.todo or self.n_under_way):
            to_choose, self._to_choose = self._to_choose, []
            if to_choose and self._is_without_loss:  # there is no choice without all sums
                self._choose(to_choose)

    def _choose(self, splits: Sequence[ShardSet]) -> None:
        """Choose the neurons whose numbers the other splits store."""
        try:
            neurons = choose_neurons(self.run, open_negs(self.run.directory).at(splits[0].place._replace(part=SUMS)))
        except NegError as error:
            self._ended[splits[0].place.part] = f"{splits[0].title}: {typed_line(error)}"
        else:
            self.todo.extend(choosing(split, neurons) for split in splits)

    def tell(self, results: RunResults) -> None:
        """Add what became of the dataset to the results, in the order of the plan."""
        for split in self.planned.shard_sets:
            ended = self._ended.get(split.place.part)
            if isinstance(ended, Extracted):
                results.add(ended)
            elif ended is not None:
                results.problems.append(ended)
