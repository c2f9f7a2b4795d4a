"""The steps of a run: how they are carried out and watched, under Prefect or without it.

A step is a named piece of work that says how far it is: measuring a split, ranking neurons, fitting probes. Its
function is one of the Prefect tasks in `tasks.stages`. Both kinds of `Steps` run steps in threads; under Prefect each
is a task run with a progress artifact.
"""

import base64
import copy
import logging
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from negcore.store.files import shortened
from negcore.store.identity import content_digest
from negcore.texts import printable, public
from tasks.config.run_file import RunFile
from tasks.pool.base import PoolStatus, Stopped
from tasks.withheld import Withheld

T = TypeVar("T")
R = TypeVar("R", covariant=True)

logger = logging.getLogger(__name__)

_ARTIFACT_INTERVAL_S = 2.0
_TELL_S = 60.0
"""Time between two lines of the log about what a step waits for."""
_SILENCE_S = 60.0
"""A server that did not answer is left in peace for so long."""
_MOST_RETRIES = 3
"""Tries of what is to stay: workers that outlive long losses have more patience than a run has time."""
_STOP_S = 10.0
THREADS = 80
"""Steps at the same time. Those that measure mostly wait for workers, and those that fit probes for their turn."""


@dataclass(frozen=True)
class Progress:
    """The progress of a step."""

    step: str
    done: int
    total: int
    note: str = ""
    """Reason why its workers wait, or what is done before they start, for people; may be empty."""
    is_queued: bool = False
    """True as long as all workers are busy with other steps."""


class Watcher(Protocol):
    """Someone who shows the steps of a run."""

    def advance(self, progress: Progress) -> None:
        """Show the progress of a step."""

    def finish(self, step: str, error: BaseException | None) -> None:
        """Show that a step ended."""

    def tell(self, line: str) -> None:
        """Show a line about the run."""


