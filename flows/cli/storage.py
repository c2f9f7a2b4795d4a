"""Commands about what a run directory holds: what is done and missing, and whether it is whole."""

from typing import Annotated

import typer
from rich.markup import escape

from flows.cli.options import RunDirectory
from flows.cli.terminal import quiet_libraries
from flows.cli.terminal import repair as repair_shards
from flows.show.console import console, tell
from negcore.store.files import location


def verify(
    directory: RunDirectory,
    repair: Annotated[bool, typer.Option("--repair", help="Compute what is damaged or missing again.")] = False,
) -> None:
    """Check every shard against its receipt (size, checksum, place, columns, row ids), and results against the shards.

    Examples: `neg verify runs/NAME`, `neg verify runs/NAME --repair`

    Reads every byte and changes nothing. The exit code is 1 if a shard is damaged or missing, lies in the wrong place
    or belongs to another run, or if a table, probe or report is not what the finished run made of these shards. With
    --repair, the receipts of damaged shards are removed, never those of good ones, and the run of DIR/run.yaml is
    started again: it computes exactly what has no receipt. Then everything is checked again.
    """
    quiet_libraries()
    from flows.show.inspect_tables import checked, manifest_lines, verified_lines, verified_tables

    place = location(directory).absolute()
    found = checked(place, console)
    if repair and any(one.faults for one in found):
        repair_shards(found)
        found = checked(place, console)
    for table in verified_tables(found, place):
        console.print(table)
    of_results, warnings = manifest_lines(place)
    problems = verified_lines(found, place) + of_results
    for problem in problems:
        tell("wrong", problem)
    for warning in warnings:
        tell("warning", warning)
    if problems:
        raise typer.Exit(1)


def status(directory: RunDirectory) -> None:
    """Tell what a run has done, what is missing or set aside, how fast it is, and the time left.

    Example: `neg status runs/NAME`

    Reads receipts alone and loads no model, so it can be asked at any time, also while the run goes on. Shards are
    not opened: `neg verify` does that. The pace is that of the present session: every shard counts with the time since
    the one before it, and where that is a pause of the run, neither counts.
    """
    from flows.show.inspect_tables import status_lines, status_tables
    from tasks.rundir.status import run_status

    place = location(directory).absolute()
    found = run_status(place)
    for table in status_tables(found, place):
        console.print(table)
    for line in status_lines(found, place):
        console.print(escape(line), soft_wrap=True, highlight=False)
