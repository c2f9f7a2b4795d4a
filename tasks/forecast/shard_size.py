"""Bytes of shards before there are any: exact, since a shard's length depends on its rows' number and texts alone.

Checked in the tests against written files of every storage level. Rows that are set aside make a shard shorter.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import pyarrow as pa

from negcore.datasets import Example
from negcore.model.check import ModelCheck
from negcore.model.layer_shapes import shapes_of
from negcore.store.identity import canonical_json, choice_digest
from negcore.store.levels import STORAGE_LEVELS
from negcore.store.schema import ALIGNMENT_BYTES, aligned_schema, lists
from tasks.measure.shard_set import ShardSet
from tasks.plan import n_chosen

_HASH_BYTES = 32
_ARROW_ALIGNMENT_BYTES = 8
_OFFSET_BYTES = 4


def shard_bytes(split: ShardSet, indices: Iterable[int] | None = None) -> list[int]:
    """Return the bytes of each of a split's shards, or of some of them."""
    n_layers, n_neurons = split.identity.n_layers, split.identity.n_neurons
    level, shapes = STORAGE_LEVELS[split.identity.storage], shapes_of(split.identity.experts)
    schema = level.schema(split.n_options, n_layers, n_neurons, n_chosen(split), shapes)
    file_bytes = _file_bytes(schema, split)
    n_listed = n_chosen(split) or n_layers * n_neurons
    chosen = range(len(split.shards)) if indices is None else indices
    return [file_bytes(index, _body_bytes(schema, split.shards[index], n_listed)) for index in chosen]


def _file_bytes(schema: pa.Schema, split: ShardSet) -> Callable[[int, int], int]:
    """Return a function that gives a file's bytes from its shard's index and the bytes of its numbers and texts.

    A batch of one row and one number a column stands for the shard: its message is as long, as lengths are written
    in a fixed number of bytes.
    """
    small = _small_batch(schema)
    small_bytes = pa.ipc.get_record_batch_size(small)
    message_bytes: int = small_bytes - pa.ipc.read_message(small.serialize()).body.size

    @cache
    def bytes_around(index_digits: int, past_alignment: int) -> int:
        """Return the bytes before and behind the batch: blanks in its metadata align it, see `aligned_schema`."""
        metadata = canonical_json(_metadata(split, int("9" * index_digits)))
        aligned = aligned_schema(small.schema, metadata, ALIGNMENT_BYTES + past_alignment)
        sink = pa.MockOutputStream()
        with pa.ipc.new_file(sink, aligned) as writer:
            writer.write_batch(small.replace_schema_metadata(aligned.metadata))
        n_bytes: int = sink.size() - small_bytes
        return n_bytes

    def file_bytes(index: int, body_bytes: int) -> int:
        batch_bytes = message_bytes + body_bytes
        return bytes_around(len(str(index)), batch_bytes % ALIGNMENT_BYTES) + batch_bytes

    return file_bytes


def _metadata(split: ShardSet, index: int) -> dict[str, object]:
    """Return the metadata of a shard, or something of the same length."""
    chosen = {} if n_chosen(split) is None else {"neurons": choice_digest(())}
    return {
        "identity": split.identity.comparable() | chosen,
        "versions": split.identity.versions,
        "digest": split.identity.digest,
        "partition": split.place.names,
        "axes": split.measurement.axes,
        "check": ModelCheck.expected(split.identity.dtype).metadata,
        "n_options": split.n_options,
        "index": index,
        "n_shards": len(split.shards),
    }


def _small_batch(schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch of one row whose columns have the given types, but hold one number each."""
    types = {
        field.name: lists(field.type.value_type, 1) if pa.types.is_fixed_size_list(field.type) else field.type
        for field in schema
    }
    fields = [pa.field(name, type_, nullable=False) for name, type_ in types.items()]
    row = {name: _one_value(type_) for name, type_ in types.items()}
    return pa.RecordBatch.from_pylist([row], schema=pa.schema(fields))


def _one_value(type_: pa.DataType) -> object:
    if pa.types.is_string(type_):
        return ""
    return [0] if pa.types.is_nested(type_) else 0


def _body_bytes(schema: pa.Schema, shard: Sequence[Example], n_listed: int) -> int:
    """Return the bytes of a batch's buffers: numbers are padded by `negcore.store.schema.column`, all else by Arrow.

    Parameters
    ----------
    n_listed : int
        Values in a column that holds a list in the first row alone.
    """
    offsets = _padded(_OFFSET_BYTES * (len(shard) + 1))
    texts = {
        "id": sum(len(example.id.encode()) for example in shard),
        "text_hash": _HASH_BYTES * len(shard),
        "group": sum(len(example.group.encode()) for example in shard),
    }
    n_bytes = 0
    for name, type_ in zip(schema.names, schema.types, strict=True):
        if pa.types.is_string(type_):
            n_bytes += offsets + _padded(texts[name])
        elif pa.types.is_list(type_):
            n_bytes += offsets + _padded(n_listed * _bytes_a_row(type_.value_type))
        else:
            n_bytes += _padded(len(shard) * _bytes_a_row(type_), ALIGNMENT_BYTES)
    return n_bytes


def _bytes_a_row(type_: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(type_):
        return int(type_.list_size) * _bytes_a_row(type_.value_type)
    return int(type_.bit_width) // 8


def _padded(n_bytes: int, alignment: int = _ARROW_ALIGNMENT_BYTES) -> int:
    return -(-n_bytes // alignment) * alignment
