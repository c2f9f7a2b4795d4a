"""The parts that all flows share: one driver a run directory, a report at the end, and the news for Prefect."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import Cancelled
from rich.console import Console

from flows.cancellation import stopped_by_cancellation
from flows.lost_server import told_when_back
from flows.show.about import about_run
from flows.show.check_tables import check_section, check_warnings
from flows.show.drawing import png_of
from flows.show.model_names import told_apart
from flows.show.report import RunResults, write_report
from flows.show.summary import described, described_figure, run_summary, summary_title
from flows.skipped import skipped
from flows.stuck_runs import end_stuck_runs
from flows.tags import tag_flow_run
from negcore.errors import NegError, RunError, typed_line
from negcore.store.files import n_bytes
from negcore.texts import printable, public
from tasks.config.run_file import RUN_FILE, RunFile
from tasks.forecast.workers import Needs, choose_workers, device_warnings
from tasks.pool.base import Stopped
from tasks.pool.ray_session import ray_session
from tasks.rundir.checks import read_checks
from tasks.rundir.claim import HeldError, claim
from tasks.rundir.manifest import begin, finish, mixed_versions, shards_of
from tasks.steps import PrefectSteps, Steps
from tasks.withheld import Withheld, withholding

E = TypeVar("E", bound=RunResults)
R = TypeVar("R", bound=RunFile)

_local_log = logging.getLogger("neg-local")
"""Log of this process, whatever loggers of ours Prefect is told to record."""

_CANCELLED = "finished shards are kept, and the same run goes on from them"
_MOST_LOGGED = 20
"""Problems, and rows set aside, that are named in the log."""


class IncompleteRun(RunError):
    """A run ended with something missing; what there is, is in `results`."""

    def __init__(self, results: RunResults) -> None:
        count = len(results.problems)
        super().__init__(
            f"the run is not whole: {count} problem{'s' * (count > 1)}, the first is {public(results.problems[0])}"
        )
        self.results: Any = results  # of the flow's own kind


def run_work(work: Callable[[R, Steps], E]) -> Callable[[R, Steps], E]:
    """Do a flow's work under the claim of its run directory; leave a report there and, of a whole run, a manifest."""

    @wraps(work)
    def worked(run: R, steps: Steps) -> E:
        is_claimed = steps.has_claimed(run.directory)
        claimed = nullcontext() if is_claimed else claim(run.directory, when_lost=steps.stop.set)
        with claimed, told_apart(run.model_names.values()):
            before, started = begin(run.directory), datetime.now(UTC)
            results = work(run, steps)
            results.problems += moved_away(run)
            shards = shards_of(run.directory)
            results.warnings += mixed_versions(shards.values())
            noted_checks = list(read_checks(run.directory))
            results.checks = check_section(noted_checks)
            results.warnings += check_warnings(noted_checks)
            for table in (table for section in results.sections for table in section.tables):
                steps.table(table.key, table.records(), described(table))
            results.about = about_run(run.directory, shards, started)
            with noted(results):
                write_report(results)
            if not results.problems:
                with noted(results):
                    finish(run.directory, before, shards)
            return results

    return worked


def moved_away(run: RunFile) -> list[str]:
    """Return a problem if the directory is not where it was when the run began: what it holds now is only a part."""
    if n_bytes(run.directory / RUN_FILE) is not None:
        return []
    return [
        f"{run.directory} was moved or emptied while the run went on ({RUN_FILE} is gone): name the directory where it "
        "is now, and the run goes on from the shards there"
    ]


def attempt(
    steps: Steps, results: RunResults, task: Any, name: str, *args: Any, ends: tuple[type[Exception], ...] = ()
) -> Any | None:
    """Return what a step gives, or None and one more problem of the results: the other steps go on.

    Parameters
    ----------
    ends : tuple of exception types, optional
        Errors that no other step would survive either: they are raised.
    """
    try:
        return steps.run(task, name, *args)
    except (Stopped, KeyboardInterrupt):
        raise
    except Exception as error:
        if isinstance(error, ends):
            raise
        results.problems.append(f"{name}: {typed_line(error)}")
        return None


@contextmanager
def noted(results: RunResults) -> Iterator[None]:
    """Add what cannot be written to the problems of the results, which are shown all the same."""
    try:
        yield
    except RunError as error:
        results.problems.append(f"{error}")


