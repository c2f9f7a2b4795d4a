"""The Prefect flow of every run kind, as an attribute of this module: `flows.prefect_flows.pipeline` and so on.

A flow takes one parameter, `run`: the fields of a run file. Prefect finds it by the name of this module and its own.
"""

from functools import cache
from typing import Any

from prefect import flow, runtime
from prefect.task_runners import ThreadPoolTaskRunner

from flows.flow_run import listed, under_prefect
from tasks.config.kinds import RUN_KINDS, load
from tasks.steps import THREADS


@cache
def prefect_flow(name: str) -> Any:
    """Make the flow of a run kind, by the name of its command."""
    kind = RUN_KINDS[name]

    def carry_out(run: Any) -> Any:
        return under_prefect(load(kind.work), run)

    def flow_run_name() -> str:
        run = kind.run_class.model_validate(runtime.flow_run.parameters["run"])
        subjects = f" on {listed(run.subjects)}" if run.subjects else ""
        return f"{name} {listed(run.model)}{subjects}"

    carry_out.__name__ = carry_out.__qualname__ = name
    carry_out.__doc__ = kind.summary
    carry_out.__annotations__["run"] = kind.run_class
    runner = ThreadPoolTaskRunner(max_workers=THREADS)
    return flow(name=name, flow_run_name=flow_run_name, task_runner=runner)(carry_out)


def __getattr__(name: str) -> Any:
    if name not in RUN_KINDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return prefect_flow(name)
