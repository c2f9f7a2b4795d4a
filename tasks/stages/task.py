"""The decorator that makes a function of a `Step` a Prefect task."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext

from negcore.errors import NegError
from tasks.pool.base import Stopped
from tasks.steps import Step
from tasks.withheld import itself, withholding


def step_task(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of a `Step` a Prefect task that tells watchers when the step ends, and Prefect no row's text.

    Without Prefect, the task's `fn` is called. Under it, a failure that is neither a stop nor the user's error is tried
    once more.
    """

    def decorate(work: Callable[..., Any]) -> Any:
        @wraps(work)
        def watched(step: Step, *args: Any) -> Any:
            with withholding() if TaskRunContext.get() else nullcontext(), step:
                return work(step, *args)

        return task(watched, name=name, cache_policy=NO_CACHE, retries=1, retry_condition_fn=_may_retry)

    return decorate


def _may_retry(task: Any, task_run: Any, state: Any) -> bool:
    return not isinstance(itself(state.result(raise_on_failure=False)), (Stopped, NegError))
