"""Shuffles that keep rows and units together: which places can change, and that all such orders are as likely."""

from collections import Counter

import numpy as np

from negcore.analysis.shuffles import shuffled_rows


def test_single_rows_come_in_any_order():
    found = shuffled_rows(range(7), range(7), n_shuffles=3, seed=5)
    assert found.tolist() == [np.random.default_rng([5, number]).permutation(7).tolist() for number in range(3)]


def test_rows_of_a_unit_stay_together_and_change_places_among_themselves():
    units = list("abbacca")  # a has three rows, b and c two each
    found = shuffled_rows(range(7), units, n_shuffles=2000, seed=0)
    assert {tuple(sorted(order)) for order in found.tolist()} == {tuple(range(7))}
    assert set(Counter(map(tuple, found[:, [0, 3, 6]].tolist()))) == {
        (i, j, k) for i in (0, 3, 6) for j in (0, 3, 6) for k in (0, 3, 6) if len({i, j, k}) == 3
    }
    both = Counter(map(tuple, found[:, [1, 2, 4, 5]].tolist()))
    assert len(both) == 8  # two orders of the units, and two within each
    assert min(both.values()) > 2000 / 8 - 4 * 2000**0.5 / 2
    assert all({one[0], one[1]} in ({1, 2}, {4, 5}) for one in both)


def test_the_orders_of_a_row_keep_their_order():
    rows, units = list("aabbccddeee"), list("xxxxyyyyzzz")
    found = shuffled_rows(rows, units, n_shuffles=200, seed=1)
    moved = {tuple(order) for order in found[:, :8].tolist()}
    assert len(moved) == 8
    assert all(order[1::2] == tuple(place + 1 for place in order[::2]) for order in moved)
    assert (found[:, 8:] == [8, 9, 10]).all()  # no other row or unit has three prompts


def test_units_of_other_shapes_never_change_places():
    rows, units = list("aabbbb"), list("xxyyyy")
    assert (shuffled_rows(rows, units, n_shuffles=20, seed=0) == np.arange(6)).all()
