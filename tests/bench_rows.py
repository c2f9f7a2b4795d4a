"""Rows of the benchmark: what was measured, beside what, and whether the goal is met."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from support import tiny_model

from negcore.measure.loading import load_model
from negcore.model.language_model import LanguageModel
from negcore.model.past import Prefixes

Work = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """What the command line decides."""

    folder: Path
    """For files that are removed at the end."""
    repeats: int = 3
    threads: int = 1
    tiny: bool = False
    """True for a tiny model and few rows: that tries the benchmark, not the machine."""

    @property
    def model(self) -> str:
        """Reference of the model that rows are about."""
        return "smollm2-135m"

    @cached_property
    def lm(self) -> LanguageModel:
        """The model, with shared prefixes kept as a worker keeps them."""
        lm = tiny_model("llama", dtype=torch.float32) if self.tiny else load_model(self.model, device="cpu")
        return replace(lm, prefixes=Prefixes())


class Goal(NamedTuple):
    """The most, or the least, that a ratio or a figure is to be."""

    limit: float
    what: Literal["ratio", "ours"] = "ratio"
    is_least: bool = False


class Row(NamedTuple):
    """One measured row; times are medians."""

    name: str
    unit: str
    ours: float
    against: str = ""
    other: float | None = None
    ratios: Sequence[float] = ()
    """Ratio of every repeat."""
    goal: Goal | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over the other."""
        return None if self.other is None else self.ours / self.other

    @property
    def is_met(self) -> bool | None:
        """True if the goal is met; None if there is none."""
        if self.goal is None:
            return None
        value = self.ratio if self.goal.what == "ratio" else self.ours
        assert value is not None, self
        return value >= self.goal.limit if self.goal.is_least else value <= self.goal.limit

    def record(self) -> dict[str, Any]:
        """Return the row as JSON."""
        goal = None if self.goal is None else self.goal._asdict()
        return {**self._asdict(), "ratio": self.ratio, "goal": goal, "met": self.is_met}


class Item(NamedTuple):
    """Something to measure, and its name while that goes on."""

    name: str
    measure: Callable[[], list[Row]]


def compared(
    setting: Setting,
    name: str,
    against: str,
    unit: str,
    works: Callable[[], tuple[Work, Work]],
    *,
    units: tuple[int, int] = (1, 1),
    goal: float | None = None,
) -> Item:
    """Return the item that times two works in turns, after a first call of each.

    Parameters
    ----------
    works : callable
        Returns ours and the other's, made when their turn comes.
    units : pair of int
        Units that ours and the other's do in a call.
    goal : float, optional
        Most that ours may take of the other's time.
    """

    def measure() -> list[Row]:
        ours, other = works()
        ours(), other()
        pairs = [(seconds(ours) / units[0], seconds(other) / units[1]) for _ in range(setting.repeats)]
        our_s, other_s = (median(times) for times in zip(*pairs, strict=True))
        ratios = [one / two for one, two in pairs]
        return [Row(name, unit, our_s, against, other_s, ratios, None if goal is None else Goal(goal))]

    return Item(f"{name}, against {against}", measure)


def seconds(work: Work) -> float:
    """Return how long a work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
