"""Shares of neurons that the datasets of runs use, at equal numbers of rows, and what datasets of a model share."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from negcore.analysis.utilisation import SHARE, Score, Used, shared_neurons, used_neurons
from negcore.errors import RunError
from tasks.run_negs import StoredSplit, stored_splits

_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class UsedRow:
    """The share of a model's neurons that some rows of a dataset use."""

    run: str
    model: str
    dataset: str
    n_rows: int
    """Rows chosen of the dataset."""
    n_all: int
    """Rows of the dataset."""
    n_neurons: int
    """Neurons of the model."""
    n_layers: int
    per_layer: int
    """Neurons of a layer that a row uses."""
    share: float
    """Mean over all choices of rows."""
    unrelated: float
    """The same if every row chose its neurons at random."""


@dataclass(frozen=True)
class SharedRow:
    """The neurons that two datasets of a run's model both use, of as many rows each; see `Shared`."""

    run: str
    model: str
    dataset_a: str
    dataset_b: str
    n_rows: int
    shared: float
    jaccard: float
    chance: float


@dataclass(frozen=True)
class Utilisation:
    """The neurons that datasets use."""

    n_rows: int
    """Rows at which datasets are compared."""
    used: list[UsedRow]
    """Of every dataset at 1, 2, 4, ... rows, at `n_rows` and at all."""
    shared: list[SharedRow]


def utilisation(
    roots: Sequence[Path],
    *,
    datasets: Sequence[str] = (),
    model: str | None = None,
    score: Score = "contribution",
    share: float = SHARE,
    n_rows: int | None = None,
) -> Utilisation:
    """Count the neurons that the datasets of runs use.

    Parameters
    ----------
    datasets, model
        As for `stored_splits`.
    score, share
        As for `used_neurons`.
    n_rows : int, optional
        Rows at which datasets are compared. By default those of the smallest.

    Raises
    ------
    NegError
        If a run holds no NEGs or no such dataset, a dataset has fewer rows, or as `used_neurons`.
    """
    names = [root.name for root in roots]
    found = {
        (root.name if names.count(root.name) == 1 else str(root), *key): used_neurons(
            [one.open() for one in splits], score, share=share
        )
        for root in roots
        for key, splits in _by_dataset(root, model, datasets).items()
    }
    least = min(used.n_rows for used in found.values())
    if n_rows is not None and n_rows > least:
        raise RunError(f"{n_rows} rows cannot be compared: the smallest dataset has {least}")
    rows = n_rows or least
    used_rows = [row for (run, name, title), used in found.items() for row in _curve(run, name, title, used, rows)]
    pairs = [
        SharedRow(*first[:2], first[2], second[2], rows, *_shared(found[first], found[second], rows))
        for first, second in combinations(found, 2)
        if first[:2] == second[:2]
    ]
    return Utilisation(rows, used_rows, pairs)


def _by_dataset(root: Path, model: str | None, datasets: Sequence[str]) -> dict[tuple[str, str], list[StoredSplit]]:
    by_dataset: dict[tuple[str, str], list[StoredSplit]] = {}
    for one in stored_splits(root, _SPLITS, model=model, datasets=datasets):
        by_dataset.setdefault((one.place.model, one.title), []).append(one)
    return by_dataset


def _curve(run: str, model: str, dataset: str, used: Used, n_rows: int) -> list[UsedRow]:
    powers = [2**power for power in range(used.n_rows.bit_length())]
    about = used.n_rows, used.n_neurons, used.n_layers, used.per_layer
    return [
        UsedRow(run, model, dataset, rows, *about, used.share(rows), used.unrelated(rows))
        for rows in sorted({*powers, n_rows, used.n_rows})
    ]


def _shared(one: Used, other: Used, n_rows: int) -> tuple[float, float, float]:
    found = shared_neurons(one, other, n_rows)
    return found.shared, found.jaccard, found.chance
