"""Read the NEGs of a run directory back, memory-mapped: one layer or a few neurons without reading the rest.

Shards in a bucket are copied to this machine when they are first needed, and mapped there. Every shard is checked
before it is read: see `negcore.store.integrity`. What a shard holds of the NEGs depends on the run's storage level: see
`negcore.store.levels`.

Axes: P prompts (rows, in order of shard and of row in the shard), O options, L layers, N neurons a layer, M all
neurons, K chosen neurons.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negcore.errors import ShardError
from negcore.measure.votes import Vote
from negcore.model.layer_shapes import LayerShape, LayerShapes, shapes_of
from negcore.store.answers import AnswerView
from negcore.store.codes import SignedRanks
from negcore.store.files import find, is_dir, location
from negcore.store.frames import prompts_table, require
from negcore.store.identity import RunIdentity
from negcore.store.integrity import check_shards, complete_receipts, damaged_file, metadata_of, sound_batch
from negcore.store.levels import STORAGE_LEVELS, FloatArray, NeuronPlaces, StorageLevel, experts_of
from negcore.store.publish import Receipt, SetAside, ShardPlace, shard_of
from negcore.store.schema import ShardColumns, first_row
from negcore.targets import DEFAULT_TARGET, Target, checked_target

if TYPE_CHECKING:
    import pandas
    import polars

Selection = Sequence[int] | Sequence[tuple[int, int]] | npt.NDArray[np.integer]
"""Neurons: flat layer-major indices (layer * N + neuron), or (layer, neuron) pairs."""


def open_negs(path: str | Path, *, verify: bool = True) -> "Negs":
    """Open the Arrow shards of a run.

    Parameters
    ----------
    path : path
        A run directory, its ``negs`` directory, or the directory of one partition; on disk or ``s3://BUCKET/...``.
    verify : bool
        False to leave out the checksums, and trust the bytes of every shard. By default each file of a partition is
        read once in a process, when the partition is opened, and its checksum compared.

    Raises
    ------
    ShardError
        If no partition is there.
    """
    here = location(path).absolute()
    hive = "model=*/dataset=*/split=*/"
    if ShardPlace.is_path(here):
        folders = [here] if is_dir(here) else []
    else:
        folders = [*find(here, hive), *find(here, f"negs/{hive}")]
    found = {ShardPlace.of_path(folder): folder for folder in folders}
    if not found:
        raise ShardError(f"{str(here)!r} holds no NEGs: give a run directory, its 'negs' or one of its partitions")
    return Negs(here, found, verify)


class _AsFrame(ABC):
    """Prompts that can be had as a data frame."""

    @abstractmethod
    def _splits(self) -> "Iterable[NegSplit]": ...

    def to_pandas(self, *, layer: int | None = None, neurons: Selection | None = None) -> "pandas.DataFrame":
        """Return the prompts as a pandas data frame of P rows, with the NEGs and activations of some neurons.

        Its columns are ``model``, ``dataset``, ``split``, ``id``, ``group``, ``gold`` (index of the gold option), and
        ``prob_0``, ... for each of the O options (probability). A run that asks in several orders of the options has
        ``row`` and ``order`` too. With K neurons there are (O + 1) * K columns more:
        ``neg_LAYER.NEURON_OPTION`` (target per unit of activation) and ``act_LAYER.NEURON``. Where a prompt has
        fewer options than others, its numbers for the rest are missing. Of a mixture of experts, neurons are called
        ``LAYER.EXPERT.UNIT``, and the numbers of those that a prompt does not have are missing.

        Parameters
        ----------
        layer : int, optional
            Add all neurons of this layer: K = N.
        neurons : K pairs (layer, neuron), optional
            Add these neurons, as in `NegSplit.neurons`. By default none.

        Raises
        ------
        NegError
            If pandas is not installed.
        ShardError
            If both are given, a neuron does not exist, or shards are damaged or do not hold the neurons' values.
        """
        require("pandas")
        return prompts_table(self._splits(), layer, neurons).to_pandas()

    def to_polars(self, *, layer: int | None = None, neurons: Selection | None = None) -> "polars.DataFrame":
        """Return what `to_pandas` returns, as a polars data frame; `NegError` if polars is not installed."""
        require("polars")
        import polars

        frame = polars.from_arrow(prompts_table(self._splits(), layer, neurons))
        assert isinstance(frame, polars.DataFrame)
        return frame


class Negs(_AsFrame):
    """All partitions below one directory: iterate over their `NegSplit`s, or `select` one."""

    def __init__(self, path: Path, folders: dict[ShardPlace, Path], verify: bool) -> None:
        self._path = path
        self._folders = folders
        self._verify = verify

    @property
    def places(self) -> list[ShardPlace]:
        """Every (model, dataset, split) that was begun, finished or not."""
        return list(self._folders)

    def select(self, model: str | None = None, dataset: str | None = None, split: str | None = None) -> "NegSplit":
        """Open the one partition with these names; a name left out may be any.

        Raises
        ------
        ShardError
            If none or several partitions match, or the one that does is incomplete or damaged.
        """
        wanted = (model, dataset, split)
        matching = [
            place
            for place in self._folders
            if all(name in (None, own) for name, own in zip(wanted, place[1:], strict=True))
        ]
        if len(matching) != 1:
            raise ShardError(
                f"{len(matching)} partitions match model={model!r}, dataset={dataset!r}, split={split!r}: "
                f"name one of {_listed(matching or self.places)}"
            )
        return self._open(matching[0])

    def at(self, place: ShardPlace) -> "NegSplit":
        """Return the NEGs of one place; errors as of `select`."""
        return self.select(*place[1:])

    def __iter__(self) -> Iterator["NegSplit"]:
        return map(self._open, self._folders)

    def __len__(self) -> int:
        return len(self._folders)

    def __repr__(self) -> str:
        return f"Negs({str(self._path)!r}: {_listed(self.places)})"

    def _splits(self) -> "Iterable[NegSplit]":
        return self

    def _open(self, place: ShardPlace) -> "NegSplit":
        return NegSplit(self._folders[place], verify=self._verify)


class ShardReader:
    """The shards of one finished directory, in order, each mapped when its turn comes.

    Attributes
    ----------
    folder : Path
    receipts : list of Receipt
        One for each shard, also for shards without rows.
    identity : RunIdentity
        What the numbers may be compared with.
    set_aside : list of SetAside
        Rows that were planned and could not be computed, in order, with the reason.
    n_rows : int
        P.
    schema : pyarrow.Schema
        Columns of every shard, with the first one's metadata.

    Raises
    ------
    ShardError
        If the directory is incomplete or damaged.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self._verify = verify
        self.receipts = complete_receipts(folder)
        self.set_aside: list[SetAside] = [row for receipt in self.receipts for row in receipt.set_aside]
        self.n_rows = sum(receipt.n_rows for receipt in self.receipts)
        # Shards without rows are passed over, but one is kept for its columns where there is no other.
        self._mapped = [receipt for receipt in self.receipts if receipt.n_rows] or self.receipts[:1]
        self.identity = _identity(folder, self._mapped[0])
        if verify:
            check_shards(folder, self.receipts)
        self.schema: pa.Schema = sound_batch(folder, self._mapped[0], verify=verify).schema

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the first shard: place, identity, axes."""
        return metadata_of(self.schema)

    def shards(self) -> Iterator[ShardColumns]:
        """Map the shards in order, one at a time: the way to read everything once.

        Raises
        ------
        ShardError
            If a shard is damaged.
        """
        begin = 0
        for receipt in self._mapped:
            path, batch = shard_of(self.folder, receipt), sound_batch(self.folder, receipt, verify=self._verify)
            if not batch.schema.equals(self.schema):
                raise damaged_file(path, "its columns are not those of the first shard")
            yield ShardColumns(path, batch, slice(begin, begin + receipt.n_rows))
            begin += receipt.n_rows

    def read(self, names: Sequence[str]) -> dict[str, Any]:
        """Read columns of all rows in one pass: numbers as an array (P, ...), strings as a list of P."""
        columns: dict[str, Any] = {}
        for shard in self.shards():
            for name in names:
                if pa.types.is_string(self.schema.field(name).type):
                    columns.setdefault(name, []).extend(shard.strings(name))
                    continue
                values = shard.numbers(name)
                if name not in columns:
                    columns[name] = np.empty((self.n_rows, *values.shape[1:]), values.dtype)
                columns[name][shard.rows] = values
        return columns


class NegSplit(ShardReader, _AsFrame):
    """The NEGs of one finished (model, dataset, split), read on demand.

    Attributes
    ----------
    place : ShardPlace
    level : StorageLevel
        What the shards hold, and what they can answer.
    ids, groups, text_hashes : list of P str
    gold_P : int16 array (P,)
        Index of the gold option.
    label_ids_PO : int32 array (P, O)
    probs_PO : float32 array (P, O)
    n_rows, n_options, n_layers, n_neurons : int
        P, O, L and N.
    layer_shapes : LayerShapes, optional
        Of a mixture of experts, the counts of each layer's neurons; N is the largest. A prompt has the neurons of the
        experts that it was routed to: `active` tells which, and arrays are masked where it has none.
    set_aside : list of SetAside
        Rows of the split that were planned and could not be computed, in order, with the reason.
    target : str
        The number of each option whose slope its NEGs are: "probability", "log-probability" or "logit-difference".
    """

    replaced_gold_P: npt.NDArray[np.int16] | None = None
    """Gold options in place of those in the shards, if there are such."""

    def __init__(self, folder: Path, *, verify: bool) -> None:
        super().__init__(folder, verify=verify)
        if not self.n_rows:
            raise ShardError(f"{str(folder)!r} has no rows: all {len(self.set_aside)} were set aside, see its receipts")
        self.place = ShardPlace.of_path(folder)
        self.level: StorageLevel = STORAGE_LEVELS[self.identity.storage]
        self.n_layers, self.n_neurons = self.identity.n_layers, self.identity.n_neurons
        self.layer_shapes = shapes_of(self.identity.experts)
        self.target: Target = checked_target(self.identity.target)
        rows = self.read(["id", "group", "text_hash", "gold", "label_ids", "probs"])
        self.ids: list[str] = rows["id"]
        self.groups: list[str] = rows["group"]
        self.text_hashes: list[str] = rows["text_hash"]
        self.gold_P: npt.NDArray[np.int16] = rows["gold"]
        self.label_ids_PO: npt.NDArray[np.int32] = rows["label_ids"]
        self.probs_PO: FloatArray = rows["probs"]
        self.n_options: int = self.probs_PO.shape[1]

    @property
    def label_mass_P(self) -> npt.NDArray[np.float64]:
        """Probability of all options of each row together: float64 (P,). The rest lies on tokens that are no option."""
        mass_P: npt.NDArray[np.float64] = self.probs_PO.sum(axis=1, dtype=np.float64)
        return mass_P

    @cached_property
    def answers(self) -> AnswerView:
        """The prompts by row and answer, whatever order of its options each asks in."""
        return AnswerView.of(self.ids, self.n_options, permuted=self.identity.is_permuted)

    def _splits(self) -> "Iterable[NegSplit]":
        return (self,)

    def shards(self) -> Iterator["Shard"]:
        for columns in super().shards():
            batch = columns.batch
            if self.replaced_gold_P is not None:
                gold = pa.array(self.replaced_gold_P[columns.rows])
                batch = batch.set_column(self.schema.get_field_index("gold"), self.schema.field("gold"), gold)
            yield Shard(columns.path, batch, columns.rows, self)

    def with_gold(self, gold_P: npt.NDArray[np.int16]) -> "NegSplit":
        """Return the split with other gold options in its rows, such as permuted ones; no file changes.

        Raises
        ------
        ShardError
            If the shards hold sums that were taken with the gold options of their rows, or the numbers of rows differ.
        """
        if not self.level.has_all_neurons:
            raise ShardError(f"the sums in {str(self.folder)!r} are those of its own gold options, and hold no others")
        if gold_P.shape != (self.n_rows,):
            raise ShardError(
                f"{str(self.folder)!r} has {self.n_rows} rows: give each a gold option, not {gold_P.shape}"
            )
        other = copy(self)
        other.gold_P = other.replaced_gold_P = gold_P.astype(np.int16)
        return other

    def layer(self, layer: int) -> FloatArray:
        """Return the NEGs of one layer: float32 (P, O, N), target per unit of activation.

        Of a mixture of experts it is a masked array: entries of neurons that a prompt does not have are masked.
        With one shard of storage "values" this is a read-only view of the mapped file, else a new array.

        Raises
        ------
        ShardError
            If the model has no such layer, or the shards do not hold the values of all neurons.
        """
        self.locate([(layer, 0)])
        if self.layer_shapes is not None:
            return self.neurons(layer * self.n_neurons + np.arange(self.n_neurons))
        if len(self._mapped) == 1:
            return next(self.shards()).negs_PON(layer)
        negs_PON = np.empty((self.n_rows, self.n_options, self.n_neurons), dtype=np.float32)
        for shard in self.shards():
            negs_PON[shard.rows] = shard.negs_PON(layer)
        return negs_PON

    def neurons(self, selection: Selection) -> FloatArray:
        """Return the NEGs of K chosen neurons, in the order asked for: float32 (P, O, K); only their pages are read.

        Of a mixture of experts it is a masked array: entries of neurons that a prompt does not have are masked.

        Parameters
        ----------
        selection : K flat layer-major indices (layer * N + neuron), or K pairs (layer, neuron)

        Raises
        ------
        ShardError
            If a neuron does not exist, or the shards do not hold its values.
        """
        places = self.locate(selection)
        negs_POK = np.empty((self.n_rows, self.n_options, places.flat_K.size), dtype=np.float32)
        for shard in self.shards():
            negs_POK[shard.rows] = self.level.negs(shard, places)
        return self._masked(negs_POK, places)

    def activations(self, selection: Selection) -> FloatArray:
        """Return the activations of K chosen neurons: float32 (P, K), masked as `neurons`. `selection` as there."""
        places = self.locate(selection)
        activations_PK = np.empty((self.n_rows, places.flat_K.size), dtype=np.float32)
        for shard in self.shards():
            activations_PK[shard.rows] = self.level.activations(shard, places)
        return self._masked(activations_PK, places)

    def neurons_by_answer(self, selection: Selection) -> npt.NDArray[np.float64]:
        """Return the NEGs of K chosen neurons by row and answer: float64 (R, A, K), target per unit of activation.

        Of each order of a row it takes the NEG of the letter at which the answer stood, and of these the mean: the
        gradient of the answer's mean probability, or of the mean of another target of the run. Rows are those of
        `answers`, and an answer is an option's place in the given order. Of a run that asks in the given order alone
        these are the numbers of `neurons`. A mixture of experts takes the mean over the orders in which the prompt has
        the neuron, and masks it where none has.

        Parameters, Raises: as `neurons`.
        """
        places, view = self.locate(selection), self.answers
        negs_RAK = np.zeros((view.n_rows, self.n_options, places.flat_K.size))
        n_there_RK = np.zeros((view.n_rows, places.flat_K.size))
        for shard in self.shards():
            row_P, letter_PA1 = view.row_P[shard.rows], view.letter_PA[shard.rows][..., None]
            negs_POK = self.level.negs(shard, places)
            np.add.at(negs_RAK, row_P, np.take_along_axis(negs_POK, letter_PA1, axis=1))
            np.add.at(n_there_RK, row_P, self.level.active(shard, places))
        negs_RAK /= np.maximum(n_there_RK, 1)[:, None]
        if self.layer_shapes is None:
            return negs_RAK
        return np.ma.masked_array(negs_RAK, np.broadcast_to((n_there_RK == 0)[:, None], negs_RAK.shape))

    def active(self, selection: Selection) -> npt.NDArray[np.bool_]:
        """Tell which of K chosen neurons each prompt has: bool (P, K). Without experts it has all."""
        return self._active(self.locate(selection))

    def _active(self, places: NeuronPlaces) -> npt.NDArray[np.bool_]:
        active_PK = np.empty((self.n_rows, places.flat_K.size), np.bool_)
        for shard in self.shards():
            active_PK[shard.rows] = self.level.active(shard, places)
        return active_PK

    def _masked(self, values: FloatArray, places: NeuronPlaces) -> FloatArray:
        """Mask what stands for neurons that a prompt does not have."""
        if self.layer_shapes is None:
            return values
        absent_PK = ~self._active(places)
        by_axis = absent_PK.reshape(len(absent_PK), *[1] * (values.ndim - 2), -1)
        masked: FloatArray = np.ma.masked_array(values, np.broadcast_to(by_axis, values.shape))
        return masked

    def experts(self, layer: int) -> npt.NDArray[np.int32]:
        """Return the experts that each prompt was routed to in a layer, rising: int32 (P, K); K is 0 in a dense one."""
        self.locate([(layer, 0)])
        return np.concatenate([experts_of(shard, layer) for shard in self.shards()])

    def router_weights(self, layer: int) -> FloatArray:
        """Return the router's weight of each of these experts: float32 (P, K); empty in a dense layer."""
        shape = self._shape(layer)
        if not shape.n_experts:
            return np.empty((self.n_rows, 0), np.float32)
        return np.concatenate([shard.numbers(f"router_{layer:02d}") for shard in self.shards()])

    def _shape(self, layer: int) -> LayerShape:
        self.locate([(layer, 0)])
        return LayerShape(self.n_neurons) if self.layer_shapes is None else self.layer_shapes[layer]

    def name_of(self, layer: int, neuron: int) -> str:
        """Return the name of a neuron: ``layer.neuron``, or ``layer.expert.unit`` of a mixture of experts."""
        return f"{layer}.{self._shape(layer).name_of(neuron)}"

    def number_of(self, name: str) -> tuple[int, int]:
        """Return the layer and number of a neuron by the name that `name_of` gives it, or by ``layer.number``.

        Raises
        ------
        ShardError
            If there is none.
        """
        layer, *below = name.split(".")
        number = None
        if layer.isdecimal() and int(layer) < self.n_layers and 1 <= len(below) <= 2:
            number = self._shape(int(layer)).number_of(*below)
        if number is None:
            raise ShardError(f"{name} is no neuron of {self.identity.model!r}: it has {self._neurons_in_words}")
        return int(layer), number

    @property
    def _neurons_in_words(self) -> str:
        if self.layer_shapes is None:
            return f"layers 0..{self.n_layers - 1} with neurons 0..{self.n_neurons - 1}"
        kinds = {
            f"{shape.n_experts} experts of {shape.n_units} units"
            + f" and {shape.n_dense} shared neurons" * bool(shape.n_dense)
            if shape.n_experts
            else f"{shape.n_dense} neurons"
            for shape in self.layer_shapes
        }
        return f"layers 0..{self.n_layers - 1} with {', or '.join(sorted(kinds))} (layer.expert.unit)"

    def stores_values(self, selection: Selection) -> npt.NDArray[np.bool_]:
        """Tell of which of K chosen neurons `neurons` returns NEGs: bool (K,). `selection` as in `neurons`."""
        return self.level.stores_values(next(self.shards()), self.locate(selection))

    @property
    def storage(self) -> str:
        """Name of the storage level, as in run files."""
        return self.level.name

    def __repr__(self) -> str:
        size = f"{self.n_rows} rows x {self.n_options} options x {self.n_layers} layers x {self.n_neurons} neurons"
        name = f"{_listed([self.place])}, site={self.identity.site!r}"
        name += f", target={self.target!r}" * (self.target != DEFAULT_TARGET)
        return f"NegSplit({name}: {size} in {len(self._mapped)} shards)"

    def locate(self, selection: Selection) -> NeuronPlaces:
        """Return the places of chosen neurons; `ShardError` if one does not exist.

        Layers of a mixture of experts may have fewer neurons than the widest. A flat index behind a layer's own names
        none, which every prompt lacks; a pair of such numbers is refused.
        """
        chosen = np.asarray(selection)
        if chosen.size == 0:
            return NeuronPlaces(*np.empty((3, 0), dtype=np.int64))
        if chosen.dtype.kind not in "iu" or not (chosen.ndim == 1 or (chosen.ndim == 2 and chosen.shape[1] == 2)):
            raise ShardError(
                f"neurons are chosen by flat indices (K,) or pairs (K, 2) of whole numbers, "
                f"not by {chosen.dtype} of shape {chosen.shape}"
            )
        layers_K, neurons_K = np.divmod(chosen, self.n_neurons) if chosen.ndim == 1 else chosen.T
        missing = (layers_K < 0) | (layers_K >= self.n_layers) | (neurons_K < 0) | (neurons_K >= self.n_neurons)
        if self.layer_shapes is not None and chosen.ndim == 2 and not missing.any():
            missing = neurons_K >= np.array([shape.n_neurons for shape in self.layer_shapes])[layers_K]
        if missing.any():
            flat = "" if chosen.ndim == 2 else f", in flat indices 0..{self.n_layers * self.n_neurons - 1}"
            raise ShardError(
                f"{'.'.join(map(str, np.ravel(chosen[missing][0])))} is no neuron of {self.identity.model!r}: it has "
                f"{self._neurons_in_words}{flat}"
            )
        return NeuronPlaces(layers_K, neurons_K, layers_K * self.n_neurons + neurons_K)


