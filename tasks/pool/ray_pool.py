"""The pool of Ray actors. It decides itself, and never Ray, when an actor is lost, replaced or tried again.

Only this module and `tasks.pool.ray_session` import Ray, and only once a pool or a session is opened.
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
    Outcome,
    Pool,
    PoolStatus,
    Resources,
    Stopped,
    WorkerLost,
)

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

    def place(self) -> None:
        """Answer."""

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

    def rest(self) -> None:
        self.phase, self.call, self.attempt = "idle", None, None


class RayPool(Pool):
    """A pool of actors that Ray never restarts."""

    def __init__(self, cls: type, kwargs: Mapping[str, Any], resources: Resources, label: str) -> None:
        super().__init__(cls, kwargs, resources, label)
        import ray

        self._ray = ray
        self._check_cluster()
        self._host = ray.remote(_Host).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_restarts=0, max_task_retries=0
        )
        self._actors: list[_Actor] = []
        self._closed = False
        self._lost = 0
        self._lost_in_a_row = 0
        self._last_error: Exception | None = None

    def close(self) -> None:
        """End all actors; jobs that still run are lost, and a batch in another thread ends with `Stopped`."""
        self._closed = True
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors.clear()

    def _outcomes(self, batch: Batch) -> Iterator[Outcome]:
        try:
            while batch.todo or self._running():
                batch.check_stop()
                self._check_open()
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

    def _running(self) -> list[_Actor]:
        """Return the actors with a job of the present batch."""
        return [actor for actor in self._actors if actor.attempt is not None]

    def _hire(self, batch: Batch) -> None:
        """Start actors: as many as there are jobs to run, and no replacement too many."""
        wanted = min(self._resources.workers, len(batch.todo) + len(self._running()))
        while len(self._actors) < wanted and self._lost_in_a_row <= self._resources.max_replacements:
            actor = _Actor(self._host.remote())
            actor.start("place")
            self._actors.append(actor)
        if not self._actors:
            last = "" if self._last_error is None else f"; the last error was {first_line(self._last_error)}"
            raise RunError(f"{self._label}: no worker is left, {self._lost} were lost{last}")

    def _feed(self, batch: Batch) -> None:
        for actor in self._actors:
            if batch.todo and actor.phase == "idle":
                actor.attempt = batch.todo.popleft()
                actor.start("run", actor.attempt.job)

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
            self._started(actor)
            return None
        if isinstance(error, NegError):
            self._dismiss(actor)
            raise error
        return self._lose(actor, batch, error)

    def _started(self, actor: _Actor) -> None:
        if actor.phase == "place":
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
        self._lost_in_a_row = 0
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
        if unplaced_s and len(unplaced_s) == len(self._actors) and min(unplaced_s) > self._resources.start_timeout_s:
            raise RunError(f"{self._label}: gave up {self._waiting()} after {self._resources.start_timeout_s:g} s")

    def _limit_s(self, actor: _Actor) -> float | None:
        return {"build": self._resources.start_timeout_s, "run": self._resources.job_timeout_s}.get(actor.phase)

    def _lose(self, actor: _Actor, batch: Batch, error: Exception) -> Outcome | None:
        """Give an actor up, and count its job, if it has one, as failed once more."""
        self._check_open()
        logger.warning("%s: a worker was lost: %s", self._label, first_line(error))
        self._dismiss(actor)
        self._lost += 1
        if actor.attempt is None or (actor.attempt.number == 1 and not batch.suspect):
            self._lost_in_a_row += 1
        self._last_error = error
        return None if actor.attempt is None else batch.failed_once(actor.attempt, error)

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
        lost = WorkerLost(f"the worker's process ended (crashed, killed, or out of memory): {first_line(error)}")
        lost.__cause__ = error  # tells more
        return lost

    def _status(self, batch: Batch) -> PoolStatus:
        phases = [actor.phase for actor in self._actors]
        starting = phases.count("place") + phases.count("build")
        waits = any(actor.phase == "place" and actor.waits_s > _PLACED_SOON_S for actor in self._actors)
        return PoolStatus(
            self._label, batch.done, batch.failed, len(self._running()), len(batch.todo),
            len(phases) - starting, starting, self._lost, self._waiting() if waits else "",
        )  # fmt: skip

    def _waiting(self) -> str:
        free = self._ray.available_resources()
        return f"waiting for {_amounts(self._resources.demand)} a worker (free: {_amounts(free)})"

    def _check_cluster(self) -> None:
        """Refuse an actor that fits on no node: Ray would wait for it for ever, and in silence."""
        demand = self._resources.demand
        offers = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(all(offer.get(name, 0) >= amount for name, amount in demand.items()) for offer in offers):
            nodes = "; ".join(sorted({_amounts(offer) for offer in offers}))
            raise RunError(f"{self._label}: a worker needs {_amounts(demand)}, but the nodes offer: {nodes}")


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
