"""Read the NEGs of a run directory back, memory-mapped: one layer or a few neurons without reading the rest.

Shards in a bucket are copied to this machine when they are first needed, and mapped there: see `local_shard`.

Shards hold the values of NEGs, in 32 or 16 bits, or codes of their order and signs: see `Shard.ordinals_PON`. With
storage "stats" they hold vote sums, or the values of chosen neurons alone.

Axes: P prompts (rows, in order of shard and of row in the shard), O options, L layers, N neurons a layer,
K chosen neurons.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negcore.errors import ShardError
from negcore.measure.votes import Vote
from negcore.store.bfloat16 import from_bits
from negcore.store.buckets import fetch
from negcore.store.codes import decode
from negcore.store.files import cache_directory, draft, find, is_dir, is_remote, location, n_bytes, read_bytes
from negcore.store.identity import RunIdentity, StorageLevel, choice_digest
from negcore.store.locks import locked
from negcore.store.publish import Receipt, SetAside, ShardPlace, checksum, receipts, shard_of, whole_shards
from negcore.store.schema import count_chosen, of_shard, shard_schema, sum_column

FloatArray = npt.NDArray[np.float32]
Stored = npt.NDArray[Any]
"""float32, or the bits of bfloat16."""
Ordinals = npt.NDArray[np.float32] | npt.NDArray[np.int8]
"""NEGs, or numbers with their signs and their order."""
Selection = Sequence[int] | Sequence[tuple[int, int]] | npt.NDArray[np.integer]
"""Neurons: flat layer-major indices (layer * N + neuron), or (layer, neuron) pairs."""


def open_negs(path: str | Path, *, verify: bool = False) -> "Negs":
    """Open the Arrow shards of a run.

    Parameters
    ----------
    path : path
        A run directory, its ``negs`` directory, or the directory of one partition; on disk or ``s3://BUCKET/...``.
    verify : bool
        Compare every file's checksum before anything in it is parsed.

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


