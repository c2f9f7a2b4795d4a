"""Check every shard of a run directory against its receipt, and prepare what is damaged for being computed again."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from negcore.errors import ShardError
from negcore.store.buckets import fetch
from negcore.store.files import find, is_remote, n_bytes, remove, sizes
from negcore.store.identity import choice_digest, content_digest, difference
from negcore.store.levels import has_columns_of
from negcore.store.publish import Receipt, checksum, receipt_path, receipts, shard_of
from negcore.store.reader import mapped_batch
from negcore.store.schema import ROW_COLUMNS, first_row
from negcore.store.temporary import temporary_directory
from tasks.rundir.layout import ShardFolder, receipts_of

_NAMED = 8
"""Missing shards that a line names."""


@dataclass(frozen=True)
class Fault:
    """Something wrong in a directory of shards."""

    what: str
    """One line."""
    recompute: bool = False
    """True if the same run, started again, repairs it."""
    remove: Path | None = None
    """A file to remove before that: the receipt of a damaged shard, or a leftover of a dead writer."""


@dataclass(frozen=True)
class Verified:
    """The result of checking one directory of shards."""

    folder: ShardFolder
    n_shards: int | None
    """Shards that make it whole, by its plan or its receipts; None without either."""
    n_whole: int
    n_rows: int
    """Rows in the whole shards; `n_bytes` are theirs too."""
    n_bytes: int
    faults: tuple[Fault, ...]

    @property
    def recompute(self) -> bool:
        """True if the same run, started again, has something to compute here."""
        return any(fault.recompute for fault in self.faults)


def verify(folders: Iterable[ShardFolder], checked: Callable[[int], None]) -> Iterator[Verified]:
    """Check directories of shards, one after the other; nothing is changed.

    Compares in this order: the receipt's seal, the shard's size and checksum; only then is the shard parsed, and its
    place, run, columns and row ids are compared.

    Parameters
    ----------
    checked : callable
        Called with the bytes of every shard that was checked.
    """
    for folder in folders:
        yield _verified(folder, checked)


def total_bytes(folders: Iterable[ShardFolder]) -> int:
    """Return the bytes of all shards by their receipts, in which the progress of `verify` is counted."""
    return sum(receipt.n_bytes for folder in folders for receipt in receipts(folder.path))


def unpublish(verified: Verified) -> None:
    """Remove leftovers and the receipts of damaged shards, so that the same run makes these shards again.

    Nobody may be writing to the directory.
    """
    for fault in verified.faults:
        if fault.remove is not None:
            remove(fault.remove)


def _verified(folder: ShardFolder, checked: Callable[[int], None]) -> Verified:
    own, foreign, n_shards = receipts_of(folder)
    proven = {receipt.index: receipt for receipt in [*own, *foreign]}
    whole, faults = [], []
    for receipt in own:
        reason = _shard_fault(folder, receipt)
        checked(receipt.n_bytes)
        if reason is None:
            whole.append(receipt)
        else:
            proof = receipt_path(folder.path, receipt.index)
            faults.append(Fault(f"shard {receipt.index}: {reason}", recompute=True, remove=proof))
    faults += _unproven(folder, n_shards, proven)
    if foreign:  # a run refuses a directory with shards of another one: nothing in it is computed again
        faults = [Fault(fault.what) for fault in faults] + list(_foreign(own, foreign))
    return Verified(
        folder=folder,
        n_shards=n_shards,
        n_whole=len(whole),
        n_rows=sum(receipt.n_rows for receipt in whole),
        n_bytes=sum(receipt.n_bytes for receipt in whole),
        faults=(*faults, *_leftovers(folder, proven)),
    )


def _shard_fault(folder: ShardFolder, receipt: Receipt) -> str | None:
    """Return what is wrong with a shard, or None; it is parsed only if its bytes are those that were published."""
    path = shard_of(folder.path, receipt)
    size = n_bytes(path)
    if size is None:
        return "missing, though its receipt is there"
    if size != receipt.n_bytes:
        return f"{size} bytes long, {receipt.n_bytes} in its receipt"
    if content_digest(dict(receipt.identity)) != receipt.digest:
        return "the digest in its receipt is not that of the settings in it"
    with _on_this_machine(path) as file:
        if checksum(file) != receipt.file_xxh3:
            return "its checksum is not the one in its receipt"
        try:
            return _content_fault(folder, receipt, mapped_batch(file))
        except ShardError as error:
            return str(error)


@contextmanager
def _on_this_machine(path: Path) -> Iterator[Path]:
    """Yield the file itself, or a copy of a file in a bucket."""
    if not is_remote(path):
        yield path
        return
    with temporary_directory() as folder:
        copy = folder / path.name
        fetch(path, copy)
        yield copy


def _content_fault(folder: ShardFolder, receipt: Receipt, batch: pa.RecordBatch) -> str | None:
    about = _about(batch)
    if _place(about) != folder.names:
        return f"it belongs to {', '.join(_place(about)) or 'an unknown place'}"
    if any(about.get(name) != getattr(receipt, name) for name in ("index", "n_shards", "digest")):
        return "its metadata are not those of its receipt"
    if not _has_its_columns(folder, receipt, batch.schema):
        return "its columns are not those of its model and dataset"
    if not _has_its_neurons(receipt, batch):
        return "its neurons are not those of its receipt"
    ids = batch.column("id").to_pylist()
    if len(ids) != receipt.n_rows or content_digest(ids) != receipt.ids_xxh3:
        return f"its {len(ids)} row ids are not the {receipt.n_rows} of its receipt"
    return None


def _about(batch: pa.RecordBatch) -> dict[str, Any]:
    """Return the shard's metadata; empty if it cannot be read."""
    try:
        about = json.loads((batch.schema.metadata or {})[b"neg"])
    except (KeyError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _place(about: Mapping[str, Any]) -> tuple[str, ...]:
    """Return model, dataset, and split or other part; studies of earlier versions call it `place` and name its kind."""
    place = about.get("partition") or about.get("place")
    known = place if isinstance(place, dict) else {}
    part = [name for key, name in known.items() if key not in ("kind", "model", "dataset")]
    names = (known.get("model"), known.get("dataset"), *part)
    return tuple(str(name) for name in names if name is not None)


def _has_its_columns(folder: ShardFolder, receipt: Receipt, schema: pa.Schema) -> bool:
    if folder.kind != "negs":  # a study's other columns depend on what it measures
        return tuple(schema.names[: len(ROW_COLUMNS)]) == ROW_COLUMNS
    return has_columns_of(receipt.identity, schema)


def _has_its_neurons(receipt: Receipt, batch: pa.RecordBatch) -> bool:
    """Tell whether a shard with chosen neurons holds those of its receipt; a shard without rows names none."""
    if "neurons" not in receipt.identity or not batch.num_rows:
        return True
    return bool(choice_digest(first_row(batch, "neurons").tolist()) == receipt.identity["neurons"])


def _unproven(folder: ShardFolder, n_shards: int | None, proven: Mapping[int, Receipt]) -> Iterator[Fault]:
    """Return a fault for every shard without a readable receipt."""
    damaged = {_index(path.name): path for path in find(folder.path, "_receipts/part-*.json")}
    shards = {_index(name) for name in sizes(folder.path, "part-*.arrow")}
    for index in sorted((damaged.keys() | shards) - proven.keys()):
        what = "its receipt is damaged" if index in damaged else "it has no receipt"
        if n_shards is not None and index >= n_shards:
            yield Fault(f"shard {index}: {what}, and this run makes {n_shards} only: delete it")
        else:
            yield Fault(f"shard {index}: {what}", recompute=True, remove=damaged.get(index))
    yield from _missing(n_shards or 0, proven.keys() | damaged.keys() | shards)


def _missing(n_shards: int, there: Set[int]) -> Iterator[Fault]:
    """Return a fault for the shards that are missing altogether, and name as many as fit a line."""
    named = list(islice((str(index) for index in range(n_shards) if index not in there), _NAMED + 1))
    if named:
        count = n_shards - sum(0 <= index < n_shards for index in there)
        listed = ", ".join(named[:_NAMED]) + ", ..." * (len(named) > _NAMED)
        yield Fault(f"{count} of {n_shards} shards are missing: {listed}", recompute=True)


def _foreign(own: Sequence[Receipt], foreign: Sequence[Receipt]) -> Iterator[Fault]:
    """Return a fault for every other run that has receipts here."""
    for digest, n_shards in dict.fromkeys((receipt.digest, receipt.n_shards) for receipt in foreign):
        of_run = [receipt for receipt in foreign if (receipt.digest, receipt.n_shards) == (digest, n_shards)]
        listed = f"{len(of_run)} of {n_shards} shards are of another run, the first is shard {of_run[0].index}"
        yield Fault(f"{listed} ({_difference(own, of_run[0])}): move or delete them")


def _difference(own: Sequence[Receipt], other: Receipt) -> str:
    if not own:
        return f"digest {other.digest}"
    if own[0].digest == other.digest:
        return f"cut into {other.n_shards} shards, not {own[0].n_shards}"
    return difference(own[0].identity, other.identity)


def _leftovers(folder: ShardFolder, proven: Mapping[int, Receipt]) -> Iterator[Fault]:
    """Return a fault for every leftover of a writer that died or, in a bucket, was not the first to publish."""
    for pattern in (".part-*", "_receipts/.part-*"):
        for path in find(folder.path, pattern):
            yield Fault(f"{path.name}: left by a writer that died, if nobody is writing now", remove=path)
    for name in sizes(folder.path, "part-*.arrow"):
        receipt, path = proven.get(_index(name)), folder.path / name
        if receipt is not None and path != shard_of(folder.path, receipt):
            yield Fault(f"{name}: no receipt names it", remove=path)


def _index(name: str) -> int:
    """Return the index of the shard that a file belongs to, or -1."""
    digits = name.removeprefix("part-")[:5]
    return int(digits) if digits.isdecimal() else -1
