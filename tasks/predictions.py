"""Answers of every probe to every test prompt, row by row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from negcore.arrays import Ints
from negcore.orders import split_id
from negcore.probing.letter_bias import LetterBias
from negcore.store.answers import AnswerView
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


_OF_ORDERS = pa.schema([("row", _NAME), ("order", _NAME), ("gold_answer", pa.int16()), ("answer", pa.int16())])
"""More columns, where rows were asked in several orders of their options: the prompt's row and order, and the options
of `gold` and `predicted` by their places in the given order."""


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
    view: AnswerView | None = None
    """Rows and orders of the prompts, where rows were asked in several orders of their options."""
    right_R: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """Where there is a view, whether the one decision of each row that has all orders is right, by probe; also of
    "calibrated", LM-Prob calibrated on the training rows."""

    @classmethod
    def of(
        cls, test: NegSplit, shots: int, predicted_P: Mapping[str, Ints], biases: Mapping[str, LetterBias]
    ) -> "Predictions":
        """Return the answers of probes to a test split, by probe, and their letter bias if there are several orders."""
        view = test.answers if test.identity.is_permuted else None
        right_R = {probe: bias.right_R for probe, bias in biases.items()}
        names = test.place.model, shots, test.place.dataset
        return cls(*names, test.ids, test.groups, test.gold_P, predicted_P, view, right_R)

    def right(self, probe: str) -> NDArray[np.bool_]:
        """Tell what a probe answered right: of each prompt, or of each row if these were asked in several orders."""
        right = self.right_R[probe] if self.view is not None else self.predicted_P[probe] == self.gold_P
        return np.asarray(right, bool)

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
        table = pa.Table.from_arrays(columns, schema=_SCHEMA)
        for one, column in zip(_OF_ORDERS, self._of_orders(self.view), strict=True) if self.view else ():
            table = table.append_column(one, column)
        return table

    def _of_orders(self, view: AnswerView) -> list[pa.Array]:
        """Return the columns of `_OF_ORDERS`."""
        named, n_probes = [split_id(id_) for id_ in self.ids], len(self.predicted_P)
        answers = np.concatenate([view.answers_P(predicted_P) for predicted_P in self.predicted_P.values()])
        return [
            _tiled([one.row for one in named], n_probes),
            _tiled([one.order for one in named], n_probes),
            pa.array(np.tile(view.answers_P(self.gold_P), n_probes).astype(np.int16)),
            pa.array(answers.astype(np.int16)),
        ]


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
