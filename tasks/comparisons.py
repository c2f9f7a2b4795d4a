"""Comparisons of the probes of a run, two by two, on the test prompts that both answered."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from operator import add

from negcore.probing.paired import Paired, holm, paired
from tasks.predictions import Predictions


@dataclass(frozen=True)
class ComparisonRow:
    """Two probes of a model on the test prompts of one dataset, or of all datasets: the exact McNemar test.

    Prompts are rows, and answers decisions over all orders, where rows were asked in several orders of their options.
    """

    model: str
    shots: int
    dataset: str
    """Empty for the prompts of all datasets together, in which every prompt counts the same."""
    first: str
    """Probe that comes first in the run."""
    second: str
    n_test: int
    n_first: int
    """Prompts that only the first probe answered right."""
    n_second: int
    """Prompts that only the second probe answered right."""
    difference: float
    """Accuracy of the first minus that of the second."""
    p: float
    """Two-sided p of the exact McNemar test."""
    p_corrected: float
    """The same, corrected by Holm's method for `n_comparisons`."""
    n_comparisons: int
    """Pairs of probes compared in all datasets of this model and number of demonstrations; with `dataset` empty, pairs
    of probes."""


def comparisons(predictions: Sequence[Predictions]) -> list[ComparisonRow]:
    """Compare every two probes that answered the same prompts, by dataset, and over all datasets if there are several.

    Where rows were asked in several orders of their options, they are compared on their one decision a row.

    Parameters
    ----------
    predictions : sequence of Predictions
        One for each model, number of demonstrations and dataset.
    """
    asked: dict[tuple[str, int], list[Predictions]] = {}
    for one in predictions:
        asked.setdefault((one.model, one.shots), []).append(one)
    return [row for of_model in asked.values() for row in _of_model(of_model)]


def _of_model(predictions: Sequence[Predictions]) -> Iterator[ComparisonRow]:
    found = [_pairs(one) for one in predictions]
    first = predictions[0]
    by_dataset = [
        _row(one, one.dataset, pair, of_pair)
        for one, pairs in zip(predictions, found, strict=True)
        for pair, of_pair in pairs.items()
    ]
    yield from _corrected(by_dataset)
    if len(found) > 1:
        shared = [pair for pair in found[0] if all(pair in pairs for pairs in found)]
        yield from _corrected([_row(first, "", pair, reduce(add, (pairs[pair] for pairs in found))) for pair in shared])


def _pairs(one: Predictions) -> Mapping[tuple[str, str], Paired]:
    return {(a, b): paired(one.right(a), one.right(b)) for a, b in combinations(one.predicted_P, 2)}


def _row(asked: Predictions, dataset: str, pair: tuple[str, str], of_pair: Paired) -> ComparisonRow:
    return ComparisonRow(
        asked.model,
        asked.shots,
        dataset,
        *pair,
        n_test=of_pair.n,
        n_first=of_pair.n_first,
        n_second=of_pair.n_second,
        difference=of_pair.difference,
        p=of_pair.p,
        p_corrected=of_pair.p,
        n_comparisons=1,
    )


def _corrected(rows: Sequence[ComparisonRow]) -> Iterator[ComparisonRow]:
    """Return rows with their p corrected for how many they are."""
    for row, p in zip(rows, holm([row.p for row in rows]), strict=True):
        yield replace(row, p_corrected=float(p), n_comparisons=len(rows))
