"""Temporary directories that outlive no one: a killed process's is removed by the next process that makes its own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from negcore.store.locks import hold

_PREFIX = "neg-"
_LIFE = "in-use"
"""A file in each directory that is locked while its process lives: ids of processes come again, locks do not."""


@contextmanager
def temporary_directory(parent: Path | None = None) -> Iterator[Path]:
    """Make a directory for this user only, and remove it when the block ends.

    Parameters
    ----------
    parent : Path, optional
        Directory to make it in. By default the system's for temporary files.
    """
    parent = parent or Path(tempfile.gettempdir())
    _remove_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        with (folder / f"{_LIFE}.new").open("xb") as life:
            hold(life)
            (folder / f"{_LIFE}.new").rename(folder / _LIFE)  # it is never seen unlocked while this process lives
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # dying processes may still write their logs


@cache
def _remove_abandoned(parent: Path) -> None:
    """Remove this user's directories of dead processes, once in each process; where there are no locks, none."""
    for life in parent.glob(f"{_PREFIX}*/{_LIFE}"):
        with suppress(OSError):  # it is in use, or somebody else removes it
            if life.parent.lstat().st_uid != os.getuid() or life.parent.is_symlink():
                continue
            with life.open("rb") as handle:
                if hold(handle, wait=False):
                    shutil.rmtree(life.parent, ignore_errors=True)
