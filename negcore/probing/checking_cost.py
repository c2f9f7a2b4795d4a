"""Time the ranking of neurons with every shard checked before it is read, and without: what the checks cost."""

import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from negcore.measure.benchmark import Timing, Watch, unseen
from negcore.probing.rankings import rank
from negcore.store.identity import RunIdentity
from negcore.store.integrity import forget_checks
from negcore.store.levels import STORAGE_LEVELS
from negcore.store.publish import ShardPlace, publish_shard
from negcore.store.reader import open_negs

N_SHARDS, N_ROWS = 8, 16
"""Shards, and rows of each."""
_N_OPTIONS, _N_LAYERS, _N_NEURONS = 4, 16, 1536
_PLACE = ShardPlace("negs", "random", "random", "train")


class _Row(NamedTuple):
    id: str
    prompt: str
    answer: int
    group: str = ""


def time_checks(folder: Path, *, repeats: int = 3, watch: Watch = unseen) -> Timing:
    """Time both ways on random NEGs, in turns.

    Parameters
    ----------
    folder : Path
        An empty directory, where the shards are written.
    watch : callable
        Told what is timed, as it begins.

    Returns
    -------
    Timing
        Seconds to open the NEGs and rank all neurons; the plain way is the checked one.
    """
    watch(f"checks of shards: writing {N_SHARDS}")
    for index in range(N_SHARDS):
        _write(folder, index)
    shards = list(folder.rglob("*.arrow"))
    n_bytes = sum(path.stat().st_size for path in shards)
    for path in shards:
        os.utime(path, (0, 0))  # what was written just now is not remembered as checked
    _seconds(folder, verify=True)  # the first call allocates
    times = []
    for repeat in range(repeats):
        watch(f"checks of shards: repeat {repeat + 1} of {repeats}")
        times.append((_seconds(folder, verify=False), _seconds(folder, verify=True)))
    title = f"ranking on {n_bytes / 2**20:.0f} MiB of NEGs, unchecked and checked, s"
    return Timing(title, [unchecked for unchecked, _ in times], [checked for _, checked in times])


def _seconds(folder: Path, *, verify: bool) -> float:
    forget_checks()
    started = time.perf_counter()
    rank(open_negs(folder, verify=verify).at(_PLACE))
    return time.perf_counter() - started


def _write(folder: Path, index: int) -> None:
    rng = np.random.default_rng(index)
    shape = _N_LAYERS, _N_NEURONS
    batch = STORAGE_LEVELS["values"].batch(
        [_Row(f"{index}/{row}", str(row), row % _N_OPTIONS) for row in range(N_ROWS)],
        label_ids_PO=np.tile(np.arange(_N_OPTIONS), (N_ROWS, 1)),
        negs_POLN=rng.standard_normal((N_ROWS, _N_OPTIONS, *shape), np.float32),
        activations_PLN=rng.standard_normal((N_ROWS, *shape), np.float32),
        probs_PO=np.full((N_ROWS, _N_OPTIONS), 1 / _N_OPTIONS),
    )
    identity = RunIdentity(
        model=_PLACE.model,
        model_revision="none",
        tokenizer_hash="none",
        site="up",
        dtype="float32",
        n_layers=_N_LAYERS,
        n_neurons=_N_NEURONS,
        prompt={},
        dataset_fingerprint="none",
    )
    publish_shard(folder, _PLACE, index, N_SHARDS, identity=identity, batch=batch, about={"axes": {}})
