"""A table as data: built once from rows of results, then shown in the terminal, on the report page and in Prefect.

Cells hold plain text: what names and errors say in it is never read as markup.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, TypeVar

from rich import table as rich_table
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.text import Text

from flows.show.text import printable, share
from negcore.texts import public

Row = TypeVar("Row")
Style = Literal["", "bold", "dim", "italic", "red", "yellow", "green"]
"""Styles of rich, and classes of the report's style sheet."""


@dataclass(frozen=True)
class Words:
    """Text of one style."""

    text: str
    style: Style = ""


@dataclass(frozen=True)
class Number:
    """A number, and how people read it."""

    value: float
    form: Callable[[float], str] = str
    style: Style = ""

    @property
    def text(self) -> str:
        return self.form(self.value)


Piece = str | Words | Number
Cell = Piece | tuple[Piece, ...]
"""One piece, or several after each other; a line break in a text begins a new line of the cell."""
Block = Sequence[Sequence[Cell]]
"""Rows that belong together. A row may be shorter than the table: the rest of its cells is empty."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    is_numeric: bool = False
    """Numbers are aligned on the right and never broken."""
    is_private: bool = False
    """Its cells may quote prompts, so it is left out in Prefect."""


@dataclass(frozen=True)
class Table:
    """Rows of results as people read them."""

    key: str
    """Name in Prefect, different for every table of a run."""
    title: str
    columns: Sequence[Column]
    blocks: Sequence[Block]
    caption: str = ""
    says: str = ""
    """The table's message, in a sentence above it on the page."""

    @property
    def pieces(self) -> list[list[list[tuple[Words | Number, ...]]]]:
        """The pieces of every cell, by block, row and column."""
        return [
            [[*map(_pieces, row), *[()] * (len(self.columns) - len(row))] for row in block] for block in self.blocks
        ]

    @property
    def n_rows(self) -> int:
        return sum(map(len, self.blocks))

    def __rich__(self) -> Group:
        """Return what rich shows in a terminal."""
        shown = rich_table.Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for column in self.columns:
            title, right = Text(printable(column.title)), column.is_numeric
            shown.add_column(title, justify="right" if right else "left", no_wrap=right, overflow="fold")
        for block in self.pieces:
            for row in block:
                shown.add_row(*(Text.assemble(*((printable(p.text), p.style) for p in cell)) for cell in row))
            shown.add_section()
        caption = [Text(printable(self.caption), "table.caption")] if self.caption else []
        return Group("", Text(printable(self.title), "table.title"), shown, *caption)

    @property
    def markdown(self) -> str:
        """The table as Markdown, under a heading of the second level."""
        head = [in_markdown(column.title) for column in self.columns]
        rule = ["---:" if column.is_numeric else "---" for column in self.columns]
        cells = chain.from_iterable(self.pieces)
        rows = [[in_markdown("".join(piece.text for piece in cell)) for cell in row] for row in cells]
        table = "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
        return "\n\n".join(filter(None, [f"## {in_markdown(self.title)}", table, in_markdown(self.caption)]))

    def records(self) -> list[dict[str, str | float | None]]:
        """Return the rows as Prefect stores them: by the columns' titles, numbers as numbers, and None for NaN."""
        titles = (" ".join(printable(column.title).split()) for column in self.columns)
        public = [(i, title) for i, title in enumerate(titles) if not self.columns[i].is_private]
        return [{title: _stored(row[i]) for i, title in public} for row in chain.from_iterable(self.pieces)]


def texts(*titles: str) -> list[Column]:
    """Return columns of text."""
    return [Column(title) for title in titles]


def numbers(*titles: str) -> list[Column]:
    """Return columns of numbers."""
    return [Column(title, is_numeric=True) for title in titles]


def interval(low: float, high: float, form: Callable[[float], str] = share, to: str = "-") -> str:
    """Return the interval of the number before it, on a line of its own."""
    return f"\n{form(low)}{to}{form(high)}"


def lines(*pieces: Piece) -> tuple[Piece, ...]:
    """Return a cell with a line for every piece."""
    return tuple(piece for line in pieces for piece in ("\n", line))[1:]


def by(rows: Iterable[Row], name: str) -> dict[Any, list[Row]]:
    """Return rows by the value of one of their fields, in order of appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(getattr(row, name), []).append(row)
    return groups


def _pieces(cell: Cell) -> tuple[Words | Number, ...]:
    pieces = cell if isinstance(cell, tuple) else (cell,)
    return tuple(Words(piece) if isinstance(piece, str) else _sober(piece) for piece in pieces)


def _sober(piece: Words | Number) -> Words | Number:
    """Return a piece; a number that is shown as zero is never bold, however sure it is not zero."""
    if isinstance(piece, Number) and piece.style == "bold" and not re.search("[1-9]", piece.text):
        return replace(piece, style="")
    return piece


def in_markdown(text: str) -> str:
    """Return a text as one line of Markdown that shows it as it is."""
    return re.sub(r"([\\|<>*_`\[\]#&~$])", r"\\\1", " ".join(printable(text).split()))


def _stored(pieces: Sequence[Words | Number]) -> str | float | None:
    match pieces:
        case [Number(value)]:
            return None if math.isnan(value) else value if isinstance(value, int) else float(f"{value:.4g}")
    return " / ".join(printable(public("".join(piece.text for piece in pieces))).split("\n"))
