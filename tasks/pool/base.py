"""Pools of plain workers: jobs from several threads in one queue, bounded retries, a stop event.

A *worker* is a plain class with a method ``run(job) -> result``, made from a recipe ``(cls, kwargs)``. Jobs and
results are small plain data: a worker writes its arrays itself and returns a receipt. A worker that gets two jobs at a
time computes one while it writes the other; it is called from two threads and computes in one of them at a time.
`tasks.pool.opening` opens a pool in this process (`tasks.pool.local_pool`) or of Ray actors (`tasks.pool.ray_pool`).
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from negcore.errors import NegError, RunError, first_line

__all__ = [
    "Jobs",
    "NodeLost",
    "OutOfMemory",
    "Outcome",
    "Pool",
    "PoolStatus",
    "Resources",
    "Stopped",
    "WorkerLost",
]

POLL_S = 0.2
"""Longest wait, in seconds, before the stop event and the deadlines are checked again."""


class Stopped(Exception):  # noqa: N818  a request that was honoured, not an error
    """The stop event was set: no further job is started and no further outcome follows."""


class WorkerLost(RuntimeError):  # noqa: N818
    """A worker's process died, or was ended because its job took too long."""


class NodeLost(WorkerLost):
    """A worker ended with its node: that was taken back, went down, or cannot be reached any more."""


class OutOfMemory(WorkerLost):
    """A worker was ended because its node ran low on memory, which all processes there use together."""


