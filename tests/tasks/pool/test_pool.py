"""The pool: the same outcomes here and in Ray actors, whatever dies, hangs or fails on the way."""

import os
import signal
import stat
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from negcore.errors import ModelError, PromptError, RunError
from tasks.pool.base import Outcome, PoolStatus, Resources, Stopped, WorkerLost
from tasks.pool.opening import open_pool
from tasks.pool.ray_session import ray_session

TWO = Resources(workers=2, cpus=0.5)
ONE = Resources(workers=1, cpus=0.5)


class Worker:
    """Does what its job says; a job is (verb, argument)."""

    def __init__(self, missing_model: str | None = None, bug: str | None = None) -> None:
        if missing_model is not None:
            raise ModelError(missing_model)
        if bug is not None:
            raise KeyError(bug)

    def run(self, job: tuple) -> object:
        return getattr(self, job[0])(*job[1:])

    def square(self, number: int) -> int:
        return number * number

    def sleep(self, seconds: float, value: object = None) -> object:
        time.sleep(seconds)
        return value

    def pid(self, _: int = 0) -> int:
        return os.getpid()

    def refuse(self, message: str) -> None:
        raise PromptError(message)

    def count_and_fail(self, path: str) -> None:
        with Path(path).open("a") as file:
            file.write("x")
        raise KeyError("a bug")

    def die(self) -> None:
        os._exit(1)

    def die_once(self, path: str) -> str:
        """Tell the process's id and wait to be killed; answer at once the second time."""
        if Path(path).exists():
            return "redone"
        Path(path).write_text(str(os.getpid()))
        time.sleep(60)
        return "never"

    def odd(self) -> None:
        class OddError(Exception):
            def __init__(self, one: int, two: int) -> None:
                super().__init__(f"{one} and {two}")

        raise OddError(1, 2)


class Session(NamedTuple):
    """What was seen when Ray was started."""

    handler_before: object
    handler_after: object
    left_by_an_earlier_session: list[str]


def _on_term(*_: object) -> None:
    """Stands for Prefect's handler."""


