"""Standard output that is not lost in silence: a full disk or a closed file ends the command with one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OutputLost(Exception):
    """Standard output cannot be written: what the command had to say did not arrive."""


class _Kept:
    """A stream that raises `OutputLost` for what it cannot write; a reader that left early is nobody's error."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _loss_told():
            return int(self._stream.write(text))

    def flush(self) -> None:
        with _loss_told():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _loss_told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(f"the output cannot be written: {error.strerror or error}") from error


@contextmanager
def output_kept() -> Iterator[None]:
    """Tell inside the block if standard output cannot be written.

    Raises
    ------
    OutputLost
        Also at once, if it is closed.
    """
    stream = sys.stdout
    if stream is None:
        raise OutputLost("the output cannot be written: standard output is closed; use > /dev/null to do without")
    sys.stdout = _Kept(stream)
    try:
        yield
    except OutputLost:
        sys.stdout = None  # or Python would try what is left once more at its end
        raise
    finally:
        if sys.stdout is not None:
            sys.stdout = stream
