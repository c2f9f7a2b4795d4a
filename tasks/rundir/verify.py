"""Check every shard of a run directory against its receipt, and prepare what is damaged for being computed again."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from negcore.store.files import find, remove, sizes
from negcore.store.identity import difference
from negcore.store.integrity import shard_faults
from negcore.store.publish import Receipt, index_of, receipt_path, receipts, shard_of
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

    The checks are those that runs and readers make: see `negcore.store.integrity`.

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
    for receipt, reason in shard_faults(folder.path, own, checked=checked):
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


def _unproven(folder: ShardFolder, n_shards: int | None, proven: Mapping[int, Receipt]) -> Iterator[Fault]:
    """Return a fault for every shard without a readable receipt."""
    damaged = {index_of(path.name): path for path in find(folder.path, "_receipts/part-*.json")}
    shards = {index_of(name) for name in sizes(folder.path, "part-*.arrow")}
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
        receipt, path = proven.get(index_of(name)), folder.path / name
        if receipt is not None and path != shard_of(folder.path, receipt):
            yield Fault(f"{name}: no receipt names it", remove=path)
