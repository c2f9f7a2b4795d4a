"""Read JSON files, with errors that name the place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from negcore.errors import DatasetError, one_line

Record = Mapping[str, Any]


def read_json_array(path: Path) -> Sequence[Any]:
    """Read the records of a JSON file that holds one array.

    Raises
    ------
    DatasetError
        If the file cannot be read, is not JSON, or does not hold an array.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}:{error.lineno}: not JSON ({error.msg}); an array of objects is needed") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DatasetError(f"{path}: cannot be read ({one_line(error)})") from None
    if not isinstance(records, list):
        raise DatasetError(f"{path}: holds a {type(records).__name__}; an array of objects is needed")
    return records


def read_json_lines(path: Path) -> list[tuple[int, Record]]:
    """Read the objects of a JSONL file with their line numbers (from 1); empty lines are skipped.

    Raises
    ------
    DatasetError
        If the file cannot be read, or a line is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({one_line(error)})") from None
    return [(number, _json_object(line, f"{path}:{number}")) for number, line in enumerate(lines, 1) if line.strip()]


def _json_object(line: bytes, place: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{place}: not JSON ({one_line(error)}); each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise DatasetError(f"{place}: {type(record).__name__} found; each line must be one JSON object")
    return record
