"""Arrow shards on disk: how they are published, and which shards of a run are already finished.

Layout of a run directory (names quoted, so that pyarrow's hive partitioning gives them back)::

    negs/model=meta-llama%2FLlama-2-7b/dataset=agnews/split=test/part-00003.arrow
    negs/model=meta-llama%2FLlama-2-7b/dataset=agnews/split=test/_receipts/part-00003.json

A shard counts only once its receipt exists, and the receipt is written last: a crash at any point leaves
nothing, or a shard without a receipt, which is computed again. A shard's columns are in `negcore.columns`,
reading is in `negcore.reader`.

Axes: P prompts (rows), O options, L layers, N neurons a layer.
"""

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from negcore.columns import AXES, StoredExample, record_batch, shard_schema, with_aligned_metadata
from negcore.errors import ShardError
from negcore.identity import RunIdentity, canonical_json, content_digest


class Partition(NamedTuple):
    """One (model, dataset, split): the unit of a hive directory, of resuming and of reading."""

    model: str
    dataset: str
    split: str

    def path(self, root: str | Path) -> Path:
        """Directory of this partition's shards under the run directory `root`."""
        assert all(self), self
        return Path(root, "negs", *(f"{key}={quote(value, safe='')}" for key, value in self._asdict().items()))

    @classmethod
    def of_path(cls, folder: Path) -> "Partition":
        """The partition that `path` would put at `folder`."""
        pairs = [part.partition("=") for part in folder.parts[-3:]]
        assert [key for key, _, _ in pairs] == list(cls._fields), folder
        return cls(*(unquote(value) for _, _, value in pairs))


class Place(Protocol):
    """Names a directory of shards that belong together."""

    def path(self, root: str | Path) -> Path:
        """That directory under the run directory `root`."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Proof that a shard was published whole; `identity` stays as written, so that any version can compare it."""

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


def write_shard(
    root: str | Path,
    partition: Partition,
    index: int,
    n_shards: int,
    *,
    identity: RunIdentity,
    examples: Sequence[StoredExample],
    label_ids_PO: npt.ArrayLike,
    negs_POLN: npt.ArrayLike,
    activations_PLN: npt.ArrayLike,
    probs_PO: npt.ArrayLike,
) -> Receipt:
    """Publish one shard and then its receipt; the bytes of both depend on the arguments alone.

    Parameters
    ----------
    root : path
        Run directory.
    index, n_shards : int
        Place of this shard among the partition's shards.
    examples : sequence of P examples
        Anything with ``id``, ``prompt``, ``answer`` and ``group``. Of the prompt only a hash is stored.
    label_ids_PO : int array (P, O)
        Token id of every option's label.
    negs_POLN : float32 array (P, O, L, N), probability per unit of activation
    activations_PLN : float32 array (P, L, N)
    probs_PO : float32 array (P, O)

    Returns
    -------
    Receipt
    """
    batch = record_batch(
        examples,
        label_ids_PO=np.asarray(label_ids_PO, dtype=np.int32),
        negs_POLN=np.asarray(negs_POLN, dtype=np.float32),
        activations_PLN=np.asarray(activations_PLN, dtype=np.float32),
        probs_PO=np.asarray(probs_PO, dtype=np.float32),
    )
    n_options = np.shape(probs_PO)[1]
    assert batch.schema.equals(shard_schema(n_options, identity.n_layers, identity.n_neurons)), identity
    return publish_batch(
        partition.path(root),
        index,
        n_shards,
        identity=identity,
        batch=batch,
        about={"partition": partition._asdict(), "n_options": n_options, "axes": AXES},
    )


def publish_batch(
    folder: Path,
    index: int,
    n_shards: int,
    *,
    identity: RunIdentity,
    batch: pa.RecordBatch,
    about: Mapping[str, Any],
) -> Receipt:
    """Publish a batch as one shard of a directory, and then its receipt; the bytes depend on the arguments alone.

    Parameters
    ----------
    folder : Path
        Directory of the shards that belong together.
    index, n_shards : int
        Place of this shard among them.
    batch : RecordBatch
        With a column ``id`` of strings.
    about : mapping
        Said in the file's metadata beside identity, versions and place, as JSON.
    """
    assert 0 <= index < n_shards, (index, n_shards)
    place: dict[str, Any] = {"index": index, "n_shards": n_shards}
    made_by: dict[str, Any] = {
        "identity": identity.comparable(),
        "digest": identity.digest,
        "versions": identity.versions,
    }
    ids = batch.column("id").to_pylist()
    target = shard_path(folder, index)
    with _temporary(target) as temporary:
        _write_batch(with_aligned_metadata(batch, canonical_json({**about, **place, **made_by})), temporary)
        receipt = Receipt(
            **place,
            n_rows=len(ids),
            n_bytes=temporary.stat().st_size,
            file_xxh3=_file_xxh3(temporary),
            **made_by,
            first_id=ids[0],
            last_id=ids[-1],
            ids_xxh3=content_digest(ids),
        )
        _publish(temporary, target, receipt)
    return receipt


