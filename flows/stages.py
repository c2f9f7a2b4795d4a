"""How the steps of a run are carried out and watched: under Prefect, or plainly.

A *stage* is a named piece of work that reports how far it is. Both kinds run stages in threads; under Prefect each is
one task run with a progress artifact.
"""

import logging
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from negcore.errors import NegError
from tasks.measure.missing import Advance
from tasks.pool.base import PoolStatus, Stopped

T = TypeVar("T")
R = TypeVar("R", covariant=True)
Body = Callable[[Advance], T]

logger = logging.getLogger(__name__)

_ARTIFACT_INTERVAL_S = 2.0
_SILENCE_S = 60.0
"""A server that did not answer is left in peace for so long."""
_STOP_S = 10.0
_PROBE_THREADS = 8


class Watcher(Protocol):
    """Shows the stages of a run to a person."""

    def advance(self, stage: str, done: int, total: int, status: PoolStatus | None) -> None:
        """`done` of `total` parts of a stage are finished."""

    def finish(self, stage: str, error: BaseException | None) -> None:
        """A stage ended."""


class _Silent:
    """Nobody watches."""

    def advance(self, stage: str, done: int, total: int, status: PoolStatus | None) -> None: ...

    def finish(self, stage: str, error: BaseException | None) -> None: ...


current_watcher: ContextVar[Watcher] = ContextVar("current_watcher")
"""Whom the flows called from here report to; a flow's own parameters are for its run file alone."""


class Pending(Protocol[R]):
    """A stage under way."""

    def result(self, timeout: float | None = None) -> R: ...


class Stages(ABC):
    """Runs stages in threads until the run is stopped."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._watcher: Watcher = current_watcher.get(_Silent())

    @abstractmethod
    def submit(self, name: str, kind: str, body: Body[T]) -> Pending[T]:
        """Start a stage; `kind` groups stages of one sort, `name` says which this is."""

    @abstractmethod
    def table(self, key: str, rows: Sequence[dict[str, Any]], title: str) -> None:
        """Show a table of results."""

    @abstractmethod
    def note(self, key: str, markdown: str) -> None:
        """Show a text."""

    def run(self, name: str, kind: str, body: Body[T]) -> T:
        """Run a stage to its end. Whatever interrupts the wait stops the stage before it goes on."""
        ended = threading.Event()

        def tracked(advance: Advance) -> T:
            try:
                return body(advance)
            finally:
                ended.set()

        pending = self.submit(name, kind, tracked)
        try:
            return pending.result()
        except BaseException:
            if not ended.is_set():  # the error is not the stage's: a signal, or the flow was cancelled
                self.stop.set()
                ended.wait(_STOP_S)
            raise

    def _watched(self, name: str, body: Body[T], also: Callable[[int, int, str], None]) -> T:
        def advance(done: int, total: int, status: PoolStatus | None) -> None:
            self._watcher.advance(name, done, total, status)
            also(done, total, status.note if status else "")

        try:
            result = body(advance)
        except BaseException as error:
            self._watcher.finish(name, error)
            raise
        self._watcher.finish(name, None)
        return result


class PlainStages(Stages):
    """Stages without Prefect: for tests, notebooks and machines where no server may run."""

    def __init__(self) -> None:
        super().__init__()
        self._threads = ThreadPoolExecutor(_PROBE_THREADS)

    def submit(self, name: str, kind: str, body: Body[T]) -> Pending[T]:
        return self._threads.submit(self._watched, name, body, lambda done, total, note: None)

    def table(self, key: str, rows: Sequence[dict[str, Any]], title: str) -> None: ...

    def note(self, key: str, markdown: str) -> None: ...


class PrefectStages(Stages):
    """Stages as Prefect task runs of the flow that this is created in."""

    def __init__(self) -> None:
        super().__init__()
        self._page = _Page()

    def submit(self, name: str, kind: str, body: Body[T]) -> Pending[T]:
        from prefect import get_run_logger, task
        from prefect.cache_policies import NO_CACHE

        def stage() -> T:
            bar = _ProgressArtifact(f"{kind}-{name}", self._page)
            result = self._watched(name, body, bar)
            get_run_logger().info("%s %s: %s", kind, name, bar.summary)
            return result

        pending: Pending[T] = task(
            stage,
            name=kind,
            task_run_name=f"{kind} {name}".replace("{", "(").replace("}", ")"),
            cache_policy=NO_CACHE,
            retries=1,
            retry_condition_fn=self._may_retry,
        ).submit()
        return pending

    def table(self, key: str, rows: Sequence[dict[str, Any]], title: str) -> None:
        from prefect.artifacts import create_table_artifact

        self._page.keep(lambda: create_table_artifact(list(rows), key=artifact_key(key), description=title))

    def note(self, key: str, markdown: str) -> None:
        from prefect.artifacts import create_markdown_artifact

        self._page.keep(lambda: create_markdown_artifact(markdown, key=artifact_key(key)))

    def _may_retry(self, task: Any, task_run: Any, state: Any) -> bool:
        """Another attempt helps against neither a stop nor an error that only the user can mend."""
        error = state.result(raise_on_failure=False)
        return not self.stop.is_set() and not isinstance(error, (Stopped, NegError))


class _Page:
    """What the Prefect UI shows of a run. The run needs no server: one that is lost may come back."""

    def __init__(self) -> None:
        self._silent_until = float("-inf")

    def keep(self, show: Callable[[], T]) -> T | None:
        """Show something that is to stay: with the client's usual patience, unless the server is silent anyway."""
        return self._tried(show, patient=not self._is_silent)

    def refresh(self, show: Callable[[], T]) -> T | None:
        """Show something that will soon be shown anew: it is not tried twice, and not while the server is silent."""
        return None if self._is_silent else self._tried(show, patient=False)

    @property
    def _is_silent(self) -> bool:
        return time.monotonic() < self._silent_until

    def _tried(self, show: Callable[[], T], *, patient: bool) -> T | None:
        import httpx
        from prefect.exceptions import PrefectException
        from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

        try:
            with nullcontext() if patient else temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                return show()
        except (httpx.HTTPError, PrefectException) as error:
            self._silent_until = time.monotonic() + _SILENCE_S
            logger.warning("Prefect does not answer (%s): the run goes on, unseen", " ".join(str(error).split()))
            return None


