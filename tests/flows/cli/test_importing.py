"""`neg import` as a user meets it: a table becomes a dataset, with its audit, from disk and from the hub."""

import csv
import json
import shlex
from pathlib import Path

import pytest
from hub import serving
from support import neg, save_tiny_model
from typer.testing import CliRunner

from flows.cli.app import app


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Path("quiz.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "A", "B", "answer", "source"])
        writer.writerows([f"Is {n} one?", "it is", "it is not", "AB"[n % 2], "me"] for n in range(60))
    return tmp_path / "quiz.csv"


def run(line):
    return CliRunner().invoke(app, shlex.split(line), env={"COLUMNS": "100", "HF_HUB_OFFLINE": "1"})


def test_a_table_becomes_a_dataset_that_is_shown_with_its_audit(table, model):
    shown = run(rf"import quiz.csv --prompt 'Q: {{question}}\n{{options}}\nAnswer:' --model {model}")
    assert shown.exit_code == 0, shown.output
    first = json.loads((table.parent / "quiz.jsonl").read_text().splitlines()[0])
    assert first == {"prompt": "Q: Is 0 one?\nA. it is\nB. it is not\nAnswer:", "labels": ["A", "B"], "answer": "A"}
    for line in (
        "60 of 60 rows are in quiz.jsonl",
        "options: columns 'A', 'B', by their names",
        "answers: letters",
        "not used: the columns 'source'",
        "Right answers of local/quiz",
        "Rows that splits share",
        f"next: neg pipeline --model {model} --dataset quiz.jsonl",
    ):
        assert line in shown.output
    balance = next(line for line in shown.output.splitlines() if line.startswith("' A'"))
    assert balance.split()[-3:] == ["18", "6", "6"]


def test_a_file_that_is_there_is_not_replaced(table):
    (table.parent / "quiz.jsonl").write_text("mine")
    refused = neg("import", table)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "'quiz.jsonl' is there already, and is not replaced" in refused.stderr
    assert (table.parent / "quiz.jsonl").read_text() == "mine"


def test_options_that_are_no_tokens_are_told_with_the_way_round(table, model):
    shown = run(f"import quiz.csv --model {model} --out other.jsonl")
    assert shown.exit_code == 1
    assert (table.parent / "other.jsonl").exists()
    assert "or remove other.jsonl and ask for a letter: --prompt '{COLUMN}\\n{options}\\nAnswer:'" in shown.stderr


def test_a_file_of_the_hub_is_imported(table, model):
    folder = table.parent / "hub/datasets/org/quiz/data"
    folder.mkdir(parents=True)
    table.rename(folder / "quiz.csv")
    source, home = "hf://datasets/org/quiz/data/quiz.csv", str(table.parent / "home")
    with serving(table.parent / "hub") as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
        shown = neg("import", source, "--prompt", "{question} {options}", "--model", model, **online)
        whole = neg("import", "hf://datasets/org/quiz", **online)
        absent = neg("import", "hf://datasets/org/quiz/none.csv", **online)
    assert shown.returncode == 0, shown.stderr
    assert len((table.parent / "quiz.jsonl").read_text().splitlines()) == 60
    assert (absent.returncode, absent.stderr.count("\n")) == (2, 1)
    for refused in (absent, whole):
        assert "no such file; allowed: hf://datasets/ORGANISATION/DATASET/FILE" in refused.stderr
        assert "; this dataset has 'data/quiz.csv'" in refused.stderr
