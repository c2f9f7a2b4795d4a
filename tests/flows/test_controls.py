"""Controls: probes fitted on permuted answers and on random weights, beside accuracies that do not change."""

import shutil

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from support import save_tiny_model, write_questions

from flows.pipeline import count_pipeline_steps, run_extract, run_mceval8k, run_pipeline, run_probe
from flows.show.accuracy_tables import accuracy_tables
from flows.show.control_tables import control_tables
from negcore.errors import NegError, ShardError
from negcore.measure.votes import SCORES
from negcore.probing.evaluation import accuracy
from negcore.probing.fitted import fit_vote
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import EvaluationRun, SkillRun
from tasks.config.reading import read_run_file
from tasks.config.recipes import RECIPES
from tasks.controls import ControlRow, with_permuted_gold
from tasks.plan import plan
from tasks.probe import AccuracyRow
from tasks.rundir.layout import shard_folders
from tasks.rundir.query import query
from tasks.rundir.verify import verify
from tasks.steer import read_steered_run
from tasks.steps import PlainSteps

PROBES = ["polar", "magn", "act", "tree", "polar-random", "magn-logistic", "magn-gxa"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny_model("llama", folder / "tiny-llama", n_positions=4096)
    values = {"model": [str(model)], "dataset": [write_questions(folder)], "backend": "local", "shard_rows": 8}
    return values | {"max_neurons": 16, "tree_neurons": 10, "workers": 2, "probe": PROBES}


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    return read_run_file(SkillRun, None, settings | {"controls": 2, "seed": 5, "out": tmp_path_factory.mktemp("run")})


@pytest.fixture(scope="module")
def results(run):
    results = run_pipeline(run, PlainSteps())
    assert results.problems == []
    return results


def splits_of(run):
    return tuple(open_negs(run.directory).select(split=split) for split in ("train", "valid", "test"))


def test_every_probe_has_a_row_for_each_permutation_and_one_for_random_weights(run, results):
    found = [(row.control, row.draw, row.probe) for row in results.controls]
    assert sorted(found) == sorted(
        [("permuted answers", draw, probe) for draw in range(2) for probe in PROBES]
        + [("random weights", 0, probe) for probe in ["lm", *PROBES]]
    )
    assert {(row.control, row.seed) for row in results.controls} == {("permuted answers", 5), ("random weights", 5)}


def test_controls_are_a_table_for_sql_and_programs(run, results):
    rows = pa.ipc.open_file(run.directory / "controls.arrow").read_all().to_pylist()
    assert [tuple(row.values()) for row in rows] == [tuple(vars(row).values()) for row in results.controls]
    beside = query(
        run.directory,
        "select a.probe, a.accuracy - c.accuracy as above from accuracy a join controls c using (dataset, probe) "
        "where c.control = 'random weights'",
    )
    assert beside.num_rows == 1 + len(PROBES)


@pytest.mark.parametrize(("probe", "rule"), [("magn", "magn"), ("polar", "polar")])
def test_a_permutation_is_that_of_a_probe_fitted_on_answers_moved_row_by_row(run, results, probe, rule):
    train, valid, test = splits_of(run)
    negs_POM = np.concatenate([train.layer(layer) for layer in range(train.n_layers)], axis=2)
    for row in (row for row in results.controls if row.control == "permuted answers" and row.probe == probe):
        permuted = [with_permuted_gold(split, run.seed, row.draw) for split in (train, valid)]
        assert sorted(permuted[0].gold_P) == sorted(train.gold_P) and (permuted[0].gold_P != train.gold_P).any()
        scores_M = SCORES[rule](negs_POM, permuted[0].gold_P)
        vote = fit_vote_of(probe, scores_M, permuted[1], run)
        expected = accuracy(test.gold_P, vote.predict(test))
        assert (row.n_neurons, row.n_correct, row.n_test) == (vote.n_kept, expected.n_correct, test.n_rows)


def fit_vote_of(probe, scores_M, valid, run):
    return fit_vote(RECIPES[probe].vote, scores_M, valid, max_neurons=run.max_neurons)


def test_the_control_with_random_weights_is_a_run_of_its_own_that_repeats_itself(run, results):
    own = read_run_file(SkillRun, run.directory / "random-weights" / "run.yaml", {})
    assert (own.random_weights, own.controls) == (5, 0)
    negs = open_negs(own.directory).select(split="test")
    assert negs.identity.model_revision == splits_of(run)[2].identity.model_revision + "+random-5"
    again = run_pipeline(own, PlainSteps())
    assert sum(part.n_computed for part in again.extracted) == 0
    expected = {row.probe: row.n_correct for row in results.controls if row.control == "random weights"}
    assert {score.probe: score.n_correct for score in again.scores} == expected


def test_controls_change_no_other_result_and_are_the_same_on_one_worker(run, results):
    plain = run_probe(run.model_copy(update={"controls": 0}), PlainSteps())
    assert (plain.scores, plain.controls) == (results.scores, [])
    assert run_probe(run.model_copy(update={"workers": 1}), PlainSteps()).controls == results.controls


def test_a_run_without_controls_has_the_name_and_files_of_before(settings, tmp_path):
    plain = read_run_file(SkillRun, None, settings | {"probe": ["magn"], "out": tmp_path})
    assert "controls" not in plain.science and "random_weights" not in plain.science
    assert read_run_file(SkillRun, None, settings | {"probe": ["magn"], "controls": 3}).name == plain.name
    run_pipeline(plain, PlainSteps())
    assert not (tmp_path / "controls.arrow").exists() and not (tmp_path / "random-weights").exists()


def test_shards_of_random_weights_are_refused_as_the_models_own(run, results, tmp_path):
    shutil.copytree(run.directory / "random-weights", tmp_path / "copy")
    mixed = run.model_copy(update={"controls": 0, "out": tmp_path / "copy"})
    (problem, *_) = run_extract(mixed, PlainSteps()).problems
    assert ShardError.__name__ in problem and "+random-5" in problem


def test_all_shards_and_steps_are_counted_and_verified(run, results):
    models = plan(run)
    plain = run.model_copy(update={"controls": 0})
    assert count_pipeline_steps(run, models) == 2 * count_pipeline_steps(plain, models) + 2
    verified = list(verify(shard_folders(run.directory), lambda size: None))
    assert len(verified) == 6 and not any(one.faults for one in verified)


def test_an_evaluation_has_controls_under_each_number_of_demonstrations(settings, tmp_path):
    values = settings | {"probe": ["magn"], "controls": 1, "shots": [0], "out": tmp_path}
    results = run_mceval8k(read_run_file(EvaluationRun, None, values), PlainSteps())
    assert results.problems == []
    assert [(row.control, row.probe) for row in results.controls] == [
        ("permuted answers", "magn"),
        ("random weights", "lm"),
        ("random weights", "magn"),
    ]
    assert [score.probe for score in results.scores] == ["lm", "magn"]
    assert (tmp_path / "shots-0" / "random-weights" / "run.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"controls": -1}, "greater than or equal to 0"),
        ({"controls": 2, "storage": "stats", "probe": ["magn"]}, "controls rank neurons by permuted answers"),
        ({"controls": 2, "random_weights": 1}, "leave one of them out"),
        ({"random_weights": -1}, "greater than or equal to 0"),
    ],
)
def test_controls_that_cannot_be_made_are_refused_before_anything_is_computed(settings, changes, said, tmp_path):
    with pytest.raises(NegError, match=said):
        read_run_file(SkillRun, None, settings | changes | {"out": tmp_path})


