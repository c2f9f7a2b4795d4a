"""Bytes of shards before there are any: exact, since a shard's length depends on its rows' number and texts alone.

Checked in the tests against written files of every storage level. Rows that are set aside make a shard shorter.
"""

from collections.abc import Callable, Sequence
from functools import cache

import pyarrow as pa

from negcore.datasets import Example
from negcore.store.identity import canonical_json, choice_digest
from negcore.store.schema import ALIGNMENT_BYTES, AXES, aligned_schema, lists, shard_schema
from tasks.measure.shard_set import ShardSet
from tasks.plan import n_chosen

_HASH_BYTES = 32
_ARROW_ALIGNMENT_BYTES = 8
_OFFSET_BYTES = 4


def shard_bytes(split: ShardSet) -> list[int]:
    """Bytes of each of a split's shards."""
    n_options, n_layers, n_neurons = len(split.examples[0].labels), split.identity.n_layers, split.identity.n_neurons
    schema = shard_schema(n_options, n_layers, n_neurons, split.identity.storage, n_chosen(split))
    file_bytes = _file_bytes(schema, split)
    n_said = n_chosen(split) or n_layers * n_neurons
    return [file_bytes(index, _body_bytes(schema, shard, n_said)) for index, shard in enumerate(split.shards)]


def _file_bytes(schema: pa.Schema, split: ShardSet) -> Callable[[int, int], int]:
    """The bytes of a file by the index of its shard and the bytes of its numbers and texts.

    A row of columns of one number each has a message as long as that of the shard, whose lengths are written in as
    many bytes.
    """
    thin = pa.RecordBatch.from_pylist(
        [{field.name: _one_value(field.type) for field in schema}],
        schema=pa.schema([pa.field(field.name, _thin(field.type), nullable=False) for field in schema]),
    )
    thin_bytes = pa.ipc.get_record_batch_size(thin)
    message_bytes: int = thin_bytes - pa.ipc.read_message(thin.serialize()).body.size

    @cache
    def around(index_digits: int, past_alignment: int) -> int:
        """Bytes before and behind the batch: blanks in its metadata align it, see `aligned_schema`."""
        about = canonical_json(_about(split, int("9" * index_digits)))
        padded = thin.replace_schema_metadata(
            aligned_schema(thin.schema, about, ALIGNMENT_BYTES + past_alignment).metadata
        )
        sink = pa.MockOutputStream()
        with pa.ipc.new_file(sink, padded.schema) as writer:
            writer.write_batch(padded)
        n_bytes: int = sink.size() - thin_bytes
        return n_bytes

    def file_bytes(index: int, body_bytes: int) -> int:
        batch_bytes = message_bytes + body_bytes
        return around(len(str(index)), batch_bytes % ALIGNMENT_BYTES) + batch_bytes

    return file_bytes


def _about(split: ShardSet, index: int) -> dict[str, object]:
    """What such a shard says of itself, or something as long."""
    chosen = {} if n_chosen(split) is None else {"neurons": choice_digest(())}
    return {
        "identity": split.identity.comparable() | chosen,
        "versions": split.identity.versions,
        "digest": split.identity.digest,
        "partition": split.place.names,
        "axes": dict(AXES[split.identity.storage]),
        "n_options": len(split.examples[0].labels),
        "index": index,
        "n_shards": len(split.shards),
    }


def _thin(type_: pa.DataType) -> pa.DataType:
    return lists(type_.value_type, 1) if pa.types.is_fixed_size_list(type_) else type_


def _one_value(type_: pa.DataType) -> object:
    if pa.types.is_string(type_):
        return ""
    return [0] if pa.types.is_fixed_size_list(type_) or pa.types.is_list(type_) else 0


def _body_bytes(schema: pa.Schema, shard: Sequence[Example], n_said: int) -> int:
    """The buffers of a batch. Numbers are padded by us (see `negcore.store.schema.column`), all else by Arrow.

    Parameters
    ----------
    n_said : int
        Values of a column that holds them in a shard's first row alone.
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
            n_bytes += offsets + _padded(n_said * _bytes_a_row(type_.value_type))
        else:
            n_bytes += _padded(len(shard) * _bytes_a_row(type_), ALIGNMENT_BYTES)
    return n_bytes


def _bytes_a_row(type_: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(type_):
        return int(type_.list_size) * _bytes_a_row(type_.value_type)
    return int(type_.bit_width) // 8


def _padded(n_bytes: int, alignment: int = _ARROW_ALIGNMENT_BYTES) -> int:
    return -(-n_bytes // alignment) * alignment
