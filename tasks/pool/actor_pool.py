"""The pool of actors, whatever they run on: who gets which job, and when an actor is made, replaced or given up.

One thread hands out the jobs of all callers, so that no worker waits for a caller that is busy. What an actor is, how
it is called and what its loss means, is left to a subclass: `tasks.pool.ray_pool` has actors of Ray.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from bisect import insort
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple

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

__all__ = ["Actor", "ActorPool", "Phase"]

logger = logging.getLogger(__name__)

Phase = Literal["place", "build", "run"]
"""Calls of an actor: until its process runs, until it has made its worker, and a job. The first two are two because
waiting for a free GPU and loading a model have different limits and messages."""

_FAILURES_IN_A_ROW = 3
"""A worker whose jobs fail this often in a row is replaced: a broken CUDA context fails every later job at once."""

_PLACED_SOON_S = 5.0
"""An actor's process that starts within this time did not wait for resources."""

_CLOSE_S = 10.0
"""Longest wait, in seconds, for the thread that hands out jobs to end."""


@dataclass(eq=False, slots=True)
class _Call:
    """A call of an actor that is in flight."""

    future: Future[Any]
    attempt: Attempt | None
    """The job under way; None too if nobody waits for it any more."""


@dataclass(eq=False)
class Actor:
    """The driver's view of an actor, with its calls in flight."""

    handle: Any
    since: float
    """Time since which it has been busy with the oldest of its calls."""
    phase: Phase | Literal["idle"] = "idle"
    calls: list[_Call] = field(default_factory=list)
    """One call, or as many jobs as it may have, the oldest first."""
    node: str = ""
    """Id of its node, once it is placed."""
    is_fresh: bool = True
    """True if it has not had a job yet."""
    failures_in_a_row: int = 0

    @property
    def attempts(self) -> list[Attempt]:
        """The jobs under way that somebody waits for."""
        return [call.attempt for call in self.calls if call.attempt is not None]


class _Ended(NamedTuple):
    actor: Actor
    call: _Call


