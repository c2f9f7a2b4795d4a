"""Runs that ask every row in several orders of its options, from the run file to the tables."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from support import neg, save_tiny_model

from flows.pipeline import run_pipeline, run_probe
from flows.show.letter_bias_tables import letter_bias_tables
from flows.skills import run_skills
from negcore import load_model, neurgrad
from negcore.orders import split_id
from negcore.probing.paired import paired
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillRun, SkillsRun
from tasks.config.reading import read_run_file
from tasks.controls import with_permuted_gold
from tasks.letter_bias import LetterBiasRow
from tasks.plan import plan
from tasks.resamples import sample_counts
from tasks.rundir.query import query
from tasks.rundir.tables import read_table
from tasks.steer import _test
from tasks.steps import PlainSteps

PROBES = ["polar", "magn", "act", "tree", "magn-logistic"]
N_ORDERS, N_TEST = 6, 6


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    model = save_tiny_model("llama", tmp_path_factory.mktemp("made") / "tiny-llama", n_positions=4096)
    sizes = {"limit": 12, "eval_limit": N_TEST, "shard_rows": 8, "max_neurons": 16, "tree_neurons": 10}
    return {"model": [str(model)], "dataset": ["mini/nli"], "backend": "local", "permutations": "all"} | sizes


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    more = {"probe": PROBES, "controls": 1, "train_samples": 3, "out": tmp_path_factory.mktemp("run")}
    return read_run_file(SkillRun, None, settings | more)


@pytest.fixture(scope="module")
def results(run):
    results = run_pipeline(run, PlainSteps())
    assert results.problems == []
    return results


def split_of(run, name="test"):
    return open_negs(run.directory).select(split=name)


def predictions(run):
    return pa.ipc.open_file(run.directory / "predictions.arrow").read_all().to_pylist()


def test_every_order_is_measured_as_if_it_were_asked_singly(run, results):
    (of_model,) = plan(run)
    test = split_of(run)
    lm = load_model(run.model[0])
    examples = of_model.datasets[0].dataset.splits["test"]
    assert test.ids == [one.id for one in examples] and len(examples) == N_TEST * N_ORDERS
    for at in (0, 3, 17):
        one = examples[at]
        alone = neurgrad(lm, [one.prompt], list(one.labels))
        np.testing.assert_allclose(test.probs_PO[at], alone.probs_PO[0], rtol=1e-4)
        for layer in range(test.n_layers):
            np.testing.assert_allclose(test.layer(layer)[at], alone.negs_POLN[0, :, layer], rtol=2e-3, atol=1e-7)


def test_negs_by_answer_are_means_over_the_prompts_of_a_row(run, results):
    test = split_of(run)
    by_answer, negs_POK = test.neurons_by_answer([(0, 1), (2, 5)]), test.neurons([(0, 1), (2, 5)])
    for at, row in enumerate(test.answers.rows):
        prompts = [place for place, id_ in enumerate(test.ids) if split_id(id_).row == row]
        for answer in range(3):
            letters = [split_id(test.ids[place]).order.index("ABC"[answer]) for place in prompts]
            mean = negs_POK[prompts, letters].astype(np.float64).mean(axis=0)
            np.testing.assert_allclose(by_answer[at, answer], mean, rtol=1e-12)


def test_predictions_tell_row_order_and_answer(run, results):
    rows = predictions(run)
    assert len(rows) == (1 + len(PROBES)) * N_TEST * N_ORDERS
    for row in rows:
        assert (row["row"], row["order"]) == split_id(row["id"])
        assert "ABC"[row["answer"]] == row["order"][row["predicted"]]
        assert "ABC"[row["gold_answer"]] == row["order"][row["gold"]]
    assert all(len({one["gold_answer"] for one in rows if one["row"] == row["row"]}) == 1 for row in rows)


def test_the_table_of_letter_bias_holds_what_the_predictions_say(run, results):
    rows, found = predictions(run), read_table(run.directory / "letter_bias.arrow", LetterBiasRow)
    assert found == results.letter_bias and [one.probe for one in found] == ["lm", "calibrated", *PROBES]
    for one in found:
        if one.probe == "calibrated":
            continue
        own = [row for row in rows if row["probe"] == one.probe]
        by_row = {}
        for row in own:
            by_row.setdefault(row["row"], []).append(row)
        given = [row["right"] for row in own if row["order"] == "ABC"]
        assert (one.n_rows, one.n_orders, one.n_incomplete) == (N_TEST, N_ORDERS, 0)
        assert one.given == np.mean(given) and one.by_letter == np.mean([row["right"] for row in own])
        assert one.gain == pytest.approx(one.given - one.by_letter)
        assert one.inconsistent == np.mean([len({row["answer"] for row in of_row}) > 1 for of_row in by_row.values()])
        assert one.always == np.mean([all(row["right"] for row in of_row) for of_row in by_row.values()])
        assert one.chosen == [np.mean([row["predicted"] == letter for row in own]) for letter in range(3)]
        assert one.gold == pytest.approx([1 / 3] * 3)


def test_lm_prob_decides_by_the_mean_probability_of_each_answer(run, results):
    test = split_of(run)
    right = 0
    for row in test.answers.rows:
        mean_A = np.zeros(3)
        for at, id_ in enumerate(test.ids):
            if split_id(id_).row == row:
                for letter, answer in enumerate(split_id(id_).order):
                    mean_A["ABC".index(answer)] += test.probs_PO[at, letter]
                gold = "ABC".index(split_id(id_).order[test.gold_P[at]])
        right += mean_A.argmax() == gold
    assert results.letter_bias[0].by_answer == right / N_TEST


def test_accuracies_count_prompts_and_their_intervals_rows(run, results):
    biases = [one for one in results.letter_bias if one.probe != "calibrated"]
    for score, bias in zip(results.scores, biases, strict=True):
        assert score.n_test == N_TEST * N_ORDERS
        assert (score.accuracy, score.low, score.high) == (bias.by_letter, bias.by_letter_low, bias.by_letter_high)
    random = [row for row in results.controls if row.control == "random weights"]
    assert [row.probe for row in random] == ["lm", *PROBES] and {row.n_test for row in random} == {36}


def test_probes_are_compared_on_one_decision_a_row(run, results):
    (own,) = results.predictions
    for row in results.comparisons:
        expected = paired(own.right_R[row.first], own.right_R[row.second])
        assert (row.n_test, row.n_first, row.n_second) == (N_TEST, expected.n_first, expected.n_second)
    by_answer = {one.probe: one.by_answer for one in results.letter_bias}
    for beyond in results.beyond:
        assert beyond.n_test == N_TEST
        expected = [by_answer[probe] for probe in (beyond.probe, "lm", "calibrated")]
        assert [beyond.accuracy, beyond.lm, beyond.calibrated] == expected


def test_samples_and_permuted_answers_take_rows_whole(run, results):
    train = split_of(run, "train")
    for one in (run, run.model_copy(update={"sample_rows": 5})):
        counts_BP = sample_counts(one, "mini/nli", train)
        for row in range(train.answers.n_rows):
            own_BP = counts_BP[:, train.answers.row_P == row]
            assert (own_BP == own_BP[:, :1]).all()
        assert set(counts_BP.sum(axis=1)) == {(one.sample_rows or 12) * N_ORDERS}
    permuted_P, view = with_permuted_gold(train, 5, 0).gold_P, train.answers
    assert (view.answers_P(permuted_P) == view.gold_R(permuted_P)[view.row_P]).all()
    assert sorted(view.gold_R(permuted_P)) == sorted(view.gold_R(train.gold_P)) and (permuted_P != train.gold_P).any()


def test_sql_sees_rows_orders_and_answers(run, results):
    found = query(
        run.directory,
        "select row, count(*) as n, count(distinct ordering) as n_orders, count(distinct answers[gold + 1]) as n_gold "
        "from prompts where split = 'test' and folder = '' group by all",
    ).to_pylist()
    assert [(one["n"], one["n_orders"], one["n_gold"]) for one in found] == [(6, 6, 1)] * N_TEST
    by_answer = query(
        run.directory,
        "select p.row, p.answers[n.option + 1] as answer, avg(n.neg::double) as neg from negs(1) n join prompts p "
        "using (folder, id) where n.neuron = 4 and folder = '' and p.split = 'test' group by all order by all",
    ).to_pylist()
    test = split_of(run)
    expected = dict(zip(test.answers.rows, test.neurons_by_answer([(1, 4)])[..., 0], strict=True))
    for one in by_answer:
        assert one["neg"] == pytest.approx(expected[one["row"]][one["answer"]])
    ordering = query(run.directory, "select distinct ordering from predictions").to_pylist()
    assert len(ordering) == 6


def test_probing_again_says_the_same_and_measures_nothing(run, results):
    receipts = {path: path.stat().st_mtime_ns for path in run.directory.rglob("*.arrow") if "negs" in path.parts}
    again = run_probe(run, PlainSteps())
    assert again.letter_bias == results.letter_bias and again.scores == results.scores
    assert receipts == {path: path.stat().st_mtime_ns for path in receipts}


def test_the_table_is_narrow_and_says_how_often_answers_change(results):
    many = [replace(one, n_incomplete=1, dataset="mini/self-reflection") for one in results.letter_bias]
    (table,) = letter_bias_tables(many)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table)
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines if "─" in line) <= 100
    assert "LM-Prob's answer changes with the order of the options" in table.says
    assert any(shown.title.startswith("Accuracy by letter and by answer") for shown in results.sections[0].tables)


def test_the_command_takes_orders_and_refuses_what_is_not_there(settings, tmp_path):
    common = ["pipeline", "--model", settings["model"][0], "--backend", "local", "--orchestrator", "none"]
    wrong = neg(*common, "--dataset", "mini/linguistic", "--permutations", "5", "--out", tmp_path / "a")
    assert wrong.returncode == 2 and "2 options, so 2 orders, and permutations is 5" in " ".join(wrong.stderr.split())
    wrong = neg(*common, "--dataset", "mini/fact", "--permutations", "many", "--out", tmp_path / "b")
    assert wrong.returncode == 2 and "give a whole number from 1, or 'all'" in " ".join(wrong.stderr.split())
    assert not (tmp_path / "a" / "negs").exists()


@pytest.fixture(scope="module")
def skills(settings, tmp_path_factory):
    more = {"top": [4], "band": 4, "draws": 2, "shift": [0.5], "variant": ["shots"], "permutations": 3, "curves": True}
    run = read_run_file(SkillsRun, None, settings | more | {"out": tmp_path_factory.mktemp("skills")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.show.report.save_figures", lambda figures, folder: [])
        results = run_skills(run, PlainSteps())
    assert results.problems == []
    return run, results


def test_causal_checks_are_told_by_letter_and_by_answer(skills):
    run, results = skills
    (of_model,) = results.findings
    (one,) = of_model.datasets
    assert {row.n_prompts for row in (*one.causal, *one.by_answer.causal_by_answer)} == {N_TEST}
    titles = [table.title for section in results.sections for table in section.tables]
    assert any("by answer" in title for title in titles)
    for name in ("causal_by_answer", "causal_differences_by_answer"):
        assert pa.ipc.open_file(run.directory / "skills" / f"{name}.arrow").read_all().num_rows


def test_accuracy_by_training_rows_takes_rows_with_all_their_orders(skills):
    _, results = skills
    (one,) = results.findings[0].datasets
    assert {row.n_train for row in one.training_rows} == {12 * 3}, "12 rows are fewer than 16: all of them"


def test_steering_asks_each_row_once_in_its_given_order(run, results):
    (of_model,) = plan(run)
    examples = _test(of_model.datasets[0]).examples
    assert len(examples) == N_TEST and {split_id(one.id).order for one in examples} == {"ABC"}
