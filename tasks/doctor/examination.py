"""All checks of the machine at once, each for a limited time."""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from negcore.errors import NegError, first_line
from negcore.findings import Finding
from tasks.doctor import machine, servers

Check = Callable[[], Iterator[Finding]]

LONGEST_S = 10.0
"""Limit for a check: of names that no server resolves, the system may look for longer."""

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "packages": machine.check_packages,
        "device": machine.check_devices,
        "memory": machine.check_memory,
        "disk": machine.check_disks,
        "hub": servers.check_hub,
        "models here": machine.check_models,
        "Prefect": servers.check_prefect,
        "Ray": servers.check_ray,
        "ports": machine.check_ports,
    }
)
"""All checks, in the order of their findings."""

_LIMITS_S = {"device": machine.DEVICE_S + LONGEST_S}


def examine(checks: Mapping[str, Check] = CHECKS) -> Iterator[Finding]:
    """Make all checks side by side and yield their findings in order, each as soon as those before it are there.

    A check that fails or does not end in time is a finding too, and stands in nobody's way.
    """
    begun = time.monotonic()
    running = {name: _Running(check) for name, check in checks.items()}
    for name, one in running.items():
        limit_s = _LIMITS_S.get(name, LONGEST_S)
        yield from one.findings(name, begun + limit_s - time.monotonic(), limit_s)


class _Running:
    """A check in a thread of its own, which ends with the process at the latest."""

    def __init__(self, check: Check) -> None:
        self._found: list[Finding] = []
        self._error: Exception | None = None
        context = contextvars.copy_context()  # settings of Prefect may hold for this one alone
        self._thread = threading.Thread(target=context.run, args=(self._make, check), daemon=True)
        self._thread.start()

    def _make(self, check: Check) -> None:
        try:
            self._found.extend(check())
        except Exception as error:  # what a broken installation raises cannot be foreseen
            self._error = error

    def findings(self, name: str, wait_s: float, limit_s: float) -> list[Finding]:
        self._thread.join(max(wait_s, 0))
        found = list(self._found)
        if self._thread.is_alive():
            found.append(Finding(name, "look", f"no answer within {limit_s:g} s: the rest of this was left out"))
        elif self._error is not None:
            is_ours = isinstance(self._error, NegError)
            found.append(Finding(name, "bad", str(self._error) if is_ours else first_line(self._error)))
        return found
