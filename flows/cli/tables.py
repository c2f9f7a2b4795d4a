"""Commands that give the tables of runs to other programs, and answer questions about them."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, get_args

import typer

from flows.cli.options import RunDirectory
from flows.cli.terminal import doing
from flows.show.console import console, errors, tell
from flows.show.format_names import SUFFIXES, FormatName
from negcore.errors import RunError
from negcore.store.files import location, output
from negcore.texts import printable

if TYPE_CHECKING:
    import pyarrow as pa

Format = Annotated[
    FormatName | None,
    typer.Option("--format", help="csv; md: Markdown; latex: a tabular for booktabs; parquet, which needs --out."),
]
Out = Annotated[str | None, typer.Option(help="File to write, or s3://BUCKET/KEY. By default to standard output.")]

_MOST_ROWS = 100
"""Rows of an answer that are shown as a table; other formats hold all of them."""


def sql(
    run: RunDirectory,
    query: Annotated[
        str | None, typer.Argument(metavar="QUERY", help="One SELECT, as DuckDB reads it. By default the views.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Short for --format csv.")] = False,
    form: Format = None,
    out: Out = None,
) -> None:
    """Ask a run's tables, prompts and NEGs in SQL. The run is only read, and nothing beyond it.

    Example: `neg sql runs/NAME "select probe, avg(accuracy) from accuracy where subgroup = '' group by probe"`

    Views: every table of results, such as accuracy, predictions and comparisons (those in a folder as skills.causal);
    prompts, with a row for every prompt and its probabilities; negs(L), with a row for every prompt, option and neuron
    of layer L, read when it is asked for. Without a query, the views and their columns are shown. Needs DuckDB:
    `pip install 'neg-at-scale[look]'`.
    """
    from flows.show.answer_table import answer_table
    from tasks.rundir.query import LIST_VIEWS
    from tasks.rundir.query import query as answer

    if csv and form not in (None, "csv"):
        raise RunError(f"--csv and --format {form} contradict each other: give one of them")
    name = format_of("csv" if csv else form, out)
    root = location(run).absolute()
    try:
        with doing("asking the run"):
            found = answer(root, LIST_VIEWS if query is None else query)
    except KeyboardInterrupt:
        _end_at_once()
    warn_of(root)
    if name is None:
        console.print(answer_table(found, _MOST_ROWS))
    else:
        deliver(found, name, out)


def _end_at_once() -> NoReturn:
    """End the program although DuckDB may still compute, which nothing but the end of the process stops at once."""
    with suppress(OSError):  # the terminal may be gone
        errors.print("stopped")
    os._exit(130)


def export(
    run: RunDirectory,
    form: Annotated[
        FormatName, typer.Option("--format", help="csv; md: Markdown; latex: tabulars for booktabs; parquet.")
    ] = "csv",
    table: Annotated[
        list[str] | None, typer.Option(help="Table to write, such as accuracy or skills/causal. Repeatable.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder to write to. By default RUN/export.")] = None,
) -> None:
    """Write the tables of a run as CSV, Markdown, LaTeX or Parquet, one file each.

    Example: `neg export runs/NAME --format latex --table accuracy --out paper`

    By default all tables are written. CSV and Parquet keep every digit; Markdown and LaTeX round to four. In CSV, a
    text that a spreadsheet would take for a formula gets an apostrophe in front, and is counted.
    """
    from tasks.rundir.tables import read_arrow, result_tables

    root = location(run).absolute()
    known = result_tables(root)
    if not known:
        raise RunError(f"{str(root)!r} holds no tables of results: give the directory of a run that has finished")
    if missing := [name for name in table or () if name not in known]:
        raise RunError(f"{str(root)!r} has no table {missing[0]!r}: name one of {', '.join(known)}")
    warn_of(root)
    folder = root / "export" if out is None else location(out)
    for name in dict.fromkeys(table or known):
        path = folder / f"{name}.{SUFFIXES[form]}"
        deliver(read_arrow(known[name]), form, str(path))
        console.print(f"written to {path}", highlight=False, markup=False, soft_wrap=True)


def format_of(name: FormatName | None, out: str | None) -> FormatName | None:
    """Return the format to write in, before anything is read for it; None to show a table in the terminal.

    Raises
    ------
    RunError
        If there is a file but no format, or Parquet without a file.
    """
    if out is not None and name is None:
        raise RunError(f"--out needs a format: add --format with {', '.join(get_args(FormatName))}")
    if out is None and name == "parquet":
        raise RunError("parquet is no text to be shown: give --out FILE")
    return name


def warn_of(root: Path) -> None:
    """Refuse a finished run whose tables or shards have changed; warn of one that is not finished."""
    from tasks.rundir.manifest import check_results
    from tasks.rundir.tables import result_tables

    if warning := check_results(root, list(result_tables(root).values())):
        tell("warning", warning, "yellow")


def deliver(table: "pa.Table", name: FormatName, out: str | None) -> None:
    """Write a table in a format, to a file or to standard output; `RunError` if that is not possible."""
    from flows.show.formats import written

    content, n_marked = written(table, name)
    if out is not None:
        with output(location(out)) as file:
            file.write_bytes(content)
    else:
        text = content.decode()
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    if n_marked:
        tell("warning", f"{n_marked} texts begin like formulas: an apostrophe was put in front of each", "yellow")
