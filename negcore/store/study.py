"""Sweeps, estimates, interventions and causal checks on disk: the same shards and receipts as NEGs, a row a prompt.

Beside the receipts, `_seconds` holds how long each shard took. Time is not part of a shard: the same numbers are the
same bytes, whoever computes them and however fast.

Shapes: P prompts (rows), K chosen neurons, S shifts of one neuron, D shifts of sets, M sets.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from negcore.arrays import Floats
from negcore.errors import ShardError
from negcore.measure.interventions import InterventionResult
from negcore.measure.sweeps import SweepResult
from negcore.store.files import draft, parse_json, read_all
from negcore.store.publish import Receipt
from negcore.store.reader import ShardReader
from negcore.store.schema import ROW_COLUMNS, StoredExample, column, record_batch
from negcore.targets import DEFAULT_TARGET, checked_target

Floats32 = NDArray[np.float32]
Columns = Mapping[str, NDArray[Any]]


class ValueNames(NamedTuple):
    """Names of the columns that hold a target without shifts and with them."""

    base: str
    shifted: str


def value_names(target: str) -> ValueNames:
    """Return the columns of a target's values: only probabilities are called so."""
    return ValueNames("base_prob", "probs") if target == DEFAULT_TARGET else ValueNames("base_value", "values")


def sweep_columns(result: SweepResult) -> Columns:
    """Return the stored columns of a sweep."""
    names = value_names(result.target)
    return (
        {
            "label_id": result.label_ids_P.astype(np.int32),
            names.base: result.base_P,
            "activations": result.activations_PK,
            names.shifted: result.values_PKS,
        }
        | ({} if result.spreads_K is None else {"spreads": np.tile(result.spreads_K, (len(result.base_P), 1))})
        | ({} if result.by_nodes_PK is None else {"by_nodes": result.by_nodes_PK.astype(np.uint8)})
    )


def intervention_columns(result: InterventionResult) -> Columns:
    """Return the stored columns of interventions."""
    names = value_names(result.target)
    columns = {names.base: result.base_P, "predicted": result.predicted_PDM, names.shifted: result.values_PDM}
    n_shifted_PM = result.n_shifted_PM
    return columns | ({} if n_shifted_PM is None else {"n_shifted": n_shifted_PM.astype(np.int32)})


def study_batch(examples: Sequence[StoredExample], columns: Columns) -> pa.RecordBatch:
    """Return the rows of a shard; of the prompts only a hash.

    Parameters
    ----------
    examples : sequence of P examples
    columns : mapping of name to array (P, ...)
        Floats are stored as float32; a row is flat, its last axis fastest.
    """
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    stored = {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in arrays.items()}
    return record_batch(examples, {name: column(array) for name, array in stored.items()})


class StudyShards(NamedTuple):
    """The shards of one directory, put together."""

    columns: dict[str, Floats32]
    """Arrays (P, ...) by name."""
    ids: list[str]
    groups: list[str]
    axes: dict[str, Any]
    seconds_per_prompt: float
    """Mean over the shards that it is known of; NaN if of none."""

    def take(self, ids: Sequence[str]) -> "StudyShards":
        """Return the rows with these ids, in this order."""
        at = {id_: row for row, id_ in enumerate(self.ids)}
        rows = [at[id_] for id_ in ids]
        columns = {name: values[rows] for name, values in self.columns.items()}
        return self._replace(columns=columns, ids=list(ids), groups=[self.groups[row] for row in rows])


def read_study(folder: Path) -> StudyShards:
    """Read all shards of a directory.

    Raises
    ------
    ShardError
        If it is incomplete or damaged.
    """
    reader = ShardReader(folder)
    columns = reader.read(reader.schema.names)
    return StudyShards(
        {name: values for name, values in columns.items() if name not in ROW_COLUMNS},
        columns["id"],
        columns["group"],
        reader.metadata["axes"],
        _seconds_per_prompt(folder, reader.receipts),
    )


def read_studies(folders: Sequence[Path]) -> list[StudyShards]:
    """Read several directories about the same prompts, and keep the rows that all of them hold, in one order.

    Raises
    ------
    ShardError
        If one is incomplete or damaged, or no row is in all of them.
    """
    studies = [read_study(folder) for folder in folders]
    common = set(studies[0].ids).intersection(*(study.ids for study in studies))
    if not common:
        listed = ", ".join(map(str, folders))
        raise ShardError(f"no row is in all of {listed}: each one was set aside somewhere")
    ids = [id_ for id_ in studies[0].ids if id_ in common]
    return [study if study.ids == ids else study.take(ids) for study in studies]


def joined_sweep(blocks: Sequence[StudyShards]) -> SweepResult:
    """Put the blocks of layers of a sweep together, which hold the same rows."""
    axes, shifts_S = blocks[0].axes, np.array(blocks[0].axes["shifts"])
    target = checked_target(axes.get("target", DEFAULT_TARGET))
    names = value_names(target)
    n_prompts = len(blocks[0].ids)
    spreads_K = None
    if "spreads" in blocks[0].columns:  # the same in every row
        spreads_K = np.concatenate([block.columns["spreads"][0].astype(np.float64) for block in blocks])
    return SweepResult(
        neurons_K2=np.concatenate([np.array(block.axes["neurons"], np.int64) for block in blocks]),
        shifts_S=shifts_S,
        base_P=blocks[0].columns[names.base],
        activations_PK=np.concatenate([block.columns["activations"] for block in blocks], axis=1),
        values_PKS=np.concatenate(
            [block.columns[names.shifted].reshape(n_prompts, -1, len(shifts_S)) for block in blocks], axis=1
        ),
        label_ids_P=blocks[0].columns["label_id"].astype(np.int64),
        by_nodes_PK=(
            np.concatenate([block.columns["by_nodes"].astype(bool) for block in blocks], axis=1)
            if axes.get("nodes")
            else None
        ),
        ranges=tuple(axes.get("ranges", ())),
        target=target,
        spreads_K=spreads_K,
        active_PK=_active(blocks, spreads_K),
    )


def _active(blocks: Sequence[StudyShards], spreads_K: Floats | None) -> NDArray[np.bool_] | None:
    """Return which neurons of a sweep were shifted: those that a prompt has, and that have a spread; None if all."""
    if "active" in blocks[0].columns:  # of a mixture of experts
        return np.concatenate([block.columns["active"].astype(bool) for block in blocks], axis=1)
    return None if spreads_K is None else np.tile(spreads_K > 0, (len(blocks[0].ids), 1))


def write_seconds(folder: Path, index: int, seconds: float) -> None:
    """Note how long a published shard took."""
    with draft(folder / _SECONDS / _seconds_name(index)) as file:
        file.write_text(json.dumps(seconds))


_SECONDS = "_seconds"


def _seconds_name(index: int) -> str:
    return f"part-{index:05d}.json"


def _seconds_per_prompt(folder: Path, receipts: Sequence[Receipt]) -> float:
    notes = {path.name: note for path, note in read_all(folder, f"{_SECONDS}/part-*.json").items()}
    found = [(receipt.n_rows, _seconds(notes.get(_seconds_name(receipt.index)))) for receipt in receipts]
    known = [(rows, seconds) for rows, seconds in found if seconds is not None]
    rows, seconds = map(sum, zip(*known, strict=True)) if known else (0, 0.0)
    return seconds / rows if rows else float("nan")


def _seconds(note: bytes | None) -> float | None:
    """Return the noted seconds; None if the writer died before it could note them."""
    try:
        return None if note is None else float(parse_json(note))
    except (ValueError, TypeError, OverflowError):
        return None
