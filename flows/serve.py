"""Serve run files: scheduled Prefect deployments whose runs one process of this machine starts."""

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from rich.markup import escape

from flows.show.console import console
from negcore.errors import RunError
from tasks.config.kinds import RUN_KINDS
from tasks.config.reading import read_run_file, recorded_run
from tasks.config.run_file import RunFile

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment


def deployments(
    run_files: Sequence[Path], flow_name: str | None = None, *, cron: str | None = None, name: str | None = None
) -> "list[RunnerDeployment]":
    """Make a deployment of each run file.

    Parameters
    ----------
    run_files : sequence of Path
        Run files or run directories.
    flow_name : str, optional
        Flow that all of them are for, as in `RUN_KINDS`. By default each file's kind.
    cron : str, optional
        When runs are due, in UTC. By default when somebody asks for one.
    name : str, optional
        Of the deployment. By default that of the run directory.

    Raises
    ------
    RunError
        If a run file or the schedule is not valid, or two deployments would have the same name.
    """
    _check_schedule(cron)
    if flow_name not in (None, *RUN_KINDS):
        raise RunError(f"flow is {flow_name!r}, but must be one of {', '.join(RUN_KINDS)}")
    if flow_name is None:
        runs = [recorded_run(path) for path in run_files]
    else:
        runs = [read_run_file(RUN_KINDS[flow_name].run_class, path, {}) for path in run_files]
    names = [name or run.directory.name for run in runs]
    _check_names(names)
    return [_deployment(run, flow_name or run.kind, one, cron) for run, one in zip(runs, names, strict=True)]


def _deployment(run: RunFile, flow_name: str, name: str, cron: str | None) -> "RunnerDeployment":
    from prefect.deployments.runner import EntrypointType

    from flows.prefect_flows import prefect_flow

    return prefect_flow(flow_name).to_deployment(
        name=name,
        cron=cron,
        parameters={"run": run.model_copy(update={"out": run.directory}).model_dump(mode="json")},
        tags=["neg", flow_name],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def serve_runs(served: "Sequence[RunnerDeployment]") -> None:
    """Register deployments with the configured Prefect server and start their runs, one at a time, until interrupted.

    A scheduled run that comes due while another of its deployment is under way is skipped. The server may be lost and
    come back: a run under way goes on, and schedules after it. A first SIGINT, SIGTERM or SIGHUP cancels the run under
    way and pauses the schedules; a second one does not wait.

    Raises
    ------
    RunError
        If no Prefect server is configured, or the configured one does not answer or registers nothing.
    """
    from prefect.settings import PREFECT_API_URL

    from tasks.server import prefect_api

    if not PREFECT_API_URL.value():
        raise RunError(
            "PREFECT_API_URL is not set, but schedules need a server that stays: start one with "
            "`prefect server start --host 127.0.0.1` and set PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    with prefect_api(Path()) as api, contextlib.suppress(asyncio.CancelledError):
        api.wait_ready()
        asyncio.run(_serve(served))


async def _serve(served: "Sequence[RunnerDeployment]") -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    from flows.lasting_runner import LastingRunner

    runner = LastingRunner()
    for deployment in served:
        try:
            await runner.aadd_deployment(deployment)
        except PrefectHTTPStatusError as error:
            status = error.response.status_code
            raise RunError(f"{deployment.name!r} cannot be registered: Prefect's server answers {status}") from error
    for deployment in served:
        console.print(escape(await described(deployment)), highlight=False, soft_wrap=True)
    console.print("Ctrl-C stops: it cancels the run under way, which goes on with the next one, and pauses schedules")
    serving = asyncio.create_task(runner.start())

    async def stop() -> None:
        if runner.started:
            await runner.astop()
        else:
            serving.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:  # under nohup
            continue
        asyncio.get_running_loop().add_signal_handler(number, lambda: asyncio.create_task(stop()))
    await serving


async def described(deployment: "RunnerDeployment") -> str:
    """Return what is served, where its numbers go, and when the next run is due."""
    from prefect.server.schemas.schedules import CronSchedule  # the client's own does not know its dates

    name = f"{deployment.flow_name}/{deployment.name}"
    schedules = [CronSchedule.model_validate(one.schedule.model_dump()) for one in deployment.schedules or ()]
    due = [date for schedule in schedules for date in await schedule.get_dates(1)]
    when = f"next run {min(due).astimezone(UTC):%Y-%m-%d %H:%M} UTC" if due else "on request"
    how = "" if due else f": in the Prefect UI, or with prefect deployment run '{name}'"
    return f"serving {name} in {(deployment.parameters or {})['run']['out']}: {when}{how}"


def _check_schedule(cron: str | None) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        if cron is not None:
            CronSchedule(cron=cron)
    except ValidationError:
        raise RunError(
            f"the schedule is {cron!r}, but must be five fields, minute hour day month weekday, like '0 2 * * *'"
        ) from None


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"several run files would be served as {name!r}: leave out --name, or give each its own out")
