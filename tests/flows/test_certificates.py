"""Certificates of a run's estimates: sweeps of a random part, against sweeps of all neurons."""

import numpy as np
import pyarrow as pa
import pytest
from support import save_tiny_model, write_questions

from flows.pipeline import count_pipeline_steps, run_pipeline, run_probe
from flows.show.certificate_tables import certificate_tables, percent
from negcore.analysis.certificates import most_in_population
from negcore.errors import NegError
from negcore.measure.loading import load_model
from negcore.measure.sweeps import DEFAULT_SHIFTS, sweep
from negcore.store.reader import open_negs
from negcore.store.study import joined_sweep, read_study
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.plan import plan
from tasks.steps import PlainSteps

SIZES = {"missed_above": 1e-5, "missed_below": 1e-4}  # an estimate below the second is common, so that some are missed


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny_model("llama", folder / "tiny-llama", n_positions=4096)
    values = {"model": [str(model)], "dataset": [write_questions(folder)], "backend": "local", "shard_rows": 8}
    return values | {"max_neurons": 16, "probe": ["magn"]}


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    values = settings | SIZES | {"certify": 5, "certify_rows": 3, "seed": 4, "out": tmp_path_factory.mktemp("run")}
    return read_run_file(SkillRun, None, values)


@pytest.fixture(scope="module")
def results(run):
    results = run_pipeline(run, PlainSteps())
    assert results.problems == []
    return results


def test_every_layer_and_the_model_have_a_row_in_the_table_of_the_run(run, results):
    layers = [row.layer for row in results.certificates]
    assert layers == [0, 1, 2, None]
    assert {row.n_swept for row in results.certificates[:-1]} == {5} and results.certificates[-1].n_swept == 15
    rows = pa.ipc.open_file(run.directory / "certificates.arrow").read_all().to_pylist()
    assert [tuple(row.values()) for row in rows] == [tuple(vars(row).values()) for row in results.certificates]


def test_counts_are_those_of_sweeps_of_all_shifts_made_one_by_one(run, results):
    (sweeps,) = plan(run)[0].datasets[0].sweeps
    lm, test = load_model(run.model[0]), open_negs(run.directory).select(split="test")
    measured = joined_sweep([read_study(sweeps.place.path(run.directory))])
    examples = {example.id: example for example in plan(run)[0].datasets[0].splits[2].examples}
    chosen = [examples[one.id] for one in sweeps.examples]
    twin = sweep(
        lm,
        [one.prompt for one in chosen],
        [one.labels[one.answer] for one in chosen],
        neurons=measured.neurons_K2,
        shifts=DEFAULT_SHIFTS,
    )
    np.testing.assert_allclose(measured.negs_PK, twin.negs_PK, rtol=1e-3, atol=1e-8)
    missed_L, large_L = np.zeros(3, int), np.zeros(3, int)
    for k, (layer, neuron) in enumerate(measured.neurons_K2.tolist()):
        sizes = [
            (abs(twin.negs_PK[p, k]), abs(test.neurons([(layer, neuron)])[test.ids.index(one.id), one.answer, 0]))
            for p, one in enumerate(chosen)
        ]
        large_L[layer] += any(true > 1e-5 for true, _ in sizes)
        missed_L[layer] += any(true > 1e-5 and guess < 1e-4 for true, guess in sizes)
    assert missed_L.sum() > 0
    for row in results.certificates[:-1]:
        assert (row.n_missed, row.n_large) == (missed_L[row.layer], large_L[row.layer])
        assert row.most_missed == most_in_population(row.n_missed, 5, 24) - row.n_missed
        assert row.share == row.most_missed / 19


def test_what_is_certified_of_the_others_is_true_of_them(run, results):
    """All neurons of the tiny model can be swept."""
    (sweeps,) = plan(run)[0].datasets[0].sweeps
    lm, test = load_model(run.model[0]), open_negs(run.directory).select(split="test")
    examples = {example.id: example for example in plan(run)[0].datasets[0].splits[2].examples}
    chosen = [examples[one.id] for one in sweeps.examples]
    prompts, golds = [one.prompt for one in chosen], [one.labels[one.answer] for one in chosen]
    whole = sweep(lm, prompts, golds, neurons="all", shifts=DEFAULT_SHIFTS)
    rows, answers = [test.ids.index(one.id) for one in chosen], [one.answer for one in chosen]
    estimated_PK = test.neurons(whole.neurons_K2)[rows, answers]
    missed_K = ((abs(whole.negs_PK) > 1e-5) & (abs(estimated_PK) < 1e-4)).any(axis=0)
    swept = {tuple(pair) for pair in sweeps.measurement.neurons_K2.tolist()}
    others = np.array([tuple(pair) not in swept for pair in whole.neurons_K2.tolist()])
    for row in results.certificates:
        of_row = others & ((whole.neurons_K2[:, 0] == row.layer) | (row.layer is None))
        assert row.n_others == of_row.sum()
        assert (missed_K & of_row).sum() <= row.most_missed


def test_sizes_that_are_not_named_come_from_the_estimates_alone(settings, tmp_path):
    values = settings | {"certify": 2, "certify_rows": 30, "out": tmp_path}
    results = run_pipeline(read_run_file(SkillRun, None, values), PlainSteps())
    test = open_negs(tmp_path).select(split="test")
    negs_PLN = np.stack([test.layer(layer)[np.arange(test.n_rows), test.gold_P] for layer in range(3)], axis=1)
    row = results.certificates[0]
    assert row.n_rows == test.n_rows == 20
    assert row.above == pytest.approx(np.quantile(np.abs(negs_PLN), 0.99)) and row.below == row.above / 2


def test_certificates_change_no_other_result_and_the_same_run_again_measures_nothing(run, results):
    again = run_pipeline(run, PlainSteps())
    assert sum(part.n_computed for part in again.extracted) == 0 and again.certificates == results.certificates
    plain = run.model_copy(update={"certify": 0})
    assert run_probe(plain, PlainSteps()).scores == results.scores and plain.name == run.name
    assert count_pipeline_steps(run, plan(run)) == count_pipeline_steps(plain, plan(plain)) + 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"certify": 3, "storage": "codes"}, "certify compares values of all neurons"),
        ({"certify": 3, "storage": "stats"}, "certify compares values of all neurons"),
        ({"certify_rows": 3}, "certify-rows is for certificates"),
        ({"missed_above": 0.1}, "missed-above is for certificates"),
        ({"certify": 2, "missed_below": -1}, "greater than 0"),
    ],
)
def test_certificates_that_cannot_be_made_are_refused_before_anything_is_computed(settings, changes, said, tmp_path):
    with pytest.raises(NegError, match=said):
        read_run_file(SkillRun, None, settings | changes | {"out": tmp_path})


def test_a_layer_of_which_all_neurons_are_swept_is_refused_in_the_plan(settings, tmp_path):
    with pytest.raises(NegError, match="certify 24 .*at most 23"):
        plan(read_run_file(SkillRun, None, settings | {"certify": 24, "out": tmp_path}))


def test_the_statement_is_in_words_and_a_bound_is_rounded_up(results):
    (table,) = certificate_tables(results.certificates)
    assert table.says.startswith("With 95 % confidence at most ") and "above 1e-05 while estimated below" in table.says
    assert [percent(share) for share in (0, 0.0246, 0.02401, 0.5, 0.123, 0.99999, 1)] == [
        "0 %", "2.5 %", "2.5 %", "50 %", "13 %", "100 %", "100 %"
    ]  # fmt: skip
