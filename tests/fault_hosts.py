"""Runs on several hosts, one of which is lost, or behind a link that is cut for a while or for good."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
from fault_bench import N_SHARDS, Bench, CannotTry, Outcome, finished
from hosts import Cluster, HostRun, three_hosts, why_no_hosts

CUT_S = 30.0
HEARD_S = 0.5
HEAD_IS_LOST = "has not answered for"
NODE_IS_LOST = "took this machine's Ray node for dead"


def host_lost(bench: Bench) -> Outcome:
    """The worker's host is switched off in the middle of a run; then the driver's, and another takes the run over."""
    with hosts_for(bench) as cluster:
        return lost_worker(bench, cluster) + lost_driver(bench, cluster)


def link_cut(bench: Bench) -> Outcome:
    """The link of the worker's host, then the driver's, is cut for 30 s; then both for good."""
    with hosts_for(bench) as cluster:
        return (
            cut_for(bench, cluster, "worker", CUT_S)
            + cut_for(bench, cluster, "driver", CUT_S)
            + worker_cut_off(bench, cluster)
            + driver_cut_off(bench, cluster)
        )


@contextmanager
def hosts_for(bench: Bench) -> Iterator[Cluster]:
    """Have hosts that share the bench's directory."""
    reason = why_no_hosts()
    if reason is not None:
        raise CannotTry(reason)
    with three_hosts(bench.home) as cluster:
        yield cluster


def lost_worker(bench: Bench, cluster: Cluster) -> Outcome:
    run = started(bench, cluster, "host-lost-worker")
    with still(run, cluster):
        cluster.lose("worker")
    outcome = run.outcome(1, ok=run.end() == 0)
    cluster.add("worker", "--num-cpus=1")
    return outcome


def lost_driver(bench: Bench, cluster: Cluster) -> Outcome:
    """The driver's host is gone; one on the head's host waits for a sign of life, and then goes on."""
    run = started(bench, cluster, "host-lost-driver")
    with still(run, cluster):
        cluster.lose("driver")
    run.end()
    heir = heir_of(run, bench, cluster)
    took_over = heir.finish() == 0 and "waiting for a sign of life" in " ".join(heir.said.split())
    cluster.add("driver", "--num-cpus=0")
    return heir.outcome(1, ok=took_over)


def cut_for(bench: Bench, cluster: Cluster, host: str, seconds: float) -> Outcome:
    """A driver whose own node the head takes for dead meanwhile says so and ends; the same command then finishes."""
    run = started(bench, cluster, f"cut-{host}")
    with still(run, cluster):
        cluster.cut(host)
    time.sleep(seconds)
    cluster.mend(host)
    code = run.end()
    told = host == "driver" and code == 1 and NODE_IS_LOST in " ".join(run.said.split())
    if code != 0 and not told:
        print(f"{run.directory}: the driver ended with {code}: {run.said}")
    renew(cluster, host)
    last = heir_of(run, bench, cluster) if told else run
    return last.outcome(1, ok=code == 0 or (told and last.finish() == 0))


def worker_cut_off(bench: Bench, cluster: Cluster) -> Outcome:
    run = started(bench, cluster, "cut-off-worker")
    with still(run, cluster):
        cluster.cut("worker")
    outcome = run.outcome(1, ok=run.end() == 0)
    renew(cluster, "worker")
    return outcome


def driver_cut_off(bench: Bench, cluster: Cluster) -> Outcome:
    """The driver that reaches no head any more says so and ends; the same command on another host finishes."""
    run = started(bench, cluster, "cut-off-driver")
    with still(run, cluster):
        cluster.cut("driver")
    code = run.end()
    told = code == 1 and HEAD_IS_LOST in " ".join(run.said.split()) and "Traceback" not in run.said
    if not told:
        print(f"{run.directory}: the driver that was cut off ended with {code}: {run.said}")
    heir = heir_of(run, bench, cluster)
    return heir.outcome(1, ok=heir.finish() == 0 and told)


def renew(cluster: Cluster, host: str) -> None:
    """Switch a host off and on: to Ray, a node that was away for as long is dead, and it ends itself."""
    cluster.lose(host)
    cluster.add(host, f"--num-cpus={1 if host == 'worker' else 0}")


@contextmanager
def still(run: HostRun, cluster: Cluster) -> Iterator[None]:
    """Let worker and driver stand still, in the middle of the run, once the driver has heard what is finished."""
    actors = cluster.hosts["worker"].actors()
    for actor in actors:
        actor.suspend()
    run.look()
    time.sleep(HEARD_S)
    assert len(finished(run.directory)) < N_SHARDS, "the run was over before it could be disturbed"
    with run.paused():
        yield
    for actor in actors:
        with suppress(psutil.NoSuchProcess):
            actor.resume()


def heir_of(run: HostRun, bench: Bench, cluster: Cluster) -> HostRun:
    """Return the same command on the head's host, held to what the run had finished."""
    heir = HostRun(bench, cluster, run.directory.name, host="head")
    heir.inherit(run)
    return heir


def started(bench: Bench, cluster: Cluster, name: str) -> HostRun:
    """Start a run on the driver's host and wait until a part of it is done."""
    run = HostRun(bench, cluster, name)
    run.start()
    assert run.wait_for(N_SHARDS // 6), run.said
    return run
