"""Cancellation of a flow run: the driver stops its stages and keeps what is finished.

A Prefect worker, or `neg serve`, sends a signal to its flow runs when they are cancelled. A flow run that was started
by hand gets no signal, so it asks for its own state.
"""

import contextvars
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

logger = logging.getLogger(__name__)

_POLL_S = 2.0


@contextmanager
def stopped_by_cancellation(stop: threading.Event) -> Iterator[threading.Event]:
    """Set `stop` once the flow run around this block is cancelled and no worker ends it.

    Yields
    ------
    threading.Event
        Set if `stop` was set for that reason.
    """
    context = FlowRunContext.get()
    assert context is not None, "only a flow run can be cancelled"
    cancelled, left = threading.Event(), threading.Event()
    if context.flow_run.deployment_id is None:  # started by hand
        # A copy of the context, because it holds the address of a private server.
        run = contextvars.copy_context().run
        args = (_watch, context.flow_run.id, cancelled, stop, left)
        threading.Thread(target=run, args=args, daemon=True).start()
    try:
        yield cancelled
    finally:
        left.set()


def _watch(flow_run: UUID, cancelled: threading.Event, stop: threading.Event, left: threading.Event) -> None:
    with get_client(sync_client=True) as client:
        while not left.wait(_POLL_S):
            try:
                state = client.read_flow_run(flow_run).state
            except (httpx.HTTPError, PrefectException) as error:  # the run needs no server, and it may come back
                logger.debug("cannot read the state of flow run %s: %s", flow_run, error)
                continue
            if state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED):
                cancelled.set()
                stop.set()
                return
