"""Ask rows in several orders of their options: one place, where rows become prompts.

The orders of a row are drawn by the seed, the dataset's name and the row's id; the given order is always the first.
Rows are permuted after the splits are cut and sampled, so all orders of a row are in its split, one behind the other.
Demonstrations keep their given order: every prompt shows the same ones.
"""

import re
import string
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import count, permutations
from math import factorial

import xxhash

from negcore.datasets.base import Wording
from negcore.datasets.rows import Row
from negcore.errors import DatasetError
from negcore.orders import Order, Permutations, ordered_id

MOST_FOR_ALL = 4
"""Most options whose orders may all be asked: 24 prompts a row."""

_REFERS = re.compile(
    r"(?i:\b(all|any|both|each|either|neither|none)( of)?( the)? (above|below|options|answers|choices)\b)"
    r"|(?i:\b(all|any|both|either|neither|none) of (these|those)\W*$)"
    r"|(?i:\b(above|below|preceding|following) (options?|answers?|choices?)\b)"
    r"|(?i:\b(both|either|neither|options?|answers?|choices?)) \(?[A-F]\b"
    r"|^\(?[A-F]\)? (and|or|&) \(?[A-F]\)?\W*$"
)
"""English options that speak of others, such as "All of the above" or "Both A and C"."""


def permuted_rows(rows: Sequence[Row], permutations_: Permutations, seed: int, name: str) -> list[Row]:
    """Return every row in each of its orders, under ids that hold the order; with 1, the rows as they are."""
    if permutations_ == 1:
        return list(rows)
    return [one for row in rows for one in _orders_of(row, permutations_, seed, name)]


def _orders_of(row: Row, permutations_: Permutations, seed: int, name: str) -> Iterator[Row]:
    for order in draw_orders(len(row.options), permutations_, seed, name, row.id):
        yield replace(
            row,
            id=ordered_id(row.id, order),
            options=tuple(row.options[answer] for answer in order),
            answer=order.index(row.answer),
        )


def draw_orders(n_options: int, permutations_: Permutations, *tags: Hashable) -> tuple[Order, ...]:
    """Return the orders of one row, the given one first; they depend only on the tags.

    Parameters
    ----------
    n_options : int
    permutations_ : int or "all"
        Number of orders, of which there must be as many. More orders begin with those of fewer. "all" are in
        alphabetical order of their letters.
    *tags
        What the draw depends on: seed, dataset, row.
    """
    if permutations_ == "all":
        return tuple(permutations(range(n_options)))
    assert permutations_ <= factorial(n_options), (permutations_, n_options)
    salt, found = repr(tags), {tuple(range(n_options)): None}
    for draw in count():
        if len(found) == permutations_:
            break
        keys = [xxhash.xxh3_128_digest(f"{salt}\n{draw}\n{option}".encode()) for option in range(n_options)]
        found[tuple(sorted(range(n_options), key=keys.__getitem__))] = None
    return tuple(found)


def check_orders(name: str, wording: Wording | None, rows: Sequence[Row], permutations_: Permutations) -> None:
    """Refuse to permute options that no prompt lists, or in more orders than they have.

    Raises
    ------
    DatasetError
        If prompts are ready-made, the wording does not show the letter and the text of each option, or a row has not
        as many orders, or too many for "all".
    """
    if permutations_ == 1:
        return
    if wording is None:
        raise DatasetError(
            f"{name}: its prompts are ready-made, so the order of their options is part of their text: leave "
            "permutations out, or write each order as a prompt of its own"
        )
    shown = {field for _, field, _, _ in string.Formatter().parse(wording.option) if field}
    if shown != {"letter", "text"}:
        raise DatasetError(
            f"{name}: wording {wording.name!r} lists its options as {wording.option!r}, without their letter or text, "
            "so no prompt tells their order: leave permutations out"
        )
    for n_options in sorted({len(row.options) for row in rows}):
        _check_number(name, n_options, permutations_)


def _check_number(name: str, n_options: int, permutations_: Permutations) -> None:
    n_orders = factorial(n_options)
    if permutations_ == "all":
        if n_options > MOST_FOR_ALL:
            raise DatasetError(
                f"{name}: rows have {n_options} options, so {n_orders} orders, and permutations 'all' is for up to "
                f"{MOST_FOR_ALL} options: give a number of orders"
            )
    elif permutations_ > n_orders:
        raise DatasetError(
            f"{name}: rows have {n_options} options, so {n_orders} orders, and permutations is {permutations_}: give "
            f"at most {n_orders}, or 'all'"
        )


def refers_to_options(text: str) -> bool:
    """Tell whether an option seems to speak of other options, in English: elsewhere it means something else.

    It is a list of usual phrases. It knows no other language, and nothing of questions that name a letter.
    """
    return _REFERS.search(text) is not None
