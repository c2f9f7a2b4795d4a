"""Probes fitted on samples of the training rows: valid and test stay, the spread is that of the samples."""

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from support import save_tiny_model, write_questions

from flows.pipeline import count_probe_steps, run_pipeline, run_probe
from flows.show.resample_tables import resample_tables
from negcore.analysis.linearity import bootstrap_weights
from negcore.errors import NegError
from negcore.measure.votes import SCORES
from negcore.probing.evaluation import accuracy
from negcore.probing.fitted import fit_vote
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.config.recipes import RECIPES
from tasks.plan import plan
from tasks.probe import AccuracyRow
from tasks.resamples import ResampleRow
from tasks.steps import PlainSteps


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny_model("llama", folder / "tiny-llama", n_positions=4096)
    values = {"model": [str(model)], "dataset": [write_questions(folder)], "backend": "local", "shard_rows": 8}
    return values | {"max_neurons": 16, "tree_neurons": 10, "workers": 2}


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    samples = {"probe": ["magn", "polar-gxa", "tree", "magn-random"], "train_samples": 4, "seed": 5}
    return read_run_file(SkillRun, None, settings | samples | {"out": tmp_path_factory.mktemp("run")})


@pytest.fixture(scope="module")
def results(run):
    results = run_pipeline(run, PlainSteps())
    assert results.problems == []
    return results


def test_every_probe_that_ranks_and_votes_has_a_row_for_each_sample(run, results):
    assert [(row.probe, row.sample) for row in results.resamples] == [
        (probe, sample) for probe in ("magn", "polar-gxa") for sample in range(4)
    ]
    rows = pa.ipc.open_file(run.directory / "resamples.arrow").read_all().to_pylist()
    assert [tuple(row.values()) for row in rows] == [tuple(vars(row).values()) for row in results.resamples]


@pytest.mark.parametrize("probe", ["magn", "polar-gxa"])
def test_an_accuracy_is_that_of_a_probe_fitted_on_rows_drawn_one_by_one(run, results, probe):
    train, valid, test = (open_negs(run.directory).select(split=split) for split in ("train", "valid", "test"))
    vote, gold_P = RECIPES[probe].vote, train.gold_P.astype(np.int64)
    layers = range(train.n_layers)
    negs_POM = np.concatenate([train.layer(layer) for layer in layers], axis=2)
    flat = np.arange(train.n_layers * train.n_neurons)
    effects_POM = negs_POM * (np.abs(train.activations(flat))[:, None] if vote.signal == "gxa" else 1)
    counts_BP = bootstrap_weights(train.n_rows, 4, run.seed)[1:].astype(int)
    own = [row for row in results.resamples if row.probe == probe]
    for row, counts_P in zip(own, counts_BP, strict=True):
        rows = np.repeat(np.arange(train.n_rows), counts_P)
        scores_M = SCORES[vote.rule](effects_POM[rows], gold_P[rows])
        fitted = fit_vote(vote, scores_M, valid, max_neurons=run.max_neurons)
        expected = accuracy(test.gold_P, fitted.predict(test))
        assert (row.n_neurons, row.n_correct, row.n_test) == (fitted.n_kept, expected.n_correct, test.n_rows)


@pytest.fixture(scope="module")
def by_seed(run):
    """Probes of the same shards on 3 samples of 7 of the 20 training rows each."""
    changes = {"train_samples": 3, "sample_rows": 7, "seed": 5}
    return run_probe(run.model_copy(update=changes), PlainSteps())


def test_a_sample_of_fewer_rows_gives_what_a_run_with_that_limit_and_seed_gives(settings, by_seed, tmp_path):
    for seed in (5, 6, 7):
        values = settings | {"probe": ["magn", "polar-gxa"], "out": tmp_path / f"{seed}"}
        limited = read_run_file(SkillRun, None, values | {"limit": 7, "eval_limit": 20, "seed": seed})
        of_limit = {row.probe: row for row in run_pipeline(limited, PlainSteps()).scores}
        for row in (row for row in by_seed.resamples if row.seed == seed):
            expected = of_limit[row.probe]
            assert (row.n_train, row.n_train_all) == (expected.n_train, 20) == (7, 20)
            assert (row.n_neurons, row.n_correct, row.n_test) == (
                expected.n_neurons,
                expected.n_correct,
                expected.n_test,
            )


