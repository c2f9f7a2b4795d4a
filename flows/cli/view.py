"""`neg view`: runs in the browser."""

from contextlib import nullcontext
from typing import Annotated

import typer
from rich.text import Text

from flows.cli.terminal import quiet_libraries
from flows.show.console import console, errors
from negcore.errors import RunError
from negcore.store.files import location


def view(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Run directory, or one that holds runs; on disk or s3://BUCKET/PREFIX.")
    ] = "runs",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine. By default a free one.")] = 0,
) -> None:
    """Show runs in the browser: an index, comparisons, each run's report, and every neuron and row behind them.

    Examples: `neg view`, `neg view runs/NAME`, `neg view runs --port 8080`

    Open the address that is printed: the token in it keeps other users and web pages out, since prompts are shown, made
    again from the run's data. The server is reached from this machine alone, and only reads. Ctrl-C ends it.
    """
    quiet_libraries()
    with console.status("starting") if console.is_terminal else nullcontext():
        from flows.view.server import serve

    try:
        serve(location(directory).absolute(), port, _tell)
    except OSError as error:
        raise RunError(f"port {port} cannot be used: {error.strerror or error}; choose another, or none") from error
    errors.print("stopped")
    raise typer.Exit(130)


def _tell(address: str) -> None:
    console.print(Text(f"open {address}"), soft_wrap=True)
    console.print("it shows prompts, to whoever has this address; Ctrl-C ends it", highlight=False)
