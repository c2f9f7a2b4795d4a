"""The command that serves runs under Prefect."""

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.machine import check_machine
from flows.cli.terminal import quiet_libraries
from tasks.config.kinds import RUN_KINDS


def serve(
    run_files: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run files (YAML), or run directories.")],
    flow: Annotated[
        str | None,
        typer.Option(
            help=f"Command that carries the run files out: {', '.join(RUN_KINDS)}. By default the kind of each file.",
        ),
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option(help="When runs are due, in UTC: minute hour day month weekday. By default on request."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the deployment. By default the run directory's.")] = None,
) -> None:
    """Run run files on a schedule, or when asked to in the Prefect UI, one at a time, on this machine.

    Example: `neg serve runs/NAME --cron "0 2 * * *"`

    Needs a Prefect server that stays (`prefect server start`) and its address in PREFECT_API_URL. A run that is due
    while the one before still goes on is dropped. Ctrl-C cancels the run under way and pauses the schedules.
    """
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")  # the log is all there is to see here
    quiet_libraries()
    check_machine()
    from flows.serve import deployments, serve_runs

    serve_runs(deployments(run_files, flow, cron=cron, name=name))
