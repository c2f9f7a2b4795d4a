"""The quality of predictions: accuracy with its interval, and the floors that every probe must beat.

Shapes: P prompts, O options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from negcore.errors import NegError
from negcore.measure.votes import check_gold


class Interval(NamedTuple):
    """A confidence interval of an accuracy, both ends in 0..1."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Number of prompts answered right, out of the number asked.

    Accuracies of disjoint sets of prompts add up: ``a + b`` is the accuracy on both.

    Raises
    ------
    NegError
        If there are no prompts or the counts contradict each other.
    """

    n_correct: int
    """Prompts answered right."""
    n: int
    """Prompts asked, at least one."""

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.n_correct <= self.n:
            raise NegError(
                f"{self.n_correct} right of {self.n} prompts is not an accuracy: give at least one prompt, "
                "of which none to all are right"
            )

    def __add__(self, other: Accuracy) -> Accuracy:
        return Accuracy(self.n_correct + other.n_correct, self.n + other.n)

    @property
    def value(self) -> float:
        """Share of prompts answered right."""
        return self.n_correct / self.n

    @property
    def interval(self) -> Interval:
        """95 % Wilson score interval (Wilson 1927), which stays inside 0..1 and works at 0 and n right."""
        ends = binomtest(self.n_correct, self.n).proportion_ci(0.95, method="wilson")
        return Interval(float(ends.low), float(ends.high))


class MacroAverage(NamedTuple):
    """The unweighted mean of the accuracies of several datasets, and its 95 % interval."""

    value: float
    interval: Interval
    n_datasets: int


def macro_average(accuracies: Sequence[Accuracy]) -> MacroAverage:
    """Average the accuracies of datasets; each counts the same, whatever its size.

    The rows are samples, the datasets are not: the interval says how the mean would vary with other rows of the same
    datasets, not with other datasets. It combines the datasets' own Wilson intervals: the distance of each end is the
    root of the sum of their squared distances, over the number of datasets (method of variance estimates recovery).
    For one dataset it is the Wilson interval itself.

    References
    ----------
    Zou, Huang, Zhang, "A note on confidence interval estimation for a linear function of binomial proportions",
    Computational Statistics & Data Analysis 53 (2009).

    Raises
    ------
    NegError
        If there are no accuracies.
    """
    n = len(accuracies)
    if not n:
        raise NegError("no accuracies to average: give that of at least one dataset")
    value = sum(one.value for one in accuracies) / n
    below = sum((one.value - one.interval.low) ** 2 for one in accuracies) ** 0.5 / n
    above = sum((one.interval.high - one.value) ** 2 for one in accuracies) ** 0.5 / n
    return MacroAverage(value, Interval(value - below, value + above), n)


def confusion_counts(gold_P: ArrayLike, predicted_P: ArrayLike, n_options: int) -> NDArray[np.int64]:
    """Count how often each option was predicted for each gold option: shape (gold O, predicted O).

    Raises
    ------
    NegError
        If an option is not one of the ``n_options``, or the two differ in length.
    """
    gold, predicted = check_gold(gold_P, n_options), np.asarray(predicted_P)
    if gold.shape != predicted.shape:
        raise NegError(f"{predicted.size} predictions for {gold.size} gold options: give one prediction a prompt")
    wrong = predicted[(predicted < 0) | (predicted >= n_options)]
    if wrong.size:
        raise NegError(f"prediction {wrong[0]} is not one of the {n_options} options 0..{n_options - 1}")
    counts = np.bincount(gold * n_options + predicted, minlength=n_options**2)
    return counts.reshape(n_options, n_options).astype(np.int64)


def accuracy(gold_P: NDArray[Any], predicted_P: NDArray[Any]) -> Accuracy:
    """Count the prompts whose predicted option is the gold one.

    Parameters
    ----------
    gold_P, predicted_P : array, shape (P,)
        Gold and predicted options, in the same labels.

    Raises
    ------
    NegError
        If the two differ in shape or are empty.
    """
    if gold_P.shape != predicted_P.shape:
        raise NegError(f"{predicted_P.shape} predictions for {gold_P.shape} gold options: give one prediction a prompt")
    return Accuracy(int(np.count_nonzero(gold_P == predicted_P)), gold_P.size)


def majority_floor(gold_train: ArrayLike, gold_test: ArrayLike) -> Accuracy:
    """Return the test accuracy of always answering the most common training option (ties: the lowest index).

    Parameters
    ----------
    gold_train, gold_test : array of int, shape (P,)
        Gold option of each training and each test prompt.

    Raises
    ------
    NegError
        If either is empty or not a vector of indices.
    """
    n_options = int(max(np.max(gold_train, initial=0), np.max(gold_test, initial=0))) + 1
    train, test = check_gold(gold_train, n_options), check_gold(gold_test, n_options)
    if not train.size:
        raise NegError("no training rows, so no option is the most common: give at least one row")
    return accuracy(test, np.full_like(test, np.bincount(train).argmax()))


def random_floor(gold_P: ArrayLike, n_options: int) -> float:
    """Return the expected accuracy of answering at random: 1/O, whatever the gold options are.

    Parameters
    ----------
    gold_P : array of int, shape (P,)
        Gold option of each prompt; only checked to be among the options.
    n_options : int
        Options of every prompt.

    Raises
    ------
    NegError
        If a gold option is not one of the ``n_options``.
    """
    check_gold(gold_P, n_options)
    return 1 / n_options


def choose_n_kept(accuracy_by_k: Mapping[int, Accuracy]) -> int:
    """Return the number of neurons with the largest validation accuracy; of equally good ones the smallest.

    Parameters
    ----------
    accuracy_by_k : mapping of int to Accuracy
        Accuracy on *validation* prompts for each number of kept neurons. Never give accuracies on test prompts:
        the largest of many test accuracies does not estimate accuracy.

    Raises
    ------
    NegError
        If there is nothing to choose from.
    """
    if not accuracy_by_k:
        raise NegError("no accuracies to choose a number of neurons from: give at least one")
    return max(sorted(accuracy_by_k), key=lambda k: accuracy_by_k[k].value)
