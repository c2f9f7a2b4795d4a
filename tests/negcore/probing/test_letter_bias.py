"""Letter bias of probes that are made to have one, and intervals of rows that are asked several times."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import t as student

from negcore.errors import NegError
from negcore.orders import ordered_id
from negcore.probing.evaluation import Accuracy, accuracy, independent_prompts
from negcore.probing.letter_bias import letter_bias
from negcore.store.answers import AnswerView

N_ROWS = 40


def rows_in_orders(n_rows=N_ROWS, n_options=4, orders=None):
    """Return a view of rows in all orders (or some), and the gold letter of each prompt."""
    orders = orders or [*permutations(range(n_options))]
    gold_R = np.arange(n_rows) * 7 % n_options
    ids = [ordered_id(f"{row}", order) for row in range(n_rows) for order in orders]
    gold_P = np.array([order.index(gold_R[row]) for row in range(n_rows) for order in orders])
    return AnswerView.of(ids, n_options, permuted=True), gold_P, gold_R


def test_a_scorer_of_letters_alone_is_found_out_exactly():
    view, gold_P, gold_R = rows_in_orders()
    scores_PO = np.tile(np.array([0.1, 0.5, 0.3, 0.2], np.float32), (len(gold_P), 1))
    bias = letter_bias(view, gold_P, scores_PO.argmax(axis=1), scores_PO)
    assert bias.by_letter.value == 1 / 4 and bias.given.value == (gold_R == 1).mean()
    assert bias.gain.value == pytest.approx((gold_R == 1).mean() - 1 / 4)
    assert bias.inconsistent.value == 1 and bias.always.value == 0
    assert bias.by_answer.value == (gold_R == 0).mean(), "all answers are equally good: the first is taken"
    assert bias.chosen_O.tolist() == [0, 1, 0, 0] and bias.gold_O.tolist() == [1 / 4] * 4
    assert bias.from_gold == bias.from_uniform == 3 / 4
    assert bias.n_orders == 24 and bias.n_incomplete == 0


def test_a_scorer_of_answers_alone_has_none():
    view, gold_P, gold_R = rows_in_orders()
    believed_R = np.where(np.arange(N_ROWS) < 30, gold_R, (gold_R + 1) % 4)
    predicted_P = view.letters_P(believed_R)
    bias = letter_bias(view, gold_P, predicted_P, np.eye(4)[predicted_P])
    assert bias.given.value == bias.by_letter.value == bias.by_answer.value == bias.always.value == 30 / 40
    assert bias.inconsistent.value == 0 and bias.gain.value == 0
    assert bias.from_uniform == bias.from_gold == 0
    assert bias.by_letter.interval == pytest.approx(bias.given.interval), "40 rows, however often they are asked"
    assert bias.right_R.sum() == 30


@pytest.mark.parametrize("strength", [0.0, 0.4, 2.0])
def test_a_mixture_is_measured_as_it_was_made_and_answers_take_the_letter_away(strength):
    """Scores are content plus a bonus for B: with all orders each answer gets the bonus equally often."""
    view, gold_P, gold_R = rows_in_orders()
    content_RA = np.random.default_rng(0).normal(size=(N_ROWS, 4)) + np.eye(4)[gold_R]
    scores_PO = np.take_along_axis(content_RA[view.row_P], view.answer_PO, axis=1) + strength * np.eye(4)[1]
    predicted_P = scores_PO.argmax(axis=1)
    bias = letter_bias(view, gold_P, predicted_P, scores_PO)
    assert bias.by_answer.value == (content_RA.argmax(axis=1) == gold_R).mean()
    assert bias.by_letter.value == (predicted_P == gold_P).mean()
    chosen = [{view.answers_P(predicted_P)[at] for at in np.flatnonzero(view.row_P == row)} for row in range(N_ROWS)]
    assert bias.inconsistent.value == np.mean([len(one) > 1 for one in chosen])
    right = [(predicted_P == gold_P)[view.row_P == row] for row in range(N_ROWS)]
    assert bias.always.value == np.mean([one.all() for one in right])
    differences = np.array([one[0] - one.mean() for one in right])
    half = student.ppf(0.975, N_ROWS - 1) * differences.std(ddof=1) / N_ROWS**0.5
    assert bias.gain.interval == pytest.approx((differences.mean() - half, differences.mean() + half))
    assert bias.from_gold == pytest.approx(np.abs(np.bincount(predicted_P, minlength=4) / len(gold_P) - 0.25).sum() / 2)


def test_rows_that_lack_an_order_are_left_out_and_counted():
    view, gold_P, _ = rows_in_orders(6, 3)
    kept = np.delete(np.arange(len(gold_P)), [0, 8])  # the given order of the first row, and another of the second
    ids = [ordered_id(view.rows[view.row_P[at]], tuple(view.answer_PO[at])) for at in kept]
    fewer = AnswerView.of(ids, 3, permuted=True)
    scores_PO = np.random.default_rng(0).random((len(gold_P), 3))
    bias = letter_bias(fewer, gold_P[kept], scores_PO[kept].argmax(axis=1), scores_PO[kept])
    whole, at = view.select(np.arange(6) >= 2)
    same = letter_bias(whole, gold_P[at], scores_PO[at].argmax(axis=1), scores_PO[at])
    assert bias.n_incomplete == 2 and bias.given.n == 4
    assert (bias.by_letter, bias.by_answer, bias.gain) == (same.by_letter, same.by_answer, same.gain)
    assert bias.chosen_O.tolist() == same.chosen_O.tolist()


def test_nothing_is_compared_where_no_row_is_whole():
    view = AnswerView.of([ordered_id("x", (1, 0))], 2, permuted=True)
    with pytest.raises(NegError, match="no row has all orders"):
        letter_bias(view, np.array([0]), np.array([0]), np.ones((1, 2)))


# Intervals of rows that are asked several times


def test_rows_that_are_asked_once_have_the_interval_that_they_had():
    gold, predicted = np.zeros(30, int), np.arange(30) % 4
    assert accuracy(gold, predicted, np.arange(30)) == accuracy(gold, predicted) == Accuracy(8, 30)


def test_a_row_that_is_always_answered_alike_counts_once():
    row_P = np.repeat(np.arange(20), 6)
    right_R = np.arange(20) < 13
    assert independent_prompts(right_R[row_P], row_P) == 20
    one, six = accuracy(right_R, np.ones(20, bool)), accuracy(right_R[row_P], np.ones(120, bool), row_P)
    assert six.n == 120 and six.interval == pytest.approx(one.interval)
    for value in (0, 1):
        assert independent_prompts(np.full(120, bool(value)), row_P) == 20


def test_prompts_with_nothing_in_common_count_each():
    right_P = np.tile([True, False], 60)
    assert independent_prompts(right_P, np.repeat(np.arange(20), 6)) == 120


def test_numbers_of_independent_prompts_add_up():
    row_P = np.repeat(np.arange(20), 2)
    some = accuracy(np.arange(40) % 4 < 2, np.ones(40, bool), row_P)
    assert (some + Accuracy(3, 5)).n_independent == some.n_independent + 5
    assert (Accuracy(3, 5) + Accuracy(1, 2)).n_independent is None


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_intervals_hold_the_accuracy_in_about_95_of_100_samples_of_rows(spread):
    rng = np.random.default_rng(3)
    n_rows, n_orders, n_samples = 40, 6, 600
    skills = 1 / (1 + np.exp(-(0.4 + spread * rng.normal(size=200_000))))
    true, row_P = skills.mean(), np.repeat(np.arange(n_rows), n_orders)
    held = naive = 0
    for _ in range(n_samples):
        right_P = rng.random(n_rows * n_orders) < np.repeat(rng.choice(skills, n_rows), n_orders)
        clustered = accuracy(right_P, np.ones(len(right_P), bool), row_P).interval
        plain = accuracy(right_P, np.ones(len(right_P), bool)).interval
        held += clustered.low <= true <= clustered.high
        naive += plain.low <= true <= plain.high
    assert 0.925 < held / n_samples < 0.985
    if spread == 3.0:
        assert naive / n_samples < 0.8, "prompts of a row are not independent"
