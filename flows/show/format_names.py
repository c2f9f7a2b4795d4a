"""Formats that tables of results can be written in; apart from their writers, which need slow libraries."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

FormatName = Literal["csv", "md", "latex", "parquet"]
SUFFIXES: Mapping[FormatName, str] = MappingProxyType({"csv": "csv", "md": "md", "latex": "tex", "parquet": "parquet"})
"""Endings of files in each format."""
