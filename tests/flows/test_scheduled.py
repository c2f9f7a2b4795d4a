"""With a real Prefect server: a schedule starts runs of `neg serve`, one is cancelled in the middle, the next goes on.
And the manifest's deployments: `prefect deploy`, and a run by a process worker.

Everything happens once, in `story` and in `deployed`; the tests look at what was seen of it.
"""

import json
import os
import re
import signal
import subprocess
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import yaml
from prefect_servers import FINAL, PATIENCE_S, PREFECT, Json, Popen, PrefectServer, below, running, wait_until
from support import NEG, REPOSITORY, save_tiny_model

from flows.pipeline import run_pipeline
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.rundir.claim import CLAIM_FILE
from tasks.steps import PlainSteps

N_PROMPTS = 150
SECRET = "zebrafinch"  # no word of the names that Prefect gives runs
"""A word of every prompt."""
EVERY_TEN_SECONDS = "* * * * * */10"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def prefect(tmp_path_factory):
    with PrefectServer(tmp_path_factory.mktemp("prefect")) as server:
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Many small shards, to be probed too."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        {"prompt": f"Question: which {SECRET} fits {n}? Answer:", "labels": [" A", " B"], "answer": n % 2}
        for n in range(N_PROMPTS)
    ]
    lines = [json.dumps(row | {"split": ("train", "valid", "test")[n % 3]}) for n, row in enumerate(rows)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    values = {
        "model": [str(save_tiny_model("llama", folder / "tiny-llama"))],
        "dataset": [str(folder / "questions.jsonl")],
        "shard_rows": 1,
        "workers": 2,
        "max_neurons": 8,
        "out": str(folder / "served"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return read_run_file(SkillRun, folder / "run.yaml", {})


Shards = dict[Path, tuple[int, int]]
"""Inode and time of change of finished shards."""


def finished(run: SkillRun) -> Shards:
    receipts = (run.directory / "negs").rglob("_receipts/part-*.json")
    shards = [receipt.parent.parent / f"{receipt.stem}.arrow" for receipt in receipts]
    return {shard: (shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in shards}


class Cancelled(NamedTuple):
    """What was seen of a run that was cancelled."""

    run: Json
    kept: Shards
    left: list[psutil.Process]
    """Those of its processes that outlived it."""
    was_claimed: bool
    """Whether it still held the run directory after its end."""


class Story(NamedTuple):
    """All that was seen."""

    cancelled: Cancelled
    resumed: Json
    interrupted: Json
    crashed: Json
    deployment: Json
    exit_code: int
    """Of `neg serve`."""


@pytest.fixture(scope="module")
def story(prefect, run):
    folder = run.directory.parent
    command = [NEG, "serve", folder / "run.yaml", "--cron", EVERY_TEN_SECONDS, "--name", "often"]
    settings = prefect.settings(folder) | {"PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with running(command, folder / "serve.log", **settings) as serving:
        first = wait_until(prefect.under_way, "a first run")
        deployment = f"deployments/{first['deployment_id']}"
        prefect("POST", f"{deployment}/pause_deployment")  # the schedule waits for what is looked at between the runs
        lonely = beat_once(prefect, first["flow_id"])
        cancelled = cancel_in_the_middle(prefect, first, run, serving)
        prefect("POST", f"{deployment}/resume_deployment")
        second = wait_until(prefect.under_way, "a second run")
        resumed = prefect.reached(second, *FINAL)
        third = wait_until(prefect.under_way, "a third run")
        prefect.reached(third, "RUNNING")
        serving.send_signal(signal.SIGTERM)
        exit_code = serving.wait(PATIENCE_S)
    interrupted = prefect("GET", f"flow_runs/{third['id']}")
    crashed = prefect.reached(lonely, "CRASHED")
    return Story(cancelled, resumed, interrupted, crashed, prefect("GET", deployment), exit_code)


def cancel_in_the_middle(prefect: PrefectServer, flow_run: Json, run: SkillRun, serving: Popen) -> Cancelled:
    """Do what the button on Prefect's pages does."""
    wait_until(lambda: finished(run), "a finished shard")
    processes = below(serving)
    actors = [process for process in processes if process.is_running() and process.name().startswith("ray::_Host")]
    for actor in actors:  # what they work on cannot end before the run does
        actor.suspend()
    kept = finished(run)
    prefect("POST", f"flow_runs/{flow_run['id']}/set_state", {"state": {"type": "CANCELLING"}})
    ended = prefect.reached(flow_run, "CANCELLED", "COMPLETED", "FAILED", "CRASHED")
    left = psutil.wait_procs(processes, timeout=30)[1]
    return Cancelled(ended, kept, left, (run.directory / CLAIM_FILE).exists())


def beat_once(prefect: PrefectServer, flow: str) -> Json:
    """A flow run that gives one sign of life, and the automation of the manifest, which here waits less for another."""
    run = prefect("POST", "flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})
    place = {"prefect.resource.id": f"prefect.flow-run.{run['id']}"}
    automation, *_ = yaml.safe_load((REPOSITORY / "infra" / "automations.yaml").read_text())["automations"]
    prefect("POST", "automations/", automation | {"trigger": automation["trigger"] | {"match": place, "within": 10}})
    beat = {"id": str(uuid.uuid4()), "event": "prefect.flow-run.heartbeat", "resource": place}
    prefect("POST", "events", [beat | {"occurred": datetime.now(UTC).isoformat()}])
    return run


class Deployed(NamedTuple):
    """What `prefect deploy` made of the manifest, and a run that a worker was asked for."""

    deployments: list[Json]
    run: Json
    directory: Path


@pytest.fixture(scope="module")
def deployed(prefect, run, tmp_path_factory):
    place = tmp_path_factory.mktemp("worker")
    settings = prefect.settings(place) | {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    program, manifest = PREFECT, REPOSITORY / "infra" / "prefect.yaml"
    for command in (
        ["work-pool", "create", "neg", "--type", "process"],
        ["--no-prompt", "deploy", "--all", "--prefect-file", manifest],
    ):
        subprocess.run([program, *command], check=True, capture_output=True, env=os.environ | settings, cwd=REPOSITORY)
    deployments = prefect("POST", "deployments/filter", {"work_pools": {"name": {"any_": ["neg"]}}})
    (shards,) = [one for one in deployments if one["name"] == "shards"]
    with running([program, "worker", "start", "--pool", "neg", "--type", "process"], place / "worker.log", **settings):
        # The parameters of the manifest, but for what takes long; a relative directory is below the working directory.
        values = run.model_dump(mode="json", include={"model", "dataset"}) | {"out": "runs/shards", "shard_rows": 64}
        wanted = {"parameters": {"run": values}, "job_variables": {"working_dir": str(place)}}
        asked = prefect("POST", f"deployments/{shards['id']}/create_flow_run", wanted)
        ended = prefect.reached(asked, *FINAL)
    return Deployed(deployments, ended, place / "runs" / "shards")


def test_a_schedule_starts_runs_that_nobody_asked_for(story):
    for run in (story.cancelled.run, story.resumed, story.interrupted):
        assert run["auto_scheduled"]
        assert run["created_by"]["type"] == "SCHEDULE"
        assert run["name"] == "pipeline tiny-llama on questions.jsonl"
    assert [one["schedule"]["cron"] for one in story.deployment["schedules"]] == [EVERY_TEN_SECONDS]


def test_a_cancelled_run_stops_its_actors_and_gives_the_directory_back(story):
    assert story.cancelled.run["state"]["type"] == "CANCELLED"
    assert story.cancelled.left == []
    assert not story.cancelled.was_claimed
    assert 0 < len(story.cancelled.kept) < N_PROMPTS


def test_the_next_run_computes_only_what_is_missing(story, run):
    assert story.resumed["state"]["type"] == "COMPLETED"
    shards = finished(run)
    assert len(shards) == N_PROMPTS
    assert {shard: shards[shard] for shard in story.cancelled.kept} == story.cancelled.kept


def test_a_run_that_was_cancelled_and_resumed_has_the_bytes_of_an_undisturbed_one(story, run, tmp_path):
    undisturbed = run.model_copy(update={"backend": "local", "out": tmp_path / "undisturbed"})
    assert run_pipeline(undisturbed, PlainSteps()).problems == []
    for part in ("negs", "probes", "*.arrow"):
        assert contents(run.directory, part) == contents(undisturbed.directory, part) != {}


def contents(directory: Path, pattern: str) -> dict[Path, bytes]:
    files = [path for found in directory.glob(pattern) for path in (found, *found.rglob("*")) if path.is_file()]
    return {path.relative_to(directory): path.read_bytes() for path in files}


def test_task_runs_are_named_by_stage_model_and_dataset(story, prefect, run):
    names = sorted(one["name"] for one in prefect.of(story.resumed, "task_runs"))
    stages = ("extract {} test", "extract {} train", "extract {} valid", "probe {} probes")
    assert names == [stage.format(f"{run.model[0]} local/questions") for stage in stages]


def test_the_server_is_told_results_but_no_prompts(story, prefect):
    artifacts, logs = (prefect.of(story.resumed, kind) for kind in ("artifacts", "logs"))
    keys = {re.sub(r"^.*?-[0-9a-f]{6}-", "", one["key"] or "") for one in artifacts}
    assert {"rows", "summary"} <= keys and any(key.startswith("accuracy-") for key in keys)
    assert f"{N_PROMPTS} rows done" in json.dumps(artifacts)
    assert "finished in" in json.dumps(logs)
    told = [artifacts, logs, *(prefect.of(run, "task_runs") for run in (story.cancelled.run, story.resumed))]
    assert SECRET not in json.dumps(told)


def test_a_run_whose_heart_stops_is_marked_as_crashed(story, prefect):
    assert story.crashed["state"]["type"] == "CRASHED"
    assert "finished shards are kept" in story.crashed["state"]["message"].lower()
    beats = prefect("POST", "events/filter", {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}}})["events"]
    assert f"prefect.flow-run.{story.resumed['id']}" in {beat["resource"]["prefect.resource.id"] for beat in beats}


def test_serving_that_is_ended_cancels_the_run_under_way_and_pauses_the_schedule(story):
    assert story.exit_code == 0
    assert story.interrupted["state"]["type"] == "CANCELLED"
    assert story.deployment["paused"]


def test_the_manifest_deploys_every_flow_as_it_says(deployed):
    manifest = yaml.safe_load((REPOSITORY / "infra" / "prefect.yaml").read_text())["deployments"]
    made = {one["name"]: one for one in deployed.deployments}
    assert made.keys() == {one["name"] for one in manifest}
    for one in manifest:
        found = made[one["name"]]
        assert found["entrypoint"] == one["entrypoint"]
        assert (found["tags"], found["parameters"]) == (one["tags"], one["parameters"])
        assert [(plan["schedule"]["cron"], plan["active"]) for plan in found["schedules"]] == [
            (plan["cron"], plan["active"]) for plan in one["schedules"]
        ]
        assert found["global_concurrency_limit"] is None


def test_a_worker_carries_out_a_run_of_a_deployment(deployed):
    assert deployed.run["state"]["type"] == "COMPLETED", deployed.run["state"]
    assert deployed.run["name"] == "extract tiny-llama on questions.jsonl"
    assert sum(split.n_rows for split in open_negs(deployed.directory)) == N_PROMPTS