@dataclass(frozen=True)
class Shard(ShardColumns):
    """One mapped file of NEGs, for a whole layer or for chosen neurons; selections as in `NegSplit.neurons`.

    Of a mixture of experts, zeros stand for neurons that a prompt does not have: `active` tells them from those that
    it has. (A zero votes for nothing, so votes need not ask.)
    Every array is a read-only view of the file, unless it is put together from 16 bits or of chosen neurons.
    """

    split: NegSplit

    @property
    def layer_shapes(self) -> LayerShapes | None:
        return self.split.layer_shapes

    def active_PN(self, layer: int) -> npt.NDArray[np.bool_]:
        """Tell which neurons of a layer each prompt has: bool (P, N)."""
        return self.split.level.active(self, layer)

    def active(self, selection: Selection) -> npt.NDArray[np.bool_]:
        """Tell which of K neurons each prompt has: bool (P, K)."""
        return self.split.level.active(self, self.split.locate(selection))

    def negs_PON(self, layer: int) -> FloatArray:
        """Return the NEGs of one layer, as `StorageLevel.negs`."""
        return self.split.level.negs(self, layer)

    def signed_ranks_PON(self, layer: int) -> FloatArray | SignedRanks:
        """Return numbers with the signs and order of one layer's NEGs, as `StorageLevel.signed_ranks`."""
        return self.split.level.signed_ranks(self, layer)

    def activations_PN(self, layer: int) -> FloatArray:
        """Return the activations of one layer, as `StorageLevel.activations`."""
        return self.split.level.activations(self, layer)

    def negs(self, selection: Selection) -> FloatArray:
        """Return the NEGs of K neurons: float32 (P, O, K); `ShardError` if the shard does not hold their values."""
        return self.split.level.negs(self, self.split.locate(selection))

    def signed_ranks(self, selection: Selection) -> FloatArray | SignedRanks:
        """Return numbers with the signs and order of the NEGs of K neurons: (P, O, K)."""
        return self.split.level.signed_ranks(self, self.split.locate(selection))

    def activations(self, selection: Selection) -> FloatArray:
        """Return the activations of K neurons: float32 (P, K)."""
        return self.split.level.activations(self, self.split.locate(selection))

    def sums_M(self, vote: Vote) -> npt.NDArray[np.int32]:
        """Return a vote's score of every neuron, summed over the shard's rows: int32 (M,).

        Raises
        ------
        ShardError
            If the shard holds none.
        """
        name = vote.column
        if name not in self.batch.schema.names:
            raise ShardError(f"{str(self.path)!r} holds no vote sums: ask the partition that was written for ranking")
        return first_row(self.batch, name)

    @property
    def chosen_K(self) -> npt.NDArray[np.int32]:
        """Flat indices, rising, of the neurons that a shard of chosen neurons holds: int32 (K,); else empty."""
        return first_row(self.batch, "neurons")


def _identity(folder: Path, receipt: Receipt) -> RunIdentity:
    try:
        identity = RunIdentity(**receipt.identity, versions=receipt.versions)
    except TypeError as error:
        raise ShardError(f"{str(folder)!r} was written by another version of this software ({error})") from error
    if str(identity.storage) not in STORAGE_LEVELS:
        named = f"storage {identity.storage!r}"
        raise ShardError(f"{str(folder)!r} was written by another version of this software ({named})")
    return identity


def _listed(places: list[ShardPlace]) -> str:
    return "; ".join(f"model={place.model!r}, dataset={place.dataset!r}, split={place.part!r}" for place in places)
