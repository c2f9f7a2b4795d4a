"""What a run ends with, and the page that shows it: `report.html` beside the data, made of what the terminal shows.

The page needs no network and runs no script; whatever names and errors say in it is text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.show.display import printable
from negcore.store.files import find, output
from tasks.measure.missing import Extracted

REPORT_FILE = "report.html"

KNOWN_FILES = MappingProxyType(
    {
        REPORT_FILE: "every table and figure",
        "accuracy.arrow": "accuracy of every probe on test",
        "averages.arrow": "mean accuracy over datasets",
        "campaign": "comparison of the models",
        "confusion.arrow": "answers by gold option",
        "linearity": "tables and figures",
        "negs": "NEG shards",
        "probes": "fitted probes",
        "run.yaml": "run file: repeats the run",
        "skills": "tables and figures",
        "splits.arrow": "rows released and used",
    }
)
_UNINTERESTING = frozenset({"claim.json", "plan.json", "prefect"})
_REPORTS_OF_PARTS = f"*/*/{REPORT_FILE}"
"""Of a campaign: model, stage."""


@dataclass(frozen=True)
class Section:
    """Tables and figures that belong together."""

    title: str
    """One line; may be empty."""
    tables: Sequence[Table]
    figures: Sequence[Path] = ()
    """SVG and PNG."""


@dataclass
class RunResults:
    """What a run produced, and what it could not."""

    directory: Path
    extracted: list[Extracted] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    """One line for every row that could not be computed and without which the run went on."""
    problems: list[str] = field(default_factory=list)
    """One line for everything that is missing; empty if the run is whole."""
    report: Path | None = None
    """The page of this run; None as long as there is none."""

    @property
    def sections(self) -> list[Section]:
        """What there is to show; nothing if the run only makes shards."""
        return []


def write_report(results: RunResults) -> None:
    """Write the page of a run that has something to report; else an earlier run's page stays.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    sections = results.sections
    if not (sections or results.problems):
        return
    page, path = _page(results, sections), results.directory / REPORT_FILE
    with output(path) as file:
        file.write_text(page, encoding="utf-8")
    results.report = path


def counted(extracted: Sequence[Extracted]) -> str:
    """What became of a run's rows, in one line; the same however often the run was interrupted."""
    n_done = sum(one.n_rows for one in extracted)
    n_aside = sum(len(one.set_aside) for one in extracted)
    n_failed = sum(failure.n_rows for one in extracted for failure in one.failures)
    n_shards = sum(one.n_reused + one.n_computed for one in extracted)
    size = sum(one.n_bytes for one in extracted) / 2**20
    return f"{n_done} rows done, {n_aside} set aside, {n_failed} failed; {n_shards} shards, {size:.0f} MiB"


def counted_now(extracted: Sequence[Extracted]) -> str:
    """The same, and how much of it was done before."""
    return f"{counted(extracted)}; {sum(one.n_reused for one in extracted)} shards reused"


def files_of(directory: Path) -> list[Path]:
    """What of a run directory is for people, the report first."""
    found = [path for path in find(directory, "*") if not path.name.startswith(".")]
    shown = [path for path in found if path.name not in _UNINTERESTING]
    return sorted(shown, key=lambda path: path.name != REPORT_FILE)


# The page


class _Run(NamedTuple):
    """Text of one style."""

    text: str
    style: str
    """Names of rich's styles, which are the classes of the page's style sheet."""


class _Cell(NamedTuple):
    runs: Sequence[_Run]
    justify: str


class _Row(NamedTuple):
    cells: Sequence[_Cell]
    ends_section: bool


class _Link(NamedTuple):
    """A file below the run directory: the page and its data are moved together."""

    href: str
    name: str
    about: str = ""


def _page(results: RunResults, sections: Sequence[Section]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name(REPORT_FILE).read_text(encoding="utf-8"))
    directory = results.directory
    data = [path for path in files_of(directory) if path.name != REPORT_FILE]
    return template.render(
        title=printable(directory.name),
        counted=counted(results.extracted) if results.extracted else "",
        problems=[printable(problem) for problem in results.problems],
        set_aside=[printable(row) for row in results.set_aside],
        sections=[_shown(section, directory) for section in sections],
        parts=[_link(path, directory) for path in find(directory, _REPORTS_OF_PARTS)],
        data=[_link(path, directory, KNOWN_FILES.get(path.name, "")) for path in data],
    )


def _shown(section: Section, directory: Path) -> dict[str, Any]:
    return {
        "title": printable(section.title),
        "tables": [_table(table) for table in section.tables],
        "figures": [_link(path, directory) for path in section.figures if path.suffix == ".svg"],
    }


def _table(table: Table) -> dict[str, Any]:
    return {
        "title": _runs(table.title or ""),
        "head": [_Cell(_runs(column.header), column.justify) for column in table.columns],
        "rows": list(_rows(table)),
        "caption": _runs(table.caption or ""),
    }


def _rows(table: Table) -> Iterator[_Row]:
    by_column = [[_Cell(_runs(cell), column.justify) for cell in column.cells] for column in table.columns]
    for row, cells in zip(table.rows, zip(*by_column, strict=True), strict=True):
        yield _Row(cells, row.end_section)


_CONSOLE = Console()


def _runs(markup: Any) -> list[_Run]:
    """A title's, header's or cell's text, by style."""
    text = markup if isinstance(markup, Text) else Text.from_markup(str(markup))
    return [_Run(segment.text, str(segment.style or "")) for segment in text.render(_CONSOLE) if segment.text]


def _link(path: Path, directory: Path, about: str = "") -> _Link:
    place = str(path).removeprefix(str(directory)).lstrip("/")
    return _Link(quote(place), printable(place), about)
