"""A Prefect API for one run: the configured one, or a private server that lives as long as the driver.

A private server listens on the loopback interface only and asks for the password in ``<home>/password``, on its web
page too. To look at the run later::

    PREFECT_HOME=<home> prefect server start
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from negcore.errors import RunError
from tasks.environment import environment

__all__ = ["PrefectApi", "prefect_api"]

logger = logging.getLogger(__name__)

_START_S = 180.0
"""Limit for the start of a private server, which makes its database slowly on a loaded machine."""

_QUIET_S = 1.0
"""A server has recorded all task runs when their number stood still for this long and none is open."""

_QUIET_OPEN_S = 5.0
"""The same if some are open: the task runs of a driver that was stopped never end."""

_DRAIN_S = 60.0
_STOP_S = 10.0
_POLL_S = 0.1

_ANSWER_S = 20.0
"""Limit for the first answer of a configured server, which is asked twice."""

_PR_SET_PDEATHSIG = 1

_SERVER_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
}


class PrefectApi(Protocol):
    """The API that flows of this process report to."""

    url: str
    private: bool
    """True if it was started for this run."""

    def wait_ready(self) -> None:
        """Return once the API answers; call it before the first flow.

        Raises
        ------
        RunError
            If it does not answer, or a private server ended.
        """


@contextlib.contextmanager
def prefect_api(home: Path) -> Iterator[PrefectApi]:
    """Make flows in the block report to the configured Prefect API, or else to a private server.

    The server starts in the background, so that other things can start meanwhile; see `PrefectApi.wait_ready`. At the
    end of the block it stops once it has recorded all task runs. If this process is killed, the server ends too.

    Parameters
    ----------
    home : Path
        Directory of a private server: its database, ``server.log`` and ``password``. Kept afterwards.

    Yields
    ------
    PrefectApi

    Raises
    ------
    RunError
        If a private server is needed in another thread than the main one, or if a flow cannot begin or end because the
        API does not answer.
    """
    configured = PREFECT_API_URL.value()
    if configured:
        with _loss_as_error(configured):
            yield _ConfiguredApi(configured)
        return
    server = _PrivateServer(home)
    try:
        with _loss_as_error(server.url), _reporting_to(server.url, server.auth):
            try:
                yield server
            finally:
                server.drain()
    finally:
        server.stop()


class _ConfiguredApi:
    private = False

    def __init__(self, url: str) -> None:
        self.url = url

    def wait_ready(self) -> None:
        patience = {PREFECT_API_REQUEST_TIMEOUT: _ANSWER_S, PREFECT_CLIENT_MAX_RETRIES: 1}
        with temporary_settings(patience), get_client(sync_client=True) as client:
            error = client.api_healthcheck()
        if error is not None:
            raise RunError(f"PREFECT_API_URL is {self.url!r}, but nothing healthy answers there: {error}")


@contextlib.contextmanager
def _loss_as_error(url: str) -> Iterator[None]:
    """Turn the loss of the API into an error of one line."""
    try:
        yield
    except httpx.RequestError as error:
        if not str(error.request.url).startswith(url):
            raise
        raise RunError(
            f"the Prefect API at {url!r} does not answer any more ({error}): what was computed is kept; run the same "
            "command again when it does, or with --orchestrator none"
        ) from error


@contextlib.contextmanager
def _reporting_to(url: str, auth: str) -> Iterator[None]:
    """Set the API for this thread, the threads that Prefect starts, and child processes; no proxy is asked for it."""
    variables = {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": auth, **_past_proxies("127.0.0.1")}
    with environment(variables), temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: auth}):
        yield


def _past_proxies(host: str) -> dict[str, str]:
    """Return the variables that keep a host from being asked through a proxy, beside the hosts that they name now."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(filter(None, [named, host])))


class _PrivateServer:
    """A ``prefect server`` process in its own session, so that Ctrl-C reaches the driver only."""

    private = True

    def __init__(self, home: Path) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RunError("a private Prefect server can only be started from the main thread; or set PREFECT_API_URL")
        self._home = home.resolve()
        _make_private(self._home)
        self._ready = False
        self.auth = f"run:{secrets.token_hex(16)}"
        _write_private(self._home / "password", self.auth)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        self._process = self._start(port)

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        with open(self._log, "ab", opener=_private_opener) as log:
            return subprocess.Popen(
                command,
                env=_server_environment(self._home, self.url, self.auth),
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0o077,  # the database holds the parameters of runs
                preexec_fn=_die_with_parent(),
            )

    @property
    def _log(self) -> Path:
        return self._home / "server.log"

    def wait_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._ready:
            if self._process.poll() is not None:
                raise RunError(f"the private Prefect server ended with {self._process.returncode}: see {self._log}")
            if time.monotonic() > deadline:
                raise RunError(f"the private Prefect server did not answer within {_START_S:g} s: see {self._log}")
            time.sleep(_POLL_S)
            with contextlib.suppress(httpx.TransportError):  # not listening yet
                self._ready = httpx.get(f"{self.url}/health", timeout=1.0, trust_env=False).is_success

    def drain(self) -> None:
        """Wait until the server has recorded what this process told it, which it does in the background."""
        if not self._ready:
            return
        EventsWorker.drain_all(timeout=_DRAIN_S)
        APILogWorker.drain_all(timeout=_DRAIN_S)
        deadline = time.monotonic() + _DRAIN_S
        counts, since = None, time.monotonic()
        while time.monotonic() < deadline and self._process.poll() is None:
            before, counts = counts, self._count_task_runs()
            if counts is None or counts != before:
                since = time.monotonic()
            elif time.monotonic() - since >= (_QUIET_OPEN_S if counts.open else _QUIET_S):
                return
            time.sleep(_POLL_S)
        logger.warning("the private Prefect server may lack the last task runs: see %s", self._log)

    def _count_task_runs(self) -> _TaskRuns | None:
        """Return the numbers of task runs, or None if the server is too busy to answer."""
        is_open = {"task_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}}
        with contextlib.suppress(httpx.TransportError, httpx.HTTPStatusError):
            return _TaskRuns(self._count({}), self._count(is_open))
        return None

    def _count(self, body: dict[str, Any]) -> int:
        user, _, password = self.auth.partition(":")
        url = f"{self.url}/task_runs/count"
        answer = httpx.post(url, json=body, auth=(user, password), timeout=_DRAIN_S, trust_env=False)
        return int(answer.raise_for_status().text)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _TaskRuns(NamedTuple):
    """Numbers of task runs that a server has recorded, and of those that are open."""

    recorded: int
    open: int


def _make_private(home: Path) -> None:
    """Make a server's directory its owner's alone, with what an earlier version left there."""
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    for file in (*home.glob("prefect.db*"), *home.glob("server.log")):
        file.chmod(0o600)


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _server_environment(home: Path, url: str, auth: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    own = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        "PREFECT_UI_API_URL": url,  # else the page asks port 4200
    }
    return inherited | _SERVER_SETTINGS | own


def _die_with_parent() -> Callable[[], None]:
    """Return what a child process calls first: on Linux it asks to end with the thread that started it."""
    parent = os.getpid()
    if sys.platform != "linux":
        return lambda: None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
