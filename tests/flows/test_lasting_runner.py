"""Which due runs `neg serve` skips, and what it says of a lost server; see test_lost_server_of_schedules.py too."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun, StateType

from flows.lasting_runner import LastingRunner, superfluous
from flows.skipped import skipped

NOW = datetime(2026, 1, 2, 3, 0, tzinfo=UTC)
NIGHTLY, WEEKLY = uuid4(), uuid4()


def run(deployment, minutes, *, auto=True):
    """A run that is due some minutes from now."""
    time = NOW + timedelta(minutes=minutes)
    return FlowRun(flow_id=uuid4(), deployment_id=deployment, auto_scheduled=auto, next_scheduled_start_time=time)


def test_of_several_scheduled_runs_of_a_deployment_the_last_is_left():
    old, older, other, last = (run(*at) for at in ((NIGHTLY, -5), (NIGHTLY, -9), (WEEKLY, -7), (NIGHTLY, -1)))
    reasons = superfluous([old, older, other, last], {}, NOW)
    assert reasons.keys() == {old.id, older.id}
    assert all(f"({last.id}) of the same deployment came due after it" in reason for reason in reasons.values())


def test_while_a_run_is_under_way_no_other_scheduled_run_of_its_deployment_is_left():
    working, due, other = run(NIGHTLY, -60), run(NIGHTLY, -1), run(WEEKLY, -1)
    reasons = superfluous([due, other], {NIGHTLY: working}, NOW)
    assert reasons == {due.id: f"flow run {working.name!r} ({working.id}) of the same deployment is under way"}


def test_runs_that_somebody_asked_for_and_early_ones_wait_for_their_turn():
    asked, early = run(NIGHTLY, -1, auto=False), run(NIGHTLY, 0.1)
    assert superfluous([asked, early], {NIGHTLY: run(NIGHTLY, -60)}, NOW) == {}


def test_a_skipped_run_is_final_and_neither_failed_nor_completed():
    state = skipped("somebody works there")
    assert (state.type, state.name, state.message) == (StateType.CANCELLED, "Skipped", "somebody works there")
    assert state.is_final() and not state.is_failed() and not state.is_completed()


class Poller:
    """Answers like a server that is away for some polls."""

    def __init__(self, *answers):
        self.answers = list(answers)

    async def _get_scheduled_flow_runs(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("silent"),
        httpx.HTTPStatusError("busy", request=httpx.Request("GET", "http://a"), response=httpx.Response(503)),
    ],
    ids=lambda error: str(error),
)
def test_serving_tells_once_that_its_server_is_away_and_names_what_it_missed_when_it_is_back(error, caplog):
    runner = LastingRunner()
    runner._deployment_registry.register_deployment(NIGHTLY, "nightly")
    missed = FlowRun(flow_id=uuid4(), deployment_id=NIGHTLY, auto_scheduled=True)

    async def story():
        runner._scheduled_run_poller = Poller([], error, error, [missed], [])
        heard = [await runner._due() for _ in range(3)]
        missed.next_scheduled_start_time = datetime.now(UTC)
        return [*heard, await runner._due(), await runner._due()]

    with caplog.at_level(logging.WARNING, "flows.lasting_runner"):
        assert asyncio.run(story()) == [[], None, None, [missed], []]
    away, back = [record.message for record in caplog.records]
    assert away.startswith(f"the Prefect server does not answer ({error})")
    assert f"came due meanwhile: nightly {missed.next_scheduled_start_time:%Y-%m-%d %H:%M:%S UTC}" in back
