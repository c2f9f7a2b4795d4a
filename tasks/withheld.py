"""Failures as Prefect may tell them: its pages, logs and events are for more people than the rows of a dataset are.

Prefect records the type, the message and the traceback of whatever ends a task or a flow, those of its causes too. So
what leaves is a `Withheld`: without a cause, and with a message that quotes no row. The error itself is in it, for the
terminal of a run that was started by hand.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from negcore.errors import NegError
from negcore.texts import public
from tasks.pool.base import Stopped

_PANIC = "PanicException"
"""Type of what Rust code raises, such as that of tokenizers: it is no `Exception`."""


class Withheld(NegError):
    """An error without the texts of rows that it may quote."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(_public_message(error))
        self.error = error
        """The error itself, for this machine alone."""


@contextmanager
def withholding(*passing: type[Exception]) -> Iterator[None]:
    """Let errors leave the block only as `Withheld`; requests to stop and the given types leave it as they are."""
    try:
        yield
    except BaseException as error:
        is_failure = isinstance(error, Exception) or type(error).__name__ == _PANIC
        if not is_failure or isinstance(error, (Stopped, Withheld, *passing)):
            raise
        raise Withheld(error) from None


def itself(error: BaseException) -> BaseException:
    """Return the error that was withheld, or an error that was not."""
    return error.error if isinstance(error, Withheld) else error


def _public_message(error: BaseException) -> str:
    if isinstance(error, NegError):
        return f"{type(error).__name__}: {public(f'{error}')}"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {frames[-1].name}, line {frames[-1].lineno} of {frames[-1].filename}" if frames else ""
    return f"{type(error).__name__}{place}: its message may quote rows, and is in the log of the run's process alone"