def _ray_processes() -> list[str]:
    children = psutil.Process().children(recursive=True)
    return [child.name() for child in children if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def session():
    """The second session of this process, so that a second one is known to work."""
    usual = signal.signal(signal.SIGTERM, _on_term)
    with ray_session():
        directory = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
    left = [*_ray_processes(), *(str(path) for path in directory.glob("*"))]
    with ray_session():
        seen = Session(_on_term, signal.getsignal(signal.SIGTERM), left)
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import the tests
        yield seen
    signal.signal(signal.SIGTERM, usual)


@pytest.fixture(params=["local", "ray"])
def backend(request):
    if request.param == "ray":
        request.getfixturevalue("session")
    return request.param


def run(backend, jobs, resources=TWO, stop=None, on_tick=None, **kwargs) -> list[Outcome]:
    with open_pool(backend, Worker, kwargs, resources, label="squares") as pool:
        return list(pool.map(jobs, stop=stop, on_tick=on_tick, tick_s=0.0))


@pytest.mark.parametrize(
    "wrong", [{"workers": 0}, {"jobs_a_worker": 0}, {"gpus": -1}, {"gpus": 1.5}, {"max_attempts": 0}]
)
def test_resources_out_of_range_are_refused(wrong):
    with pytest.raises(RunError, match=next(iter(wrong))):
        Resources(**wrong)


# What both backends must do


def test_each_job_is_answered_once(backend):
    outcomes = run(backend, [("square", number) for number in range(20)])
    assert sorted(outcome.result for outcome in outcomes) == [number * number for number in range(20)]
    assert all(outcome.result == outcome.job[1] ** 2 and outcome.error is None for outcome in outcomes)


def test_no_jobs_make_no_worker(backend):
    assert run(backend, [], missing_model="never looked for") == []


def test_an_error_is_handed_back_after_all_attempts(backend, tmp_path):
    ledger = tmp_path / "attempts"
    outcomes = run(backend, [("count_and_fail", str(ledger)), ("square", 3)], replace(TWO, max_attempts=2))
    failed = next(outcome for outcome in outcomes if outcome.job[0] == "count_and_fail")
    assert (failed.result, failed.error, failed.attempts) == (None, "KeyError: 'a bug'", 2)
    assert isinstance(failed.exception, KeyError)
    assert ledger.read_text() == "xx"
    assert [outcome.result for outcome in outcomes if outcome.error is None] == [9]


def test_an_error_that_only_the_user_can_mend_is_not_tried_again(backend):
    (outcome,) = run(backend, [("refuse", "the prompt 'x/1' is empty")])
    assert (outcome.error, outcome.attempts) == ("PromptError: the prompt 'x/1' is empty", 1)
    assert isinstance(outcome.exception, PromptError)


def test_a_missing_model_reaches_the_caller_as_it_is(backend):
    with pytest.raises(ModelError, match="^no such model$"):
        run(backend, [("square", 1)], missing_model="no such model")


def test_a_worker_that_cannot_start_is_a_run_error(backend):
    with pytest.raises(RunError, match="squares.*KeyError: 'no such key'"):
        run(backend, [("square", 1)], replace(ONE, max_replacements=1), bug="no such key")


def test_a_stop_ends_the_outcomes(backend):
    stop = threading.Event()
    with open_pool(backend, Worker, {}, ONE, label="squares") as pool:
        outcomes = pool.map([("square", 2), ("square", 3)], stop=stop)
        assert next(outcomes).result == 4
        stop.set()
        with pytest.raises(Stopped):
            next(outcomes)


def test_a_pool_that_is_closed_under_a_batch_stops_it(session):
    ended: list[BaseException] = []
    running = threading.Event()

    def consume(pool):
        try:
            list(
                pool.map([("sleep", 30)], on_tick=lambda status: running.set() if status.running else None, tick_s=0.0)
            )
        except BaseException as error:
            ended.append(error)

    with open_pool("ray", Worker, {}, ONE, label="squares") as pool:
        thread = threading.Thread(target=consume, args=(pool,))
        thread.start()
        assert running.wait(60)
    thread.join(20)
    assert [type(error) for error in ended] == [Stopped]


def test_ticks_tell_how_far_the_jobs_are(backend):
    seen: list[PoolStatus] = []
    run(backend, [("square", 2), ("square", 3), ("refuse", "no")], on_tick=seen.append)
    assert (seen[0].done, seen[0].queued, seen[0].ready) == (0, 3, 0)
    assert (seen[-1].done, seen[-1].failed, seen[-1].queued, seen[-1].running) == (2, 1, 0, 0)
    assert all(tick.done + tick.failed + tick.queued + tick.running <= 3 for tick in seen)
    assert {tick.label for tick in seen} == {"squares"}


def test_a_batch_left_early_does_not_disturb_the_next(backend):
    with open_pool(backend, Worker, {}, TWO, label="squares") as pool:
        first = pool.map([("square", 2), ("sleep", 0.3), ("sleep", 0.3)])
        assert next(first).result == 4
        first.close()
        assert [outcome.result for outcome in pool.map([("square", 5)])] == [25]


def test_threads_take_turns(backend):
    answers: dict[int, list[int]] = {}

    def square(pool, number):
        answers[number] = [outcome.result for outcome in pool.map([("square", number)] * 3)]

    with open_pool(backend, Worker, {}, TWO, label="squares") as pool:
        threads = [threading.Thread(target=square, args=(pool, number)) for number in (2, 3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {2: [4] * 3, 3: [9] * 3, 4: [16] * 3}


# What only actors can do


def test_a_job_that_kills_its_worker_is_handed_back_and_the_others_finish(session):
    outcomes = run("ray", [("die",), *(("square", number) for number in range(6))])
    poison = next(outcome for outcome in outcomes if outcome.job == ("die",))
    assert isinstance(poison.exception, WorkerLost)
    assert poison.attempts == 3
    assert sorted(outcome.result for outcome in outcomes if outcome is not poison) == [0, 1, 4, 9, 16, 25]


def test_a_pool_whose_replacements_are_spent_says_so(session):
    with pytest.raises(RunError, match="no worker is left, 2 were lost"):
        run("ray", [("die",), ("die",)], replace(ONE, max_replacements=1))


def test_what_one_job_costs_and_what_was_lost_before_a_success_spends_no_more_replacements(session):
    jobs = [("die",), ("square", 2), ("die",), ("square", 3)]
    outcomes = run("ray", jobs, replace(ONE, max_attempts=2, max_replacements=1))
    assert sorted(outcome.attempts for outcome in outcomes if outcome.error) == [2, 2]
    assert sorted(outcome.result for outcome in outcomes if not outcome.error) == [4, 9]


def test_a_suspect_gets_one_attempt_and_a_worker_of_its_own(session):
    with open_pool("ray", Worker, {}, replace(ONE, max_replacements=0), label="squares") as pool:
        jobs = [("pid",), ("count_and_fail", os.devnull), ("die",), ("pid",)]
        first, failed, died, last = pool.map(jobs, suspect=True)
    assert (failed.error, failed.attempts) == ("KeyError: 'a bug'", 1)
    assert (type(died.exception), died.attempts) == (WorkerLost, 1)
    assert first.result != last.result


def test_a_worker_killed_during_a_job_is_replaced_and_the_job_done_again(session, tmp_path):
    note = tmp_path / "pid"

    def kill_it(_: PoolStatus) -> None:
        if note.exists() and (pid := note.read_text()) and psutil.pid_exists(int(pid)):
            os.kill(int(pid), signal.SIGKILL)

    (outcome,) = run("ray", [("die_once", str(note))], ONE, on_tick=kill_it)
    assert (outcome.result, outcome.attempts) == ("redone", 2)


def test_a_job_over_its_limit_loses_its_worker(session):
    outcomes = run("ray", [("sleep", 60), ("square", 2)], replace(TWO, job_timeout_s=0.5, max_attempts=1))
    hung = next(outcome for outcome in outcomes if outcome.job[0] == "sleep")
    assert hung.error == "WorkerLost: the worker gave no answer within 0.5 s"
    assert [outcome.result for outcome in outcomes if outcome is not hung] == [4]


def test_a_worker_that_fails_again_and_again_is_replaced(session):
    with open_pool("ray", Worker, {}, ONE, label="squares") as pool:
        pids = [next(pool.map([("pid",)])).result]
        assert next(pool.map([("count_and_fail", os.devnull)])).attempts == 3
        pids.append(next(pool.map([("pid",)])).result)
    assert pids[0] != pids[1]


def test_an_error_that_cannot_be_unpickled_keeps_its_message(session):
    (outcome,) = run("ray", [("odd",)], replace(ONE, max_attempts=1))
    assert "OddError: 1 and 2" in outcome.error


def test_a_demand_that_no_node_meets_is_refused_at_once(session):
    began = time.monotonic()
    with (
        pytest.raises(RunError, match=r"a worker needs 1 CPU and 512 GPU, but the nodes offer: .* 0 GPU"),
        open_pool("ray", Worker, {}, Resources(gpus=512), label="squares"),
    ):
        pass
    assert time.monotonic() - began < 2


def test_a_pool_that_waits_for_a_busy_cluster_says_so_and_gives_up(session, monkeypatch):
    monkeypatch.setattr("tasks.pool.actor_pool._PLACED_SOON_S", 0.5)
    seen: list[PoolStatus] = []
    cores = float(os.cpu_count())
    with open_pool("ray", Worker, {}, Resources(cpus=cores), label="first") as first:
        next(first.map([("square", 1)]))
        with pytest.raises(
            RunError, match=f"squares: gave up waiting for {cores:g} CPU and 0 GPU a worker .free: 0 CPU"
        ):
            run("ray", [("square", 1)], Resources(cpus=cores, start_timeout_s=1.5), on_tick=seen.append)
    assert any(tick.note.startswith("waiting for") for tick in seen)


def test_what_workers_print_does_not_reach_the_terminal(session, capfd):
    class Loud(Worker):
        def square(self, number: int) -> int:
            print("loud", flush=True)
            return number * number

    with open_pool("ray", Loud, {}, ONE, label="squares") as pool:
        assert [outcome.result for outcome in pool.map([("square", 2)])] == [4]
    time.sleep(0.5)
    assert "loud" not in "".join(capfd.readouterr())


def test_a_pool_leaves_no_worker_behind(session):
    with open_pool("ray", Worker, {}, ONE, label="squares") as pool:
        pid = next(pool.map([("pid",)])).result
        assert psutil.pid_exists(pid)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert not psutil.pid_exists(pid)


# The session


def test_the_termination_handler_is_the_one_from_before(session):
    assert session.handler_after is session.handler_before


def test_a_session_leaves_nothing_behind(session):
    assert session.left_by_an_earlier_session == []


def test_a_local_ray_listens_on_the_loopback_interface_only(session):
    listening = [
        connection.laddr.ip
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_only_the_user_can_read_the_token_of_a_local_ray(session):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700


def test_a_session_inside_a_session_leaves_ray_up(session):
    import ray

    with ray_session():
        pass
    assert ray.is_initialized()


@pytest.mark.parametrize(
    ("address", "message"), [("127.0.0.1:1", "no Ray cluster answers"), ("ray://head:10001", "must be host:port")]
)
def test_a_cluster_that_cannot_be_joined_is_an_error_at_once(monkeypatch, address, message):
    monkeypatch.setitem(sys.modules, "ray", type(sys)("ray"))
    sys.modules["ray"].is_initialized = lambda: False
    with pytest.raises(RunError, match=message), ray_session(address):
        pass
