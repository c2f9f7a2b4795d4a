"""Arrow shards: how they are published, and the receipts that prove it.

Layout of a run directory (names quoted, so that pyarrow's hive partitioning gives them back)::

    negs/model=meta-llama%2FLlama-2-7b/dataset=agnews/split=test/part-00003.arrow
    negs/model=meta-llama%2FLlama-2-7b/dataset=agnews/split=test/_receipts/part-00003.json
    sweeps/model=smollm2-135m/dataset=mini%2Ffacts/block=layers-00-04/part-00003.arrow
    estimates/model=smollm2-135m/dataset=mini%2Ffacts/estimator=neurgrad/part-00000.arrow
    interventions/model=smollm2-135m/dataset=mini%2Ffacts/sets=nested/part-00000.arrow
    causal/model=smollm2-135m/dataset=agnews/sets=magn-5b1f0c7a9d24e863/part-00000.arrow

A shard counts only once its receipt exists, and the receipt is written last: a crash at any point leaves nothing, or a
shard without a receipt, which is computed again. The columns of NEGs are in `negcore.store.schema`, those of everything
else in `negcore.store.study`; checks are in `negcore.store.integrity`, reading is in `negcore.store.reader` and
`negcore.store.study`.

In a bucket a shard's name carries its checksum (``part-00003-CHECKSUM.arrow``), and of several writers of one receipt
the server lets one win: what is under a name never changes, so a receipt cannot come to stand for another's shard.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, unquote

import pyarrow as pa
import xxhash

from negcore.errors import RunError, ShardError
from negcore.store.buckets import create, objects, remove, replace, upload
from negcore.store.files import (
    LONGEST_NAME,
    MOST_RECORD_BYTES,
    hidden,
    is_remote,
    location,
    make_folder,
    n_bytes,
    open_file,
    parse_json,
    read_bytes,
    small_files,
    sync,
)
from negcore.store.identity import RunIdentity, canonical_json, content_digest
from negcore.store.locks import hold, locked
from negcore.store.schema import with_aligned_metadata
from negcore.store.temporary import temporary_directory

_ABANDONED_S = 24 * 3600
"""Age at which a temporary file has no writer any more, where the file system has no locks to tell by."""


_INDEX = re.compile(r"part-([0-9]{5,})[.-]")

_PART_KEYS: Mapping[str, str] = {
    "negs": "split",
    "sweeps": "block",
    "estimates": "estimator",
    "interventions": "sets",
    "causal": "sets",
}
"""Key that divides the shards of one kind, model and dataset; "part" for every other kind."""


def _pair(key: str, value: str) -> str:
    return f"{key}={quote(value, safe='')}"


class ShardPlace(NamedTuple):
    """One directory of shards that belong together: the unit of resuming and of reading."""

    kind: str
    """Measurement: ``negs``, ``sweeps``, ``estimates``, ``interventions``, ``causal``."""
    model: str
    dataset: str
    part: str
    """The split of NEGs, the block of layers that is swept, the estimator, or the sets of neurons."""

    @property
    def names(self) -> dict[str, str]:
        """The hive pairs of the directory's name, which are in every file's metadata too."""
        return {"model": self.model, "dataset": self.dataset, _PART_KEYS.get(self.kind, "part"): self.part}

    def check(self) -> None:
        """Refuse names that are too long for directories, before anything is computed for them.

        Raises
        ------
        RunError
        """
        for key, name in self.names.items():
            n_bytes = len(_pair(key, name))
            if n_bytes > LONGEST_NAME:
                raise RunError(
                    f"{key} {name!r:.80} takes {n_bytes} bytes as the name of a directory ({_pair(key, name):.40}...), "
                    f"but at most {LONGEST_NAME} are possible; a slash takes 3 and a letter that is not ASCII 6 or "
                    "more: give a shorter name, or a shorter path, such as that of a link"
                )

    def path(self, root: str | Path) -> Path:
        """Return the directory under the run directory `root`."""
        assert all(self), self
        pairs = (_pair(key, value) for key, value in self.names.items())
        return location(root).joinpath(self.kind, *pairs)

    @classmethod
    def is_path(cls, folder: Path, kind: str = "negs") -> bool:
        """Tell whether `path` could have put something of this kind at `folder`."""
        keys = [part.partition("=")[0] for part in folder.parts[-3:]]
        return keys == ["model", "dataset", _PART_KEYS.get(kind, "part")]

    @classmethod
    def of_path(cls, folder: Path, kind: str = "negs") -> "ShardPlace":
        """Return the place that `path` would put at `folder`."""
        assert cls.is_path(folder, kind), folder
        return cls(kind, *(unquote(part.partition("=")[2]) for part in folder.parts[-3:]))


Cause = Literal["failure", "nonfinite"]
"""The cause why a row is set aside: computing it failed or killed its worker, or its numbers are not finite."""


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """A planned row that is not stored."""

    id: str
    cause: Cause
    reason: str
    """The error, in one line and without the prompt's text."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Proof that a shard was published whole; `identity` stays as written, so that any version can compare it.

    A shard whose rows are all set aside is a file of no rows.
    """

    index: int
    n_shards: int
    n_rows: int
    n_bytes: int
    file_xxh3: str
    digest: str
    identity: Mapping[str, Any]
    versions: Mapping[str, str]
    first_id: str
    last_id: str
    ids_xxh3: str
    set_aside: tuple[SetAside, ...] = ()
    """Rows of this shard that are not in it."""
    n_nonfinite: int = 0
    """NaN and infinite values stored."""
    file: str | None = None
    """Name of the shard's file where it carries the checksum, as in a bucket; None where it is `shard_path`'s."""

    @property
    def planned_digest(self) -> str:
        """The digest that a plan knows: of a shard with chosen neurons, what it was before they were chosen."""
        if "neurons" not in self.identity:
            return self.digest
        return content_digest({**self.identity, "neurons": ""})


def publish_shard(
    root: str | Path,
    place: ShardPlace,
    index: int,
    n_shards: int,
    *,
    identity: RunIdentity,
    batch: pa.RecordBatch,
    about: Mapping[str, Any],
    set_aside: Sequence[SetAside] = (),
    n_nonfinite: int = 0,
) -> Receipt:
    """Publish one shard and then its receipt; the bytes of both depend on the arguments alone.

    Parameters
    ----------
    root : path
        Run directory.
    place : ShardPlace
        Directory of the shards that belong together.
    index, n_shards : int
        Which of these shards it is, and how many there are.
    batch : RecordBatch
        With a column ``id`` of strings; of prompts only a hash.
    about : mapping
        Said in the file's metadata beside place, identity and versions, as JSON.
    set_aside : sequence of SetAside
        Rows that belong to this shard and are not in the batch. Said in the receipt alone.
    n_nonfinite : int
        NaN and infinite values among the numbers. Said in the receipt alone.

    Returns
    -------
    Receipt
        In a bucket it is that of another writer who published the same shard first, if it came to that.

    Raises
    ------
    ShardError
        If another run publishes there at the same time, in a bucket.
    """
    assert 0 <= index < n_shards, (index, n_shards)
    folder = place.path(root)
    which: dict[str, Any] = {"index": index, "n_shards": n_shards}
    made_by: dict[str, Any] = {
        "identity": identity.comparable(),
        "digest": identity.digest,
        "versions": identity.versions,
    }
    ids = batch.column("id").to_pylist()
    in_bucket = is_remote(folder)
    with _temporary_elsewhere() if in_bucket else _temporary(shard_path(folder, index)) as temporary:
        metadata = {**about, "partition": place.names, **which, **made_by}
        _write_batch(with_aligned_metadata(batch, canonical_json(metadata)), temporary)
        file_xxh3 = checksum(temporary)
        receipt = Receipt(
            **which,
            n_rows=len(ids),
            n_bytes=temporary.stat().st_size,
            file_xxh3=file_xxh3,
            **made_by,
            first_id=ids[0] if ids else "",
            last_id=ids[-1] if ids else "",
            ids_xxh3=content_digest(ids),
            set_aside=tuple(set_aside),
            n_nonfinite=n_nonfinite,
            file=_name_with_checksum(index, file_xxh3) if in_bucket else None,
        )
        return _publish_in_bucket(temporary, folder, receipt) if in_bucket else _publish(temporary, folder, receipt)


class ReadReceipts(NamedTuple):
    """The receipts of a directory of shards, of whichever run, in order of index."""

    whole: list[Receipt]
    damaged: list[Path]
    """Files of those whose seal does not fit: their shards are measured again."""


def read_receipts(folder: Path) -> ReadReceipts:
    """Read the receipts of a directory of shards."""
    whole: list[Receipt] = []
    damaged: list[Path] = []
    shared: dict[str, Any] = {}
    for file in small_files(folder / "_receipts", "part-*.json"):
        receipt = parsed_receipt(file.name, file.content)
        if receipt is None:
            damaged.append(folder / "_receipts" / file.name)
        else:
            whole.append(_sharing(receipt, shared))
    return ReadReceipts(sorted(whole, key=lambda receipt: receipt.index), sorted(damaged))


def _sharing(receipt: Receipt, shared: dict[str, Any]) -> Receipt:
    """Return a receipt that has what it says of its run in common with others: there may be half a million."""
    for name in ("digest", "identity", "versions"):
        value = getattr(receipt, name)
        if shared.setdefault(name, value) == value:
            object.__setattr__(receipt, name, shared[name])
    return receipt


def receipts(folder: Path) -> list[Receipt]:
    """Return the undamaged receipts of a directory of shards, of whichever run, in order of index."""
    return read_receipts(folder).whole


def read_receipt(folder: Path, index: int) -> Receipt | None:
    """Return the receipt of one shard, of whichever run; None if it is damaged or there is none."""
    path = receipt_path(folder, index)
    try:
        return parsed_receipt(path.name, read_bytes(path, MOST_RECORD_BYTES))
    except FileNotFoundError:
        return None


def index_of(name: str) -> int:
    """Return the index of the shard that a file belongs to by its name, or -1."""
    found = _INDEX.match(name)
    return int(found[1]) if found else -1


def shard_of(folder: Path, receipt: Receipt) -> Path:
    """Return the file of the shard that a receipt is about."""
    return folder / receipt.file if receipt.file else shard_path(folder, receipt.index)


def shard_path(folder: Path, index: int) -> Path:
    """Return the shard's file in its directory, unless that is in a bucket; see `shard_of`."""
    return folder / f"part-{index:05d}.arrow"


