"""Jobs of many callers on the same actors, in simulated time: order, memory, ends, and pools that follow each other."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from simulated_pool import Numbers, SimulatedPool, SleepingPool, simulated_pool

from negcore.errors import ModelError, RunError
from tasks.pool.base import Outcome, OutOfMemory, PoolStatus, Resources, Stopped

ONE = Resources(workers=1)


def call_all(pool: SimulatedPool, calls: list[dict]) -> list[list[Outcome]]:
    """The outcomes of several calls of `map` at the same time, each from a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(lambda call: list(pool.map(call.pop("jobs"), **call)), calls))


def test_jobs_of_the_lowest_turn_come_first_whoever_calls_first():
    with simulated_pool(ONE, lambda job: 1.0, n_callers=3) as pool:
        jobs = {2: ["e", "f"], 0: ["a", "b"], 1: ["c", "d"]}
        answers = call_all(pool, [{"jobs": of_turn, "turn": turn} for turn, of_turn in jobs.items()])
    assert pool.started == list("abcdef")
    assert [[outcome.result for outcome in of_call] for of_call in answers] == list(jobs.values())


def test_the_jobs_of_one_caller_fill_the_workers_that_another_leaves_idle():
    with simulated_pool(Resources(workers=8), lambda job: job, n_callers=4) as pool:
        call_all(pool, [{"jobs": [4.0] * 6, "turn": turn} for turn in range(4)])
    assert (pool.clock_s, pool.share_busy) == (12.0, 1.0)
    with simulated_pool(Resources(workers=8), lambda job: job) as pool:
        for _ in range(4):
            list(pool.map([4.0] * 6))
    assert (pool.clock_s, pool.share_busy) == (16.0, 0.75)


def test_a_job_is_made_when_a_worker_is_free_for_it():
    jobs = Numbers(50)
    with simulated_pool(Resources(workers=4), lambda job: 1.0) as pool:
        outcomes = pool.map(jobs)
        ahead = [jobs.n_made - done for done, _ in enumerate(outcomes, start=1)]
    assert jobs.n_made == 50
    assert max(ahead) <= 2 * 4  # those with a worker, and those that ended together with the one that was handed over


def test_a_caller_that_leaves_does_not_disturb_the_others():
    with simulated_pool(Resources(workers=2), lambda job: 1.0, n_callers=2) as pool, ThreadPoolExecutor(1) as threads:
        other = threads.submit(list, pool.map(Numbers(40), turn=1))
        leaving = pool.map(Numbers(40))
        assert next(leaving).result == 0
        leaving.close()
        assert [outcome.result for outcome in other.result(30)] == list(range(40))


def test_a_stop_ends_one_caller_alone():
    stop = threading.Event()
    with simulated_pool(Resources(workers=2), lambda job: 1.0, n_callers=2) as pool, ThreadPoolExecutor(1) as threads:
        other = threads.submit(list, pool.map(Numbers(30), turn=1))
        stopped = pool.map(Numbers(1000), stop=stop)
        next(stopped)
        stop.set()
        with pytest.raises(Stopped):
            list(stopped)
        assert len(other.result(30)) == 30


@pytest.mark.parametrize("error", [ModelError("no such model"), KeyError("a bug")])
def test_an_error_of_the_workers_themselves_ends_every_caller(error):
    class Broken(SimulatedPool):
        def _error_of(self, call):
            return error if call.exception() is None and call.result() is None else None

    pool = Broken(Resources(workers=2, max_replacements=1), lambda job: 1.0, n_callers=2)
    with closing(pool), ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(list, pool.map(Numbers(5))) for _ in range(2)]
        ends = [call.exception(30) for call in calls]
    expected = ModelError if isinstance(error, ModelError) else RunError
    assert [type(end) for end in ends] == [expected] * 2


def test_a_status_tells_the_jobs_of_the_caller_and_those_of_others():
    seen: list[PoolStatus] = []
    pool = SleepingPool(Resources(workers=2), lambda job: 0.3)
    with closing(pool):
        calls = [{"jobs": Numbers(4)}, {"jobs": Numbers(3), "turn": 1, "on_tick": seen.append, "tick_s": 0.0}]
        call_all(pool, calls)
    assert (seen[0].queued, seen[-1].done) == (3, 3)
    assert 2 in {one.elsewhere for one in seen if one.queued == 3}
    assert max(one.running + one.elsewhere for one in seen) == 2


