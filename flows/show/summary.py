"""The summary of a whole run on Prefect's pages: its rows, its report and its files."""

from pathlib import Path
from urllib.parse import quote

from flows.show.report import KNOWN_FILES, RunResults, counted_now, files_of
from flows.show.table import Table
from negcore.store.files import is_remote
from negcore.texts import printable, public

_MOST_LINES = 20
_LONGEST_LINE = 300


def run_summary(results: RunResults) -> str:
    """Return Markdown that counts a run's rows and links its report and files; it holds no prompt.

    Browsers follow a link to a file only on the machine that has it, and not from every page, so paths are written out
    too.
    """
    lines = [f"**{counted_now(results.extracted)}**", ""] if results.extracted else []
    lines += [f"- {_code(section.title)}" for section in results.sections if section.title]
    lines += ["", f"Run directory: {_linked(results.directory, str(results.directory))}", ""]
    lines += map(_file_line, files_of(results.directory))
    for title, found in (("Missing", results.problems), ("Warnings", results.warnings)):
        if found:
            lines += ["", f"**{title}: {len(found)}**", ""]
            lines += [f"- {_code(public(line)[:_LONGEST_LINE])}" for line in found[:_MOST_LINES]]
    return "\n".join(lines)


def described(table: Table) -> str:
    """Return Markdown with a table's title, which may hold names, and its caption."""
    return "\n\n".join([_code(table.title), table.caption]).strip()


def _file_line(path: Path) -> str:
    what = KNOWN_FILES.get(path.name)
    return f"- {_linked(path, path.name)}" + (f": {what}" if what else "")


def _linked(path: Path, text: str) -> str:
    return f"{_code(text)} ([open]({quote(str(path), safe=':/') if is_remote(path) else path.as_uri()}))"


def _code(text: str) -> str:
    """Return a text that no page reads as markup. Prefect would show the backslashes of other ways to escape."""
    line = " ".join(printable(public(text)).split())
    return f"`{line.replace('`', '?')}`"
