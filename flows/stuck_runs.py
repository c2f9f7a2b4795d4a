"""Runs of the same deployment that never started.

An automation ends those too, but only if the server lived long enough to note the event that the run was submitted.
"""

import logging
from datetime import UTC, datetime, timedelta

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import PrefectException
from prefect.states import Crashed

logger = logging.getLogger(__name__)

_LIMIT = timedelta(hours=1)
"""As long as the automation waits: a cluster may have to start a node and pull an image first."""

_MESSAGE = "Not started within an hour after it was submitted."


def end_stuck_runs(flow_run: FlowRun) -> None:
    """Mark runs of a flow run's deployment as crashed that have been pending for more than an hour."""
    if flow_run.deployment_id is None:
        return
    pending = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[flow_run.deployment_id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING])),
    )
    try:
        with get_client(sync_client=True) as client:
            for run in client.read_flow_runs(flow_run_filter=pending):
                if run.id != flow_run.id and run.state and run.state.timestamp < datetime.now(UTC) - _LIMIT:
                    client.set_flow_run_state(run.id, Crashed(message=_MESSAGE))
    except (httpx.HTTPError, PrefectException) as error:  # the run needs no server, and the next one tries again
        logger.debug("runs that never started cannot be ended: %s", error)
