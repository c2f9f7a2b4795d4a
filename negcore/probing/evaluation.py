"""The quality of predictions: accuracy with its interval, and the floors that every probe must beat.

Shapes: P prompts, O options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm

from negcore.arrays import Ints
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
    n_independent: float | None = None
    """Independent prompts that would tell as much, where rows were asked several times; None if all `n` are."""

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.n_correct <= self.n:
            raise NegError(
                f"{self.n_correct} right of {self.n} prompts is not an accuracy: give at least one prompt, "
                "of which none to all are right"
            )

    def __add__(self, other: Accuracy) -> Accuracy:
        n_independent = None
        if self.n_independent is not None or other.n_independent is not None:
            n_independent = sum(one.n if one.n_independent is None else one.n_independent for one in (self, other))
        return Accuracy(self.n_correct + other.n_correct, self.n + other.n, n_independent)

    @property
    def value(self) -> float:
        """Share of prompts answered right."""
        return self.n_correct / self.n

    @property
    def interval(self) -> Interval:
        """95 % Wilson score interval (Wilson 1927), which stays inside 0..1 and works at 0 and n right."""
        if self.n_independent is not None:
            return _wilson(self.value, self.n_independent)
        ends = binomtest(self.n_correct, self.n).proportion_ci(0.95, method="wilson")
        return Interval(float(ends.low), float(ends.high))

    @property
    def columns(self) -> dict[str, Any]:
        """The accuracy as the columns of a table of results."""
        low, high = self.interval
        return {"accuracy": self.value, "low": low, "high": high, "n_correct": self.n_correct, "n_test": self.n}


def _wilson(share: float, n: float) -> Interval:
    """Return the 95 % Wilson score interval of a share of a number that need not be whole."""
    z2 = float(norm.ppf(0.975)) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * (share * (1 - share) / n + z2 / (4 * n**2))) ** 0.5 / (1 + z2 / n)
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


class Estimated(Protocol):
    """A number with the ends of its interval."""

    @property
    def value(self) -> float: ...
    @property
    def interval(self) -> Interval: ...


class Estimate(NamedTuple):
    """A number with the ends of its interval, as it stands in a table."""

    value: float
    interval: Interval


class MacroAverage(NamedTuple):
    """The unweighted mean of the accuracies of several datasets, and its 95 % interval."""

    value: float
    interval: Interval
    n_datasets: int


def macro_average(accuracies: Sequence[Estimated]) -> MacroAverage:
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


def accuracy(gold_P: NDArray[Any], predicted_P: NDArray[Any], row_P: Ints | None = None) -> Accuracy:
    """Count the prompts whose predicted option is the gold one.

    Parameters
    ----------
    gold_P, predicted_P : array, shape (P,)
        Gold and predicted options, in the same labels.
    row_P : array of int, shape (P,), optional
        Number of the row that each prompt asks, if rows are asked several times: rows are independent, their prompts
        are not, and the interval is that of rows. By default every prompt is a row.

    Raises
    ------
    NegError
        If the two differ in shape or are empty.
    """
    if gold_P.shape != predicted_P.shape:
        raise NegError(f"{predicted_P.shape} predictions for {gold_P.shape} gold options: give one prediction a prompt")
    right_P = gold_P == predicted_P
    n_independent = None if row_P is None else independent_prompts(right_P, row_P)
    return Accuracy(int(np.count_nonzero(right_P)), gold_P.size, n_independent)


def independent_prompts(right_P: NDArray[np.bool_], row_P: Ints) -> float | None:
    """Return how many independent prompts tell as much as those of rows that are asked several times.

    It is p (1 - p) over the variance of the accuracy p, which is that of a ratio of sums over rows; at least the number
    of rows, as many as there are if a row is always answered alike, and at most the number of prompts. None if every
    row is asked once.

    References
    ----------
    Korn, Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated from
    survey data", Survey Methodology 24 (1998), where the interval is that of Clopper and Pearson; Wilson's with the
    same number: Dean, Pagano, "Evaluating confidence interval methods for binomial proportions in clustered surveys",
    Journal of Survey Statistics and Methodology 3 (2015).
    """
    n_asked_R = np.bincount(row_P)
    n_asked_R = n_asked_R[n_asked_R > 0]
    if n_asked_R.max(initial=1) == 1:
        return None
    _, row_P = np.unique(row_P, return_inverse=True)
    n_rows, n_prompts, value = len(n_asked_R), len(row_P), float(right_P.mean())
    residual_R = np.bincount(row_P, right_P) - value * n_asked_R
    variance = n_rows / max(n_rows - 1, 1) * float(residual_R @ residual_R) / n_prompts**2
    n_independent = value * (1 - value) / variance if variance > 0 else n_prompts if 0 < value < 1 else n_rows
    return float(np.clip(n_independent, n_rows, n_prompts))


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
