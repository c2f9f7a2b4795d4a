"""Nodes come, go, and run out of memory; no job is lost or blamed for it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from clusters import ray_cluster
from support import REPOSITORY

from negcore.errors import RunError
from tasks.pool import isolate, ray_pool
from tasks.pool import ray_session as sessions
from tasks.pool.base import Attempt, Batch, NodeLost, Outcome, OutOfMemory, PoolStatus, Resources, WorkerLost
from tasks.pool.nodes import is_dead
from tasks.pool.opening import open_pool
from tasks.pool.ray_session import ray_session

MEMORY = """
from tasks.pool.base import Resources
from tasks.pool.opening import open_pool

class Sleeper:
    def run(self, seconds):
        import time
        time.sleep(seconds)

with open_pool("ray", Sleeper, {}, Resources(max_replacements=1), label="memory") as pool:
    list(pool.map([30.0]))
"""


class Worker:
    """Does what its job says; a job is (verb, argument)."""

    def run(self, job: tuple) -> object:
        return getattr(self, job[0])(*job[1:])

    def square(self, number: int) -> int:
        return number * number

    def node(self, seconds: float = 0.0) -> str:
        import ray

        time.sleep(seconds)
        return ray.get_runtime_context().get_node_id()

    def alone(self, folder: str) -> list[str]:
        """Die the first time; the second time return who else is at work."""
        path = Path(folder)
        if not (path / "died").exists():
            (path / "died").touch()
            os._exit(1)
        return [one.name for one in path.glob("busy-*")]

    def busy(self, folder: str, seconds: float) -> str:
        mark = Path(folder, f"busy-{os.getpid()}")
        mark.touch()
        time.sleep(seconds)
        mark.unlink()
        return "busy"


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(2) as cluster:
        cluster.add_node(num_cpus=1, labels={"kind": "fast", "zone": "a"})
        with ray_session(cluster.address):
            from ray import cloudpickle

            cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import the tests
            yield cluster


def outcomes(jobs, resources, **options) -> list[Outcome]:
    with open_pool("ray", Worker, {}, resources, label="nodes") as pool:
        return list(pool.map(jobs, **options))


def nodes():
    import ray

    return ray.nodes()


def drain(node_id):
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason, deadline_ms = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, int(1000 * time.time()) + 600_000
    assert global_worker.gcs_client.drain_node(node_id, reason, "a spot node", deadline_ms)[0]


def batch(max_attempts=3, suspect=False) -> Batch:
    return Batch([], max_attempts, suspect=suspect)


# Which losses count


def test_a_job_may_lose_five_nodes_before_they_count_as_attempts():
    jobs = batch(max_attempts=2)
    one = Attempt("job", jobs)
    for _ in range(6):
        assert jobs.failed_once(one, NodeLost("gone")) is None
    assert jobs.failed_once(one, NodeLost("gone")).attempts == 2


@pytest.mark.parametrize("fault", [NodeLost("gone"), WorkerLost("killed"), OutOfMemory("full"), OSError("slow")])
def test_a_worker_is_told_that_another_had_the_job_before(fault):
    class Job:
        def again(self):
            return "again"

    jobs, job = batch(), Job()
    one = Attempt(job, jobs)
    assert one.to_run is job
    assert jobs.failed_once(one, fault) is None
    assert (one.to_run, one.job) == ("again", job)
    plain, beside = Attempt("plain", jobs), Attempt(job, jobs)
    for attempt in (plain, beside):
        jobs.lost_beside(attempt, fault)
    assert (plain.to_run, beside.to_run) == ("plain", "again")


def test_a_lost_node_is_no_fault_of_a_suspect_either():
    jobs = batch(max_attempts=1, suspect=True)
    one = Attempt("job", jobs)
    assert jobs.failed_once(one, NodeLost("gone")) is None
    assert jobs.failed_once(one, WorkerLost("killed")) is not None


def test_a_job_whose_node_ran_out_of_memory_is_tried_alone_before_that_counts():
    jobs = batch(max_attempts=1)
    one = Attempt("job", jobs)
    assert jobs.failed_once(one, OutOfMemory("full")) is None
    assert (list(jobs.again), list(jobs.alone)) == ([], [one])
    assert jobs.failed_once(one, OutOfMemory("full")) is not None


def test_no_row_is_set_aside_for_what_a_node_did():
    for fault in (NodeLost("gone"), OutOfMemory("full")):
        assert not isolate._is_suspect(Outcome(SimpleNamespace(trial=None), None, fault, 3))
    assert isolate._is_suspect(Outcome(SimpleNamespace(trial=None), None, WorkerLost("killed"), 3))


# Memory


def test_what_ran_out_of_memory_runs_alone_in_a_fresh_worker(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pool.RayPool, "_loss_of", lambda self, error: OutOfMemory("full"))
    jobs = [("alone", str(tmp_path)), *[("busy", str(tmp_path), 1.0)] * 4]
    done = {outcome.job[0]: outcome for outcome in outcomes(jobs, Resources(workers=3, max_replacements=0))}
    assert (done["alone"].result, done["alone"].attempts) == ([], 1)
    assert done["busy"].result == "busy"


@pytest.mark.slow
def test_rays_memory_killer_is_recognised():
    """With so low a threshold Ray ends every worker as soon as it looks."""
    settings = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "200"}
    command = [sys.executable, "-c", MEMORY]
    ended = subprocess.run(command, env=os.environ | settings, cwd=REPOSITORY, capture_output=True, text=True)
    assert "a worker was lost: OutOfMemory: Ray ended the worker's process" in ended.stderr


# Nodes that go


def test_jobs_of_a_node_that_goes_are_done_elsewhere_and_cost_no_replacement(cluster):
    node = cluster.add_node(num_cpus=1, resources={"spot": 1})
    with open_pool("ray", Worker, {}, Resources(workers=4, max_replacements=0), label="nodes") as pool:
        answers = pool.map([("node", 1.0)] * 12)
        first = next(answers)
        cluster.remove_node(node, allow_graceful=False)
        rest = list(answers)
    assert len([first, *rest]) == 12
    assert all(outcome.exception is None and outcome.attempts == 1 for outcome in [first, *rest])


def test_a_node_that_is_being_drained_gets_no_further_job(cluster, monkeypatch):
    monkeypatch.setattr("tasks.pool.nodes._LOOK_S", 0.2)
    node = cluster.add_node(num_cpus=1)
    with open_pool("ray", Worker, {}, Resources(workers=4, max_replacements=0), label="nodes") as pool:
        seen = [pool_outcome.result for pool_outcome in pool.map([("node", 0.5)] * 8)]
        assert node.node_id in seen
        drain(node.node_id)
        time.sleep(1)
        after = list(pool.map([("node", 0.5)] * 8))
    assert {outcome.exception for outcome in after} == {None}
    assert node.node_id not in {outcome.result for outcome in after}


# Nodes that are not there


def test_workers_run_where_the_labels_are(cluster):
    fast = Resources(workers=2, node_labels=(("kind", "fast"), ("zone", "a")))
    labelled = {node["NodeID"] for node in nodes() if node["Labels"].get("kind") == "fast"}
    assert {outcome.result for outcome in outcomes([("node",)] * 3, fast)} == labelled


def test_labels_that_no_node_has_are_refused_with_those_that_are_offered(cluster):
    slow = Resources(node_labels=(("kind", "slow"),))
    with pytest.raises(RunError, match="needs 1 CPU and 0 GPU with kind=slow, but the nodes offer: .*kind=fast"):
        outcomes([("node",)], slow)


def test_a_cluster_that_grows_is_waited_for_without_limit(cluster):
    ticks: list[PoolStatus] = []
    waits = Resources(node_labels=(("kind", "new"),), wait_for_nodes=True, start_timeout_s=0.5)

    def look(status):
        ticks.append(status)
        if len(ticks) == 12:
            cluster.add_node(num_cpus=1, labels={"kind": "new"})

    (outcome,) = outcomes([("square", 3)], waits, on_tick=look, tick_s=0.5)
    assert outcome.result == 9
    assert any(tick.note.startswith("waiting for 1 CPU and 0 GPU with kind=new a worker") for tick in ticks)


def test_as_many_workers_are_asked_for_as_are_wanted(cluster):
    """An autoscaler adds nodes for actors that wait: all of them must wait at once."""
    ticks: list[PoolStatus] = []
    many = Resources(workers=8)
    outcomes([("node", 1.0)] * 16, many, on_tick=ticks.append, tick_s=0.2)
    assert max(tick.ready + tick.starting for tick in ticks) == 8


def test_a_node_that_the_head_takes_for_dead_ends_its_driver_in_a_line(monkeypatch):
    nodes = [{"NodeID": "mine", "Alive": True}, {"NodeID": "other", "Alive": False}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr(sessions, "_HEAD_BEAT_S", 0.01)
    monkeypatch.setattr(sessions, "check_reachable", lambda address: None)
    with sessions._watched("10.0.0.1:6379", "mine"):
        time.sleep(0.1)
        sessions.check_head()
        nodes[0]["Alive"] = False
        time.sleep(0.1)
        with pytest.raises(RunError, match=r"took this machine's Ray node for dead.*ray start --address=10.0.0.1:6379"):
            sessions.check_head()


@pytest.mark.parametrize("question", ["ray.available_resources", "ray._private.state.state.get_draining_nodes"])
def test_a_pool_whose_head_is_silent_waits_for_none_of_its_answers(cluster, monkeypatch, question):
    ticks: list[PoolStatus] = []
    silent = threading.Event()

    def check_head():
        if len(ticks) > 2:
            raise RunError("the head is silent")

    with monkeypatch.context() as patch:
        patch.setattr(question, silent.wait)
        patch.setattr(ray_pool, "check_head", check_head)
        waits = Resources(node_labels=(("kind", "none"),), wait_for_nodes=True)
        with pytest.raises(RunError, match="the head is silent"):
            outcomes([("square", 3)], waits, on_tick=ticks.append, tick_s=0.1)
    silent.set()


def test_a_pool_is_closed_though_a_silent_head_does_not_end_its_actors(cluster, monkeypatch):
    import ray

    silent, kill = threading.Event(), ray.kill
    monkeypatch.setattr(ray_pool, "_KILL_S", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr("ray.kill", lambda handle: (silent.wait(), kill(handle)))
        with open_pool("ray", Worker, {}, Resources(), label="nodes") as pool:
            (outcome,) = pool.map([("square", 3)])
            began = time.monotonic()
        assert outcome.result == 9
        assert time.monotonic() - began < 5
        silent.set()


def test_a_silent_head_is_told_though_it_does_not_answer_about_nodes(monkeypatch):
    silent = threading.Event()
    monkeypatch.setattr("ray.nodes", silent.wait)
    monkeypatch.setattr(sessions, "_HEAD_BEAT_S", 0.01)
    monkeypatch.setattr(sessions, "_HEAD_SILENCE_S", 0.05)
    monkeypatch.setattr(sessions, "check_reachable", lambda address: unreachable())
    with sessions._watched("10.0.0.1:6379", "mine"):
        time.sleep(0.3)
        with pytest.raises(RunError, match="has not answered for"):
            sessions.check_head()
    silent.set()


def unreachable():
    raise RunError("no Ray cluster answers")


def test_a_silent_cluster_says_nothing_of_nodes(monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: (_ for _ in ()).throw(RuntimeError("no answer")))
    assert not is_dead("mine")
