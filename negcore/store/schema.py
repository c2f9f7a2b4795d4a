"""The columns of one Arrow shard: a row is a prompt, and a layer is two columns that can be read without the others.

With storage "stats" there are no such columns, but two kinds of shards. Those with vote sums say of every neuron what
adds up over their rows; those with chosen neurons hold the numbers of these alone, in rising order of flat index. What
is said of a shard and not of a row (the sums, the neurons) is a list that stands in its first row.

Axes: P prompts (rows), O options, L layers, N neurons a layer, M all neurons, K chosen neurons.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negcore.errors import NegError
from negcore.measure.votes import VOTES, Vote, vote_sums
from negcore.store.bfloat16 import to_bits
from negcore.store.codes import encode
from negcore.store.identity import StorageLevel, text_hash

_COMMON_AXES = {
    "act_LL": "layer LL: row p holds N activations",
    "probs": "probability of each option's label, softmax over the vocabulary",
}
_NEG_AXES = "layer LL: row p holds O*N values, option o and neuron n at o*N + n; probability per activation"
_BFLOAT16 = "; as bfloat16: the upper 16 bits of a float32"
AXES: Mapping[StorageLevel, Mapping[str, str]] = MappingProxyType(
    {
        "values": _COMMON_AXES | {"neg_LL": _NEG_AXES},
        "bfloat16": _COMMON_AXES | {"act_LL": _COMMON_AXES["act_LL"] + _BFLOAT16, "neg_LL": _NEG_AXES + _BFLOAT16},
        "codes": _COMMON_AXES
        | {"code_LL": "layer LL: row p holds N codes: order and signs of the options' NEGs, see negcore/codes.py"},
        "stats": {
            "probs": _COMMON_AXES["probs"],
            "sum_VOTE": "row 0 holds M sums over the rows: scores of all neurons, layer-major, see negcore/votes.py",
            "neurons": "row 0 holds the flat layer-major indices of the K chosen neurons",
            "act": "row p holds K activations",
            "neg": "row p holds O*K values, option o and chosen neuron k at o*K + k; probability per activation",
        },
    }
)
"""What the columns mean, said in every file."""
ALIGNMENT_BYTES = 64
_IN_FIRST_ROW = pa.list_(pa.field("item", pa.int32(), nullable=False))


class StoredExample(Protocol):
    """What a shard keeps of an example: its identity, never its text."""

    @property
    def id(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> int: ...
    @property
    def group(self) -> str: ...


def shard_schema(
    n_options: int, n_layers: int, n_neurons: int, storage: StorageLevel = "values", n_chosen: int | None = None
) -> pa.Schema:
    """Columns of every shard of such a model and dataset, without metadata.

    Parameters
    ----------
    n_chosen : int, optional
        K, with storage "stats"; without it, the columns of vote sums.
    """
    columns = [("id", pa.string()), ("text_hash", pa.string()), ("group", pa.string())]
    if storage == "stats":  # before the columns of numbers, which stay aligned so
        names = map(sum_column, VOTES) if n_chosen is None else ["neurons"]
        columns += [(name, _IN_FIRST_ROW) for name in names]
    columns += [("gold", pa.int16())]
    columns += [("label_ids", lists(pa.int32(), n_options)), ("probs", lists(pa.float32(), n_options))]
    if n_chosen is not None:
        columns += [("act", lists(pa.float32(), n_chosen)), ("neg", lists(pa.float32(), n_options * n_chosen))]
    number = pa.uint16() if storage == "bfloat16" else pa.float32()
    for layer in range(n_layers) if storage != "stats" else ():
        columns.append((f"act_{layer:02d}", lists(number, n_neurons)))
        if storage == "codes":
            columns.append((f"code_{layer:02d}", lists(pa.uint16(), n_neurons)))
        else:
            columns.append((f"neg_{layer:02d}", lists(number, n_options * n_neurons)))
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in columns])


def record_batch(
    examples: Sequence[StoredExample],
    *,
    label_ids_PO: npt.NDArray[np.int32],
    negs_POLN: npt.NDArray[np.float32],
    activations_PLN: npt.NDArray[np.float32],
    probs_PO: npt.NDArray[np.float32],
    storage: StorageLevel = "values",
    neurons: Sequence[int] | None = None,
) -> pa.RecordBatch:
    """The rows of one shard, perhaps none; of the prompts only a hash.

    Parameters
    ----------
    neurons : sequence of K int, optional
        With storage "stats", the chosen neurons, in rising order of flat index; without them vote sums are stored.

    Raises
    ------
    NegError
        If NEGs cannot be stored as codes or sums: there are too many options for codes, or one is NaN or infinite.
    """
    n_rows, n_options, n_layers, n_neurons = negs_POLN.shape
    assert len(examples) == n_rows, (len(examples), n_rows)
    assert label_ids_PO.shape == probs_PO.shape == (n_rows, n_options), (label_ids_PO.shape, probs_PO.shape)
    assert activations_PLN.shape == (n_rows, n_layers, n_neurons), activations_PLN.shape
    gold_P = np.array([example.answer for example in examples], dtype=np.int16)
    assert ((gold_P >= 0) & (gold_P < n_options)).all(), gold_P

    columns = [
        pa.array([example.id for example in examples], pa.string()),
        pa.array([text_hash(example.prompt) for example in examples], pa.string()),
        pa.array([example.group for example in examples], pa.string()),
    ]
    if storage == "stats":
        said = _sums(negs_POLN, activations_PLN, gold_P) if neurons is None else [np.array(neurons, np.int32)]
        columns += [_in_first_row(values, n_rows) for values in said]
    columns += [column(gold_P), column(label_ids_PO), column(probs_PO)]
    if neurons is not None:
        columns += _of_neurons(negs_POLN, activations_PLN, neurons)
    elif storage != "stats":
        columns += _of_layers(negs_POLN, activations_PLN, storage)
    schema = shard_schema(n_options, n_layers, n_neurons, storage, None if neurons is None else len(neurons))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _of_layers(
    negs_POLN: npt.NDArray[np.float32], activations_PLN: npt.NDArray[np.float32], storage: StorageLevel
) -> Iterator[pa.Array]:
    stored = to_bits if storage == "bfloat16" else np.asarray
    for layer in range(negs_POLN.shape[2]):
        negs_PON = negs_POLN[:, :, layer]
        yield column(stored(activations_PLN[:, layer]))
        yield column(_codes(negs_PON, layer) if storage == "codes" else stored(negs_PON))


def _of_neurons(
    negs_POLN: npt.NDArray[np.float32], activations_PLN: npt.NDArray[np.float32], neurons: Sequence[int]
) -> Iterator[pa.Array]:
    layers_K, neurons_K = np.divmod(np.array(neurons), negs_POLN.shape[3])
    yield column(activations_PLN[:, layers_K, neurons_K])
    yield column(negs_POLN[:, :, layers_K, neurons_K])


def sum_column(vote: Vote) -> str:
    """The column of a vote's sums."""
    return f"sum_{vote.rule}_{vote.signal}"