_NODES_A_JOB_MAY_LOSE = 5
"""A job that lost more nodes than that may be what brings them down: from then on each loss is one of its attempts."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources that the workers of a pool may use.

    Raises
    ------
    RunError
        If a number is out of its range.
    """

    workers: int = 1
    """Most workers at a time. No more are started than there are jobs."""
    cpus: float = 1.0
    """CPUs reserved for each worker."""
    gpus: float = 0.0
    """GPUs reserved for each worker: a fraction of one, or a whole number."""
    jobs_a_worker: int = 1
    """Most jobs that an actor has at a time, 1 or 2. The second is handed out while at least as many jobs wait as there
    are workers; a job that is tried again is with an actor by itself. The local backend always does one at a time."""
    max_attempts: int = 3
    """Attempts a job gets before it is handed back with its error."""
    max_replacements: int = 10
    """Workers that may be lost, without a job succeeding in between, before the pool shrinks. All workers that one job
    loses count as one, and those that end with their nodes do not count."""
    start_timeout_s: float = 900.0
    """Limit, in seconds, for making one worker, and for waiting for resources while no worker is usable."""
    wait_for_nodes: bool = False
    """True to wait without limit for nodes that are not there yet, as in a cluster that grows."""
    node_labels: tuple[tuple[str, str], ...] = ()
    """Names and values of labels that the nodes of workers must have (Ray's label selector)."""
    job_timeout_s: float | None = None
    """Limit, in seconds, for one job: then its worker is ended and replaced. None is no limit. It begins anew for a
    worker's second job when its first has ended. The local backend cannot interrupt a job and has no such limit."""
    address: str | None = None
    """Ray cluster to connect to; "local" starts one on this machine; None is ``RAY_ADDRESS`` or else "local"."""

    def __post_init__(self) -> None:
        for name, least in (
            ("workers", 1),
            ("jobs_a_worker", 1),
            ("max_attempts", 1),
            ("max_replacements", 0),
            ("cpus", 0),
            ("gpus", 0),
        ):
            if getattr(self, name) < least:
                raise RunError(f"{name} is {getattr(self, name)}, but it must be at least {least}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise RunError(f"gpus is {self.gpus}, but a worker takes a fraction of one GPU or a whole number of GPUs")

    @property
    def demand(self) -> dict[str, float]:
        """Resources that Ray must reserve for one worker, by name."""
        return {"CPU": self.cpus, "GPU": self.gpus}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a job: its result, or its error."""

    job: Any
    """The job as it was given."""
    result: Any | None
    """Result of ``run``; None if the job failed."""
    exception: Exception | None
    """The error of the last attempt; None if the job succeeded."""
    attempts: int
    """Attempts made, at least 1."""

    @property
    def error(self) -> str | None:
        """Type and message of the error, in one line; None if the job succeeded."""
        return None if self.exception is None else first_line(self.exception)


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The state of a pool's ``map``: numbers of jobs and of workers."""

    label: str
    """The pool's label."""
    done: int
    failed: int
    running: int
    queued: int
    """Jobs: these four are those that succeeded, were handed back with an error, are with a worker, and wait."""
    ready: int
    starting: int
    lost: int
    """Workers: these three are those that are usable, are being made, and died or were ended."""
    note: str = ""
    """Thing that the pool waits for; empty if it does not wait."""
    elsewhere: int = 0
    """Jobs that its workers do for other calls of ``map``."""
    pool: int = 0
    """Number of the pool in this process."""


class Jobs(Protocol):
    """Some jobs, whose number is known and each of which may be made when its turn comes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Attempt:
    """A job and the number of the attempt that is next or under way."""

    __slots__ = ("batch", "is_alone", "job", "nodes_lost", "number", "was_shared")

    def __init__(self, job: Any, batch: Batch) -> None:
        self.job = job
        self.batch = batch
        self.number = 1
        self.nodes_lost = 0
        self.is_alone = False
        """True if its node ran out of memory: it is tried once nothing else runs, by a fresh worker."""
        self.was_shared = False
        """True if it was lost together with another job of its worker, perhaps by the other's fault."""

    @property
    def was_tried(self) -> bool:
        """True if a worker had it already."""
        return bool(self.number > 1 or self.nodes_lost or self.is_alone or self.was_shared)

    @property
    def may_share(self) -> bool:
        """True if its worker may have another job: it has cost nothing yet, and nobody expects it to fail."""
        return not (self.was_tried or self.batch.suspect)

    @property
    def to_run(self) -> Any:
        """The job as a worker gets it; one that was tried before as its method ``again`` returns it, if it has one."""
        again = getattr(self.job, "again", None)
        return again() if self.was_tried and again is not None else self.job


class Batch:
    """The jobs of one ``map`` call. They are taken from the given ones when their turn comes: there may be millions."""

    def __init__(
        self,
        jobs: Jobs,
        max_attempts: int,
        *,
        suspect: bool = False,
        turn: int = 0,
        stop: threading.Event | None = None,
        on_tick: Callable[[PoolStatus], None] | None = None,
        tick_s: float = 5.0,
        lock: threading.Lock | None = None,
    ) -> None:
        self.suspect = suspect
        self.turn = turn
        self.again: deque[Attempt] = deque()
        """Jobs that failed and are tried once more."""
        self.alone: deque[Attempt] = deque()
        """Jobs that wait until no other job runs."""
        self.done = self.failed = self.running = 0
        self.outcomes: deque[Outcome] = deque()
        """Outcomes that the caller has not taken yet."""
        self.error: Exception | None = None
        """The error that ends the call."""
        self.news = threading.Condition(lock)
        """Told when there is an outcome or an error."""
        self._fresh, self._n_fresh = iter(jobs), len(jobs)
        self._max_attempts = max_attempts
        self._stop = stop
        self._on_tick, self._tick_s, self._ticked_at = on_tick, tick_s, float("-inf")

    @property
    def n_waiting(self) -> int:
        """Jobs that a worker may have now."""
        return self._n_fresh + len(self.again)

    @property
    def n_queued(self) -> int:
        """Jobs that wait, also those that wait until no other runs."""
        return self.n_waiting + len(self.alone)

    @property
    def is_over(self) -> bool:
        """True if every job has its outcome."""
        return not (self.running or self.n_queued)

    @property
    def n_fresh(self) -> int:
        """Jobs that were never handed out."""
        return self._n_fresh

    def take(self) -> Attempt:
        """Return the next of the jobs that wait."""
        if not self._n_fresh:
            return self.again.popleft()
        self._n_fresh -= 1
        return Attempt(next(self._fresh), self)

    @property
    def is_stopped(self) -> bool:
        """True once the stop event is set."""
        return self._stop is not None and self._stop.is_set()

    def check_stop(self) -> None:
        if self.is_stopped:
            raise Stopped("stopped on request")

    def tick_due(self) -> bool:
        return self._on_tick is not None and time.monotonic() - self._ticked_at >= self._tick_s

    def tick(self, status: PoolStatus) -> None:
        if self._on_tick is not None:
            self._ticked_at = time.monotonic()
            self._on_tick(status)

    def succeeded(self, attempt: Attempt, result: Any) -> Outcome:
        self.done += 1
        return Outcome(attempt.job, result, None, attempt.number)

    def failed_once(self, attempt: Attempt, exception: Exception) -> Outcome | None:
        """Return the outcome if the job is handed back; None if it went back into the queue."""
        if isinstance(exception, NodeLost) and attempt.nodes_lost < _NODES_A_JOB_MAY_LOSE:
            attempt.nodes_lost += 1
        elif isinstance(exception, OutOfMemory) and not attempt.is_alone:
            attempt.is_alone = True
        elif attempt.number < self._max_attempts and not isinstance(exception, NegError):
            attempt.number += 1
        else:
            self.failed += 1
            return Outcome(attempt.job, None, exception, attempt.number)
        (self.alone if attempt.is_alone else self.again).append(attempt)
        return None

    def lost_beside(self, attempt: Attempt, exception: Exception) -> Outcome | None:
        """Put a job back into the queue that was lost beside another: it may not be at fault. See `failed_once`."""
        if isinstance(exception, NodeLost):
            return self.failed_once(attempt, exception)
        attempt.was_shared = True
        self.again.append(attempt)
        return None


_numbers = count(1)


class Pool(ABC):
    """Workers of one recipe. `open_pool` makes it, and it lives until that ``with`` block ends."""

    def __init__(self, cls: type, kwargs: Mapping[str, Any], resources: Resources, label: str) -> None:
        self._cls = cls
        self._kwargs = dict(kwargs)
        self._resources = resources
        self._label = label
        self._number = next(_numbers)
        self._lock = threading.Lock()
        """Held by whoever touches the jobs or the workers."""

    def map(
        self,
        jobs: Jobs,
        *,
        stop: threading.Event | None = None,
        on_tick: Callable[[PoolStatus], None] | None = None,
        tick_s: float = 5.0,
        suspect: bool = False,
        turn: int = 0,
    ) -> Iterator[Outcome]:
        """Run the jobs and yield their outcomes in order of completion.

        Work starts with the first ``next``. The jobs of several threads share the workers. An error that only the user
        can repair (`NegError`) is not tried again; every other error is, up to ``max_attempts`` times.

        Parameters
        ----------
        jobs : list or other Jobs
            Small plain data, one item a job; taken as workers become free.
        stop : threading.Event, optional
            Once set, no further outcome follows.
        on_tick : callable, optional
            Called with a `PoolStatus` at the start, at the end and every `tick_s` seconds, in the caller's thread.
        tick_s : float
            Seconds between two calls of `on_tick`.
        suspect : bool
            True if the jobs are expected to fail: then each gets one attempt, a worker whose job failed is not
            used again, and what they cost is replaced whatever `max_replacements` is.
        turn : int
            Of the jobs of several calls, those with the lowest turn come first.

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
        attempts = 1 if suspect else self._resources.max_attempts
        batch = Batch(
            jobs, attempts, suspect=suspect, turn=turn, stop=stop, on_tick=on_tick, tick_s=tick_s, lock=self._lock
        )
        batch.tick(self._status(batch))
        yield from self._outcomes(batch)
        batch.tick(self._status(batch))

    @property
    @abstractmethod
    def calls_at_once(self) -> int:
        """Calls of ``map`` at the same time that keep every worker busy, however few jobs each has."""

    @abstractmethod
    def has_room(self, n_calls: int) -> bool:
        """Tell whether a worker has nothing to do though so many calls of ``map`` are under way.

        Of a pool whose worker nobody else could use, this is never said.
        """

    @abstractmethod
    def follow(self, earlier: Pool) -> None:
        """Take over the workers of an earlier pool one by one, as it runs out of jobs.

        Together both have no more workers than this one may have. The earlier one ends those that it does not need any
        more, and if it needs one again, this one gives way.
        """

    @abstractmethod
    def _outcomes(self, batch: Batch) -> Iterator[Outcome]:
        """Run the batch to its end."""

    @abstractmethod
    def _status(self, batch: Batch) -> PoolStatus:
        """Return the state of the batch."""

    def _cannot_start(self, error: Exception) -> RunError:
        return RunError(f"{self._label}: the worker {self._cls.__name__} cannot start: {first_line(error)}")
