"""Numbers and texts as people read them in tables, figures and lines."""

import math
import re

from negcore.texts import printable as printable


def bare(number: str) -> str:
    """Return a written number without the zero before its point."""
    return re.sub(r"^([+-]?)0\.", r"\1.", number)


def share(value: float) -> str:
    """Return a share with three decimals."""
    return bare(f"{value:.3f}") if value < 0.9995 else "1.00"


def change(value: float) -> str:
    """Return a difference of shares with its sign."""
    return bare(f"{value:+.3f}")


def correlation(value: float) -> str:
    """Return three decimals; four where three would round up to one, which only a perfect correlation shows."""
    if math.isnan(value):
        return "-"
    if 0.99995 <= value < 1:
        return ">.9999"
    if value == 1:
        return "1.00"
    return bare(f"{value:.{4 if 0.9995 <= abs(value) < 1 else 3}f}")


def times(ratio: float) -> str:
    """Return a ratio with two digits, as so many times as much."""
    return f"{ratio:.0f}x" if ratio >= 10 or ratio == 0 else f"{ratio:.1f}x"


def duration(seconds: float) -> str:
    """Return a length of time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


def count(number: int, what: str) -> str:
    """Return a number of things, such as "1 shard" or "2 shards"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