class _ProgressArtifact:
    """A progress bar in the Prefect UI, refreshed every few seconds."""

    def __init__(self, name: str, page: _Page) -> None:
        self._page = page
        self._key = artifact_key(name)
        self._id: Any = None
        self._shown_at = float("-inf")
        self._started_at = time.monotonic()
        self._first_done: int | None = None
        self._parts = ""

    @property
    def summary(self) -> str:
        """What was done, for the log."""
        seconds = f"finished in {time.monotonic() - self._started_at:.1f} s"
        return f"{self._parts}, {seconds}" if self._parts else seconds

    def __call__(self, done: int, total: int, note: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._first_done is None:
            self._first_done = done
        self._parts = f"{done} of {total} parts"
        now = time.monotonic()
        if done < total and now - self._shown_at < _ARTIFACT_INTERVAL_S:
            return
        self._shown_at = now
        progress, text = 100.0 * done / max(total, 1), self._text(done, total, note)
        if self._id is None:
            self._id = self._page.refresh(lambda: create_progress_artifact(progress, key=self._key, description=text))
        else:
            self._page.refresh(lambda: update_progress_artifact(self._id, progress, description=text))

    def _text(self, done: int, total: int, note: str) -> str:
        text = self._parts
        gained, seconds = done - (self._first_done or 0), time.monotonic() - self._started_at
        if gained > 0 and done < total:
            rate = gained / seconds
            text += f", {rate * 60:.1f} a minute, {(total - done) / rate:.0f} s left"
        return f"{text}; {note}" if note else text


def artifact_key(name: str) -> str:
    """A Prefect artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
