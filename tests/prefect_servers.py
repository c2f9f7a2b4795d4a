"""Real Prefect servers for the tests: they can be killed and come back, and programs report to them."""

import contextlib
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from support import NEG

PATIENCE_S = 600.0
"""Limit for each thing that is waited for: a quiet machine needs seconds."""
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
PREFECT = NEG.parent / "prefect"

Json = dict[str, Any]
Popen = subprocess.Popen[bytes]


class PrefectServer:
    """A Prefect server that asks for a password; its database outlives it."""

    def __init__(self, home: Path, **settings: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.home, self.auth = home, f"test:{secrets.token_hex(8)}"
        self.url = f"http://127.0.0.1:{self.port}/api"
        self._settings = {
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_API_AUTH_STRING": self.auth,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
            "DO_NOT_TRACK": "1",
        } | settings
        self._process: Popen | None = None

    def __enter__(self) -> "PrefectServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Return when the server answers."""
        self.home.mkdir(parents=True, exist_ok=True)
        command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=clean_environment() | self._settings, stdout=log, stderr=subprocess.STDOUT
            )
        wait_until(self._is_healthy, "the server")

    def kill(self) -> None:
        """Kill the server as a lost machine does: nobody is told."""
        if self._process is None:
            return
        family = below(self._process)
        self._process.kill()
        self._process.wait()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _is_healthy(self) -> bool:
        assert self._process is not None and self._process.poll() is None, (self.home / "server.log").read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).is_success
        return False

    def __call__(self, method: str, path: str, body: Any = None) -> Any:
        def answer() -> httpx.Response | None:
            auth, url = tuple(self.auth.split(":")), f"{self.url}/{path}"
            given = httpx.request(method, url, json=body, auth=auth, timeout=PATIENCE_S, trust_env=False)
            return None if given.status_code == 503 else given  # it is to be asked again: SQLite was locked for long

        given = wait_until(answer, f"an answer to {path}").raise_for_status()
        return given.json() if given.content else None

    def settings(self, place: Path) -> dict[str, str]:
        """Return what a program needs to report to the server, and to leave its own files in a place."""
        api = {"PREFECT_API_URL": self.url, "PREFECT_API_AUTH_STRING": self.auth}
        return api | {"PREFECT_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}

    def runs(self, *states: str, deployment: str | None = None) -> list[Json]:
        """Return the flow runs of a deployment, or of any, in some states; those due first come first."""
        wanted: Json = {"deployment_id": {"any_": [deployment]} if deployment else {"is_null_": False}}
        if states:
            wanted["state"] = {"type": {"any_": list(states)}}
        return self("POST", "flow_runs/filter", {"flow_runs": wanted, "sort": "EXPECTED_START_TIME_ASC"})

    def under_way(self) -> Json | None:
        """Return the flow run that somebody works on."""
        return next(iter(self.runs("PENDING", "RUNNING")), None)

    def reached(self, run: Json, *states: str, patience_s: float = PATIENCE_S) -> Json:
        """Return the flow run as soon as it is in one of the states."""

        def now() -> Json | None:
            known = self("GET", f"flow_runs/{run['id']}")
            return known if known["state"]["type"] in states else None

        return wait_until(now, f"{run['name']} to be {states}", patience_s)

    def of(self, run: Json, kind: str) -> list[Json]:
        """Return artifacts, logs or task runs of a flow run."""
        return self("POST", f"{kind}/filter", {kind: {"flow_run_id": {"any_": [run["id"]]}}})


def wait_until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Return the condition's value as soon as it is true."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"waited in vain for {what}")


def clean_environment() -> dict[str, str]:
    """Return the environment without what the machine says of Prefect and Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}


@contextlib.contextmanager
def running(command: list[Any], log: Path, **environment: str) -> Iterator[Popen]:
    """A process that is asked to end when the block is left, and made to end with all that it started."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=clean_environment() | environment, cwd=log.parent
        )
    try:
        yield process
    finally:
        family = below(process)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        for left in psutil.wait_procs(family, timeout=10)[1]:
            left.kill()


def below(process: Popen) -> list[psutil.Process]:
    """Return all that a process started, and that they started."""
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
