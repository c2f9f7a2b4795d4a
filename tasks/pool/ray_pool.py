"""The pool of Ray actors. It decides itself, and never Ray, when an actor is lost, replaced or tried again.

Ray is imported in `tasks.pool` alone, and only once a pool or a session is opened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass, field
from typing import Any, Literal

from negcore.errors import NegError, RunError, first_line
from tasks.pool.base import (
    POLL_S,
    Attempt,
    Batch,
    NodeLost,
    Outcome,
    OutOfMemory,
    Pool,
    PoolStatus,
    Resources,
    Stopped,
    WorkerLost,
)
from tasks.pool.nodes import DrainNotices, check_demand, waiting
from tasks.pool.ray_session import check_head

__all__ = ["RayPool"]

logger = logging.getLogger(__name__)

_FAILURES_IN_A_ROW = 3
"""A worker whose jobs fail this often in a row is replaced: a broken CUDA context fails every later job at once."""

_PLACED_SOON_S = 5.0
"""An actor's process that starts within this time did not wait for resources."""


class _Host:
    """The content of an actor: it answers as soon as its process runs, and makes the worker when asked to.

    These are two steps because waiting for a free GPU and loading a model have different limits and messages.
    """

    _worker: Any = None

    def place(self) -> str:
        """Return the id of the node that it runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def build(self, cls: type, kwargs: Mapping[str, Any]) -> None:
        self._worker = cls(**kwargs)

    def run(self, job: Any) -> Any:
        return self._worker.run(job)


@dataclass(eq=False)
class _Actor:
    """The driver's view of an actor, with the one call it has in flight."""

    handle: Any
    phase: Literal["idle", "place", "build", "run"] = "idle"
    call: Future[Any] | None = None
    since: float = field(default_factory=time.monotonic)
    attempt: Attempt | None = None
    node: str = ""
    """Id of its node, once it is placed."""
    is_fresh: bool = True
    """True if it has not had a job yet."""
    failures_in_a_row: int = 0

    def start(self, phase: Literal["place", "build", "run"], *args: Any) -> None:
        # A concurrent Future wakes a waiting thread and leaves signals to Python; ray.get and ray.wait do not.
        self.call = getattr(self.handle, phase).remote(*args).future()
        self.phase = phase
        self.since = time.monotonic()

    @property
    def answered(self) -> bool:
        return self.call is not None and self.call.done()

    @property
    def waits_s(self) -> float:
        return time.monotonic() - self.since

    def run(self, attempt: Attempt) -> None:
        self.attempt, self.is_fresh = attempt, False
        self.start("run", attempt.job)

    def rest(self) -> None:
        self.phase, self.call, self.attempt = "idle", None, None