def finished_shards(
    root: str | Path,
    partition: Place,
    identity: RunIdentity,
    shard_ids: Sequence[Sequence[str]],
    *,
    verify: bool = False,
) -> dict[int, Receipt]:
    """Shards of this very run that need not be computed again, by index.

    Damaged receipts and shards that are missing or of another length are left out, and so computed again.

    Parameters
    ----------
    shard_ids : sequence of sequences of str
        The example ids of every shard this run would write, in order: other rows are refused.
    verify : bool
        Also compare every file's checksum.

    Raises
    ------
    ShardError
        If the partition holds shards of another run, or of the same run cut into other rows.
    """
    folder = partition.path(root)
    finished = {}
    for receipt in receipts(folder):
        if receipt.digest != identity.digest:
            raise _other_run(folder, identity, receipt)
        expected = shard_ids[receipt.index] if receipt.index < len(shard_ids) else []
        if receipt.n_shards != len(shard_ids) or receipt.ids_xxh3 != content_digest(list(expected)):
            raise _other_rows(folder, shard_ids, receipt)
        if is_whole(folder, receipt, verify=verify):
            finished[receipt.index] = receipt
    return finished


def receipts(folder: Path) -> list[Receipt]:
    """The undamaged receipts of a partition's directory, in order of index, whatever run they belong to."""
    found = map(_read_receipt, folder.glob("_receipts/part-*.json"))
    return sorted((receipt for receipt in found if receipt is not None), key=lambda receipt: receipt.index)


def is_whole(folder: Path, receipt: Receipt, *, verify: bool) -> bool:
    """Whether the receipt's shard has the length (with `verify`: also the checksum) that was published."""
    path = shard_path(folder, receipt.index)
    if not path.is_file() or path.stat().st_size != receipt.n_bytes:
        return False
    return not verify or _file_xxh3(path) == receipt.file_xxh3


def shard_path(folder: Path, index: int) -> Path:
    """The shard's file in its partition's directory."""
    return folder / f"part-{index:05d}.arrow"


# Files: all that touches the disk on the writing side


def _write_batch(batch: pa.RecordBatch, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _file_xxh3(path: Path) -> str:
    with path.open("rb") as handle:
        return str(hashlib.file_digest(handle, xxhash.xxh3_128).hexdigest())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the partition alone for a moment; the kernel lets go when the holder dies."""
    with (folder / "_receipts" / ".lock").open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A hidden file beside `target`, locked as long as its writer lives, gone on leaving."""
    (target.parent / "_receipts").mkdir(parents=True, exist_ok=True)
    path = _hidden(target)
    with _locked(target.parent):
        _remove_abandoned(target.parent)
        handle = path.open("xb")
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with handle:
            yield path
    finally:
        path.unlink(missing_ok=True)


def _hidden(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def _remove_abandoned(folder: Path) -> None:
    """Remove dead writers' temporary files: those nobody holds a lock on. (Process ids differ between containers.)"""
    for path in [*folder.glob(".part-*.tmp"), *folder.glob("_receipts/.part-*.tmp")]:
        with suppress(FileNotFoundError, BlockingIOError), path.open("r+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _publish(temporary: Path, target: Path, receipt: Receipt) -> None:
    """Show the shard, then its receipt. Locked, so that of two writers one shard and *its* receipt remain."""
    receipt_path = _receipt_path(target)
    record = asdict(receipt)
    hidden_receipt = _hidden(receipt_path)
    _sync(temporary)
    with _locked(target.parent):
        receipt_path.unlink(missing_ok=True)
        temporary.replace(target)
        hidden_receipt.write_text(canonical_json(record | {"seal": content_digest(record)}) + "\n", encoding="ascii")
        _sync(hidden_receipt)
        hidden_receipt.replace(receipt_path)


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _receipt_path(shard: Path) -> Path:
    return shard.parent / "_receipts" / f"{shard.stem}.json"


def _read_receipt(path: Path) -> Receipt | None:
    """The receipt, or None if it is damaged: its shard is then computed again."""
    try:
        record = json.loads(path.read_bytes())
        seal = record.pop("seal")
        receipt = Receipt(**{item.name: record[item.name] for item in fields(Receipt)})
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    in_place = seal == content_digest(record) and _receipt_path(shard_path(path.parent.parent, receipt.index)) == path
    return receipt if in_place else None


# Messages


def _other_run(folder: Path, identity: RunIdentity, receipt: Receipt) -> ShardError:
    return ShardError(
        f"{str(folder)!r} holds shards of another run (this run here, that one there: "
        f"{identity.difference(receipt.identity)}): write to another output directory, or delete that partition"
    )


def _other_rows(folder: Path, shard_ids: Sequence[Sequence[str]], receipt: Receipt) -> ShardError:
    return ShardError(
        f"{str(folder)!r} was cut into other rows: its shard {receipt.index} of {receipt.n_shards} holds "
        f"{receipt.n_rows} rows, {receipt.first_id!r} to {receipt.last_id!r}, and this run makes {len(shard_ids)} "
        "shards: use that run's rows and shard size, write to another output directory, or delete that partition"
    )
