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
from negcore.store.identity import RunIdentity


@dataclass(frozen=True, eq=False)
class AnswerView:
    """Prompts by row and answer, whatever order of its options each asks in.

    Where prompts ask in the given order alone, every prompt is a row, and letters are answers.
    """

    rows: tuple[str, ...]
    """Ids of the rows, in the order of their first prompts: length R."""
    row_P: Ints
    """Place of each prompt's row in `rows`."""
    answer_PO: Ints
    """Answer at each letter of each prompt: the place of the option in the given order."""

    @classmethod
    def of(cls, ids: Sequence[str], n_options: int, *, permuted: bool) -> "AnswerView":
        """Return the view of prompts by their ids, which hold their orders if they are `permuted`."""
        if not permuted:
            return cls(tuple(ids), np.arange(len(ids)), np.tile(np.arange(n_options), (len(ids), 1)))
        named = [split_id(id_) for id_ in ids]
        places = {row: place for place, row in enumerate(dict.fromkeys(one.row for one in named))}
        answer_PO = np.array([[LETTERS.index(letter) for letter in one.order] for one in named], np.int64)
        return cls(tuple(places), np.array([places[one.row] for one in named]), answer_PO)

    @classmethod
    def if_permuted(cls, ids: Sequence[str], n_options: int, identity: RunIdentity) -> "AnswerView | None":
        """Return the view of prompts of a run that asks in several orders; None of another run."""
        return cls.of(ids, n_options, permuted=True) if identity.is_permuted else None

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
        """Number of prompts of each row."""
        return np.bincount(self.row_P, minlength=self.n_rows)

    @property
    def most_orders(self) -> int:
        """Orders of a row of which none was set aside."""
        return int(self.n_orders_R.max(initial=0))

    @property
    def is_given_P(self) -> NDArray[np.bool_]:
        """True where a prompt asks in the given order."""
        is_given_P: NDArray[np.bool_] = (self.answer_PO == np.arange(self.answer_PO.shape[1])).all(axis=1)
        return is_given_P

    def answers_P(self, letters_P: NDArray[Any]) -> Ints:
        """Return the answers at one letter of each prompt, such as the gold one or the one that was chosen."""
        return np.asarray(self.answer_PO[np.arange(len(self.row_P)), letters_P], np.int64)

    def letters_P(self, answers_R: NDArray[Any]) -> Ints:
        """Return the letter of each prompt at which an answer of its row stands."""
        return np.asarray(self.letter_PA[np.arange(len(self.row_P)), np.asarray(answers_R)[self.row_P]], np.int64)

    def gold_R(self, gold_P: NDArray[Any]) -> Ints:
        """Return the gold answer of each row, from the gold letter of each prompt."""
        gold_R = np.empty(self.n_rows, np.int64)
        gold_R[self.row_P] = self.answers_P(gold_P)
        return gold_R

    def by_answer(self, values_PO: NDArray[Any]) -> NDArray[Any]:
        """Return values by letter (axis 1, of two or more) by answer: (P, A, ...)."""
        at = self.letter_PA.reshape(*self.letter_PA.shape, *[1] * (values_PO.ndim - 2))
        return np.take_along_axis(values_PO, at, axis=1)

    def means(self, values_P: NDArray[Any]) -> Floats:
        """Return the mean of prompts' values over the orders of each row, in float64: (R, ...)."""
        sums_R = np.zeros((self.n_rows, *values_P.shape[1:]))
        np.add.at(sums_R, self.row_P, values_P)
        means_R: Floats = sums_R / self.n_orders_R.reshape(-1, *[1] * (values_P.ndim - 1))
        return means_R

    def decisions(self, scores_PO: NDArray[Any]) -> Ints:
        """Return the answer with the largest mean score over the orders of each row (ties: the lowest): shape (R,)."""
        return np.asarray(self.means(self.by_answer(scores_PO)).argmax(axis=1), np.int64)

    def select(self, is_chosen_R: NDArray[np.bool_]) -> tuple["AnswerView", Ints]:
        """Return the view of the prompts of some rows, and the places of these prompts."""
        at = np.flatnonzero(is_chosen_R[self.row_P])
        new_R = np.cumsum(is_chosen_R) - 1
        rows = tuple(row for row, is_chosen in zip(self.rows, is_chosen_R, strict=True) if is_chosen)
        return AnswerView(rows, new_R[self.row_P[at]], self.answer_PO[at]), at
