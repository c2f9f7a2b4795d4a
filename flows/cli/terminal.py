"""A run in front of a person: its progress while it goes on, its results at the end, and the exit code."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.markup import escape

from flows.cli.machine import check_machine
from flows.show.console import console, errors, tell
from tasks.config.run_file import RunFile

if TYPE_CHECKING:
    from flows.show.display import Display
    from flows.show.report import RunResults
    from tasks.rundir.verify import Verified
    from tasks.steps import Handover, Steps

R = TypeVar("R", bound=RunFile)
T = TypeVar("T")


def repair(found: "Sequence[Verified]") -> None:
    """Remove the receipts of damaged shards, and start the runs again that make the shards that are missing then."""
    check_machine()
    from flows.repair import drivers_places, repair_of, runs_to_repair
    from tasks.rundir.claim import claim
    from tasks.rundir.verify import unpublish
    from tasks.steps import handing_over

    with ExitStack() as claims:
        given = claims.enter_context(handing_over())
        with reading():
            runs = [(run, repair_of(run)) for run in runs_to_repair(found)]  # all of them, before anything is removed
        for directory in drivers_places(found):
            claims.enter_context(claim(directory))
        for one in found:
            unpublish(one)
        for run, (n_steps, work) in runs:
            for problem in carry_out(given, run, "repair", n_steps, work).problems:
                tell("missing", problem)


def carry_out(
    given: "Handover",
    run: R,
    title: str,
    n_steps: int,
    work: "Callable[[R, Steps], T]",
    prefect_flow: Callable[[R], T] | None = None,
) -> T:
    """Carry out a run with its progress on screen, and return the results that there are, even if some are missing.

    Parameters
    ----------
    given : Handover
        What the run is given beside its run file: it learns here who watches and which directory is claimed.
    prefect_flow : callable, optional
        The flow to carry it out as, under the Prefect server that is configured or private. By default without one.
    """
    from prefect.exceptions import CancelledRun
    from prefect.settings import PREFECT_API_URL

    from flows.flow_run import IncompleteRun
    from flows.show.display import Display
    from tasks.rundir.claim import claim
    from tasks.steps import PlainSteps
    from tasks.withheld import Withheld

    console.print(f"run directory: {escape(str(run.directory))}", highlight=False, soft_wrap=True)
    starts_server = prefect_flow is not None and not PREFECT_API_URL.value()
    if hint := faster_start(run, n_steps, starts_server=starts_server):
        console.print(hint, highlight=False, soft_wrap=True)
    try:
        # Claimed before anything is started: a private server would get in the way of another driver's.
        with claim(run.directory, when_lost=given.stop.set), Display(console, title, n_steps) as display:
            given.watcher, given.claimed = display, run.directory
            if prefect_flow is None:
                display.starting(_WORKERS[run.backend])
                return work(run, PlainSteps())
            return _under_prefect(run, display, prefect_flow)
    except Withheld as withheld:
        raise withheld.error from None
    except IncompleteRun as incomplete:
        results: T = incomplete.results
        return results
    except (KeyboardInterrupt, CancelledRun) as end:
        what = "cancelled" if isinstance(end, CancelledRun) else "stopped"
        with suppress(OSError):  # the terminal may be gone
            errors.print(f"{what}; finished shards are kept, and the same command goes on from them")
        raise typer.Exit(130) from None


_WORKERS = {"ray": "Ray", "local": "a worker in this process"}
"""The thing that is started for workers, by backend."""


def _under_prefect(run: R, display: "Display", prefect_flow: Callable[[R], T]) -> T:
    """Carry out a run as a flow; Ray starts while a private server does."""
    from flows.flow_run import run_session
    from tasks.server import prefect_api

    with ExitStack() as started:
        api = started.enter_context(prefect_api(run.local_directory / "prefect"))
        if api.private:
            display.starting(f"Prefect and {_WORKERS[run.backend]}")
            started.enter_context(run_session(run))
        api.wait_ready()
        page = api.url.removesuffix("/api")
        hint = f" (password: {run.local_directory / 'prefect' / 'password'})" if api.private else ""
        console.print(f"watch it at {escape(page + hint)}", highlight=False, soft_wrap=True)
        if not api.private:
            display.starting(_WORKERS[run.backend])
        return prefect_flow(run)


def faster_start(run: RunFile, n_steps: int, *, starts_server: bool) -> str:
    """Return a line that names the options that start a small run sooner; empty for others."""
    from tasks.forecast.workers import is_here

    if run.backend == "local" or not is_here(run) or n_steps > _FEW_STEPS:
        return ""
    options = "--backend local" + " --orchestrator none" * starts_server
    return f"so small a run starts sooner with {options}: in this process, with one worker"


_FEW_STEPS = 32
"""Parts (shards, probes) of a small run at most."""


def show(results: "RunResults") -> None:
    """Show a run's tables and where everything is; name what is missing, needs care or was set aside."""
    from flows.show.report import counted_now

    for section in results.sections:
        if section.title:
            console.print(escape(section.title), highlight=False, soft_wrap=True)
        for table in section.tables:
            console.print(table)
    if results.extracted:
        console.print(counted_now(results.extracted), highlight=False, soft_wrap=True)
    report = f"; the report is {results.report.name} there" if results.report else ""
    console.print(escape(f"written to {results.directory}{report}"), highlight=False, soft_wrap=True)
    for problem in results.problems:
        tell("missing", problem)
    for warning in results.warnings:
        tell("warning", warning, "yellow")
    for row in results.set_aside:
        tell("set aside", row, "yellow")
    if results.problems or results.set_aside:
        raise typer.Exit(1 if results.problems else 3)


def reading() -> AbstractContextManager[object]:
    """Show that tokenizers and datasets are being read."""
    return console.status("reading tokenizers and datasets") if console.is_terminal else nullcontext()


@contextmanager
def doing(what: str) -> Iterator[Callable[[str], object]]:
    """Show what a command does until the block ends, and change that by what is given; only a terminal shows it."""
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(escape(what), refresh_per_second=4) as status:
        yield lambda text: status.update(escape(text))


def stop_on_signals() -> None:
    """Have a request to end, and the loss of the terminal, end a command like Ctrl-C: nothing of it stays behind.

    Where the loss of the terminal is ignored (nohup), it stays so.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _terminated)


def _terminated(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def quiet_libraries() -> None:
    """Silence the libraries, before they are imported: the terminal belongs to our own progress."""
    for name, value in {
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
