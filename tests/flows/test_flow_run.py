"""What Prefect keeps of a run that is not whole: every problem in a line of its own, and no prompt."""

import io
import json
import logging
import sqlite3
from pathlib import Path
from typing import NamedTuple

import pytest
from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from support import neg, save_tiny_model

from flows.flow_run import outlive_readers

SECRET = "zebrafinch"  # no word of the names that Prefect gives runs
"""A word of every prompt."""


class Kept(NamedTuple):
    """What is left of a run under a private Prefect server."""

    exit_code: int
    stderr: str
    logs: list[tuple[int, str]]
    """Level and message."""
    states: list[tuple[str, str]]
    """Type and message of the flow run's states, in order."""
    database: bytes


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    whole = save_tiny_model("llama", folder / "whole")
    torn = save_tiny_model("gpt2", folder / "torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    rows = [{"prompt": f"Which {SECRET} is it? {n}", "labels": [" A", " B"], "answer": n % 2} for n in range(12)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = ("--model", whole, "--model", torn.parent)
    run = folder / "run"
    ran = neg("extract", *models, "--dataset", folder / "questions.jsonl", "--backend", "local", "--out", run)
    return Kept(ran.returncode, ran.stderr, *_records(run / "prefect"))


def _records(home: Path) -> tuple[list[tuple[int, str]], list[tuple[str, str]], bytes]:
    (database,) = home.rglob("prefect.db")
    with sqlite3.connect(database) as records:
        logs = records.execute("select level, message from log order by timestamp").fetchall()
        states = records.execute("select type, message from flow_run_state order by timestamp").fetchall()
    return logs, states, b"".join(file.read_bytes() for file in home.rglob("prefect.db*"))


def test_the_problem_is_named_in_the_log_in_one_line(kept):
    errors = [message for level, message in kept.logs if level >= 40]
    (missing,) = [message for message in errors if message.startswith("missing: ")]
    assert "torn: model " in missing and "is not safetensors" in missing
    assert "\n" not in missing
    assert missing.removeprefix("missing: ") in kept.stderr


def test_the_log_has_no_traceback_for_a_run_that_only_is_not_whole(kept):
    assert len(kept.logs) > 5
    assert not any("Traceback" in message or 'File "' in message for _, message in kept.logs)


def test_the_flow_run_has_failed_and_says_why(kept):
    assert kept.exit_code == 1
    (state, message) = kept.states[-1]
    assert state == "FAILED"
    assert "the run is not whole: 1 problem, the first is " in message


def test_no_prompt_is_in_the_servers_database(kept):
    assert b"is not safetensors" in kept.database
    assert SECRET.encode() not in kept.database


class Unread(io.StringIO):
    """A pipe whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_run_goes_on_once_nobody_reads_its_log(monkeypatch):
    monkeypatch.setattr(Console, "on_broken_pipe", Console.on_broken_pipe)
    outlive_readers()
    handler = PrefectConsoleHandler(Unread())
    for _ in range(2):
        handler.emit(logging.LogRecord("flow", logging.INFO, "", 0, "unread", (), None))
    assert handler.console.quiet
