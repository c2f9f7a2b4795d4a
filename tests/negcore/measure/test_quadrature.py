"""Gauss nodes of a grid against plain sums over its points."""

import numpy as np
import pytest

from negcore.errors import NegError
from negcore.measure.quadrature import gauss_rule, node_grid, range_masks
from negcore.measure.sweeps import DEFAULT_SHIFTS, PAPER_SHIFTS, fit_lines

GRIDS = {
    "default": DEFAULT_SHIFTS,
    "paper": PAPER_SHIFTS,
    "a ring": PAPER_SHIFTS[np.abs(PAPER_SHIFTS) > 5],
    "one-sided": np.array([0.3, 0.5, 1.0, 1.5, 3.0, 4.0, 7.0]),
    "uneven": np.array([-3.0, -1.0, -0.25, 0.5, 0.6, 2.0, 8.0]),
    "with repeats": np.array([-1.0, -1.0, 0.5, 2.0, 2.0, 2.0, 3.0, 3.5, 4.0]),
}


def polynomials(points, degree):
    return np.polynomial.chebyshev.chebvander(points / 10, degree)


@pytest.mark.parametrize("n_nodes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_weighted_sums_are_the_grids_sums_of_polynomials(grid, n_nodes):
    rule = gauss_rule(grid, n_nodes)
    assert rule.nodes_N.dtype == rule.weights_N.dtype == np.float64
    assert (rule.weights_N > 0).all() and (np.diff(rule.nodes_N) > 0).all()
    expected = polynomials(grid, 2 * n_nodes - 1).sum(0)
    np.testing.assert_allclose(rule.weights_N @ polynomials(rule.nodes_N, 2 * n_nodes - 1), expected, atol=1e-11)
    missed = polynomials(grid, 2 * n_nodes)[:, -1].sum()
    assert rule.complete or abs(rule.weights_N @ polynomials(rule.nodes_N, 2 * n_nodes)[:, -1] - missed) > 1e-9


def test_two_nodes_of_four_points_can_be_checked_with_a_pencil():
    rule = gauss_rule([-3, -1, 1, 3], 2)  # x^2 is 5 on average, and both weights are alike
    np.testing.assert_allclose(rule.nodes_N, [-np.sqrt(5), np.sqrt(5)])
    np.testing.assert_allclose(rule.weights_N, [2, 2])


@pytest.mark.parametrize("n_nodes", [3, 4, 9])
def test_nodes_of_a_symmetric_grid_are_symmetric_and_an_odd_number_holds_zero(n_nodes):
    rule = gauss_rule(PAPER_SHIFTS, n_nodes)
    np.testing.assert_array_equal(rule.nodes_N, -rule.nodes_N[::-1])
    np.testing.assert_allclose(rule.weights_N, rule.weights_N[::-1], rtol=1e-12)
    assert (0 in rule.nodes_N) == (n_nodes % 2 == 1)


@pytest.mark.parametrize("n_nodes", [7, 50])
def test_as_many_nodes_as_points_are_the_grid(n_nodes):
    rule = gauss_rule(GRIDS["uneven"], n_nodes)
    assert rule.complete
    np.testing.assert_array_equal(rule.nodes_N, GRIDS["uneven"])
    np.testing.assert_array_equal(rule.weights_N, np.ones(7))
    np.testing.assert_allclose(rule.grid_SN @ rule.coefficients_NN, np.eye(7), atol=1e-13)


def test_all_but_one_node_of_a_long_grid_still_sum_it():
    rule = gauss_rule(PAPER_SHIFTS, 99)
    expected = polynomials(PAPER_SHIFTS, 60).sum(0)
    np.testing.assert_allclose(rule.weights_N @ polynomials(rule.nodes_N, 60), expected, atol=1e-10)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_polynomial_through_the_nodes_is_found_at_the_grid(grid):
    rule = gauss_rule(grid, 4)
    values = rule.grid_SN @ (rule.coefficients_NN @ polynomials(rule.nodes_N, 3))
    np.testing.assert_allclose(values, polynomials(grid, 3), atol=1e-12)


def curves(shifts, rng):
    """Smooth curves through the origin: shape (200, S)."""
    steep, centre = rng.uniform(0.02, 0.1, (200, 1)), rng.normal(0, 3, (200, 1))
    return np.tanh(steep * (shifts - centre)) + np.tanh(steep * centre)


@pytest.mark.parametrize("n_nodes", [6, 7])
def test_lines_through_smooth_curves_are_those_of_every_range_of_the_grid(n_nodes):
    rng, ranges = np.random.default_rng(0), (1, 2, 5, 10)
    nodes = node_grid(PAPER_SHIFTS, n_nodes, ranges)
    assert len(nodes.shifts_M) == len(ranges) * (n_nodes - n_nodes % 2) and 0 not in nodes.shifts_M
    seed = rng.bit_generator.state
    found = nodes.on_grid(curves(nodes.shifts_M, rng))
    rng.bit_generator.state = seed
    full = curves(PAPER_SHIFTS, rng)
    for largest, within_S in zip(ranges, nodes.ranges_RS, strict=True):
        np.testing.assert_array_equal(within_S, np.abs(PAPER_SHIFTS) <= largest)
        nearly, exactly = (fit_lines(PAPER_SHIFTS[within_S], values[:, within_S]) for values in (found, full))
        for one, other in zip(nearly, exactly, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4)
        assert (nearly.linear == exactly.linear).all()


def test_lines_through_the_polynomials_are_the_weighted_lines_of_the_nodes():
    """Whatever the changes are: the grid's sums of the polynomial are the Gauss sums."""
    rule, nodes = gauss_rule(DEFAULT_SHIFTS, 4), node_grid(DEFAULT_SHIFTS, 4)
    np.testing.assert_array_equal(nodes.shifts_M, rule.nodes_N)
    changes = np.random.default_rng(1).normal(size=4)
    d, w = rule.nodes_N, rule.weights_N
    mean = w @ changes / w.sum()
    slope = w @ (d * changes) / (w @ d**2)
    pearson = w @ (d * (changes - mean)) / np.sqrt(w @ d**2 * (w @ (changes - mean) ** 2))
    fit = fit_lines(DEFAULT_SHIFTS, nodes.on_grid(changes[None])[0])
    np.testing.assert_allclose(fit, (slope, pearson, 1 - w @ (changes - slope * d) ** 2 / (w @ changes**2)))


def test_the_tail_of_a_range_is_the_energy_of_its_pieces_last_coefficients():
    nodes = node_grid(PAPER_SHIFTS, 5, [2])
    bent = np.abs(nodes.shifts_M) > 2  # changes in the ring alone
    inner, whole = nodes.tail_energies(np.stack([bent, ~bent]).astype(float)).T
    assert inner[0] == 0 and whole[0] > 0 and inner[1] == whole[1] > 0
    straight = nodes.tail_energies(nodes.shifts_M[None])
    np.testing.assert_allclose(straight, np.zeros((1, 2)), atol=1e-20)


def test_a_ring_of_few_points_is_measured_as_it_is_and_has_no_tail():
    nodes = node_grid(np.array([-4.0, -3, -2, -1, 1, 2, 3, 4]), 4, [3])
    assert nodes.shifts_M.tolist()[-2:] == [-4, 4] and len(nodes.shifts_M) == 6
    assert nodes.tail_energies(np.eye(6))[4:].tolist() == [[0, 0], [0, 0]]


def test_ranges_are_in_order_without_empty_or_repeated_ones():
    shifts = np.array([-2.0, -1, 1, 2])
    assert range_masks(shifts, [9, 1.5, 0.5, 1, 2]).tolist() == [[False, True, True, False], [True] * 4]


def test_too_few_nodes_are_refused():
    with pytest.raises(NegError, match=r"nodes 3 is too few .* at least 4"):
        node_grid(DEFAULT_SHIFTS, 3)
