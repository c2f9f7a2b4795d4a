"""Tables of others: the rows of CSV, TSV, JSON, JSONL, Parquet and Feather files, on disk or on the hub."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from negcore.datasets.files import (
    MOST_FILE_BYTES,
    MOST_ROW_BYTES,
    Record,
    check_row_size,
    read_file,
    read_json_array,
    read_json_lines,
)
from negcore.errors import DatasetError, one_line
from negcore.hub import HubError, commit_of, file_of, files_of
from negcore.texts import private, row_text

HUB = "hf://datasets/"
_MOST_NAMED = 10
_DELIMITERS = MappingProxyType({",": "commas", ";": "semicolons", "\t": "tabs"})


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table as it was read: every value as the file has it."""

    columns: tuple[str, ...]
    """Names in the file's order; fields of a structure are named `structure.field`."""
    records: Sequence[tuple[str, Record]]
    """Place in the file, for messages, and the values that are there, by column."""
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names for the numbers of a column, where the file says them."""
    notes: tuple[str, ...] = ()
    """Remarks on how the file was read, where that was not sure."""


def read_sheet(path: Path) -> Sheet:
    """Read a table.

    Parameters
    ----------
    path : Path
        A file that ends in .csv, .tsv, .json (an array of objects), .jsonl, .parquet or .feather.

    Raises
    ------
    DatasetError
        If it ends otherwise, cannot be read, has no rows, or is malformed; the place is named.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DatasetError(f"{path}: cannot be imported; allowed: a file that ends in {', '.join(READERS)}")
    sheet = READERS[suffix](path)
    if not sheet.records:
        raise DatasetError(f"{path}: the file has no rows")
    return sheet


def local_file(source: str, what: str) -> Path:
    """Return the path of a file that is on disk or on the hub as `hf://datasets/ORGANISATION/DATASET/FILE`.

    Raises
    ------
    DatasetError
        If the hub has no such file, or it cannot be had; the message begins with `what`.
    """
    if not source.startswith(HUB):
        return Path(source)
    organisation, dataset, file = (*source.removeprefix(HUB).split("/", 2), "", "")[:3]
    dataset, _, revision = dataset.partition("@")
    path, others = None, ""
    try:
        if dataset:
            repository = f"{organisation}/{dataset}"
            commit = commit_of(repository, revision or None, kind="dataset")
            path = file_of(repository, file, commit, kind="dataset") if file else None
            others = _readable(files_of(repository, commit, kind="dataset")) if path is None else ""
    except HubError as error:
        if file:  # without one, what the hub says does not matter
            raise DatasetError(f"{what} {source!r}: {error}; or give a local file") from None
    if path is None:
        raise DatasetError(f"{what} {source!r}: no such file; allowed: {HUB}ORGANISATION/DATASET/FILE{others}")
    return path


def _readable(files: Sequence[str]) -> str:
    """Return what a message says of the files of a dataset that can be read."""
    found = [file for file in files if Path(file).suffix.lower() in READERS]
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return f"; this dataset has {', '.join(map(repr, found[:_MOST_NAMED]))}{more}" if found else ""


def read_arrow(path: Path, columns: Sequence[str] | None = None) -> Sheet:
    """Read a .parquet or .feather file, or those of the columns that it has.

    Raises
    ------
    DatasetError
        If it cannot be read, or a text in it is one that no model reads.
    """
    content = read_file(path)
    import pyarrow as pa  # not at the start: the list of datasets is shown without it
    import pyarrow.feather
    import pyarrow.parquet

    try:
        source = pa.BufferReader(content)
        if path.suffix.lower() == ".feather":
            table = pyarrow.feather.read_table(source)
        else:  # as dictionaries: a text that is stored once is not made as often as it is named
            schema = pyarrow.parquet.read_schema(source)
            texts = [one.name for one in schema if pa.types.is_string(one.type) or pa.types.is_large_string(one.type)]
            source.seek(0)
            table = pyarrow.parquet.read_table(source, read_dictionary=texts)
        table = table.select([name for name in table.column_names if columns is None or name in columns])
        metadata = table.schema.metadata or {}
        while any(pa.types.is_struct(one.type) for one in table.schema):
            table = table.flatten()
        _check_size(table, path)
        records = table.to_pylist()
    except DatasetError:
        raise
    except Exception as error:  # whatever the library meets in the file
        raise DatasetError(f"{path}: cannot be read ({private(f'{one_line(error):.200}')})") from error
    return Sheet(
        columns=_once(path, table.column_names),
        records=[(f"{path}, row {number}", _present(record)) for number, record in enumerate(records)],
        class_names=_class_names(metadata),
    )


