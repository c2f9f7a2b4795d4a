"""`neg steer` as its user sees it."""

import json
import re

import pytest
from support import neg, save_tiny_model, write_questions

from flows.cli.app import app

RUN = ("--backend", "local", "--orchestrator", "none")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on questions, and on others whose prompts and labels are made to harm a terminal."""
    folder = tmp_path_factory.mktemp("steer")
    model = save_tiny_model("llama", folder / "tiny-llama", n_positions=512)
    hostile = folder / "hostile.jsonl"
    row = {"prompt": "Question: \x1b[31m[red]which[/red]\u202e Answer:", "labels": [" A", " B"]}
    rows = [json.dumps(row | {"prompt": f"{i} {row['prompt']}", "answer": i % 2}) for i in range(24)]
    hostile.write_text("\n".join(rows))
    options = ("--dataset", write_questions(folder), "--dataset", hostile, "--out", folder / "run")
    assert neg("pipeline", "--model", model, *options, *RUN).returncode == 0
    return folder / "run"


def test_answers_and_side_effects_are_shown_before_and_after(run):
    steered = ("--dataset", "local/questions", "--probe", "magn", "--k", 12, "--size", 3, "--max-tokens", 4)
    result = neg("steer", run, *steered, "--rows", 2, "--effect-rows", 7)
    assert result.returncode == 0, result.stderr
    for words in ("12 neurons shifted, the best of magn on local/questions, by 3", "before", "after", "gold: "):
        assert words in " ".join(result.stdout.split())
    table = result.stdout.partition("Accuracy before and after")[2]
    assert re.search(r"local/questions +7 ", table) and re.search(r"local/hostile +\d ", table)
    assert "finished accuracy local/hostile" in result.stdout


def test_a_hostile_prompt_gives_the_terminal_no_order(run):
    result = neg("steer", run, "--dataset", "local/hostile", "--neurons", "0.1=5", "--effect-rows", 0)
    assert result.returncode == 0, result.stderr
    assert "\\x1b[31m[red]which" in result.stdout
    assert not {"\x1b", "\u202e"} & set(result.stdout)
    assert "Accuracy before" not in result.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--neurons", "9.1"), "several datasets: name one with --dataset: local/questions, local/hostile"),
        (("--neurons", "9.1", "--prompt", "Who?"), "neuron 1 of layer 9 does not exist"),
        (("--neurons", "0.1", "--prompt", "Who?", "--max-tokens", "600"), "longer than the context"),
        (("--prompt", "Who?"), "give either a probe"),
        (("--probe", "magnet"), "'magnet' is not one of"),
    ],
)
def test_a_mistake_is_refused_in_a_line(run, options, says):
    with pytest.raises(Exception, match=says) as refused:
        app(["steer", str(run), *options], standalone_mode=False)
    assert "\n" not in str(refused.value)


def test_a_directory_without_a_run_is_named(tmp_path):
    result = neg("steer", tmp_path, "--neurons", "0.1")
    assert result.returncode == 2 and "run.yaml" in result.stderr
