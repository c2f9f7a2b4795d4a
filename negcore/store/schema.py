"""Columns of Arrow shards: how arrays become columns of a file, and columns of a mapped file arrays again.

A row is a prompt. What belongs to a whole shard (vote sums, chosen neurons) is a list in its first row.

Axes: P prompts (rows).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negcore.model.layer_shapes import LayerShapes
from negcore.store.identity import prompt_hash

ALIGNMENT_BYTES = 64
ROW_COLUMNS = ("id", "text_hash", "group")
"""The first columns of every shard: which row it is."""
IN_FIRST_ROW = pa.list_(pa.field("item", pa.int32(), nullable=False))
"""Type of a column that holds a list of whole numbers in its first row alone."""


class StoredExample(Protocol):
    """An example as a shard keeps it: its identity, and of its prompt only a hash."""

    @property
    def id(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> int: ...
    @property
    def group(self) -> str: ...


# Writing


def record_batch(examples: Sequence[StoredExample], columns: Mapping[str, pa.Array]) -> pa.RecordBatch:
    """Return the rows of one shard, possibly none: which rows they are, then the columns given, in their order."""
    arrays = {
        "id": pa.array([example.id for example in examples], pa.string()),
        "text_hash": pa.array([prompt_hash(example) for example in examples], pa.string()),
        "group": pa.array([example.group for example in examples], pa.string()),
        **columns,
    }
    assert all(len(values) == len(examples) for values in arrays.values()), (len(examples), list(arrays))
    fields = [pa.field(name, values.type, nullable=False) for name, values in arrays.items()]
    return pa.RecordBatch.from_arrays(list(arrays.values()), schema=pa.schema(fields))


def column(values: npt.NDArray[Any]) -> pa.Array:
    """Return a column over zero-padded memory: one number a row, or a list of all of a row's numbers.

    Numbers that lie in order and need no padding are not copied.
    """
    buffer = values
    if values.nbytes % ALIGNMENT_BYTES or not values.flags.c_contiguous:
        buffer = np.zeros(-(-values.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES, dtype=np.uint8)
        buffer[: values.nbytes].view(values.dtype).reshape(values.shape)[...] = values
    item = pa.from_numpy_dtype(values.dtype)
    flat = pa.Array.from_buffers(item, values.size, [None, pa.py_buffer(buffer)])
    if values.ndim == 1:
        return flat
    return pa.Array.from_buffers(lists(item, prod(values.shape[1:])), len(values), [None], children=[flat])


def first_row_column(values: npt.ArrayLike, n_rows: int) -> pa.Array:
    """Return a list column that holds the values in its first row; without rows it holds nothing."""
    items = np.asarray(values, np.int32) if n_rows else np.empty(0, np.int32)
    ends = np.full(n_rows + 1, items.size, np.int32)
    ends[0] = 0
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(items), type=IN_FIRST_ROW)


def lists(item: pa.DataType, length: int) -> pa.DataType:
    """Return the type of a column of lists of one length, without gaps."""
    return pa.list_(pa.field("item", item, nullable=False), length)


def with_aligned_metadata(batch: pa.RecordBatch, metadata_json: str) -> pa.RecordBatch:
    """Return the batch with metadata under ``neg``, padded so that columns of numbers start at 64 bytes of the file."""
    schema = aligned_schema(batch.schema, metadata_json, pa.ipc.get_record_batch_size(batch))
    return batch.replace_schema_metadata(schema.metadata)


def aligned_schema(schema: pa.Schema, metadata_json: str, batch_bytes: int) -> pa.Schema:
    """Return the schema with metadata that makes a batch of so many bytes end at a multiple of 64 bytes of the file.

    Arrow's file writer aligns to 8 bytes only. It writes our padded buffers whole, so from the first column of
    numbers to the end of the batch all lengths are multiples of 64: blanks behind the JSON move that end to one.
    """
    schema = schema.with_metadata({"neg": metadata_json})
    magic_bytes = 8
    end = magic_bytes + schema.serialize().size + batch_bytes
    return schema.with_metadata({"neg": metadata_json + " " * (-end % ALIGNMENT_BYTES)})


# Reading


@dataclass(frozen=True)
class ShardColumns:
    """The columns of one mapped file; every array is a read-only view of it."""

    path: Path
    batch: pa.RecordBatch
    rows: slice
    """Place of its rows among all rows of the directory."""

    @property
    def n_rows(self) -> int:
        """Number of rows: P of this shard."""
        rows: int = self.batch.num_rows
        return rows

    @property
    def layer_shapes(self) -> LayerShapes | None:
        """Counts of each layer's neurons, of a mixture of experts; None if every prompt has every neuron."""
        return None

    @property
    def n_options(self) -> int:
        """Number of options of each row, in a shard of NEGs: O."""
        n_options = row_width(self.batch.schema, "probs")
        assert n_options is not None, self.path
        return n_options

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """Return a column of numbers: (P,), or (P, width of its lists)."""
        values = self.batch.column(name)
        if not pa.types.is_fixed_size_list(values.type):
            flat: npt.NDArray[Any] = values.to_numpy(zero_copy_only=True)
            return flat
        items: npt.NDArray[Any] = values.values.to_numpy(zero_copy_only=True)
        return items.reshape(self.n_rows, values.type.list_size)

    def strings(self, name: str) -> list[str]:
        """Return a column of strings."""
        values: list[str] = self.batch.column(name).to_pylist()
        return values


def first_row(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.int32]:
    """Return the list in the first row of a column; empty if there is no such column or no row."""
    if name not in batch.schema.names:
        return np.empty(0, np.int32)
    values: npt.NDArray[np.int32] = batch.column(name).flatten().to_numpy(zero_copy_only=True)
    return values


def row_width(schema: pa.Schema, name: str) -> int | None:
    """Return how many numbers a row has in a column of lists; None if there is no such column."""
    at = schema.get_field_index(name)
    return int(schema.types[at].list_size) if at >= 0 and pa.types.is_fixed_size_list(schema.types[at]) else None