def count_chosen(schema: pa.Schema) -> int | None:
    """K of a shard with chosen neurons, by its columns; None of any other."""
    at = schema.get_field_index("act")
    return int(schema.types[at].list_size) if at >= 0 and pa.types.is_fixed_size_list(schema.types[at]) else None


def of_shard(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.int32]:
    """What a shard of these rows says in its first row: sums or neurons."""
    values: npt.NDArray[np.int32] = batch.column(name).flatten().to_numpy(zero_copy_only=True)
    return values


def _sums(
    negs_POLN: npt.NDArray[np.float32], activations_PLN: npt.NDArray[np.float32], gold_P: npt.NDArray[np.int16]
) -> list[npt.NDArray[np.int32]]:
    return [sums_M.astype(np.int32) for sums_M in vote_sums(negs_POLN, activations_PLN, gold_P).values()]


def _in_first_row(values: npt.NDArray[np.int32], n_rows: int) -> pa.Array:
    """A list column that is empty but for its first row; without rows nothing is kept."""
    ends = np.full(n_rows + 1, values.size if n_rows else 0, np.int32)
    ends[0] = 0
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values[: ends[-1]]), type=_IN_FIRST_ROW)


def _codes(negs_PON: npt.NDArray[np.float32], layer: int) -> npt.NDArray[np.uint16]:
    try:
        return encode(negs_PON)
    except NegError as error:
        raise NegError(f"layer {layer}: {error}") from None


def with_aligned_metadata(batch: pa.RecordBatch, metadata_json: str) -> pa.RecordBatch:
    """The batch with metadata under ``neg``, padded so that in the file every column of numbers starts at 64 bytes."""
    schema = aligned_schema(batch.schema, metadata_json, pa.ipc.get_record_batch_size(batch))
    return batch.replace_schema_metadata(schema.metadata)


def aligned_schema(schema: pa.Schema, metadata_json: str, batch_bytes: int) -> pa.Schema:
    """The schema with metadata that ends a batch of so many bytes at a multiple of 64 bytes of the file.

    Arrow's file writer aligns to 8 bytes only. It writes our padded buffers whole, so from the first column of
    numbers to the end of the batch all lengths are multiples of 64: blanks behind the JSON move that end to one.
    """
    schema = schema.with_metadata({"neg": metadata_json})
    magic_bytes = 8
    end = magic_bytes + schema.serialize().size + batch_bytes
    return schema.with_metadata({"neg": metadata_json + " " * (-end % ALIGNMENT_BYTES)})


def column(values: npt.NDArray[Any]) -> pa.Array:
    """A column over zero-padded memory: one number a row, or a list of all of a row's numbers."""
    buffer = np.zeros(-(-values.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES, dtype=np.uint8)
    buffer[: values.nbytes].view(values.dtype).reshape(values.shape)[...] = values
    item = pa.from_numpy_dtype(values.dtype)
    flat = pa.Array.from_buffers(item, values.size, [None, pa.py_buffer(buffer)])
    if values.ndim == 1:
        return flat
    return pa.Array.from_buffers(lists(item, prod(values.shape[1:])), len(values), [None], children=[flat])


def lists(item: pa.DataType, length: int) -> pa.DataType:
    """The type of a column of lists that are all as long, without gaps."""
    return pa.list_(pa.field("item", item, nullable=False), length)