def test_a_job_that_is_to_be_alone_waits_for_the_jobs_of_all_callers():
    def answer(job):
        if job == "large" and pool.n_made == 2:
            raise OutOfMemory("full")
        return sum(len(actor.attempts) for actor in pool._actors)

    with simulated_pool(Resources(workers=2), lambda job: 1.0, answer=answer, n_callers=2) as pool:
        first, second = call_all(pool, [{"jobs": ["large", "small"]}, {"jobs": ["small"] * 6, "turn": 1}])
    alone = next(outcome for outcome in first if outcome.job == "large")
    assert (alone.result, alone.attempts, len(second)) == (1, 1, 6)
    assert pool.started[-1] == "large"


def test_a_thousand_workers_cost_the_driver_little_a_job():
    """On a quiet machine it is a tenth of a millisecond; tests/pool_bench.py measures it."""
    began = time.process_time()
    with simulated_pool(Resources(workers=1000), lambda job: 10.0 + job % 7) as pool:
        n_done = sum(1 for _ in pool.map(Numbers(10_000)))
    assert n_done == 10_000
    assert (time.process_time() - began) / n_done < 0.003


# Pools that follow each other


def most_at_once(spans: list[tuple[float, float]]) -> int:
    """The largest number of jobs at a time."""
    return max(sum(begin <= at < end for begin, end in spans) for at, _ in spans)


def sleeping(seconds: list[float], workers: int = 4) -> SleepingPool:
    return SleepingPool(Resources(workers=workers), lambda job: seconds[job])


def test_a_pool_that_follows_begins_as_the_earlier_one_leaves_workers_idle():
    first, second = sleeping([0.1] * 8 + [1.5]), sleeping([0.1] * 12)
    with closing(first), closing(second), ThreadPoolExecutor(2) as threads:
        early = threads.submit(list, first.map(Numbers(9)))
        while not first.has_room(1):
            assert not early.done()
            time.sleep(0.01)
        second.follow(first)
        late = threads.submit(list, second.map(Numbers(12)))
        assert len(early.result(30)) + len(late.result(30)) == 21
    assert min(begin for begin, _ in second.spans) < max(end for _, end in first.spans)
    assert max(end for _, end in second.spans) < max(end for _, end in first.spans)
    assert most_at_once(first.spans + second.spans) == 4


def test_there_is_no_room_while_a_job_waits_or_a_caller_has_not_come_yet():
    pool = sleeping([0.3] * 12)
    with closing(pool), ThreadPoolExecutor(1) as threads:
        assert pool.has_room(0)
        assert not pool.has_room(1)
        call = threads.submit(list, pool.map(Numbers(6)))
        seen = set()
        while not call.done():
            with pool._lock:
                waits = any(batch.n_queued for batch in pool._batches)
            seen.add((waits, pool.has_room(1)))
            time.sleep(0.01)
        assert (True, True) not in seen and (False, True) in seen


def test_a_pool_that_follows_gives_way_to_what_the_earlier_one_tries_again():
    """The last job of the earlier pool fails once, when the other has taken all other workers."""
    failed = threading.Event()

    def answer(job):
        if job == 4 and not failed.is_set():
            failed.set()
            raise KeyError("once")
        return job

    seconds = [0.05] * 4 + [0.6]
    first = SleepingPool(Resources(workers=2), lambda job: seconds[job], answer=answer)
    second = sleeping([0.1] * 60, workers=2)
    with closing(first), closing(second), ThreadPoolExecutor(2) as threads:
        early = threads.submit(list, first.map(Numbers(5)))
        while not first.has_room(1):
            time.sleep(0.01)
        second.follow(first)
        late = threads.submit(list, second.map(Numbers(60)))
        assert {outcome.result for outcome in early.result(30)} == set(range(5))
        n_done = len(second.spans)
        assert len(late.result(30)) == 60 > n_done
    assert most_at_once(first.spans + second.spans) == 2
