"""Objects in S3 buckets: read, listed, written, and written on a condition.

A bucket has no locks but conditional puts: of several writers of one object, the server lets exactly one win.
Credentials, endpoint and region come from where every AWS tool takes them: the environment and ``~/.aws``.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

from negcore.errors import RunError, one_line

PATIENCE: dict[str, Any] = {"connect_timeout": 10, "retries": {"mode": "standard", "max_attempts": 3}}
"""Settings of the client, which is asked up to five times itself."""
_ANSWER_S = 20
_TRIES = 5
_REMEDY = "check the AWS credentials, region and endpoint (AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL)"


def is_folder(path: Path) -> bool:
    """Tell whether any object lies below this path."""
    with _reaching(path):
        return bool(_fs(path).isdir(_key(path)))


def describe(path: Path) -> dict[str, Any]:
    """Return what the server says about an object: its `size` in bytes, its `ETag` and more.

    Raises
    ------
    FileNotFoundError
        If there is no such object.
    """
    with _reaching(path):
        description: dict[str, Any] = _fs(path).info(_key(path))
    return description


def match(folder: Path, pattern: str) -> dict[Path, dict[str, Any]]:
    """Return the objects and folders below a folder that fit a glob pattern, with their descriptions."""
    with _reaching(folder):
        found: dict[str, dict[str, Any]] = _fs(folder).glob(f"{_key(folder)}/{pattern}", detail=True)
    return {_below(folder, key): description for key, description in found.items()}


def listing(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the folders and the names of the objects directly in a folder, sorted."""
    try:
        with _reaching(folder):
            found = _fs(folder).ls(_key(folder), detail=True)
    except FileNotFoundError:
        return [], []
    below = sorted((_below(folder, one["name"]), one["type"]) for one in found)
    return [path for path, kind in below if kind == "directory"], [path.name for path, kind in below if kind == "file"]


def objects(folder: Path, prefix: str) -> list[Path]:
    """Return the objects whose path begins with folder and prefix."""
    with _reaching(folder):
        return [_below(folder, key) for key in _fs(folder).find(_key(folder), prefix=prefix)]


def read(path: Path) -> bytes:
    """Return the content of an object.

    Raises
    ------
    FileNotFoundError
        If there is no such object.
    """
    try:
        with _reaching(path):
            content: bytes = _fs(path).cat_file(_key(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    return content


def fetch(path: Path, target: Path) -> None:
    """Copy an object to a local file."""
    with _reaching(path):
        _fs(path).get_file(_key(path), str(target))


def upload(path: Path, target: Path) -> None:
    """Put a local file into a bucket, whole or not at all."""
    with _reaching(target):
        _fs(target).put_file(str(path), _key(target))


def remove(path: Path) -> None:
    """Remove an object; it is no error if there is none."""
    with _reaching(path), suppress(FileNotFoundError):
        _fs(path).rm_file(_key(path))


# Conditional puts


class Standing(NamedTuple):
    """An object as it was read."""

    content: bytes
    tag: str
    """The server's name for this state of the object (its ETag)."""


def create(path: Path, content: bytes) -> Standing | None:
    """Put an object if there is none yet (``If-None-Match: *``); otherwise return the one that is there."""
    return _put_if(path, content, {"IfNoneMatch": "*"})


def replace(path: Path, content: bytes, standing: Standing) -> Standing | None:
    """Put an object in place of one that has not changed since it was read (``If-Match``); else return the new one."""
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
    """Tell whether the condition failed, another conditional put was under way, or the object to replace is gone."""
    return _is_condition(error) or isinstance(error, (FileExistsError, FileNotFoundError))


def _standing(path: Path) -> Standing | None:
    try:
        tag = describe(path)["ETag"]  # first: with an older tag than content, a replacement is refused
        return Standing(read(path), tag)
    except FileNotFoundError:
        return None


# How s3fs names and reaches them


def _fs(path: Path) -> Any:
    remote: Any = path
    return remote.fs


def _key(path: Path) -> str:
    remote: Any = path
    return str(remote.path).rstrip("/")


def _below(folder: Path, key: str) -> Path:
    return folder.joinpath(*key.removeprefix(f"{_key(folder)}/").split("/"))


@contextmanager
def _reaching(path: Path) -> Iterator[None]:
    """Say in one line why a bucket cannot be reached, or what is wrong with its answers.

    Errors about single objects and this machine's files pass.
    """
    try:
        _check_answers(str(_fs(path).s3.meta.endpoint_url))
        yield
    except RunError:
        raise
    except Exception as error:  # whatever its client meets in an answer
        if isinstance(error, (FileNotFoundError, FileExistsError)) or _is_of_disk(error) or _is_condition(error):
            raise
        raise RunError(f"{str(path)!r} cannot be reached ({one_line(error):.300}): {_REMEDY}") from error


@cache
def _check_answers(endpoint: str) -> None:
    """Refuse an endpoint that takes a connection and says nothing: its client would ask it for many minutes.

    Anything that it says, and every other error, is the client's business.
    """
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=_ANSWER_S):  # noqa: S310  the user's own endpoint
            return
    except OSError as error:
        if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
            raise RunError(f"{endpoint} does not answer within {_ANSWER_S} s: {_REMEDY}") from None
    except (ValueError, HTTPException):
        return


def _is_of_disk(error: Exception) -> bool:
    """Tell whether an error is about a local file that an object is copied from or to."""
    return isinstance(error, OSError) and error.filename is not None and error.__cause__ is None


def _is_condition(error: Exception) -> bool:
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412)
