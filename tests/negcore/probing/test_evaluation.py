"""Accuracy, its interval, the floors and the choice of the number of neurons."""

import numpy as np
import pytest

from negcore.errors import NegError
from negcore.probing.evaluation import (
    Accuracy,
    accuracy,
    check_gold,
    choose_n_kept,
    confusion_counts,
    macro_average,
    majority_floor,
    random_floor,
)


@pytest.mark.parametrize(
    ("n_correct", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_wilson_interval(n_correct, n, low, high):
    assert Accuracy(n_correct, n).interval == pytest.approx((low, high), abs=5e-5)


def test_accuracy_counts_the_right_answers():
    assert accuracy(np.array([0, 1, 2, 1]), np.array([0, 1, 1, 1])) == Accuracy(3, 4)
    assert Accuracy(3, 4).value == 0.75


def test_accuracies_of_two_blocks_add_up():
    assert Accuracy(3, 4) + Accuracy(0, 2) == Accuracy(3, 6)


@pytest.mark.parametrize(("n_correct", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(n_correct, n):
    with pytest.raises(NegError, match=f"{n_correct} right of {n} prompts"):
        Accuracy(n_correct, n)


def test_predictions_of_another_shape_are_refused():
    with pytest.raises(NegError, match=r"\(1,\) predictions for \(2,\) gold"):
        accuracy(np.array([0, 1]), np.array([0]))


def test_the_majority_is_taken_from_training_rows_and_ties_go_to_the_lowest_option():
    assert majority_floor([2, 1, 1, 2, 0], [1, 2, 2]) == Accuracy(1, 3)


def test_a_majority_option_absent_from_test_scores_nothing():
    assert majority_floor([3, 3, 0], [0, 1]) == Accuracy(0, 2)


def test_a_majority_of_no_training_rows_is_refused():
    with pytest.raises(NegError, match="no training rows"):
        majority_floor(np.array([], int), [0])


def test_random_answers_are_right_one_time_in_the_number_of_options():
    assert random_floor([0, 0, 3], 4) == 0.25


@pytest.mark.parametrize(("gold", "message"), [([0, 4], "row 1: gold option 4"), ([0, -1], "row 1: gold option -1")])
def test_a_gold_option_outside_the_options_is_refused_with_its_row(gold, message):
    with pytest.raises(NegError, match=message):
        random_floor(gold, 4)


@pytest.mark.parametrize("gold", [[0.0, 1.0], [[0], [1]], ["a"], [True, False]])
def test_gold_options_that_are_no_indices_are_refused(gold):
    with pytest.raises(NegError, match="one integer a prompt"):
        check_gold(gold, 2)


def test_the_fewest_of_the_equally_accurate_neurons_are_chosen():
    curve = {4: Accuracy(7, 9), 1: Accuracy(6, 9), 8: Accuracy(7, 9), 2: Accuracy(7, 9)}
    assert choose_n_kept(curve) == 2


def test_choosing_from_nothing_is_refused():
    with pytest.raises(NegError, match="no accuracies"):
        choose_n_kept({})


def test_a_macro_average_by_pencil_counts_datasets_the_same():
    mean = macro_average([Accuracy(1, 10), Accuracy(900, 1000)])
    assert mean.value == pytest.approx(0.5)
    assert mean.n_datasets == 2
    small, large = Accuracy(1, 10).interval, Accuracy(900, 1000).interval
    assert mean.interval.low == pytest.approx(0.5 - ((0.1 - small.low) ** 2 + (0.9 - large.low) ** 2) ** 0.5 / 2)
    assert mean.interval.high == pytest.approx(0.5 + ((small.high - 0.1) ** 2 + (large.high - 0.9) ** 2) ** 0.5 / 2)


@pytest.mark.parametrize("n_correct", [0, 7, 20])
def test_the_average_of_one_dataset_has_its_own_interval(n_correct):
    one = Accuracy(n_correct, 20)
    assert macro_average([one]).interval == pytest.approx(one.interval)


def test_the_interval_of_an_average_of_more_datasets_is_narrower():
    def width(n):
        low, high = macro_average([Accuracy(5, 10)] * n).interval
        return high - low

    assert width(4) == pytest.approx(width(1) / 2)


def test_an_average_of_nothing_is_refused():
    with pytest.raises(NegError, match="no accuracies to average"):
        macro_average([])


def test_confusion_by_pencil_has_gold_options_as_rows():
    counts = confusion_counts([0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 0, 2], 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]


def test_a_prediction_that_is_no_option_is_refused():
    with pytest.raises(NegError, match="prediction 3 is not one of the 3"):
        confusion_counts([0], [3], 3)
    with pytest.raises(NegError, match="2 predictions for 1 gold"):
        confusion_counts([0], [1, 1], 3)
