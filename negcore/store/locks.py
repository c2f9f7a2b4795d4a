"""Locks of local files: the kernel's, or on a file system without locks a file that stands for one."""

import errno
import fcntl  # not on Windows: negcore refuses to be imported there
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import SoftFileLease

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})


def hold(handle: IO[bytes], *, wait: bool = True) -> bool:
    """Lock an open file until it is closed or this process dies; tell whether its file system has locks.

    Raises
    ------
    BlockingIOError
        If somebody else holds it and `wait` is false.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock for the length of a block. The kernel lets go when the holder dies.

    Where the file system has no locks, a file ``FILE.held`` that is created exclusively stands for one. A dead holder's
    file counts for nothing as soon as its machine shows no such process, or after 30 s without a sign of life from
    another machine.
    """
    with file.open("ab") as handle:
        if hold(handle):
            yield
            return
    with SoftFileLease(f"{file}.held"):
        yield
