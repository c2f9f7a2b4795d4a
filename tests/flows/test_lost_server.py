"""A Prefect server that is lost takes along what it would have shown, and nothing else."""

import logging
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from negcore.errors import RunError
from tasks.server import prefect_api
from tasks.steps import PrefectSteps, _Page

URL = "http://127.0.0.1:9/api"


def lose(*_, **__):
    raise httpx.ConnectError("Connection refused", request=httpx.Request("POST", f"{URL}/artifacts/"))


def test_tables_and_notes_that_cannot_be_shown_do_not_end_the_run(monkeypatch, caplog):
    monkeypatch.setattr("prefect.artifacts.create_table_artifact", lose)
    monkeypatch.setattr("prefect.artifacts.create_markdown_artifact", lose)
    with caplog.at_level(logging.WARNING, "tasks.steps"):
        PrefectSteps(Path("/runs/one")).table("scores", [{"accuracy": 0.5}], "Scores")
        PrefectSteps(Path("/runs/one")).note("summary", "text", "title")
    assert [record.message for record in caplog.records] == [
        "Prefect does not answer (Connection refused): the run goes on, unseen"
    ] * 2


def test_a_silent_server_is_not_asked_to_refresh_anything_for_a_while(monkeypatch):
    page, asked = _Page(), []
    assert page.refresh(lambda: asked.append("before") or "shown") == "shown"
    assert page.refresh(lose) is None
    assert page.refresh(lambda: asked.append("too soon")) is None
    monkeypatch.setattr("tasks.steps._SILENCE_S", 0.0)
    page.keep(lose)
    page.refresh(lambda: asked.append("after"))
    assert asked == ["before", "after"]


def test_a_silent_server_is_not_waited_for_again():
    page = _Page()
    patience = [PREFECT_CLIENT_MAX_RETRIES.value()]
    page.refresh(lose)
    page.keep(lambda: patience.append(PREFECT_CLIENT_MAX_RETRIES.value()))
    assert patience[0] > patience[1] == 0


def test_a_mistake_of_ours_is_no_lost_server():
    with pytest.raises(KeyError):
        _Page().keep(lambda: {}["missing"])


def test_a_flow_that_cannot_end_without_its_server_says_so_in_one_line(tmp_path):
    api = temporary_settings({PREFECT_API_URL: URL})
    with api, pytest.raises(RunError, match="does not answer any more .* run the same command again"):  # noqa: SIM117
        with prefect_api(tmp_path):
            lose()


def test_what_else_cannot_be_reached_is_not_blamed_on_the_server(tmp_path):
    error = httpx.ConnectError("refused", request=httpx.Request("GET", "http://127.0.0.1:9999/model"))
    with temporary_settings({PREFECT_API_URL: URL}), pytest.raises(httpx.ConnectError), prefect_api(tmp_path):
        raise error
