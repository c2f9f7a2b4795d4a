"""The skills flow on a tiny model: every analysis, resumed, with a check that fails, and as a command."""

import shutil
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
from support import neg, save_tiny_model
from typer.testing import CliRunner

from flows.cli.app import app
from flows.skills import count_skills_steps, run_skills
from negcore.analysis.neurons import top_neurons
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillsRun
from tasks.config.reading import read_run_file
from tasks.config.run_file import write_run_file
from tasks.measure.worker import ModelWorker
from tasks.neurons import NeuronRow
from tasks.plan import plan
from tasks.probe import AccuracyRow
from tasks.rundir.tables import read_table
from tasks.skills import plan_skills
from tasks.steps import PlainSteps, handing_over

DATASETS = ("mini/fact", "mini/nli", "mini/classification")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama", n_positions=4096))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    values = {"model": [model], "dataset": DATASETS, "backend": "local", "limit": 24, "eval_limit": 12, "workers": 2}
    sizes = {"top": [4, 8], "band": 4, "tree_neurons": 32, "draws": 2, "shard_rows": 8, "shift": [0.5]}
    return read_run_file(SkillsRun, None, values | sizes | {"out": tmp_path_factory.mktemp("skills") / "run"})


@pytest.fixture(scope="module")
def results(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.show.report.save_figures", lambda figures, folder: [])
        return run_skills(run, PlainSteps())


def table(run, name):
    return pa.ipc.open_file(run.directory / "skills" / f"{name}.arrow").read_all().to_pylist()


def test_every_analysis_is_made_of_every_dataset(results, run):
    assert results.problems == []
    (findings,) = results.findings
    assert [one.dataset for one in findings.datasets] == list(DATASETS)
    names = ("zero-shot", "zero-shot, inline", "one-shot", "one-shot, others")
    assert findings.conditions == names
    for one in findings.datasets:
        of_probe = [row for row in one.transfers if row.probe == "magn"]
        assert [(row.trained_on, row.tested_on) for row in of_probe] == [(a, b) for a in names for b in names]
        assert {(row.neurons, row.size, row.shift) for row in one.causal} == {
            (kind, size, shift) for kind in ("top", "random", "bottom") for size in (4, 8) for shift in (0.5, -0.5)
        }
        assert [row.n_train for row in one.training_rows if row.probe == "polar"] == [16, 24]
        assert {row.probe for row in one.bands} == {"polar", "magn"}
        assert one.forests and sum(row.share for row in one.layers) == pytest.approx(4)  # 2 probes x 2 tops
        assert (one.reference.n_train, one.reference.n_valid, one.reference.n_test) == (24, 12, 12)
    assert len(findings.overlaps) == 3 * 2 * 2
    assert findings.genre_overlaps


def test_the_curves_end_where_the_probes_of_the_pipeline_are(results):
    """The rows that several analyses share are the same numbers."""
    (findings,) = results.findings
    for one in findings.datasets:
        for probe in ("polar", "magn"):
            all_rows = next(r for r in one.training_rows if r.probe == probe and r.n_train == 24)
            own = next(r for r in one.transfers if r.probe == probe and r.trained_on == r.tested_on == "zero-shot")
            at_k = next(
                r for r in one.neuron_counts if (r.probe, r.order, r.n_neurons) == (probe, "best", all_rows.n_neurons)
            )
            assert all_rows.accuracy == own.accuracy == at_k.accuracy
            assert all_rows.n_neurons == own.n_neurons


def test_the_tables_are_written(results, run):
    (findings,) = results.findings
    assert table(run, "overlaps") == [{"model": findings.model, **asdict(row)} for row in findings.overlaps]
    causal = table(run, "causal")
    assert {row["dataset"] for row in causal} == set(DATASETS)
    assert causal[0] == {"model": findings.model, "dataset": DATASETS[0], **asdict(findings.datasets[0].causal[0])}


def test_the_best_neurons_of_the_main_way_of_asking_are_a_table_as_of_other_runs(results, run):
    rows = read_table(run.directory / "neurons.arrow", NeuronRow)
    assert [(row.dataset, row.probe) for row in rows if row.place == 20] == [
        (dataset, probe) for dataset in DATASETS for probe in ("polar", "magn")
    ]
    train = open_negs(run.conditions[0].run.directory).select(dataset=DATASETS[1], split="train")
    own = [row for row in rows if (row.dataset, row.probe) == (DATASETS[1], "magn")]
    expected = top_neurons(train, "magn", seed=run.seed)
    assert [(row.layer, row.neuron, row.agreement) for row in own] == [
        (one.layer, one.neuron, one.agreement) for one in expected
    ]


def test_conditions_ask_the_same_questions_otherwise(run, results):
    planned = {condition.folder: plan(condition.run)[0].datasets[0].dataset for condition in run.conditions}
    test = {folder: dataset.splits["test"] for folder, dataset in planned.items()}
    assert len({tuple(e.id for e in examples) for examples in test.values()}) == 1
    assert len({examples[0].prompt for examples in test.values()}) == 4
    demonstrated = [{d.id for d in planned[folder].demonstrations} for folder in ("shots", "demonstrations")]
    assert demonstrated[0] and demonstrated[1] and not demonstrated[0] & demonstrated[1]


def test_a_second_run_computes_nothing_and_finds_the_same(run, results, monkeypatch):
    monkeypatch.setattr("flows.show.report.save_figures", lambda figures, folder: [])
    monkeypatch.setattr(ModelWorker, "__init__", lambda self, *args, **kwargs: pytest.fail("a model was loaded"))
    again = run_skills(run, PlainSteps())
    assert sum(part.n_computed for part in again.extracted) == 0
    assert again.findings == results.findings


def test_nothing_is_said_of_a_dataset_whose_check_failed(run, results, monkeypatch):
    real = ModelWorker.run

    def failing(self, job):
        if job.place.dataset == DATASETS[1]:
            raise MemoryError("no room")
        return real(self, job)

    monkeypatch.setattr("flows.show.report.save_figures", lambda figures, folder: [])
    monkeypatch.setattr(ModelWorker, "run", failing)
    partial = run_skills(run.model_copy(update={"shift": (1.5,)}), PlainSteps())
    assert partial.problems and all("mini/nli causal check" in problem for problem in partial.problems)
    (findings,) = partial.findings
    assert [one.dataset for one in findings.datasets] == [DATASETS[0], DATASETS[2]]
    assert "mini/nli" not in str(findings)


def test_a_shift_towards_gold_raises_its_probability(results):
    (findings,) = results.findings
    causal = [row for one in findings.datasets for row in one.causal]
    rows = [row for row in causal if (row.neurons, row.direction) == ("top", "gold")]
    assert np.mean([row.prob_change * np.sign(row.shift) for row in rows]) > 0


def test_progress_counts_every_part(run):
    steps = []

    class Watcher:
        def advance(self, progress):
            steps.append((progress.step, progress.done))

        def finish(self, step, error): ...

        def tell(self, line): ...

    with handing_over() as given:
        given.watcher = Watcher()
        run_skills(run, PlainSteps())
    last = dict(steps)
    assert sum(last.values()) == count_skills_steps(run, plan_skills(run))


def test_runs_of_skills_are_compared_like_others(results, run, tmp_path):
    rows = read_table(run.directory / "accuracy.arrow", AccuracyRow)
    assert [(row.dataset, row.probe) for row in rows] == [(d, p) for d in DATASETS for p in ("lm", "polar", "magn")]
    (findings,) = results.findings
    for one in findings.datasets:
        (lm, *_) = [row for row in rows if row.dataset == one.dataset]
        assert (lm.accuracy, lm.n_correct) == (one.reference.lm, round(one.reference.lm * one.reference.n_test))
    shutil.copytree(run.directory, tmp_path / "again")
    shown = CliRunner().invoke(app, ["compare", str(run.directory), str(tmp_path / "again")], env={"COLUMNS": "100"})
    assert shown.exit_code == 0, shown.output
    assert [line.split()[:2] for line in shown.stdout.splitlines() if line.startswith("mini/")] == [
        [dataset, "run"] for dataset in DATASETS
    ]


def test_the_command_shows_the_causal_check_first_and_writes_figures(run, results):
    ran = neg("skills", write_run_file(run), "--orchestrator", "none")
    assert ran.returncode == 0, ran.stderr
    assert "causal" in ran.stdout.lower()
    figures = {path.suffix for path in (run.directory / "skills" / "figures").iterdir()}
    assert figures == {".svg", ".png", ".pdf"}
    assert open_negs(run.conditions[1].run.directory).places