class Negs:
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
        """The one partition with these names; a name left out may be any.

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

    def _open(self, place: ShardPlace) -> "NegSplit":
        return NegSplit(self._folders[place], verify=self._verify)


class NegSplit:
    """The NEGs of one finished (model, dataset, split), read on demand.

    Attributes
    ----------
    place : ShardPlace
    identity : RunIdentity
        What the numbers may be compared with.
    ids, groups, text_hashes : list of P str
    gold_P : int16 array (P,)
        Index of the gold option.
    label_ids_PO : int32 array (P, O)
    probs_PO : float32 array (P, O)
    n_rows, n_options, n_layers, n_neurons : int
        P, O, L and N.
    set_aside : list of SetAside
        Rows of the split that were planned and could not be computed, in order, with the reason.
    """

    def __init__(self, folder: Path, *, verify: bool) -> None:
        self._folder = folder
        complete = complete_receipts(folder, verify=verify)
        self.set_aside: list[SetAside] = [row for receipt in complete for row in receipt.set_aside]
        self._receipts = [receipt for receipt in complete if receipt.n_rows]
        if not self._receipts:
            raise ShardError(f"{str(folder)!r} has no rows: all {len(self.set_aside)} were set aside, see its receipts")
        self.place = ShardPlace.of_path(folder)
        self.identity = _identity(folder, self._receipts[0])
        self.n_layers, self.n_neurons = self.identity.n_layers, self.identity.n_neurons
        self.n_options = _n_options(folder, self._receipts[0])
        self.n_rows = sum(receipt.n_rows for receipt in self._receipts)

        self.ids: list[str] = []
        self.groups: list[str] = []
        self.text_hashes: list[str] = []
        self.gold_P = np.empty(self.n_rows, dtype=np.int16)
        self.label_ids_PO = np.empty((self.n_rows, self.n_options), dtype=np.int32)
        self.probs_PO: FloatArray = np.empty((self.n_rows, self.n_options), dtype=np.float32)
        for rows, shard in self._placed_shards():
            self.ids += shard.strings("id")
            self.groups += shard.strings("group")
            self.text_hashes += shard.strings("text_hash")
            self.gold_P[rows] = shard.numbers("gold")
            self.label_ids_PO[rows] = shard.numbers("label_ids")
            self.probs_PO[rows] = shard.numbers("probs")

    def shards(self) -> Iterator["Shard"]:
        """The shards in order, each mapped when its turn comes: the way to read everything once."""
        for receipt in self._receipts:
            yield _open_shard(self._folder, receipt, self.n_options, self.identity)

    def row_blocks(self) -> Iterator["RowBlock"]:
        """The rows shard by shard: a way to read few neurons of many rows and hold one shard's at a time."""
        for rows, shard in self._placed_shards():
            yield RowBlock(rows, shard, self._locate)

    def layer(self, layer: int) -> FloatArray:
        """NEGs of one layer: float32 (P, O, N), probability per unit of activation.

        With one shard of storage "values" a read-only view of the mapped file, else a new array.

        Raises
        ------
        ShardError
            If the model has no such layer, or the shards do not hold the values of all neurons.
        """
        self._locate([(layer, 0)])
        if len(self._receipts) == 1:
            return next(self.shards()).negs_PON(layer)
        negs_PON = np.empty((self.n_rows, self.n_options, self.n_neurons), dtype=np.float32)
        for rows, shard in self._placed_shards():
            negs_PON[rows] = shard.negs_PON(layer)
        return negs_PON

    def neurons(self, selection: Selection) -> FloatArray:
        """NEGs of K chosen neurons, in the order asked for: float32 (P, O, K); only their pages are read.

        Parameters
        ----------
        selection : K flat layer-major indices (layer * N + neuron), or K pairs (layer, neuron)

        Raises
        ------
        ShardError
            If a neuron does not exist, or the shards do not hold its values.
        """
        places = self._locate(selection)
        negs_POK = np.empty((self.n_rows, self.n_options, len(places.layers_K)), dtype=np.float32)
        for rows, shard in self._placed_shards():
            negs_POK[rows] = _picked_negs(shard, places)
        return negs_POK

    def activations(self, selection: Selection) -> FloatArray:
        """Activations of K chosen neurons: float32 (P, K). `selection` as in `neurons`."""
        places = self._locate(selection)
        activations_PK = np.empty((self.n_rows, len(places.layers_K)), dtype=np.float32)
        for rows, shard in self._placed_shards():
            activations_PK[rows] = _picked_activations(shard, places)
        return activations_PK

    @property
    def storage(self) -> StorageLevel:
        """What the shards hold: values of NEGs, codes of their order and signs, or sums and chosen neurons."""
        return self.identity.storage

    def __repr__(self) -> str:
        size = f"{self.n_rows} rows x {self.n_options} options x {self.n_layers} layers x {self.n_neurons} neurons"
        name = f"{_listed([self.place])}, site={self.identity.site!r}"
        return f"NegSplit({name}: {size} in {len(self._receipts)} shards)"

    def _placed_shards(self) -> Iterator[tuple[slice, "Shard"]]:
        begin = 0
        for shard in self.shards():
            yield slice(begin, begin + shard.n_rows), shard
            begin += shard.n_rows

    def _locate(self, selection: Selection) -> "_Places":
        chosen = np.asarray(selection)
        if chosen.size == 0:
            return _Places(*np.empty((3, 0), dtype=np.int64))
        if chosen.dtype.kind not in "iu" or not (chosen.ndim == 1 or (chosen.ndim == 2 and chosen.shape[1] == 2)):
            raise ShardError(
                f"neurons are chosen by flat indices (K,) or pairs (K, 2) of whole numbers, "
                f"not by {chosen.dtype} of shape {chosen.shape}"
            )
        layers_K, neurons_K = np.divmod(chosen, self.n_neurons) if chosen.ndim == 1 else chosen.T
        missing = (layers_K < 0) | (layers_K >= self.n_layers) | (neurons_K < 0) | (neurons_K >= self.n_neurons)
        if missing.any():
            raise ShardError(
                f"{chosen[missing][0].tolist()} is no neuron of {self.identity.model!r}: it has "
                f"layers 0..{self.n_layers - 1} with neurons 0..{self.n_neurons - 1}, "
                f"in flat indices 0..{self.n_layers * self.n_neurons - 1}"
            )
        return _Places(layers_K, neurons_K, layers_K * self.n_neurons + neurons_K)


