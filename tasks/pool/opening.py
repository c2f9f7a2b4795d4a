"""Open a pool of workers, in this process or of Ray actors."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from tasks.pool.base import Pool, Resources
from tasks.pool.local_pool import LocalPool
from tasks.pool.ray_pool import RayPool
from tasks.pool.ray_session import ray_session

__all__ = ["open_pool"]

Backend = Literal["local", "ray"]


@contextlib.contextmanager
def open_pool(
    backend: Backend, cls: type, kwargs: Mapping[str, Any], resources: Resources, *, label: str
) -> Iterator[Pool]:
    """Open a pool of workers, each made by ``cls(**kwargs)`` when there is work for it.

    Parameters
    ----------
    backend : {"local", "ray"}
        "local" runs the jobs in this process, one after the other; "ray" in actors. Inside `ray_session` that session
        is used; otherwise one is opened for this pool.
    cls : type
        The worker's class, importable where the actors run.
    kwargs : mapping
        The constructor's arguments, small plain data.
    resources : Resources
    label : str
        Name of the pool in messages.

    Yields
    ------
    Pool

    Raises
    ------
    RunError
        If no node of the cluster is large enough for a worker, or the cluster cannot be reached.
    """
    if backend == "local":
        yield LocalPool(cls, kwargs, resources, label)
        return
    with ray_session(resources.address), contextlib.closing(RayPool(cls, kwargs, resources, label)) as pool:
        yield pool
