"""Faults of Prefect servers: lost in the middle of runs that somebody started, a schedule started, or a worker."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from fault_bench import LOCAL, N_SHARDS, SHARD_ROWS, Bench, Outcome, Run, finished, rows_lost
from prefect_servers import FINAL, PREFECT, Json, Popen, PrefectServer, below, running, wait_until
from support import NEG, REPOSITORY

_AWAY_S = 30.0
_IMPATIENT = {"PREFECT_CLIENT_MAX_RETRIES": "2", "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
"""Prefect's own runner would give up after three polls: 20 s for the minutes that its usual settings take."""


def lost_prefect_server(bench: Bench) -> Outcome:
    """The server dies in the middle of the run; where the run ends with it, another server is started."""
    with PrefectServer(bench.home / "prefect") as server:
        settings = server.settings(bench.home / "prefect-client")
        run = Run(bench, bench.home / "server", *LOCAL, orchestrator="prefect", **settings)
        run.start()
        run.wait_for(N_SHARDS // 4)
        server.kill()
        run.look()
        ended = run.end()
        if ended == 0:
            return run.outcome(1)
        told = "Traceback" not in run.said
        server.start()
        return run.outcome(1, ok=told and run.finish() == 0)


def lost_server_of_served_run(bench: Bench) -> Outcome:
    """The server of `neg serve` dies in the middle of a run and comes back when the run has long been at its end."""
    place = bench.home / "served"
    place.mkdir()
    (place / "run.yaml").write_text(yaml.safe_dump({"kind": "pipeline"} | _values(bench, place / "run")))
    with PrefectServer(bench.home / "served-server") as server:
        command = [NEG, "serve", place / "run.yaml", "--flow", "extract", "--name", "served"]
        with running(command, place / "serve.log", **server.settings(place), **_IMPATIENT) as serving:
            deployment = wait_until(lambda: _deployment(server, "served", serving), "the deployment")
            return _lost_in_the_middle(bench, server, deployment, serving, place / "run")


def lost_server_of_deployed_run(bench: Bench) -> Outcome:
    """The same of a deployed run, which a process worker starts."""
    place = bench.home / "deployed"
    place.mkdir()
    with PrefectServer(bench.home / "deployed-server") as server:
        _deploy(bench, server, place)
        command = [PREFECT, "worker", "start", "--pool", "neg", "--type", "process"]
        settings = server.settings(place) | {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_CLIENT_MAX_RETRIES": "3"}
        with running(command, place / "worker.log", **settings) as worker:
            deployment = wait_until(lambda: _deployment(server, "shards", worker), "the deployment")
            return _lost_in_the_middle(bench, server, deployment, worker, place / "run")


def _lost_in_the_middle(bench: Bench, server: PrefectServer, deployment: Json, starter: Popen, out: Path) -> Outcome:
    """Lose the server of a run; it survives if it ends without it, tells it afterwards, and the next run goes on."""
    path = f"deployments/{deployment['id']}/create_flow_run"
    run = server("POST", path, {})
    wait_until(lambda: len(finished(out)) >= N_SHARDS // 4, "some shards")
    with _standing_still(starter):
        server.kill()
        seen = finished(out)
    wait_until(lambda: len(finished(out)) == N_SHARDS, "all shards")
    time.sleep(_AWAY_S)
    server.start()
    ends = [server.reached(run, *FINAL), server.reached(server("POST", path, {}), *FINAL)]
    now = finished(out)
    lost, redone = rows_lost(bench.reference, out), sum(now[shard] != stamp for shard, stamp in seen.items())
    survived = all(end["state"]["type"] == "COMPLETED" for end in ends) and not lost
    return Outcome(1, int(survived), lost, redone)


@contextmanager
def _standing_still(starter: Popen) -> Iterator[None]:
    """Stop the flow's process, so that the loss falls into the middle of its work."""
    flow = [process for process in below(starter) if "prefect.engine" in process.cmdline()]
    for process in flow:
        process.suspend()
    try:
        yield
    finally:
        for process in flow:
            process.resume()


def _values(bench: Bench, out: Path) -> dict[str, Any]:
    """Return the run file of the bench's reference run, written elsewhere."""
    names = {"model": [str(bench.model)], "dataset": [str(bench.rows)], "out": str(out)}
    return names | {"shard_rows": SHARD_ROWS, "backend": "local"}


def _deployment(server: PrefectServer, name: str, starter: Popen) -> Json | None:
    assert starter.poll() is None, f"see the logs beside {server.home}"
    found = server("POST", "deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    return next(iter(found), None)


def _deploy(bench: Bench, server: PrefectServer, place: Path) -> None:
    """Deploy the extraction of `infra/prefect.yaml` with the bench's rows."""
    manifest = yaml.safe_load((REPOSITORY / "infra" / "prefect.yaml").read_text())
    (shards,) = [one for one in manifest["deployments"] if one["name"] == "shards"]
    shards["parameters"] = {"run": _values(bench, place / "run")}
    shards["work_pool"]["job_variables"]["working_dir"] = str(place)
    (place / "prefect.yaml").write_text(yaml.safe_dump(manifest | {"deployments": [shards]}))
    for command in (
        ["work-pool", "create", "neg", "--type", "process"],
        ["--no-prompt", "deploy", "--all", "--prefect-file", place / "prefect.yaml"],
    ):
        environment = os.environ | server.settings(place)
        subprocess.run([PREFECT, *command], check=True, capture_output=True, env=environment, cwd=REPOSITORY)
