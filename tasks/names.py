"""Names under which things are stored, each of which must stand for one thing."""

import unicodedata
from collections.abc import Callable, Sequence

from negcore.errors import NegError, RunError


def check_distinct(what: str, given: Sequence[str], name_of: Callable[[str], str]) -> None:
    """Refuse things that would be stored under one name, also where a file system does not tell cases apart.

    Parameters
    ----------
    what : str
        Word for the things.
    given : sequence of str
        What the user calls them; the same twice is one thing.
    name_of : callable
        Function that returns the name of one. What has none is no matter here: its error comes when it is read.

    Raises
    ------
    RunError
        If two have the same name, with both.
    """
    taken: dict[str, str] = {}
    for one in dict.fromkeys(given):
        try:
            name = name_of(one)
        except NegError:
            continue
        other = taken.setdefault(unicodedata.normalize("NFC", name).casefold(), one)
        if other != one:
            raise RunError(
                f"{what} {other!r} and {one!r} would both be stored as {name!r}: give one of them, rename a file, or "
                "give them a run each"
            )
