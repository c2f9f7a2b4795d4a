"""What a shell completes: aliases, names, and paths that lead to what is meant."""

import os
import subprocess
import sys

import pytest

from flows.cli import completion
from negcore.model.gguf_cache import EMBEDDED

MINI = [f"mini/{genre}" for genre in ("classification", "fact", "linguistic", "multilingual", "nli", "self-reflection")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/one", "models/tiny", ".hidden"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("runs/one/run.yaml", "mine.jsonl", "mine.csv", "mine.gguf", "mine.yaml", "mine.txt"):
        (tmp_path / file).touch()
    return tmp_path


def test_the_aliases_are_those_of_the_models_that_ship_as_packages():
    assert set(completion.ALIASES) == set(EMBEDDED)


@pytest.mark.parametrize(
    ("complete", "incomplete", "found"),
    [
        (completion.complete_model, "sm", ["smollm2-135m"]),
        (completion.complete_model, "m", ["mine.gguf", "models/"]),
        (completion.complete_model, "models/", ["models/tiny/"]),
        (completion.complete_dataset, "mi", [*MINI, "mine.jsonl"]),
        (completion.complete_dataset, "mini/f", ["mini/fact"]),
        (completion.complete_run, "", ["mine.yaml", "models/", "runs/"]),
        (completion.complete_run, "runs/", ["runs/one"]),
        (completion.complete_run, ".", [".hidden/"]),
        (completion.complete_run, "nowhere/", []),
        (completion.complete_table, "mine", ["mine.csv", "mine.jsonl"]),
    ],
)
def test_what_begins_so_is_completed(here, complete, incomplete, found):
    assert complete(incomplete) == found


def test_a_shell_is_told_the_same(here):
    asked = {"_NEG_COMPLETE": "complete_bash", "COMP_WORDS": "neg pipeline --model sm", "COMP_CWORD": "3"}
    command = "import sys; sys.argv = ['neg']; from flows.cli.app import app; app(prog_name='neg')"
    told = subprocess.run(
        [sys.executable, "-c", command], env=os.environ | asked, capture_output=True, text=True, cwd=here
    )
    assert told.stdout.split() == ["smollm2-135m"], told.stderr
