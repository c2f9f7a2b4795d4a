"""Files of a run, on local disk, in an NFS-like directory or in an S3 bucket: the same functions for all of them.

A path in a bucket, ``s3://BUCKET/PREFIX``, is a `upath.UPath`. It joins, names and compares like a pathlib path, so
annotations say `Path` for both; read and write it through these functions. `negcore.store.buckets` has the functions
that only buckets need, `negcore.store.locks` those that only local files need.
"""

import difflib
import errno
import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from negcore.errors import NegError, RunError
from negcore.store import buckets
from negcore.store.temporary import temporary_directory

_BUCKET = re.compile(r"s3://[^/*?\[\]]+(/[^*?\[\]]*)?")
LONGEST_NAME = 255
"""Bytes of the name of a file or directory, on all common file systems."""
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS})
MOST_RECORD_BYTES = 2**26
"""Bytes of a file that holds records of a run or settings of a model, and is read whole: none needs as many."""
_AT_ONCE = 16
"""Requests under way when many small objects are read."""


# Places


def location(place: str | Path) -> Path:
    """Return the path of a file or directory that is given as a path on disk or as ``s3://BUCKET/PREFIX``.

    Raises
    ------
    RunError
        If it is neither, or the packages that reach buckets are not installed.
    """
    if not isinstance(place, str):
        if place.parts[:1] == ("s3:",):  # pathlib took one of its slashes
            raise RunError(f"{str(place)!r} was a URL before it was made a pathlib path: give it as text")
        return place
    if "\0" in place:
        raise RunError(f"{place!r:.80} is no place for files: it holds a null character")
    if "://" not in place:
        path = Path(place)
        if too_long := [part for part in path.parts if len(os.fsencode(part)) > LONGEST_NAME]:
            raise RunError(
                f"{place!r:.80} is no place for files: a name of {len(os.fsencode(too_long[0]))} bytes is in it, "
                f"and at most {LONGEST_NAME} are possible"
            )
        return path
    if not _BUCKET.fullmatch(place):
        raise RunError(f"{place!r} is no place for files: give a directory, or s3://BUCKET/PREFIX without any of *?[]")
    if not all(map(importlib.util.find_spec, ("upath", "s3fs"))):
        raise RunError(f"{place!r} needs packages that are not installed; run: pip install 'neg-at-scale[s3]'")
    from upath import UPath

    # Others write there too: a listing that is kept would hide their files.
    bucket: Any = UPath(place.rstrip("/"), use_listings_cache=False, config_kwargs=buckets.PATIENCE)
    return bucket  # type: ignore[no-any-return]


def is_remote(path: Path) -> bool:
    """Tell whether the path is in a bucket."""
    return not isinstance(path, Path)