def test_random_weights_are_not_steered(settings, tmp_path):
    own = read_run_file(SkillRun, None, settings | {"probe": ["magn"], "random_weights": 1, "out": tmp_path})
    run_pipeline(own, PlainSteps())
    with pytest.raises(NegError, match="measured random weights"):
        read_steered_run(str(tmp_path))


def score(probe, n_correct, low, high):
    counts = {"n_correct": n_correct, "n_test": 10, "n_train": 40, "accuracy": n_correct / 10, "low": low, "high": high}
    names = {"model": "m", "shots": 0, "genre": "", "dataset": "a", "group": "", "probe": probe}
    return AccuracyRow(**names, n_neurons=1, **counts, majority=0.5, random=0.5, overlapping=False)


def control(probe, kind, draw, n_correct, low, high):
    return ControlRow("m", 0, "a", probe, kind, draw, 0, 1, n_correct / 10, low, high, n_correct, 10)


def test_means_p_and_differences_by_pencil():
    rows = [control("magn", "permuted answers", draw, n, 0.1, 0.6) for draw, n in enumerate([2, 4, 9])]
    rows += [control("magn", "random weights", 0, 6, 0.3, 0.7), control("lm", "random weights", 0, 3, 0.1, 0.6)]
    scores = [score("lm", 5, 0.2, 0.8), score("magn", 9, 0.75, 1.0)]
    console = Console(width=100, record=True, force_terminal=False)
    (table,) = control_tables(rows, scores)
    console.print(table)
    (accuracies,) = accuracy_tables(scores, [], 1, rows)
    console.print(accuracies)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["a", "Magn", ".900", "1", ".500", ".900", ".5", ".600", "+.300"] in lines
    assert ["LM-Prob", ".500", "1", "-", "-", "-", ".300", "+.200"] in lines
    assert ["-", "rand.", ".300", "perm.", ".500"] in lines and ["-", "rand.", ".600"] in lines
    assert table.says.endswith("Magn on 0 of 1.")
