"""Prompts by row and answer, where rows were asked in several orders of their options.

Shapes: P prompts, R rows, O options by letter, A options by answer (as many).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negcore.arrays import Floats, Ints
from negcore.orders import LETTERS, split_id


@dataclass(frozen=True, eq=False)
class AnswerView:
    """Prompts by row and answer, whatever order each asks in.

    Made for prompts that were asked in the given order alone, it has a row for every prompt, and letters are answers.
    """

    rows: tuple[str, ...]
    """Ids of the rows, in the order of their first prompts: length R."""
    row_P: Ints
    """Index of each prompt's row in `rows`."""
    answer_PO: Ints
    """Answer at each letter of each prompt."""

    @classmethod
    def of(cls, ids: Sequence[str], n_options: int, *, permuted: bool) -> "AnswerView":
        """Return the view of prompts by their ids; `permuted` if these hold orders."""
        if not permuted:
            return cls(tuple(ids), np.arange(len(ids)), np.tile(np.arange(n_options), (len(ids), 1)))
        named = [split_id(id_) for id_ in ids]
        numbers = {row: number for number, row in enumerate(dict.fromkeys(one.row for one in named))}
        answer_PO = np.array([[LETTERS.index(letter) for letter in one.order] for one in named], np.int64)
        return cls(tuple(numbers), np.array([numbers[one.row] for one in named]), answer_PO)

    @property
    def n_rows(self) -> int:
        """R."""
        return len(self.rows)

    @cached_property
    def letter_PA(self) -> Ints:
        """Letter at which each answer stands in each prompt."""
        return np.argsort(self.answer_PO, axis=1)

    @cached_property
    def n_orders_R(self) -> Ints:
        """Number of each row's prompts."""
        return np.bincount(self.row_P, minlength=self.n_rows)

    @property
    def is_given_P(self) -> NDArray[np.bool_]:
        """True for each prompt that asks in the given order."""
        given: NDArray[np.bool_] = (self.answer_PO == np.arange(self.answer_PO.shape[1])).all(axis=1)
        return given

    def answers_P(self, letters_P: NDArray[Any]) -> Ints:
        """Return the answers at one letter of each prompt, such as the gold or the chosen one."""
        return np.asarray(self.answer_PO[np.arange(len(self.row_P)), letters_P], np.int64)

    def letters_P(self, answers_R: NDArray[Any]) -> Ints:
        """Return the letter of each prompt at which its row's answer stands."""
        return np.asarray(self.letter_PA[np.arange(len(self.row_P)), np.asarray(answers_R)[self.row_P]], np.int64)

    def of_rows(self, answers_P: NDArray[Any]) -> Ints:
        """Return one value for each row of values that its prompts share, such as the gold answer: shape (R,)."""
        values_R = np.empty(self.n_rows, np.int64)
        values_R[self.row_P] = answers_P
        return values_R

    def by_answer(self, values_PO: NDArray[Any]) -> NDArray[Any]:
        """Return values with their letters (axis 1 of two or more) replaced by answers: (P, A, ...)."""
        at = self.letter_PA.reshape(*self.letter_PA.shape, *[1] * (values_PO.ndim - 2))
        return np.take_along_axis(values_PO, at, axis=1)

    def sums(self, values_P: NDArray[Any]) -> Floats:
        """Return the sums of prompts' values over the orders of each row, in float64: (R, ...)."""
        sums_R = np.zeros((self.n_rows, *values_P.shape[1:]))
        np.add.at(sums_R, self.row_P, values_P)
        return sums_R

    def means(self, values_P: NDArray[Any]) -> Floats:
        """Return the means of prompts' values over the orders of each row, in float64: (R, ...)."""
        return self.sums(values_P) / self.n_orders_R.reshape(-1, *[1] * (values_P.ndim - 1))
