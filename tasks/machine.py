"""Memory and disk of this machine, in bytes."""

import os
import shutil
from pathlib import Path

from negcore.store.files import is_remote


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
