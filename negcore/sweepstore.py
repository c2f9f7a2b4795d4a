"""Sweeps, estimates and interventions on disk: the same shards and receipts as NEGs, a row a prompt.

Layout of a run directory (names quoted as in `negcore.shards`)::

    sweeps/model=smollm2-135m/dataset=mini%2Ffacts/block=layers-00-04/part-00003.arrow
    estimates/model=smollm2-135m/dataset=mini%2Ffacts/estimator=neurgrad/part-00000.arrow
    interventions/model=smollm2-135m/dataset=mini%2Ffacts/sets=nested/part-00000.arrow

Beside the receipts, `_seconds` holds how long each shard took. Time is not part of a shard: the same numbers are the
same bytes, whoever computes them and however fast.

Shapes: P prompts (rows), K chosen neurons, S shifts of one neuron, D shifts of sets, M sets.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from negcore.columns import StoredExample, column, lists
from negcore.errors import ShardError
from negcore.identity import RunIdentity, canonical_json, text_hash
from negcore.interventions import InterventionResult
from negcore.reader import complete_receipts, mapped_batch
from negcore.shards import Receipt, publish_batch, shard_path
from negcore.sweeps import SweepResult

Floats32 = NDArray[np.float32]
Kind = Literal["sweeps", "estimates", "interventions"]
Columns = Mapping[str, ArrayLike]

_PART_KEYS: Mapping[Kind, str] = {"sweeps": "block", "estimates": "estimator", "interventions": "sets"}


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
        return Path(root, self.kind, *(f"{key}={quote(value, safe='')}" for key, value in names.items()))


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
    """
    return publish_batch(
        place.path(root),
        index,
        n_shards,
        identity=identity,
        batch=_record_batch(examples, columns),
        about={"place": place._asdict(), "axes": axes},
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
    batches = [mapped_batch(shard_path(folder, receipt.index)) for receipt in receipts]
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
    path = _seconds_path(folder, index)
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(seconds))
    draft.replace(path)


def _record_batch(examples: Sequence[StoredExample], columns: Columns) -> pa.RecordBatch:
    arrays = {
        "id": pa.array([example.id for example in examples], pa.string()),
        "text_hash": pa.array([text_hash(example.prompt) for example in examples], pa.string()),
        "group": pa.array([example.group for example in examples], pa.string()),
    }
    for name, values in columns.items():
        array = np.asarray(values)
        assert len(array) == len(examples) > 0, (name, array.shape)
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


def _seconds_path(folder: Path, index: int) -> Path:
    return folder / "_seconds" / f"{shard_path(folder, index).stem}.json"


def _seconds_per_prompt(folder: Path, receipts: Sequence[Receipt]) -> float:
    known = [(receipt.n_rows, seconds) for receipt in receipts for seconds in _read_seconds(folder, receipt.index)]
    rows, seconds = map(sum, zip(*known, strict=True)) if known else (0, 0.0)
    return seconds / rows if rows else float("nan")


def _read_seconds(folder: Path, index: int) -> Iterator[float]:
    """Nothing if the writer died before it could note them."""
    try:
        yield float(json.loads(_seconds_path(folder, index).read_text()))
    except (FileNotFoundError, ValueError):
        return
