"""Storage levels: what a shard keeps of NEGs and activations, one class for each `storage` of a run file.

A level turns measured numbers into columns and columns into numbers, and says which questions its shards can answer.
Everything else asks `STORAGE_LEVELS`; a new level is a class here, an entry there, and a name in `StorageName`.

Axes: P prompts (rows), O options, L layers, N neurons a layer, M all neurons, K chosen neurons.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negcore.errors import NegError, ShardError
from negcore.measure.votes import VOTES, Numbers, vote_sums
from negcore.model.layer_shapes import LayerShapes, chosen_places, shapes_of
from negcore.store import codes
from negcore.store.codes import SignedRanks
from negcore.store.identity import DEFAULT_STORAGE, StorageName
from negcore.store.schema import (
    IN_FIRST_ROW,
    ShardColumns,
    StoredExample,
    column,
    first_row,
    first_row_column,
    record_batch,
    row_width,
)

FloatArray = npt.NDArray[np.float32]


class NeuronPlaces(NamedTuple):
    """K neurons: the layer of each, its place there, and its flat layer-major index."""

    layers_K: npt.NDArray[np.integer]
    neurons_K: npt.NDArray[np.integer]
    flat_K: npt.NDArray[np.integer]

    def name_of(self, flat: int) -> str:
        """Return one of them as ``layer.neuron``."""
        at = int(np.flatnonzero(self.flat_K == flat)[0])
        return f"{self.layers_K[at]}.{self.neurons_K[at]}"


Neurons = int | NeuronPlaces
"""All neurons of one layer, or chosen ones of any layers."""

Chosen = Sequence[int] | None
"""Flat indices, rising, of the neurons to store; None where vote sums have not chosen any."""
Columns = dict[str, pa.Array]

Kept = Mapping[str, Numbers]
"""Arrays that a level keeps: numbers of every neuron (P, ..., L, N) or of chosen ones (P, ..., K) by the beginning of
their columns' names, or vote sums (M,) by their columns' names."""

# What the columns mean. These texts are in the metadata of every file, so they are part of a shard's bytes and never
# change, though two modules that they name have moved since (to negcore/store/codes.py and negcore/measure/votes.py).
_PROBS = "probability of each option's label, softmax over the vocabulary"
_ACT = "layer LL: row p holds N activations"
_NEG = "layer LL: row p holds O*N values, option o and neuron n at o*N + n; probability per activation"
_CODE = "layer LL: row p holds N codes: order and signs of the options' NEGs, see negcore/codes.py"
_EXPERTS = "layer LL: row p holds the numbers, rising, of the experts that it was routed to; "
_OF_EXPERTS = "N then counts the units of these experts, in that order, and the neurons that every row has"
_ROUTER = "layer LL: row p holds the router's weight of each of these experts"
_BFLOAT16 = "; as bfloat16: the upper 16 bits of a float32"


class Routed(NamedTuple):
    """Experts of P rows, each routed to K of them in every layer."""

    shapes: LayerShapes
    experts_PLK: Numbers
    """Their numbers, rising; -1 where a layer has fewer."""
    weights_PLK: Numbers

    @classmethod
    def of_none(cls, shapes: LayerShapes) -> "Routed":
        """Return the experts of no row."""
        shape = 0, len(shapes), max(one.top_k for one in shapes)
        return cls(shapes, np.empty(shape, np.int32), np.empty(shape, np.float32))

    def spread(self, values: FloatArray) -> FloatArray:
        """Return numbers of all neurons, (P, ..., L, N), from those that the rows have: zeros for the others."""
        width = max(shape.n_neurons for shape in self.shapes)
        wide: FloatArray = np.empty((*values.shape[:-1], width), values.dtype)
        for layer, shape in enumerate(self.shapes if len(values) else ()):
            places_PN = shape.places_of(np.arange(width), self.experts_PLK[:, layer, : shape.top_k])
            wide[..., layer, :] = _at_places(values[..., layer, :], places_PN)
        return wide

    @property
    def columns(self) -> Columns:
        """The columns of the layers that have experts."""
        columns: Columns = {}
        for layer, shape in enumerate(self.shapes):
            if shape.n_experts:
                columns[f"experts_{layer:02d}"] = column(self.experts_PLK[:, layer, : shape.top_k].astype(np.int32))
                columns[f"router_{layer:02d}"] = column(self.weights_PLK[:, layer, : shape.top_k].astype(np.float32))
        return columns


class Measured(NamedTuple):
    """Measured numbers of some prompts, and what of them a level may be asked to keep."""

    negs_POLN: FloatArray
    activations_PLN: FloatArray
    gold_P: Numbers
    neurons: Chosen = None
    routed: Routed | None = None


class StorageLevel(ABC):
    """A way to keep NEGs and activations in the columns of shards."""

    name: ClassVar[StorageName]
    axes: ClassVar[Mapping[str, str]]
    """Meaning of the columns, as the metadata of every file says it."""
    expert_axes: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"experts_LL": f"{_EXPERTS}in act_LL and neg_LL, {_OF_EXPERTS}", "router_LL": _ROUTER}
    )
    """Meaning of the columns that a mixture of experts has besides."""
    has_values: ClassVar[bool] = True
    """True if NEGs can be read, and not only their order and signs."""
    has_all_neurons: ClassVar[bool] = True
    """True if every neuron can be read for every prompt."""
    has_vote_sums: ClassVar[bool] = False
    """True if a first pass keeps vote sums of training prompts, and a second the numbers of neurons they choose."""
    has_nonfinite: ClassVar[bool] = True
    """True if NaN and infinity can be stored."""

    def check_n_options(self, n_options: int) -> None:
        """Refuse a number of options that does not fit; most levels take any number.

        Raises
        ------
        NegError
        """
        assert n_options > 0, n_options

    def batch(
        self,
        examples: Sequence[StoredExample],
        *,
        label_ids_PO: npt.ArrayLike,
        negs_POLN: npt.ArrayLike,
        activations_PLN: npt.ArrayLike,
        probs_PO: npt.ArrayLike,
        neurons: Chosen = None,
        routed: Routed | None = None,
    ) -> pa.RecordBatch:
        """Return the rows of one shard, possibly none; of the prompts only a hash.

        Parameters
        ----------
        examples : sequence of P examples
        label_ids_PO : int array (P, O)
            Token id of every option's label.
        negs_POLN : float array (P, O, L, N), target per unit of activation
        activations_PLN : float array (P, L, N)
        probs_PO : float array (P, O)
        neurons : sequence of K int, optional
            At a level with vote sums, the neurons whose numbers are stored: flat indices, rising. Without them the
            sums are stored. Other levels ignore it.
        routed : Routed, optional
            The rows' experts: N then counts their neurons alone.

        Raises
        ------
        NegError
            If the level cannot hold so many options, or a NEG that is NaN or infinite.
        """
        negs, activations = np.asarray(negs_POLN, np.float32), np.asarray(activations_PLN, np.float32)
        assert activations.shape == (len(negs), *negs.shape[2:]), (activations.shape, negs.shape)
        kept = self.kept(Measured(negs, activations, _gold(examples), neurons, routed))
        return self.packed(examples, kept, label_ids_PO=label_ids_PO, probs_PO=probs_PO, neurons=neurons, routed=routed)

    def packed(
        self,
        examples: Sequence[StoredExample],
        kept: Kept,
        *,
        label_ids_PO: npt.ArrayLike,
        probs_PO: npt.ArrayLike,
        neurons: Chosen = None,
        routed: Routed | None = None,
    ) -> pa.RecordBatch:
        """Return the rows of one shard from what the level keeps of them, wherever that was computed.

        Parameters
        ----------
        kept : mapping of name to array
            As `kept` returns it.
        examples, label_ids_PO, probs_PO, neurons, routed
            As for `batch`.
        """
        label_ids, probs, gold_P = np.asarray(label_ids_PO, np.int32), np.asarray(probs_PO, np.float32), _gold(examples)
        assert label_ids.shape == probs.shape == (len(examples), probs.shape[1]), (label_ids.shape, probs.shape)
        assert ((gold_P >= 0) & (gold_P < probs.shape[1])).all(), gold_P
        shared = {"gold": column(gold_P), "label_ids": column(label_ids), "probs": column(probs)}
        if routed is not None:
            shared |= routed.columns
        own = self._columns(kept, len(examples), neurons, routed and routed.shapes)
        # Lists come first, so that all columns of numbers stay aligned.
        first = {name: values for name, values in own.items() if values.type == IN_FIRST_ROW}
        return record_batch(examples, {**first, **shared, **own})

    def schema(
        self,
        n_options: int,
        n_layers: int,
        n_neurons: int,
        n_chosen: int | None = None,
        shapes: LayerShapes | None = None,
    ) -> pa.Schema:
        """Return the columns of every shard of such a model and dataset, without metadata.

        Parameters
        ----------
        n_chosen : int, optional
            K, at a level with vote sums: number of the neurons to store. Without it, the columns of the sums.
        shapes : LayerShapes, optional
            Of a mixture of experts.
        """
        if shapes is not None:
            n_neurons = max(shape.n_active for shape in shapes)
        return self.batch(
            [],
            label_ids_PO=np.empty((0, n_options)),
            negs_POLN=np.empty((0, n_options, n_layers, n_neurons)),
            activations_PLN=np.empty((0, n_layers, n_neurons)),
            probs_PO=np.empty((0, n_options)),
            neurons=None if n_chosen is None else range(n_chosen),
            routed=None if shapes is None else Routed.of_none(shapes),
        ).schema

    def negs(self, shard: ShardColumns, neurons: Neurons) -> FloatArray:
        """Return NEGs: float32 (P, O, N) of a layer or (P, O, K), target per unit of activation.

        Zeros stand for neurons that a prompt does not have: see `active`.

        Raises
        ------
        ShardError
            If the shard does not hold them.
        """
        return self._numbers(shard, "neg", neurons, shard.n_rows, shard.n_options)

    def activations(self, shard: ShardColumns, neurons: Neurons) -> FloatArray:
        """Return activations: float32 (P, N) of a layer or (P, K); `ShardError` if the shard does not hold them."""
        return self._numbers(shard, "act", neurons, shard.n_rows)

    def active(self, shard: ShardColumns, neurons: Neurons) -> npt.NDArray[np.bool_]:
        """Tell which neurons each prompt has, by the experts that it was routed to: bool, (P, N) or (P, K)."""
        if shard.layer_shapes is not None:
            return np.asarray(_places_in(shard, neurons) >= 0)
        return np.ones(self.activations(shard, neurons).shape, np.bool_)

    def signed_ranks(self, shard: ShardColumns, neurons: Neurons) -> FloatArray | SignedRanks:
        """Return numbers with the signs and the order of each prompt's NEGs, ties included, in the shape of `negs`.

        Where NEGs are stored, these are the NEGs.

        Raises
        ------
        NegError
            As `negs`; also if the shard is damaged.
        """
        return self.negs(shard, neurons)

    def stores_values(self, shard: ShardColumns, places: NeuronPlaces) -> npt.NDArray[np.bool_]:
        """Tell of which of K chosen neurons the shard holds the values of NEGs: bool (K,)."""
        return np.full(places.flat_K.size, self.has_values)

    @abstractmethod
    def kept(self, measured: Measured) -> Kept:
        """Return what the level keeps of measured numbers; `negcore.measure.kept` computes the same on a device.

        Raises
        ------
        NegError
            As for `batch`.
        """

    @abstractmethod
    def _columns(self, kept: Kept, n_rows: int, neurons: Chosen, shapes: LayerShapes | None) -> Columns:
        """Return the columns that depend on the level, by name and in order."""

    @abstractmethod
    def _numbers(self, shard: ShardColumns, kind: str, neurons: Neurons, *axes: int) -> Numbers:
        """Return numbers of a layer, shape (*axes, N), or of chosen neurons, shape (*axes, K)."""


class Values(StorageLevel):
    """NEGs and activations in float32: two columns a layer, which can be read without the others."""

    name: ClassVar[StorageName] = "values"
    axes: ClassVar[Mapping[str, str]] = MappingProxyType({"act_LL": _ACT, "probs": _PROBS, "neg_LL": _NEG})

    def kept(self, measured: Measured) -> Kept:
        return {"act": measured.activations_PLN, "neg": measured.negs_POLN}

    def _columns(self, kept: Kept, n_rows: int, neurons: Chosen, shapes: LayerShapes | None) -> Columns:
        _, n_layers, n_neurons = kept["act"].shape
        widths = [n_neurons] * n_layers if shapes is None else [shape.n_active for shape in shapes]
        return {
            f"{kind}_{layer:02d}": column(values[..., layer, :width])
            for layer, width in enumerate(widths)
            for kind, values in kept.items()
        }

    def _numbers(self, shard: ShardColumns, kind: str, neurons: Neurons, *axes: int) -> Numbers:
        if shard.layer_shapes is not None:
            return _with_absent(shard, kind, neurons, *axes)
        if not isinstance(neurons, NeuronPlaces):
            return shard.numbers(f"{kind}_{neurons:02d}").reshape(*axes, -1)
        picked = np.empty((*axes, neurons.flat_K.size), shard.numbers(f"{kind}_00").dtype)
        for layer, at in _by_layer(neurons):
            stored = shard.numbers(f"{kind}_{layer:02d}").reshape(*axes, -1)
            picked[..., at] = stored[..., neurons.neurons_K[at]]
        return picked


class Bfloat16(Values):
    """NEGs and activations rounded to the upper 16 bits of a float32.

    The range is that of float32, so that small NEGs keep their sign, which float16 takes from one in five where
    answers are improbable; the precision is 8 binary digits. Numbers of a model that computes in bfloat16 come back
    unchanged.
    """

    name = "bfloat16"
    axes = MappingProxyType({"act_LL": _ACT + _BFLOAT16, "probs": _PROBS, "neg_LL": _NEG + _BFLOAT16})

    def kept(self, measured: Measured) -> Kept:
        return {"act": bfloat16_bits(measured.activations_PLN), "neg": bfloat16_bits(measured.negs_POLN)}

    def _numbers(self, shard: ShardColumns, kind: str, neurons: Neurons, *axes: int) -> Numbers:
        return bfloat16_values(super()._numbers(shard, kind, neurons, *axes))


class Codes(Values):
    """The order and the signs of each prompt's NEGs in 16 bits, see `negcore.store.codes`; activations in float32."""

    name = "codes"
    axes = MappingProxyType({"act_LL": _ACT, "probs": _PROBS, "code_LL": _CODE})
    expert_axes = MappingProxyType(
        {"experts_LL": f"{_EXPERTS}in act_LL and code_LL, {_OF_EXPERTS}", "router_LL": _ROUTER}
    )
    has_values = False
    has_nonfinite = False

    def check_n_options(self, n_options: int) -> None:
        codes.check_n_options(n_options)

    def kept(self, measured: Measured) -> Kept:
        codes_PLN: Numbers = np.empty(measured.activations_PLN.shape, np.uint16)
        for layer in range(measured.negs_POLN.shape[2]):
            try:
                codes_PLN[:, layer] = codes.encode(measured.negs_POLN[:, :, layer])
            except NegError as error:
                raise NegError(f"layer {layer}: {error}") from None
        return {"act": measured.activations_PLN, "code": codes_PLN}

    def negs(self, shard: ShardColumns, neurons: Neurons) -> FloatArray:
        raise ShardError(
            f"{str(shard.path)!r} holds codes, not values: order and signs of the NEGs are all that can be asked; "
            "run with --storage values"
        )

    def signed_ranks(self, shard: ShardColumns, neurons: Neurons) -> SignedRanks:
        ranks = codes.decode(self._numbers(shard, "code", neurons, shard.n_rows), shard.n_options)
        if shard.layer_shapes is not None:  # code 0, which stands where a prompt lacks a neuron, is an order
            ranks *= self.active(shard, neurons)[:, None]
        return ranks


