"""Read JSON files, with errors that name the place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from negcore.errors import DatasetError, one_line

Record = Mapping[str, Any]

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of the files that stand for large ones in a repository."""


def read_json_array(path: Path) -> Sequence[Any]:
    """Read the records of a JSON file that holds one array.

    Raises
    ------
    DatasetError
        If the file cannot be read, is not JSON, does not hold an array, or names a field twice.
    """
    content = read_file(path)
    try:
        records = _parsed(content)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}:{error.lineno}: not JSON ({error.msg}); an array of objects is needed") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: cannot be read ({one_line(error)})") from None
    if not isinstance(records, list):
        raise DatasetError(f"{path}: holds a {type(records).__name__}; an array of objects is needed")
    return records


def read_json_lines(path: Path) -> list[tuple[int, Record]]:
    """Read the objects of a JSONL file with their line numbers (from 1); empty lines are skipped.

    A value that is null or NaN, which pandas writes for a missing one, is as if its field were not there.

    Raises
    ------
    DatasetError
        If the file cannot be read, or a line is not a JSON object, or names a field twice.
    """
    lines = read_file(path).split(b"\n")
    return [(number, _json_object(line, f"{path}:{number}")) for number, line in enumerate(lines, 1) if line.strip()]


def read_file(path: Path) -> bytes:
    """Return the content of a data file.

    Raises
    ------
    DatasetError
        If it cannot be read; the message names the absolute path.
    """
    place = path.absolute()
    try:
        if place.exists() and not place.is_file():  # a pipe would never end
            raise DatasetError(f"{path}: {str(place)!r} is a directory or device; a file is needed")
        content = place.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: {str(place)!r} cannot be read ({error.strerror or one_line(error)})") from None
    except ValueError as error:  # a null character in the name
        raise DatasetError(f"{str(path)!r}: cannot be read ({one_line(error)})") from None
    if content.startswith(LFS_POINTER):
        raise DatasetError(f"{path} is a Git LFS pointer, not the file that it stands for: run git lfs pull")
    return content


def _json_object(line: bytes, place: str) -> Record:
    try:
        record = _parsed(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{place}: not JSON ({one_line(error)}); each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise DatasetError(f"{place}: {type(record).__name__} found; each line must be one JSON object")
    return {name: value for name, value in record.items() if value is not None}


def _parsed(content: bytes) -> Any:
    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_each_key_once, parse_constant=_constant)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.80} occurs twice in an object")
    return record


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is no value of JSON")
