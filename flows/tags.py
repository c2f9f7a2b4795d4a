"""Tags of a flow run in Prefect: what kind of run it is and what it is about, to find it among others."""

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

from negcore.texts import printable
from tasks.config.run_file import RunFile

logger = logging.getLogger(__name__)

_MOST_SUBJECTS = 6
"""Datasets that are tags of their own: of a whole benchmark, they would fill the page."""


def tag_flow_run(run: RunFile) -> None:
    """Add the tags of a run to those that the flow run under way has."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    tags = list(dict.fromkeys([*context.flow_run.tags, *run_tags(run)]))
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(context.flow_run.id, tags=tags)
    except (httpx.HTTPError, PrefectException) as error:  # a run needs no server
        logger.debug("the flow run cannot be tagged: %s", error)


def run_tags(run: RunFile) -> list[str]:
    """Return kind, models, and datasets or facts if they are few; of paths only the last part."""
    return list(map(printable, _tags(run)))


def _tags(run: RunFile) -> Iterator[str]:
    yield run.kind
    yield from (f"model: {_short(name)}" for name in run.model)
    if len(run.subjects) <= _MOST_SUBJECTS:
        yield from (f"data: {_short(name)}" for name in run.subjects)


def _short(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name