class Stats(StorageLevel):
    """Vote sums of all neurons over a shard's rows, or the values of the K neurons that such sums chose.

    A shard with sums has a list of M sums for each vote; one with chosen neurons has the list of their flat indices,
    rising, and their NEGs and activations in float32: of a mixture of experts, zeros where a row does not have one.
    """

    name = "stats"
    axes = MappingProxyType(
        {
            "probs": _PROBS,
            "sum_VOTE": "row 0 holds M sums over the rows: scores of all neurons, layer-major, see negcore/votes.py",
            "neurons": "row 0 holds the flat layer-major indices of the K chosen neurons",
            "act": "row p holds K activations",
            "neg": "row p holds O*K values, option o and chosen neuron k at o*K + k; probability per activation",
        }
    )
    expert_axes = MappingProxyType(
        {"experts_LL": f"{_EXPERTS}in act and neg, the neurons of others are 0", "router_LL": _ROUTER}
    )
    has_all_neurons = False
    has_vote_sums = True
    has_nonfinite = False

    def kept(self, measured: Measured) -> Kept:
        negs_POLN, activations_PLN, gold_P, neurons, routed = measured
        if routed is not None:
            negs_POLN, activations_PLN = routed.spread(negs_POLN), routed.spread(activations_PLN)
        if neurons is None:
            sums = vote_sums(negs_POLN, activations_PLN, gold_P) if len(gold_P) else dict.fromkeys(VOTES, gold_P)
            return {vote.column: sums_M for vote, sums_M in sums.items()}
        layers_K, neurons_K = np.divmod(np.array(neurons), negs_POLN.shape[3])
        return {"act": activations_PLN[:, layers_K, neurons_K], "neg": negs_POLN[:, :, layers_K, neurons_K]}

    def _columns(self, kept: Kept, n_rows: int, neurons: Chosen, shapes: LayerShapes | None) -> Columns:
        if neurons is None:
            return {vote.column: first_row_column(kept[vote.column], n_rows) for vote in VOTES}
        chosen = {"neurons": first_row_column(neurons, n_rows)}
        return chosen | {kind: column(kept[kind]) for kind in ("act", "neg")}

    def stores_values(self, shard: ShardColumns, places: NeuronPlaces) -> npt.NDArray[np.bool_]:
        return np.isin(places.flat_K, first_row(shard.batch, "neurons"))

    def _numbers(self, shard: ShardColumns, kind: str, neurons: Neurons, *axes: int) -> Numbers:
        if not isinstance(neurons, NeuronPlaces):
            raise ShardError(
                f"{str(shard.path)!r} holds vote sums or chosen neurons, not whole layers: run with --storage values"
            )
        if not neurons.flat_K.size:
            return np.empty((*axes, 0), np.float32)
        stored_K = first_row(shard.batch, "neurons")
        absent_K = neurons.flat_K[~np.isin(neurons.flat_K, stored_K)]
        if absent_K.size:
            raise ShardError(
                f"{str(shard.path)!r} does not hold neuron {neurons.name_of(absent_K[0])} (layer.neuron): storage "
                "'stats' keeps those that the run's own probes can ask for; run with other probes in another "
                "directory, or with --storage values"
            )
        return shard.numbers(kind).reshape(*axes, -1)[..., np.searchsorted(stored_K, neurons.flat_K)]


