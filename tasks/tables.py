"""Tables of results as Arrow files."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa

_TYPES = {
    str: pa.string(),
    int: pa.int64(),
    int | None: pa.int64(),
    float: pa.float64(),
    float | None: pa.float64(),
    bool: pa.bool_(),
}


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
    """
    hints = get_type_hints(kind)
    columns = [(name, pa.string()) for name in names] + [(item.name, _TYPES[hints[item.name]]) for item in fields(kind)]
    schema = pa.schema(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(list(rows), schema=schema))
    draft.replace(path)
