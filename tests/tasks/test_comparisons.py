"""Comparisons of a run's probes: who is paired with whom, over which rows, corrected for how many."""

from itertools import combinations

import numpy as np
import pytest

from negcore.probing.paired import paired
from tasks.comparisons import comparisons
from tasks.predictions import Predictions

PROBES = ("lm", "polar", "magn")


def answers(dataset, n_rows=40, model="m", shots=0, probes=PROBES):
    """Answers of probes that are the better the later they come."""
    rng = np.random.default_rng(list(dataset.encode()))
    gold = rng.integers(0, 3, n_rows)
    guessed = {
        probe: np.where(rng.random(n_rows) < 0.4 + 0.2 * i, gold, (gold + 1) % 3) for i, probe in enumerate(probes)
    }
    return Predictions(model, shots, dataset, [f"{dataset}/{i}" for i in range(n_rows)], [""] * n_rows, gold, guessed)


def test_every_two_probes_are_compared_on_the_rows_of_each_dataset():
    asked = [answers("a"), answers("b", 30)]
    rows = comparisons(asked)
    assert [(row.dataset, row.first, row.second) for row in rows] == [
        (dataset, *pair) for dataset in ("a", "b", "") for pair in combinations(PROBES, 2)
    ]
    for row in rows[:6]:
        (one,) = (one for one in asked if one.dataset == row.dataset)
        expected = paired(one.predicted_P[row.first] == one.gold_P, one.predicted_P[row.second] == one.gold_P)
        assert (row.n_test, row.n_first, row.n_second) == (expected.n, expected.n_first, expected.n_second)
        assert (row.difference, row.p) == (expected.difference, expected.p)


def test_over_all_datasets_every_row_counts_once():
    asked = [answers("a"), answers("b", 30)]
    right = {p: np.concatenate([one.predicted_P[p] == one.gold_P for one in asked]) for p in PROBES}
    for row in (row for row in comparisons(asked) if not row.dataset):
        expected = paired(right[row.first], right[row.second])
        assert (row.n_test, row.difference, row.p) == (70, expected.difference, expected.p)


def test_one_dataset_has_no_comparison_over_all():
    assert {row.dataset for row in comparisons([answers("a")])} == {"a"}


def test_p_is_corrected_for_all_comparisons_of_the_model_and_those_over_all_datasets_apart():
    rows = comparisons([answers("a"), answers("b"), answers("a", model="n"), answers("a", shots=1)])
    counted = {(row.model, row.shots, row.dataset): row.n_comparisons for row in rows}
    assert counted == {
        ("m", 0, "a"): 6,
        ("m", 0, "b"): 6,
        ("m", 0, ""): 3,
        ("n", 0, "a"): 3,
        ("m", 1, "a"): 3,
    }
    assert all(row.p <= row.p_corrected <= min(1, row.p * row.n_comparisons) for row in rows)
    (least,) = sorted((r for r in rows if (r.model, r.shots) == ("m", 0) and r.dataset), key=lambda r: r.p)[:1]
    assert least.p_corrected == pytest.approx(min(1, 6 * least.p))


def test_a_single_probe_is_compared_with_none():
    assert comparisons([answers("a", probes=("lm",)), answers("b", probes=("lm",))]) == []
