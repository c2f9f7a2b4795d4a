"""Workers that compute one job while they write another: time, order, and whose fault it is when one is lost."""

import os
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
from simulated_pool import Numbers, SimulatedDevices, SimulatedPool, ThreadPool, simulated_pool
from support import save_tiny_model, write_questions

from negcore.store import publish
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.forecast.needs import forecast
from tasks.measure import shard_set
from tasks.measure.missing import measure_missing
from tasks.measure.worker import ModelWorker
from tasks.plan import plan
from tasks.pool.base import NodeLost, OutOfMemory, Resources, WorkerLost
from tasks.pool.opening import open_pool
from tasks.pool.ray_session import ray_session
from tasks.steps import Step

ONE = Resources(workers=1, jobs_a_worker=2)
TWO = Resources(workers=2, jobs_a_worker=2)


def devices(resources, compute_s, write_s, **options):
    return SimulatedDevices(resources, lambda job: compute_s, write_s=write_s, **options)


# Time


@pytest.mark.parametrize(("compute_s", "write_s"), [(4.0, 3.0), (3.0, 4.0), (5.0, 0.0)])
def test_a_job_takes_as_long_as_computing_or_as_writing_and_not_as_both(compute_s, write_s):
    pool = devices(ONE, compute_s, write_s)
    assert len(list(pool.map(Numbers(20)))) == 20
    assert pool.clock_s == 20 * max(compute_s, write_s) + min(compute_s, write_s)
    alone = devices(replace(ONE, jobs_a_worker=1), compute_s, write_s)
    assert len(list(alone.map(Numbers(20)))) == 20
    assert alone.clock_s == 20 * (compute_s + write_s)


def test_devices_are_busy_while_their_shards_are_written():
    pool = devices(Resources(workers=64, jobs_a_worker=2), 4.0, 3.0)
    assert len(list(pool.map(Numbers(64 * 40)))) == 64 * 40
    assert pool.share_busy > 0.95  # one job at a time: 4 / 7


def test_a_real_worker_computes_while_it_writes(run, monkeypatch):
    """A device that sleeps, and real shards on a disk that is slow to sync."""
    sync = publish.sync

    def slow_sync(path):
        time.sleep(0.06)  # four of them a shard
        sync(path)

    monkeypatch.setattr(publish, "sync", slow_sync)
    seconds = {}
    for n_jobs in (1, 2):
        out = run.model_copy(update={"out": run.directory / f"{n_jobs}"})
        pool = ThreadPool(partial(Sleeping, out), replace(ONE, jobs_a_worker=n_jobs))
        began = time.monotonic()
        extracted = measure(pool, out)
        seconds[n_jobs] = time.monotonic() - began
        assert sum(one.n_computed for one in extracted) == 9
    assert seconds[1] > 9 * (0.25 + 0.24)
    assert seconds[2] < seconds[1] - 6 * 0.24  # all but the first and the last are written behind


class Sleeping(ModelWorker):
    """Takes a quarter of a second a shard without any use of the processor, one shard at a time."""

    def __init__(self, run) -> None:
        super().__init__(str(run.model[0]), dtype="float32", device="cpu", site="paper", threads=1)
        self._at_once = threading.Semaphore(1)

    def _measure(self, job, examples):
        assert self._at_once.acquire(blocking=False), "two shards are measured at once"
        columns = super()._measure(job, examples)
        time.sleep(0.25)
        self._at_once.release()
        return columns


# Runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture
def run(model, tmp_path):
    values = {"model": [model], "dataset": [write_questions(tmp_path)], "backend": "local", "shard_rows": 8}
    return read_run_file(SkillRun, None, values | {"out": tmp_path / "run"})


def measure(pool, run):
    (planned,) = plan(run)
    try:
        return measure_missing(pool, planned.datasets[0].splits, run.directory, Step())
    finally:
        pool.close()


def files(run):
    paths = (path for path in (run.directory / "negs").rglob("part-*") if path.is_file())
    return {path.relative_to(run.directory): path.read_bytes() for path in paths}


