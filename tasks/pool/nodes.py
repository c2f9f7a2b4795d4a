"""The nodes of a Ray cluster as a pool sees them: what they offer, and which of them are about to go."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from negcore.errors import RunError, one_line
from tasks.machine import Room
from tasks.pool.base import Resources

logger = logging.getLogger(__name__)

_LOOK_S = 2.0
"""Time between two looks: a spot node gets a drain notice some 30 s to 2 minutes before it is taken back."""


class NodeWatch:
    """A thread that asks the cluster what its nodes do: behind a cut link, the answer may take for ever."""

    def __init__(self) -> None:
        self.draining: frozenset[str] = frozenset()
        """Ids of the nodes that are about to go: they get no more work."""
        self.free: Mapping[str, float] | None = None
        """Amounts that no worker has taken; None until they are known."""
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="nodes", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _look(self) -> None:
        import ray
        from ray._private.state import state  # the public API does not tell of drain notices

        while not self._closed.is_set():
            try:
                self.draining = frozenset(state.get_draining_nodes())
                self.free = ray.available_resources()
            except Exception as error:  # Ray has no type for a silent or closed cluster
                logger.debug("nodes cannot be looked at: %s", one_line(error))
            self._closed.wait(_LOOK_S)


def is_dead(node: str) -> bool:
    """Tell whether the head says that a node, given by its id, has died; False where it does not answer."""
    import ray

    try:
        return any(one["NodeID"] == node and not one["Alive"] for one in ray.nodes())
    except Exception as error:  # Ray has no type for a silent or closed cluster
        logger.debug("nodes cannot be read: %s", one_line(error))
        return False


def check_demand(resources: Resources, label: str) -> None:
    """Refuse a worker that fits on no node of a cluster that does not grow: Ray would wait for ever, and in silence.

    Raises
    ------
    RunError
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if resources.wait_for_nodes or any(_fits(resources, node) for node in nodes):
        return
    offers = "; ".join(sorted({_offer(resources, node["Resources"], node["Labels"]) for node in nodes}))
    raise RunError(
        f"{label}: a worker needs {demand(resources)}, but the nodes offer: {offers}; if the cluster grows, set "
        "wait_for_nodes"
    )


def rooms(node_labels: Mapping[str, str]) -> list[Room]:
    """Return the room for workers on each node of the cluster that this process has joined."""
    import ray

    nodes = (node for node in ray.nodes() if node["Alive"] and _has_labels(node, node_labels))
    offers = (node["Resources"] for node in nodes)
    return [Room(offer.get("CPU", 0), offer.get("GPU", 0), int(offer.get("memory", 0))) for offer in offers]


def waiting(resources: Resources, free: Mapping[str, float] | None) -> str:
    """Return in words what a pool waits for that has no place for a worker, and what the cluster has free."""
    offer = "" if free is None else f" (free: {amounts(free)})"
    return f"waiting for {demand(resources)} a worker{offer}"


def demand(resources: Resources) -> str:
    """Return in words what one worker needs."""
    return _offer(resources, resources.demand, dict(resources.node_labels))


def amounts(offer: Mapping[str, float]) -> str:
    """Return cores and GPUs in words."""
    return " and ".join(f"{offer.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _offer(resources: Resources, offer: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """Return in words an offer, with the labels that the workers ask for."""
    named = [f"{name}={labels.get(name, '(none)')}" for name, _ in resources.node_labels]
    return " with ".join([amounts(offer), *([", ".join(named)] if named else [])])


def _fits(resources: Resources, node: Mapping[str, Any]) -> bool:
    is_large_enough = all(node["Resources"].get(name, 0) >= amount for name, amount in resources.demand.items())
    return is_large_enough and _has_labels(node, dict(resources.node_labels))


def _has_labels(node: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return all(node["Labels"].get(name) == value for name, value in labels.items())
