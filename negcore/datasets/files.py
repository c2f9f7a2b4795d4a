"""Read JSON files, with errors that name the place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from negcore.errors import DatasetError, NegError, RunError, one_line
from negcore.store.files import near_path, open_file
from negcore.texts import row_text

Record = Mapping[str, Any]

MOST_ROW_BYTES = 2**20
"""Bytes of a row: no model reads a prompt that long."""
_MOST_COUNTED = 64 * 2**20
MOST_ARRAY_BYTES = 256 * 2**20
"""Bytes of a JSON file that holds one array: it takes several times as much memory to parse."""
MOST_FILE_BYTES = 2 * 2**30
"""Bytes of any other file that is read whole."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of the files that stand for large ones in a repository."""


def read_json_array(path: Path) -> Sequence[Any]:
    """Read the records of a JSON file that holds one array.

    Raises
    ------
    DatasetError
        If the file cannot be read, is not JSON, does not hold an array, or names a field twice, or is too large.
    """
    content = read_file(path, MOST_ARRAY_BYTES)
    try:
        records = _parsed(content)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}:{error.lineno}: not JSON ({error.msg}); an array of objects is needed") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: cannot be read ({one_line(error):.200})") from None
    if not isinstance(records, list):
        raise DatasetError(f"{path}: holds a {type(records).__name__}; an array of objects is needed")
    for number, record in enumerate(records):
        check_row_size(_n_characters(record), f"{path}, record {number}")
    return records


def read_json_lines(path: Path) -> list[tuple[int, Record]]:
    """Read the objects of a JSONL file with their line numbers (from 1); empty lines are skipped.

    A value that is null or NaN, which pandas writes for a missing one, is as if its field were not there.

    Raises
    ------
    DatasetError
        If the file cannot be read, or a line is too large, or not a JSON object, or names a field twice.
    """
    with _opened(path) as stream:
        return [(number, _json_object(line, f"{path}:{number}")) for number, line in _lines(stream, path)]


def _lines(stream: BufferedReader, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not empty, none of them longer than a row may be."""
    number = 0
    while line := stream.readline(MOST_ROW_BYTES + 1):
        number += 1
        if len(line) > MOST_ROW_BYTES:
            raise _too_large(len(line) + _rest_of_line(stream), f"{path}:{number}")
        if line.strip():
            yield number, line


def _rest_of_line(stream: BufferedReader) -> int:
    """Count the bytes to the end of the line, in a file without an end no more than some."""
    n_bytes = 0
    while n_bytes < _MOST_COUNTED and (piece := stream.readline(MOST_ROW_BYTES)):
        n_bytes += len(piece)
        if piece.endswith(b"\n"):
            break
    return n_bytes


def check_row_size(n_bytes: int, place: str) -> None:
    """Refuse a row that is larger than the context of any model, before anything is made of it."""
    if n_bytes > MOST_ROW_BYTES:
        raise _too_large(n_bytes, place)


def _too_large(n_bytes: int, place: str) -> DatasetError:
    more = "more than " if n_bytes >= _MOST_COUNTED else ""
    return DatasetError(
        f"{place}: a row of {more}{n_bytes / 2**20:.1f} MiB; allowed: {MOST_ROW_BYTES // 2**20} MiB. Is a line break "
        "missing, or is this another kind of file?"
    )


def _n_characters(value: Any) -> int:
    """Return the characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_n_characters(one) for pair in value.items() for one in pair)
    return sum(map(_n_characters, value)) if isinstance(value, list) else 1


def read_file(path: Path, most_bytes: int = MOST_FILE_BYTES) -> bytes:
    """Return the content of a data file that is read whole.

    Raises
    ------
    DatasetError
        If it cannot be read, or is too large; the message names the absolute path.
    """
    with _opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most_bytes:
            raise DatasetError(
                f"{path} has {size / 2**20:.0f} MiB; allowed: {most_bytes // 2**20} MiB, as it is read as a whole"
            )
        return stream.read()


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open a data file, and say in one line why it cannot be read."""
    place = path.absolute()
    try:
        with open_file(place) as stream:
            if stream.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
                raise DatasetError(f"{path} is a Git LFS pointer, not the file that it stands for: run git lfs pull")
            yield stream
    except OSError as error:
        near = near_path(path) if isinstance(error, FileNotFoundError) else ""
        reason = error.strerror or one_line(error)
        raise DatasetError(f"{path}: {str(place)!r} cannot be read ({reason})" + f"; {near}" * bool(near)) from None
    except RunError as error:
        raise DatasetError(f"{path}: {error}") from None
    except DatasetError:
        raise
    except ValueError as error:  # a null character in the name
        raise DatasetError(f"{str(path)!r}: cannot be read ({one_line(error)})") from None


def _json_object(line: bytes, place: str) -> Record:
    try:
        record = _parsed(line)
    except RecursionError:
        raise DatasetError(f"{place}: not JSON (nested too deeply); each line must be one JSON object") from None
    except ValueError as error:
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
        raise NegError(f"{row_text(twice)} occurs twice in an object")
    return record


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is no value of JSON")
