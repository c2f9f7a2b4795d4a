"""The flows on a tiny model and a small file of prompts: plain, on Ray actors, and under Prefect."""

import html
import json

import numpy as np
import pytest
from support import save_tiny_model, write_questions

from flows.pipeline import run_extract, run_pipeline, run_probe
from negcore.errors import DatasetError, LabelError, NegError, ShardError
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import neurgrad
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.forecast.needs import forecast
from tasks.measure.worker import ModelWorker
from tasks.plan import plan
from tasks.rundir.layout import shard_folders
from tasks.rundir.verify import verify
from tasks.steps import PlainSteps


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(model, questions, tmp_path):
    values = {"model": [model], "dataset": [questions], "backend": "local", "shard_rows": 8, "max_neurons": 64}
    return read_run_file(SkillRun, None, values | {"out": tmp_path / "run"})


def contents(directory):
    """Every published file and its bytes."""
    files = (path for path in (directory / "negs").rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(directory): path.read_bytes() for path in files}


def test_a_pipeline_writes_the_negs_of_every_row_and_scores_every_probe(run, model):
    results = run_pipeline(run, PlainSteps())
    assert results.problems == []
    assert [score.probe for score in results.scores] == ["lm", "polar", "magn"]
    test = open_negs(run.directory).select(split="test")
    examples = plan(run)[0].datasets[0].splits[2].examples
    assert test.ids == [example.id for example in examples]
    expected = neurgrad(load_model(model), [e.prompt for e in examples], [e.labels for e in examples])
    negs_POLN = np.stack([test.layer(layer) for layer in range(test.n_layers)], axis=2)
    np.testing.assert_allclose(negs_POLN, expected.negs_POLN, rtol=1e-5, atol=1e-6 * np.abs(expected.negs_POLN).max())


@pytest.mark.parametrize("name", ["report.html", "accuracy.arrow"])
def test_what_cannot_be_written_is_a_problem_and_all_else_is_shown(run, name):
    (run.directory / name).mkdir(parents=True)
    results = run_pipeline(run, PlainSteps())
    (problem,) = results.problems
    assert f"/{name}' is a directory" in problem
    assert len(results.scores) == 3
    assert sum(part.n_rows for part in results.extracted) == 60
    assert (results.report is None) == (name == "report.html")
    assert name == "report.html" or problem in html.unescape((run.directory / "report.html").read_text())


def test_the_same_command_again_computes_nothing(run):
    run_extract(run, PlainSteps())
    before = contents(run.directory)
    again = run_extract(run, PlainSteps())
    assert sum(part.n_computed for part in again.extracted) == 0
    assert contents(run.directory) == before


def test_only_a_lost_shard_is_computed_again_and_has_the_same_bytes(run):
    run_extract(run, PlainSteps())
    before = contents(run.directory)
    shard = next(path for path in run.directory.rglob("part-00001.arrow") if "split=train" in str(path))
    shard.write_bytes(shard.read_bytes()[:-100])
    again = run_extract(run, PlainSteps())
    assert sum(part.n_computed for part in again.extracted) == 1
    assert contents(run.directory) == before


def test_probing_needs_the_shards(run):
    results = run_probe(run, PlainSteps())
    assert results.scores == []
    assert "holds no NEGs" in results.problems[0]


def test_probing_afterwards_gives_the_pipelines_scores(run):
    piped = run_pipeline(run, PlainSteps())
    assert run_probe(run, PlainSteps()).scores == piped.scores


def test_other_settings_in_the_same_directory_are_refused_with_the_difference(run):
    run_extract(run, PlainSteps())
    results = run_extract(run.model_copy(update={"site": "act"}), PlainSteps())
    assert ShardError.__name__ in results.problems[0]
    assert "site: 'act' here, 'up' there" in results.problems[0]


