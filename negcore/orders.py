"""Orders of options: which answer stands at which letter of a prompt.

A row that is asked in several orders of its options makes several prompts. The id of each is the row's, then the order:
``mini/fact/test/3@CABD`` asks row 3 with its third option at the letter A, the first at B, the second at C. An option
is called *answer* where its place in the given order is meant, and *letter* where its place in the prompt is.
"""

import string
from typing import Literal, NamedTuple

LETTERS = string.ascii_uppercase

Order = tuple[int, ...]
"""The answer at each letter: ``(2, 0, 1, 3)`` is ``CABD``."""
Permutations = int | Literal["all"]
"""Number of orders that a row is asked in; 1 is the given order alone."""


def ordered_id(row: str, order: Order) -> str:
    """Return the id of a prompt that asks a row in an order."""
    return f"{row}@{''.join(LETTERS[answer] for answer in order)}"


class OrderedId(NamedTuple):
    """The row of a prompt, and the order that it is asked in, as letters."""

    row: str
    order: str

    @property
    def is_given(self) -> bool:
        """True for the order in which the dataset gives the options."""
        return self.order == LETTERS[: len(self.order)]


def split_id(prompt_id: str) -> OrderedId:
    """Return the row and the order in the id of a prompt of a run that asks in several orders."""
    row, _, order = prompt_id.rpartition("@")
    return OrderedId(row, order)
