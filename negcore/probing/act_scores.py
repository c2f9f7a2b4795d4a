"""The arithmetic of the Act-Probe: thresholds and scores of neurons by their activations, in numpy alone.

In a mixture of experts a prompt lacks most neurons. A neuron then knows of the prompts that have it and of no others:
its threshold is its mean over them, and its score counts their answers alone, so that at one accuracy a neuron that
more prompts have scores higher. An array of those that are there goes beside the activations, which are 0 elsewhere; of
other models it has the shape (P, 1) and is True.

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
    """2n * (accuracy - 0.5) of "above the threshold means the upper half", n prompts having the neuron: (S, M)."""
    thresholds_SM: NDArray[np.float64]
    """Mean activation over the prompts of the question's classes that have the neuron, 0 without any: (S, M)."""

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


def class_sums(values_PM: Numbers, class_P: Ints, n_classes: int) -> NDArray[np.float64]:
    """Sum activations, or count those that are there, by class: (C, M); float64, so that equal float32 sum exactly.

    Sums of blocks of prompts add up.
    """
    is_class_CP = class_P == np.arange(n_classes)[:, None]
    return np.stack([values_PM[is_class_P].sum(axis=0, dtype=np.float64) for is_class_P in is_class_CP])


def mean_thresholds(sums_CM: NDArray[np.float64], n_there_CM: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean activation over the prompts of each question's classes that have the neuron: shape (S, M).

    Parameters
    ----------
    sums_CM, n_there_CM : array
        From `class_sums`: of activations, and of those that are there, shape (C, M) or (C, 1).
    """
    questions = list(halvings(0, len(sums_CM)))
    thresholds_SM = np.empty((len(questions), sums_CM.shape[1]))
    for at, (start, _, stop) in enumerate(questions):
        thresholds_SM[at] = sums_CM[start:stop].sum(axis=0) / np.maximum(n_there_CM[start:stop].sum(axis=0), 1)
    return thresholds_SM


def above_scores(
    activations_PM: Numbers, there_PM: NDArray[np.bool_], class_P: Ints, thresholds_SM: NDArray[np.float64]
) -> Ints:
    """Count right minus wrong answers of "above the threshold means the upper half": shape (S, M).

    This is 2n * (accuracy - 0.5) as an integer, so ties are exact. Counts of blocks of prompts add up.
    """
    scores_SM = np.empty(thresholds_SM.shape, np.int64)
    for at, (start, middle, stop) in enumerate(halvings(0, len(thresholds_SM) + 1)):
        # +1 in the upper half, -1 in the lower, 0 where the question does not arise.
        side_P = (np.where(class_P >= middle, 1, -1) * ((class_P >= start) & (class_P < stop))).astype(np.float32)
        above_PM = (activations_PM > thresholds_SM[at]) & there_PM
        scores_SM[at] = 2 * (side_P @ above_PM.astype(np.float32)) - side_P @ there_PM.astype(np.float32)
    return scores_SM
