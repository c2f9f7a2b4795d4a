"""Prompts by row and answer, where rows were asked in several orders of their options."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from support import Row, identity_of, negs_place, write_negs

from negcore.orders import ordered_id
from negcore.store.answers import AnswerView
from negcore.store.reader import open_negs

ORDERS = [*permutations(range(3))]
SHAPE = (2, 4)


def write(root: Path, ids, negs_POLN, gold_P, permutations_="all"):
    """Write NEGs of prompts in shards of five."""
    n_prompts, n_options = negs_POLN.shape[:2]
    starts = range(0, n_prompts, 5)
    for index, start in enumerate(starts):
        rows = slice(start, start + 5)
        write_negs(
            root,
            negs_place("m", "d", "test"),
            index,
            len(starts),
            identity=identity_of(*SHAPE, prompt={"permutations": permutations_}),
            examples=[Row(id_, answer=int(gold)) for id_, gold in zip(ids[rows], gold_P[rows], strict=True)],
            label_ids_PO=np.tile(np.arange(n_options), (len(ids[rows]), 1)),
            negs_POLN=negs_POLN[rows],
            activations_PLN=np.ones((len(ids[rows]), *SHAPE), np.float32),
            probs_PO=np.full((len(ids[rows]), n_options), 0.1, np.float32),
        )
    return open_negs(root).select("m", "d", "test")


def asked(n_rows, orders=ORDERS):
    """Return the row and the order of every prompt."""
    return [(row, order) for row in range(n_rows) for order in orders]


def made(n_rows, seed=0):
    prompts = asked(n_rows)
    negs_POLN = np.random.default_rng(seed).normal(size=(len(prompts), 3, *SHAPE)).astype(np.float32)
    gold_R = np.arange(n_rows) % 3
    gold_P = np.array([order.index(gold_R[row]) for row, order in prompts])
    return [ordered_id(f"row@{row}", order) for row, order in prompts], negs_POLN, gold_P


def test_negs_by_answer_are_those_put_together_prompt_by_prompt(tmp_path):
    ids, negs_POLN, gold_P = made(4)
    split = write(tmp_path, ids, negs_POLN, gold_P)
    chosen = [(1, 2), (0, 0), (1, 3)]
    expected = np.zeros((4, 3, len(chosen)))
    for prompt, (row, order) in enumerate(asked(4)):
        for letter, answer in enumerate(order):
            for k, (layer, neuron) in enumerate(chosen):
                expected[row, answer, k] += float(negs_POLN[prompt, letter, layer, neuron]) / len(ORDERS)
    np.testing.assert_allclose(split.neurons_by_answer(chosen), expected, rtol=1e-12)
    assert split.answers.rows == tuple(f"row@{row}" for row in range(4))
    assert split.answers.gold_R(split.gold_P).tolist() == [0, 1, 2, 0]


def test_options_that_are_permuted_twice_by_inverse_orders_have_the_same_answers(tmp_path):
    """Renaming the letters of every prompt, its numbers moved along, leaves each answer what it was."""
    ids, negs_POLN, gold_P = made(4)
    view = write(tmp_path / "a", ids, negs_POLN, gold_P)
    moved, moved_POLN, moved_gold = [], np.empty_like(negs_POLN), np.empty_like(gold_P)
    rng = np.random.default_rng(1)
    for prompt, (row, order) in enumerate(asked(4)):
        again = rng.permutation(3)
        moved.append(ordered_id(f"row@{row}", tuple(order[letter] for letter in again)))
        moved_POLN[prompt] = negs_POLN[prompt, again]
        moved_gold[prompt] = again.tolist().index(gold_P[prompt])
    other = write(tmp_path / "b", moved, moved_POLN, moved_gold)
    np.testing.assert_array_equal(other.neurons_by_answer([0, 5, 7]), view.neurons_by_answer([0, 5, 7]))
    assert other.answers.gold_R(other.gold_P).tolist() == view.answers.gold_R(view.gold_P).tolist()


def test_without_orders_every_prompt_is_a_row_and_letters_are_answers(tmp_path):
    ids, negs_POLN, gold_P = made(2)
    split = write(tmp_path, ids, negs_POLN, gold_P, permutations_=1)
    np.testing.assert_array_equal(split.neurons_by_answer([3, 1]), split.neurons([3, 1]))
    assert split.answers.rows == tuple(ids) and split.answers.gold_R(split.gold_P).tolist() == gold_P.tolist()
    assert AnswerView.if_permuted(split.ids, 3, split.identity) is None


def test_letters_and_answers_lead_back_to_each_other():
    ids, _, gold_P = made(3)
    view = AnswerView.of(ids, 3, permuted=True)
    np.testing.assert_array_equal(view.letters_P(view.gold_R(gold_P)), gold_P)
    for prompt, (_, order) in enumerate(asked(3)):
        assert view.answer_PO[prompt].tolist() == list(order)
        assert [order[letter] for letter in view.letter_PA[prompt]] == [0, 1, 2]
    assert view.is_given_P.tolist() == [order == (0, 1, 2) for _, order in asked(3)]


def test_a_decision_is_the_answer_with_the_largest_mean_and_of_equal_ones_the_first():
    ids = [ordered_id(row, order) for row in "xy" for order in ((0, 1, 2), (2, 0, 1))]
    view = AnswerView.of(ids, 3, permuted=True)
    scores_PO = np.array([[0.1, 0.6, 0.3], [0.2, 0.9, 0.0], [1, 0, 0], [0, 0, 1]])
    # x: answer 0 has .1 + .9, answer 1 has .6 + .0, answer 2 has .3 + .2; y: answers 0 and 1 have 1 each.
    assert view.decisions(scores_PO).tolist() == [0, 0]
    np.testing.assert_allclose(view.means(view.by_answer(scores_PO)), [[0.5, 0.3, 0.25], [0.5, 0.5, 0]])


def test_some_rows_can_be_taken():
    ids, _, _ = made(4)
    view, at = AnswerView.of(ids, 3, permuted=True).select(np.array([False, True, False, True]))
    assert view.rows == ("row@1", "row@3") and [ids[place] for place in at] == ids[6:12] + ids[18:]
    assert view.row_P.tolist() == [0] * 6 + [1] * 6 and view.n_orders_R.tolist() == [6, 6]


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_frames_of_permuted_rows_have_columns_of_row_and_order(tmp_path, kind):
    pytest.importorskip(kind)
    ids, negs_POLN, gold_P = made(2)
    frame = getattr(write(tmp_path / "a", ids, negs_POLN, gold_P), f"to_{kind}")()
    assert list(frame["order"])[:3] == ["ABC", "ACB", "BAC"] and list(frame["row"])[5:7] == ["row@0", "row@1"]
    plain = getattr(write(tmp_path / "b", ids, negs_POLN, gold_P, permutations_=1), f"to_{kind}")()
    assert "row" not in plain.columns and "order" not in plain.columns