def _check_size(table: Any, path: Path) -> None:
    """Refuse a table with a text that no model reads, before it becomes Python's."""
    import pyarrow as pa
    import pyarrow.compute as pc

    total = 0
    for column in table.itercolumns():
        for chunk in column.chunks:
            while pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                chunk = chunk.flatten()
            texts = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
            if not pa.types.is_string(texts.type) and not pa.types.is_large_string(texts.type):
                continue
            sizes = pc.binary_length(texts)
            check_row_size(pc.max(sizes).as_py() or 0, f"{path}, its largest text")
            total += pc.sum(sizes if texts is chunk else sizes.take(chunk.indices)).as_py() or 0
    if total > MOST_FILE_BYTES:
        raise DatasetError(f"{path} unpacks to {total / 2**20:.0f} MiB; allowed: {MOST_FILE_BYTES // 2**20} MiB")


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Return the names of classes that the hub's `datasets` library writes beside a Parquet table."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        named = {name: one["names"] for name, one in features.items() if one.get("_type") == "ClassLabel"}
        return {name: tuple(map(str, names)) for name, names in named.items() if names}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _delimited(path: Path) -> Sheet:
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 (in a spreadsheet: CSV UTF-8)"
        ) from None
    delimiter = _delimiter(text.partition("\n")[0], path)
    csv.field_size_limit(MOST_ROW_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines = _lines(reader, path)
    columns = _once(path, next(lines, (0, []))[1])
    records = []
    for number, cells in lines:
        place = f"{path}:{number}"
        if len(cells) != len(columns):
            raise DatasetError(
                f"{place}: {len(cells)} cells, but the first line names {len(columns)} columns; put text that holds "
                f"{_DELIMITERS[delimiter]} or line breaks in double quotes"
            )
        check_row_size(sum(map(len, cells)), place)
        records.append((place, {name: cell for name, cell in zip(columns, cells, strict=True) if cell.strip()}))
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    notes = () if delimiter == usual else (f"its cells are taken to be separated by {_DELIMITERS[delimiter]}",)
    return Sheet(columns=columns, records=records, notes=notes)


def _delimiter(header: str, path: Path) -> str:
    """Return what separates the cells: by the file's name, unless the first line has another one alone."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    found = [one for one in _DELIMITERS if one in header]
    return found[0] if len(found) == 1 else usual


def _lines(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not empty, with the number of the line in which each begins."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DatasetError(f"{path}:{number}: not CSV ({one_line(error)})") from None
        if cells is None:
            return
        if cells:
            yield number, cells


def _json_array(path: Path) -> Sheet:
    records = read_json_array(path)
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DatasetError(f"{path}, record {number}: {type(record).__name__} found; a JSON object is needed")
    return _of_objects(path, [(f"{path}, record {number}", record) for number, record in enumerate(records)])


def _json_lines(path: Path) -> Sheet:
    return _of_objects(path, [(f"{path}:{number}", record) for number, record in read_json_lines(path)])


def _of_objects(path: Path, objects: Sequence[tuple[str, Record]]) -> Sheet:
    records = [(place, _present(dict(_flat(record)))) for place, record in objects]
    return Sheet(columns=tuple(dict.fromkeys(name for _, record in records for name in record)), records=records)


def _flat(record: Record, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of an object and, as `object.name`, those of objects in it."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _present(record: Record) -> Record:
    """Return a record without the values that stand for none: null, and NaN, which is no number."""
    return {name: value for name, value in record.items() if value is not None and value == value}


def _once(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise DatasetError(f"{path}: two columns are named {row_text(twice[0])}; give each a name of its own")
    if not any(name.strip() for name in names):
        raise DatasetError(f"{path}: the first line names no columns; it must, as in: question,answer")
    return tuple(names)


READERS: Mapping[str, Callable[[Path], Sheet]] = MappingProxyType(
    {
        ".csv": _delimited,
        ".tsv": _delimited,
        ".json": _json_array,
        ".jsonl": _json_lines,
        ".parquet": read_arrow,
        ".feather": read_arrow,
    }
)
"""The function that reads each kind of file, by its ending."""
