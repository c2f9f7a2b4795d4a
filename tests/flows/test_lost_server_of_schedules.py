"""With a real Prefect server: served and deployed runs end well when it is lost and comes back, or a worker is killed.

Everything happens once, in `served`, `deployed` and `lost`; the tests look at what was seen of it. Servers that are
away for minutes are in the fault suite.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml
from prefect_servers import FINAL, PREFECT, Json, Popen, PrefectServer, below, running, wait_until
from support import NEG, REPOSITORY, save_tiny_model

from tasks.rundir.claim import claim

N_ROWS = 60
EVERY_TEN_SECONDS = "* * * * * */10"
AWAY_S = 12.0
"""A schedule comes due in this time. Prefect's own runner gives up after three polls, which is 3 s here."""
WITHIN_S = 45
"""How long the automation waits for a heartbeat, of which there is one in 30 s."""
QUICK = {
    "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_CLIENT_MAX_RETRIES": "1",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    settings = {
        "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
    }
    with PrefectServer(tmp_path_factory.mktemp("prefect"), **settings) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and some rows for it."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        {"prompt": f"It is {n}. Answer:", "labels": [" A", " B"], "answer": n % 2, "split": ("train", "test")[n % 2]}
        for n in range(N_ROWS)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_tiny_model("llama", folder / "tiny")
    return folder


def run_values(folder: Path, out: Path) -> Json:
    return {
        "model": [str(folder / "tiny")],
        "dataset": [str(folder / "questions.jsonl")],
        "probe": ["polar"],
        "shard_rows": 1,
        "max_neurons": 8,
        "backend": "local",
        "out": str(out),
    }


def n_shards(directory: Path) -> int:
    return len(list((directory / "negs").rglob("_receipts/part-*.json")))


@contextmanager
def standing_still(starter: Popen, directory: Path) -> Iterator[list[psutil.Process]]:
    """The processes of a run that has begun to work, stopped in the middle of it."""
    wait_until(lambda: n_shards(directory), "a finished shard")
    flow = [process for process in below(starter) if "prefect.engine" in process.cmdline()]
    assert flow
    for process in flow:
        process.suspend()
    try:
        yield flow
    finally:
        for process in flow:
            if process.is_running():
                process.resume()


def completed_after(server: PrefectServer, run: Json, count: int) -> list[Json]:
    """The first runs that were due after another one and have completed."""

    def now() -> list[Json]:
        later = [one for one in server.runs("COMPLETED", deployment=run["deployment_id"]) if one["id"] != run["id"]]
        return [one for one in later if one["expected_start_time"] > run["expected_start_time"]][:count]

    return wait_until(lambda: found if len(found := now()) == count else None, f"{count} more runs")


def skipped_runs(server: PrefectServer, run: Json) -> list[Json]:
    return [one for one in server.runs("CANCELLED", deployment=run["deployment_id"]) if one["state_name"] == "Skipped"]


# Served


class Served(NamedTuple):
    """What was seen of `neg serve`."""

    before: list[Json]
    """Runs that were skipped while the first one stood still."""
    first: Json
    """The run whose server was lost."""
    n_shards_without_server: int
    later: list[Json]
    held: Json
    """The run that came due while somebody else held the directory."""
    exit_code: int
    log: str


@pytest.fixture(scope="module")
def served(server, folder):
    directory, log = folder / "served", folder / "serve.log"
    (folder / "run.yaml").write_text(yaml.safe_dump({"kind": "pipeline"} | run_values(folder, directory)))
    command = [NEG, "serve", folder / "run.yaml", "--cron", EVERY_TEN_SECONDS, "--name", "often"]
    with running(command, log, **server.settings(folder), **QUICK) as serving:
        first = wait_until(server.under_way, "a first run")
        with standing_still(serving, directory):
            before = wait_until(lambda: skipped_runs(server, first), "a skipped run")
            server.kill()
        wait_until(lambda: n_shards(directory) == N_ROWS, "all shards")
        wait_until(lambda: "the run has ended, but the Prefect server does not answer" in log.read_text(), "the end")
        time.sleep(AWAY_S)
        n_without = n_shards(directory)
        server.start()
        first = server.reached(first, *FINAL)
        later = completed_after(server, first, 2)
        with claim(directory):
            known = {run["id"] for run in skipped_runs(server, first)}
            held = wait_until(
                lambda: next(
                    (
                        run
                        for run in skipped_runs(server, first)
                        if run["id"] not in known and "is held by" in run["state"]["message"]
                    ),
                    None,
                ),
                "a run that finds the directory held",
            )
        serving.send_signal(signal.SIGTERM)
        exit_code = serving.wait(120)
    return Served(before, first, n_without, later, held, exit_code, log.read_text())


def test_a_schedule_that_is_due_during_a_run_is_skipped_and_names_that_run(served):
    (first, *_) = served.before
    assert f"({served.first['id']}) of the same deployment is under way" in first["state"]["message"]


def test_a_served_run_ends_without_its_server_and_tells_it_afterwards(served, server):
    assert served.n_shards_without_server == N_ROWS
    assert served.first["state"]["type"] == "COMPLETED"
    assert any((one["key"] or "").endswith("-summary") for one in server.of(served.first, "artifacts"))


def test_serving_says_when_the_server_is_away_and_back_and_what_it_missed(served):
    away = served.log.index("the Prefect server does not answer (")
    (back,) = [line for line in served.log.splitlines() if "answers again after" in line and "came due" in line]
    assert away < served.log.index(back)
    assert "came due meanwhile: often 20" in back and " UTC" in back


def test_the_next_two_schedules_run_after_the_server_is_back(served):
    assert len(served.later) == 2


def test_a_scheduled_run_that_finds_its_directory_held_is_skipped_and_names_the_holder(served):
    assert served.held["state"]["type"] == "CANCELLED"
    assert f"is held by pid {os.getpid()} on " in served.held["state"]["message"]


def test_serving_ends_well_afterwards(served):
    assert served.exit_code == 0


# Deployed


class Deployed(NamedTuple):
    """What was seen of runs of process workers."""

    running: Json
    """The run whose server was lost in its middle."""
    n_shards_without_server: int
    pending: Json
    """The run whose server was lost before it began."""
    later: list[Json]
    """The run after that one."""
    deployment: str
    worker: list[Any]
    """The command that starts a worker."""
    settings: dict[str, str]


@pytest.fixture(scope="module")
def deployed(server, folder):
    directory = folder / "deployed"
    settings = server.settings(folder) | QUICK | {"PREFECT_CLIENT_MAX_RETRIES": "5"}  # a worker needs Prefect's default
    deployment = deploy(server, folder, directory, settings)
    # One at a time: a run may take longer than a schedule of ten seconds waits.
    worker = [PREFECT, "worker", "start", "--pool", "neg", "--type", "process", "--limit", "1"]

    def one(state: str) -> Json:
        return wait_until(lambda: next(iter(server.runs(state, deployment=deployment)), None), f"a run that is {state}")

    with running(worker, folder / "worker.log", **settings) as working:
        first = one("RUNNING")
        with standing_still(working, directory):
            server.kill()
        wait_until(lambda: n_shards(directory) == N_ROWS, "all shards")
        time.sleep(3)
        n_without = n_shards(directory)
        server.start()
        first = server.reached(first, "COMPLETED")  # the automation may be quicker, and be wrong for a moment
        pending = one("PENDING")
        server.kill()
        server.start()
        pending = server.reached(pending, *FINAL)
        later = completed_after(server, pending, 1)
    return Deployed(first, n_without, pending, later, deployment, worker, settings)


def deploy(server: PrefectServer, folder: Path, directory: Path, settings: dict[str, str]) -> str:
    """Deploy a flow of the manifest with a schedule of ten seconds; its automation waits less for heartbeats."""
    manifest = yaml.safe_load((REPOSITORY / "infra" / "prefect.yaml").read_text())
    (nightly,) = [one for one in manifest["deployments"] if one["name"] == "nightly"]
    nightly["parameters"] = {"run": run_values(folder, directory)}
    nightly["schedules"] = [{"cron": EVERY_TEN_SECONDS, "timezone": "UTC"}]
    nightly["work_pool"]["job_variables"]["working_dir"] = str(folder)
    (folder / "prefect.yaml").write_text(yaml.safe_dump(manifest | {"deployments": [nightly]}))
    for command in (
        ["work-pool", "create", "neg", "--type", "process"],
        ["--no-prompt", "deploy", "--all", "--prefect-file", folder / "prefect.yaml"],
    ):
        subprocess.run([PREFECT, *command], check=True, capture_output=True, env=os.environ | settings, cwd=REPOSITORY)
    heartbeats, *_ = yaml.safe_load((REPOSITORY / "infra" / "automations.yaml").read_text())["automations"]
    server("POST", "automations/", heartbeats | {"trigger": heartbeats["trigger"] | {"within": WITHIN_S}})
    (found,) = server("POST", "deployments/filter", {"deployments": {"name": {"any_": ["nightly"]}}})
    return found["id"]


def test_a_deployed_run_ends_without_its_server_and_tells_it_afterwards(deployed):
    assert deployed.n_shards_without_server == N_ROWS
    assert deployed.running["state"]["type"] == "COMPLETED"


def test_a_run_that_was_pending_when_the_server_was_lost_gets_a_final_state(deployed):
    assert deployed.pending["state"]["type"] in ("CRASHED", "COMPLETED")
    assert len(deployed.later) == 1


# Lost workers


class Lost(NamedTuple):
    """What was seen of runs whose worker was killed."""

    outlived: Json
    """The run that was left alone by its worker."""
    n_shards: int
    killed: Json
    """The run that was killed with its worker."""
    again: Json
    """The next run of the same directory, by another worker."""
    redone: list[str]
    """Shards that were finished before and were written again."""


@pytest.fixture(scope="module")
def lost(server, folder, deployed):
    server("POST", f"deployments/{deployed.deployment}/pause_deployment")
    alone, directory = folder / "left-alone", folder / "killed"

    def start(directory: Path) -> Json:
        parameters = {"run": run_values(folder, directory)}
        return server("POST", f"deployments/{deployed.deployment}/create_flow_run", {"parameters": parameters})

    with running(deployed.worker, folder / "worker.log", **deployed.settings) as working:
        outlived = start(alone)
        with standing_still(working, alone):
            working.kill()
            working.wait()
        outlived = server.reached(outlived, "COMPLETED")
    with running(deployed.worker, folder / "worker.log", **deployed.settings) as working:
        killed = start(directory)
        with standing_still(working, directory) as flow:
            for process in (working, *flow):
                process.kill()
                process.wait()
        before = stamps(directory)
        killed = server.reached(killed, *FINAL)
    with running(deployed.worker, folder / "worker.log", **deployed.settings):
        again = server.reached(start(directory), *FINAL)
    now = stamps(directory)
    redone = [name for name in before if now[name] != before[name]]
    return Lost(outlived, n_shards(alone), killed, again, redone)


def stamps(directory: Path) -> dict[str, int]:
    """When each finished shard was written, by its receipt."""
    receipts = (directory / "negs").rglob("_receipts/part-*.json")
    return {path.relative_to(directory).as_posix(): path.stat().st_mtime_ns for path in receipts}


def test_a_run_outlives_the_worker_that_started_it(lost):
    assert lost.outlived["state"]["type"] == "COMPLETED"
    assert lost.n_shards == N_ROWS


def test_a_run_that_is_killed_with_its_worker_is_marked_as_crashed_and_the_next_one_goes_on(lost):
    assert lost.killed["state"]["type"] == "CRASHED"
    assert lost.again["state"]["type"] == "COMPLETED"
    assert lost.redone == []