class ActorPool(Pool):
    """A pool of actors that are made for jobs, bounded in number, and replaced a bounded number of times.

    Methods whose names begin with an underscore, unless they are abstract, hold the pool's lock.
    """

    def __init__(self, cls: type, kwargs: Mapping[str, Any], resources: Resources, label: str) -> None:
        super().__init__(cls, kwargs, resources, label)
        self._batches: list[Batch] = []
        """Those under way, in the order of their turns."""
        self._actors: list[Actor] = []
        self._idle: deque[Actor] = deque()
        self._told: SimpleQueue[_Ended | None] = SimpleQueue()
        """Calls that ended; None where there is other news."""
        self._news: deque[_Ended | None] = deque()
        """Those of them that were taken, and not acted upon yet."""
        self._thread: threading.Thread | None = None
        self._looked_at = float("-inf")
        self._closed_at: float | None = None
        self._earlier: ActorPool | None = None
        self._later: ActorPool | None = None
        self._lost = 0
        self._lost_in_a_row = 0
        self._nodes_lost_in_a_row = 0
        self._last_error: Exception | None = None

    # What actors are

    @abstractmethod
    def _make(self) -> Any:
        """Ask for an actor's process and return its handle, without waiting for it."""

    @abstractmethod
    def _call(self, handle: Any, phase: Phase, args: Sequence[Any]) -> Future[Any]:
        """Start a call of an actor; that of "place" returns the id of its node."""

    @abstractmethod
    def _kill(self, handle: Any) -> None:
        """End an actor's process, whatever it is doing."""

    @abstractmethod
    def _error_of(self, call: Future[Any]) -> Exception | None:
        """Return the error a call ended with: the worker's own, or `WorkerLost`."""

    @abstractmethod
    def _waiting(self) -> str:
        """Return in words what an actor waits for that has no place."""

    def _drained(self) -> Collection[str]:
        """Return the ids of the nodes that get no more work."""
        return ()

    def _check(self) -> None:
        """Raise `RunError` if no actor can be reached any more."""

    def _now(self) -> float:
        return time.monotonic()

    def _await(self) -> None:
        """Wait a moment for news, without the lock, and note the calls that ended."""
        with suppress(Empty):
            self._news.append(self._told.get(timeout=POLL_S))
            while True:
                self._news.append(self._told.get_nowait())

    # Callers

    @property
    def calls_at_once(self) -> int:
        return self._resources.workers + 1

    def close(self) -> None:
        """End all actors; jobs that still run are lost, and calls of `map` in other threads end with `Stopped`."""
        with self._lock:
            self._closed_at = self._now()
            for actor in self._actors:
                self._kill(actor.handle)
            self._actors.clear()
            self._idle.clear()
        self._told.put(None)
        if (thread := self._thread) is not None:
            thread.join(_CLOSE_S)

    def has_room(self, n_calls: int) -> bool:
        with self._lock:
            is_used_up = any(batch.n_queued for batch in self._batches) or len(self._batches) < n_calls
            return not is_used_up and self.n_wanted < self._resources.workers

    def follow(self, earlier: Pool) -> None:
        assert isinstance(earlier, ActorPool), earlier
        self._earlier, earlier._later = earlier, self
        earlier._told.put(None)

    # Both are read by other pools, without the lock.

    @property
    def n_wanted(self) -> int:
        """Workers that this pool and those before it need at present; all, if a job is to be alone."""
        before = self._earlier.n_wanted if self._earlier is not None else 0
        if any(batch.alone for batch in self._going_on()):
            return self._resources.workers
        return min(self._resources.workers, before + self._n_needed)

    @property
    def n_actors(self) -> int:
        """Workers of this pool and of those behind it."""
        return len(self._actors) + (self._later.n_actors if self._later is not None else 0)

    def _outcomes(self, batch: Batch) -> Iterator[Outcome]:
        if batch.is_over:
            return
        self._enter(batch)
        try:
            while (outcomes := self._outcomes_of(batch)) is not None:
                for outcome in outcomes:
                    batch.check_stop()
                    yield outcome
                if batch.tick_due():
                    batch.tick(self._status(batch))
        finally:
            self._leave(batch)

    def _enter(self, batch: Batch) -> None:
        with self._lock:
            insort(self._batches, batch, key=lambda one: one.turn)
            if self._thread is None:
                self._thread = threading.Thread(target=self._dispatch, name=f"{self._label} jobs", daemon=True)
                self._thread.start()
        self._told.put(None)

    def _leave(self, batch: Batch) -> None:
        """Forget a batch. Its calls that are under way go on, but concern nobody."""
        with self._lock:
            if batch in self._batches:
                self._batches.remove(batch)
            for actor in self._actors if batch.running else ():
                for call in actor.calls:
                    if call.attempt is not None and call.attempt.batch is batch:
                        call.attempt = None

    def _outcomes_of(self, batch: Batch) -> list[Outcome] | None:
        """Wait a moment for outcomes of a batch; return None once it has had all of them."""
        batch.check_stop()
        with self._lock:
            if not (batch.outcomes or batch.error or batch.is_over):
                batch.news.wait(POLL_S)
            outcomes = list(batch.outcomes)
            batch.outcomes.clear()
            if not outcomes and batch.error is not None:
                raise batch.error
            return None if batch.is_over and not outcomes else outcomes

    def _status(self, batch: Batch) -> PoolStatus:
        with self._lock:
            waits = any(actor.phase == "place" and self._waits_s(actor) > _PLACED_SOON_S for actor in self._actors)
        note = self._waiting() if waits else ""  # without the lock: a cluster may be slow to answer
        with self._lock:
            phases = [actor.phase for actor in self._actors]
            running = sum(len(actor.attempts) for actor in self._actors)
            starting = phases.count("place") + phases.count("build")
            return PoolStatus(
                self._label, batch.done, batch.failed, batch.running, batch.n_queued, len(phases) - starting, starting,
                self._lost, note, running - batch.running, self._number,
            )  # fmt: skip

    # The thread that hands out the jobs

    def _dispatch(self) -> None:
        """Hand out jobs until there are no callers."""
        while self._act():
            self._await()

    def _act(self) -> bool:
        """Act on the calls that ended and hand out jobs; return False if nobody wants anything any more."""
        with self._lock:
            try:
                self._check_open()
                self._settle()
                self._look()
                self._give_way()
                self._hire()
                self._feed()
            except Exception as error:
                self._give_up(error)
            if not self._batches:
                self._thread = None
            return bool(self._batches)

    def _settle(self) -> None:
        while self._news:
            ended = self._news.popleft()
            if ended is not None and ended.call in ended.actor.calls:
                self._advance(*ended)

    def _give_up(self, error: Exception) -> None:
        """End all calls of `map` with an error."""
        for batch in self._batches:
            batch.error = error
            batch.news.notify_all()
        self._batches.clear()

    def _check_open(self) -> None:
        if self._closed_at is not None:
            raise Stopped("the pool was closed")
        self._check()

    def _look(self) -> None:
        """Leave nodes that are about to go and, from time to time, end calls that take too long."""
        self._leave_drained()
        if self._now() - self._looked_at >= POLL_S:
            self._looked_at = self._now()
            self._end_overdue()

    def _leave_drained(self) -> None:
        """End the actors without a job on nodes that are about to go; the others end with their job."""
        drained = self._drained()
        for actor in [one for one in self._actors if one.node in drained and one.phase != "run"] if drained else ():
            logger.info("%s: a worker leaves its node, which is being drained", self._label)
            self._dismiss(actor)

    def _end_overdue(self) -> None:
        """End the actors whose call takes too long, and everything if no actor can even be placed."""
        for actor in list(self._actors):
            limit_s = self._limit_s(actor)
            has_answered = any(call.future.done() for call in actor.calls)
            if limit_s is not None and self._waits_s(actor) > limit_s and not has_answered:
                self._lose(actor, WorkerLost(f"the worker gave no answer within {limit_s:g} s"))
        if self._resources.wait_for_nodes:
            return
        unplaced_s = [self._waits_s(actor) for actor in self._actors if actor.phase == "place"]
        if unplaced_s and len(unplaced_s) == len(self._actors) and min(unplaced_s) > self._resources.start_timeout_s:
            raise RunError(f"{self._label}: gave up {self._waiting()} after {self._resources.start_timeout_s:g} s")

    def _limit_s(self, actor: Actor) -> float | None:
        return {"build": self._resources.start_timeout_s, "run": self._resources.job_timeout_s}.get(actor.phase)

    def _waits_s(self, actor: Actor) -> float:
        if actor.phase == "place" and self._earlier is not None:  # it may wait for an actor of the earlier pool to end
            free_since = self._earlier._closed_at
            return self._now() - max(actor.since, self._now() if free_since is None else free_since)
        return self._now() - actor.since

    def _give_way(self) -> None:
        """End actors without a job: all, if a pool follows, or as many as one before this needs."""
        most = self._most_actors if self._later is None else min(self._most_actors, self._n_needed)
        if len(self._actors) > most:
            spare = [*self._idle, *(actor for actor in self._actors if actor.phase in ("place", "build"))]
            for actor in spare[: len(self._actors) - most]:
                self._dismiss(actor)

    @property
    def _n_needed(self) -> int:
        batches = self._going_on()
        n_jobs = sum(batch.n_waiting + batch.running for batch in batches)
        return n_jobs or int(any(batch.alone for batch in batches))  # a job that is to be alone gets one worker

    @property
    def _most_actors(self) -> int:
        return self._resources.workers - (self._earlier.n_wanted if self._earlier is not None else 0)

    def _hire(self) -> None:
        """Start actors: as many as there are jobs to run, and no replacement too many.

        All of them are asked for at once, so that a cluster that grows sees what is wanted.
        """
        wanted = min(self._most_actors, self._n_needed)
        drained = self._drained()
        staying = sum(actor.node not in drained for actor in self._actors) if drained else len(self._actors)
        while staying < wanted and self._lost_in_a_row <= self._resources.max_replacements:
            actor = Actor(self._make(), self._now())
            self._start(actor, "place")
            self._actors.append(actor)
            staying += 1
        if wanted > 0 and not self._actors:
            last = "" if self._last_error is None else f"; the last error was {first_line(self._last_error)}"
            raise RunError(f"{self._label}: no worker is left, {self._lost} were lost{last}")

    def _feed(self) -> None:
        batches = self._going_on()
        for batch in batches:
            while self._idle and batch.n_waiting:
                self._run(self._idle[0], batch.take())
        if self._resources.jobs_a_worker > 1:
            self._feed_seconds(batches)
        alone = next((batch for batch in batches if batch.alone), None)
        if alone is None or any(batch.n_waiting or batch.running for batch in batches):
            return
        self._make_room()
        if self._idle and self.n_actors == 1:  # none of a pool behind this
            self._run(self._idle[0], alone.alone.popleft())

    def _feed_seconds(self, batches: Sequence[Batch]) -> None:
        """Give busy actors another job, as long as enough are left for all and neither was tried before."""
        plain = [batch for batch in batches if not batch.suspect]
        drained = self._drained()
        for actor in self._actors:
            batch = next((one for one in plain if one.n_fresh), None)
            if batch is None or sum(one.n_fresh for one in plain) < len(self._actors):
                return
            has_room = actor.phase == "run" and len(actor.calls) < self._resources.jobs_a_worker
            may_share = all(call.attempt is not None and call.attempt.may_share for call in actor.calls)
            if has_room and may_share and actor.node not in drained:
                self._run(actor, batch.take())

    def _going_on(self) -> list[Batch]:
        return [batch for batch in tuple(self._batches) if not batch.is_stopped]

    def _make_room(self) -> None:
        """End all actors but one that has not had a job yet: the next job is to have the memory for itself."""
        fresh = [actor for actor in self._actors if actor.is_fresh]
        for actor in [actor for actor in self._actors if actor not in fresh[:1]]:
            self._dismiss(actor)

    # One actor

    def _start(self, actor: Actor, phase: Phase, *args: Any, attempt: Attempt | None = None) -> None:
        call = _Call(self._call(actor.handle, phase, args), attempt)
        if not actor.calls:
            actor.since = self._now()
        actor.phase = phase
        actor.calls.append(call)
        call.future.add_done_callback(lambda _: self._told.put(_Ended(actor, call)))

    def _run(self, actor: Actor, attempt: Attempt) -> None:
        """Give a job to an actor."""
        was_idle = actor.phase == "idle"
        self._start(actor, "run", attempt.to_run, attempt=attempt)
        if was_idle:
            self._idle.remove(actor)
        actor.is_fresh = False
        attempt.batch.running += 1

    def _rest(self, actor: Actor) -> None:
        """Have an actor without calls wait for its next job."""
        actor.phase = "idle"
        self._idle.append(actor)

    def _end(self, actor: Actor, call: _Call) -> None:
        """Forget a call that ended; the next one's time begins."""
        if actor.calls[0] is call:
            actor.since = self._now()
        actor.calls.remove(call)

    def _dismiss(self, actor: Actor) -> None:
        self._kill(actor.handle)
        self._actors.remove(actor)
        actor.calls.clear()
        if actor.phase == "idle":
            self._idle.remove(actor)

    def _advance(self, actor: Actor, call: _Call) -> None:
        """Take an actor, one of whose calls has ended, to its next phase."""
        error = self._error_of(call.future)
        if isinstance(error, WorkerLost):
            self._lose(actor, error)
            return
        self._end(actor, call)
        if actor.phase == "run":
            self._ran(actor, call, error)
        elif error is None and actor.phase == "place":
            actor.node = call.future.result()
            self._start(actor, "build", self._cls, self._kwargs)
        elif error is None:
            self._rest(actor)
        elif isinstance(error, NegError):
            self._dismiss(actor)
            raise error
        else:
            self._lose(actor, error)

    def _ran(self, actor: Actor, call: _Call, error: Exception | None) -> None:
        attempt = call.attempt
        actor.failures_in_a_row = 0 if error is None else actor.failures_in_a_row + 1
        if error is not None and self._is_broken(actor, attempt, error):
            self._lose(actor, error, attempt)
            return
        if not actor.calls:
            self._rest(actor)
        if attempt is None:  # whoever asked for it has left
            return
        if error is None:
            self._lost_in_a_row = self._nodes_lost_in_a_row = 0
            self._deliver(attempt.batch, attempt.batch.succeeded(attempt, call.future.result()))
        else:
            self._deliver(attempt.batch, attempt.batch.failed_once(attempt, error))

    def _deliver(self, batch: Batch, outcome: Outcome | None) -> None:
        """Hand the outcome of a job that ran to whoever waits for it; a job without one is tried again."""
        batch.running -= 1
        if outcome is not None:
            batch.outcomes.append(outcome)
            batch.news.notify_all()

    def _is_broken(self, actor: Actor, attempt: Attempt | None, error: Exception) -> bool:
        """Tell whether a worker must not get another job; a suspect job may have spoilt it for the next."""
        if attempt is not None and attempt.batch.suspect:
            return not isinstance(error, NegError)
        spare = self._resources.max_replacements - self._lost_in_a_row
        return actor.failures_in_a_row >= _FAILURES_IN_A_ROW and spare > 0

    def _lose(self, actor: Actor, error: Exception, at_fault: Attempt | None = None) -> None:
        """Give an actor up, and count its job, if it has one, as failed once more; of several, the one at fault.

        Where nobody knows which of them that is, each is tried again by itself.
        """
        others = actor.attempts
        if at_fault is None and len(others) == 1:
            at_fault = others.pop()
        logger.warning("%s: a worker was lost: %s", self._label, first_line(error))
        self._dismiss(actor)
        self._lost += 1
        if self._counts(next(iter(others), None) if at_fault is None else at_fault, error):
            self._lost_in_a_row += 1
        self._last_error = error
        if at_fault is not None:
            self._deliver(at_fault.batch, at_fault.batch.failed_once(at_fault, error))
        for attempt in others:
            self._deliver(attempt.batch, attempt.batch.lost_beside(attempt, error))

    def _counts(self, attempt: Attempt | None, error: Exception) -> bool:
        """Tell whether a loss is one of the replacements that are to be had: it may be the workers' own fault."""
        if isinstance(error, NodeLost):
            self._nodes_lost_in_a_row += 1
            return self._nodes_lost_in_a_row > self._resources.max_replacements + 3 * self._resources.workers
        if attempt is None:
            return True
        is_first = attempt.number == 1 and not attempt.was_shared
        return is_first and not (isinstance(error, OutOfMemory) and not attempt.is_alone) and not attempt.batch.suspect
