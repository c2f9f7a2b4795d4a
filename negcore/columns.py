"""The columns of one Arrow shard: a row is a prompt, and a layer is two columns that can be read without the others.

Axes: P prompts (rows), O options, L layers, N neurons a layer.
"""

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negcore.codes import encode
from negcore.errors import NegError
from negcore.identity import StorageLevel, text_hash

_COMMON_AXES = {
    "act_LL": "layer LL: row p holds N activations",
    "probs": "probability of each option's label, softmax over the vocabulary",
}
AXES: Mapping[StorageLevel, Mapping[str, str]] = MappingProxyType(
    {
        "values": _COMMON_AXES
        | {"neg_LL": "layer LL: row p holds O*N values, option o and neuron n at o*N + n; probability per activation"},
        "codes": _COMMON_AXES
        | {"code_LL": "layer LL: row p holds N codes: order and signs of the options' NEGs, see negcore/codes.py"},
    }
)
"""What the columns mean, said in every file."""
ALIGNMENT_BYTES = 64


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


def shard_schema(n_options: int, n_layers: int, n_neurons: int, storage: StorageLevel = "values") -> pa.Schema:
    """Columns of every shard of such a model and dataset, without metadata."""
    columns = [("id", pa.string()), ("text_hash", pa.string()), ("group", pa.string()), ("gold", pa.int16())]
    columns += [("label_ids", lists(pa.int32(), n_options)), ("probs", lists(pa.float32(), n_options))]
    for layer in range(n_layers):
        columns.append((f"act_{layer:02d}", lists(pa.float32(), n_neurons)))
        if storage == "codes":
            columns.append((f"code_{layer:02d}", lists(pa.uint16(), n_neurons)))
        else:
            columns.append((f"neg_{layer:02d}", lists(pa.float32(), n_options * n_neurons)))
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in columns])


def record_batch(
    examples: Sequence[StoredExample],
    *,
    label_ids_PO: npt.NDArray[np.int32],
    negs_POLN: npt.NDArray[np.float32],
    activations_PLN: npt.NDArray[np.float32],
    probs_PO: npt.NDArray[np.float32],
    storage: StorageLevel = "values",
) -> pa.RecordBatch:
    """The rows of one shard, perhaps none; of the prompts only a hash.

    Raises
    ------
    NegError
        If NEGs cannot be stored as codes: there are too many options, or one is NaN or infinite.
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
        column(gold_P),
        column(label_ids_PO),
        column(probs_PO),
    ]
    for layer in range(n_layers):
        negs_PON = negs_POLN[:, :, layer]
        columns.append(column(activations_PLN[:, layer]))
        columns.append(column(_codes(negs_PON, layer) if storage == "codes" else negs_PON))
    return pa.RecordBatch.from_arrays(columns, schema=shard_schema(n_options, n_layers, n_neurons, storage))


def _codes(negs_PON: npt.NDArray[np.float32], layer: int) -> npt.NDArray[np.uint16]:
    try:
        return encode(negs_PON)
    except NegError as error:
        raise NegError(f"layer {layer}: {error}") from None


def with_aligned_metadata(batch: pa.RecordBatch, metadata_json: str) -> pa.RecordBatch:
    """The batch with metadata under ``neg``, padded so that in the file every column of numbers starts at 64 bytes.

    Arrow's file writer aligns to 8 bytes only. It writes our padded buffers whole, so from the first column of
    numbers to the end of the batch all lengths are multiples of 64: blanks behind the JSON move that end to one.
    """
    batch = batch.replace_schema_metadata({"neg": metadata_json})
    magic_bytes = 8
    end = magic_bytes + batch.schema.serialize().size + pa.ipc.get_record_batch_size(batch)
    return batch.replace_schema_metadata({"neg": metadata_json + " " * (-end % ALIGNMENT_BYTES)})


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
