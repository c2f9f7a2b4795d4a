"""The private server: it records the whole run, is closed to others, and ends with its driver."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
from prefect import flow, task
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner

from negcore.errors import RunError
from tasks.server import prefect_api


@task(cache_policy=NO_CACHE)
def number(value: int) -> int:
    return value


@flow(task_runner=ThreadPoolTaskRunner(max_workers=4))
def twenty() -> int:
    progress = create_progress_artifact(0.0, key="progress")
    numbers = [number.submit(value) for value in range(20)]
    total = sum(future.result() for future in numbers)
    update_progress_artifact(progress, 100.0)
    create_table_artifact({"total": [total]}, key="scores")
    return total


@task(cache_policy=NO_CACHE)
def fails() -> None:
    raise KeyError("a bug")


@flow
def failing() -> None:
    fails()


class FinishedRun(NamedTuple):
    """What was seen of a private server, whose block was left by an exception."""

    home: Path
    pid: int
    total: int
    stranger: int
    listening: set[str]
    password_mode: int
    url_inside: str | None
    url_given: str


def _server_of_this_process() -> psutil.Process:
    children = psutil.Process().children()
    return next(child for child in children if "prefect" in child.cmdline() and "server" in child.cmdline())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> FinishedRun:
    home = tmp_path_factory.mktemp("run") / "prefect"
    with pytest.raises(KeyError, match="a bug"), prefect_api(home) as api:
        api.wait_ready()
        process = _server_of_this_process()
        finished = FinishedRun(
            home,
            process.pid,
            twenty(),
            httpx.post(f"{api.url}/task_runs/count", json={}).status_code,
            {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN},
            stat.S_IMODE((home / "password").stat().st_mode),
            PREFECT_API_URL.value(),
            api.url,
        )
        failing()
    return finished


def rows(run: FinishedRun, query: str) -> list[tuple]:
    database = sqlite3.connect(run.home / "prefect.db")
    try:
        return database.execute(query).fetchall()
    finally:
        database.close()


def test_every_task_run_is_recorded(run):
    assert run.total == 190
    states = rows(run, "SELECT state_type, count(*) FROM task_run GROUP BY 1 ORDER BY 1")
    assert states == [("COMPLETED", 20), ("FAILED", 1)]


def test_flow_runs_are_recorded_though_one_failed(run):
    flows = "SELECT f.name, r.state_type FROM flow_run r JOIN flow f ON f.id = r.flow_id ORDER BY 1"
    assert rows(run, flows) == [("failing", "FAILED"), ("twenty", "COMPLETED")]


def test_artifacts_are_kept(run):
    assert rows(run, "SELECT key, type FROM artifact WHERE key IS NOT NULL ORDER BY 1") == [
        ("progress", "progress"),
        ("scores", "table"),
    ]
    ((progress,),) = rows(run, "SELECT data FROM artifact WHERE key = 'progress'")
    assert float(progress) == 100.0


def test_the_server_is_gone_after_the_run(run):
    assert not psutil.pid_exists(run.pid)
    assert (run.home / "server.log").exists()


def test_the_server_is_closed_to_the_network_and_to_other_users(run):
    assert run.listening == {"127.0.0.1"}
    assert run.stranger == 401
    assert run.password_mode == 0o600


def test_settings_are_as_before_after_the_run(run):
    assert run.url_inside == run.url_given
    assert PREFECT_API_URL.value() != run.url_given
    assert os.environ.get("PREFECT_API_URL") != run.url_given


def test_a_killed_driver_leaves_no_server(tmp_path):
    script = (
        "import psutil, signal, sys, time; from pathlib import Path; from tasks.server import prefect_api\n"
        "with prefect_api(Path(sys.argv[1])):\n"
        "    print(psutil.Process().children()[0].pid, flush=True); time.sleep(60)"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=clean) as driver:
        server = psutil.Process(int(driver.stdout.readline()))
        assert server.is_running()
        driver.send_signal(signal.SIGKILL)
    gone, _ = psutil.wait_procs([server], timeout=10)
    assert gone or server.status() == psutil.STATUS_ZOMBIE


def test_a_server_that_ends_is_an_error_that_names_its_log(tmp_path):
    with prefect_api(tmp_path) as api:
        os.kill(_server_of_this_process().pid, signal.SIGKILL)
        with pytest.raises(RunError, match="ended with -9: see .*server.log"):
            api.wait_ready()


def test_a_configured_api_is_used_as_it_is(tmp_path):
    url = "http://127.0.0.1:1/api"
    with temporary_settings({PREFECT_API_URL: url}), prefect_api(tmp_path / "home") as api:
        assert (api.url, api.private) == (url, False)
        assert PREFECT_API_URL.value() == url
        with pytest.raises(RunError, match=f"PREFECT_API_URL is '{url}', but nothing healthy answers"):
            api.wait_ready()
    assert not (tmp_path / "home").exists()


def test_a_private_server_outside_the_main_thread_is_refused(tmp_path):
    errors: list[Exception] = []

    def start() -> None:
        try:
            with prefect_api(tmp_path):
                pass
        except RunError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
