"""Where a run's files lie: on local disk, in an NFS-like directory, or in an S3 bucket.

A place is a path. One in a bucket, ``s3://BUCKET/PREFIX``, is a `upath.UPath`: it is joined, named and compared like a
pathlib path, so annotations say `Path` for both, but whatever reads or writes it goes through the functions here.
Credentials, endpoint and region come from where every AWS tool takes them: the environment and ``~/.aws``.

What local files need locks for, a bucket does with conditional puts: see `create` and `replace`.
"""

import errno
import fcntl
import hashlib
import importlib.util
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from filelock import SoftFileLease

from negcore.errors import RunError

_BUCKET = re.compile(r"s3://[^/*?\[\]]+(/[^*?\[\]]*)?")
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})
_AT_ONCE = 16
"""Requests under way when many small objects are read."""
_TRIES = 5


# Places


def location(place: str | Path) -> Path:
    """The path of a file or directory that is named by a path on disk or as ``s3://BUCKET/PREFIX``.

    Raises
    ------
    RunError
        If it is something else, or what reaches it is not installed.
    """
    if not isinstance(place, str):
        if place.parts[:1] == ("s3:",):  # pathlib took one of its slashes
            raise RunError(f"{str(place)!r} was a URL before it was made a pathlib path: give it as text")
        return place
    if "://" not in place:
        return Path(place)
    if not _BUCKET.fullmatch(place):
        raise RunError(f"{place!r} is no place for files: give a directory, or s3://BUCKET/PREFIX without any of *?[]")
    if not all(map(importlib.util.find_spec, ("upath", "s3fs"))):
        raise RunError(f"{place!r} needs packages that are not installed; run: pip install 'neg-at-scale[s3]'")
    from upath import UPath

    # Others write there too: a listing that is kept would hide their files.
    bucket: Any = UPath(place.rstrip("/"), use_listings_cache=False)
    return bucket  # type: ignore[no-any-return]


def is_remote(path: Path) -> bool:
    """Whether the path is in a bucket."""
    return not isinstance(path, Path)


