"""Looking at single neurons of a run: lists, one neuron's page, and what is refused or missing."""

import csv
import io
import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from support import save_tiny_model
from typer.testing import CliRunner

from flows.cli.app import app
from flows.pipeline import run_extract, run_mceval8k, run_pipeline
from negcore.analysis.neurons import top_neurons
from negcore.errors import NegError
from negcore.measure.loading import load_model
from negcore.measure.sweeps import sweep
from negcore.store.identity import text_hash
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import EvaluationRun, SkillRun
from tasks.config.reading import read_run_file
from tasks.neurons import NeuronRow, best_neurons
from tasks.rundir.tables import read_table
from tasks.steps import PlainSteps

ORDERS = "\x1b[31m[bold]\u202eegassem\u202c"
"""A text that gives a terminal orders, in its own language and in rich's."""


def write_questions(file, labels, text=""):
    rng = random.Random(len(labels))
    words = "the best of times it was capital France Germany Paris Berlin one two three".split()  # noqa: SIM905
    rows = []
    for index in range(60):
        prompt = f"Question {index}: {text}" + " ".join(rng.choices(words, k=rng.randint(2, 9))) + " Answer:"
        row = {"prompt": prompt, "labels": labels, "answer": index % len(labels)}
        rows.append(row | {"split": ("train", "valid", "test")[index // 20]})
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run on two datasets: its run file."""
    place = tmp_path_factory.mktemp("look")
    model = str(save_tiny_model("llama", place / "tiny-llama"))
    datasets = [write_questions(place / "three.jsonl", [" A", " B", " C"], ORDERS)]
    datasets.append(write_questions(place / "two.jsonl", [" A", " B"]))
    values = {"model": [model], "dataset": datasets, "backend": "local", "max_neurons": 64, "out": place / "run"}
    run = read_run_file(SkillRun, None, values)
    assert run_pipeline(run, PlainSteps()).problems == []
    return run


@pytest.fixture
def copy(made, tmp_path):
    """The same run elsewhere, to be changed."""
    shutil.copytree(made.directory, tmp_path / "run")
    return tmp_path / "run"


def neg(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


def refused(*arguments):
    shown = neg(*arguments)
    assert isinstance(shown.exception, NegError), shown.output
    assert "\n" not in str(shown.exception)
    return str(shown.exception)


# Lists


def test_the_best_neurons_of_every_dataset_are_listed_by_layer_and_number(made):
    shown = neg("neurons", made.directory)
    assert shown.exit_code == 0, shown.output
    rows = [row for row in read_table(made.directory / "neurons.arrow", NeuronRow) if row.probe == "magn"]
    assert len(rows) == 2 * 20
    lines = [line.split() for line in shown.output.splitlines()]
    listed = [line for line in lines if line and line[0].isdecimal() and "." in line[1]]
    expected = [[f"{r.place}", f"{r.layer}.{r.neuron}", f"{r.score:+d}", f"{r.random_score:.1f}"] for r in rows]
    assert [line[:4] for line in listed] == expected
    assert shown.output.count("in at least half of 200 bootstrap samples") == 2


def test_a_list_as_csv_holds_every_field(made):
    shown = neg("neurons", made.directory, "--csv", "--probe", "polar")
    (head, *lines) = csv.reader(io.StringIO(shown.output))
    rows = [row for row in read_table(made.directory / "neurons.arrow", NeuronRow) if row.probe == "polar"]
    assert len(lines) == len(rows) == 40
    for line, row in zip(lines, rows, strict=True):
        told = dict(zip(head, line, strict=True))
        assert (told["model"], told["dataset"]) == (row.model, row.dataset)
        assert (int(told["layer"]), int(told["neuron"])) == (row.layer, row.neuron)
        assert float(told["agreement"]) == row.agreement
        assert (json.loads(told["mean_negs"]), json.loads(told["labels"])) == (row.mean_negs, row.labels)


@pytest.mark.parametrize("arguments", [{"top": 5}, {"probe": "magn-gxa"}])
def test_lists_that_the_run_did_not_keep_are_ranked_anew(made, arguments):
    found = best_neurons(made.directory, **{"probe": "magn"} | arguments, datasets=["local/two"]).rows
    rule, _, signal = arguments.get("probe", "magn").partition("-")
    train = open_negs(made.directory).select(dataset="local/two", split="train")
    expected = top_neurons(train, rule, signal or "neg", top=arguments.get("top", 20), seed=made.seed)
    assert [{**asdict(row)} | asdict(one) for row, one in zip(found, expected, strict=True)] == list(map(asdict, found))


def test_a_run_without_its_table_lists_the_same(made, copy):
    told = best_neurons(made.directory, "magn").rows
    (copy / "neurons.arrow").unlink()
    (copy / "manifest.json").unlink()
    anew = best_neurons(copy, "magn").rows
    assert [asdict(row) | {"labels": None} for row in told] == list(map(asdict, anew))


def test_a_table_that_is_not_of_the_run_is_refused(copy):
    content = (copy / "neurons.arrow").read_bytes()
    (copy / "neurons.arrow").write_bytes(content + b" ")
    assert "cannot be trusted" in refused("neurons", copy)


def test_each_way_of_asking_is_listed_apart(made, tmp_path):
    values = {"model": made.model, "dataset": made.dataset[1:], "backend": "local", "probe": ["magn"], "out": tmp_path}
    run = read_run_file(EvaluationRun, None, values | {"shots": [0], "max_neurons": 16})
    assert run_mceval8k(run, PlainSteps()).problems == []
    rows = best_neurons(run.directory, "magn").rows
    assert {(row.dataset, row.shots) for row in rows} == {("local/two", 0)}
    anew = best_neurons(run.directory, "magn", top=3).rows
    assert {row.dataset for row in anew} == {"local/two (shots-0)"}
    assert anew[0].labels == rows[0].labels and rows[0].labels
    shown = neg("neuron", run.directory, "1.2", "--rows", 1)
    assert (shown.exit_code, "local/two (shots-0), test" in shown.output) == (0, True)


@pytest.mark.parametrize("storage", ["codes", "bfloat16", "stats"])
def test_every_storage_level_lists_neurons_and_says_what_it_cannot_tell(made, tmp_path, storage):
    run = made.model_copy(update={"storage": storage, "out": tmp_path / "run", "dataset": made.dataset[1:]})
    assert run_pipeline(run, PlainSteps()).problems == []
    shown = neg("neurons", run.directory)
    assert shown.exit_code == 0, shown.output
    assert ("NEGs: this storage level keeps none" in " ".join(shown.output.split())) == (storage != "bfloat16")
    assert ("keeps no rows to sample" in " ".join(shown.output.split())) == (storage == "stats")
    (table,) = {row.probe: row for row in best_neurons(run.directory, "magn").rows}.values()
    page = neg("neuron", run.directory, f"{table.layer}.{table.neuron}", "--rows", 1)
    assert page.exit_code == 0, page.output
    assert ("keeps no values of NEGs" in page.output) == (storage == "codes")


# One neuron


def test_one_neuron_is_told_over_all_datasets_of_the_run(made):
    best = next(row for row in read_table(made.directory / "neurons.arrow", NeuronRow) if row.probe == "magn")
    shown = neg("neuron", made.directory, f"{best.layer}.{best.neuron}", "--rows", 2)
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert "site up, 3 layers x 24 neurons" in text
    assert "three Magn (place 1" in text
    for dataset in ("local/three", "local/two"):
        test = open_negs(made.directory).select(dataset=dataset, split="test")
        negs_PO = test.neurons([(best.layer, best.neuron)])[:, :, 0]
        assert f"{dataset}, test" in text
        for gold in (None, *range(test.n_options)):
            rows = np.ones(len(negs_PO), bool) if gold is None else test.gold_P == gold
            for mean in negs_PO[rows].astype(np.float64).mean(axis=0):
                assert f"{mean:+.1e}" in text
        moved = np.argsort(-np.abs(negs_PO).max(axis=1), kind="stable")[:2]
        assert all(test.ids[row] in text for row in moved)
        assert f"{np.abs(negs_PO).max():.1e}" in text
    assert "Tokens that the output row of" in text and "promotes" in text


def test_texts_of_prompts_are_shown_and_give_the_terminal_no_orders(made):
    shown = neg("neuron", made.directory, "0.3", "--dataset", "local/three", "--rows", 1)
    assert "Answer:" in shown.output and "[bold]" in shown.output.replace("\n", "").replace(" ", "")
    assert not set(shown.output) & {"\x1b", "\u202e", "\u202c"}


def test_a_curve_is_measured_on_the_prompts_that_are_shown(made):
    shown = neg("neuron", made.directory, "1.7", "--dataset", "local/two", "--rows", 2, "--sweep")
    assert shown.exit_code == 0, shown.output
    test = open_negs(made.directory).select(dataset="local/two", split="test")
    negs_PO = test.neurons([(1, 7)])[:, :, 0]
    row = int(np.argsort(-np.abs(negs_PO).max(axis=1), kind="stable")[0])
    prompts = [json.loads(line)["prompt"] for line in Path(made.dataset[1]).read_text().splitlines()]
    (prompt,) = [one for one in prompts if text_hash(one) == test.text_hashes[row]]
    label = [" A", " B"][int(np.abs(negs_PO[row]).argmax())]
    measured = sweep(load_model(made.model[0]), [prompt], label, neurons=[(1, 7)])
    assert f"{measured.negs_PK[0, 0]:+.1e}" in shown.output
    assert "slope over 20 shifts" in shown.output


def test_what_is_no_longer_there_is_named_and_the_rest_is_shown(made, copy, tmp_path):
    text = (copy / "run.yaml").read_text()
    (copy / "run.yaml").write_text(text.replace(str(made.dataset[1]), str(tmp_path / "gone.jsonl")))
    shown = neg("neuron", copy, "1.7", "--dataset", "local/two", "--rows", 1)
    assert (shown.exit_code, "gone" in shown.stderr or "names no dataset" in shown.stderr) == (1, True), shown.output
    assert "local/two, test" in shown.output and "promotes" in shown.output
    (copy / "run.yaml").write_text(text.replace(made.model[0], str(tmp_path / "nowhere")))
    shown = neg("neuron", copy, "1.7", "--dataset", "local/two", "--rows", 1)
    assert (shown.exit_code, "names no model" in shown.stderr) == (1, True), shown.output
    assert "local/two, test" in shown.output and "promotes" not in shown.output


def test_texts_that_were_not_measured_are_not_shown(made, copy, tmp_path):
    changed = tmp_path / "two.jsonl"
    changed.write_text(Path(made.dataset[1]).read_text().replace("Question", "Quiz"))
    (copy / "run.yaml").write_text((copy / "run.yaml").read_text().replace(str(made.dataset[1]), str(changed)))
    shown = neg("neuron", copy, "1.7", "--dataset", "local/two", "--rows", 1)
    assert "its text is not in the data" in " ".join(shown.output.split()) and "Quiz" not in shown.output


def test_a_model_that_changed_since_writes_no_tokens(made, copy, tmp_path):
    here, kept = Path(made.model[0]), tmp_path / "kept"
    here.rename(kept)
    try:
        save_tiny_model("llama", here, n_positions=64)
        shown = neg("neuron", copy, "1.7", "--dataset", "local/two", "--rows", 1)
    finally:
        shutil.rmtree(here)
        kept.rename(here)
    assert (shown.exit_code, "is revision" in shown.stderr) == (1, True), shown.output
    assert "promotes" not in shown.output


# Refused in one line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["neuron", "RUN", "1.24"], "1.24 is no neuron of"),
        (["neuron", "RUN", "3.0"], "layers 0..2 with neurons 0..23"),
        (["neuron", "RUN", "31042"], "give layer and number in it, both from 0, as in 10.901"),
        (["neuron", "RUN", "1.2.3"], "is no neuron"),
        (["neuron", "RUN", "\u0661.2"], "is no neuron"),
        (["neuron", "RUN", "-1.2", "--split", "test"], None),
        (["neuron", "RUN", "1.2", "--dataset", "two"], "it has local/three, local/two"),
        (["neuron", "RUN", "1.2", "--model", "gpt2"], "model 'gpt2' is not in this run"),
        (["neuron", "RUN", "1.2", "--rows", "0", "--sweep"], "give at least 1"),
        (["neuron", "NOWHERE", "1.2"], "does not exist"),
        (["neurons", "NOWHERE"], "does not exist"),
        (["neurons", "RUN", "--probe", "tree"], "give one of polar, magn,"),
        (["neurons", "RUN", "--dataset", "two"], "it has local/three, local/two"),
        (["neurons", "EMPTY"], "holds no NEGs"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_with_what_is_allowed(made, tmp_path, arguments, words):
    places = {"RUN": made.directory, "NOWHERE": tmp_path / "nowhere", "EMPTY": tmp_path}
    arguments = [places.get(argument, argument) for argument in arguments]
    if words is None:
        assert neg(*arguments).exit_code != 0
    else:
        assert words in refused(*arguments)


def test_a_run_of_several_models_asks_which(made, tmp_path):
    other = str(save_tiny_model("gpt2", tmp_path / "other"))
    run = made.model_copy(update={"model": (*made.model, other), "out": tmp_path / "run", "dataset": made.dataset[1:]})
    assert run_extract(run, PlainSteps()).problems == []
    assert "name one with --model" in refused("neuron", run.directory, "1.2")
    shown = neg("neuron", run.directory, "1.2", "--model", other, "--rows", 1)
    assert (shown.exit_code, "site act" in shown.output) == (0, True), shown.output
    assert len(best_neurons(run.directory, "magn", top=2).rows) == 4
