"""Plain workers, run here or as Ray actors: one queue of jobs, bounded retries, replaced actors, a stop event.

A *worker* is a plain class with a method ``run(job) -> result``, made from a recipe ``(cls, kwargs)``. Jobs and
results are small plain data: a worker writes its arrays itself and returns a receipt. Ray is imported here and in
`tasks.session` only, and only when a Ray pool is opened.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass, field
from typing import Any, Literal

from negcore.errors import NegError, RunError
from tasks.session import ray_session

__all__ = [
    "Outcome",
    "Pool",
    "PoolStatus",
    "Resources",
    "Stopped",
    "WorkerLost",
    "open_pool",
]

Backend = Literal["local", "ray"]

logger = logging.getLogger(__name__)

_POLL_S = 0.2
"""How long a wait may last before the stop event and the deadlines are looked at again."""

_FAILURES_IN_A_ROW = 3
"""A worker whose jobs fail this often in a row is replaced: a broken CUDA context fails every later job at once."""

_PLACED_SOON_S = 5.0
"""An actor's process that starts within this time did not wait for resources."""


class Stopped(Exception):  # noqa: N818  a request that was honoured, not an error
    """The stop event was set: no further job is started and no further outcome follows."""


class WorkerLost(RuntimeError):  # noqa: N818
    """A worker's process died, or was ended because its job took too long."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What the workers of a pool may use.

    Parameters
    ----------
    workers : int
        Most workers at a time. No more are started than there are jobs.
    cpus : float
        CPUs reserved for each worker.
    gpus : float
        GPUs reserved for each worker: a fraction of one, or a whole number.
    max_attempts : int
        Attempts a job gets before it is handed back with its error.
    max_replacements : int
        Workers that may be lost, without a job succeeding in between, before the pool shrinks. All that one job
        loses count as one.
    start_timeout_s : float
        Limit, in seconds, for making one worker, and for waiting for resources while no worker is usable.
    job_timeout_s : float or None
        Limit, in seconds, for one job: then its worker is ended and replaced. None is no limit. The local backend
        cannot interrupt a job and has no such limit.
    address : str or None
        Ray cluster to connect to; "local" starts one on this machine; None is ``RAY_ADDRESS`` or else "local".

    Raises
    ------
    RunError
        If a number is out of its range.
    """

    workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    max_attempts: int = 3
    max_replacements: int = 10
    start_timeout_s: float = 900.0
    job_timeout_s: float | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("max_attempts", 1), ("max_replacements", 0), ("cpus", 0), ("gpus", 0)):
            if getattr(self, name) < least:
                raise RunError(f"{name} is {getattr(self, name)}, but it must be at least {least}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise RunError(f"gpus is {self.gpus}, but a worker takes a fraction of one GPU or a whole number of GPUs")

    @property
    def demand(self) -> dict[str, float]:
        """What Ray must reserve for one worker, by resource name."""
        return {"CPU": self.cpus, "GPU": self.gpus}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job.

    Parameters
    ----------
    job : Any
        The job as it was given.
    result : Any or None
        What ``run`` returned; None if the job failed.
    exception : Exception or None
        The error of the last attempt; None if the job succeeded.
    attempts : int
        Attempts made, at least 1.
    """

    job: Any
    result: Any | None
    exception: Exception | None
    attempts: int

    @property
    def error(self) -> str | None:
        """Type and message of the error, in one line; None if the job succeeded."""
        return None if self.exception is None else _one_line(self.exception)


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """How far a pool's ``map`` is: jobs and workers by state.

    Parameters
    ----------
    label : str
        The pool's label.
    done, failed, running, queued : int
        Jobs that succeeded, that were handed back with an error, that a worker has now, and that wait.
    ready, starting, lost : int
        Workers that are usable, that are being made, and that died or were ended.
    note : str
        What the pool waits for; empty if it does not wait.
    """

    label: str
    done: int
    failed: int
    running: int
    queued: int
    ready: int
    starting: int
    lost: int
    note: str = ""


class _Attempt:
    """A job and the number of the attempt that is next or under way."""

    __slots__ = ("job", "number")

    def __init__(self, job: Any) -> None:
        self.job = job
        self.number = 1


@dataclass
class _Batch:
    """The jobs of one ``map`` call."""

    todo: deque[_Attempt]
    max_attempts: int
    suspect: bool
    stop: threading.Event | None
    on_tick: Callable[[PoolStatus], None] | None
    tick_s: float
    done: int = 0
    failed: int = 0
    ticked_at: float = float("-inf")

    def check_stop(self) -> None:
        if self.stop is not None and self.stop.is_set():
            raise Stopped("stopped on request")

    def tick_due(self) -> bool:
        return self.on_tick is not None and time.monotonic() - self.ticked_at >= self.tick_s

    def tick(self, status: PoolStatus) -> None:
        if self.on_tick is not None:
            self.ticked_at = time.monotonic()
            self.on_tick(status)

    def succeeded(self, attempt: _Attempt, result: Any) -> Outcome:
        self.done += 1
        return Outcome(attempt.job, result, None, attempt.number)

    def failed_once(self, attempt: _Attempt, exception: Exception) -> Outcome | None:
        """The outcome if the job is handed back; None if it went back into the queue."""
        if attempt.number < self.max_attempts and not isinstance(exception, NegError):
            attempt.number += 1
            self.todo.append(attempt)
            return None
        self.failed += 1
        return Outcome(attempt.job, None, exception, attempt.number)


class Pool(ABC):
    """Workers of one recipe. Obtained from `open_pool`, usable until its ``with`` block ends."""

    def __init__(self, cls: type, kwargs: Mapping[str, Any], resources: Resources, label: str) -> None:
        self._cls = cls
        self._kwargs = dict(kwargs)
        self._resources = resources
        self._label = label
        self._lock = threading.Lock()

    def map(
        self,
        jobs: Iterable[Any],
        *,
        stop: threading.Event | None = None,
        on_tick: Callable[[PoolStatus], None] | None = None,
        tick_s: float = 5.0,
        suspect: bool = False,
    ) -> Iterator[Outcome]:
        """Run the jobs and yield their outcomes in order of completion.

        Work starts with the first ``next``. Calls from several threads take turns. An error that only the user
        can mend (`NegError`) is not tried again; every other error is, up to ``max_attempts`` times.

        Parameters
        ----------
        jobs : iterable
            Small plain data, one item a job.
        stop : threading.Event, optional
            Once set, no further outcome follows.
        on_tick : callable, optional
            Called with a `PoolStatus` at the start, at the end and every `tick_s` seconds, in the caller's thread.
        tick_s : float
            Seconds between two calls of `on_tick`.
        suspect : bool
            Whether the jobs are expected to fail: then each gets one attempt, a worker whose job failed is not
            used again, and what they cost is replaced whatever `max_replacements` is.

        Yields
        ------
        Outcome

        Raises
        ------
        Stopped
            If `stop` is set.
        NegError
            If the worker's constructor raises it.
        RunError
            If no worker can be started, or all were lost and may not be replaced.
        """
        todo = deque(_Attempt(job) for job in jobs)
        batch = _Batch(todo, 1 if suspect else self._resources.max_attempts, suspect, stop, on_tick, tick_s)
        while not self._lock.acquire(timeout=_POLL_S):
            batch.check_stop()
        try:
            batch.tick(self._status(batch))
            yield from self._outcomes(batch)
            batch.tick(self._status(batch))
        finally:
            self._lock.release()

    @abstractmethod
    def _outcomes(self, batch: _Batch) -> Iterator[Outcome]:
        """Run the batch to its end."""

    @abstractmethod
    def _status(self, batch: _Batch) -> PoolStatus:
        """How far the batch is."""

    def _cannot_start(self, error: Exception) -> RunError:
        return RunError(f"{self._label}: the worker {self._cls.__name__} cannot start: {_one_line(error)}")


class _LocalPool(Pool):
    """One worker in this process."""

    _worker: Any = None

    def _outcomes(self, batch: _Batch) -> Iterator[Outcome]:
        while batch.todo:
            batch.check_stop()
            outcome = self._run(batch, batch.todo.popleft())
            if outcome is not None:
                yield outcome
            if batch.tick_due():
                batch.tick(self._status(batch))

    def _run(self, batch: _Batch, attempt: _Attempt) -> Outcome | None:
        if self._worker is None:
            self._worker = self._build()
        try:
            return batch.succeeded(attempt, self._worker.run(attempt.job))
        except Exception as error:
            logger.debug("%s: attempt %d failed", self._label, attempt.number, exc_info=True)
            return batch.failed_once(attempt, error)

    def _build(self) -> Any:
        try:
            return self._cls(**self._kwargs)
        except NegError:
            raise
        except Exception as error:
            raise self._cannot_start(error) from error

    def _status(self, batch: _Batch) -> PoolStatus:
        ready = int(self._worker is not None)
        return PoolStatus(self._label, batch.done, batch.failed, 0, len(batch.todo), ready, 0, 0)


class _Host:
    """What runs in an actor: it answers as soon as its process runs, and makes the worker when asked to.

    Two steps, because waiting for a free GPU and loading a model have different limits and messages.
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
    attempt: _Attempt | None = None
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


class _RayPool(Pool):
    """Actors that are never restarted by Ray: what is lost, replaced and tried again is decided here."""

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

    def _outcomes(self, batch: _Batch) -> Iterator[Outcome]:
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
        """Actors with a job of the present batch."""
        return [actor for actor in self._actors if actor.attempt is not None]

    def _hire(self, batch: _Batch) -> None:
        """Start actors: as many as there are jobs to run, and no replacement too many."""
        wanted = min(self._resources.workers, len(batch.todo) + len(self._running()))
        while len(self._actors) < wanted and self._lost_in_a_row <= self._resources.max_replacements:
            actor = _Actor(self._host.remote())
            actor.start("place")
            self._actors.append(actor)
        if not self._actors:
            last = "" if self._last_error is None else f"; the last error was {_one_line(self._last_error)}"
            raise RunError(f"{self._label}: no worker is left, {self._lost} were lost{last}")

    def _feed(self, batch: _Batch) -> None:
        for actor in self._actors:
            if batch.todo and actor.phase == "idle":
                actor.attempt = batch.todo.popleft()
                actor.start("run", actor.attempt.job)

    def _answers(self, batch: _Batch) -> Iterator[Outcome | None]:
        """Wait a moment for calls to end, and act on each that did."""
        calls = {actor.call: actor for actor in self._actors if actor.call is not None}
        ended, _ = wait_for_futures(calls, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        for call in ended:
            yield self._advance(calls[call], call, batch)

    def _advance(self, actor: _Actor, call: Future[Any], batch: _Batch) -> Outcome | None:
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

    def _ran(self, actor: _Actor, batch: _Batch, call: Future[Any], error: Exception | None) -> Outcome | None:
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

    def _is_broken(self, actor: _Actor, batch: _Batch, error: Exception) -> bool:
        """Whether a worker is not to be trusted with another job; a suspect may have spoilt it for the next."""
        if batch.suspect:
            return not isinstance(error, NegError)
        spare = self._resources.max_replacements - self._lost_in_a_row
        return actor.failures_in_a_row >= _FAILURES_IN_A_ROW and spare > 0

    def _overdue(self, batch: _Batch) -> Iterator[Outcome | None]:
        """End the actors whose call takes too long, and the batch if no actor can even be placed."""
        for actor in list(self._actors):
            limit_s = self._limit_s(actor)
            if limit_s is not None and actor.waits_s > limit_s and not actor.answered:
                yield self._lose(actor, batch, WorkerLost(f"the worker gave no answer within {limit_s:g} s"))
        unplaced_s = [actor.waits_s for actor in self._actors if actor.phase == "place"]
        if unplaced_s and len(unplaced_s) == len(self._actors) and min(unplaced_s) > self._resources.start_timeout_s:
            raise RunError(f"{self._label}: gave up {self._waiting()} after {self._resources.start_timeout_s:g} s")

    def _limit_s(self, actor: _Actor) -> float | None:
        return {"build": self._resources.start_timeout_s, "run": self._resources.job_timeout_s}.get(actor.phase)

    def _lose(self, actor: _Actor, batch: _Batch, error: Exception) -> Outcome | None:
        """Give an actor up; its job, if it has one, failed once more."""
        self._check_open()
        logger.warning("%s: a worker was lost: %s", self._label, _one_line(error))
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
        """The error a call ended with: the worker's own, or `WorkerLost`."""
        error = call.exception()
        if error is None:
            return None
        if isinstance(error, self._ray.exceptions.RayTaskError):
            cause: Exception = error.cause
            cause.__cause__ = error  # shows the actor's traceback
            return cause
        if isinstance(error, self._ray.exceptions.UnserializableException):
            return RuntimeError(str(error).strip().splitlines()[-1])
        lost = WorkerLost(f"the worker's process ended (crashed, killed, or out of memory): {_one_line(error)}")
        lost.__cause__ = error  # tells more
        return lost

    def _status(self, batch: _Batch) -> PoolStatus:
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
        """Ray would wait for ever, and in silence, for an actor that fits on no node."""
        demand = self._resources.demand
        offers = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(all(offer.get(name, 0) >= amount for name, amount in demand.items()) for offer in offers):
            nodes = "; ".join(sorted({_amounts(offer) for offer in offers}))
            raise RunError(f"{self._label}: a worker needs {_amounts(demand)}, but the nodes offer: {nodes}")


@contextlib.contextmanager
def open_pool(
    backend: Backend, cls: type, kwargs: Mapping[str, Any], resources: Resources, *, label: str
) -> Iterator[Pool]:
    """Open a pool of workers, each made by ``cls(**kwargs)`` when there is work for it.

    Parameters
    ----------
    backend : {"local", "ray"}
        "local" runs the jobs in this process, one after the other; "ray" in actors, one job at a time each. Inside
        `ray_session` that session is used; otherwise one is opened for this pool.
    cls : type
        The worker's class, importable where the actors run.
    kwargs : mapping
        The constructor's arguments, small plain data.
    resources : Resources
    label : str
        Name of the pool in messages.

    Yields
    ------
    Pool

    Raises
    ------
    RunError
        If no node of the cluster is large enough for a worker, or the cluster cannot be reached.
    """
    if backend == "local":
        yield _LocalPool(cls, kwargs, resources, label)
        return
    with ray_session(resources.address), contextlib.closing(_RayPool(cls, kwargs, resources, label)) as pool:
        yield pool


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
