"""A flow run's own state, as its Prefect server sees it: whether it is cancelled, or taken for dead though it lives.

A Prefect worker, or `neg serve`, sends a signal to its flow runs when they are cancelled, unless it has lost sight of
them while the server was away. A flow run that was started by hand gets no signal. So each asks for its own state.
"""

import contextvars
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Running

logger = logging.getLogger(__name__)

_POLL_S = 2.0
_SIGNAL_S = 60.0
"""A worker needs less to end a run that is cancelled."""


@contextmanager
def stopped_by_cancellation(stop: threading.Event) -> Iterator[threading.Event]:
    """Set `stop` once the flow run around this block is cancelled and no worker ends it.

    A run that is marked as crashed, because no heartbeat arrived while the server was away, is set to running again.

    Yields
    ------
    threading.Event
        Set if `stop` was set for that reason.
    """
    context = FlowRunContext.get()
    assert context is not None, "only a flow run can be cancelled"
    watch = _Watch(context.flow_run, stop)
    # A copy of the context, because it holds the address of a private server.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(watch.look,), daemon=True)
    thread.start()
    try:
        yield watch.cancelled
    finally:
        watch.left.set()
        thread.join()  # it must not set the run to running after its end


class _Watch:
    """Looks at the state of a flow run until it is cancelled or left."""

    def __init__(self, flow_run: FlowRun, stop: threading.Event) -> None:
        self.cancelled, self.left = threading.Event(), threading.Event()
        self._id, self._stop = flow_run.id, stop
        self._patience_s = _SIGNAL_S if flow_run.deployment_id is not None else 0.0
        self._cancelling_since: float | None = None

    def look(self) -> None:
        # Without the client's patience: whoever leaves waits for the last look.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            while not self.left.wait(_POLL_S) and not self.cancelled.is_set():
                try:
                    self._act(client)
                except (httpx.HTTPError, PrefectException) as error:  # the run needs no server, and it may come back
                    logger.debug("cannot read the state of flow run %s: %s", self._id, error)

    def _act(self, client: SyncPrefectClient) -> None:
        state = client.read_flow_run(self._id).state
        if state is None:
            return
        if state.type in (StateType.CANCELLING, StateType.CANCELLED):
            self._cancelling_since = self._cancelling_since or time.monotonic()
            if time.monotonic() - self._cancelling_since >= self._patience_s:
                self.cancelled.set()
                self._stop.set()
        elif state.type == StateType.CRASHED and not self.left.is_set():
            logger.warning("the Prefect server took this run for dead (%s): it is told better", state.message)
            client.set_flow_run_state(self._id, Running(message="The run is alive; its heartbeats were not heard."))
