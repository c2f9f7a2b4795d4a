"""The decorator that makes a function of a `Step` a Prefect task."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from negcore.errors import NegError
from tasks.pool.base import Stopped
from tasks.steps import Step


def step_task(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of a `Step` a Prefect task that tells the step's watchers when it ends.

    Without Prefect, the task's `fn` is called. Under it, a failure that is neither a stop nor the user's error is tried
    once more.
    """

    def decorate(work: Callable[..., Any]) -> Any:
        @wraps(work)
        def watched(step: Step, *args: Any) -> Any:
            with step:
                return work(step, *args)

        return task(watched, name=name, cache_policy=NO_CACHE, retries=1, retry_condition_fn=_may_retry)

    return decorate


def _may_retry(task: Any, task_run: Any, state: Any) -> bool:
    return not isinstance(state.result(raise_on_failure=False), (Stopped, NegError))
