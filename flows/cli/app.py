"""The command line: `neg`."""

import signal
import sys
from contextlib import suppress
from functools import wraps
from typing import Annotated, Any

import typer
from rich.text import Text

from flows.cli.computing import benchmark, demo, plan, run_command
from flows.cli.data import datasets, models
from flows.cli.doctor import doctor
from flows.cli.importing import import_table
from flows.cli.looking import compare
from flows.cli.matching import match
from flows.cli.neurons import neuron, neurons
from flows.cli.options import Command
from flows.cli.publish import publish
from flows.cli.serving import serve
from flows.cli.standard_output import OutputLost, output_kept
from flows.cli.steer import steer
from flows.cli.storage import status, verify
from flows.cli.tables import export, sql
from flows.cli.terminal import stop_on_signals
from flows.cli.utilisation import mui
from flows.cli.view import view
from flows.show.console import console, errors, show_all_through_consoles, tell
from negcore import __version__
from negcore.errors import NegError
from tasks.config.kinds import RUN_KINDS

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Neuron empirical gradients at scale: how much every feed-forward neuron of a language model moves the "
    "probability of an answer, and what that says about the model's skills.",
    epilog="Exit codes of runs: 0 whole; 1 something is missing, and named; 2 refused, in one line; 3 whole but for "
    "rows that could not be computed and were set aside; 130 stopped. The same command goes on where a run ended.",
)


def main() -> None:
    """Run the command line and exit with its code, 1 if its output is lost."""
    show_all_through_consoles()
    stop_on_signals()
    try:
        with output_kept():
            code = _exit_code()
    except OutputLost as error:
        tell("error", str(error))
        code = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop but Python's own end
    sys.exit(code)


def _exit_code() -> int:
    """Run the command line; what the user can correct is a line and exit code 2."""
    try:
        return app(standalone_mode=False) or 0
    except NegError as error:
        tell("error", str(error))
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        tell("error", f"{str(error.filename2 or error.filename)!r} cannot be used: {error.strerror}")
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # of typer, which keeps the class of its errors to itself
            raise
        _tell_usage(error)
        return 2


def _tell_usage(error: Any) -> None:
    """Tell what is wrong with the command line; a command without arguments shows its help."""
    context = error.ctx
    if context is not None and type(error).__name__ == "NoArgsIsHelpError":
        console.print(Text(context.get_help()))
        return
    advice = f"; see {context.command_path} --help" if context is not None else ""
    tell("error", f"{error.format_message().rstrip('.')}{advice}")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        console.print(f"neg-at-scale {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None: ...


def _commands(*commands: Command) -> dict[str, Command]:
    return {command.__name__: command for command in commands}


PANELS: dict[str, dict[str, Command]] = {
    "Models and data": {**_commands(models, datasets), "import": import_table},
    "Computing": {
        **_commands(demo),
        **{name: run_command(name, kind) for name, kind in RUN_KINDS.items()},
        **_commands(plan, benchmark),
    },
    "Looking into runs": _commands(compare, match, mui, neurons, neuron, sql, export, steer, view),
    "Storage": _commands(status, verify, publish),
    "Machines and servers": _commands(doctor),
    "Prefect": _commands(serve),
}
"""Every command by name, as the help shows them."""


def _stoppable(command: Command) -> Command:
    """Return the command so that Ctrl-C ends it with a line."""

    @wraps(command)
    def stoppable(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            with suppress(OSError):  # the terminal may be gone
                errors.print("stopped")
            raise typer.Exit(130) from None

    return stoppable


for _panel, _of_panel in PANELS.items():
    for _name, _command in _of_panel.items():
        app.command(_name, rich_help_panel=_panel)(_stoppable(_command))
