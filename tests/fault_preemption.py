"""Spot nodes that are taken back, one after the other, with a notice and without."""

import subprocess
import sys

from clusters import ray_cluster
from fault_bench import RAY, Bench, Outcome, Run

DRAIN = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
from ray._private.worker import global_worker
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
for node in sys.argv[2:]:
    assert global_worker.gcs_client.drain_node(node, reason, "taken back", int(1000 * time.time()) + 30_000)[0]
"""


def preemptions(bench: Bench) -> Outcome:
    """Fourteen nodes are taken back, every other one with a notice some seconds ahead; each is replaced at once."""
    with ray_cluster(2) as cluster:
        run = Run(bench, bench.home / "preemptions", *RAY, RAY_ADDRESS=cluster.address)
        run.start()
        taken = 0
        for number, n_shards in enumerate(bench.shard_counts(14)):
            if not run.wait_for(n_shards):
                break
            run.look()
            node = bench.random.choice(sorted(cluster.worker_nodes, key=lambda node: node.unique_id))
            if number % 2:
                notice = [sys.executable, "-c", DRAIN, cluster.address, node.node_id]
                subprocess.run(notice, check=True, capture_output=True, timeout=120)
            with run.paused():  # it takes seconds, in which the other node would do all that is left
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(num_cpus=1)
            taken += 1
        return run.outcome(taken, ok=run.end() == 0)
