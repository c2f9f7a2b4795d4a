"""Findings of checks that a person reads: what was looked at, whether it is well, and what to set."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Judgement = Literal["good", "look", "bad"]

MEANINGS: MappingProxyType[Judgement, str] = MappingProxyType(
    {"good": "nothing to do", "look": "works, but read on", "bad": "does not work, or gives wrong numbers"}
)
"""Meaning of every judgement, the best first."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    judgement: Judgement
    found: str
    """One line."""
    advice: str = ""
    """The remedy, in one line; empty where nothing is to be done."""
