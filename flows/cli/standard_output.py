"""Output is never lost in silence, and a reader who leaves early does not end what it computes."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class OutputLost(Exception):
    """Standard output cannot be written: what the command had to say did not arrive."""


class _Kept:
    """A stream that raises `OutputLost` for what it cannot write, unless nobody reads it any more or needs it."""

    def __init__(self, stream: Any, *, is_needed: bool = True) -> None:
        self._stream = stream
        self._is_needed = is_needed
        self._is_unread = False
        # A terminal that is gone fails like a damaged disk.
        self._of_no_reader = (errno.EPIPE, errno.EIO) if stream.isatty() else (errno.EPIPE,)

    def write(self, text: str) -> int:
        with self._loss_told():
            return len(text) if self._is_unread else int(self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        with self._loss_told():
            if not self._is_unread:
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _loss_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._is_needed and error.errno not in self._of_no_reader:
                raise OutputLost(f"the output cannot be written: {error.strerror or error}") from error
            self._is_unread = True
            _discard(self._stream)


def _discard(stream: Any) -> None:
    """Send nowhere what else is written to the stream's file, by child processes too, and what it still holds back."""
    with suppress(OSError, ValueError):  # it is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def output_kept() -> Iterator[None]:
    """Tell inside the block if standard output cannot be written; a reader who left, of errors too, is nobody's error.

    Raises
    ------
    OutputLost
        Also at once, if it is closed.
    """
    stream, errors = sys.stdout, sys.stderr
    if stream is None:
        raise OutputLost("the output cannot be written: standard output is closed; use > /dev/null to do without")
    sys.stdout = _Kept(stream)
    if errors is not None:
        sys.stderr = _Kept(errors, is_needed=False)
    try:
        yield
    except OutputLost:
        sys.stdout = None  # or Python would try what is left once more at its end
        raise
    finally:
        if sys.stdout is not None:
            sys.stdout = stream
        sys.stderr = errors
