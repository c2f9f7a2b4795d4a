"""What stands beside accuracies: floors of the test rows, the label mass, and what is said where it is small."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from stored_negs import N_OPTIONS, N_ROWS, numbers, write_split

from negcore.datasets import Example
from negcore.probing.evaluation import accuracy, majority_floor
from negcore.probing.floors import CalibratedLMProbe, OptionsFloor
from tasks.floors import FloorAnswers, best_floor, mass_warnings, mean_beside
from tasks.probe import AccuracyRow
from tasks.rundir.tables import write_table

SPLITS = ("train", "valid", "test")
WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


@pytest.fixture
def stored(tmp_path):
    return {split: write_split(tmp_path, split, numbers(split)) for split in SPLITS}


def dataset(stored, changed=lambda example: example):
    """The prompts of the stored rows; the gold option is the first in the alphabet."""
    rng = np.random.default_rng(0)

    def example(row, gold):
        options = sorted(rng.choice(WORDS, N_OPTIONS, replace=False).tolist())
        options.insert(gold, options.pop(0))
        return changed(Example(row, "?", (" A", " B", " C"), gold, "", tuple(options)))

    splits = {
        name: tuple(example(row, int(gold)) for row, gold in zip(split.ids, split.gold_P, strict=True))
        for name, split in stored.items()
    }
    return SimpleNamespace(name="d", splits=splits)


def test_prompts_are_those_of_the_stored_rows(stored):
    for name, split in stored.items():
        assert [one.id for one in dataset(stored).splits[name]] == split.ids


def test_floors_are_fitted_on_train_and_measured_on_the_test_rows_asked_for(stored):
    prompts = dataset(stored)
    found = FloorAnswers(prompts, stored["train"], stored["test"], seed=3)
    assert found.warning == ""
    (train, _, test), gold_P = stored.values(), stored["test"].gold_P
    options_P = OptionsFloor(random_state=3).fit(prompts.splits["train"], train.gold_P).predict(prompts.splits["test"])
    calibrated_P = CalibratedLMProbe().fit(train.probs_PO, train.gold_P).predict(test.probs_PO)
    for rows in (np.arange(N_ROWS), np.array([1, 7, 8])):
        assert found.beside(rows) == {
            "random": 1 / N_OPTIONS,
            "majority": majority_floor(train.gold_P, gold_P[rows]).value,
            "options_only": accuracy(gold_P[rows], options_P[rows]).value,
            "calibrated": accuracy(gold_P[rows], calibrated_P[rows]).value,
            "label_mass": pytest.approx(float(sum(sum(test.probs_PO[row].tolist()) for row in rows) / len(rows))),
        }
    assert found.beside(np.arange(N_ROWS))["options_only"] > 0.9


@pytest.mark.parametrize(
    "changed",
    [lambda one: replace(one, id=one.id + "x"), lambda one: replace(one, prompt="other")],
    ids=["other rows", "another wording"],
)
def test_stored_rows_that_are_not_those_of_the_run_file_have_no_floor_of_options_and_say_so(stored, changed):
    found = FloorAnswers(dataset(stored, changed), stored["train"], stored["test"], seed=0)
    assert "d: the stored rows are not those of the run file" in found.warning
    beside = found.beside(np.arange(N_ROWS))
    assert beside["options_only"] is None
    assert beside["calibrated"] is not None and beside["label_mass"] is not None


def row(**changes):
    fields = {"model": "m", "shots": 0, "genre": "g", "dataset": "d", "group": "", "probe": "lm", "n_neurons": None}
    fields |= {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n_correct": 5, "n_test": 10, "n_train": 20}
    fields |= {"majority": 0.3, "random": 0.25, "overlapping": False}
    return AccuracyRow(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("majority", 0.3)),
        ({"random": 0.5}, ("random", 0.5)),
        ({"options_only": 0.6, "calibrated": 0.4}, ("options_only", 0.6)),
        ({"options_only": 0.3, "calibrated": 0.3}, ("majority", 0.3)),
        ({"calibrated": 0.7}, ("calibrated", 0.7)),
    ],
)
def test_the_best_floor_is_the_highest_that_is_known(changes, expected):
    assert best_floor(row(**changes)) == expected


def test_the_mean_lacks_what_one_of_its_datasets_lacks():
    rows = [row(options_only=0.2, label_mass=0.5), row(options_only=0.6, random=0.5, calibrated=0.5, label_mass=1.0)]
    assert mean_beside(rows) == {
        "random": 0.375,
        "majority": 0.3,
        "options_only": pytest.approx(0.4),
        "calibrated": None,
        "label_mass": 0.75,
    }


def test_small_label_masses_are_warned_about_in_one_line_for_each_way_of_asking():
    asked = [("m, zero-shot", "a", 0.043), ("m, zero-shot", "b", 0.5), ("m, zero-shot", "c", 0.4999)]
    asked += [("m, one-shot", "a", 0.9), ("n, zero-shot", "a", 0.1), ("n, zero-shot", "old", None)]
    first, second = mass_warnings(asked)
    assert first.startswith("m, zero-shot: less than half of the model's probability")
    assert "(a 0.043, c 0.500;" in first
    assert second.startswith("n, zero-shot") and "(a 0.100;" in second
    assert mass_warnings([("m, one-shot", "a", 0.5)]) == []


def test_no_warning_of_scikit_learn_reaches_the_user(stored, recwarn):
    FloorAnswers(dataset(stored), stored["train"], stored["test"], seed=0)
    assert [str(one.message) for one in recwarn] == []


def test_a_table_has_a_column_for_every_floor_and_the_label_mass(tmp_path):
    write_table(tmp_path / "accuracy.arrow", AccuracyRow, [vars(row(options_only=0.5, label_mass=0.9))])
    (read,) = pa.ipc.open_file(pa.memory_map(str(tmp_path / "accuracy.arrow"))).read_all().to_pylist()
    assert (read["options_only"], read["calibrated"], read["label_mass"]) == (0.5, None, 0.9)


def test_no_floor_is_best_where_none_is_known():
    assert best_floor(row(), ["options_only", "calibrated"]) is None
