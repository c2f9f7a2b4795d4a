"""Small splits of NEGs on disk: whole numbers with many ties and zeros, and a neuron with a little skill."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from support import negs_place, write_negs

from negcore.store.identity import RunIdentity
from negcore.store.reader import NegSplit, open_negs

N_LAYERS, N_NEURONS, N_OPTIONS, N_ROWS = 3, 5, 3, 40
N_ALL = N_LAYERS * N_NEURONS


class Row(NamedTuple):
    """An example."""

    id: str
    prompt: str
    answer: int
    group: str


class Numbers(NamedTuple):
    """The numbers of a split."""

    negs_POM: np.ndarray
    activations_PM: np.ndarray
    gold_P: np.ndarray


def numbers(split: str, dataset: str = "d", n_options: int = N_OPTIONS) -> Numbers:
    """Make numbers that sums and means do not round."""
    rng = np.random.default_rng([len(split), *dataset.encode(), n_options])
    gold_P = rng.permutation(np.arange(N_ROWS) % n_options)
    negs_POM = rng.integers(-2, 3, (N_ROWS, n_options, N_ALL)).astype(np.float32)
    negs_POM[np.arange(N_ROWS), gold_P, 7] += 1
    activations_PM = rng.integers(-3, 4, (N_ROWS, N_ALL)).astype(np.float32)
    return Numbers(negs_POM, activations_PM, gold_P)


def identity(**changes: Any) -> RunIdentity:
    """Return the identity of the stored numbers."""
    settings = {"model": "m", "model_revision": "r", "tokenizer_hash": "t", "site": "up", "dtype": "float32"}
    settings |= {"n_layers": N_LAYERS, "n_neurons": N_NEURONS, "prompt": {}, "dataset_fingerprint": "f"}
    return RunIdentity(**settings | changes)


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
    starts = range(0, len(data.gold_P), shard_rows)
    for index, start in enumerate(starts):
        negs_POM, activations_PM, gold_P = (values[start : start + shard_rows] for values in data)
        n, n_options = negs_POM.shape[:2]
        write_negs(
            root,
            negs_place("m", dataset, split),
            index,
            len(starts),
            identity=identity(**changes),
            examples=[Row(f"{split}/{start + i}", "?", int(gold), "") for i, gold in enumerate(gold_P)],
            label_ids_PO=np.tile(first_label + np.arange(n_options), (n, 1)),
            negs_POLN=negs_POM.reshape(n, n_options, N_LAYERS, N_NEURONS),
            activations_PLN=activations_PM.reshape(n, N_LAYERS, N_NEURONS),
            probs_PO=np.full((n, n_options), 0.1),
        )
    return open_negs(root).select("m", dataset, split)


def write_splits(root: Path) -> dict[str, NegSplit]:
    """Write and open the three splits of a dataset."""
    return {split: write_split(root, split, numbers(split)) for split in ("train", "valid", "test")}