@dataclass(frozen=True)
class Shard:
    """One mapped file; every array is a read-only view of it, but what must be put together from 16 bits."""

    path: Path
    batch: pa.RecordBatch
    n_options: int
    storage: StorageLevel

    @property
    def n_rows(self) -> int:
        """P of this shard."""
        rows: int = self.batch.num_rows
        return rows

    def negs_PON(self, layer: int) -> FloatArray:
        """NEGs of one layer: float32 (P, O, N), probability per unit of activation.

        Raises
        ------
        ShardError
            If the shard holds codes, sums or chosen neurons.
        """
        return _as_float32(self.stored_negs_PON(layer))

    def stored_negs_PON(self, layer: int) -> Stored:
        """The same as it is stored: float32, or bits of bfloat16; a view of the mapped file."""
        if self.storage == "codes":
            raise ShardError(
                f"{str(self.path)!r} holds codes, not values: order and signs of the NEGs are all that can be asked; "
                "run with --storage values"
            )
        self._check_has_layers()
        return self.numbers(f"neg_{layer:02d}").reshape(self.n_rows, self.n_options, -1)

    def ordinals_PON(self, layer: int) -> Ordinals:
        """What stands in one layer for NEGs in order and sign, ties included: shape (P, O, N).

        The NEGs themselves, or from codes small whole numbers (int8, see `negcore.store.codes.decode`). What asks
        nothing but order and sign finds the same in both.

        Raises
        ------
        NegError
            If a code is none: the shard is damaged.
        """
        return decode(self.codes_PN(layer), self.n_options) if self.storage == "codes" else self.negs_PON(layer)

    def codes_PN(self, layer: int) -> npt.NDArray[np.uint16]:
        """Codes of one layer, if the shard holds them: uint16 (P, N), see `negcore.store.codes`."""
        return self.numbers(f"code_{layer:02d}")

    def activations_PN(self, layer: int) -> FloatArray:
        """Activations of one layer: float32 (P, N); `ShardError` if the shard holds sums or chosen neurons."""
        return _as_float32(self.stored_activations_PN(layer))

    def stored_activations_PN(self, layer: int) -> Stored:
        """The same as it is stored: float32, or bits of bfloat16; a view of the mapped file."""
        self._check_has_layers()
        return self.numbers(f"act_{layer:02d}")

    def sums_M(self, vote: Vote) -> npt.NDArray[np.int32]:
        """A vote's score of every neuron, summed over the shard's rows: int32 (M,).

        Raises
        ------
        ShardError
            If the shard holds none.
        """
        name = sum_column(vote)
        if name not in self.batch.schema.names:
            raise ShardError(f"{str(self.path)!r} holds no vote sums: ask the partition that was written for ranking")
        return of_shard(self.batch, name)

    @property
    def chosen_K(self) -> npt.NDArray[np.int32]:
        """Flat indices, rising, of the neurons that a shard of storage "stats" holds: int32 (K,); none beside sums."""
        return of_shard(self.batch, "neurons") if "neurons" in self.batch.schema.names else np.empty(0, np.int32)

    def _check_has_layers(self) -> None:
        if self.storage == "stats":
            raise ShardError(
                f"{str(self.path)!r} holds vote sums or chosen neurons, not whole layers: run with --storage values"
            )

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers: (P,), or (P, width of its lists)."""
        column = self.batch.column(name)
        if not pa.types.is_fixed_size_list(column.type):
            flat: npt.NDArray[Any] = column.to_numpy(zero_copy_only=True)
            return flat
        values: npt.NDArray[Any] = column.values.to_numpy(zero_copy_only=True)
        return values.reshape(self.n_rows, column.type.list_size)

    def strings(self, name: str) -> list[str]:
        """A column of strings."""
        values: list[str] = self.batch.column(name).to_pylist()
        return values


@dataclass(frozen=True)
class RowBlock:
    """The rows of one shard, of which only chosen neurons are read; selections as in `NegSplit.neurons`."""

    rows: slice
    """Where they are among the rows of the split."""
    shard: Shard
    _locate: Callable[[Selection], "_Places"]

    def negs(self, selection: Selection) -> FloatArray:
        """NEGs of K chosen neurons: float32 (P, O, K).

        Raises
        ------
        ShardError
            If the shard does not hold their values.
        """
        return _picked_negs(self.shard, self._locate(selection))

    def ordinals(self, selection: Selection) -> Ordinals:
        """What stands for the NEGs of K chosen neurons in order and sign: (P, O, K), see `Shard.ordinals_PON`."""
        if self.shard.storage != "codes":
            return self.negs(selection)
        places, shape = self._locate(selection), (self.shard.n_rows,)
        codes_PK = _picked(self.shard, self.shard.codes_PN, "code", places, shape).astype(np.uint16, copy=False)
        return decode(codes_PK, self.shard.n_options)

    def activations(self, selection: Selection) -> FloatArray:
        """Activations of K chosen neurons: float32 (P, K)."""
        return _picked_activations(self.shard, self._locate(selection))


class _Places(NamedTuple):
    layers_K: npt.NDArray[np.integer]
    neurons_K: npt.NDArray[np.integer]
    flat_K: npt.NDArray[np.integer]


def _picked_negs(shard: Shard, places: _Places) -> FloatArray:
    return _as_float32(_picked(shard, shard.stored_negs_PON, "neg", places, (shard.n_rows, shard.n_options)))


def _picked_activations(shard: Shard, places: _Places) -> FloatArray:
    return _as_float32(_picked(shard, shard.stored_activations_PN, "act", places, (shard.n_rows,)))


def _picked(
    shard: Shard,
    stored_of: Callable[[int], npt.NDArray[Any]],
    column: str,
    places: _Places,
    shape: tuple[int, ...],
) -> npt.NDArray[Any]:
    """Chosen neurons of `stored_of(layer)` (*shape, N), or of the column that holds them: (*shape, K), as stored."""
    if shard.storage == "stats" and places.flat_K.size:
        at_K = _columns_of(shard, places.flat_K)
        return shard.numbers(column).reshape(*shape, -1)[..., at_K]
    stored = {int(layer): stored_of(int(layer)) for layer in np.unique(places.layers_K)}
    dtype = next((values.dtype for values in stored.values()), np.dtype(np.float32))
    picked = np.empty((*shape, len(places.layers_K)), dtype)
    for layer, values in stored.items():
        at = np.flatnonzero(places.layers_K == layer)
        picked[..., at] = values[..., places.neurons_K[at]]
    return picked


def _as_float32(stored: Stored) -> FloatArray:
    return from_bits(stored) if stored.dtype == np.uint16 else stored


def _columns_of(shard: Shard, flat_K: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Places of neurons among those that a shard of storage "stats" holds."""
    absent_K = flat_K[~np.isin(flat_K, shard.chosen_K)]
    if absent_K.size:
        raise ShardError(
            f"{str(shard.path)!r} does not hold neuron {absent_K[0]} (flat index): storage 'stats' keeps those that "
            "the run's own probes can ask for; run with other probes in another directory, or with --storage values"
        )
    return np.searchsorted(shard.chosen_K, flat_K)


