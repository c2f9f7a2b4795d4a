"""The choice of a run's workers: as many as this machine, or the Ray cluster that the run joins, has room for."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.config.run_file import RunFile
from tasks.forecast.needs import WorkerNeeds
from tasks.machine import Room, in_binary_units, room_here
from tasks.pool.nodes import rooms
from tasks.rundir.checks import read_checks

Needs = Callable[[float], Iterable[WorkerNeeds]]
"""Function of the share of a GPU of each worker that returns the memory that workers of each model need."""


@dataclass(frozen=True)
class Choice:
    """The workers of a run, and why."""

    fields: dict[str, Any]
    """Values of the run file's fields that were not given."""
    line: str
    """The workers and the reason, in one line for people."""
    device: str
    """Type of the device that they compute on."""


def is_here(run: RunFile) -> bool:
    """Tell whether the workers run on this machine, and not in a cluster that the driver joins."""
    return run.backend == "local" or (run.ray_address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def choose_workers(run: RunFile, needs: Needs) -> Choice:
    """Choose what the run file leaves open: a whole GPU for each worker if there are any, and how many workers.

    There are as many workers as GPUs, or else as cores and memory allow, and at least one. Values that are given stay.
    A run in a cluster must have joined it.

    Parameters
    ----------
    run : RunFile
    needs : callable
        As in `Needs`. Of several models, the largest decides.
    """
    there = [room_here()] if is_here(run) else rooms(dict(run.resources.node_labels))
    if run.backend == "local":
        return _in_this_process(run, there[0])
    gpus = _gpus(run, there) if run.gpus is None else run.gpus
    device = run.device.partition(":")[0] if run.device else "cuda" if gpus else "cpu"
    needed = list(needs(gpus))
    is_elsewhere = device == "cuda" and run.device_map in (None, "disk")
    a_worker = max((one.host_bytes if is_elsewhere else one.bytes_on_cpu for one in needed), default=0)
    beside = max((one.driver_bytes for one in needed), default=0) if is_here(run) else 0
    most = sum(_n_fitting(room, run.cpus, gpus, a_worker, beside) for room in there)
    workers = run.workers or _n_workers(run, most, gpus)
    remarks = [*_memory(a_worker), *_left_alone(run, there, gpus), *_room(run, workers, most)]
    line = "; ".join([f"{_who(run, workers, gpus)}: {_there(there)}", *remarks])
    return Choice({"workers": workers, "gpus": gpus}, line, device)


def device_warnings(choice: Choice, directories: Iterable[Path]) -> list[str]:
    """Return a line if shards of a run that goes on were measured on another kind of device."""
    before = {one.device for directory in directories for one in read_checks(directory)} - {choice.device}
    if not before:
        return []
    return [
        f"the run began on {' and '.join(sorted(before))}, and what is missing is measured on {choice.device}: last "
        "digits may differ (--gpus and --device choose)"
    ]


def _in_this_process(run: RunFile, there: Room) -> Choice:
    device = run.device or ("cuda" if there.gpus else "cpu")
    where = run.device or ("the first GPU" if there.gpus else "the CPU")
    line = f"1 worker in this process, on {where}, {_cores(run.cpus)}: {_there([there])}"
    return Choice({}, line, device.partition(":")[0])


def _gpus(run: RunFile, there: Sequence[Room]) -> float:
    """Choose a whole GPU for each worker if a machine has one, unless devices are named."""
    is_usable = any(room.gpus >= 1 and room.cores >= run.cpus for room in there)
    return float(is_usable and not _names_devices(run) and run.device in (None, "cuda"))


def _names_devices(run: RunFile) -> bool:
    """Tell whether the run names devices one by one: these are shared by hand."""
    return run.device not in (None, "cpu", "cuda") or isinstance(run.device_map, dict)


def _n_workers(run: RunFile, most: int, gpus: float) -> int:
    if not gpus and (run.device == "cuda" or _names_devices(run)):
        return 1  # all would be on that one device
    return max(1, most, int(room_here().cores) if _grows(run) else 1)


def _grows(run: RunFile) -> bool:
    return run.wait_for_nodes and not is_here(run)


def _n_fitting(room: Room, cpus: int, gpus: float, bytes_a_worker: int, beside_bytes: int) -> int:
    """Return how many workers fit on a machine."""
    most = int(room.cores) // cpus
    if gpus:
        most = min(most, int(room.gpus // gpus) if gpus >= 1 else int(room.gpus) * int(1 / gpus))
    if bytes_a_worker:
        most = min(most, (room.memory_bytes - beside_bytes) // bytes_a_worker)
    return max(0, most)


def _who(run: RunFile, workers: int, gpus: float) -> str:
    share = "a GPU" if gpus == 1 else f"{gpus:g} GPU{'s' * (gpus > 1)}"
    each = _cores(run.cpus) + (f" and {share}" if gpus else "")
    given = ", as set" if run.workers is not None else ""
    return f"{_count(workers, 'worker')} of {each} each{given}"


def _there(there: Sequence[Room]) -> str:
    """Return in words what all machines offer together."""
    n_gpus = _n_gpus(there)
    amounts = [_count(n_gpus, "GPU")] if n_gpus else []
    amounts += [_cores(int(sum(room.cores for room in there)))]
    amounts += [f"{in_binary_units(sum(room.memory_bytes for room in there))} of main memory"]
    return ", ".join(amounts) + (f" on {len(there)} nodes" if len(there) > 1 else "")


def _n_gpus(there: Sequence[Room]) -> int:
    return int(sum(room.gpus for room in there))


def _memory(a_worker: int) -> Iterator[str]:
    if a_worker:  # else there is no model
        yield f"a worker takes about {in_binary_units(a_worker)} of it"


def _left_alone(run: RunFile, there: Sequence[Room], gpus: float) -> Iterator[str]:
    n_gpus = _n_gpus(there)
    if n_gpus and not gpus and not (run.device or "").startswith("cuda"):
        yield f"{_count(n_gpus, 'GPU')} left alone (--gpus 1 uses them)"


def _room(run: RunFile, workers: int, most: int) -> Iterator[str]:
    """Tell of a number of workers that does not fit, or leaves room for more."""
    if workers > most:
        yield f"room for {most} now" + (", the cluster may grow" if _grows(run) else "")
    elif workers < most and run.workers is not None:
        yield f"room for {most} (--workers)"


def _cores(number: int) -> str:
    return _count(number, "core")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
