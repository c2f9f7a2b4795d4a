"""Causal checks and curves of rows that were asked in several orders of their options."""

from itertools import permutations

import numpy as np
import pytest

from negcore.analysis.causal import CausalResult, Condition
from negcore.analysis.effects import causal_differences, causal_rows
from negcore.analysis.faithfulness import Condition as CurveCondition
from negcore.analysis.faithfulness import curve_rows
from negcore.errors import NegError
from negcore.measure.ablation import AblationResult
from negcore.orders import ordered_id
from negcore.store.answers import AnswerView

ORDERS = [*permutations(range(3))]
CONDITIONS = (
    Condition("top", 2, 0, "gold", 1.0),
    Condition("random", 2, 0, "gold", 1.0),
    Condition("random", 2, 1, "gold", 1.0),
)
N_ROWS = 5


def measured(seed=0):
    rng = np.random.default_rng(seed)
    asked = [(row, order) for row in range(N_ROWS) for order in ORDERS]
    base, shifted = (rng.dirichlet(np.ones(3), (len(asked), n)).astype(np.float32) for n in (1, 3))
    gold_P = np.array([order.index(row % 3) for row, order in asked])
    view = AnswerView.of([ordered_id(str(row), order) for row, order in asked], 3, permuted=True)
    return asked, CausalResult(CONDITIONS, gold_P, base[:, 0], shifted, view)


def test_probabilities_by_answer_are_those_put_together_by_hand():
    asked, result = measured()
    by_answer = result.by_answer()
    assert by_answer.gold_P.tolist() == [0, 1, 2, 0, 1] and by_answer.conditions == CONDITIONS
    expected = np.zeros((N_ROWS, 3, 3))
    base = np.zeros((N_ROWS, 3))
    for prompt, (row, order) in enumerate(asked):
        for letter, answer in enumerate(order):
            base[row, answer] += result.base_probs_PO[prompt, letter] / 6
            expected[row, :, answer] += result.probs_PMO[prompt, :, letter] / 6
    np.testing.assert_allclose(by_answer.probs_PMO, expected, rtol=1e-6)
    np.testing.assert_allclose(by_answer.base_probs_PO, base, rtol=1e-6)
    (top, *_) = causal_rows("magn", by_answer, n_bootstrap=50)
    assert top.n_prompts == N_ROWS and top.base_accuracy == (base.argmax(axis=1) == by_answer.gold_P).mean()
    assert top.accuracy == (expected[:, 0].argmax(axis=1) == by_answer.gold_P).mean()


def test_by_letter_every_row_is_the_mean_over_its_orders():
    asked, result = measured()
    right_P = result.base_probs_PO.argmax(axis=1) == result.gold_P
    top_P = result.probs_PMO[:, 0].argmax(axis=1) == result.gold_P
    (top, *_) = causal_rows("magn", result, n_bootstrap=200)
    assert top.n_prompts == N_ROWS
    assert top.base_accuracy == pytest.approx(right_P.mean()) and top.accuracy == pytest.approx(top_P.mean())
    (difference,) = causal_differences("magn", result)
    drawn = (result.probs_PMO[:, 1:].argmax(axis=2) == result.gold_P[:, None]).mean()
    assert difference.n_prompts == N_ROWS and difference.accuracy_difference == pytest.approx(top_P.mean() - drawn)


def test_intervals_are_those_of_as_many_rows_as_there_are():
    """A row that is asked six times and answered alike has the interval of a row that is asked once."""
    _, result = measured()
    once = result.by_answer()
    view = result.answers
    assert view is not None
    probs = np.take_along_axis(once.probs_PMO[view.row_P], view.answer_PO[:, None], axis=2)
    base = np.take_along_axis(once.base_probs_PO[view.row_P], view.answer_PO, axis=1)
    same = CausalResult(CONDITIONS, result.gold_P, base, probs, view)
    for one, six in zip(causal_rows("m", once, n_bootstrap=99), causal_rows("m", same, n_bootstrap=99), strict=True):
        np.testing.assert_allclose(list(vars(one).values())[5:], list(vars(six).values())[5:], atol=1e-12)


def test_without_orders_there_is_nothing_by_answer():
    _, result = measured()
    alone = CausalResult(CONDITIONS, result.gold_P, result.base_probs_PO, result.probs_PMO)
    with pytest.raises(NegError, match="--permutations"):
        alone.by_answer()


def test_curves_draw_rows_and_not_orders():
    _, result = measured()
    view, gold_P = result.answers, result.gold_P
    conditions = [CurveCondition("insertion", "ranking", 0, 0)]
    conditions += [
        CurveCondition(mode, kind, 0, size)
        for mode in ("deletion", "insertion")
        for kind in ("ranking", "same layers", "matched")
        for size in (1, 4)
    ]
    logs = np.log(np.random.default_rng(1).dirichlet(np.ones(3), (len(gold_P), len(conditions))))
    kl_RC = np.random.default_rng(2).exponential(size=(N_ROWS, len(conditions)))  # the same in every order of a row
    several = AblationResult(np.log(result.base_probs_PO), logs, kl_RC[view.row_P])
    once = AblationResult(*(values[::6] for values in several))
    options = {"n_bootstrap": 50, "seed": 0}
    points, *_ = curve_rows("magn", conditions, gold_P, several, 8, **options, answers=view)
    plain, *_ = curve_rows("magn", conditions, gold_P, several, 8, **options)
    expected, *_ = curve_rows("magn", conditions, gold_P[::6], once, 8, **options)
    assert [one.value for one in points] == pytest.approx([one.value for one in plain])
    for one, row in zip(points, expected, strict=True):
        if one.metric == "KL":
            assert (one.value, one.low, one.high) == pytest.approx((row.value, row.low, row.high))