def test_a_table_says_under_which_seeds_samples_were_drawn(by_seed):
    assert [(row.probe, row.sample, row.seed) for row in by_seed.resamples] == [
        (probe, sample, 5 + sample) for probe in ("magn", "polar-gxa") for sample in range(3)
    ]
    (table,) = resample_tables(by_seed.resamples, by_seed.scores)
    assert "3 samples of the training rows, drawn without replacement under the seeds 5 to 7" in table.caption
    assert table.blocks[0][0][2] == "7 of 20"


@pytest.mark.parametrize("n_rows", [20, 21])
def test_samples_that_would_hold_all_rows_are_refused_before_anything_is_measured(settings, n_rows, tmp_path):
    values = settings | {"train_samples": 2, "sample_rows": n_rows, "out": tmp_path / "run"}
    with pytest.raises(
        NegError, match=rf"questions: samples are to have {n_rows} rows, and there are 20 training rows"
    ):
        run_pipeline(read_run_file(SkillRun, None, values), PlainSteps())
    assert not list((tmp_path / "run").rglob("*.arrow"))


def test_samples_change_no_other_result_and_are_the_same_on_one_worker(run, results):
    plain = run_probe(run.model_copy(update={"train_samples": 0}), PlainSteps())
    assert (plain.scores, plain.resamples) == (results.scores, [])
    assert run_probe(run.model_copy(update={"workers": 1}), PlainSteps()).resamples == results.resamples


def test_the_steps_of_the_samples_are_counted(run):
    models = plan(run)
    plain = run.model_copy(update={"train_samples": 0})
    assert count_probe_steps(run, models) == count_probe_steps(plain, models) + 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_samples": 1}, "one sample has no spread: set it to 2 or more, or to 0"),
        ({"train_samples": -1}, "greater than or equal to 0"),
        ({"sample_rows": 4}, "no samples are drawn: set --train-samples to their number"),
        ({"train_samples": 4, "storage": "stats"}, "storage 'stats' does not keep"),
        ({"train_samples": 4, "probe": ["tree", "magn-random"]}, "train-samples is for the probes polar, magn"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused_before_anything_is_computed(settings, changes, said, tmp_path):
    with pytest.raises(NegError, match=said):
        read_run_file(SkillRun, None, settings | changes | {"out": tmp_path})


def score(dataset, n_correct):
    counts = {"n_correct": n_correct, "n_test": 10, "n_train": 40, "accuracy": n_correct / 10, "low": 0.0, "high": 1.0}
    names = {"model": "m", "shots": 0, "genre": "", "dataset": dataset, "group": "", "probe": "magn"}
    return AccuracyRow(**names, n_neurons=1, **counts, majority=0.5, random=0.5, overlapping=False)


def test_mean_spread_and_average_by_pencil():
    samples = {"a": (0.2, 0.4), "b": (0.6, 1.0)}
    rows = [
        ResampleRow("m", 0, dataset, "magn", sample, None, 40, 40, 1, value, round(10 * value), 10)
        for dataset, values in samples.items()
        for sample, value in enumerate(values)
    ]
    (table,) = resample_tables(rows, [score("a", 5), score("b", 9)])
    console = Console(width=100, record=True, force_terminal=False)
    console.print(table)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["a", "Magn", "40", "of", "40", ".500", ".300", ".141", ".200", ".400"] in lines
    assert ["b", "Magn", "40", "of", "40", ".900", ".800", ".283", ".600", "1.00"] in lines
    assert ["average", "of", "2", "Magn", ".700", ".550", ".212", ".400", ".700"] in lines
