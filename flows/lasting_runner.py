"""A Prefect runner that outlives its server and gives every deployment one scheduled run at a time.

Prefect's own runner ends, and the run under way with it, once its server was silent for some minutes; and runs that
come due during another one queue up behind it.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from uuid import UUID

import httpx
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectException
from prefect.runner import Runner
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.skipped import skipped

logger = logging.getLogger(__name__)

_MOST_NAMED = 5
"""Missed schedules of a deployment that are named one by one."""


class LastingRunner(Runner):  # type: ignore[misc]  # of no type that is known here
    """Start the due runs of the added deployments, one at a time, also after the server was away."""

    def __init__(self) -> None:
        super().__init__(limit=1)
        self._away_since: datetime | None = None
        self._started_runs: dict[UUID, FlowRun] = {}

    async def start(self, run_once: bool = False, webserver: bool | None = None) -> None:
        """Ask for due runs and start them until `astop`."""
        async with self, self._loops_task_group:  # which `astop` cancels once the run under way has its final state
            while True:
                due = None if self.stopping else await self._due()
                if due is not None and not self.stopping:
                    await self._carry_out(due)
                await asyncio.sleep(self.query_seconds)

    async def _due(self) -> list[FlowRun] | None:
        """Return the runs that are due or soon will be; None while the server does not answer."""
        try:
            # Without the client's patience: this loop asks again anyway, and what it finds is told at once.
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                due: list[FlowRun] = await self._scheduled_run_poller._get_scheduled_flow_runs()
        except httpx.HTTPError as error:
            self._note_silence(error)
            return None
        self._note_answer(due)
        return due

    def _note_silence(self, error: httpx.HTTPError) -> None:
        if self._away_since is None:
            self._away_since = datetime.now(UTC)
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning(
                "the Prefect server does not answer (%s): a run under way goes on, schedules wait; asking again every "
                "%g s",
                reason,
                self.query_seconds,
            )

    def _note_answer(self, due: Sequence[FlowRun]) -> None:
        if self._away_since is None:
            return
        since, self._away_since = self._away_since, None
        now = datetime.now(UTC)
        missed = [run for run in due if run.auto_scheduled and since <= _time(run) <= now]
        names = {run.deployment_id: self._deployment_registry.get_deployment_name(run.deployment_id) for run in missed}
        logger.warning(
            "the Prefect server answers again after %.0f s; came due meanwhile: %s",
            (now - since).total_seconds(),
            "; ".join(f"{name} {_times(missed, of)}" for of, name in names.items()) or "nothing",
        )

    async def _carry_out(self, due: Sequence[FlowRun]) -> None:
        """Start the first of the runs if none is under way, and end those that have nothing to do."""
        poller = self._scheduled_run_poller
        known = poller._submitting_flow_run_ids
        fresh = [run for run in due if run.id not in known]
        under_way = {run.deployment_id: run for key, run in self._started_runs.items() if key in known}
        reasons = superfluous(fresh, under_way, datetime.now(UTC))
        for run, reason in reasons.items():
            try:
                await self._client.set_flow_run_state(run, skipped(reason))
            except (httpx.HTTPError, PrefectException) as error:  # it is still due the next time
                logger.debug("flow run %s cannot be skipped: %s", run, error)
        waiting = sorted((run for run in fresh if run.id not in reasons), key=_time)
        wanted = waiting[:1] if self._limit_manager.has_slots_available() else []
        await poller._submit_scheduled_flow_runs(flow_run_response=wanted, task_group=self._runs_task_group)
        self._started_runs = {run.id: run for run in (*under_way.values(), *wanted) if run.id in known}

    async def cancel_all(self) -> None:
        """Cancel the runs under way; those of a server that is away are ended all the same."""
        if self._away_since is None:
            await super().cancel_all()
        for run in self._process_manager.flow_run_ids():
            await self._process_manager.kill(run)

    async def _pause_schedules(self) -> None:
        try:
            await super()._pause_schedules()
        except httpx.HTTPError as error:
            logger.warning("the Prefect server does not answer (%s): its schedules are not paused", error)


def superfluous(due: Collection[FlowRun], under_way: Mapping[UUID | None, FlowRun], now: datetime) -> dict[UUID, str]:
    """Return the scheduled runs that have nothing to do, and why: runs resume, so one of each deployment is enough.

    Parameters
    ----------
    due : collection of FlowRun
        Runs that have not been started. Those that somebody asked for wait for their turn, and so do early ones.
    under_way : mapping of UUID to FlowRun
        Runs under way by deployment.
    now : datetime

    Returns
    -------
    dict
        Reasons, by the ids of runs.
    """
    by_deployment: dict[UUID | None, list[FlowRun]] = defaultdict(list)
    for run in due:
        if run.auto_scheduled and _time(run) <= now:
            by_deployment[run.deployment_id].append(run)
    reasons: dict[UUID, str] = {}
    for deployment, runs in by_deployment.items():
        *earlier, last = sorted(runs, key=_time)
        if deployment in under_way:
            working = under_way[deployment]
            reason = f"flow run {working.name!r} ({working.id}) of the same deployment is under way"
            reasons |= {run.id: reason for run in runs}
        else:
            reason = f"flow run {last.name!r} ({last.id}) of the same deployment came due after it"
            reasons |= {run.id: reason for run in earlier}
    return reasons


def _time(run: FlowRun) -> datetime:
    time: datetime | None = run.next_scheduled_start_time or run.expected_start_time
    assert time is not None, "a scheduled run has a time"
    return time


def _times(runs: Sequence[FlowRun], deployment: UUID | None) -> str:
    times = sorted(_time(run) for run in runs if run.deployment_id == deployment)
    named = [time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC") for time in times[:_MOST_NAMED]]
    return ", ".join(named) + (f" and {len(times) - _MOST_NAMED} more" if len(times) > _MOST_NAMED else "")