class Step:
    """A step under way, as its function sees it: it reports progress here and learns that it is to stop.

    Used in a ``with``, it tells its watchers that it ended, and how.
    """

    def __init__(self, name: str = "", stop: threading.Event | None = None, watchers: Sequence[Watcher] = ()) -> None:
        self.name = name
        self.stop = stop or threading.Event()
        self.ended = threading.Event()
        self._watchers = watchers
        self._progress = Progress(name, 0, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watcher in self._watchers:
            watcher.finish(self.name, error)
        self.ended.set()

    def report(self, done: int, total: int, status: PoolStatus | None = None, note: str = "") -> None:
        """Report that `done` of `total` parts are finished, and what the workers are doing or else goes on."""
        is_queued = status is not None and not status.running and status.elsewhere > 0 and status.queued > 0
        self._progress = Progress(self.name, done, total, note or _note(status), is_queued)
        for watcher in self._watchers:
            watcher.advance(self._progress)

    def tick(self, status: PoolStatus) -> None:
        """Report what the workers are doing; no more parts are finished."""
        self.report(self._progress.done, self._progress.total, status)

    def check_stop(self) -> None:
        """End the step if it is to stop.

        Raises
        ------
        Stopped
        """
        if self.stop.is_set():
            raise Stopped("stopped on request")


def _note(status: PoolStatus | None) -> str:
    if status is None:
        return ""
    return status.note or ("" if status.ready else "workers load the model")


@dataclass
class Handover:
    """Things that the command line hands to the run that it starts: a flow's parameters are for its run file alone."""

    watcher: Watcher | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    claimed: Path | None = None
    """Run directory that the command line holds the claim of."""
    plans: dict[tuple[Any, RunFile], Any] = field(default_factory=dict)
    """Plans that were made to count the steps, by what made them: each is taken once."""

    def plan(self, make: Callable[[Any], T], run: RunFile) -> T:
        """Make the plan of a run and keep it until the run takes it."""
        self.plans[make, run] = plan = make(run)
        return plan


_handover: ContextVar[Handover | None] = ContextVar("handover", default=None)


@contextmanager
def handing_over() -> Iterator[Handover]:
    """Hand something over to the runs that are started inside the block."""
    given = Handover()
    token = _handover.set(given)
    try:
        yield given
    finally:
        _handover.reset(token)


def plan_ahead(make: Callable[[Any], T], run: RunFile) -> T:
    """Make the plan of a run before it starts; inside `handing_over`, the run takes this plan."""
    given = _handover.get()
    return make(run) if given is None else given.plan(make, run)


class Pending(Protocol[R]):
    """A step under way, as whoever started it sees it."""

    def result(self, timeout: float | None = None) -> R: ...

    def add_done_callback(self, fn: Callable[[Any], None], /) -> None: ...


class Steps(ABC):
    """The steps of one run, carried out until the run is stopped."""

    def __init__(self) -> None:
        self._handover = _handover.get() or Handover()
        self.stop = self._handover.stop

    def submit(self, task: Any, name: str, *args: Any) -> Pending[Any]:
        """Start a step.

        Parameters
        ----------
        task : Prefect task
            One of `tasks.stages`: a function of the `Step` and `args`.
        name : str
            Which of its kind the step is, for people.
        """
        return self._submit(task, self._step(task, name), args)

    def run(self, task: Any, name: str, *args: Any) -> Any:
        """Carry a step out to its end. Whatever interrupts the wait stops the step before it goes on."""
        with self.together() as together:
            together.start(None, self, task, name, *args)
            ended = together.ended()
            assert ended is not None, name
            return ended.pending.result()

    @contextmanager
    def together(self) -> Iterator["Together"]:
        """Carry out steps side by side. Whatever interrupts the block stops those under way before it goes on."""
        together = Together()
        try:
            yield together
        except BaseException:
            if together.under_way:  # the error is not the last step's: a signal, or the flow was cancelled
                self.stop.set()
                together.wait(_STOP_S)
            raise

    def planned(self, make: Callable[[Any], T], run: RunFile) -> T:
        """Return the plan of a run: the one that was handed over, or a new one."""
        plans = self._handover.plans
        return plans.pop((make, run)) if (make, run) in plans else make(run)

    def has_claimed(self, directory: Path) -> bool:
        """Tell whether whoever started this run holds the claim of a directory."""
        return self._handover.claimed == directory

    def part(self) -> Self:
        """Return the steps of a part of the run, which may stop its own work, but nobody else's."""
        part = copy.copy(self)
        part.stop = _PartStop(self.stop)
        return part

    def tell(self, line: str) -> None:
        """Tell who watches a line about the run."""
        for watcher in self._watchers():
            watcher.tell(line)

    @abstractmethod
    def table(self, key: str, rows: Sequence[Mapping[str, Any]], title: str) -> None:
        """Show a table of results."""

    @abstractmethod
    def note(self, key: str, markdown: str, title: str) -> None:
        """Show a text."""

    @abstractmethod
    def picture(self, key: str, png: bytes, title: str) -> None:
        """Show a picture."""

    @abstractmethod
    def _submit(self, task: Any, step: Step, args: Sequence[Any]) -> Pending[Any]: ...

    @abstractmethod
    def _step(self, task: Any, name: str) -> Step: ...

    def _watchers(self) -> list[Watcher]:
        return [self._handover.watcher] if self._handover.watcher else []


class Together:
    """Steps that are carried out side by side, each under a key; more may be started as others end."""

    def __init__(self) -> None:
        self._under_way: dict[int, tuple[Any, Step, Pending[Any]]] = {}
        self._told: SimpleQueue[int] = SimpleQueue()

    @property
    def under_way(self) -> list[Step]:
        """The steps that have not ended."""
        return [step for _, step, _ in self._under_way.values() if not step.ended.is_set()]

    def start(self, key: Any, steps: Steps, task: Any, name: str, *args: Any) -> None:
        """Start one of some steps, as `Steps.submit` does."""
        step = steps._step(task, name)
        pending = steps._submit(task, step, args)
        self._under_way[id(step)] = key, step, pending
        pending.add_done_callback(lambda _: self._told.put(id(step)))

    def ended(self, wait_s: float | None = None) -> "Ended | None":
        """Return the next step that ends; None if none does for some time, or there is none."""
        try:
            number = self._told.get(timeout=wait_s) if self._under_way else None
        except Empty:
            return None
        if number is None:
            return None
        key, _, pending = self._under_way.pop(number)
        return Ended(key, pending)

    def wait(self, timeout_s: float) -> None:
        """Wait until all steps have ended, but no longer."""
        deadline = time.monotonic() + timeout_s
        for step in self.under_way:
            step.ended.wait(max(0.0, deadline - time.monotonic()))


class Ended(NamedTuple):
    """A step that ended, with the key that it was started under."""

    key: Any
    pending: Pending[Any]


class PlainSteps(Steps):
    """Steps without Prefect: for tests, notebooks and machines where no server may run."""

    def __init__(self) -> None:
        super().__init__()
        self._threads = ThreadPoolExecutor(THREADS)

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], title: str) -> None: ...

    def note(self, key: str, markdown: str, title: str) -> None: ...

    def picture(self, key: str, png: bytes, title: str) -> None: ...

    def _submit(self, task: Any, step: Step, args: Sequence[Any]) -> Pending[Any]:
        return self._threads.submit(task.fn, step, *args)

    def _step(self, task: Any, name: str) -> Step:
        return Step(name, self.stop, self._watchers())


