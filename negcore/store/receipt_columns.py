"""The receipts of one directory in columns: a run may have hundreds of thousands, too many for an object each."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_hexdigest

from negcore.store.files import SmallFile, sizes, small_files
from negcore.store.publish import SetAside, parsed_receipt, shard_of

__all__ = ["ReceiptColumns", "read_columns"]

_COLUMNS = [("index", "i8"), ("n_rows", "i8"), ("n_bytes", "i8"), ("time_s", "f8"), ("run", "i8"), ("is_listed", "?")]
_PLAIN = re.compile(
    rb'\{"digest":"([0-9a-f]{32})","file":null,"file_xxh3":%(xxh3)s,"first_id":%(text)s,"identity":\{.*\},'
    rb'"ids_xxh3":%(xxh3)s,"index":(\d+),"last_id":%(text)s,"n_bytes":(\d+),"n_nonfinite":\d+,"n_rows":(\d+),'
    rb'"n_shards":(\d+),("seal":%(xxh3)s,)"set_aside":\[\],"versions":\{.*\}\}\n?'
    % {b"xxh3": rb'"[0-9a-f]{32}"', b"text": rb'"(?:[^"\\]|\\.)*"'}
)
"""A receipt, in the spelling that is sealed, of a shard on disk of which no row was set aside: most are like that."""


class ReceiptColumns(NamedTuple):
    """The undamaged receipts of a directory of shards, of whichever run."""

    rows: npt.NDArray[np.void]
    """(S,) A record a receipt, in order of ``index``: ``n_rows``, ``n_bytes``, ``time_s`` (when it was written, in
    seconds since the epoch), ``run`` (a place in `runs`), and ``is_listed`` (its shard is there and has its length)."""
    runs: tuple[tuple[str, int], ...]
    """Digest, as in `Receipt.planned_digest`, and number of shards of every run that has receipts here."""
    set_aside: dict[int, tuple[SetAside, ...]]
    """Rows that are not in their shards, by index of the shard."""


class _Said(NamedTuple):
    """The part of a receipt that is kept."""

    shard: int
    n_rows: int
    n_bytes: int
    run: tuple[str, int]
    file: str
    set_aside: tuple[SetAside, ...] = ()


def read_columns(folder: Path) -> ReceiptColumns:
    """Read the receipts of a directory of shards, without an object for each."""
    n_bytes = sizes(folder, "part-*.arrow")
    runs: dict[tuple[str, int], int] = {}
    set_aside: dict[int, tuple[SetAside, ...]] = {}
    rows: list[tuple[int, int, int, float, int, bool]] = []
    for file in small_files(folder / "_receipts", "part-*.json"):
        said = _plainly_said(file) or _said(folder, file)
        if said is not None:
            is_listed = n_bytes.get(said.file) == said.n_bytes
            run = runs.setdefault(said.run, len(runs))
            rows.append((said.shard, said.n_rows, said.n_bytes, file.time_s, run, is_listed))
            if said.set_aside:
                set_aside[said.shard] = said.set_aside
    return ReceiptColumns(np.sort(np.array(rows, _COLUMNS), order="index"), tuple(runs), set_aside)


def _plainly_said(file: SmallFile) -> _Said | None:
    """Return what a plain receipt says, without parsing it; None if it is another or its seal does not fit."""
    found = _PLAIN.fullmatch(file.content)
    if found is None or b'"neurons"' in file.content:  # a plan knows those by another digest
        return None
    digest, index, n_bytes, n_rows, n_shards, seal = found.groups()
    begin, end = found.span(6)
    sealed = file.content[:begin] + file.content[end:].removesuffix(b"\n")
    if xxh3_128_hexdigest(sealed) != seal[8:40].decode() or file.name != f"part-{int(index):05d}.json":
        return None
    run = digest.decode(), int(n_shards)
    return _Said(int(index), int(n_rows), int(n_bytes), run, f"{file.name.removesuffix('.json')}.arrow")


def _said(folder: Path, file: SmallFile) -> _Said | None:
    """Return what any receipt says; None if it is damaged."""
    receipt = parsed_receipt(file.name, file.content)
    if receipt is None:
        return None
    run = (receipt.planned_digest, receipt.n_shards)
    file_name = shard_of(folder, receipt).name
    return _Said(receipt.index, receipt.n_rows, receipt.n_bytes, run, file_name, receipt.set_aside)
