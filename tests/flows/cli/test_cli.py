"""The command line as a user meets it: a process, its output and its exit code."""

import json
import re
import sqlite3
from importlib.metadata import version

import pytest
from support import neg, save_tiny_model
from typer.testing import CliRunner

from flows.cli.app import app
from negcore.model import encoding
from tasks import plan as plan_module
from tasks.rundir import claim as claim_module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    rows = [
        {"prompt": f"Question: {'the best ' * (i % 5)}{i} Answer:", "labels": [" A", " B"], "answer": i % 2}
        for i in range(40)
    ]
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize(
    "command",
    ["demo", "extract", "probe", "pipeline", "mceval8k", "linearity", "skills", "campaign", "compare", "plan", "status"]
    + [
        "publish",
        "verify",
        "serve",
        "benchmark",
        "models",
        "datasets",
        "import",
        "doctor",
        "sql",
        "export",
        "neurons",
        "neuron",
    ],
)
def test_help_of_every_command_shows_an_example(command):
    shown = neg(command, "--help")
    assert shown.returncode == 0
    assert f"neg {command}" in shown.stdout.split("Example", 1)[1]


def test_the_version_is_shown_without_a_command():
    shown = neg("--version")
    assert (shown.returncode, shown.stdout) == (0, f"neg-at-scale {version('neg-at-scale')}\n")


def test_a_model_is_shown_with_its_check(model):
    shown = neg("models", model, "--dtype", "float64")
    assert shown.returncode == 0, shown.stderr
    assert "3 layers x 24" in shown.stdout
    assert "Check at load, site act, float64" in shown.stdout
    assert [line.split()[-1] for line in shown.stdout.splitlines() if "against" in line] == ["passed"] * 5
    refused = neg("models", model, "--site", "up")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_every_problem_of_a_run_file_is_a_line_and_the_exit_code_is_2(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("kind: linearity\nmodel: m\nprompts: 0\npoint: 3\n")
    refused = neg("linearity", file)
    assert refused.returncode == 2
    first, second = refused.stderr.splitlines()
    assert first.startswith(f"error: {file}: prompts is 0: ")
    assert second == f"{file}: unknown field 'point' of a linearity run; did you mean 'points'?"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "smollm"], "model 'smollm'"),
        (["--dataset", "mini/facts"], "unknown dataset 'mini/facts'; did you mean 'mini/fact'"),
        (["--dataset", "absent.jsonl"], "absent.jsonl"),
        (["--limit", "0"], "limit is 0"),
        (["--site", "gate"], "site 'gate' does not exist in this model; choose one of act, paper"),
        (["--wording", "polite"], "the only wording allowed is 'default'"),
        (["--prompt-format", "chat"], "has no chat template; use prompt_format 'plain'"),
        (
            ["--system-prompt", "Be brief."],
            "--system-prompt is for chats: set --prompt-format to chat, or leave it out",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model, questions, tmp_path, options, says):
    base = ["--model", model, "--dataset", questions, "--out", tmp_path / "run"]
    if options[0] in base:
        base[base.index(options[0]) + 1] = options[1]
    else:
        base += options
    refused = neg("pipeline", *base)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert says in refused.stderr
    assert not (tmp_path / "run" / "negs").exists()


def test_a_malformed_line_is_named_by_file_and_line(model, tmp_path):
    file = tmp_path / "broken.jsonl"
    file.write_text('{"prompt": "Question: Answer:", "labels": [" A", " B"], "answer": 0}\n{"prompt": \n')
    refused = neg("extract", "--model", model, "--dataset", file)
    assert refused.returncode == 2
    assert "broken.jsonl:2" in refused.stderr


def test_a_pipeline_under_a_private_prefect_server_on_ray_ends_in_a_table_and_is_recorded(model, questions, tmp_path):
    options = ["--model", model, "--dataset", questions, "--out", tmp_path / "run", "--shard-rows", 6, "--workers", 2]
    ran = neg("pipeline", *options)
    assert ran.returncode == 0, ran.stderr
    assert "Accuracy on test" in ran.stdout
    assert f"written to {tmp_path / 'run'}" in ran.stdout
    (database,) = (tmp_path / "run").rglob("prefect.db")
    with sqlite3.connect(database) as records:
        states = dict(records.execute("select name, state_type from task_run"))
        kinds = {kind for (kind,) in records.execute("select distinct type from artifact")}
    assert set(states.values()) == {"COMPLETED"}
    assert len(states) == 4  # three splits and the probes
    assert kinds >= {"table", "image", "markdown"} and "progress" not in kinds
    again = neg("pipeline", tmp_path / "run" / "run.yaml", "--orchestrator", "none", "--backend", "local")
    assert again.returncode == 0, again.stderr
    assert re.search(r"; (\d+) shards, .*; \1 shards reused", again.stdout)
    assert "the report is report.html there" in again.stdout
    assert "questions" in (tmp_path / "run" / "report.html").read_text()
    assert table(again.stdout) == table(ran.stdout)


def table(output):
    """Return the lines about the dataset; its splits end in any order."""
    return sorted(line.strip() for line in output.splitlines() if "questions" in line)


def test_lost_rows_are_said_and_the_exit_code_is_1(model, questions, tmp_path):
    options = ["--model", model, "--dataset", questions, "--out", tmp_path / "run"]
    plain = ["--orchestrator", "none", "--backend", "local"]
    assert neg("extract", *options, *plain).returncode == 0
    other = neg("extract", *options, *plain, "--seed", "1")
    assert other.returncode == 1
    assert "missing:" in other.stderr
    assert "another run" in other.stderr


def test_a_run_is_planned_and_tokenised_once_and_holds_one_claim(model, questions, tmp_path, monkeypatch):
    planned, tokenised, claimed = [], [], []

    def spy(module, name, calls):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))

    spy(plan_module, "describe_model", planned)
    spy(encoding, "_checked_prompts", tokenised)
    spy(claim_module, "_acquire", claimed)
    options = ["--model", model, "--dataset", questions, "--backend", "local", "--out", tmp_path / "run"]
    done = CliRunner().invoke(app, ["pipeline", *map(str, options), "--orchestrator", "none"])
    assert done.exit_code == 0, done.output
    assert len(planned) == 1
    assert [len(prompts) for _, _, prompts, _ in tokenised] == [24, 8, 8]
    assert len(claimed) == 1


def test_an_audit_shows_and_writes_what_there_is_and_names_the_rest(model, questions, tmp_path):
    out = tmp_path / "audit.md"
    words = ["datasets", "--audit", questions, tmp_path / "absent.jsonl", "--model", model, "--rows", "4"]
    shown = CliRunner().invoke(app, [*map(str, words), "--out", str(out)], env={"COLUMNS": "100"})
    assert shown.exit_code == 1
    assert shown.stdout.count("local/question") == 3  # where a table is narrow, the name's end is folded
    assert "left out: " in shown.stderr and "absent.jsonl" in shown.stderr
    assert out.read_text().count("| local/questions |") == 3


def test_options_of_an_audit_are_refused_before_anything_is_read(model, tmp_path):
    for words, message in (
        (["datasets", "--out", "audit.md"], "--out is for --audit"),
        (["datasets", "--audit", "--model", str(model), "--out", "audit.csv"], "allowed: a file that ends in .md"),
    ):
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code and message in str(refused.exception)
