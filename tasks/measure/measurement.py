"""The one kind of measurement: examples go in, columns come out, a row for each example.

NEGs, sweeps, estimates, interventions and causal checks differ in their `Measurement` alone. How examples are cut into
shards, handed to workers, isolated when one fails, and published is the same for all of them: see
`tasks.measure.shard_set`, `tasks.measure.worker` and `tasks.measure.missing`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from negcore.arrays import count_nonfinite
from negcore.datasets import Example
from negcore.model.language_model import LanguageModel
from negcore.model.precision import HALF_TYPES
from negcore.store.publish import SetAside
from negcore.store.study import study_batch
from tasks.measure.examples import EncodedExample

Columns = Mapping[str, NDArray[Any]]
"""Measured arrays (P, ...) by name."""


def study_settings(settings: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the settings of what takes differences of predictions, in models of one number type.

    Models of half types take them in float32. Earlier versions did not: their numbers are rounding, and have no such
    setting.
    """
    return {**settings, "differences": "float32"} if dtype in HALF_TYPES else dict(settings)


class ColumnType(NamedTuple):
    """The type of a column."""

    dtype: Any
    shape: tuple[int, ...] = ()
    """Shape of one example's values."""


class Nonfinite(NamedTuple):
    """NaN and infinite values of one example."""

    row: int
    n_values: int
    where: str
    """Layers or columns that hold them, for people."""


class Measurement(ABC):
    """Settings that decide some numbers, and the way to measure them."""

    notes_seconds: ClassVar[bool] = False
    """True if the time that each shard took is noted beside it."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers beside the run's identity, as JSON."""

    @property
    @abstractmethod
    def axes(self) -> dict[str, Any]:
        """Return what the values of a row stand for, as JSON: every file says it."""

    @abstractmethod
    def column_types(self, n_options: int) -> Mapping[str, ColumnType]:
        """Return the type of every column that `measure` returns."""

    @abstractmethod
    def measure(self, lm: LanguageModel, examples: Sequence[EncodedExample]) -> Columns:
        """Measure examples, at least one."""

    def left_out(self, examples: Sequence[Example]) -> list[SetAside]:
        """Return the examples that cannot be measured, as known beforehand."""
        return []

    def rows(self, columns: Columns, kept: Sequence[int]) -> Columns:
        """Return the columns of some of their rows."""
        return {name: values[kept] for name, values in columns.items()}

    def record_batch(self, examples: Sequence[Example], columns: Columns) -> pa.RecordBatch:
        """Return the rows of a shard."""
        return study_batch(examples, columns)

    def about(self, n_options: int) -> dict[str, Any]:
        """Return what a file says of its columns, as JSON."""
        return {"axes": self.axes}

    def nonfinite(self, columns: Columns) -> list[Nonfinite]:
        """Return where NaN and infinite values would be in a shard, which holds float32; one item an example."""
        counts = {name: count_nonfinite(values) for name, values in columns.items() if values.dtype.kind == "f"}
        total_P = np.sum(list(counts.values()), axis=0)
        return [
            Nonfinite(row, int(total_P[row]), ", ".join(name for name, count_P in counts.items() if count_P[row]))
            for row in np.flatnonzero(total_P).tolist()
        ]

    def empty(self, n_options: int) -> Columns:
        """Return the columns of no example: a shard's if all of its rows are set aside."""
        types = self.column_types(n_options)
        return {name: np.empty((0, *type_.shape), type_.dtype) for name, type_ in types.items()}