STORAGE_LEVELS: Mapping[str, StorageLevel] = MappingProxyType(
    {level.name: level for level in (Values(), Bfloat16(), Codes(), Stats())}
)
assert tuple(STORAGE_LEVELS) == get_args(StorageName)


def has_columns_of(identity: Mapping[str, Any], schema: pa.Schema) -> bool:
    """Tell whether a file has the columns of a run, given by its identity as the file's receipt holds it."""
    level = STORAGE_LEVELS.get(str(identity.get("storage", DEFAULT_STORAGE)))
    n_layers, n_neurons = identity.get("n_layers"), identity.get("n_neurons")
    n_options, n_chosen = row_width(schema, "probs"), row_width(schema, "act")
    if level is None or n_options is None or not isinstance(n_layers, int) or not isinstance(n_neurons, int):
        return False
    # A receipt may claim anything: no schema is made of more layers than the file has columns.
    if ("neurons" in identity) != (n_chosen is not None) or (level.has_all_neurons and n_layers > len(schema)):
        return False
    try:
        shapes = shapes_of(identity.get("experts"))
        if shapes is not None and len(shapes) != n_layers:
            return False
        return bool(schema.equals(_schema(level.name, n_options, n_layers, n_neurons, n_chosen, shapes)))
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError):  # no shard has rows of this shape
        return False


