"""Sweeps, estimates, interventions and causal checks on disk: the same shards and receipts as NEGs, a row a prompt.

Layout of a run directory (names quoted as in `negcore.store.publish`)::

    sweeps/model=smollm2-135m/dataset=mini%2Ffacts/block=layers-00-04/part-00003.arrow
    estimates/model=smollm2-135m/dataset=mini%2Ffacts/estimator=neurgrad/part-00000.arrow
    interventions/model=smollm2-135m/dataset=mini%2Ffacts/sets=nested/part-00000.arrow
    causal/model=smollm2-135m/dataset=agnews/sets=magn-5b1f0c7a9d24e863/part-00000.arrow

Beside the receipts, `_seconds` holds how long each shard took. Time is not part of a shard: the same numbers are the
same bytes, whoever computes them and however fast.

Shapes: P prompts (rows), K chosen neurons, S shifts of one neuron, D shifts of sets, M sets.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from negcore.errors import ShardError
from negcore.measure.interventions import InterventionResult
from negcore.measure.sweeps import SweepResult
from negcore.store.files import draft, location, read_all
from negcore.store.identity import RunIdentity, canonical_json, text_hash
from negcore.store.publish import Receipt, SetAside, publish_batch
from negcore.store.reader import complete_receipts, local_shard, mapped_batch
from negcore.store.schema import StoredExample, column, lists

Floats32 = NDArray[np.float32]
Kind = Literal["sweeps", "estimates", "interventions", "causal"]
Columns = Mapping[str, ArrayLike]

_PART_KEYS: Mapping[Kind, str] = {
    "sweeps": "block",
    "estimates": "estimator",
    "interventions": "sets",
    "causal": "sets",
}


class StudyPlace(NamedTuple):
    """One directory of shards of a study: a block of layers that is swept, an estimator, or sets of neurons."""

    kind: Kind
    model: str
    dataset: str
    part: str

    def path(self, root: str | Path) -> Path:
        """This directory under the run directory `root`."""
        names = {"model": self.model, "dataset": self.dataset, _PART_KEYS[self.kind]: self.part}
        assert all(names.values()), self
        return location(root).joinpath(self.kind, *(f"{key}={quote(value, safe='')}" for key, value in names.items()))


@dataclass(frozen=True, kw_only=True)
class StudyIdentity(RunIdentity):
    """What makes the numbers of two studies comparable."""

    study: Mapping[str, Any]
    """Neurons, shifts, estimator: what was measured, as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "study", json.loads(canonical_json(self.study)))  # as it is read back


def sweep_columns(result: SweepResult) -> Columns:
    """What is stored of a sweep."""
    return {
        "label_id": result.label_ids_P.astype(np.int32),
        "base_prob": result.base_probs_P,
        "activations": result.activations_PK,
        "probs": result.probs_PKS,
    }


def intervention_columns(results: Sequence[InterventionResult]) -> Columns:
    """What is stored of interventions that differ in their shift."""
    return {
        "base_prob": results[0].base_probs_P,
        "predicted": np.stack([result.predicted_PM for result in results], axis=1),
        "probs": np.stack([result.probs_PM for result in results], axis=1),
    }


def write_study_shard(
    root: str | Path,
    place: StudyPlace,
    index: int,
    n_shards: int,
    *,
    identity: StudyIdentity,
    examples: Sequence[StoredExample],
    columns: Columns,
    axes: Mapping[str, Any],
    set_aside: Sequence[SetAside] = (),
) -> Receipt:
    """Publish one shard of a study and then its receipt; the bytes of both depend on the arguments alone.

    Parameters
    ----------
    examples : sequence of P examples
        Of the prompts only a hash is stored.
    columns : mapping of name to array (P, ...)
        Floats are stored as float32; a row is flat, its last axis fastest.
    axes : mapping
        What the places in a row stand for: neurons, shifts, sets.
    set_aside : sequence of SetAside
        Rows that belong to this shard and are not among `examples`.
    """
    return publish_batch(
        place.path(root),
        index,
        n_shards,
        identity=identity,
        batch=_record_batch(examples, columns),
        about={"place": place._asdict(), "axes": axes},
        set_aside=set_aside,
    )


