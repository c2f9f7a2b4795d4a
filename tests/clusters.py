"""Ray clusters of several nodes on this machine: one host, but raylets of their own, as Ray's own tests make them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tasks.pool.ray_session import _ENVIRONMENT, _local_environment, _short_directory


@contextmanager
def ray_cluster(n_nodes: int) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster`: a head without CPUs, and nodes with one CPU each.

    It is closed to the network and to other users as a local Ray is. Programs that are started in the block reach it
    with its `address`.
    """
    with _short_directory() as home, patch.dict(os.environ, _settings(home)):
        from ray.cluster_utils import Cluster  # reads the settings

        spare = {
            "include_dashboard": False,
            "include_log_monitor": False,
            "no_monitor": True,
        }  # Ray waits 30 s for a head
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **spare})
        try:
            for _ in range(n_nodes):
                cluster.add_node(num_cpus=1)
            yield cluster
        finally:
            cluster.shutdown()


def _settings(home: Path) -> dict[str, str]:
    return _ENVIRONMENT | _local_environment(home) | {"RAY_TMPDIR": str(home)}