@pytest.mark.parametrize("storage", ["values", "codes"])
def test_shards_have_the_same_bytes_however_many_are_under_way(run, storage):
    def worker():
        return ModelWorker(str(run.model[0]), dtype="float32", device="cpu", site="paper", threads=1)

    written = []
    for workers, n_jobs in [(1, 1), (1, 2), (3, 2)]:
        one = run.model_copy(update={"out": run.directory / f"{workers}-{n_jobs}", "storage": storage})
        measure(ThreadPool(worker, Resources(workers=workers, jobs_a_worker=n_jobs)), one)
        written.append(files(one))
    assert len(written[0]) == 18
    assert written[0] == written[1] == written[2]


def test_an_error_while_writing_is_that_of_its_own_shard(run, monkeypatch):
    publish_shard = shard_set.publish_shard

    def publish_some(root, place, index, *args, **options):
        if (place.part, index) == ("train", 1):
            raise ValueError("cannot be written")
        return publish_shard(root, place, index, *args, **options)

    monkeypatch.setattr(shard_set, "publish_shard", publish_some)
    extracted = measure(ThreadPool(lambda: Sleeping(run), ONE), run)
    lost = [(one.place.part, failure.index) for one in extracted for failure in one.failures]
    assert lost == [("train", 1)]
    assert len(files(run)) == 16


def test_two_jobs_are_for_workers_with_a_gpu_of_their_own(run):
    def jobs_of(**changes):
        return run.model_copy(update=changes).resources.jobs_a_worker

    assert jobs_of(backend="ray", gpus=1.0) == jobs_of(backend="ray", gpus=0.5) == 2
    assert jobs_of(backend="ray") == jobs_of(backend="local") == jobs_of(backend="local", device="cuda") == 1


def test_the_memory_of_both_shards_is_foreseen(run):
    def assembly_bytes(**changes):
        one = run.model_copy(update={"backend": "ray", **changes})
        return forecast([(one, plan(one))])[0].datasets[0].assembly_bytes

    assert assembly_bytes(gpus=1.0) == 2 * assembly_bytes(gpus=0.0)


# Who gets a second job


def most_with_a_worker(jobs, resources, **options):
    """The most jobs that each worker had at once."""
    counts = {}

    class Counting(SimulatedDevices):
        def _feed(self):
            super()._feed()
            for actor in self._actors:
                counts[actor] = max(counts.get(actor, 0), len(actor.calls))

    with_pool = Counting(resources, lambda job: 4.0, write_s=1.0)
    outcomes = list(with_pool.map(jobs, **options))
    assert [outcome.error for outcome in outcomes] == [None] * len(jobs)
    return list(counts.values())


def test_no_worker_has_two_jobs_where_another_would_wait_for_one():
    assert most_with_a_worker(Numbers(2), TWO) == [1, 1]
    assert most_with_a_worker(Numbers(3), TWO) == [1, 1]
    assert most_with_a_worker(Numbers(8), TWO) == [2, 2]


def test_jobs_that_are_expected_to_fail_have_a_worker_for_themselves():
    assert most_with_a_worker(Numbers(8), TWO, suspect=True) == [1, 1]


def test_a_worker_on_a_node_that_is_about_to_go_gets_no_second_job():
    class Drained(SimulatedDevices):
        def _drained(self):
            return (None,) if self.n_made == 1 and self.started else ()

    pool = Drained(ONE, lambda job: 1.0, write_s=1.0)
    assert len(list(pool.map(Numbers(6)))) == 6
    assert pool.n_made == 2
    assert pool.clock_s == 2 + 6  # the first job, then one a second and the last one's writing


# Losses


def losing(error, **options):
    """A pool in which the job 3 always ends its worker."""

    def answer(job):
        if job == 3:
            raise error
        return job

    return simulated_pool(ONE, lambda job: 1.0 + (job == 3) / 2, answer=answer, **options)


def test_a_job_that_kills_its_worker_costs_the_one_beside_it_no_attempt():
    with losing(WorkerLost("died")) as pool:
        outcomes = {outcome.job: outcome for outcome in pool.map(Numbers(10))}
    assert (outcomes[3].attempts, type(outcomes[3].exception)) == (3, WorkerLost)
    assert {outcome.attempts for job, outcome in outcomes.items() if job != 3} == {1}
    assert sorted(outcome.result for job, outcome in outcomes.items() if job != 3) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert pool._lost == 4  # once together, then three times by itself