class StudyShards(NamedTuple):
    """The shards of one directory, put together."""

    columns: dict[str, Floats32]
    """Arrays (P, ...) by name."""
    ids: list[str]
    groups: list[str]
    axes: dict[str, Any]
    seconds_per_prompt: float
    """Mean over the shards that it is known of; NaN if of none."""


def read_study(folder: Path) -> StudyShards:
    """Read all shards of a directory.

    Raises
    ------
    ShardError
        If it is incomplete or damaged.
    """
    receipts = complete_receipts(folder, verify=False)
    batches = [mapped_batch(local_shard(folder, receipt)) for receipt in receipts]
    if any(not batch.schema.equals(batches[0].schema) for batch in batches):
        raise ShardError(
            f"{str(folder)!r} holds shards with different columns: delete it and run the same command again"
        )
    schema = batches[0].schema
    numbers = [field.name for field in schema if field.type != pa.string()]
    return StudyShards(
        {name: np.concatenate([_rows(batch.column(name)) for batch in batches]) for name in numbers},
        [id_ for batch in batches for id_ in batch.column("id").to_pylist()],
        [group for batch in batches for group in batch.column("group").to_pylist()],
        json.loads(schema.metadata[b"neg"])["axes"],
        _seconds_per_prompt(folder, receipts),
    )


def read_sweep(folders: Sequence[Path]) -> SweepResult:
    """Put the blocks of layers of a sweep together.

    Raises
    ------
    ShardError
        If one is incomplete or damaged.
    """
    blocks = [read_study(folder) for folder in folders]
    shifts_S = np.array(blocks[0].axes["shifts"])
    n_prompts = len(blocks[0].ids)
    return SweepResult(
        neurons_K2=np.concatenate([np.array(block.axes["neurons"], np.int64) for block in blocks]),
        shifts_S=shifts_S,
        base_probs_P=blocks[0].columns["base_prob"],
        activations_PK=np.concatenate([block.columns["activations"] for block in blocks], axis=1),
        probs_PKS=np.concatenate(
            [block.columns["probs"].reshape(n_prompts, -1, len(shifts_S)) for block in blocks], axis=1
        ),
        label_ids_P=blocks[0].columns["label_id"].astype(np.int64),
    )


def write_seconds(folder: Path, index: int, seconds: float) -> None:
    """Note how long a published shard took."""
    with draft(folder / _SECONDS / _seconds_name(index)) as file:
        file.write_text(json.dumps(seconds))


def _record_batch(examples: Sequence[StoredExample], columns: Columns) -> pa.RecordBatch:
    arrays = {
        "id": pa.array([example.id for example in examples], pa.string()),
        "text_hash": pa.array([text_hash(example.prompt) for example in examples], pa.string()),
        "group": pa.array([example.group for example in examples], pa.string()),
    }
    for name, values in columns.items():
        array = np.asarray(values)
        assert len(array) == len(examples), (name, array.shape)
        arrays[name] = column(array.astype(np.float32) if array.dtype.kind == "f" else array)
    fields = [pa.field(name, _type(array), nullable=False) for name, array in arrays.items()]
    return pa.RecordBatch.from_arrays(list(arrays.values()), schema=pa.schema(fields))


def _type(array: pa.Array) -> pa.DataType:
    type_ = array.type
    return lists(type_.value_type, type_.list_size) if pa.types.is_fixed_size_list(type_) else type_


def _rows(array: pa.Array) -> Floats32:
    if not pa.types.is_fixed_size_list(array.type):
        flat: Floats32 = array.to_numpy()
        return flat
    rows: Floats32 = array.values.to_numpy().reshape(len(array), array.type.list_size)
    return rows


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
    """None if the writer died before it could note them."""
    try:
        return None if note is None else float(json.loads(note))
    except ValueError:
        return None
