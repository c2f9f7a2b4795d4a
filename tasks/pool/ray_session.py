"""Ray for the length of a block: a private one on this machine, closed to the network, or a cluster to join.

Ray is imported only when a session is opened, because it reads some of its settings on import.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from negcore.errors import RunError
from negcore.store.temporary import temporary_directory
from tasks.environment import environment
from tasks.pool.nodes import is_dead

__all__ = ["check_head", "check_reachable", "head_is_lost", "ray_session"]

_LONGEST_TEMP = 20
"""Characters: a socket's path has at most 107, and Ray adds about 85."""

_OBJECT_STORE_BYTES = 200 * 2**20
"""Small, because only receipts travel through Ray's object store."""

_CONNECT_S = 10.0
"""Limit for reaching a cluster's head."""


_HEAD_SILENCE_S = 120.0
"""A head behind a link that loses everything is given up after so long."""
_HEAD_REFUSES_S = 45.0
"""A head whose machine says that nobody listens is given up after so long."""
_RAY_GIVES_UP_S = 600
"""Ray ends this process when its head has been away for so long, without a word of what is kept: later than we do."""
_HEAD_BEAT_S = 5.0


@contextlib.contextmanager
def ray_session(address: str | None = None) -> Iterator[None]:
    """Have Ray up inside the block; on leaving, shut down what was started here and nothing else.

    A local Ray listens on the loopback interface only and asks for a token that only this user can read. Where Ray is
    up already, it is used and left as it is: open one session around all pools that overlap.

    Parameters
    ----------
    address : str, optional
        As in `Resources`. The token of a cluster is taken from the environment (``RAY_AUTH_MODE``,
        ``RAY_AUTH_TOKEN_PATH``).

    Raises
    ------
    RunError
        If Ray does not start, the cluster cannot be reached, or Ray was imported before its first local session.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
    elif address == "local":
        with _local_ray():
            yield
    else:
        with _joined_ray(address):
            yield


_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a late call must not start a second cluster
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


_IMPORTED_EARLY = (
    "Ray was imported before its local session was opened, and knows neither the session's token nor that it must stay "
    "off the network: import it inside the session"
)


@contextlib.contextmanager
def _local_ray() -> Iterator[None]:
    with _short_directory() as home, environment(_ENVIRONMENT | _local_environment(home)):
        options = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES, "_temp_dir": str(home / "r")}
        with _initialised(address="local", **options) as ray:
            if ray.util.get_node_ip_address() != "127.0.0.1":
                raise RunError(_IMPORTED_EARLY)
            yield


@contextlib.contextmanager
def _joined_ray(address: str) -> Iterator[None]:
    if address != "auto":
        check_reachable(address)
    with (
        environment(_ENVIRONMENT | {"RAY_gcs_rpc_server_reconnect_timeout_s": str(_RAY_GIVES_UP_S)}),
        _initialised(address=address) as ray,
        _watched(ray.get_runtime_context().gcs_address, ray.get_runtime_context().get_node_id()),
    ):
        yield


class _HeadWatch:
    """Threads that call on a cluster's head: behind a cut link, Ray's own calls wait for minutes in silence.

    One of them asks for this process's own node: one that was cut off for half a minute is dead to the head for good,
    and ends itself; no call of this process is answered then.
    """

    def __init__(self, address: str, node: str) -> None:
        self._address, self._node = address, node
        self._silence: RunError | None = None
        self._death: RunError | None = None
        self._over = threading.Event()
        for call in (self._knock, self._ask):
            threading.Thread(target=call, name="head", daemon=True).start()

    @property
    def loss(self) -> RunError | None:
        """The error of a run whose head, or whose own node, is lost."""
        return self._death or self._silence

    def end(self) -> None:
        self._over.set()

    def _knock(self) -> None:
        answered_at = time.monotonic()
        while not self._over.wait(_HEAD_BEAT_S):
            try:
                check_reachable(self._address)
                answered_at, self._silence = time.monotonic(), None
            except RunError as error:
                refuses = isinstance(error.__cause__, ConnectionRefusedError)
                limit_s = _HEAD_REFUSES_S if refuses else _HEAD_SILENCE_S
                if time.monotonic() - answered_at > limit_s:
                    self._silence = self._error(limit_s)

    def _ask(self) -> None:
        while not self._over.wait(_HEAD_BEAT_S):
            if is_dead(self._node):
                self._death = RunError(
                    f"the Ray head at {self._address!r} took this machine's Ray node for dead, as after a cut link, "
                    "and the node has ended: stopped; finished shards are kept, and the same command goes on from them "
                    f"once the node is started again (ray start --address={self._address})"
                )

    def _error(self, limit_s: float) -> RunError:
        return RunError(
            f"the Ray head at {self._address!r} has not answered for {limit_s:g} s: stopped; finished shards are kept, "
            "and the same command goes on from them once the head can be reached"
        )


_watch: _HeadWatch | None = None
"""The watch over the head of the cluster that this process has joined."""


@contextlib.contextmanager
def _watched(address: str, node: str) -> Iterator[None]:
    global _watch
    before, watch = _watch, _HeadWatch(address, node)
    _watch = watch
    try:
        yield
    finally:
        watch.end()
        _watch = before


def head_is_lost() -> bool:
    """Tell whether the head of the joined cluster has been silent for too long."""
    return _watch is not None and _watch.loss is not None


def check_head() -> None:
    """Raise `RunError` if the head of the joined cluster has been silent for too long."""
    if _watch is not None and _watch.loss is not None:
        raise _watch.loss


def check_reachable(address: str, timeout_s: float = _CONNECT_S) -> None:
    """Refuse an address where nobody answers: Ray would try for twenty minutes before it said so.

    Raises
    ------
    RunError
    """
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdigit():
        raise RunError(f"the Ray address is {address!r}, but it must be host:port, 'auto' or 'local'")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except OSError as error:
        raise RunError(f"no Ray cluster answers at {address!r}: {error.strerror or error}") from error


@contextlib.contextmanager
def _initialised(**options: Any) -> Iterator[Any]:
    """Initialise Ray and put the signal handler back that it replaces."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # Ray has no type for it
        if "InvalidAuthToken" in str(error) and options["address"] == "local":
            raise RunError(_IMPORTED_EARLY) from error
        raise RunError(f"Ray cannot start or be joined: {' '.join(str(error).split())}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _local_environment(home: Path) -> dict[str, str]:
    """Return settings that close a local Ray to the network and to other users."""
    token = home / "token"
    with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(_token())
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: use the loopback interface only
    }


@functools.cache
def _token() -> str:
    """Return the secret of all local sessions of this process: Ray keeps the first one that it reads."""
    return secrets.token_hex(32)


def _short_directory() -> contextlib.AbstractContextManager[Path]:
    """Make a directory for this user only, with a path short enough for the sockets that Ray makes.

    Ray opens its own directory to everybody; it must be one inside this.
    """
    usual = tempfile.gettempdir()
    return temporary_directory(Path(usual if len(usual) <= _LONGEST_TEMP else "/tmp"))
