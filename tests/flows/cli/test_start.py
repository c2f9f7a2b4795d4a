"""The start of a run: what is told of it, and when a faster one is named."""

import io
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from rich.console import Console

from flows.cli import terminal
from flows.show.display import Display
from tasks.config.dataset_runs import SkillRun


@pytest.fixture
def text():
    return io.StringIO()


@pytest.fixture
def display(text):
    return Display(Console(file=text, width=100), "pipeline", 4)


def small(**values):
    return SkillRun(model=("m",), dataset=("mini/fact",), **values)


def test_without_a_terminal_a_line_says_what_is_started_and_which_workers_were_chosen(display, text):
    display.starting("Prefect and Ray")
    display.tell("2 workers of 1 core each: [bold]")
    assert text.getvalue() == "starting Prefect and Ray ...\n2 workers of 1 core each: [bold]\n"


def hint(n_steps=32, starts_server=True, **values):
    return terminal.faster_start(small(**values), n_steps, starts_server=starts_server)


def test_the_options_that_start_a_small_run_sooner_are_named_before_it_starts(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "starts sooner with --backend local --orchestrator none: " in hint()
    assert "starts sooner with --backend local: " in hint(starts_server=False)
    assert hint(n_steps=33) == hint(backend="local") == hint(ray_address="head:6379") == ""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert hint() == ""


@pytest.mark.parametrize(
    ("private", "order"),
    [(True, ["Prefect and Ray", "session", "ready", "flow"]), (False, ["ready", "Ray", "flow"])],
)
def test_ray_starts_beside_a_private_server_and_after_a_configured_one_answered(monkeypatch, private, order):
    done = []

    @contextmanager
    def session(run):
        done.append("session")
        yield

    @contextmanager
    def api(home):
        yield SimpleNamespace(private=private, url="http://127.0.0.1:1/api", wait_ready=lambda: done.append("ready"))

    monkeypatch.setattr("flows.flow_run.run_session", session)
    monkeypatch.setattr("tasks.server.prefect_api", api)
    display = SimpleNamespace(starting=done.append)
    assert terminal._under_prefect(small(), display, lambda run: done.append("flow") or 7) == 7
    assert done == order
