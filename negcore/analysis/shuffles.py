"""Shuffles of rows that belong together: prompts of one row, and rows of one unit, stay beside each other.

Rows about one sentence are more alike than rows of two, so that a shuffle of single rows tears apart what any two
models have in common, and a search after it finds too little. What may come in any order are units, and within a unit
its rows; the prompts that ask one row in several orders of its options may not. A permutation test needs permutations
that are a group, so units change places with units of the same shape, and rows with rows of as many prompts.

References
----------
Winkler et al. (2015), "Multi-level block permutation", NeuroImage 123: exchanges within blocks and of whole blocks.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

from negcore.arrays import Ints

T = TypeVar("T")
Unit = list[list[int]]
"""Places of the prompts of each of its rows."""


def shuffled_rows(rows: Sequence[Hashable], units: Sequence[Hashable], *, n_shuffles: int, seed: int) -> Ints:
    """Draw shuffles of prompts that keep rows and units together.

    Parameters
    ----------
    rows, units : sequence of length P
        What tells apart the row of each prompt, and its unit.

    Returns
    -------
    array of int, shape (n_shuffles, P)
        Place of the prompt that comes to each place.
    """
    tree: dict[Hashable, dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, (row, unit) in enumerate(zip(rows, units, strict=True)):
        tree[unit][row].append(place)
    found = [list(of_unit.values()) for of_unit in tree.values()]
    return np.array([_shuffled(found, np.random.default_rng([seed, number])) for number in range(n_shuffles)])


def _shuffled(units: Sequence[Unit], random: np.random.Generator) -> Ints:
    shapes = [tuple(map(len, unit)) for unit in units]
    moved = [_exchanged(unit, list(map(len, unit)), random) for unit in _exchanged(units, shapes, random)]
    places_P, sources_P = _flat(units), _flat(moved)
    order_P = np.empty(len(places_P), np.int64)
    order_P[places_P] = sources_P
    return order_P


def _exchanged(blocks: Sequence[T], kinds: Sequence[Hashable], random: np.random.Generator) -> list[T]:
    """Return blocks after those of each kind changed places with one another."""
    of_kind: dict[Hashable, list[int]] = defaultdict(list)
    for place, kind in enumerate(kinds):
        of_kind[kind].append(place)
    found = list(blocks)
    for places in of_kind.values():
        for place, source in zip(places, random.permutation(len(places)).tolist(), strict=True):
            found[place] = blocks[places[source]]
    return found


def _flat(units: Sequence[Unit]) -> list[int]:
    return [place for unit in units for row in unit for place in row]
