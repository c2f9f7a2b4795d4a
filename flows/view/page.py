"""Pages as data, and the one template that shows them: every text on them is text, whatever it holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import urlencode

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from flows.show.table import Table
from flows.show.text import printable

_MOST_COLUMNS = 12

LinkOf = Callable[[Sequence[str]], str]
"""Address for a cell, from the texts of its row."""


class Link(NamedTuple):
    """A text that leads to a page of this server."""

    text: str
    address: str


@dataclass(frozen=True)
class Part:
    """One part of a page: what it has is shown in the order of the fields."""

    title: str = ""
    lines: Sequence[str | Link] = ()
    text: str = ""
    """Shown as it is, line by line: a prompt, or a run file."""
    table: Table | None = None
    links: Mapping[str, LinkOf] = field(default_factory=dict)
    """By the title of a column: where the cells of that column lead."""
    is_folded: bool = False
    """True if the table is a line until it is opened."""
    choices: Sequence[str] = ()
    """A name for each row of the table, which can be chosen to be compared."""
    asked: Mapping[str, str] | None = None
    """Parameters that go along with the name of a neuron that is asked for here."""


@dataclass(frozen=True)
class Page:
    """A page."""

    title: str
    parts: Sequence[Part]
    way: Sequence[Link] = ()
    """The pages above it."""

    @property
    def is_wide(self) -> bool:
        """True if a table has more columns than a screen has room for: rows are blocks then, as on narrow screens."""
        return any(len(part.table.columns) > _MOST_COLUMNS for part in self.parts if part.table)


def address(page: str, **values: str | int) -> str:
    """Return the address of a page about something."""
    return f"/{page}?{urlencode(values)}"


def html(page: Page) -> str:
    """Return a page as HTML."""
    return _environment().from_string(_file("page.html")).render(page=page, grid=_grid)


def style_sheet(name: str) -> str:
    """Return a style sheet: of all pages, or of those whose rows are blocks."""
    return _file(name)


class _Cell(NamedTuple):
    pieces: Any
    title: str
    """That of its column."""
    classes: str
    address: str


def _grid(part: Part) -> list[list[_Cell]]:
    """Return the rows of a part's table, each cell with where it leads."""
    table = part.table
    assert table is not None
    rows, titles = [], [column.title for column in table.columns]
    for row in (row for block in table.pieces for row in block):
        texts = ["".join(piece.text for piece in cell) for cell in row]
        leads = [part.links[one.title](texts) if one.title in part.links else "" for one in table.columns]
        classes = ["number" if column.is_numeric else "" for column in table.columns]
        rows.append(list(map(_Cell, row, titles, classes, leads)))
    return rows


@cache
def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
