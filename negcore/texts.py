"""Texts of others inside our own lines: made harmless for a terminal, cut short, and kept back where they are private.

A message about a row of a dataset quotes it, which helps at the terminal and must not leave the machine. So the
quotation is marked, and the marks go along when messages become parts of others: a terminal shows the quotation
without them (`printable`), and Prefect and the files of a run get the message without the quotation (`public`).
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Marks around a quotation: two of Unicode's noncharacters, which exist for use inside a program."""
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_PRIVATE = re.compile(f"{_OPEN}[^{_CLOSE}]*(?:{_CLOSE}|$)")
_KEPT_BACK = "(text of the row)"


def private(text: object) -> str:
    """Mark a text of a row, which may be part of a message that leaves the machine."""
    return f"{_OPEN}{plain(str(text))}{_CLOSE}"


def public(message: str) -> str:
    """Return a message without the texts of rows; where it was cut inside of one, all the rest is kept back."""
    return plain(_PRIVATE.sub(_KEPT_BACK, message))


def plain(message: str) -> str:
    """Return a message with the texts of rows, and without their marks."""
    return _MARKS.sub("", message)


def printable(text: str) -> str:
    """Return a text with its control characters spelled out, so that no terminal obeys them; line breaks stay."""
    text = plain(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def quoted(value: object, most: int = 80) -> str:
    """Return a value as Python writes it, in at most so many characters; nothing longer is made on the way."""
    short = Repr()
    short.maxstring = short.maxother = short.maxlong = most
    return f"{short.repr(value):.{most}}"


def row_text(value: object, most: int = 80) -> str:
    """Return a `quoted` value of a row, marked as `private`."""
    return private(quoted(value, most))


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1) -> str:
    """Return a question that names the known names which are spelt most alike; empty if none is like it."""
    near = get_close_matches(name, list(dict.fromkeys(known)), n=most)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


def shortened_lines(text: str, *, longest: int = 800, most: int = 20) -> str:
    """Return a message with the middle of long lines left out, and the lines after the first ones counted."""
    lines = text.split("\n")  # others do not end a line, but are spelled out
    kept = [line if len(line) <= longest else f"{line[: longest // 2]} ... {line[-longest // 2 :]}" for line in lines]
    more = len(lines) - most
    return "\n".join(kept if more <= 0 else [*kept[:most], f"... and {more} lines more"])
