"""Checks that a shard goes through before its numbers are used: by resuming runs, by readers and by `neg verify` alike.

They come in this order. The length of the file and its checksum are those of the receipt, whose own seal was compared
when it was read. Only then is the file parsed, and what it says of itself (place, index, run, versions, columns,
neurons, row ids) is compared with its directory and its receipt.

A file is checked once in a process. That is remembered by its path, size, inode and time of change, and nowhere else:
bits that rot on a disk change none of these, so every process reads the files that it uses once.
"""

import errno
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import pyarrow as pa
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from negcore.errors import ShardError, one_line
from negcore.store.buckets import describe, fetch
from negcore.store.files import cache_directory, draft, is_remote, n_bytes, parse_json, read_bytes
from negcore.store.identity import RunIdentity, choice_digest, content_digest, prompt_hash
from negcore.store.levels import has_columns_of
from negcore.store.locks import locked
from negcore.store.publish import Receipt, ShardPlace, checksum, index_of, read_receipts, shard_of
from negcore.store.schema import ROW_COLUMNS, StoredExample, first_row
from negcore.texts import row_text

_AT_ONCE = 4
"""Files that are read at the same time."""
_TOGETHER = 16
"""Files that a thread reads one after the other: to hand one over costs as much as to check a small one."""
_WAITS = 4
"""Work that takes so many times as long as its processor's time waits for files."""
_SETTLED_NS = 2_000_000_000
"""Age, in nanoseconds, from which on the time of change tells: file systems count it in steps of up to 2 s."""
_SMALL_BYTES = 2**20
"""A shard of so few bytes is read as a whole: to map it costs more."""
_OTHER_CHECKSUM = "its checksum is not the one in its receipt"

T = TypeVar("T")
R = TypeVar("R")

_KnownRow = tuple[str, str, str, int]
"""Id, hash of the prompt, group and answer of a row."""

_sound: set[bytes] = set()
"""Digests of what this process found sound: a file, its stamp, its receipt, and a check that it passed."""


# Resuming


class Finished(NamedTuple):
    """The shards of a run that are there, by index."""

    receipts: dict[int, Receipt]
    """Receipts of those that need not be measured again."""
    damaged: dict[int, str]
    """Faults of those that have to be, though they were finished once."""


def finished_shards(
    root: str | Path,
    place: ShardPlace,
    identity: RunIdentity,
    shards: Sequence[Sequence[StoredExample]],
    *,
    checked: Callable[[int], None] = lambda n_bytes: None,
) -> Finished:
    """Return the shards of this very run that need not be measured again, and those that are damaged.

    Rows that were set aside count as done.

    Parameters
    ----------
    shards : sequence of sequences of examples
        The rows of every shard this run would write, in order: those of other rows are refused, and one that says
        something else of a row than the run does is damaged.
    checked : callable
        Called with the bytes of every shard that was checked; what it raises ends the checks.

    Raises
    ------
    ShardError
        If the directory holds shards of another run, or of the same run cut into other rows.
    """
    folder = place.path(root)
    found, digest = read_receipts(folder), identity.digest
    for receipt in found.whole:
        if receipt.digest != digest:
            raise _other_run(folder, identity, receipt)
        if not _is_same_cut(receipt, shards) and not _is_misplaced(folder, receipt, len(shards)):
            raise _other_rows(folder, len(shards), receipt)
    faults = {index_of(path.name): "its receipt is damaged" for path in found.damaged}
    rows = (shards[receipt.index] for receipt in found.whole)
    for receipt, fault in shard_faults(folder, found.whole, rows=rows, checked=checked):
        if fault is not None:
            faults[receipt.index] = fault
    known = {receipt.index: receipt for receipt in found.whole if receipt.index not in faults}
    return Finished(known, {index: fault for index, fault in sorted(faults.items()) if 0 <= index < len(shards)})


def _is_same_cut(receipt: Receipt, shards: Sequence[Sequence[StoredExample]]) -> bool:
    planned = [row.id for row in shards[receipt.index]] if receipt.index < len(shards) else []
    set_aside = {row.id for row in receipt.set_aside}
    stored = [id_ for id_ in planned if id_ not in set_aside]
    is_same_cut = receipt.n_shards == len(shards) and len(stored) + len(set_aside) == len(planned)
    return is_same_cut and receipt.ids_xxh3 == content_digest(stored)


