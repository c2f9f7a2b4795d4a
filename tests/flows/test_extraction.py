"""One queue a model: what its workers do, in simulated time, with splits that end at different times."""

from collections import Counter
from contextlib import closing, contextmanager
from types import SimpleNamespace

import pytest
import simulated_runs
from simulated_pool import SimulatedPool, SleepingPool
from simulated_runs import extract, planned_model, receipt, seconds

from negcore.errors import ModelError, RunError
from tasks.pool.base import Resources
from tasks.steps import PlainSteps

TENTH = {part: n_rows // 10 for part, n_rows in simulated_runs.MCEVAL8K_ROWS.items()}
SMALL = {"train": 20, "valid": 8, "test": 8}


class OneCall(SimulatedPool):
    """Is given one split at a time, as runs were before they had one queue."""

    calls_at_once = 1


def simulated(pools, workers, cls=SimulatedPool, answer=receipt, n_splits=3):
    """What opens a simulated pool for each model with so many splits to begin with, and keeps it in a list."""

    @contextmanager
    def open_pool(run, card):
        pool = cls(Resources(workers=workers, max_attempts=1), seconds, answer=answer, label=card.name)
        pool._n_callers = min(pool.calls_at_once, n_splits, 64)
        pools.append(pool)
        with closing(pool):
            yield pool

    return open_pool


def test_64_workers_are_busy_for_95_percent_of_22_datasets_with_3_splits(tmp_path):
    pools = []
    for cls in (SimulatedPool, OneCall):
        model = planned_model(rows=TENTH, shard_rows=8)
        results = extract(tmp_path / cls.__name__, [model], simulated(pools, 64, cls, n_splits=66))
        assert (results.problems, sum(one.n_computed for one in results.extracted)) == ([], model.n_shards)
    queue, one_after_the_other = pools
    assert queue.share_busy >= 0.95
    assert one_after_the_other.share_busy < 0.8


def test_the_longest_prompts_come_first_and_the_shortest_last(tmp_path):
    pools = []
    extract(tmp_path, [planned_model(tokens=(20, 300, 90), rows=SMALL, shard_rows=4)], simulated(pools, 1))
    jobs = pools[0].started
    datasets = [job.place.dataset for job in jobs]
    assert list(dict.fromkeys(datasets)) == ["dataset-01", "dataset-02", "dataset-00"]
    assert datasets[-1] == "dataset-00"
    of_split = [seconds(job) for job in jobs if job.place[2:] == ("dataset-01", "train")]
    assert of_split == sorted(of_split, reverse=True)


def test_a_dataset_is_handed_on_as_soon_as_its_splits_are_there(tmp_path):
    pools, handed = [], {}

    def when_extracted(run, dataset):
        handed[dataset.dataset.name] = len(pools[0].started)

    model = planned_model(tokens=(20, 300, 90), rows=SMALL, shard_rows=4)
    extract(tmp_path, [model], simulated(pools, 2), when_extracted=when_extracted)
    assert list(handed) == ["dataset-01", "dataset-02", "dataset-00"]
    n_shards = {dataset.dataset.name: sum(len(split.shards) for split in dataset.splits) for dataset in model.datasets}
    assert handed["dataset-01"] < n_shards["dataset-01"] + n_shards["dataset-02"]


def test_results_come_in_the_order_of_the_plan(tmp_path):
    model = planned_model(tokens=(20, 300, 90), rows=SMALL, shard_rows=4)
    results = extract(tmp_path, [model], simulated([], 8))
    planned = [split.place for dataset in model.datasets for split in dataset.splits]
    assert [one.place for one in results.extracted] == planned


def test_chosen_neurons_wait_for_the_sums_of_their_own_dataset_alone(tmp_path, monkeypatch):
    pools, chosen = [], []
    sums = SimpleNamespace(at=chosen.append)
    monkeypatch.setattr("flows.extraction.open_negs", lambda directory: sums)
    monkeypatch.setattr("flows.extraction.choose_neurons", lambda run, split: (0,))
    rows = {"train-sums": 40, "valid": 8, "test": 8}
    model = planned_model(tokens=(20, 300, 90), rows=rows, shard_rows=4, chosen={"valid": 1, "test": 1})
    results = extract(tmp_path, [model], simulated(pools, 3))
    assert (results.problems, len(results.extracted)) == ([], 9)
    assert [place.part for place in chosen] == ["train-sums"] * 3
    started = [job.place[2:] for job in pools[0].started]
    for name in ("dataset-00", "dataset-01", "dataset-02"):
        last_sums = max(index for index, one in enumerate(started) if one == (name, "train-sums"))
        assert all(index > last_sums for index, one in enumerate(started) if one in {(name, "valid"), (name, "test")})
    first_of_next = started.index(("dataset-02", "train-sums"))
    assert first_of_next < max(index for index, one in enumerate(started) if one == ("dataset-01", "test"))


def test_a_split_that_fails_is_one_problem_and_its_dataset_is_not_handed_on(tmp_path):
    def answer(job):
        if job.place[2:] == ("dataset-01", "valid"):
            raise OSError("the disk is full")
        return receipt(job)

    handed = []
    model = planned_model(tokens=(20, 300, 90), rows=SMALL, shard_rows=8)
    open_pool = simulated([], 4, answer=answer)
    results = extract(tmp_path, [model], open_pool, when_extracted=lambda run, one: handed.append(one.dataset.name))
    (problem,) = results.problems
    assert problem.startswith("simulated dataset-01 valid: shard 0, 8 rows lost: OSError")
    assert sorted(handed) == ["dataset-00", "dataset-02"]


def test_a_model_that_no_worker_can_have_is_one_problem_and_the_others_go_on(tmp_path):
    class Broken(SimulatedPool):
        def _error_of(self, call):
            is_built = call.exception() is None and call.result() is None
            return ModelError("no such model") if is_built and self._label == "first" else super()._error_of(call)

    models = [planned_model(name, tokens=(20, 90), rows=SMALL) for name in ("first", "second")]
    results = extract(tmp_path, models, simulated([], 2, Broken))
    assert results.problems == ["first: no such model"]
    assert {one.place.model for one in results.extracted} == {"second"}
    assert sum(one.n_rows for one in results.extracted) == 2 * sum(SMALL.values())


def test_a_pool_that_cannot_be_opened_is_one_problem_and_the_others_go_on(tmp_path):
    pools = []

    def open_pool(run, card):
        if card.name == "second":
            raise RunError("no node is large enough")
        return simulated(pools, 2)(run, card)

    models = [planned_model(name, tokens=(20,), rows=SMALL) for name in ("first", "second", "third")]
    results = extract(tmp_path, models, open_pool)
    assert results.problems == ["second: no node is large enough"]
    assert Counter(one.place.model for one in results.extracted) == {"first": 3, "third": 3}


def test_the_workers_of_the_next_model_start_while_the_last_shards_of_the_one_before_run(tmp_path):
    pools = []

    @contextmanager
    def open_pool(run, card):
        slow = {"first": 1.0, "second": 0.05}[card.name]
        pools.append(SleepingPool(Resources(workers=4), lambda job: slow if job.index == 1 else 0.05, answer=receipt))
        with closing(pools[-1]):
            yield pools[-1]

    models = [planned_model(name, tokens=(20, 30), rows={"test": 24}, shard_rows=4) for name in ("first", "second")]
    results = extract(tmp_path, models, open_pool)
    assert (results.problems, sum(one.n_computed for one in results.extracted)) == ([], 24)
    first, second = (pool.spans for pool in pools)
    assert min(begin for begin, _ in second) < max(end for _, end in first)
    spans = first + second
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) == 4


def test_a_stop_ends_the_splits_of_every_model(tmp_path):
    steps = PlainSteps()

    def answer(job):
        if job.index == 3:
            steps.stop.set()
        return receipt(job)

    models = [planned_model(name, tokens=(20, 90), rows=SMALL, shard_rows=4) for name in ("first", "second")]
    with pytest.raises(Exception, match="stopped on request"):
        extract(tmp_path, models, simulated([], 1, answer=answer), steps=steps)
