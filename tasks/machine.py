"""Cores, GPUs, memory and disk of this machine."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from negcore.store.files import is_remote


@dataclass(frozen=True)
class Room:
    """The room for workers on one machine."""

    cores: float
    gpus: float
    memory_bytes: int


def room_here() -> Room:
    """Return the room on this machine."""
    import torch

    return Room(cores(), torch.cuda.device_count(), memory_bytes())


def cores() -> int:
    """Return the cores that this process and its workers may use: the machine's, or a container's limit."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota_us, period_us = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(usable, int(quota_us) // int(period_us)))
    except (OSError, ValueError):  # no such limit
        return usable


def in_binary_units(n_bytes: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def free_bytes(directory: Path) -> int | None:
    """Return the free bytes of the disk of a directory, which need not exist yet; None in a bucket."""
    if is_remote(directory):
        return None
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    return shutil.disk_usage(there).free


def memory_bytes() -> int:
    """Return the main memory that this process and its workers may use: the machine's, or a container's limit."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(installed, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit
        return installed