def _is_misplaced(folder: Path, receipt: Receipt, n_shards: int) -> bool:
    """Tell whether a shard of other rows was brought here from another split or place of the same run."""
    return receipt.n_shards == n_shards and receipt.index < n_shards and shard_fault(folder, receipt) is not None


# Checks of whole directories


def complete_receipts(folder: Path) -> list[Receipt]:
    """Return the receipts of every shard of a directory, in order.

    Raises
    ------
    ShardError
        If one is missing or damaged, or those of several runs are there.
    """
    known, damaged = read_receipts(folder)
    if len({(receipt.digest, receipt.n_shards) for receipt in known}) > 1:
        raise ShardError(f"{str(folder)!r} holds shards of several runs: delete it and run one of them again")
    if damaged:
        raise damaged_file(damaged[0], "its seal does not fit its content")
    if not known or len(known) < known[0].n_shards:
        progress = f"{len(known)} of {known[0].n_shards} shards" if known else "no finished shards"
        raise ShardError(f"{str(folder)!r} is incomplete, {progress}: run the same command again")
    return known


def check_shards(folder: Path, known: Sequence[Receipt]) -> None:
    """Check the shards of some receipts before they are read.

    Raises
    ------
    ShardError
        If one is missing or damaged.
    """
    for receipt, fault in shard_faults(folder, known, file_of=local_shard):
        if fault is not None:
            raise damaged_file(shard_of(folder, receipt), fault)


def shard_faults(
    folder: Path,
    known: Sequence[Receipt],
    *,
    file_of: Callable[[Path, Receipt], Path] = shard_of,
    rows: Iterable[Sequence[StoredExample]] | None = None,
    checked: Callable[[int], None] = lambda n_bytes: None,
) -> Iterator[tuple[Receipt, str | None]]:
    """Check the shards of some receipts, several at a time; yield each with what is wrong with it, or None.

    Parameters
    ----------
    file_of : callable
        Returns the file to check of a receipt's shard: itself, or `local_shard`.
    rows : iterable of sequences of examples, optional
        What each of the shards should say of its rows.
    checked : callable
        Called with the bytes of every shard that was checked; what it raises ends the checks.
    """

    directory = _Directory(folder)

    def faults_of(some: Sequence[tuple[Receipt, Sequence[StoredExample] | None]]) -> list[tuple[Receipt, str | None]]:
        return [(receipt, directory.fault(receipt, file_of(folder, receipt), rows=rows)) for receipt, rows in some]

    todo = zip(known, rows if rows is not None else repeat(None), strict=False)
    together = iter(lambda: list(islice(todo, _TOGETHER)), [])
    are_large = any(receipt.n_bytes > _SMALL_BYTES for receipt in known)
    for found in _mapped(faults_of, together, waits=are_large or is_remote(folder)):
        for receipt, fault in found:
            checked(receipt.n_bytes)
            yield receipt, fault


def _mapped(work: Callable[[T], R], given: Iterator[T], *, waits: bool) -> Iterator[R]:
    """Do some work on files in order: in this thread, and from when it waits for them on in several.

    Where files are small and in memory, threads would only wait for each other.
    """
    spent_s = computed_s = 0.0
    while not waits:
        began, began_cpu = time.perf_counter(), time.thread_time()
        try:
            result = work(next(given))
        except StopIteration:
            return
        spent_s += time.perf_counter() - began
        computed_s += time.thread_time() - began_cpu
        waits = spent_s > _WAITS * computed_s
        yield result
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="checks")
    under_way: deque[Future[R]] = deque()
    try:
        while True:
            under_way += [pool.submit(work, one) for one in islice(given, 2 * _AT_ONCE - len(under_way))]
            if not under_way:
                return
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# Checks of one shard


def shard_fault(
    folder: Path,
    receipt: Receipt,
    file: Path | None = None,
    *,
    verify: bool = True,
    rows: Sequence[StoredExample] | None = None,
) -> str | None:
    """Return what is wrong with a shard, in one line, or None.

    Parameters
    ----------
    file : Path, optional
        A copy of the shard to check in place of the shard itself.
    verify : bool
        False to leave out the checksum.
    rows : sequence of examples, optional
        What the shard should say of its rows, and of rows that were set aside.
    """
    return _Directory(folder).fault(receipt, file or shard_of(folder, receipt), verify=verify, rows=rows)


