"""Ray on hosts of its own, a head, a worker and a driver: what is lost, what is refused, and which ports are used."""

import pytest
from fault_bench import Bench, published
from fault_hosts import cut_for, lost_worker, started
from hosts import HEAD_PORT, NODE_PORTS, WORKER_PORTS, HostRun, three_hosts, why_no_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]

BETWEEN_HOSTS = {HEAD_PORT, NODE_PORTS["node-manager-port"], NODE_PORTS["object-manager-port"], *WORKER_PORTS}
"""Ports that docs/cluster.md says must be open."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"), seed=0)


@pytest.fixture(scope="module")
def cluster(bench):
    with three_hosts(bench.home) as hosts:
        yield hosts


def test_workers_on_two_hosts_write_the_bytes_of_one_local_worker(bench, cluster):
    run = started(bench, cluster, "apart")
    with run.paused():
        assert [len(host.actors()) for host in cluster.hosts.values()] == [1, 1, 0]
    assert run.end() == 0, run.said
    assert published(run.directory) == bench.reference


def test_hosts_use_no_port_between_them_but_the_documented_ones(cluster):
    assert {connection.port for connection in cluster.connections()} <= BETWEEN_HOSTS


def test_a_driver_on_another_host_is_refused_while_the_first_one_lives(bench, cluster):
    run = started(bench, cluster, "claimed")
    actors = [actor for host in cluster.hosts.values() for actor in host.actors()]
    for actor in actors:  # the run does not end meanwhile
        actor.suspend()
    other = HostRun(bench, cluster, "claimed", host="head")
    assert other.finish() == 2, other.said
    assert "is held by pid" in other.said and "on driver (" in other.said
    for actor in actors:
        actor.resume()
    assert run.end() == 0, run.said


def test_a_run_outlives_a_link_that_is_cut_for_a_while(bench, cluster):
    assert cut_for(bench, cluster, "worker", 15.0).is_clean


def test_a_run_outlives_the_loss_of_a_workers_host(bench, cluster):
    assert lost_worker(bench, cluster).is_clean
