"""The terminal: names, rows and errors of others are shown on it, and none of them gives it an order."""

import logging
import os
import sys
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from negcore.texts import printable, shortened_lines

_WIDTH = 100
"""Into a file or a pipe, tables may get as wide; rich would take 80."""


class PlainConsole(Console):
    """A console that obeys its own styles alone: control characters in what it shows are spelled out."""

    def print(self, *objects: Any, **options: Any) -> None:
        # Before rich lays them out: it drops some of them, and counts no columns for others.
        super().print(*(printable(one) if isinstance(one, str) else one for one in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            is_harmless = segment.control or segment.text.isprintable()
            yield segment if is_harmless else Segment(printable(segment.text), segment.style)


def _console(**settings: Any) -> PlainConsole:
    made = PlainConsole(color_system=None if "NO_COLOR" in os.environ else "auto", **settings)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _WIDTH
    return made


console = _console()
errors = _console(stderr=True)


def tell(kind: str, message: str, style: str = "red") -> None:
    """Tell what is wrong on standard error, in short lines."""
    errors.print(Text.assemble((f"{kind}:", style), " ", printable(shortened_lines(message))), soft_wrap=True)


class _OnErrors(logging.Handler):
    """Shows what no other handler takes."""

    def emit(self, record: logging.LogRecord) -> None:
        errors.print(Text(printable(shortened_lines(self.format(record)))), soft_wrap=True)


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    errors.print(Text(printable("".join(traceback.format_exception(kind, error, trace)))), soft_wrap=True)


def show_all_through_consoles() -> None:
    """Show warnings, the log's and Python's, and the tracebacks of bugs through the console as well."""
    logging.lastResort = _OnErrors(logging.WARNING)
    # Prefect's handler would keep back that a run waits for up to a minute, or loses its directory.
    logging.getLogger("tasks.rundir.claim").addHandler(logging.lastResort)
    logging.captureWarnings(True)
    sys.excepthook = _traceback