class _Layout(NamedTuple):
    """Columns of a file, and what is known of them."""

    schema: pa.Schema
    identity: Mapping[str, Any]
    lists: list[tuple[int, int]]
    """Place and length of each column whose rows are lists of one length."""
    others: list[int]
    is_right: bool
    """True if the run of that identity has such columns."""


class _Directory:
    """A directory of shards: what they have in common is compared once for all of them."""

    def __init__(self, folder: Path) -> None:
        self._names = tuple(unquote(part.partition("=")[2]) for part in folder.parts[-3:])
        self._is_of_negs = ShardPlace.is_path(folder)
        self._digest: tuple[Mapping[str, Any], str] = ({}, "")
        self._layout = _Layout(pa.schema([]), {}, [], [], False)

    def fault(
        self, receipt: Receipt, file: Path, *, verify: bool = True, rows: Sequence[StoredExample] | None = None
    ) -> str | None:
        """Return what is wrong with the shard in a file, as `shard_fault` does."""
        stamp = stamp_of(file)
        if stamp is None:
            return "missing, though its receipt is there"
        if stamp.n_bytes != receipt.n_bytes:
            return f"{stamp.n_bytes} bytes long, {receipt.n_bytes} in its receipt"
        known_rows = None if rows is None else [(row.id, prompt_hash(row), row.group, row.answer) for row in rows]
        passed = _memories(file, stamp, receipt, verify, known_rows)
        if passed <= _sound:
            return None
        is_settled = stamp.is_settled
        fault = self._fault(receipt, file, verify, known_rows)
        if fault is None and is_settled and stamp_of(file) == stamp:
            _sound.update(passed)
        return fault

    def _fault(self, receipt: Receipt, file: Path, verify: bool, rows: Sequence[_KnownRow] | None) -> str | None:
        if self._digest_of(receipt.identity) != receipt.digest:
            return "the digest in its receipt is not that of the settings in it"
        try:
            source = _source(file, receipt.n_bytes)
            # What is mapped is read once more for that: a sector that is lost is an error there, and a crash here.
            is_mapped = isinstance(source, pa.MemoryMappedFile)
            if verify and (checksum(file) if is_mapped else xxh3_128_hexdigest(source)) != receipt.file_xxh3:
                return _OTHER_CHECKSUM
            batch = _batch_of(source)
            return self._content_fault(receipt, batch) or (None if rows is None else _row_fault(batch, rows))
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            number = getattr(error, "errno", None)  # Arrow's errors have none
            is_lost_sector = number == errno.EIO and not is_remote(file)
            if number is not None and not is_lost_sector:  # all may be well soon
                raise ShardError(f"{str(file)!r} cannot be read ({one_line(error)})") from error
            return f"it cannot be read: {one_line(error):.200}"

    def _digest_of(self, identity: Mapping[str, Any]) -> str:
        """Return the digest of an identity, which most receipts have in common."""
        known, digest = self._digest
        if known is not identity:
            digest = content_digest(dict(identity))
            self._digest = identity, digest
        return digest

    def _content_fault(self, receipt: Receipt, batch: pa.RecordBatch) -> str | None:
        layout = self._layout_of(receipt.identity, batch.schema)
        _check_values(batch, layout.others)
        about = metadata_of(batch.schema)
        if (names := _place(about)) != self._names:
            return f"it belongs to {', '.join(names) or 'an unknown place'}"
        which = (receipt.index, receipt.n_shards, receipt.digest, receipt.versions)
        if tuple(map(about.get, ("index", "n_shards", "digest", "versions"))) != which:
            return "its metadata are not those of its receipt"
        # Arrow allows for more numbers than there are rows.
        if not layout.is_right or any(len(batch.column(at).values) != batch.num_rows * n for at, n in layout.lists):
            return "its columns are not those of its model and dataset"
        if not _has_its_neurons(receipt, batch):
            return "its neurons are not those of its receipt"
        ids = batch.column("id").to_pylist()
        if len(ids) != receipt.n_rows or content_digest(ids) != receipt.ids_xxh3:
            return f"its {len(ids)} row ids are not the {receipt.n_rows} of its receipt"
        return None

    def _layout_of(self, identity: Mapping[str, Any], schema: pa.Schema) -> _Layout:
        known = self._layout
        if known.identity is not identity or not known.schema.equals(schema):
            known = self._layout = self._new_layout(identity, schema.remove_metadata())
        return known

    def _new_layout(self, identity: Mapping[str, Any], schema: pa.Schema) -> _Layout:
        lists, others = _split_by_kind(schema)
        if self._is_of_negs:
            is_right = has_columns_of(identity, schema)
        else:  # a study's other columns depend on what it measures
            is_right = tuple(schema.names[: len(ROW_COLUMNS)]) == ROW_COLUMNS
        return _Layout(schema, identity, lists, others, is_right)


