"""Prompts of shards as tables for pandas and polars: a row a prompt, a column a number.

Axes: P prompts, O options, K chosen neurons.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negcore.errors import NegError, ShardError
from negcore.model.layer_shapes import LayerShapes
from negcore.orders import split_id
from negcore.store.identity import RunIdentity
from negcore.store.levels import FloatArray, NeuronPlaces
from negcore.store.publish import ShardPlace


class Prompts(Protocol):
    """A split of NEGs, as far as its rows become rows of a table."""

    place: ShardPlace
    identity: RunIdentity
    ids: list[str]
    groups: list[str]
    gold_P: npt.NDArray[np.int16]
    probs_PO: FloatArray
    n_rows: int
    n_options: int
    n_neurons: int
    layer_shapes: LayerShapes | None

    def locate(self, selection: Any) -> NeuronPlaces: ...
    def neurons(self, selection: Any) -> FloatArray: ...
    def activations(self, selection: Any) -> FloatArray: ...
    def name_of(self, layer: int, neuron: int) -> str: ...


def prompts_table(splits: Iterable[Prompts], layer: int | None, neurons: Any) -> pa.Table:
    """Return the prompts of splits, one below the other; columns that a split does not have are empty in its rows.

    Parameters
    ----------
    layer : int, optional
        Add all neurons of this layer.
    neurons : K neurons, optional
        Add these neurons, as in `negcore.store.reader.NegSplit.neurons`.

    Raises
    ------
    ShardError
        If both are given, a neuron does not exist, or a split is damaged or does not hold the neurons' values.
    """
    if layer is not None and neurons is not None:
        raise ShardError(f"layer={layer} and neurons are two selections: give one of them")
    return pa.concat_tables([_table(split, layer, neurons) for split in splits], promote_options="default")


def _table(split: Prompts, layer: int | None, neurons: Any) -> pa.Table:
    columns = {
        **{name: [value] * split.n_rows for name, value in split.place.names.items()},
        "id": split.ids,
        **(_orders(split.ids) if split.identity.is_permuted else {}),
        "group": split.groups,
        "gold": split.gold_P,
        **{f"prob_{option}": split.probs_PO[:, option] for option in range(split.n_options)},
    }
    if layer is not None:
        width = split.n_neurons if split.layer_shapes is None else split.layer_shapes[layer].n_neurons
        neurons = [(layer, neuron) for neuron in range(width)]
    if neurons is not None:
        columns |= _neuron_columns(split, neurons)
    return pa.table(columns)


def _orders(ids: list[str]) -> dict[str, list[str]]:
    """Return the row and the order of the options of every prompt."""
    named = [split_id(id_) for id_ in ids]
    return {"row": [one.row for one in named], "order": [one.order for one in named]}


def _neuron_columns(split: Prompts, neurons: Any) -> dict[str, pa.Array]:
    places = split.locate(neurons)
    negs_POK, activations_PK = split.neurons(neurons), split.activations(neurons)
    columns: dict[str, pa.Array] = {}
    for k, (layer, neuron) in enumerate(zip(places.layers_K, places.neurons_K, strict=True)):
        name = split.name_of(int(layer), int(neuron))
        for option in range(split.n_options):
            columns[f"neg_{name}_{option}"] = pa.array(negs_POK[:, option, k])  # what is masked is missing
        columns[f"act_{name}"] = pa.array(activations_PK[:, k])
    return columns


def require(package: str) -> None:
    """Refuse what needs a package that is not installed.

    Raises
    ------
    NegError
    """
    if find_spec(package) is None:
        raise NegError(f"this needs {package}, which is not installed; run: pip install 'neg-at-scale[look]'")
