"""Tables of results as Arrow files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import pyarrow as pa

from negcore.errors import RunError
from negcore.store.files import find, near_path, output, read_bytes

_TYPES = {
    str: pa.string(),
    int: pa.int64(),
    int | None: pa.int64(),
    float: pa.float64(),
    float | None: pa.float64(),
    bool: pa.bool_(),
    bool | None: pa.bool_(),
    list[float]: pa.list_(pa.float64()),
    list[float] | None: pa.list_(pa.float64()),
    list[str] | None: pa.list_(pa.string()),
}

TABLE_FOLDERS = ("campaign", "linearity", "skills")
"""Folders of a run directory that hold tables too."""

T = TypeVar("T")


def write_table(path: Path, kind: type, rows: Sequence[Mapping[str, Any]], *, names: Sequence[str] = ()) -> None:
    """Write rows as an Arrow file, whole or not at all; no rows make an empty table with the same columns.

    Parameters
    ----------
    path : Path
    kind : dataclass
        Its fields are the columns.
    rows : sequence of mapping of column to value
    names : sequence of str
        Columns of strings before those of `kind`.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    write_arrow(path, arrow_table(kind, rows, names=names))


def arrow_table(kind: type, rows: Sequence[Mapping[str, Any]], *, names: Sequence[str] = ()) -> pa.Table:
    """Return rows as an Arrow table; parameters as of `write_table`."""
    hints = get_type_hints(kind)
    columns = [(name, pa.string()) for name in names] + [(item.name, _type(hints[item.name])) for item in fields(kind)]
    return pa.Table.from_pylist(list(rows), schema=pa.schema(columns))


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write a table as an Arrow file, whole or not at all.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    with output(path) as file, pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_tables(
    folder: Path, kind: type, findings: Sequence[tuple[Sequence[str], Any]], *, names: Sequence[str] = ()
) -> None:
    """Write one table for each field of `kind` that is a list of dataclasses, named as the field.

    Parameters
    ----------
    folder : Path
    kind : dataclass
        Class of the findings.
    findings : sequence of (labels, object of `kind`)
        The labels of an object stand before each of its rows.
    names : sequence of str
        Columns of the labels, in their order.

    Raises
    ------
    RunError
        If a table cannot be written.
    """
    for table, hint in get_type_hints(kind).items():
        if get_origin(hint) is list and is_dataclass(get_args(hint)[0]):
            rows = [
                dict(zip(names, labels, strict=True)) | asdict(row)
                for labels, found in findings
                for row in getattr(found, table)
            ]
            write_table(folder / f"{table}.arrow", get_args(hint)[0], rows, names=names)


def _type(hint: Any) -> pa.DataType:
    """Return the column type of a field; a choice of strings is a string."""
    return pa.string() if get_origin(hint) is Literal else _TYPES[hint]


def read_table(path: Path, kind: type[T]) -> list[T]:
    """Read back the rows of a table that `write_table` wrote without further columns.

    Raises
    ------
    RunError
        If there is no such file, or it does not hold such rows.
    """
    try:
        return [kind(**row) for row in read_arrow(path).to_pylist()]
    except TypeError as error:
        raise _not_of_this_version(path, error) from error


def read_arrow(path: Path) -> pa.Table:
    """Read a table whatever its columns are.

    Raises
    ------
    RunError
        If there is no such file, or it is no table.
    """
    try:
        return pa.ipc.open_file(pa.py_buffer(read_bytes(path))).read_all()
    except OSError as error:
        near = near_path(path) if isinstance(error, FileNotFoundError) else ""
        reason = f"{error.strerror or error}" + f"; {near}" * bool(near)
        raise RunError(f"table {str(path)!r} cannot be read: {reason}") from error
    except pa.ArrowException as error:
        raise _not_of_this_version(path, error) from error


def _not_of_this_version(path: Path, error: Exception) -> RunError:
    reason = str(error).splitlines()[0]
    return RunError(f"table {str(path)!r} was not written by this version: {reason}; make it again")


def result_tables(root: Path) -> dict[str, Path]:
    """Return the tables of results in a run directory by name, those in a folder as FOLDER/NAME."""
    paths = [path for folder in ("", *TABLE_FOLDERS) for path in find(root / folder, "*.arrow")]
    named = {str(path).removeprefix(str(root)).strip("/").removesuffix(".arrow"): path for path in paths}
    return {name: path for name, path in named.items() if not path.name.startswith(".")}