class RayPool(Pool):
    """A pool of actors that Ray never restarts."""

    def __init__(self, cls: type, kwargs: Mapping[str, Any], resources: Resources, label: str) -> None:
        super().__init__(cls, kwargs, resources, label)
        import ray

        self._ray = ray
        check_demand(resources, label)
        self._host = ray.remote(_Host).options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            label_selector=dict(resources.node_labels) or None,
            max_restarts=0,
            max_task_retries=0,
        )
        self._notices = DrainNotices()
        self._actors: list[_Actor] = []
        self._closed = False
        self._lost = 0
        self._lost_in_a_row = 0
        self._nodes_lost_in_a_row = 0
        self._last_error: Exception | None = None

    def close(self) -> None:
        """End all actors; jobs that still run are lost, and a batch in another thread ends with `Stopped`."""
        self._closed = True
        self._notices.close()
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors.clear()

    def _outcomes(self, batch: Batch) -> Iterator[Outcome]:
        try:
            while batch.todo or batch.alone or self._running():
                batch.check_stop()
                self._check_open()
                self._leave_drained()
                self._hire(batch)
                self._feed(batch)
                for settle in (self._answers, self._overdue):
                    yield from filter(None, settle(batch))
                if batch.tick_due():
                    batch.tick(self._status(batch))
        finally:  # calls of a batch that was left early go on, but concern nobody
            for actor in self._running():
                actor.attempt = None

    def _check_open(self) -> None:
        if self._closed:
            raise Stopped("the pool was closed")
        check_head()

    def _running(self) -> list[_Actor]:
        """Return the actors with a job of the present batch."""
        return [actor for actor in self._actors if actor.attempt is not None]

    def _leave_drained(self) -> None:
        """End the actors without a job on nodes that are about to go; the others end with their job."""
        for actor in [actor for actor in self._actors if self._is_drained(actor) and actor.phase != "run"]:
            logger.info("%s: a worker leaves its node, which is being drained", self._label)
            self._dismiss(actor)

    def _is_drained(self, actor: _Actor) -> bool:
        return actor.node in self._notices.nodes

    def _hire(self, batch: Batch) -> None:
        """Start actors: as many as there are jobs to run, and no replacement too many.

        All of them are asked for at once, so that a cluster that grows sees what is wanted.
        """
        n_jobs = len(batch.todo) + len(self._running())
        wanted = min(self._resources.workers, n_jobs or 1)  # a job that is to be alone gets one worker
        staying = sum(not self._is_drained(actor) for actor in self._actors)
        while staying < wanted and self._lost_in_a_row <= self._resources.max_replacements:
            actor = _Actor(self._host.remote())
            actor.start("place")
            self._actors.append(actor)
            staying += 1
        if not self._actors:
            last = "" if self._last_error is None else f"; the last error was {first_line(self._last_error)}"
            raise RunError(f"{self._label}: no worker is left, {self._lost} were lost{last}")

    def _feed(self, batch: Batch) -> None:
        if not batch.todo and batch.alone and not self._running():
            self._make_room()
        for actor in self._actors:
            if actor.phase == "idle" and not self._is_drained(actor):
                if batch.todo:
                    actor.run(batch.todo.popleft())
                elif batch.alone and not self._running():
                    actor.run(batch.alone.popleft())

    def _make_room(self) -> None:
        """End all actors but one that has not had a job yet: the next job is to have the memory for itself."""
        fresh = [actor for actor in self._actors if actor.is_fresh]
        for actor in [actor for actor in self._actors if actor not in fresh[:1]]:
            self._dismiss(actor)

    def _answers(self, batch: Batch) -> Iterator[Outcome | None]:
        """Wait a moment for calls to end, and act on each that did."""
        calls = {actor.call: actor for actor in self._actors if actor.call is not None}
        ended, _ = wait_for_futures(calls, timeout=POLL_S, return_when=FIRST_COMPLETED)
        for call in ended:
            yield self._advance(calls[call], call, batch)

    def _advance(self, actor: _Actor, call: Future[Any], batch: Batch) -> Outcome | None:
        """Take an actor, whose call has ended, to its next phase."""
        error = self._error_of(call)
        if isinstance(error, WorkerLost):
            return self._lose(actor, batch, error)
        if actor.phase == "run":
            return self._ran(actor, batch, call, error)
        if error is None:
            self._started(actor, call)
            return None
        if isinstance(error, NegError):
            self._dismiss(actor)
            raise error
        return self._lose(actor, batch, error)

    def _started(self, actor: _Actor, call: Future[Any]) -> None:
        if actor.phase == "place":
            actor.node = call.result()
            actor.start("build", self._cls, self._kwargs)
        else:
            actor.rest()

    def _ran(self, actor: _Actor, batch: Batch, call: Future[Any], error: Exception | None) -> Outcome | None:
        actor.failures_in_a_row = 0 if error is None else actor.failures_in_a_row + 1
        if error is not None and self._is_broken(actor, batch, error):
            return self._lose(actor, batch, error)
        attempt = actor.attempt
        actor.rest()
        if attempt is None:  # the batch that asked for it was left early
            return None
        if error is not None:
            return batch.failed_once(attempt, error)
        self._lost_in_a_row = self._nodes_lost_in_a_row = 0
        return batch.succeeded(attempt, call.result())

    def _is_broken(self, actor: _Actor, batch: Batch, error: Exception) -> bool:
        """Tell whether a worker must not get another job; a suspect job may have spoilt it for the next."""
        if batch.suspect:
            return not isinstance(error, NegError)
        spare = self._resources.max_replacements - self._lost_in_a_row
        return actor.failures_in_a_row >= _FAILURES_IN_A_ROW and spare > 0

    def _overdue(self, batch: Batch) -> Iterator[Outcome | None]:
        """End the actors whose call takes too long, and the whole batch if no actor can even be placed."""
        for actor in list(self._actors):
            limit_s = self._limit_s(actor)
            if limit_s is not None and actor.waits_s > limit_s and not actor.answered:
                yield self._lose(actor, batch, WorkerLost(f"the worker gave no answer within {limit_s:g} s"))
        unplaced_s = [actor.waits_s for actor in self._actors if actor.phase == "place"]
        if self._resources.wait_for_nodes:
            return
        if unplaced_s and len(unplaced_s) == len(self._actors) and min(unplaced_s) > self._resources.start_timeout_s:
            raise RunError(
                f"{self._label}: gave up {waiting(self._resources)} after {self._resources.start_timeout_s:g} s"
            )

    def _limit_s(self, actor: _Actor) -> float | None:
        return {"build": self._resources.start_timeout_s, "run": self._resources.job_timeout_s}.get(actor.phase)

    def _lose(self, actor: _Actor, batch: Batch, error: Exception) -> Outcome | None:
        """Give an actor up, and count its job, if it has one, as failed once more."""
        self._check_open()
        logger.warning("%s: a worker was lost: %s", self._label, first_line(error))
        self._dismiss(actor)
        self._lost += 1
        if self._counts(actor.attempt, batch, error):
            self._lost_in_a_row += 1
        self._last_error = error
        return None if actor.attempt is None else batch.failed_once(actor.attempt, error)

    def _counts(self, attempt: Attempt | None, batch: Batch, error: Exception) -> bool:
        """Tell whether a loss is one of the replacements that are to be had: it may be the workers' own fault."""
        if isinstance(error, NodeLost):
            self._nodes_lost_in_a_row += 1
            return self._nodes_lost_in_a_row > self._resources.max_replacements + 3 * self._resources.workers
        if attempt is None:
            return True
        is_first = attempt.number == 1 and not (isinstance(error, OutOfMemory) and not attempt.is_alone)
        return is_first and not batch.suspect

    def _dismiss(self, actor: _Actor) -> None:
        self._ray.kill(actor.handle)
        self._actors.remove(actor)

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

    def _status(self, batch: Batch) -> PoolStatus:
        phases = [actor.phase for actor in self._actors]
        starting = phases.count("place") + phases.count("build")
        waits = any(actor.phase == "place" and actor.waits_s > _PLACED_SOON_S for actor in self._actors)
        return PoolStatus(
            self._label, batch.done, batch.failed, len(self._running()), len(batch.todo) + len(batch.alone),
            len(phases) - starting, starting, self._lost, waiting(self._resources) if waits else "",
        )  # fmt: skip
