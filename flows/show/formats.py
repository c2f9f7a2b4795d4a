"""Tables of results for other programs: CSV, Markdown, LaTeX, Parquet. Whatever a text in them says, it stays text."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from flows.show.format_names import FormatName
from flows.show.table import in_markdown
from negcore.texts import printable

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters by which a spreadsheet takes a text for a formula."""
_LATEX = {
    **{char: rf"\{char}" for char in "{}$&#%_"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{char: f"{{{char}}}" for char in "[]*'`-"},  # arguments of the line break before them, and ligatures
}
Text = Callable[[str], str]


class Written(NamedTuple):
    """A table in another format."""

    content: bytes
    """The whole file; text is UTF-8."""
    n_marked: int = 0
    """Texts of a CSV file that an apostrophe was put before."""


def written(table: pa.Table, name: FormatName) -> Written:
    """Return a table in a format.

    CSV and Parquet keep numbers exactly. In CSV, which spreadsheets open, a text that begins like a formula gets an
    apostrophe in front. Markdown and LaTeX round numbers to four digits, in LaTeX as a `tabular` for booktabs.

    Parameters
    ----------
    table : pyarrow.Table
        Columns of numbers, texts, truth values and lists of them.
    """
    return _WRITERS[name](table)


def _csv(table: pa.Table) -> Written:
    n_marked = 0

    def marked(text: str) -> str:
        nonlocal n_marked
        if not text.startswith(_FORMULA):
            return text
        n_marked += 1
        return f"'{text}"

    lines: list[str] = []
    # With another end of line than its own, it would not quote a text with "\r" in it.
    writer = csv.writer(SimpleNamespace(write=lines.append))
    writer.writerow(map(marked, table.column_names))
    writer.writerows(_rows(table, marked, _exact))
    return Written("".join(line.removesuffix("\r\n") + "\n" for line in lines).encode(), n_marked)


def _markdown(table: pa.Table) -> Written:
    rule = ["---:" if numeric else "---" for numeric in _are_numeric(table)]
    rows = [[in_markdown(name) for name in table.column_names], rule, *_rows(table, in_markdown, rounded)]
    return Written("".join(f"| {' | '.join(row)} |\n" for row in rows).encode())


def _latex(table: pa.Table) -> Written:
    aligned = "".join("r" if numeric else "l" for numeric in _are_numeric(table))
    head, *rows = (
        f"{' & '.join(row)} \\\\"
        for row in [[in_latex(name) for name in table.column_names], *_rows(table, in_latex, _rounded_in_latex)]
    )
    lines = [
        "% needs \\usepackage[T1]{fontenc} and \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{{aligned}}}",
        "\\toprule",
        head,
        "\\midrule",
        *rows,
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return Written("\n".join(lines).encode() + b"\n")


def _parquet(table: pa.Table) -> Written:
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return Written(file.getvalue())


_WRITERS: Mapping[FormatName, Callable[[pa.Table], Written]] = MappingProxyType(
    {"csv": _csv, "md": _markdown, "latex": _latex, "parquet": _parquet}
)


# Cells


def cells(table: pa.Table) -> list[list[Any]]:
    """Return the values of every row; numbers of 32 bits with the digits that they have."""
    columns = []
    for column in table.columns:
        values, kind = column.to_pylist(), column.type
        if pa.types.is_float32(kind):
            values = [None if value is None else np.float32(value) for value in values]
        elif pa.types.is_list(kind) and pa.types.is_float32(kind.value_type):
            values = [None if value is None else [float(str(np.float32(one))) for one in value] for value in values]
        columns.append(values)
    return [list(row) for row in zip(*columns, strict=True)]


def is_number(kind: pa.DataType) -> bool:
    """Tell whether a column of this type holds numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def rounded(number: Any) -> str:
    """Return a number as people read it: whole ones whole, others with four digits."""
    if isinstance(number, int | np.integer) or (isinstance(number, Decimal) and number == number.to_integral_value()):
        return f"{number:f}" if isinstance(number, Decimal) else str(number)
    return "NaN" if math.isnan(number) else f"{float(number):.4g}"


def in_latex(text: str) -> str:
    """Return a text as one line of LaTeX that shows it as it is."""
    return "".join(_LATEX.get(char, char) for char in " ".join(printable(text).split()))


def _rounded_in_latex(number: Any) -> str:
    digits, _, exponent = rounded(number).partition("e")
    if not exponent:
        return f"${digits}$" if digits.startswith("-") else digits
    return f"${digits} \\times 10^{{{int(exponent)}}}$"


def _exact(number: Any) -> str:
    return "NaN" if number != number else str(number)


def _rounded_within(value: Any) -> Any:
    """Return a list or record with its numbers as `rounded` writes them."""
    match value:
        case list():
            return [_rounded_within(one) for one in value]
        case dict():
            return {name: _rounded_within(one) for name, one in value.items()}
        case float():
            return float(f"{value:.4g}")
    return value


def _are_numeric(table: pa.Table) -> list[bool]:
    return [is_number(field.type) for field in table.schema]


def _rows(table: pa.Table, text: Text, number: Callable[[Any], str]) -> Iterable[list[str]]:
    return ([shown(value, text, number) for value in row] for row in cells(table))


def shown(value: Any, text: Text = str, number: Callable[[Any], str] = rounded) -> str:
    """Return the text of a cell; lists and records are JSON, and nothing is empty.

    Parameters
    ----------
    text : callable
        Escapes a text.
    number : callable
        Writes a number.
    """
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case int() | float() | Decimal() | np.number():
            return number(value)
        case list() | dict():
            kept = value if number is _exact else _rounded_within(value)
            return text(json.dumps(kept, ensure_ascii=False, default=str))
    return text(str(value))
