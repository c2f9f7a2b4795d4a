"""Paired tests: whether two probes that answered the same prompts can be told apart by their accuracies.

Shapes: P prompts, T tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from negcore.errors import NegError


@dataclass(frozen=True, slots=True)
class Paired:
    """Two probes' answers to the same prompts, counted by which of them was right.

    Counts of disjoint sets of prompts add up: ``a + b`` is the comparison on both.

    Raises
    ------
    NegError
        If there are no prompts or the counts contradict each other.
    """

    n: int
    """Prompts that both were asked, at least one."""
    n_first: int
    """Prompts that only the first answered right."""
    n_second: int
    """Prompts that only the second answered right."""

    def __post_init__(self) -> None:
        if self.n < 1 or min(self.n_first, self.n_second) < 0 or self.n_first + self.n_second > self.n:
            raise NegError(
                f"{self.n_first} and {self.n_second} of {self.n} prompts is no comparison: give at least one prompt, "
                "and count each that only one answered right once"
            )

    def __add__(self, other: Paired) -> Paired:
        return Paired(self.n + other.n, self.n_first + other.n_first, self.n_second + other.n_second)

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second."""
        return (self.n_first - self.n_second) / self.n

    @property
    def p(self) -> float:
        """Two-sided p of the exact McNemar test: 1 if every prompt was answered right by both or by neither.

        If both are equally good, each prompt that one alone answered right is as likely to be the first's as the
        second's. That holds of each dataset, so it holds of several together. The prompts are taken as independent.

        References
        ----------
        McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
        Psychometrika 12 (1947); Dietterich, "Approximate statistical tests for comparing supervised classification
        learning algorithms", Neural Computation 10 (1998).
        """
        n_either = self.n_first + self.n_second
        return float(binomtest(self.n_first, n_either).pvalue) if n_either else 1.0


def paired(right_first_P: ArrayLike, right_second_P: ArrayLike) -> Paired:
    """Compare two probes on the prompts that both answered.

    Parameters
    ----------
    right_first_P, right_second_P : array of bool, shape (P,)
        True where the first probe, and the second, answered right; both in the same order of prompts.

    Raises
    ------
    NegError
        If the two differ in shape or are empty.
    """
    first, second = np.asarray(right_first_P, bool), np.asarray(right_second_P, bool)
    if first.shape != second.shape:
        raise NegError(f"answers to {first.shape} and to {second.shape} prompts: give both probes' to the same prompts")
    return Paired(first.size, int(np.count_nonzero(first & ~second)), int(np.count_nonzero(second & ~first)))


def holm(p_T: ArrayLike) -> NDArray[np.float64]:
    """Correct the p of several tests for their number, by Holm's method: float64 (T,), in the order given.

    If tests are called significant whose corrected p is at most 5 %, then in at most 5 % of cases any of them is so
    by chance, whatever the dependence between them.

    References
    ----------
    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
    """
    p = np.asarray(p_T, np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1)
    return corrected