def cache_directory() -> Path:
    """Where copies on this machine are kept: `$NEG_CACHE`, else `$XDG_CACHE_HOME/neg`, else `~/.cache/neg`."""
    if "NEG_CACHE" in os.environ:
        return Path(os.environ["NEG_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "neg"


def local_directory(path: Path) -> Path:
    """The directory itself; of one in a bucket, its counterpart on this machine, for what needs local files."""
    if not is_remote(path):
        return path
    return cache_directory() / "runs" / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


# Reading


def is_dir(path: Path) -> bool:
    """Whether the directory exists; in a bucket, whether anything lies below it."""
    if not is_remote(path):
        return path.is_dir()
    with _reaching(path):
        return bool(_fs(path).isdir(_key(path)))


def find(folder: Path, pattern: str) -> list[Path]:
    """Files and directories below a folder that fit a glob pattern, sorted by path."""
    if not is_remote(folder):
        return sorted(folder.glob(pattern))
    return [_below(folder, key) for key in sorted(_listed(folder, pattern))]


def sizes(folder: Path, pattern: str) -> dict[str, int]:
    """Bytes of the files below a folder that fit a glob pattern, by file name."""
    if is_remote(folder):
        return {_below(folder, key).name: about["size"] for key, about in _listed(folder, pattern).items()}
    known = ((path.name, n_bytes(path)) for path in folder.glob(pattern))
    return {name: size for name, size in known if size is not None}


def n_bytes(path: Path) -> int | None:
    """Size of a file; None if there is none."""
    try:
        if not is_remote(path):
            return path.stat().st_size if path.is_file() else None
        return int(_about(path)["size"])
    except FileNotFoundError:
        return None


def read_bytes(path: Path) -> bytes:
    """Content of a file.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    if not is_remote(path):
        return path.read_bytes()
    try:
        with _reaching(path):
            content: bytes = _fs(path).cat_file(_key(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    return content


def read_all(folder: Path, pattern: str) -> dict[Path, bytes]:
    """Content of the files below a folder that fit a glob pattern, in order of path: small ones."""
    paths = find(folder, pattern)
    if is_remote(folder):
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            contents = list(pool.map(_read_if_there, paths))
    else:
        contents = list(map(_read_if_there, paths))
    return {path: content for path, content in zip(paths, contents, strict=True) if content is not None}


def fetch(path: Path, target: Path) -> None:
    """Copy an object to a local file."""
    with _reaching(path):
        _fs(path).get_file(_key(path), str(target))


# Writing


@contextmanager
def draft(target: Path) -> Iterator[Path]:
    """A local file to write: it appears at `target` when the block ends well, whole, in place of what was there."""
    if is_remote(target):
        with tempfile.TemporaryDirectory(prefix="neg-") as folder:
            path = Path(folder, target.name)
            yield path
            upload(path, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    path = hidden(target)
    try:
        yield path
        path.replace(target)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def output(target: Path) -> Iterator[Path]:
    """A `draft` of what a run is asked for: tables, figures, pages.

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
    """A name beside `target` that no other writer takes and no reader looks at."""
    return target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def upload(path: Path, target: Path) -> None:
    """Put a local file into a bucket, whole or not at all."""
    with _reaching(target):
        _fs(target).put_file(str(path), _key(target))


def objects(folder: Path, prefix: str) -> list[Path]:
    """The objects of a bucket whose path begins with folder and prefix."""
    with _reaching(folder):
        return [_below(folder, key) for key in _fs(folder).find(_key(folder), prefix=prefix)]


def remove(path: Path) -> None:
    """Remove an object; no error if there is none."""
    with _reaching(path), suppress(FileNotFoundError):
        _fs(path).rm_file(_key(path))


# Conditional publishing in a bucket: of those who write one object, the server lets one win


class Standing(NamedTuple):
    """An object as it was read."""

    content: bytes
    tag: str
    """What the server calls this state of the object (its ETag)."""


def create(path: Path, content: bytes) -> Standing | None:
    """Put an object if there is none (``If-None-Match: *``); what is there if there is one."""
    return _put_if(path, content, {"IfNoneMatch": "*"})


def replace(path: Path, content: bytes, standing: Standing) -> Standing | None:
    """Put an object in place of one that is still as it was read (``If-Match``); what is there if it is not."""
    return _put_if(path, content, {"IfMatch": standing.tag})


def _put_if(path: Path, content: bytes, condition: dict[str, str]) -> Standing | None:
    refusal: OSError | None = None
    for _ in range(_TRIES):
        try:
            with _reaching(path):
                _fs(path).pipe_file(_key(path), content, **condition)
            return None
        except OSError as error:
            if not _is_refused(error):
                raise
            refusal = error
        standing = _standing(path)
        if standing is not None:
            return standing
        condition = {"IfNoneMatch": "*"}  # it was removed meanwhile
    assert refusal is not None
    raise refusal


def _is_refused(error: OSError) -> bool:
    """Precondition failed, or another conditional put was under way, or what was to be replaced is gone."""
    response = getattr(error.__cause__, "response", {})
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in (409, 412) or isinstance(error, (FileExistsError, FileNotFoundError))


def _standing(path: Path) -> Standing | None:
    try:
        tag = _about(path)["ETag"]  # first: with an older tag than content, a replacement is refused
        return Standing(read_bytes(path), tag)
    except FileNotFoundError:
        return None


# Locks of local files


def hold(handle: IO[bytes], *, wait: bool = True) -> bool:
    """Lock an open file until it is closed or this process dies; whether its file system has locks.

    Raises
    ------
    BlockingIOError
        If somebody else holds it and `wait` is false.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock for a moment. The kernel lets go when the holder dies.

    Where the file system has no locks, a file that is created exclusively stands for one: a dead holder's counts for
    nothing as soon as its machine shows no such process, or after 30 s without a sign of life from another machine.
    """
    with file.open("ab") as handle:
        if hold(handle):
            yield
            return
    with SoftFileLease(f"{file}.held"):
        yield


# Buckets: all that knows how they are reached


def _fs(path: Path) -> Any:
    remote: Any = path
    return remote.fs


def _key(path: Path) -> str:
    remote: Any = path
    return str(remote.path).rstrip("/")


def _about(path: Path) -> dict[str, Any]:
    with _reaching(path):
        about: dict[str, Any] = _fs(path).info(_key(path))
    return about


def _listed(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    with _reaching(folder):
        listed: dict[str, dict[str, Any]] = _fs(folder).glob(f"{_key(folder)}/{pattern}", detail=True)
    return listed


def _below(folder: Path, key: str) -> Path:
    return folder.joinpath(*key.removeprefix(f"{_key(folder)}/").split("/"))


def _read_if_there(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return read_bytes(path)
    return None


@contextmanager
def _reaching(path: Path) -> Iterator[None]:
    """Say in one line why a bucket cannot be reached; errors about single files pass."""
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except (BotoCoreError, PermissionError) as error:
        raise RunError(
            f"{str(path)!r} cannot be reached ({' '.join(str(error).split())}): check the AWS credentials, region and "
            "endpoint (AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL)"
        ) from error
