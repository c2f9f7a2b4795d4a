"""Result of the check that every model passes before it is measured: one row a comparison of two ways to one number."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from negcore.errors import ModelError

Compared = Literal["logits", "neurgrad", "batch", "prefix", "virtual"]
Verdict = Literal["passed", "failed", "absent"]
"""`absent`: the model has no such way. All are of one length, so that the bytes of a shard can be foreseen."""

COMPARED: MappingProxyType[Compared, str] = MappingProxyType(
    {
        "logits": "last-token logits against the untouched model",
        "neurgrad": "NeurGrad against plain autograd",
        "batch": "a batch of two prompts against one prompt",
        "prefix": "a shared prefix against none",
        "virtual": "virtual sweep against hooks",
    }
)
"""Title of every comparison."""

TOLERANCES: MappingProxyType[str, Mapping[Compared, float]] = MappingProxyType(
    {
        dtype: MappingProxyType(
            {"logits": logits, "neurgrad": neurgrad, "batch": logits, "prefix": logits, "virtual": virtual}
        )
        for dtype, logits, neurgrad, virtual in (
            ("float64", 1e-5, 1e-4, 1e-4),
            ("float32", 1e-4, 1e-3, 1e-3),
            ("float16", 0.03, 0.1, 1e-3),
            ("bfloat16", 0.2, 0.5, 1e-3),
        )
    }
)
"""Largest relative difference that rounding makes, by number type: ten times what right models show, or two in half
types, where only coarse faults can be told from rounding.

The float64 ones are wide because the reference attention of transformers, and many models' norms, round to float32;
sweeps of half types are computed in float32.
"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two ways to the same numbers."""

    name: Compared
    tolerance: float
    """Largest difference that passes."""
    difference: float | None = None
    """Relative difference of the two ways; None where they were not compared."""
    note: str = ""
    """The reason why they were not compared: a part that the model lacks, or the error that ended one of the ways."""
    applies: bool = True
    """False where the model does not have this path."""

    @property
    def passed(self) -> bool:
        """True where both ways agree, or there is only one."""
        return not self.applies or (self.difference is not None and self.difference <= self.tolerance)

    @property
    def verdict(self) -> Verdict:
        """Outcome in a word."""
        if not self.applies:
            return "absent"
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
    """Remarks: parts that the check's prompt is too short for, or that round more than the rest."""
    replaced: tuple[str, ...] = ()
    """One line for every comparison that failed on a faster way, which a slower one stands in for."""

    def __getitem__(self, name: Compared) -> Comparison:
        return next(one for one in self.comparisons if one.name == name)

    @property
    def failed(self) -> tuple[Comparison, ...]:
        """The comparisons that failed."""
        return tuple(one for one in self.comparisons if not one.passed)

    @property
    def passed(self) -> bool:
        """True where every way of the model's family can be used."""
        return not self.failed

    def in_place_of(self, faster: "ModelCheck", consequence: str) -> "ModelCheck":
        """Return this check of a slower way, with what failed on the faster way that it takes the place of."""
        comparisons = (
            one if one.applies or before.passed else before
            for one, before in zip(self.comparisons, faster.comparisons, strict=True)
        )
        return replace(
            self, comparisons=tuple(comparisons), replaced=tuple(f"{one}; {consequence}" for one in faster.failed)
        )

    def require(self, model: str, names: Sequence[Compared]) -> None:
        """Refuse a model whose path failed.

        Raises
        ------
        ModelError
            If one of the comparisons of these names failed; the message tells by how much.
        """
        for one in self.failed:
            if one.name in names:
                raise ModelError(
                    f"model {model!r} would be measured wrongly: the check at load found {one}{_hint(one)}"
                )

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of a shard: verdicts and tolerances, which do not vary from worker to worker."""
        return {one.name: {"tolerance": one.tolerance, "verdict": one.verdict} for one in self.comparisons}

    @classmethod
    def expected(cls, dtype: str) -> "ModelCheck":
        """Return a check that found no difference; a shard's metadata are as long with any other."""
        return cls(tuple(Comparison(name, tolerance, 0.0) for name, tolerance in TOLERANCES[dtype].items()))

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "ModelCheck":
        """Return what `as_json` made JSON of.

        Raises
        ------
        TypeError, KeyError
            If the values are something else.
        """
        return cls(
            tuple(Comparison(**one) for one in values["comparisons"]), tuple(values["notes"]), tuple(values["replaced"])
        )


def _hint(one: Comparison) -> str:
    is_half = one.difference is not None and one.tolerance > TOLERANCES["float32"][one.name]
    return "; in a half type rounding alone can do that: load it as float32" if is_half else ""