def _gold(examples: Sequence[StoredExample]) -> npt.NDArray[np.int16]:
    return np.array([example.answer for example in examples], np.int16)


@lru_cache(maxsize=16)
def _schema(
    storage: str, n_options: int, n_layers: int, n_neurons: int, n_chosen: int | None, shapes: LayerShapes | None
) -> pa.Schema:
    """Return the columns of a level, which all shards of a directory have: making them takes longer than comparing."""
    return STORAGE_LEVELS[storage].schema(n_options, n_layers, n_neurons, n_chosen, shapes)


# Experts


def experts_of(shard: ShardColumns, layer: int) -> Numbers:
    """Return the experts that a shard's rows were routed to in a layer: int32 (P, K), K = 0 for a dense layer."""
    name = f"experts_{layer:02d}"
    return shard.numbers(name) if name in shard.batch.schema.names else np.empty((shard.n_rows, 0), np.int32)


def _places_in(shard: ShardColumns, neurons: Neurons) -> Numbers:
    """Return the place of neurons among those that each row has, -1 where it does not have them: (P, N) or (P, K)."""
    assert shard.layer_shapes is not None
    if not isinstance(neurons, NeuronPlaces):
        width = max(shape.n_neurons for shape in shard.layer_shapes)
        return shard.layer_shapes[neurons].places_of(np.arange(width), experts_of(shard, neurons))
    layers_K, neurons_K = neurons.layers_K.astype(np.int64), neurons.neurons_K.astype(np.int64)
    return chosen_places(shard.layer_shapes, layers_K, neurons_K, partial(experts_of, shard))