# Files: all that touches the disk on the reading side


def complete_receipts(folder: Path, *, verify: bool) -> list[Receipt]:
    """Receipts of every shard, in order, or the reason why the partition cannot be read."""
    known = receipts(folder)
    if len({(receipt.digest, receipt.n_shards) for receipt in known}) > 1:
        raise ShardError(f"{str(folder)!r} holds shards of several runs: delete it and run one of them again")
    whole = whole_shards(folder, known, verify=verify)
    if not whole or len(whole) < whole[0].n_shards:
        progress = f"{len(whole)} of {known[0].n_shards} shards" if known else "no finished shards"
        raise ShardError(f"{str(folder)!r} is incomplete, {progress}: run the same command again")
    return whole


def _identity(folder: Path, receipt: Receipt) -> RunIdentity:
    try:
        identity = RunIdentity(**receipt.identity, versions=receipt.versions)
    except TypeError as error:
        raise ShardError(f"{str(folder)!r} was written by another version of this software ({error})") from error
    if identity.storage not in get_args(StorageLevel):
        named = f"storage {identity.storage!r}"
        raise ShardError(f"{str(folder)!r} was written by another version of this software ({named})")
    return identity


def mapped_batch(path: Path) -> pa.RecordBatch:
    """The one batch of a shard's file, memory-mapped; read as a whole if it is in a bucket."""
    source = pa.py_buffer(read_bytes(path)) if is_remote(path) else pa.memory_map(str(path))
    try:
        batch = pa.ipc.open_file(source).get_batch(0)
        batch.validate()
    except pa.ArrowException as error:
        raise _damaged(path, str(error).splitlines()[0]) from error
    return batch


