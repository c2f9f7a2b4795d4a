"""Small splits of NEGs on disk: whole numbers with many ties and zeros, and a neuron with a little skill."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from support import Row, identity_of, negs_place, write_negs

from negcore.store.identity import choice_digest
from negcore.store.reader import NegSplit, open_negs

N_LAYERS, N_NEURONS, N_OPTIONS, N_ROWS = 3, 5, 3, 40
N_ALL = N_LAYERS * N_NEURONS


class Numbers(NamedTuple):
    """The numbers of a split."""

    negs_POM: np.ndarray
    activations_PM: np.ndarray
    gold_P: np.ndarray


class LayerNumbers(NamedTuple):
    """The numbers of a split, with an axis for the layers."""

    negs_POLN: np.ndarray
    activations_PLN: np.ndarray
    gold_P: np.ndarray


def awkward_numbers(split: str, n_options: int, shape: tuple[int, int, int]) -> LayerNumbers:
    """Make ties, zeros, denormals, neighbouring numbers and activations at zero; `shape` is (P, L, N)."""
    n_rows, *model_shape = shape
    rng = np.random.default_rng([len(split), n_options])
    gold_P = rng.permutation(np.arange(n_rows) % n_options)
    shape_POLN = (n_rows, n_options, *model_shape)
    near = 1 + rng.integers(-3, 4, shape_POLN) * 2.0**-23
    negs_POLN = (rng.integers(-2, 3, shape_POLN) * near * rng.choice([1, 1e-4, 1e-42], shape_POLN)).astype(np.float32)
    activations_PLN = rng.choice([-3, -0.7, 0, 1e-3, 0.9, 4], shape).astype(np.float32)
    return LayerNumbers(negs_POLN, activations_PLN, gold_P)


def numbers(split: str, dataset: str = "d", n_options: int = N_OPTIONS) -> Numbers:
    """Make numbers that sums and means do not round."""
    rng = np.random.default_rng([len(split), *dataset.encode(), n_options])
    gold_P = rng.permutation(np.arange(N_ROWS) % n_options)
    negs_POM = rng.integers(-2, 3, (N_ROWS, n_options, N_ALL)).astype(np.float32)
    negs_POM[np.arange(N_ROWS), gold_P, 7] += 1
    activations_PM = rng.integers(-3, 4, (N_ROWS, N_ALL)).astype(np.float32)
    return Numbers(negs_POM, activations_PM, gold_P)


def write_split(
    root: Path,
    split: str,
    data: Numbers,
    *,
    dataset: str = "d",
    shard_rows: int = 16,
    first_label: int = 5,
    **changes: Any,
) -> NegSplit:
    """Write a split whose labels are consecutive tokens, and open it."""
    shape = (N_LAYERS, N_NEURONS)
    layered = LayerNumbers(
        data.negs_POM.reshape(*data.negs_POM.shape[:2], *shape), data.activations_PM.reshape(-1, *shape), data.gold_P
    )
    return write_layers(
        root, split, layered, dataset=dataset, shard_rows=shard_rows, first_label=first_label, **changes
    )


def write_layers(
    root: Path,
    split: str,
    data: LayerNumbers,
    *,
    dataset: str = "d",
    shard_rows: int = 20,
    first_label: int = 0,
    empty: Collection[int] = (),
    neurons: Sequence[int] | None = None,
    **changes: Any,
) -> NegSplit:
    """Write a split of any shape, some of its shards without rows, and open it."""
    digest = None if neurons is None else choice_digest(neurons)
    starts = range(0, len(data.gold_P), shard_rows)
    for index, start in enumerate(starts):
        end = start if index in empty else start + shard_rows
        negs_POLN, activations_PLN, gold_P = (values[start:end] for values in data)
        n, n_options, n_layers, n_neurons = negs_POLN.shape
        write_negs(
            root,
            negs_place("m", dataset, split),
            index,
            len(starts),
            identity=identity_of(n_layers, n_neurons, neurons=digest, **changes),
            examples=[Row(f"{split}/{start + i}", answer=int(gold)) for i, gold in enumerate(gold_P)],
            label_ids_PO=np.tile(first_label + np.arange(n_options), (n, 1)),
            negs_POLN=negs_POLN,
            activations_PLN=activations_PLN,
            probs_PO=np.full((n, n_options), 0.1),
            neurons=neurons,
        )
    return open_negs(root).select("m", dataset, split)


def rows_of(split: NegSplit, shard_rows: int = 20) -> list[list[Row]]:
    """Return the rows of each shard of a split as `write_layers` wrote it."""
    rows = [Row(id_, answer=int(gold)) for id_, gold in zip(split.ids, split.gold_P, strict=True)]
    return [rows[start : start + shard_rows] for start in range(0, len(rows), shard_rows)]


def write_splits(root: Path) -> dict[str, NegSplit]:
    """Write and open the three splits of a dataset."""
    return {split: write_split(root, split, numbers(split)) for split in ("train", "valid", "test")}
