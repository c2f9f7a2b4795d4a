"""The summary of a whole run on Prefect's pages: its findings, accuracies, rows and files."""

import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from flows.show.accuracy_tables import BESIDE_TITLES
from flows.show.drawing import Figure
from flows.show.report import KNOWN_FILES, RunResults, counted_now, files_of
from flows.show.table import Table, in_markdown
from negcore.store.files import is_remote
from negcore.texts import printable, public

_MOST_LINES = 20
_LONGEST_LINE = 1200
_MOST_TABLES = 4
_ACCURACIES = ("accuracy-", "campaign-accuracy")
"""Beginnings of the keys of tables that the summary shows."""


def run_summary(results: RunResults) -> str:
    """Return Markdown with a run's findings and accuracies, its rows, problems and files; it holds no prompt.

    Whoever reads it may sit at another machine, so it says itself what the report says first, and links only places
    that can be reached from anywhere: those in a bucket.
    """
    lines = [f"**{counted_now(results.extracted)}**", ""] if results.extracted else []
    for title, found in (("Missing", results.problems), ("Warnings", results.warnings)):
        lines += [f"**{title}: {len(found)}**", "", *_listed(found), ""] if found else []
    lines += [f"- {_code(section.title)}" for section in results.sections if section.title]
    sentences = [sentence for section in results.sections for sentence in section.sentences]
    lines += (
        ["", "## Findings", "", "In brackets: 95 % intervals.", "", *_listed(sentences, in_markdown), ""]
        if sentences
        else []
    )
    tables = [table for section in results.sections for table in section.tables if table.key.startswith(_ACCURACIES)]
    lines += [public(_narrow(table).markdown) + "\n" for table in tables[:_MOST_TABLES]]
    lines += ["## Repeat and read on", ""]
    if results.about:
        lines += [f"Repeat this run: {_code(results.about.command)}", ""]
    lines += [f"Run directory: {_place(results.directory, str(results.directory))}", ""]
    if not is_remote(results.directory):
        look = shlex.join(["neg", "view", str(results.directory)])
        lines += [f"Figures, neurons and rows, on the machine {_code(platform.node())}: {_code(look)}", ""]
    lines += map(_file_line, files_of(results.directory))
    return "\n".join(lines)


def _narrow(table: Table) -> Table:
    """Return a table of accuracies without what stands beside them: Prefect's page is too narrow for it."""
    kept = [i for i, column in enumerate(table.columns) if column.title not in BESIDE_TITLES]
    blocks = [[[row[i] for i in kept if i < len(row)] for row in block] for block in table.blocks]
    return replace(table, columns=[table.columns[i] for i in kept], blocks=blocks, caption="")


def summary_title(results: RunResults) -> str:
    """Return the description of the summary: what the run found, or how many rows it did."""
    sentences = [sentence for section in results.sections for sentence in section.sentences]
    return in_markdown(public(sentences[0])) if sentences else counted_now(results.extracted)


def described_figure(figure: Figure) -> str:
    """Return Markdown with a figure's title, which may hold names, and what it shows."""
    return f"{_code(figure.title)}\n\n{figure.says}"


def described(table: Table) -> str:
    """Return Markdown with a table's title, which may hold names, and its caption."""
    return "\n\n".join([_code(table.title), table.caption]).strip()


def _listed(found: Sequence[str], written: Callable[[str], str] | None = None) -> list[str]:
    """Return lines as a list, the first ones of many, and how many more there are."""
    written = written or _code
    more = len(found) - _MOST_LINES
    shown = [f"- {written(public(line)[:_LONGEST_LINE])}" for line in found[:_MOST_LINES]]
    return [*shown, f"- and {more} more, on the report's page"] if more > 0 else shown


def _file_line(path: Path) -> str:
    what = KNOWN_FILES.get(path.name)
    return f"- {_place(path, path.name)}" + (f": {what}" if what else "")


def _place(path: Path, text: str) -> str:
    """Return where something is; a link where one leads there from any machine."""
    return f"{_code(text)} ([open]({quote(str(path), safe=':/')}))" if is_remote(path) else _code(text)


def _code(text: str) -> str:
    """Return a text that no page reads as markup. Prefect would show the backslashes of other ways to escape."""
    line = " ".join(printable(public(text)).split())
    return f"`{line.replace('`', '?')}`"
