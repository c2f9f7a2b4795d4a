"""The state of a flow run that had nothing to do, because another run works on its directory."""

from prefect.client.schemas.objects import State, StateType


def skipped(reason: str) -> State:
    """Return the final state "Skipped"; `reason` names who works instead.

    Its type is CANCELLED, as of runs that Prefect's own limits turn away: nothing was computed, so nobody who asks for
    the type (`state.is_completed()`, the pages' charts) may take it for finished work. It is no failure either:
    schedules go on, nothing is retried, and notifications of failures stay silent. Automations and deployment triggers
    match names: "Skipped" sets off those that expect `prefect.flow-run.Skipped`, and neither those for Completed nor
    those for Cancelled.
    """
    return State(type=StateType.CANCELLED, name="Skipped", message=reason)
