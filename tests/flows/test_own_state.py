"""What a flow run does about states at the server: its own, and those of runs of its deployment that never started."""

import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Cancelling, Crashed, Pending, Running

from flows.cancellation import _Watch
from flows.lost_server import told_when_back
from flows.stuck_runs import end_stuck_runs


class Client:
    """A server that knows one flow run."""

    def __init__(self, state):
        self.state = state

    def read_flow_run(self, flow_run):
        return FlowRun(id=flow_run, flow_id=uuid4(), state=self.state)

    def set_flow_run_state(self, flow_run, state):
        self.state = state


def watched(state, *, is_deployed):
    run = FlowRun(flow_id=uuid4(), deployment_id=uuid4() if is_deployed else None)
    return _Watch(run, threading.Event()), Client(state)


def test_a_run_that_is_taken_for_dead_sets_itself_to_running_again():
    watch, client = watched(Crashed(message="No heartbeat"), is_deployed=True)
    watch._act(client)
    assert client.state.is_running()
    assert not watch.cancelled.is_set()


def test_a_run_that_has_been_left_changes_nothing():
    watch, client = watched(Crashed(), is_deployed=True)
    watch.left.set()
    watch._act(client)
    assert client.state.is_crashed()


def test_a_run_started_by_hand_stops_when_it_is_cancelled_and_a_deployed_one_leaves_its_worker_some_time(monkeypatch):
    for is_deployed in (False, True):
        watch, client = watched(Cancelling(), is_deployed=is_deployed)
        watch._act(client)
        assert watch.cancelled.is_set() is not is_deployed
    monkeypatch.setattr(watch, "_patience_s", 0.05)
    time.sleep(0.06)
    watch._act(client)
    assert watch.cancelled.is_set() and watch._stop.is_set()


def test_a_run_that_runs_is_left_alone():
    watch, client = watched(Running(), is_deployed=True)
    watch._act(client)
    assert client.state.is_running() and not watch.cancelled.is_set()


@pytest.fixture
def away(monkeypatch):
    """A server that answers only to the third question."""
    answers = [ConnectionError("Connection refused"), ConnectionError("Connection refused"), None]
    monkeypatch.setattr("flows.lost_server._POLL_S", 0.0)
    monkeypatch.setattr("flows.lost_server._silence", lambda: answers.pop(0))
    return answers


def test_a_run_that_has_ended_waits_for_its_server_and_says_so(away, caplog):
    with caplog.at_level(logging.WARNING, "flows.lost_server"), told_when_back():
        pass
    assert away == []
    waiting, back = [record.message for record in caplog.records]
    assert (
        "the run has ended, but the Prefect server does not answer (Connection refused): waiting up to 24 h" in waiting
    )
    assert "answers again after" in back


def test_a_run_that_has_failed_waits_too(away):
    with pytest.raises(ZeroDivisionError), told_when_back():
        _ = 1 / 0
    assert away == []


def test_a_run_that_is_interrupted_does_not_wait(away):
    with pytest.raises(KeyboardInterrupt), told_when_back():
        raise KeyboardInterrupt
    assert len(away) == 3


def test_nobody_waits_for_ever(monkeypatch, caplog):
    monkeypatch.setattr("flows.lost_server._LIMIT_S", -1.0)
    monkeypatch.setattr("flows.lost_server._silence", lambda: ConnectionError("refused"))
    with caplog.at_level(logging.ERROR, "flows.lost_server"), told_when_back():
        pass
    assert "it does not know how the run ended" in caplog.text


class Deployment:
    """A server that knows the pending runs of a deployment; used as its own client."""

    def __init__(self, *runs):
        self.runs, self.ended = runs, []

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def read_flow_runs(self, flow_run_filter):
        assert flow_run_filter.state.type.any_ == [StateType.PENDING]
        return self.runs

    def set_flow_run_state(self, flow_run, state):
        self.ended.append((flow_run, state.type))


def test_runs_that_have_been_pending_for_over_an_hour_are_ended_by_the_next_run(monkeypatch):
    deployment, now = uuid4(), datetime.now(UTC)

    def pending(minutes):
        state = Pending()
        state.timestamp = now - timedelta(minutes=minutes)
        return FlowRun(flow_id=uuid4(), deployment_id=deployment, state=state)

    stuck, starting, own = pending(61), pending(59), pending(70)
    server = Deployment(stuck, starting, own)
    monkeypatch.setattr("flows.stuck_runs.get_client", lambda **_: server)
    end_stuck_runs(own)
    assert server.ended == [(stuck.id, StateType.CRASHED)]


def test_a_server_that_is_away_keeps_no_run_from_starting(monkeypatch):
    def refuse(**_):
        raise httpx.ConnectError("refused")

    monkeypatch.setattr("flows.stuck_runs.get_client", refuse)
    end_stuck_runs(FlowRun(flow_id=uuid4(), deployment_id=uuid4()))