def cache_directory() -> Path:
    """Return the folder for copies on this machine: `$NEG_CACHE`, else `$XDG_CACHE_HOME/neg`, else `~/.cache/neg`.

    Raises
    ------
    NegError
        If neither variable is set and the user has no home directory.
    """
    if own := os.environ.get("NEG_CACHE"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "neg"
    try:
        return Path.home() / ".cache" / "neg"
    except RuntimeError:
        raise NegError("there is no home directory for the cache: set HOME, or NEG_CACHE to a folder for it") from None


def local_directory(path: Path) -> Path:
    """Return the directory itself, or a bucket's counterpart on this machine for whatever needs local files."""
    if not is_remote(path):
        return path
    return cache_directory() / "runs" / f"{shortened(path.name)}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def shortened(name: str, most_bytes: int = 120) -> str:
    """Return a name without what makes it too long for a part of a file's name."""
    return name.encode()[:most_bytes].decode(errors="ignore")


def near_path(path: Path) -> str:
    """Return a question that names an existing path which is spelt like one that is not there; empty if none is."""
    found = None if is_remote(path) else _near(path)
    return f"did you mean {str(found)!r}?" if found else ""


def _near(path: Path) -> Path | None:
    try:
        missing = [part for part in (path, *path.parents) if not os.path.lexists(part)]
        if not missing:
            return None
        names = [entry.name for entry in os.scandir(missing[-1].parent)]
    except (OSError, ValueError):  # no folder, or a name that none can have
        return None
    for name in difflib.get_close_matches(missing[-1].name, names):
        alike = missing[-1].parent / name / path.relative_to(missing[-1])
        if found := alike if os.path.lexists(alike) else _near(alike):
            return found
    return None


# Reading


def is_dir(path: Path) -> bool:
    """Tell whether the directory exists; in a bucket, whether anything lies below it."""
    return buckets.is_folder(path) if is_remote(path) else path.is_dir()


def find(folder: Path, pattern: str) -> list[Path]:
    """Return the files and directories below a folder that fit a glob pattern, sorted by path."""
    return sorted(buckets.match(folder, pattern) if is_remote(folder) else folder.glob(pattern))


class Listing(NamedTuple):
    """The folders and the names of the files directly in a folder."""

    folders: list[Path]
    files: list[str]


def listing(folder: Path) -> Listing:
    """List one folder, without what lies below its folders; links to folders are not followed."""
    if is_remote(folder):
        return Listing(*buckets.listing(folder))
    try:
        with os.scandir(folder) as entries:
            by_kind: tuple[list[Path], list[str]] = ([], [])
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    by_kind[0].append(folder / entry.name)
                else:
                    by_kind[1].append(entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return Listing([], [])
    return Listing(*map(sorted, by_kind))  # type: ignore[arg-type]


def holds(folder: Path, name_pattern: str) -> bool:
    """Tell whether the name of anything in a folder on a local disk fits a pattern; it stops at the first."""
    fits = re.compile(fnmatch.translate(name_pattern)).match
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return any(fits(entry.name) for entry in entries)
    return False


def sizes(folder: Path, pattern: str) -> dict[str, int]:
    """Return the bytes of the files below a folder that fit a glob pattern for the last part, by file name."""
    if is_remote(folder):
        return {path.name: description["size"] for path, description in buckets.match(folder, pattern).items()}
    wanted, known = folder / pattern, {}
    fits = re.compile(fnmatch.translate(wanted.name)).match
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(wanted.parent) as entries:
        for entry in entries:
            try:
                if fits(entry.name) and stat.S_ISREG((status := entry.stat()).st_mode):
                    known[entry.name] = status.st_size
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):  # removed meanwhile, or a link to nothing
                    raise
    return known


def n_bytes(path: Path) -> int | None:
    """Return the size of a file; None if there is none."""
    try:
        if not is_remote(path):
            return path.stat().st_size if path.is_file() else None
        return int(buckets.describe(path)["size"])
    except FileNotFoundError:
        return None


def written_s(path: Path) -> float:
    """Return when a file was last written, in seconds since the epoch."""
    return buckets.describe(path)["LastModified"].timestamp() if is_remote(path) else path.stat().st_mtime


def open_file(path: Path) -> BufferedReader:
    """Open a local file for reading, without waiting for one that never gives anything.

    Raises
    ------
    FileNotFoundError
        If there is none.
    RunError
        If it is no file: a directory, a pipe, a socket or a device.
    """
    return os.fdopen(_opened(path)[0], "rb")


def _opened(path: Path) -> tuple[int, int]:
    """Return the number of an open file, and its bytes."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        if path.is_socket():  # cannot be opened at all
            raise RunError(_no_file(path, path.stat().st_mode)) from None
        raise
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode):
        os.close(number)
        raise RunError(_no_file(path, status.st_mode))
    return number, status.st_size


def _no_file(path: Path, mode: int) -> str:
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return f"{str(path)!r} is a {kinds.get(stat.S_IFMT(mode), 'device')}; a file is needed"


def read_bytes(path: Path, most_bytes: int | None = None) -> bytes:
    """Return the content of a file.

    Parameters
    ----------
    most_bytes : int, optional
        Size that no such file has.

    Raises
    ------
    FileNotFoundError
        If there is none.
    RunError
        If it is no file, or larger than `most_bytes`.
    """
    if is_remote(path):
        return buckets.read(path)
    number, size = _opened(path)
    with os.fdopen(number, "rb", buffering=0) as stream:
        if most_bytes is not None and size > most_bytes:
            raise RunError(f"{str(path)!r} has {size} bytes, but such a file has at most {most_bytes}: it is another")
        return stream.read()


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises
    ------
    ValueError
        If it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_all(folder: Path, pattern: str) -> dict[Path, bytes]:
    """Return the content of the small files below a folder that fit a glob pattern, in order of path."""
    paths = find(folder, pattern)
    if is_remote(folder):
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            contents = list(pool.map(_read_if_there, paths))
    else:
        contents = list(map(_read_if_there, paths))
    return {path: content for path, content in zip(paths, contents, strict=True) if content is not None}


class SmallFile(NamedTuple):
    """One of many small files."""

    name: str
    content: bytes
    time_s: float
    """Time of its writing, in seconds since the epoch."""


def small_files(folder: Path, name_pattern: str) -> Iterator[SmallFile]:
    """Read the files in a folder whose names fit a pattern, one after the other and in any order.

    One is held at a time: there may be hundreds of thousands.
    """
    if is_remote(folder):
        found = buckets.match(folder, name_pattern)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for path, content in zip(found, pool.map(_read_if_there, found), strict=True):
                if content is not None:
                    yield SmallFile(path.name, content, found[path]["LastModified"].timestamp())
        return
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        with os.scandir(directory) as entries:
            names = fnmatch.filter([entry.name for entry in entries], name_pattern)
        for name in names:
            try:  # without waiting: a pipe may lie there under this name
                file = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory)
            except FileNotFoundError:  # it was removed meanwhile
                continue
            try:
                status = os.fstat(file)
                if stat.S_ISREG(status.st_mode):
                    yield SmallFile(name, os.read(file, min(status.st_size, MOST_RECORD_BYTES)), status.st_mtime)
            finally:
                os.close(file)
    finally:
        os.close(directory)


def _read_if_there(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return read_bytes(path, MOST_RECORD_BYTES)
    return None


# Writing


@contextmanager
def draft(target: Path) -> Iterator[Path]:
    """Give a local file to write; it replaces `target`, whole, when the block ends without an error.

    It is on the disk then, and so is its name: a machine that loses its power keeps the old file or has the new one.

    Raises
    ------
    RunError
        If `target` is a directory.
    """
    if is_remote(target):
        with temporary_directory() as folder:
            path = folder / target.name
            yield path
            buckets.upload(path, target)
        return
    make_folder(target.parent)
    if target.is_dir():
        raise RunError(f"{_no_file(target, stat.S_IFDIR)}: move it away and run the same command again")
    path = hidden(target)
    try:
        yield path
        sync(path)
        path.replace(target)
        sync(target.parent)
    finally:
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a local folder and those above it, so that their names survive a loss of power."""
    absent = []
    while not folder.exists():
        absent.append(folder)
        folder = folder.parent
    for one in reversed(absent):
        one.mkdir(exist_ok=True)
        sync(one.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; some file systems can do so for files alone."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(number)


@contextmanager
def output(target: Path) -> Iterator[Path]:
    """Give a `draft` of a result that the user asked for: a table, a figure, a page.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    try:
        with draft(target) as path:
            yield path
    except OSError as error:
        raise RunError(f"{str(target)!r} cannot be written: {error.strerror or error}") from error


def hidden(target: Path) -> Path:
    """Return a name beside `target` that no other writer takes and no reader looks at."""
    return target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def remove(path: Path) -> None:
    """Remove a file; it is no error if there is none."""
    if is_remote(path):
        buckets.remove(path)
    else:
        path.unlink(missing_ok=True)