def receipt_path(folder: Path, index: int) -> Path:
    """Return the file of a shard's receipt in the shard's directory."""
    return folder / "_receipts" / _receipt_name(index)


def _receipt_name(index: int) -> str:
    return f"part-{index:05d}.json"


# Files: all that touches the disk on the writing side


def _write_batch(batch: pa.RecordBatch, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def checksum(path: Path) -> str:
    """Return the xxh3-128, in hex, of a file's content, as in receipts."""
    if is_remote(path):
        return xxhash.xxh3_128_hexdigest(read_bytes(path))
    with open_file(path) as handle:
        return str(hashlib.file_digest(handle, xxhash.xxh3_128).hexdigest())


def _lock(folder: Path) -> Path:
    return folder / "_receipts" / ".lock"


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Yield a hidden file beside `target` that is locked while its writer lives and removed at the end."""
    make_folder(target.parent / "_receipts")
    path = hidden(target)
    with locked(_lock(target.parent)):
        _remove_abandoned(target.parent)
        handle = path.open("xb")
        hold(handle)
    try:
        with handle:
            yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _temporary_elsewhere() -> Iterator[Path]:
    with temporary_directory() as folder:
        yield folder / "part.arrow"


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of dead writers, on which nobody holds a lock."""
    for path in [*folder.glob(".part-*.tmp"), *folder.glob("_receipts/.part-*.tmp")]:
        with suppress(FileNotFoundError, BlockingIOError), path.open("r+b") as handle:
            if hold(handle, wait=False) or time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()


def _publish(temporary: Path, folder: Path, receipt: Receipt) -> Receipt:
    """Show the shard, then its receipt, under a lock: of two writers, one shard and *its* receipt remain."""
    path = receipt_path(folder, receipt.index)
    hidden_receipt = hidden(path)
    sync(temporary)
    with locked(_lock(folder)):
        path.unlink(missing_ok=True)
        temporary.replace(shard_of(folder, receipt))
        sync(folder)
        hidden_receipt.write_text(_sealed(receipt), encoding="ascii")
        sync(hidden_receipt)
        hidden_receipt.replace(path)
        sync(path.parent)
    return receipt


def _publish_in_bucket(temporary: Path, folder: Path, receipt: Receipt) -> Receipt:
    """Put the shard under its own name, then put the receipt, or return the one that another writer put first."""
    shard, path = shard_of(folder, receipt), receipt_path(folder, receipt.index)
    content = _sealed(receipt).encode("ascii")
    upload(temporary, shard)
    standing = create(path, content)
    while standing is not None:
        other = parsed_receipt(path.name, standing.content)
        if other == receipt:
            return receipt
        if other is not None and (other.digest, other.n_shards) != (receipt.digest, receipt.n_shards):
            remove(shard)
            raise _run_beside(folder, receipt, other)
        if other is not None and _is_whole(folder, other):
            if other.file != receipt.file:
                remove(shard)
            return other
        standing = replace(path, content, standing)
    _remove_rivals(folder, receipt)
    return receipt


def _is_whole(folder: Path, receipt: Receipt) -> bool:
    shard = shard_of(folder, receipt)
    return n_bytes(shard) == receipt.n_bytes and checksum(shard) == receipt.file_xxh3


def _remove_rivals(folder: Path, receipt: Receipt) -> None:
    """Remove the files of writers of the same shard that died or came second: no receipt can name them any more."""
    plain = shard_path(folder, receipt.index)
    for path in [plain, *objects(folder, f"{plain.stem}-")]:
        if path.name != receipt.file:
            remove(path)


def _name_with_checksum(index: int, file_xxh3: str) -> str:
    return f"part-{index:05d}-{file_xxh3}.arrow"


def _sealed(receipt: Receipt) -> str:
    record = asdict(receipt)
    return canonical_json(record | {"seal": content_digest(record)}) + "\n"


def parsed_receipt(name: str, content: bytes) -> Receipt | None:
    """Return the receipt, or None if it is damaged: its shard is then measured again."""
    try:
        record = parse_json(content)
        seal = record.pop("seal")
        known = {item.name: record[item.name] for item in fields(Receipt) if item.name in record}
        receipt = Receipt(**known | {"set_aside": tuple(SetAside(**row) for row in record.get("set_aside", ()))})
        in_place = _receipt_name(receipt.index) == name
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return receipt if in_place and _has_seal(content, seal) and _names_its_own(receipt) else None


def _has_seal(content: bytes, seal: Any) -> bool:
    """Tell whether the bytes of a receipt, without its seal, have that checksum: nothing may be spelt otherwise."""
    sealed = content.removesuffix(b"\n").replace(f'"seal":"{seal}",'.encode(), b"", 1)
    return bool(xxhash.xxh3_128_hexdigest(sealed) == seal)


def _names_its_own(receipt: Receipt) -> bool:
    """Tell whether checksum and file name have the form of one, since they become names of files."""
    xxh3 = receipt.file_xxh3
    is_checksum = isinstance(xxh3, str) and re.fullmatch("[0-9a-f]{32}", xxh3) is not None
    return is_checksum and receipt.file in (None, _name_with_checksum(receipt.index, xxh3))


# Messages


def _run_beside(folder: Path, receipt: Receipt, other: Receipt) -> ShardError:
    return ShardError(
        f"{str(folder)!r}: another run published shard {other.index} at the same time ({other.n_shards} shards, digest "
        f"{other.digest}; this run {receipt.n_shards}, {receipt.digest}): give each run an output directory of its own"
    )
