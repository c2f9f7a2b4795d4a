"""With a real Prefect server: the automations, the notification and the deployment trigger of `infra/`.

The wait for heartbeats is shortened by one factor, and so are the heartbeats. Everything happens once, in
`fates` and in `told`; the tests look at what was seen of it.
"""

import contextlib
import http.server
import json
import os
import subprocess
import threading
import time
import uuid
from datetime import UTC, datetime

import pytest
import yaml
from prefect_servers import FINAL, PREFECT, PrefectServer, wait_until
from support import REPOSITORY

INFRA = REPOSITORY / "infra"
FACTOR = 60
"""By how much heartbeats are faster here, and the wait for them."""
SHORTEST_S = 10
"""Prefect waits at least as long for what does not happen."""
BEAT_S = 180 / FACTOR
"""Prefect's default heartbeat."""
LATE_S = 130 / FACTOR
ATTEMPTS = 3
"""On SQLite, Prefect's automations lose an event whose writing found the database locked four times."""
FATE_S = 120
"""Far longer than a fate takes whose events were not lost: about 15 s."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def automations():
    return yaml.safe_load((INFRA / "automations.yaml").read_text())["automations"]


def shortened(automation):
    trigger = automation["trigger"]
    beats = "prefect.flow-run.heartbeat" in trigger["after"]
    return automation | {"trigger": trigger | {"within": trigger["within"] / FACTOR if beats else SHORTEST_S}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("prefect")
    with PrefectServer(home / "server", PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY="PT1S") as server:
        yield server


@pytest.fixture(scope="module")
def deployments(server, tmp_path_factory):
    """The manifest's deployments, by name, with their triggers in force."""
    place = tmp_path_factory.mktemp("deploying")
    manifest = yaml.safe_load((INFRA / "prefect.yaml").read_text())
    for deployment in manifest["deployments"]:
        deployment["schedules"] = []
        for trigger in deployment.get("triggers", ()):
            trigger["enabled"] = True
    (place / "prefect.yaml").write_text(yaml.safe_dump(manifest))
    environment = os.environ | server.settings(place)
    for command in (
        ["work-pool", "create", "neg", "--type", "process"],
        ["--no-prompt", "deploy", "--all", "--prefect-file", place / "prefect.yaml"],
    ):
        subprocess.run([PREFECT, *command], check=True, capture_output=True, env=environment, cwd=REPOSITORY)
    return {one["name"]: one for one in server("POST", "deployments/filter", {})}


def begun(server, deployments, state, name="weekly"):
    run = server("POST", f"deployments/{deployments[name]['id']}/create_flow_run", {})
    moved(server, run, state)
    return run


def moved(server, run, state, name=None):
    """The orchestrated way: what the run's own process asks for."""
    state = {"type": state} | ({"name": name} if name else {})
    return server("POST", f"flow_runs/{run['id']}/set_state", {"state": state})


def beat(server, run):
    place = {"prefect.resource.id": f"prefect.flow-run.{run['id']}"}
    event = {"id": str(uuid.uuid4()), "event": "prefect.flow-run.heartbeat", "resource": place}
    server("POST", "events", [event | {"occurred": datetime.now(UTC).isoformat()}])


@pytest.fixture(scope="module")
def fates(server, deployments):
    """The states of runs after something went wrong with them."""
    for automation in automations():
        server("POST", "automations/", shortened(automation))
    return again_if_lost(lambda: ended(server, deployments))


def again_if_lost(attempt):
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(TimeoutError):
            return attempt()
    return attempt()


def ended(server, deployments):
    runs = {name: begun(server, deployments, "RUNNING") for name in ("late", "dead", "mute", "finished", "revived")}
    runs["pending"] = begun(server, deployments, "PENDING")
    runs["cancelling"] = begun(server, deployments, "RUNNING")
    moved(server, runs["cancelling"], "CANCELLING")
    for name in ("late", "dead", "finished", "revived"):
        beat(server, runs[name])
    moved(server, runs["finished"], "CANCELLED", "Skipped")
    for _ in range(3):
        time.sleep(BEAT_S + LATE_S)
        beat(server, runs["late"])
    runs["late"] = server("GET", f"flow_runs/{runs['late']['id']}")  # its heart stops here
    for name in ("dead", "mute", "revived", "pending", "cancelling"):
        server.reached(runs[name], *FINAL, patience_s=FATE_S)
    return runs


