"""Analyses of sweeps on numbers that fit on paper, and against slower ways of saying the same."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import scipy.stats

from negcore.analysis.linearity import (
    Facts,
    active_sets_table,
    active_table,
    agreement_table,
    bootstrap_weights,
    interventions_table,
    nested_grid,
    ranges_table,
    sizes_table,
    stability_table,
    top_overlap,
    weighted_pearson,
)
from negcore.measure.sweeps import SweepResult


def a_sweep(changes_PKS, shifts, neurons):
    changes = np.asarray(changes_PKS, np.float64)
    return SweepResult(
        neurons_K2=np.array(neurons),
        shifts_S=np.array(shifts, np.float64),
        base_P=np.full(len(changes), 0.5),
        activations_PK=np.ones(changes.shape[:2]),
        values_PKS=0.5 + changes,
        label_ids_P=np.zeros(len(changes), np.int64),
    )


def agreement(negs, scores, name="neurgrad", **settings):
    """The row of the whole model, with one neuron a layer unless told otherwise."""
    negs, scores = np.asarray(negs, np.float64), np.asarray(scores, np.float64)
    neurons = settings.pop("neurons", np.array([(0, n) for n in range(negs.shape[1])]))
    return agreement_table(name, 2, negs, scores, neurons, n_bootstrap=settings.pop("n_bootstrap", 50), **settings)


def test_the_grid_holds_evenly_spaced_shifts_of_every_range_once():
    assert nested_grid([1, 2], 2).tolist() == [-2, -1, -0.5, 0.5, 1, 2]


def test_linear_bent_and_constant_neurons_are_told_apart():
    shifts = [-2, -1, 1, 2]
    sweep = a_sweep([[[-0.2, -0.1, 0.1, 0.2], [0.4, 0.1, 0.1, 0.4], [0, 0, 0, 0]]], shifts, [(0, 0), (0, 1), (1, 0)])
    whole, first, second = ranges_table(sweep, [2])
    assert (whole.n, whole.n_constant, first.n_constant, second.n_constant) == (3, 1, 0, 1)
    assert whole.linear_share == pytest.approx(1 / 3)
    assert (first.layer, first.linear_share, first.positive_share) == (0, 0.5, 1.0)
    assert (second.layer, second.linear_share) == (1, 0.0)
    assert np.isnan(second.positive_share)


def test_a_neuron_that_saturates_is_linear_within_a_small_range_only():
    shifts = [-10, -1, -0.5, 0.5, 1, 10]
    sweep = a_sweep([[[0.1, -0.1, -0.05, 0.05, 0.1, 0.1]]], shifts, [(0, 0)])
    shares = {row.range: row.linear_share for row in ranges_table(sweep, [1, 10]) if row.layer is None}
    assert shares == {1: 1.0, 10: 0.0}


def test_sizes_of_negs_by_layer():
    whole, first, second = sizes_table(np.array([[1.0, -3.0], [-2.0, 4.0]]), np.array([(0, 0), (1, 0)]))
    assert (whole.n, whole.mean, whole.q50, whole.largest) == (4, 2.5, 2.5, 4)
    assert (first.layer, first.q50, first.largest) == (0, 1.5, 2)
    assert (second.layer, second.q50, second.q25) == (1, 3.5, 3.25)


def test_stability_compares_the_pairs_it_names():
    facts = Facts(
        facts=["a", "a", "b", "c"],
        wordings=["P1-x", "P1-y", "P1-y", "P2-z"],
        answers=[" A", " A", " A", " A"],
    )
    negs = np.array([[1, 2, 3, 0], [2, 4, 6, 1], [-1, -2, -3, 1], [3, -2, 1, -1]], float)
    rows = {row.pairs: row for row in stability_table(negs, facts)}
    assert {name: row.n_pairs for name, row in rows.items()} == {
        "all": 6,
        "same fact, other wording": 1,
        "same relation and answer, other wording": 2,
        "same wording": 1,
        "other relation": 3,
    }
    same = rows["same fact, other wording"]
    assert (same.sign_agreement, same.sign_agreement_sd) == (1.0, 0.0)  # the zero is left out
    assert same.pearson == pytest.approx(np.corrcoef(negs[0], negs[1])[0, 1])
    other = rows["same wording"]  # of four signs only the last agrees
    assert other.sign_agreement == 0.25
    assert other.size_spearman == pytest.approx(scipy.stats.spearmanr(abs(negs[1]), abs(negs[2]))[0])


def test_a_kind_of_pairs_that_no_prompts_form_has_no_row():
    facts = Facts(facts=["a", "b"], wordings=["P1-x", "P2-x"], answers=["A", "B"])
    rows = stability_table(np.array([[1.0, 2.0], [1.0, -2.0]]), facts)
    assert [(row.pairs, row.sign_agreement) for row in rows] == [("all", 0.5), ("other relation", 0.5)]


def test_a_perfect_estimator_agrees_in_everything():
    negs = np.array([[0.1, -0.2, 0.3], [0.5, -0.1, 0.2]])
    (row, _) = agreement(negs, negs)
    assert (row.pearson, row.spearman, row.signs, row.top) == pytest.approx((1, 1, 1, 1))
    assert (row.mae, row.n, row.layer) == (0, 6, None)
    assert (row.pearson_low, row.pearson_high, row.mae_high) == pytest.approx((1, 1, 0))


def test_signs_and_errors_are_counted_with_a_pencil():
    (row, _) = agreement([[1, -2, 0, 4]], [[3, 2, 1, 0]])
    assert row.signs == 0.5  # of the two neurons where neither is zero
    assert row.mae == (2 + 4 + 1 + 4) / 4
    assert row.top == 0.0


def test_only_estimators_in_the_unit_of_neg_have_an_error():
    negs = [[0.1, -0.2, 0.3]]
    assert agreement(negs, negs, "ablation")[0].mae is None
    assert agreement(negs, negs, "ablation")[0].mae_low is None
    assert agreement(negs, negs, "gradient")[0].mae == 0


def test_the_rows_of_layers_hold_their_own_neurons_only():
    negs = np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 5.0, 3.0]])
    scores = negs * [1, 1, -1, -1]
    rows = agreement(negs, scores, neurons=np.array([(0, 0), (0, 1), (7, 2), (7, 3)]))
    assert [(row.layer, round(row.pearson, 9), row.signs) for row in rows[1:]] == [(0, 1.0, 1.0), (7, -1.0, 0.0)]


def test_correlations_are_those_of_scipy_over_all_prompts_and_neurons():
    random = np.random.default_rng(0)
    negs = random.normal(size=(5, 40)) * 1e-9
    scores = (negs + random.normal(size=(5, 40)) * 1e-9).round(10)  # with ties
    (row, _) = agreement(negs, scores)
    assert row.pearson == pytest.approx(scipy.stats.pearsonr(scores.ravel(), negs.ravel())[0])
    assert row.spearman == pytest.approx(scipy.stats.spearmanr(scores.ravel(), negs.ravel())[0])
    assert row.pearson_low < row.pearson < row.pearson_high


def test_a_sample_of_prompts_is_what_repeating_them_would_give():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 4, 9))
    weights = bootstrap_weights(4, 6, seed=2)
    assert weights[0].tolist() == [1, 1, 1, 1]
    assert (weights.sum(1) == 4).all()
    for weight, r in zip(weights, weighted_pearson(x, y, weights), strict=True):
        rows = np.repeat(np.arange(4), weight.astype(int))
        assert r == pytest.approx(np.corrcoef(x[rows].ravel(), y[rows].ravel())[0, 1])


def test_constant_scores_have_no_correlation():
    (row, _) = agreement([[1, 2, 3]], [[0.1, 0.1, 0.1]])
    assert np.isnan([row.pearson, row.spearman, row.pearson_low]).all()
    assert row.signs == 1


def test_intervals_are_the_same_for_the_same_seed():
    negs, scores = np.random.default_rng(3).normal(size=(2, 6, 5))
    assert agreement(negs, scores, seed=1) == agreement(negs, scores, seed=1)
    assert agreement(negs, scores, seed=1)[0].pearson_low != agreement(negs, scores, seed=2)[0].pearson_low


def test_the_top_is_one_percent_of_a_prompts_neurons_by_size():
    x, y = np.zeros((2, 200)), np.zeros((2, 200))
    x[:, [3, 5]] = -9, 8
    y[0, [3, 5]] = 1, -1
    y[1, [3, 6]] = 7, 7
    assert top_overlap(x, y).tolist() == [1.0, 0.5]


def test_interventions_are_correlated_by_shift_and_size():
    predicted = np.array([[[1.0, 2.0, 3.0]], [[2.0, 4.0, 1.0]]])  # two prompts, one shift, two sets of 1 and one of 2
    changes = np.array([[[1.0, 2.0, -3.0]], [[2.0, 4.0, 1.0]]])
    one, two = interventions_table([0.5], np.array([1, 1, 2]), predicted, changes, n_bootstrap=20)
    assert (one.shift, one.set_size, one.n, one.signs, one.ratio) == (0.5, 1, 4, 1.0, 1.0)
    assert one.pearson == pytest.approx(1)
    assert (two.set_size, two.n, two.signs, two.ratio) == (2, 2, 0.5, -0.5)
    assert two.pearson == pytest.approx(-1)


# Mixtures of experts: numbers of neurons that a prompt does not have are masked


@pytest.fixture
def mixed():
    """NEGs and estimates of 6 prompts and 8 neurons of 3 layers, some of them absent: all of the last layer."""
    rng = np.random.default_rng(0)
    negs = rng.normal(size=(6, 8))
    there = rng.random((6, 8)) < 0.6
    there[:, 7] = False
    there[5, :3] = False  # of the first layer, the last prompt has nothing
    neurons = np.array([(0, 1), (0, 4), (0, 5), (1, 0), (1, 2), (1, 3), (1, 9), (2, 0)])
    scores = negs + 0.5 * rng.normal(size=negs.shape)
    return np.ma.masked_array(negs, ~there), np.ma.masked_array(scores, ~there), neurons


def test_ranges_count_the_neurons_that_prompts_have(mixed):
    there = ~mixed[0].mask
    changes = mixed[0].data[:, :, None] * np.array([-2, -1, 1, 2]) ** np.where(np.arange(8) % 2, 1, 2)[:, None]
    sweep = replace(a_sweep(changes * there[:, :, None], [-2, -1, 1, 2], mixed[2]), active_PK=there)
    rows = ranges_table(sweep, [2])
    assert [row.layer for row in rows] == [None, 0, 1]
    assert rows[0].n == there.sum() and rows[1].n == there[:, :3].sum()
    assert rows[0].n_constant == 0
    assert rows[0].linear_share == pytest.approx(there[:, 1::2].sum() / there.sum())


def test_sizes_and_agreement_are_those_of_the_neurons_that_prompts_have(mixed):
    negs, scores, neurons = mixed
    sizes = sizes_table(negs, neurons)
    rows = agreement_table("neurgrad", 2, negs, scores, neurons, n_bootstrap=20)
    assert [row.layer for row in sizes] == [row.layer for row in rows] == [None, 0, 1]
    for size, row in zip(sizes, rows, strict=True):
        chosen = np.full(8, True) if row.layer is None else neurons[:, 0] == row.layer
        pairs = [(p, k) for p in range(6) for k in np.flatnonzero(chosen) if not negs.mask[p, k]]
        x, y = (np.array([values.data[pair] for pair in pairs]) for values in (scores, negs))
        assert size.n == row.n == len(pairs)
        assert (size.mean, size.q75) == pytest.approx((np.abs(y).mean(), np.quantile(np.abs(y), 0.75)))
        assert row.pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert row.spearman == pytest.approx(scipy.stats.spearmanr(x, y)[0])
        assert row.signs == pytest.approx((np.sign(x) == np.sign(y)).mean())
        assert row.mae == pytest.approx(np.abs(x - y).mean())
        best = []
        for p in {p for p, _ in pairs}:
            own = [k for q, k in pairs if q == p]
            best.append(max(own, key=lambda k: abs(negs.data[p, k])) == max(own, key=lambda k: abs(scores.data[p, k])))
        assert row.top == pytest.approx(np.mean(best))
        assert row.pearson_low < row.pearson < row.pearson_high


def test_an_estimate_is_compared_where_both_it_and_the_neg_are_there(mixed):
    negs, scores, neurons = mixed
    more = np.ma.masked_array(scores.data, scores.mask & (np.arange(8) > 5))
    rows, expected = (agreement_table("gradient", 2, negs, one, neurons, n_bootstrap=20) for one in (more, scores))
    assert rows == expected


def test_two_prompts_are_compared_by_the_neurons_that_both_have(mixed):
    negs, _, _ = mixed
    facts = Facts(facts=list("abcdef"), wordings=["P1-x"] * 6, answers=["A"] * 6)
    (row,) = [row for row in stability_table(negs, facts) if row.pairs == "all"]
    found = []
    for one, other in combinations(range(6), 2):
        both = np.flatnonzero(~negs.mask[one] & ~negs.mask[other])
        if len(both) > 1:
            x, y = negs.data[one, both], negs.data[other, both]
            found.append(
                ((np.sign(x) == np.sign(y)).mean(), np.corrcoef(x, y)[0, 1], scipy.stats.spearmanr(abs(x), abs(y))[0])
            )
    assert row.n_pairs == len(found) < 15
    assert (row.sign_agreement, row.pearson, row.size_spearman) == pytest.approx(np.nanmean(found, axis=0))


def test_sets_of_which_a_prompt_has_nothing_are_in_no_correlation():
    rng = np.random.default_rng(1)
    predicted, noise = np.abs(rng.normal(size=(5, 1, 4))), rng.normal(size=(5, 1, 4))
    sizes, n_shifted = np.array([1, 4, 1, 4]), np.array([[0, 2, 1, 4]] * 4 + [[1, 0, 0, 3]])
    nothing = n_shifted[:, None] == 0
    true = predicted + noise
    rows = interventions_table(
        [1.0], sizes, np.ma.masked_array(predicted, nothing), np.ma.masked_array(true, nothing), n_bootstrap=20
    )
    for row in rows:
        pairs = [(p, 0, m) for p in range(5) for m in np.flatnonzero(sizes == row.set_size) if n_shifted[p, m]]
        x, y = (np.array([values[pair] for pair in pairs]) for values in (predicted, true))
        assert row.n == len(pairs)
        assert row.pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert row.signs == pytest.approx((np.sign(x) == np.sign(y)).mean())
        assert row.ratio == pytest.approx(y.sum() / x.sum())
    first, second = active_sets_table(n_shifted, sizes)
    assert (first.set_size, first.n, first.n_active, first.mean_shifted) == (1, 10, 5, 1.0)
    assert (second.n, second.n_active, second.mean_shifted) == (10, 9, pytest.approx((8 + 16 + 3) / 9))


def test_neurons_that_prompts_have_are_counted_by_layer(mixed):
    negs, _, neurons = mixed
    rows = active_table(~negs.mask, neurons)
    assert [(row.layer, row.n, row.n_active) for row in rows] == [
        (None, 48, (~negs.mask).sum()),
        (0, 18, (~negs.mask[:, :3]).sum()),
        (1, 24, (~negs.mask[:, 3:7]).sum()),
        (2, 6, 0),
    ]