def local_shard(folder: Path, receipt: Receipt) -> Path:
    """The file of a receipt's shard on this machine: itself, or a copy of what is in a bucket, made when first needed.

    Copies are in `cache_directory()`'s ``shards``, named after their content; that folder can be deleted at any time.

    Raises
    ------
    ShardError
        If what came out of the bucket has another checksum than its receipt; nothing has parsed it then.
    """
    shard = shard_of(folder, receipt)
    if not is_remote(shard):
        return shard
    copy = cache_directory() / "shards" / f"{receipt.file_xxh3}.arrow"
    if n_bytes(copy) != receipt.n_bytes:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with locked(copy.with_suffix(".lock")):  # several processes of this machine may need it at once
            if n_bytes(copy) != receipt.n_bytes:
                _copy_shard(shard, receipt, copy)
    return copy


def _copy_shard(shard: Path, receipt: Receipt, copy: Path) -> None:
    with draft(copy) as path:
        fetch(shard, path)
        if checksum(path) != receipt.file_xxh3:
            raise _damaged(shard, "its checksum is not the one in its receipt")


def _n_options(folder: Path, receipt: Receipt) -> int:
    path = local_shard(folder, receipt)
    schema = mapped_batch(path).schema
    if "probs" not in schema.names or not pa.types.is_fixed_size_list(schema.field("probs").type):
        raise _damaged(path, "no column 'probs'")
    n_options: int = schema.field("probs").type.list_size
    return n_options


def _open_shard(folder: Path, receipt: Receipt, n_options: int, identity: RunIdentity) -> Shard:
    path = local_shard(folder, receipt)
    batch = mapped_batch(path)
    shape, n_chosen = (n_options, identity.n_layers, identity.n_neurons), count_chosen(batch.schema)
    if not batch.schema.equals(shard_schema(*shape, identity.storage, n_chosen)):
        raise _damaged(path, "its columns are not those of its receipt and of the first shard")
    if batch.num_rows != receipt.n_rows:
        raise _damaged(path, f"{batch.num_rows} rows, {receipt.n_rows} in its receipt")
    shard = Shard(shard_of(folder, receipt), batch, n_options, identity.storage)
    if identity.neurons != (None if n_chosen is None else choice_digest(shard.chosen_K.tolist())):
        raise _damaged(path, "its neurons are not those of its receipt")
    return shard


def _damaged(path: Path, reason: str) -> ShardError:
    return ShardError(f"{str(path)!r} is damaged ({reason}): delete it and run the same command again")


def _listed(places: list[ShardPlace]) -> str:
    return "; ".join(f"model={place.model!r}, dataset={place.dataset!r}, split={place.part!r}" for place in places)