def _split_by_kind(schema: pa.Schema) -> tuple[list[tuple[int, int]], list[int]]:
    """Return places and lengths of the columns of lists of one length, and the places of the others."""
    widths = [type_.list_size if pa.types.is_fixed_size_list(type_) else None for type_ in schema.types]
    lists = [(at, int(width)) for at, width in enumerate(widths) if width is not None]
    return lists, [at for at, width in enumerate(widths) if width is None]


def metadata_of(schema: pa.Schema) -> dict[str, Any]:
    """Return what a shard says of itself; nothing if it cannot be read."""
    try:
        about = parse_json((schema.metadata or {})[b"neg"])
    except (KeyError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _place(about: Mapping[str, Any]) -> tuple[str, ...]:
    """Return model, dataset, and split or other part; studies of earlier versions call it `place` and name its kind."""
    place = about.get("partition") or about.get("place")
    known = place if isinstance(place, dict) else {}
    part = [name for key, name in known.items() if key not in ("kind", "model", "dataset")]
    names = (known.get("model"), known.get("dataset"), *part)
    return tuple(str(name) for name in names if name is not None)


def _has_its_neurons(receipt: Receipt, batch: pa.RecordBatch) -> bool:
    """Tell whether a shard with chosen neurons holds those of its receipt; a shard without rows names none."""
    if "neurons" not in receipt.identity or not batch.num_rows:
        return True
    return bool(choice_digest(first_row(batch, "neurons").tolist()) == receipt.identity["neurons"])


def _row_fault(batch: pa.RecordBatch, rows: Sequence[_KnownRow]) -> str | None:
    """Return in which row a shard says something else than the examples that it was made from, or None."""
    names = [*ROW_COLUMNS, *(name for name in ("gold",) if name in batch.schema.names)]
    by_id = {row[0]: row for row in rows}
    for stored in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
        known = by_id.get(stored[0])
        if known is None or known[: len(stored)] != stored:
            pairs = zip(names, known or repeat(None), stored, strict=False)
            differing = next(name for name, here, there in pairs if here != there)
            return f"{differing} of its row {row_text(stored[0])} is not that of the dataset"
    return None


# Files


def forget_checks() -> None:
    """Forget which files were found sound, so that each is read again, as by another process."""
    _sound.clear()


class Stamp(NamedTuple):
    """All that is known of a file without reading it."""

    n_bytes: int
    version: tuple[Any, ...]
    """Device, inode and time of change; in a bucket the server's tag."""
    changed_ns: int | None
    """Time of the last change, in nanoseconds since the epoch; None in a bucket."""

    @property
    def is_settled(self) -> bool:
        """True if any change from now on changes the stamp."""
        return self.changed_ns is None or not 0 <= time.time_ns() - self.changed_ns < _SETTLED_NS


def stamp_of(file: Path) -> Stamp | None:
    """Return the stamp of a file; None if there is none."""
    try:
        if is_remote(file):
            description = describe(file)
            return Stamp(int(description["size"]), (description.get("ETag"),), None)
        status = file.stat()
    except FileNotFoundError:
        return None
    version = (status.st_dev, status.st_ino, status.st_mtime_ns)
    return Stamp(status.st_size, version, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _memories(file: Path, stamp: Stamp, receipt: Receipt, verify: bool, rows: Sequence[_KnownRow] | None) -> set[bytes]:
    """Return what is remembered of a file that passed some checks: a digest for each."""
    known = (receipt.index, receipt.n_shards, receipt.n_rows, receipt.file_xxh3, receipt.digest, receipt.ids_xxh3)
    of_file = repr((str(file), stamp.n_bytes, stamp.version, known)).encode("utf-8", "replace")
    checks = [b"content", *[b"checksum"] * verify, *([] if rows is None else [repr(rows).encode("utf-8", "replace")])]
    return {xxh3_128_digest(of_file + check) for check in checks}


def _source(file: Path, n_bytes: int | None = None) -> Any:
    """Return a file's bytes: mapped, or read as a whole if it is small or in a bucket."""
    is_read = is_remote(file) or (n_bytes is not None and n_bytes <= _SMALL_BYTES)
    return pa.py_buffer(read_bytes(file)) if is_read else pa.memory_map(str(file))


def _batch_of(source: Any) -> pa.RecordBatch:
    return pa.ipc.open_file(source).get_batch(0)


def _check_values(batch: pa.RecordBatch, others: Iterable[int]) -> None:
    """Check the columns of a batch, and every value of those that are not lists of one length."""
    batch.validate()
    for at in others:  # text that is no text, lists that end before they begin
        batch.column(at).validate(full=True)


def mapped_batch(path: Path) -> pa.RecordBatch:
    """Return the one batch of a shard's file, memory-mapped; a file in a bucket is read as a whole.

    Raises
    ------
    ShardError
        If the file is not a shard.
    """
    try:
        batch = _batch_of(_source(path))
        _check_values(batch, _split_by_kind(batch.schema)[1])
        return batch
    except (OSError, pa.ArrowException) as error:
        raise damaged_file(path, str(error).splitlines()[0]) from error


def sound_batch(folder: Path, receipt: Receipt, *, verify: bool) -> pa.RecordBatch:
    """Return the one batch of a receipt's shard, mapped, once it is checked.

    Raises
    ------
    ShardError
        If the shard is missing or damaged.
    """
    file = local_shard(folder, receipt)
    fault = shard_fault(folder, receipt, file, verify=verify)
    if fault is not None:
        raise damaged_file(shard_of(folder, receipt), fault)
    return mapped_batch(file)


def local_shard(folder: Path, receipt: Receipt) -> Path:
    """Return the file of a receipt's shard on this machine: itself, or a copy if it is in a bucket.

    Copies are made when they are first needed, in `cache_directory()`'s ``shards``, and named after their content;
    that folder can be deleted at any time. A copy is checked like a shard, and made again if it is damaged.

    Raises
    ------
    ShardError
        If what came out of the bucket has another checksum than its receipt; nothing has parsed it then.
    """
    shard = shard_of(folder, receipt)
    if not is_remote(shard):
        return shard
    copy = cache_directory() / "shards" / f"{receipt.file_xxh3}.arrow"
    if n_bytes(copy) is None or shard_fault(folder, receipt, copy) is not None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with locked(copy.with_suffix(".lock")):  # several processes of this machine may need it at once
            if n_bytes(copy) is None or checksum(copy) != receipt.file_xxh3:
                _copy_shard(shard, receipt, copy)
    return copy


def _copy_shard(shard: Path, receipt: Receipt, copy: Path) -> None:
    with draft(copy) as path:
        try:
            fetch(shard, path)
        except FileNotFoundError:
            raise damaged_file(shard, "missing, though its receipt is there") from None
        if checksum(path) != receipt.file_xxh3:
            raise damaged_file(shard, _OTHER_CHECKSUM)


# Messages


def damaged_file(path: Path, reason: str) -> ShardError:
    """Return the error of a damaged shard or receipt."""
    return ShardError(f"{str(path)!r} is damaged ({reason}): run the same command again, which computes it anew")


def _other_run(folder: Path, identity: RunIdentity, receipt: Receipt) -> ShardError:
    return ShardError(
        f"{str(folder)!r} holds shards of another run (this run here, that one there: "
        f"{identity.difference(receipt.identity)}): write to another output directory, or delete that partition"
    )


def _other_rows(folder: Path, n_shards: int, receipt: Receipt) -> ShardError:
    return ShardError(
        f"{str(folder)!r} was cut into other rows: its shard {receipt.index} of {receipt.n_shards} holds "
        f"{receipt.n_rows} rows, {row_text(receipt.first_id)} to {row_text(receipt.last_id)}, and this run makes "
        f"{n_shards} shards: use that run's rows and shard size, write to another output directory, or delete that "
        "partition"
    )
