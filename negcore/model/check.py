"""Result of the check that every model passes before it is measured: one row a comparison of two ways to one number."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from negcore.errors import ModelError

Compared = Literal["logits", "neurgrad", "batch", "prefix", "virtual"]

COMPARED: MappingProxyType[Compared, str] = MappingProxyType(
    {
        "logits": "last-token logits against the untouched model",
        "neurgrad": "NeurGrad against plain autograd",
        "batch": "a batch of two prompts against one prompt",
        "prefix": "a shared prefix against none",
        "virtual": "virtual sweep against hooks",
    }
)
"""Title of every comparison; the first three decide whether a model is measured at all, the others have a slower twin
that stands in for them."""

REPLACEABLE: tuple[Compared, ...] = ("prefix", "virtual")
"""Paths that a slower one stands in for where they fail."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two ways to the same numbers."""

    name: Compared
    tolerance: float
    """Largest difference that rounding of the model's number type makes."""
    difference: float | None = None
    """Relative difference of the two ways; None where they were not compared."""
    note: str = ""
    """Why they were not compared: what the model has not, or the error that ended one of the two ways."""
    applies: bool = True
    """False where the model does not have this path."""

    @property
    def passed(self) -> bool:
        """True where both ways agree, or there is only one."""
        return not self.applies or (self.difference is not None and self.difference <= self.tolerance)

    @property
    def verdict(self) -> Literal["passed", "failed", "not applicable"]:
        if not self.applies:
            return "not applicable"
        return "passed" if self.passed else "failed"

    def __str__(self) -> str:
        """Tell the outcome in one line."""
        if self.difference is None:
            return f"{COMPARED[self.name]}: {self.verdict} ({self.note})"
        measured = f"difference {self.difference:.1e}, tolerance {self.tolerance:.0e}"
        return f"{COMPARED[self.name]}: {self.verdict} ({measured})"


@dataclass(frozen=True, slots=True)
class ModelCheck:
    """Outcome of the check of one loaded model: its weights, number type, site and device."""

    comparisons: tuple[Comparison, ...]
    """One for every name in `COMPARED`, in that order."""
    notes: tuple[str, ...] = ()
    """What else is to be known: parts that the check's prompt is too short for, or that round more than the rest."""

    def __getitem__(self, name: Compared) -> Comparison:
        return next(one for one in self.comparisons if one.name == name)

    @property
    def failed(self) -> tuple[Comparison, ...]:
        """The comparisons that failed."""
        return tuple(one for one in self.comparisons if not one.passed)

    @property
    def passed(self) -> bool:
        """True where every path of the model can be used."""
        return not self.failed

    def require(self, model: str) -> None:
        """Refuse a model for whose failed paths nothing stands in.

        Raises
        ------
        ModelError
            If one of `logits`, `neurgrad` and `batch` failed; the message names the first.
        """
        for one in self.failed:
            if one.name not in REPLACEABLE:
                raise ModelError(f"model {model!r} cannot be measured rightly, the check at load found: {one}")