def test_a_run_that_was_cut_by_older_rules_is_not_gone_on_with(run, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr("tasks.plan.SPLIT_RULES", 1)
        run_extract(run, PlainSteps())
    stored = contents(run.directory)
    (problem, *_) = run_extract(run, PlainSteps()).problems
    assert ShardError.__name__ in problem and "prompt.split_rules: 2 here, 1 there" in problem
    assert contents(run.directory) == stored


def test_a_lost_shard_is_reported_and_its_dataset_not_probed(run, monkeypatch):
    honest = ModelWorker.run

    def failing(self, job):
        if job.place.part == "valid" and job.index == 1:
            raise OSError("the disk is full")
        return honest(self, job)

    monkeypatch.setattr(ModelWorker, "run", failing)
    results = run_pipeline(run, PlainSteps())
    assert results.scores == []
    assert len(results.problems) == 1
    assert "shard 1, 8 rows lost: OSError: the disk is full" in results.problems[0]
    monkeypatch.undo()
    assert run_pipeline(run, PlainSteps()).problems == []


def test_a_run_that_stores_codes_scores_every_probe_as_one_that_stores_values(run, tmp_path):
    probes = ("polar", "magn", "act", "tree", "polar-gradient", "magn-gradient", "polar-gxa", "magn-gxa", "magn-random")
    run = run.model_copy(update={"probe": probes, "confusion": True})
    codes = run.model_copy(update={"storage": "codes", "out": tmp_path / "codes"})
    foreseen = forecast([(codes, plan(codes))])[0].n_bytes_left
    expected, results = (run_pipeline(one, PlainSteps()) for one in (run, codes))
    assert (results.problems, len(results.scores)) == ([], 1 + len(probes))
    assert (results.scores, results.confusion) == (expected.scores, expected.confusion)
    assert foreseen == sum(part.n_bytes for part in results.extracted)
    assert {split.storage for split in open_negs(codes.directory)} == {"codes"}
    assert [fault for one in verify(shard_folders(codes.directory), lambda size: None) for fault in one.faults] == []


def test_a_bfloat16_model_loses_nothing_in_16_bits_and_takes_half_the_room(run, tmp_path):
    probes = ("polar", "magn", "act", "tree", "magn-logistic")
    run = run.model_copy(update={"probe": probes, "dtype": "bfloat16"})
    halves = run.model_copy(update={"storage": "bfloat16", "out": tmp_path / "halves"})
    foreseen = forecast([(halves, plan(halves))])[0].n_bytes_left
    expected, results = (run_pipeline(one, PlainSteps()) for one in (run, halves))
    assert (results.problems, len(results.scores)) == ([], 1 + len(probes))
    assert results.scores == expected.scores
    assert foreseen == sum(part.n_bytes for part in results.extracted)
    whole, half = (open_negs(one.directory).select(split="test") for one in (run, halves))
    assert all(np.array_equal(whole.layer(layer), half.layer(layer)) for layer in range(whole.n_layers))
    assert [fault for one in verify(shard_folders(halves.directory), lambda size: None) for fault in one.faults] == []


def test_codes_in_a_directory_of_values_are_refused_with_the_difference(run):
    run_extract(run, PlainSteps())
    before = contents(run.directory)
    results = run_extract(run.model_copy(update={"storage": "codes"}), PlainSteps())
    assert "storage: 'codes' here, 'values' there" in results.problems[0]
    assert contents(run.directory) == before


def test_more_options_than_codes_hold_are_refused_before_any_model_is_loaded(run, tmp_path):
    file = tmp_path / "six.jsonl"
    row = {"labels": [" A", " B", " C", " D", " E", " yes"], "answer": 0}
    file.write_text("\n".join(json.dumps(row | {"prompt": f"Question: {i}? Answer:"}) for i in range(10)))
    six = run.model_copy(update={"dataset": (str(file),)})
    assert len(plan(six)[0].datasets) == 1
    with pytest.raises(DatasetError, match="6 options: codes hold 2..5 of them, use storage 'values'"):
        plan(six.model_copy(update={"storage": "codes"}))


def test_bad_labels_are_refused_before_any_model_is_loaded(run, tmp_path, monkeypatch):
    file = tmp_path / "bad.jsonl"
    row = {"labels": [" of course", " B"], "answer": 0}
    file.write_text("\n".join(json.dumps(row | {"prompt": f"Question: {i}? Answer:"}) for i in range(10)))
    monkeypatch.setattr("tasks.measure.worker.load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(LabelError, match="label 'of course' is 8 tokens of this model"):
        plan(run.model_copy(update={"dataset": (str(file),)}))


def test_a_prompt_longer_than_the_context_is_refused(run, tmp_path):
    file = tmp_path / "long.jsonl"
    row = {"labels": [" A", " B"], "answer": 0}
    prompts = [f"{i} " + "the best of times " * 60 + "Answer:" for i in range(10)]
    file.write_text("\n".join(json.dumps(row | {"prompt": prompt}) for prompt in prompts))
    with pytest.raises(NegError, match="reads at most 128"):
        plan(run.model_copy(update={"dataset": (str(file),)}))


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_actors_write_the_same_bytes_as_one_local_worker(run, tmp_path, workers):
    run_extract(run, PlainSteps())
    other = run.model_copy(update={"backend": "ray", "workers": workers, "out": tmp_path / "ray"})
    results = run_extract(other, PlainSteps())
    assert results.problems == []
    assert contents(other.directory) == contents(run.directory)


def test_a_model_that_does_not_load_is_said_once_and_the_others_go_on(run, tmp_path):
    broken = save_tiny_model("llama", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 64)
    results = run_pipeline(run.model_copy(update={"model": (str(broken), *run.model)}), PlainSteps())
    assert len(results.problems) == 1
    assert "is not safetensors" in results.problems[0]
    assert {score.model for score in results.scores} == set(run.model)