def state(server, run):
    return server("GET", f"flow_runs/{run['id']}")["state"]


def test_a_heartbeat_that_is_late_by_130_s_is_no_crash(server, fates):
    assert fates["late"]["state"]["type"] == "RUNNING"


def test_the_shipped_times_are_three_heartbeats_and_an_hour_for_a_start():
    heartbeats, start, _ = automations()
    assert heartbeats["trigger"]["within"] >= 3 * 180
    assert heartbeats["trigger"]["expect"] == ["prefect.flow-run.*"]
    assert start["trigger"]["within"] >= 3600


def test_a_run_without_heartbeats_has_crashed(server, fates):
    assert state(server, fates["dead"])["type"] == "CRASHED"
    assert "finished shards are kept" in state(server, fates["dead"])["message"].lower()


def test_a_run_that_was_lost_before_its_first_heartbeat_has_crashed(server, fates):
    assert state(server, fates["mute"])["type"] == "CRASHED"


def test_a_run_that_has_ended_keeps_its_state_whatever_its_name(server, fates):
    assert state(server, fates["finished"])["name"] == "Skipped"


def test_a_run_that_is_pending_for_ever_has_crashed(server, fates):
    found = state(server, fates["pending"])
    assert (found["type"], found["message"]) == ("CRASHED", automations()[1]["actions"][0]["message"])


def test_a_run_that_is_cancelling_for_ever_is_cancelled(server, fates):
    assert state(server, fates["cancelling"])["type"] == "CANCELLED"


def test_a_run_that_was_taken_for_dead_may_run_on_and_tell_its_end(server, fates):
    assert state(server, fates["revived"])["type"] == "CRASHED"
    assert moved(server, fates["revived"], "RUNNING")["status"] == "ACCEPT"
    assert moved(server, fates["revived"], "COMPLETED")["status"] == "ACCEPT"
    assert moved(server, fates["dead"], "COMPLETED")["status"] == "ACCEPT"


def campaigns(server, deployments):
    return server.runs(deployment=deployments["campaign"]["id"])


def test_a_campaign_follows_a_nightly_run_that_has_completed_and_none_that_was_skipped(server, deployments):
    def nightly(state, name=None):
        moved(server, begun(server, deployments, "RUNNING", "nightly"), state, name)

    def completed():
        nightly("COMPLETED")
        return wait_until(lambda: campaigns(server, deployments), "a campaign", FATE_S)

    nightly("CANCELLED", "Skipped")  # the completed run proves that this one had its chance
    assert campaigns(server, deployments) == []
    assert len(again_if_lost(completed)) == 1


@pytest.fixture(scope="module")
def told(server, deployments, tmp_path_factory):
    """What a webhook on this machine was told of a skipped, a cancelled and a failed run, and these runs."""
    heard = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        place = tmp_path_factory.mktemp("notifying")
        environment = os.environ | server.settings(place) | {"PATH": f"{PREFECT.parent}:{os.environ['PATH']}"}
        command = [INFRA / "notify.sh", f"http://127.0.0.1:{listener.server_port}/hook"]
        subprocess.run(command, check=True, capture_output=True, env=environment)

        def over(state, name=None):
            run = begun(server, deployments, "RUNNING", "shards")
            moved(server, run, state, name)
            return run

        def failed():
            run = over("FAILED")
            wait_until(lambda: about(heard, [run]), "a call", FATE_S)
            return run

        runs = [over("CANCELLED", "Skipped"), over("CANCELLED"), again_if_lost(failed)]
        time.sleep(2)
        listener.shutdown()
    return about(heard, runs), runs


def about(heard, runs):
    """What was heard of some runs, once or more often: others of this server crash meanwhile."""
    return {call["text"] for call in heard if any(run["id"] in call["text"] for run in runs)}


def test_a_webhook_hears_of_a_failed_run_and_not_of_skipped_or_cancelled_ones(told):
    heard, (*_, failed) = told
    assert heard == {f"{failed['name']} ({failed['id']}): Failed"}
