"""A flow run that has ended while its Prefect server is away waits to tell it: else it would stay "Running" there."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

logger = logging.getLogger(__name__)

_LIMIT_S = 86_400.0
"""A waiting run holds no worker, no claim and little memory, so a day is affordable. Then the process ends unheard."""
_POLL_S = 5.0


@contextmanager
def told_when_back() -> Iterator[None]:
    """After the block, whether it ended well or in an error, return only when the server answers again."""
    try:
        yield
    except Exception:
        _wait()
        raise
    _wait()


def _wait() -> None:
    error, since = _silence(), time.monotonic()
    if error is None:
        return
    hours = _LIMIT_S / 3600
    logger.warning(
        "the run has ended, but the Prefect server does not answer (%s): waiting up to %g h to tell it",
        " ".join(str(error).split()),
        hours,
    )
    while _silence() is not None:
        if time.monotonic() - since > _LIMIT_S:
            logger.error("the Prefect server did not answer within %g h: it does not know how the run ended", hours)
            return
        time.sleep(_POLL_S)
    logger.warning("the Prefect server answers again after %.0f s", time.monotonic() - since)


def _silence() -> Exception | None:
    """Return the error of a server that does not answer."""
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
        error: Exception | None = client.api_healthcheck()
        return error
