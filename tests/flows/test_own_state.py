"""What a flow run does about its own state at the server: cancelled, taken for dead, or not told of its end."""

import logging
import threading
import time
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling, Crashed, Running

from flows.cancellation import _Watch
from flows.lost_server import told_when_back


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
