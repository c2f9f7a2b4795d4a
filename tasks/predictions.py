"""Answers of every probe to every test prompt, row by row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from negcore.arrays import Ints
from negcore.store.reader import NegSplit
from tasks.rundir.tables import write_arrow

PREDICTIONS_FILE = "predictions.arrow"

_NAME = pa.dictionary(pa.int32(), pa.string())
_SCHEMA = pa.schema(
    [
        ("model", _NAME),
        ("shots", pa.int8()),
        ("dataset", _NAME),
        ("group", _NAME),
        ("probe", _NAME),
        ("id", _NAME),
        ("gold", pa.int16()),
        ("predicted", pa.int16()),
        ("right", pa.bool_()),
    ]
)
"""A row is one probe's answer to one test prompt. `group` is the prompt's own, `gold` and `predicted` are indices of
options. Names are stored once and referred to by number: there is a row for every prompt and every probe."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Answers of all probes to the test prompts of one dataset."""

    model: str
    shots: int
    dataset: str
    ids: Sequence[str]
    groups: Sequence[str]
    gold_P: NDArray[np.integer[Any]]
    predicted_P: Mapping[str, Ints]
    """Options answered, by probe."""

    @classmethod
    def of(cls, test: NegSplit, shots: int, predicted_P: Mapping[str, Ints]) -> "Predictions":
        """Return the answers of probes to a test split, by probe."""
        return cls(test.place.model, shots, test.place.dataset, test.ids, test.groups, test.gold_P, predicted_P)

    @property
    def table(self) -> pa.Table:
        """The answers as rows: probe after probe, in each the prompts in their order."""
        probes, n_rows = list(self.predicted_P), len(self.ids)
        gold = np.tile(np.asarray(self.gold_P, np.int16), len(probes))
        predicted = np.concatenate([np.asarray(self.predicted_P[probe], np.int16) for probe in probes])
        columns = [
            _names([self.model], np.zeros(len(gold), np.int32)),
            pa.array(np.full(len(gold), self.shots, np.int8)),
            _names([self.dataset], np.zeros(len(gold), np.int32)),
            _tiled(self.groups, len(probes)),
            _names(probes, np.repeat(np.arange(len(probes), dtype=np.int32), n_rows)),
            _tiled(self.ids, len(probes)),
            pa.array(gold),
            pa.array(predicted),
            pa.array(gold == predicted),
        ]
        return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _names(names: Sequence[str], numbers: NDArray[np.int32]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array(names, pa.string()))


def _tiled(names: Sequence[str], times: int) -> pa.DictionaryArray:
    coded = pa.array(names, pa.string()).dictionary_encode()
    return pa.DictionaryArray.from_arrays(np.tile(coded.indices.to_numpy(), times), coded.dictionary)


def write_predictions(root: Path, predictions: Sequence[Predictions]) -> None:
    """Write the answers to the datasets of a run as one table in its directory.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    # A file of Arrow has one dictionary for each column.
    table = pa.concat_tables([one.table for one in predictions]).unify_dictionaries().combine_chunks()
    write_arrow(root / PREDICTIONS_FILE, table)
