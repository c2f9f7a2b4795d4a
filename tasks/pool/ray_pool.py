"""The pool of Ray actors. It decides itself, and never Ray, when an actor is lost, replaced or tried again.

Ray is imported in `tasks.pool` alone, and only once a pool or a session is opened.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from negcore.errors import first_line
from tasks.pool.actor_pool import ActorPool, Phase
from tasks.pool.base import NodeLost, OutOfMemory, Resources, WorkerLost
from tasks.pool.nodes import NodeWatch, check_demand, waiting
from tasks.pool.ray_session import check_head, head_is_lost

__all__ = ["RayPool"]

_KILL_S = 2.0
"""Longest wait for an actor's end: Ray waits for a head that is silent, and a pool must not."""


class _Host:
    """The content of an actor: it answers as soon as its process runs, and makes the worker when asked to."""

    _worker: Any = None

    def place(self) -> str:
        """Return the id of the node that it runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def build(self, cls: type, kwargs: Mapping[str, Any]) -> None:
        self._worker = cls(**kwargs)

    def run(self, job: Any) -> Any:
        return self._worker.run(job)


class RayPool(ActorPool):
    """A pool of actors that Ray never restarts."""

    def __init__(self, cls: type, kwargs: Mapping[str, Any], resources: Resources, label: str) -> None:
        super().__init__(cls, kwargs, resources, label)
        import ray

        self._ray = ray
        check_demand(resources, label)
        self._host = ray.remote(_Host).options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_concurrency=resources.jobs_a_worker,
            label_selector=dict(resources.node_labels) or None,
            max_restarts=0,
            max_task_retries=0,
        )
        self._nodes = NodeWatch()

    def close(self) -> None:
        """End all actors and the look at the nodes."""
        self._nodes.close()
        super().close()

    def _make(self) -> Any:
        return self._host.remote()

    def _call(self, handle: Any, phase: Phase, args: Sequence[Any]) -> Future[Any]:
        # A concurrent Future leaves waiting to us; ray.get and ray.wait would block signals.
        return getattr(handle, phase).remote(*args).future()  # type: ignore[no-any-return]

    def _kill(self, handle: Any) -> None:
        if head_is_lost():  # nobody can be told; actors end with their driver
            return
        killing = threading.Thread(target=self._ray.kill, args=(handle,), name="kill", daemon=True)
        killing.start()
        killing.join(_KILL_S)

    def _drained(self) -> Collection[str]:
        return self._nodes.draining

    def _check(self) -> None:
        check_head()

    def _waiting(self) -> str:
        return waiting(self._resources, self._nodes.free)

    def _error_of(self, call: Future[Any]) -> Exception | None:
        """Return the error a call ended with: the worker's own, or `WorkerLost`."""
        error = call.exception()
        if error is None:
            return None
        if isinstance(error, self._ray.exceptions.RayTaskError):
            cause: Exception = error.cause
            cause.__cause__ = error  # shows the actor's traceback
            return cause
        if isinstance(error, self._ray.exceptions.UnserializableException):
            return RuntimeError(str(error).strip().splitlines()[-1])
        lost = self._loss_of(error)
        lost.__cause__ = error  # tells more
        return lost

    def _loss_of(self, error: BaseException) -> WorkerLost:
        """Return the kind of loss: processes end of their own fault, or because of their node."""
        why = first_line(error)
        if isinstance(error, self._ray.exceptions.OutOfMemoryError):
            return OutOfMemory(f"Ray ended the worker's process because its node ran low on memory: {why}")
        if isinstance(error, self._ray.exceptions.RayActorError) and "worker process has died" not in str(error):
            return NodeLost(f"the worker's node was lost: {why}")  # a process that died is always told as such
        return WorkerLost(f"the worker's process ended (crashed, killed, or out of memory): {why}")
