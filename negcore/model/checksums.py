"""Checksums of the files of models, each file read whole.

A process reads a file once. The checksum of a large file is also kept in the cache, in the folder `checksums`, under
the file's path, size, inode, and times of writing and change: every process that comes later would need minutes.
Bits that rot on a disk change none of these, so that only deleting that folder has them looked for in such files.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from xxhash import xxh3_128, xxh3_128_hexdigest

from negcore.errors import NegError
from negcore.store.files import cache_directory, draft, open_file

logger = logging.getLogger(__name__)

Method = Literal["xxh3", "sha256", "git"]
"""xxh3-128 of size and content, SHA-256 of the content, or the SHA-1 by which git names a file."""

_BLOCK_BYTES = 2**20
_KEPT_BYTES: dict[Method, int] = {"xxh3": 2**30, "sha256": 2**26, "git": 2**26}
"""Size above which a checksum outlives the process: about a second's reading."""
_TOLD_BYTES = 10 * 2**30
"""Bytes to read from which on it is told."""
_SETTLED_NS = 2_000_000_000
"""Age, in nanoseconds, from which on the time of change tells: file systems count it in steps of up to 2 s."""
_AT_ONCE = 4
_START: dict[Method, Callable[[int], Any]] = {
    "xxh3": lambda size: xxh3_128(str(size).encode()),
    "sha256": lambda size: hashlib.sha256(),
    "git": lambda size: hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False),
}

_known: dict[str, str] = {}
"""Checksums by what identifies a file."""


def checksums(files: Sequence[tuple[Path, Method]]) -> list[str]:
    """Return the checksums of files, in hex; several are read at the same time.

    Raises
    ------
    OSError, RunError
        If one cannot be read.
    """
    unread = [file.stat().st_size for file, method in files if _remembered(_key(file, method, file.stat())) is None]
    if sum(unread) >= _TOLD_BYTES:
        logger.warning("reading %.0f GB of weights for their checksums, once", sum(unread) / 1e9)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda one: checksum(*one), files))


def checksum(file: Path, method: Method = "xxh3") -> str:
    """Return the checksum of a file, in hex."""
    with open_file(file) as stream:
        before = os.fstat(stream.fileno())
        key = _key(file, method, before)
        if (known := _remembered(key)) is not None:
            return known
        is_settled = not 0 <= time.time_ns() - max(before.st_ctime_ns, before.st_mtime_ns) < _SETTLED_NS
        digest = _START[method](before.st_size)
        block = memoryview(bytearray(_BLOCK_BYTES))
        while n_bytes := stream.readinto(block):
            digest.update(block[:n_bytes])
        found = str(digest.hexdigest())
        if is_settled and _key(file, method, os.fstat(stream.fileno())) == key:
            _remember(key, found, is_kept=before.st_size > _KEPT_BYTES[method])
    return found


def _key(file: Path, method: Method, status: os.stat_result) -> str:
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return xxh3_128_hexdigest(repr((method, str(file.absolute()), stamp)).encode("utf-8", "surrogatepass"))


def _remembered(key: str) -> str | None:
    if key not in _known:
        with suppress(OSError, NegError, ValueError):  # a note that cannot be read, or is damaged, is none
            found, seal = (cache_directory() / "checksums" / key).read_text(encoding="ascii").split()
            if seal == _seal(key, found):
                _known[key] = found
    return _known.get(key)


def _remember(key: str, found: str, *, is_kept: bool) -> None:
    _known[key] = found
    if is_kept:
        with suppress(OSError, NegError), draft(cache_directory() / "checksums" / key) as path:
            path.touch(mode=0o600)  # others are not told which files there are
            path.write_text(f"{found} {_seal(key, found)}\n", encoding="ascii")


def _seal(key: str, found: str) -> str:
    return xxh3_128_hexdigest(f"{key} {found}".encode())
