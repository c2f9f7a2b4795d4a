"""A pool whose workers sleep in simulated time: what it does with its workers, without any, and without waiting."""

import heapq
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any

from tasks.pool.actor_pool import ActorPool, Phase
from tasks.pool.base import Batch, Outcome, Resources


class SimulatedPool(ActorPool):
    """Actors that take as long for a job as `seconds` says, by a clock that stands still while anybody computes.

    Parameters
    ----------
    seconds : callable
        Returns the simulated time that a job takes.
    answer : callable, optional
        Returns the result of a job; what it raises is the job's error. By default the job itself.
    build_s : float
        Simulated time that it takes to make a worker.
    n_callers : int
        Calls of `map` that the clock waits for before it starts.
    """

    def __init__(
        self,
        resources: Resources,
        seconds: Callable[[Any], float],
        *,
        answer: Callable[[Any], Any] = lambda job: job,
        build_s: float = 0.0,
        n_callers: int = 1,
        label: str = "simulated",
    ) -> None:
        super().__init__(object, {}, resources, label)
        self.clock_s = self.busy_s = 0.0
        self.n_made = 0
        self.started: list[Any] = []
        """Jobs in the order in which they began; nothing if there are more than a few thousand."""
        self._seconds, self._answer, self._build_s, self._n_callers = seconds, answer, build_s, n_callers
        self._events: list[tuple[float, int, Future[Any], Callable[[], Any]]] = []
        self._numbers = count()
        self._asking: dict[int, Batch] = {}
        self._asked = threading.Condition(self._lock)

    @property
    def share_busy(self) -> float:
        """The part of the time of all workers that they spent on jobs."""
        return self.busy_s / (self.clock_s * self._resources.workers)

    def _now(self) -> float:
        return self.clock_s

    def _make(self) -> Any:
        self.n_made += 1
        return object()

    def _kill(self, handle: Any) -> None: ...

    def _waiting(self) -> str:
        return "waiting"

    def _error_of(self, call: Future[Any]) -> Exception | None:
        error = call.exception()
        assert error is None or isinstance(error, Exception)
        return error

    def _call(self, handle: Any, phase: Phase, args: Sequence[Any]) -> Future[Any]:
        call: Future[Any] = Future()
        ends_s, answer = self.clock_s + {"place": 0.0, "build": self._build_s}.get(phase, 0.0), lambda: None
        if phase == "run":
            (job,) = args
            ends_s, answer = self._ends_s(handle, job), lambda: self._answer(job)
            if len(self.started) < 10_000:
                self.started.append(job)
        heapq.heappush(self._events, (ends_s, next(self._numbers), call, answer))
        return call

    def _ends_s(self, handle: Any, job: Any) -> float:
        """Return the time at which an actor that is given a job now has done it."""
        seconds = self._seconds(job)
        self.busy_s += seconds
        return self.clock_s + seconds

    def _outcomes_of(self, batch: Batch) -> list[Outcome] | None:
        with self._lock:
            self._asking[id(batch)] = batch
            self._asked.notify_all()
        try:
            return super()._outcomes_of(batch)
        finally:
            with self._lock:
                del self._asking[id(batch)]

    def _await(self) -> None:
        """Let the clock go on to the next call that ends, once every caller waits for it."""
        with self._lock:
            if not self._asked.wait_for(self._is_quiet, timeout=5.0):
                self._n_callers = 0  # there are fewer
            ended = list(self._next_events())
        for call, answer in ended:
            try:
                call.set_result(answer())
            except Exception as error:
                call.set_exception(error)
        super()._await()

    def _is_quiet(self) -> bool:
        if len(self._batches) < self._n_callers and self._closed_at is None:
            return False
        self._n_callers = 0
        return all(id(batch) in self._asking and not batch.outcomes for batch in self._batches)

    def _next_events(self) -> Iterator[tuple[Future[Any], Callable[[], Any]]]:
        if not self._events:
            return
        self.clock_s = self._events[0][0]
        while self._events and self._events[0][0] <= self.clock_s:
            _, _, call, answer = heapq.heappop(self._events)
            yield call, answer


class SimulatedDevices(SimulatedPool):
    """Actors with a device each, which computes one job after the other, and a disk, which writes one after the other.

    `seconds` is the time to compute a job, and `write_s` that to write it; only the first counts as busy.
    """

    def __init__(self, *args: Any, write_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._write_s = write_s

    def _make(self) -> Any:
        self.n_made += 1
        return {"device": 0.0, "disk": 0.0}

    def _ends_s(self, handle: Any, job: Any) -> float:
        handle["device"] = computed_s = max(self.clock_s, handle["device"]) + self._seconds(job)
        handle["disk"] = max(computed_s, handle["disk"]) + self._write_s
        self.busy_s += self._seconds(job)
        return float(handle["disk"])


@contextmanager
def simulated_pool(*args: Any, **options: Any) -> Iterator[SimulatedPool]:
    """Open a simulated pool and close it after the block."""
    pool = SimulatedPool(*args, **options)
    try:
        yield pool
    finally:
        pool.close()


class SleepingPool(ActorPool):
    """Actors that are threads and sleep as long as `seconds` says of a job, by the clock on the wall."""

    def __init__(
        self,
        resources: Resources,
        seconds: Callable[[Any], float],
        *,
        answer: Callable[[Any], Any] = lambda job: job,
        label: str = "sleeping",
    ) -> None:
        super().__init__(object, {}, resources, label)
        self.spans: list[tuple[float, float]] = []
        """Times at which each job began and ended."""
        self._seconds, self._answer = seconds, answer
        self._threads = ThreadPoolExecutor(resources.workers)

    def _make(self) -> Any:
        return object()

    def _kill(self, handle: Any) -> None: ...

    def _waiting(self) -> str:
        return "waiting"

    def _error_of(self, call: Future[Any]) -> Exception | None:
        error = call.exception()
        assert error is None or isinstance(error, Exception)
        return error

    def _call(self, handle: Any, phase: Phase, args: Sequence[Any]) -> Future[Any]:
        return self._threads.submit(self._sleep, *args) if phase == "run" else self._threads.submit(str)

    def _sleep(self, job: Any) -> Any:
        began = time.monotonic()
        time.sleep(self._seconds(job))
        self.spans.append((began, time.monotonic()))
        return self._answer(job)

    @property
    def share_busy(self) -> float:
        """The part of the time of all workers that they spent on jobs."""
        busy_s = sum(end - begin for begin, end in self.spans)
        whole_s = max(end for _, end in self.spans) - min(begin for begin, _ in self.spans)
        return busy_s / (whole_s * self._resources.workers)


class ThreadPool(SleepingPool):
    """Actors that are workers in this process, each called from as many threads as it may have jobs."""

    def __init__(self, make: Callable[[], Any], resources: Resources) -> None:
        super().__init__(resources, lambda job: 0.0)
        self._made, self._threads = make, ThreadPoolExecutor(resources.workers * resources.jobs_a_worker)

    def _make(self) -> Any:
        return self._made()

    def _call(self, handle: Any, phase: Phase, args: Sequence[Any]) -> Future[Any]:
        return self._threads.submit(handle.run, *args) if phase == "run" else self._threads.submit(str)


class Numbers:
    """Jobs that are numbers, and made one by one."""

    def __init__(self, n_jobs: int) -> None:
        self.n_made = 0
        self._n_jobs = n_jobs

    def __len__(self) -> int:
        return self._n_jobs

    def __iter__(self) -> Iterator[int]:
        for number in range(self._n_jobs):
            self.n_made += 1
            yield number
