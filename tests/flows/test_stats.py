"""Runs that store vote sums, and in a second pass the values of the neurons that these choose."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from support import negs_place, save_tiny_model, write_negs
from typer.testing import CliRunner

from flows.cli.app import app
from flows.pipeline import run_extract, run_mceval8k, run_pipeline, run_probe
from negcore.errors import RunError
from negcore.store.identity import RunIdentity, choice_digest
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import EvaluationRun, SkillRun, SkillsRun
from tasks.config.reading import read_run_file
from tasks.config.recipes import RECIPES, choose_neurons, n_stored
from tasks.forecast.capacity import check_disk
from tasks.forecast.needs import forecast, missing_shards
from tasks.forecast.shard_size import shard_bytes
from tasks.measure.worker import ModelWorker
from tasks.plan import SUMS, plan
from tasks.rundir.layout import shard_folders
from tasks.rundir.status import run_status
from tasks.rundir.verify import unpublish, verify
from tasks.steps import PlainSteps

SERVED = tuple(name for name in RECIPES if name != "act")
N_ALL = 3 * 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama"))


def write_questions(file, n_options, n=60):
    rng = random.Random(n_options)
    words = "the best of times it was capital France Germany Paris Berlin one two three".split()  # noqa: SIM905
    lines = []
    for index in range(n):
        prompt = "Question: " + " ".join(rng.choices(words, k=rng.randint(2, 9))) + " Answer:"
        row = {"prompt": prompt, "labels": [" A", " B", " C", " D", " E", " yes"][:n_options]}
        row |= {"answer": index % n_options, "split": ("train", "valid", "test")[index * 3 // n]}
        lines.append(json.dumps(row))
    file.write_text("\n".join(lines))
    return str(file)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {n_options: write_questions(folder / f"{n_options}.jsonl", n_options) for n_options in (2, 3, 6)}


@pytest.fixture
def run(model, questions, tmp_path):
    """Probes that read fewer neurons than the model has, and no training values."""
    values = {"model": [model], "dataset": [questions[3]], "backend": "local", "shard_rows": 8, "storage": "stats"}
    return read_run_file(SkillRun, None, values | {"max_neurons": 16, "tree_neurons": 10, "out": tmp_path / "run"})


def contents(directory):
    """Every published file and its bytes."""
    files = (path for path in (directory / "negs").rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(directory): path.read_bytes() for path in files}


def faults(directory):
    return [fault for one in verify(shard_folders(directory), lambda size: None) for fault in one.faults]


def neg(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


def splits_in(directory):
    return sorted(place.part for place in open_negs(directory).places)


# The same as values


@pytest.fixture(scope="module")
def values(model, questions, tmp_path_factory):
    """A run that stores values, and its results."""
    settings = {"model": [model], "dataset": list(questions.values()), "backend": "local", "shard_rows": 8}
    settings |= {"max_neurons": 16, "tree_neurons": 10, "probe": SERVED, "confusion": True}
    run = read_run_file(SkillRun, None, settings | {"out": tmp_path_factory.mktemp("values")})
    return run, run_pipeline(run, PlainSteps())


def test_every_served_probe_scores_as_in_a_run_that_stores_values(values, tmp_path):
    run, expected = values
    stats = run.model_copy(update={"storage": "stats", "out": tmp_path})
    results = run_pipeline(stats, PlainSteps())
    assert (results.problems, len(results.scores)) == ([], 3 * (1 + len(SERVED)))
    assert (results.scores, results.confusion) == (expected.scores, expected.confusion)
    assert faults(stats.directory) == []
    votes = stats.model_copy(update={"probe": ("polar", "magn-gradient")})
    chosen = [score for score in expected.scores if score.probe in ("lm", *votes.probe)]
    assert run_probe(votes, PlainSteps()).scores == chosen


def test_ray_actors_make_the_same_bytes_and_scores_as_the_local_worker(run, tmp_path):
    run = run.model_copy(update={"probe": ("magn", "tree")})
    far = run.model_copy(update={"backend": "ray", "workers": 2, "out": tmp_path / "ray"})
    local, actors = (run_pipeline(one, PlainSteps()) for one in (run, far))
    assert local.scores == actors.scores != []
    assert contents(run.directory) == contents(far.directory)


@pytest.mark.parametrize("probe", ["magn-gxa", "tree", "polar-random", "magn-logistic"])
def test_each_kind_of_probe_alone_finds_its_neurons_stored(values, run, probe):
    stats = run.model_copy(update={"probe": (probe,), "max_neurons": 4})
    changes = {"dataset": run.dataset, "probe": (probe,), "max_neurons": 4}
    expected = run_probe(values[0].model_copy(update=changes), PlainSteps())
    results = run_pipeline(stats, PlainSteps())
    assert results.problems == []
    assert results.scores == expected.scores
    reads_train = probe in ("tree", "magn-logistic")
    assert splits_in(stats.directory) == ["test", *["train"] * reads_train, SUMS, "valid"]


def test_the_commands_plan_make_and_show_both_passes(run, questions):
    options = ["--model", run.model[0], "--dataset", questions[3], "--storage", "stats", "--backend", "local"]
    options += ["--shard-rows", "8", "--max-neurons", "16", "--out", run.directory]
    assert neg("plan", *options).exit_code == 0
    made = neg("pipeline", *options, "--orchestrator", "none")
    assert made.exit_code == 0, made.output
    assert "Accuracy on test" in made.output
    shown = neg("status", run.directory)
    assert shown.exit_code == 0, shown.output
    assert SUMS in shown.output and "0 missing" in shown.output


def test_an_evaluation_runs_on_sums(run, questions, tmp_path):
    shared = {name: getattr(run, name) for name in ("model", "backend", "shard_rows", "storage", "max_neurons")}
    values = shared | {"dataset": list(questions.values()), "shots": [0], "probe": ["magn", "tree"]}
    results = run_mceval8k(read_run_file(EvaluationRun, None, values | {"out": tmp_path / "all"}), PlainSteps())
    assert results.problems == []
    assert len(results.averages) == 2 * 3  # of the genre, and of all


# Neurons


def test_as_many_neurons_are_stored_as_were_planned_and_all_that_may_be_asked_for(run):
    run = run.model_copy(update={"probe": ("polar", "magn-gradient", "tree"), "max_neurons": 5})
    run_extract(run, PlainSteps())
    negs = open_negs(run.directory)
    chosen = choose_neurons(run, negs.select(split=SUMS))
    assert len(chosen) == n_stored(run, N_ALL) == 5 + 5 + 10
    for split in ("train", "valid", "test"):
        for shard in negs.select(split=split).shards():
            assert tuple(shard.chosen_K) == chosen


def test_no_more_neurons_are_stored_than_there_are(run):
    assert n_stored(run.model_copy(update={"max_neurons": 50}), N_ALL) == N_ALL


def test_another_choice_of_neurons_is_refused_and_not_mixed_with_the_first(run):
    run_pipeline(run, PlainSteps())
    before = contents(run.directory)
    other = run.model_copy(update={"max_neurons": 8})
    results = run_pipeline(other, PlainSteps())
    assert results.scores == []
    assert len(results.problems) == 2
    assert all("shards of another run (this run here, that one there: neurons: " in line for line in results.problems)
    assert contents(run.directory) == before


def test_a_probe_that_asks_for_other_neurons_than_the_run_is_told_what_to_do(run):
    run = run.model_copy(update={"max_neurons": 2})
    run_extract(run, PlainSteps())
    results = run_probe(run.model_copy(update={"max_neurons": 60}), PlainSteps())
    assert "does not hold neuron" in results.problems[0]
    assert "run with other probes in another directory, or with --storage values" in results.problems[0]


# Resuming


@pytest.mark.parametrize("split", [SUMS, "train"])
def test_a_lost_shard_of_either_pass_is_computed_again_alone_and_has_the_same_bytes(run, split):
    run = run.model_copy(update={"probe": ("magn", "tree")})
    run_extract(run, PlainSteps())
    before = contents(run.directory)
    next(run.directory.rglob(f"split={split}/part-00001.arrow")).unlink()
    again = run_extract(run, PlainSteps())
    assert again.problems == []
    assert sum(part.n_computed for part in again.extracted) == 1
    assert contents(run.directory) == before


def test_shards_of_both_passes_whose_content_was_changed_are_found_and_repaired(run):
    run_extract(run, PlainSteps())
    before = contents(run.directory)
    for split in (SUMS, "test"):
        shard = next(run.directory.rglob(f"split={split}/part-00000.arrow"))
        shard.write_bytes(shard.read_bytes()[:-9] + bytes(9))
    found = list(verify(shard_folders(run.directory), lambda size: None))
    assert [one.folder.names[2] for one in found if one.recompute] == [SUMS, "test"]
    assert {fault.what for one in found for fault in one.faults} == {
        "shard 0: its checksum is not the one in its receipt"
    }
    for one in found:
        unpublish(one)
    assert run_extract(run, PlainSteps()).problems == []
    assert contents(run.directory) == before


def test_without_all_sums_nothing_is_chosen(run, monkeypatch):
    honest = ModelWorker.run

    def failing(self, job):
        if job.place.part == SUMS and job.index == 1:
            raise OSError("the disk is full")
        return honest(self, job)

    monkeypatch.setattr(ModelWorker, "run", failing)
    results = run_pipeline(run, PlainSteps())
    (problem,) = results.problems
    assert "train-sums: shard 1, 8 rows lost: OSError: the disk is full" in problem
    assert splits_in(run.directory) == [SUMS]
    monkeypatch.undo()
    assert run_pipeline(run, PlainSteps()).problems == []


def test_sums_of_other_settings_choose_no_neurons(run, monkeypatch):
    run_extract(run, PlainSteps())
    monkeypatch.setattr("flows.extraction.choose_neurons", None)
    results = run_extract(run.model_copy(update={"site": "act"}), PlainSteps())
    (problem,) = results.problems
    assert "site: 'act' here, 'up' there" in problem


# Planning and watching


@pytest.mark.parametrize("probes", [("polar", "magn"), ("magn", "tree", "polar-random", "magn-logistic")])
def test_bytes_and_rows_are_foreseen_shard_by_shard(run, probes):
    run = run.model_copy(update={"probe": probes})
    planned = [(run, plan(run))]
    ((dataset,),) = [of_model.datasets for of_model in forecast(planned)]
    made = run_extract(run, PlainSteps()).extracted
    assert dataset.n_bytes == dataset.n_bytes_left == sum(part.n_bytes for part in made)
    assert dataset.n_rows == sum(part.n_rows for part in made)
    assert dataset.n_shards == sum(part.n_computed for part in made)
    for split in plan(run)[0].datasets[0].splits:
        files = sorted(split.place.path(run.directory).glob("*.arrow"))
        assert shard_bytes(split) == [file.stat().st_size for file in files]
        assert missing_shards(run, split) == []
    assert forecast(planned)[0].n_bytes_left == 0
    check_disk(planned)


def test_the_status_counts_both_passes_before_and_after_neurons_are_chosen(run, monkeypatch):
    honest = ModelWorker.run

    def failing(self, job):
        if job.place.part == "test":
            raise OSError("the disk is full")
        return honest(self, job)

    monkeypatch.setattr(ModelWorker, "run", failing)
    run_extract(run, PlainSteps())
    status = run_status(run.directory)
    assert [(part.folder.names[2], part.n_finished, part.n_missing, part.n_foreign) for part in status.folders] == [
        (SUMS, 3, 0, 0),
        ("valid", 3, 0, 0),
        ("test", 0, 3, 0),
    ]
    assert status.n_missing == 3


@pytest.mark.parametrize("neurons", [None, (1, 30, 39)])
def test_shards_with_fewer_columns_than_their_model_has_layers_are_whole(tmp_path, neurons):
    identity = RunIdentity(
        model="m",
        model_revision="r",
        tokenizer_hash="t",
        site="up",
        dtype="float32",
        n_layers=20,
        n_neurons=2,
        prompt={},
        dataset_fingerprint="f",
        storage="stats",
        neurons=None if neurons is None else choice_digest(neurons),
    )
    negs_POLN = np.random.default_rng(0).normal(size=(1, 2, 20, 2))
    write_negs(
        tmp_path,
        negs_place("m", "d", "valid"),
        0,
        1,
        identity=identity,
        examples=[SimpleNamespace(id="1", prompt="?", answer=0, group="")],
        label_ids_PO=[[0, 1]],
        negs_POLN=negs_POLN,
        activations_PLN=negs_POLN[:, 0],
        probs_PO=[[0.5, 0.5]],
        neurons=neurons,
    )
    assert faults(tmp_path) == []


def test_shards_of_values_do_not_count_as_chosen_ones(run):
    values = run.model_copy(update={"storage": "values"})
    run_extract(values, PlainSteps())
    results = run_extract(run, PlainSteps())
    assert all("storage: 'stats' here, 'values' there" in problem for problem in results.problems)
    in_the_way = {part.folder.names[2]: part.n_foreign for part in run_status(run.directory).folders}
    assert (in_the_way["valid"], in_the_way["test"]) == (3, 3)


# What sums cannot do


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        (
            SkillRun,
            {"nonfinite": "keep"},
            "storage 'stats' has none for NaN and infinity: set --nonfinite to fail or skip",
        ),
        (
            SkillRun,
            {"probe": ["polar", "act"]},
            "probe 'act' reads .* leave it out, or set --storage to values or codes",
        ),
        (EvaluationRun, {}, "probe 'act' reads the activations of all neurons"),
        (SkillsRun, {}, "storage 'stats' keeps too little to analyse skill neurons: set it to values or codes"),
    ],
)
def test_what_sums_cannot_do_is_refused_before_anything_is_computed(model, questions, kind, settings, problem):
    values = {"model": [model], "dataset": [questions[3]], **settings}
    read_run_file(kind, None, values)
    with pytest.raises(RunError, match=problem) as error:
        read_run_file(kind, None, values | {"storage": "stats"})
    assert "\n" not in str(error.value)