def _with_absent(shard: ShardColumns, kind: str, neurons: Neurons, *axes: int) -> Numbers:
    """Return numbers as `StorageLevel._numbers` does, with zeros for neurons that a row does not have."""
    if not isinstance(neurons, NeuronPlaces):
        return _taken(shard, kind, neurons, _places_in(shard, neurons), *axes)
    places_PK = _places_in(shard, neurons)
    picked = np.empty((*axes, neurons.flat_K.size), shard.numbers(f"{kind}_00").dtype)
    for layer, at in _by_layer(neurons):
        picked[..., at] = _taken(shard, kind, layer, places_PK[:, at], *axes)
    return picked


def _by_layer(neurons: NeuronPlaces) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
    for layer in np.unique(neurons.layers_K).tolist():
        yield layer, np.flatnonzero(neurons.layers_K == layer)


def _taken(shard: ShardColumns, kind: str, layer: int, places_PK: Numbers, *axes: int) -> Numbers:
    return _at_places(shard.numbers(f"{kind}_{layer:02d}").reshape(*axes, -1), places_PK)


def _at_places(values: Numbers, places_PK: Numbers) -> Numbers:
    """Return the numbers at some places of each row's last axis, (P, ..., K), and zeros for places below 0."""
    shape = *values.shape[:-1], places_PK.shape[1]
    by_axis = places_PK.reshape(len(places_PK), *[1] * (values.ndim - 2), places_PK.shape[1])
    taken = np.take_along_axis(values, np.broadcast_to(np.maximum(by_axis, 0), shape), axis=-1)
    return np.where(by_axis >= 0, taken, np.zeros((), values.dtype))


def bfloat16_bits(values: FloatArray) -> npt.NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16 numbers, of two equally near ones the even one, in the same shape.

    Infinity stays infinity, NaN becomes the one NaN 0x7FC0, and nothing above 2^-134 in size becomes zero.
    """
    with np.errstate(invalid="ignore"):  # raised by signalling NaNs
        bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    bits[np.isnan(values)] = 0x7FC0
    return bits


def bfloat16_values(bits: npt.NDArray[np.uint16]) -> FloatArray:
    """Return exactly the numbers that the bits of bfloat16 stand for: float32, in the same shape."""
    values: FloatArray = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    return values