class PrefectSteps(Steps):
    """Steps as task runs of the Prefect flow that this is made in.

    Parameters
    ----------
    directory : Path
        The run directory. Keys of artifacts begin with it, so that each has the history of one directory.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._page = _Page()
        self._name = f"{shortened(artifact_key(directory.name), 40)}-{content_digest(str(directory))[:6]}"

    def _key(self, key: str) -> str:
        return artifact_key(f"{self._name}-{key}")

    def tell(self, line: str) -> None:
        from prefect import get_run_logger

        super().tell(line)
        get_run_logger().info("%s", line)

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], title: str) -> None:
        from prefect.artifacts import create_table_artifact

        self._page.keep(
            lambda: create_table_artifact([_public_row(row) for row in rows], key=self._key(key), description=title)
        )

    def note(self, key: str, markdown: str, title: str) -> None:
        from prefect.artifacts import create_markdown_artifact

        self._page.sweep()
        self._page.keep(
            lambda: create_markdown_artifact(public(markdown), key=self._key(key), description=public(title))
        )

    def picture(self, key: str, png: bytes, title: str) -> None:
        from prefect.artifacts import create_image_artifact

        # The picture itself, not where it lies: whoever looks may sit at another machine.
        inside = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        self._page.keep(lambda: create_image_artifact(inside, key=self._key(key), description=public(title)))

    def _submit(self, task: Any, step: Step, args: Sequence[Any]) -> Pending[Any]:
        from prefect.utilities.annotations import quote

        name = printable(f"{task.name} {step.name}").replace("{", "(").replace("}", ")")
        # Quoted: Prefect would look for futures in everything that it is given, prompts included.
        return _OpenPending(task.with_options(task_run_name=name).submit(quote(step), *map(quote, args)))

    def _step(self, task: Any, name: str) -> Step:
        return Step(name, self.stop, [*self._watchers(), _ProgressArtifact(task.name, name, self._page, self._key)])


class _OpenPending:
    """A task run whose error is told here as it is, and to Prefect without the texts of rows."""

    def __init__(self, future: Pending[Any]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Withheld as withheld:
            raise withheld.error from None

    def add_done_callback(self, fn: Callable[[Any], None], /) -> None:
        self._future.add_done_callback(fn)


class _PartStop(threading.Event):
    """An event that is set when its part or the whole run is to stop."""

    def __init__(self, whole: threading.Event) -> None:
        super().__init__()
        self._whole = whole

    def is_set(self) -> bool:
        return self._whole.is_set() or super().is_set()


class _Page:
    """The pages of the Prefect UI. A run needs no server: one that is lost may come back."""

    def __init__(self) -> None:
        self._silent_until = float("-inf")
        self._dropped: list[Any] = []
        """Artifacts to take away: what a server that was away still has is tried again."""

    def keep(self, show: Callable[[], T]) -> T | None:
        """Show something that is to stay: patiently, unless the server is silent anyway."""
        return self._tried(show, patient=not self._is_silent)

    def refresh(self, show: Callable[[], T]) -> T | None:
        """Show something that will soon be shown anew: it is not tried twice, and not while the server is silent."""
        return None if self._is_silent else self._tried(show, patient=False)

    def drop(self, artifact_id: Any) -> None:
        """Take an artifact away, now or at the next `sweep`."""
        self._dropped.append(artifact_id)
        self.refresh(self._sweep)

    def sweep(self) -> None:
        """Take away, patiently, what could not be taken away before."""
        self.keep(self._sweep)

    def _sweep(self) -> None:
        while self._dropped:
            one = self._dropped.pop()
            try:
                _delete_artifact(one)
            except BaseException:
                self._dropped.append(one)
                raise

    @property
    def _is_silent(self) -> bool:
        return time.monotonic() < self._silent_until

    def _tried(self, show: Callable[[], T], *, patient: bool) -> T | None:
        import httpx
        from prefect.exceptions import PrefectException
        from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

        retries = min(PREFECT_CLIENT_MAX_RETRIES.value(), _MOST_RETRIES) if patient else 0
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries}):
                return show()
        except (httpx.HTTPError, PrefectException) as error:
            self._silent_until = time.monotonic() + _SILENCE_S
            logger.warning("Prefect does not answer (%s): the run goes on, unseen", " ".join(str(error).split()))
            return None


class _ProgressArtifact:
    """A progress bar in the Prefect UI, refreshed every few seconds, and lines in the log.

    There is one at its end, and one a minute while it waits. The bar of a finished step is taken away: dozens of them
    would bury the results. That of a failed one stays and tells where it stopped.
    """

    def __init__(self, kind: str, name: str, page: _Page, key: Callable[[str], str]) -> None:
        self._title, self._key = printable(f"{kind} {name}"), key
        self._page = page
        self._id: Any = None
        self._shown_at = self._told_at = float("-inf")
        self._started_at = time.monotonic()
        self._first_done: int | None = None
        self._parts = ""

    def advance(self, progress: Progress) -> None:
        from prefect import get_run_logger
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._first_done is None:
            self._first_done = progress.done
        self._parts = f"{progress.done} of {progress.total} parts"
        now = time.monotonic()
        if progress.note and now - self._told_at >= _TELL_S:
            self._told_at = now
            get_run_logger().info("%s: %s", self._title, progress.note)
        is_soon = now - self._shown_at < _ARTIFACT_INTERVAL_S or progress.is_queued
        if progress.done < progress.total and is_soon:
            return
        self._shown_at = now
        percent, text = 100.0 * progress.done / max(progress.total, 1), self._text(progress)
        if self._id is None:
            key = self._key(self._title)
            self._id = self._page.refresh(lambda: create_progress_artifact(percent, key=key, description=text))
        else:
            self._page.refresh(lambda: update_progress_artifact(self._id, percent, description=text))

    def finish(self, step: str, error: BaseException | None) -> None:
        from prefect import get_run_logger

        if error is None:
            seconds = f"finished in {time.monotonic() - self._started_at:.1f} s"
            get_run_logger().info("%s: %s", self._title, f"{self._parts}, {seconds}" if self._parts else seconds)
            if self._id is not None:
                self._page.drop(self._id)

    def tell(self, line: str) -> None: ...

    def _text(self, progress: Progress) -> str:
        text = self._parts
        gained, seconds = progress.done - (self._first_done or 0), time.monotonic() - self._started_at
        if gained > 0 and progress.done < progress.total:
            rate = gained / seconds
            text += f", {rate * 60:.1f} a minute, {(progress.total - progress.done) / rate:.0f} s left"
        return public(f"{text}; {progress.note}" if progress.note else text)


def _delete_artifact(artifact_id: Any) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        client.delete_artifact(artifact_id)


def _public_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: printable(public(cell)) if isinstance(cell, str) else cell for name, cell in row.items()}


def artifact_key(name: str) -> str:
    """Return a Prefect artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