def under_prefect(work: Callable[[R, Steps], E], run: R) -> E:
    """Do a flow's work inside that flow: all of it, or until the flow run is cancelled.

    A run of a deployment is skipped if another run holds its directory, waits for nodes of the cluster without limit,
    and waits at its end for a server that is away.

    Returns
    -------
    E
        The results; of a flow run that is cancelled or skipped, the state in which Prefect is to end it.

    Raises
    ------
    IncompleteRun
        If something is missing from the results.
    HeldError
        If another run holds the directory of a flow run that was started by hand.
    Withheld
        If the run failed: Prefect records it, and it quotes no row. The log of this process alone has the error itself.
    """
    try:
        with withholding(IncompleteRun, HeldError):
            return _under_prefect(work, run)
    except Withheld as withheld:
        line = printable(typed_line(withheld.error))
        _local_log.error("%s", line, exc_info=None if isinstance(withheld.error, NegError) else withheld.error)
        raise


def outlive_readers() -> None:
    """Let this process go on once nobody reads its output: rich ends it, and a worker that is killed reads no more."""
    Console.on_broken_pipe = _fall_silent  # type: ignore[assignment, method-assign]


def _fall_silent(console: Console) -> None:
    console.quiet = True


def _under_prefect(work: Callable[[R, Steps], E], run: R) -> E:
    outlive_readers()
    tag_flow_run(run)
    steps, is_deployed = PrefectSteps(run.directory), _is_deployed()
    if is_deployed:
        run = run.model_copy(update={"wait_for_nodes": True})
        end_stuck_runs(FlowRunContext.get().flow_run)
    with told_when_back() if is_deployed else nullcontext():
        try:
            with stopped_by_cancellation(steps.stop) as cancelled:
                results = work(run, steps)
        except HeldError as error:
            if not is_deployed:
                raise
            return skipped(str(error))  # type: ignore[no-any-return]
        except Stopped:
            if not cancelled.is_set():
                raise
            return Cancelled(message=_CANCELLED)  # type: ignore[no-any-return]
    public_figures = (figure for section in results.sections for figure in section.figures if not figure.is_private)
    if figure := next(public_figures, None):
        steps.picture(figure.name, png_of(figure), described_figure(figure))
    steps.note("summary", run_summary(results), summary_title(results))
    _log(results)
    if results.problems:
        raise IncompleteRun(results)
    return results


def _is_deployed() -> bool:
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def _log(results: RunResults) -> None:
    """Name in the flow run's log what is missing, needs care or was set aside."""
    logger = get_run_logger()
    logging.getLogger("prefect.flow_runs").addFilter(_WITHOUT_TRACEBACK)
    for level, what, lines in (
        (logging.ERROR, "missing", results.problems),
        (logging.WARNING, "warning", results.warnings),
        (logging.WARNING, "set aside", results.set_aside),
    ):
        for line in lines[:_MOST_LOGGED]:
            logger.log(level, "%s: %s", what, printable(public(line)))
        if len(lines) > _MOST_LOGGED:
            logger.log(level, "%s: %d more, see %s", what, len(lines) - _MOST_LOGGED, results.directory)


class _WithoutTraceback(logging.Filter):
    """A filter that drops the traceback of an incomplete run from Prefect's log: its problems say all."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], IncompleteRun):
            record.exc_info = None
        return True


_WITHOUT_TRACEBACK = _WithoutTraceback()


@contextmanager
def run_session(run: RunFile) -> Iterator[None]:
    """Keep Ray up inside the block, if the run's workers are actors."""
    with ray_session(run.ray_address) if run.backend == "ray" else nullcontext():
        yield


def fitted(run: R, needs: Needs, roots: Iterable[Path], steps: Steps, results: RunResults) -> R:
    """Return a run with the workers that are chosen for it, and tell who watches; once, in the driver.

    Parameters
    ----------
    needs : callable
        As of `choose_workers`.
    roots : iterable of Path
        Directories that hold its shards: those that were measured on another kind of device become a warning.
    """
    choice = choose_workers(run, needs)
    steps.tell(choice.line)
    results.warnings += device_warnings(choice, roots)
    return run.model_copy(update=choice.fields)


def listed(names: Sequence[str]) -> str:
    """Return names in one short line, and of files and folders only the last part."""
    short = [Path(name).name if Path(name).is_absolute() else name for name in names]
    return ", ".join(short) if len(short) <= 3 else f"{short[0]} and {len(short) - 1} more"
