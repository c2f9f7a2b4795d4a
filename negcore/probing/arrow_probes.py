"""Reader of the probe files that earlier versions wrote: Arrow tables of one row. It stays for one release.

The columns of the row are the probe's arrays as lists. The table's metadata holds everything else as JSON.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from negcore.probing.probe_parts import Arrays

MAGIC = b"ARROW1"
"""First bytes of an Arrow file."""


def read_arrow(content: bytes) -> tuple[dict[str, Any], Arrays]:
    """Return the metadata and the arrays, unchecked except that each array has as many values as its shape says."""
    table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
    about = json.loads(table.schema.metadata[b"neg_probe"])
    columns = {key: table.column(key).combine_chunks().values for key in about["shapes"]}
    arrays = {
        key: values.to_numpy(zero_copy_only=False).reshape(about["shapes"][key]) for key, values in columns.items()
    }
    return about, arrays
