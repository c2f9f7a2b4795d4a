"""The arithmetic of the Act-Probe: thresholds and scores of neurons by their activations, in numpy alone.

Shapes: P prompts, C classes (distinct gold options, sorted), S binary questions between classes, M neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from negcore.arrays import Ints
from negcore.measure.votes import Numbers


@dataclass(frozen=True, eq=False)
class ActScores:
    """Numbers from which an Act-Probe chooses neurons, for every binary question in the order of `halvings`."""

    scores_SM: Ints
    """2n * (accuracy - 0.5) of "above the threshold means the upper half": shape (S, M)."""
    thresholds_SM: NDArray[np.float64]
    """Mean activation over the prompts of the question's classes: shape (S, M)."""

    @classmethod
    def joined(cls, blocks: Sequence[ActScores]) -> ActScores:
        """Join the scores of blocks of neurons, in their order."""
        return cls(
            np.concatenate([block.scores_SM for block in blocks], axis=1),
            np.concatenate([block.thresholds_SM for block in blocks], axis=1),
        )


def halvings(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the binary questions over the classes [start, stop) as (start, middle, stop), each before its halves'."""
    if stop - start < 2:
        return
    middle = (start + stop) // 2
    yield start, middle, stop
    yield from halvings(start, middle)
    yield from halvings(middle, stop)


def class_sums(activations_PM: Numbers, class_P: Ints, n_classes: int) -> NDArray[np.float64]:
    """Sum the activations of each class: shape (C, M); float64, so that the sum of equal float32 values is exact.

    Sums of blocks of prompts add up.
    """
    is_class_CP = class_P == np.arange(n_classes)[:, None]
    return np.stack([activations_PM[is_class_P].sum(axis=0, dtype=np.float64) for is_class_P in is_class_CP])


def mean_thresholds(sums_CM: NDArray[np.float64], class_P: Ints) -> NDArray[np.float64]:
    """Return the mean activation over all prompts of each question's classes: shape (S, M)."""
    n_C = np.bincount(class_P, minlength=len(sums_CM))
    questions = list(halvings(0, len(sums_CM)))
    thresholds_SM = np.empty((len(questions), sums_CM.shape[1]))
    for at, (start, _, stop) in enumerate(questions):
        thresholds_SM[at] = sums_CM[start:stop].sum(axis=0) / n_C[start:stop].sum()
    return thresholds_SM


def above_scores(activations_PM: Numbers, class_P: Ints, thresholds_SM: NDArray[np.float64]) -> Ints:
    """Count right minus wrong answers of "above the threshold means the upper half": shape (S, M).

    This is 2n * (accuracy - 0.5) as an integer, so ties are exact. Counts of blocks of prompts add up.
    """
    scores_SM = np.empty(thresholds_SM.shape, np.int64)
    for at, (start, middle, stop) in enumerate(halvings(0, len(thresholds_SM) + 1)):
        # +1 in the upper half, -1 in the lower, 0 where the question does not arise.
        side_P = np.where(class_P >= middle, 1, -1) * ((class_P >= start) & (class_P < stop))
        above_PM = (activations_PM > thresholds_SM[at]).astype(np.float32)
        scores_SM[at] = (2 * (side_P.astype(np.float32) @ above_PM) - side_P.sum()).astype(np.int64)
    return scores_SM