def test_all_workers_that_one_job_loses_count_as_one():
    with losing(WorkerLost("died")) as pool:
        pool._resources = replace(ONE, max_replacements=1)
        assert len(list(pool.map(Numbers(10)))) == 10


def test_jobs_that_are_lost_with_their_node_cost_no_attempt():
    lost = iter([NodeLost("gone")] * 2)

    def answer(job):
        if job == 3 and (error := next(lost, None)):
            raise error
        return job

    with simulated_pool(ONE, lambda job: 1.0, answer=answer) as pool:
        outcomes = list(pool.map(Numbers(10)))
    assert {(outcome.attempts, outcome.error) for outcome in outcomes} == {(1, None)}


def test_a_job_for_which_memory_does_not_suffice_is_tried_by_itself_and_then_alone():
    with losing(OutOfMemory("full")) as pool:
        outcomes = {outcome.job: outcome for outcome in pool.map(Numbers(10))}
    assert outcomes[3].attempts == 3
    assert pool.started.count(3) == 5  # beside another, by itself, and three times alone
    assert {outcome.attempts for job, outcome in outcomes.items() if job != 3} == {1}


def test_a_worker_that_fails_again_and_again_is_replaced_and_what_it_had_is_done():
    broken_at = []

    def answer(job):
        if pool.n_made == 1:
            broken_at.append(job)
            raise RuntimeError("CUDA error: device-side assert triggered")
        return job

    pool: SimulatedPool
    with simulated_pool(ONE, lambda job: 1.0 + job / 100, answer=answer) as pool:
        outcomes = list(pool.map(Numbers(10)))
    assert (pool.n_made, len(broken_at)) == (2, 3)
    assert sorted(outcome.result for outcome in outcomes) == list(range(10))


def test_the_limit_of_a_second_job_begins_when_the_first_has_ended():
    pool = devices(replace(ONE, job_timeout_s=6.0), 4.0, 1.0)
    assert {outcome.attempts for outcome in pool.map(Numbers(6))} == {1}
    limited = replace(TWO, job_timeout_s=6.0, max_attempts=1)
    hanging = SimulatedDevices(limited, lambda job: 100.0 if job == 2 else 4.0, write_s=1.0)
    outcomes = {outcome.job: outcome.error for outcome in hanging.map(Numbers(40))}
    assert outcomes.pop(2) == "WorkerLost: the worker gave no answer within 6 s"
    assert set(outcomes.values()) == {None}


def test_a_caller_that_leaves_takes_both_of_its_jobs_with_it():
    with simulated_pool(ONE, lambda job: 1.0) as pool:
        leaving = pool.map(Numbers(40))
        assert next(leaving).result == 0
        leaving.close()
        assert all(not actor.attempts for actor in pool._actors)
        assert [outcome.result for outcome in pool.map(["a", "b", "c"])] == ["a", "b", "c"]


# Actors of Ray


class Device:
    """Computes under a lock and writes outside of it; a job is what it says."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def run(self, job):
        with self._lock:
            began = time.monotonic()
            time.sleep(0.3)
            if job == "die":
                os._exit(1)
        time.sleep(0.3)
        return began, time.monotonic(), threading.get_ident()


def test_an_actor_of_ray_computes_while_it_writes_and_a_killed_one_loses_no_job():
    resources = Resources(workers=1, cpus=0.5, jobs_a_worker=2)
    with ray_session():
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import the tests
        with open_pool("ray", Device, {}, resources, label="devices") as pool:
            spans = sorted(outcome.result for outcome in pool.map(Numbers(8)))
            outcomes = list(pool.map(["a", "die", "b", "c", "d"]))
    assert sum(later[0] < one[1] for one, later in pairwise(spans)) >= 4  # computed while the one before was written
    assert len({thread for *_, thread in spans}) == 2
    assert {outcome.job: outcome.attempts for outcome in outcomes} == {"a": 1, "die": 3, "b": 1, "c": 1, "d": 1}
    assert [outcome.job for outcome in outcomes if outcome.error] == ["die"]
