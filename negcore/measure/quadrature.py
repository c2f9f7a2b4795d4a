"""Sums over a whole grid of shifts from a few measured ones: Gauss quadrature of the grid's own discrete measure.

A line fitted on a grid needs nothing but sums over the grid's points. For a curve that a polynomial follows, a few
nodes with weights give the same sums. A grid that is read in several ranges has one rule for the innermost range and
one for each ring around it, so that every range is made of whole pieces.

Shapes: S shifts of the grid, N nodes of a rule, M measured shifts (the nodes of all pieces but zero), R ranges, T last
coefficients of all pieces, K neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import block_diag, eigh_tridiagonal

from negcore.arrays import Floats
from negcore.errors import NegError

LEAST_NODES = 4
"""Fewest nodes whose last two coefficients, one even and one odd, are those of a bend."""


class GaussRule(NamedTuple):
    """Nodes and weights of a grid, and the polynomials that are orthonormal over its points."""

    nodes_N: Floats
    """Rising."""
    weights_N: Floats
    """Positive; they add up to the number of points."""
    grid_SN: Floats
    """Polynomials of degree 0 to N - 1 at the grid's points."""
    coefficients_NN: Floats
    """Takes values at the nodes to the coefficients of the polynomial through them."""
    complete: bool
    """True where every point is a node."""


def gauss_rule(grid_S: ArrayLike, n_nodes: int) -> GaussRule:
    """Make the Gauss rule of a grid's points, each of weight 1, in float64.

    Parameters
    ----------
    grid_S : float array of shape (S,)
    n_nodes : int
        From 1; a grid of no more points is its own rule.

    Returns
    -------
    GaussRule
        Its weighted sums are the sums over the grid for polynomials up to degree 2 N - 1. Nodes of a grid that is
        symmetric about zero are symmetric too, and zero is exactly one of an odd number.

    References
    ----------
    Golub, Welsch (1969), Calculation of Gauss quadrature rules: nodes and weights from the Jacobi matrix.
    Gautschi (2004), Orthogonal Polynomials, section 2.2.3: the matrix of a discrete measure, by Lanczos' algorithm.
    """
    grid_S = np.asarray(grid_S, np.float64)
    points, place_S, counts = np.unique(grid_S, return_inverse=True, return_counts=True)
    roots = np.sqrt(counts)
    basis, diagonal_N, beside = _jacobi(points, roots / np.sqrt(len(grid_S)), min(n_nodes, len(points)))
    grid_SN = (basis / roots[:, None])[place_S]
    if n_nodes >= len(points):
        return GaussRule(points, counts.astype(np.float64), grid_SN, basis.T * roots, True)
    symmetric = np.array_equal(points, -points[::-1]) and np.array_equal(counts, counts[::-1])
    nodes_N, vectors_NN = eigh_tridiagonal(np.zeros_like(diagonal_N) if symmetric else diagonal_N, beside)
    if symmetric:
        nodes_N = (nodes_N - nodes_N[::-1]) / 2
    weights_N = len(grid_S) * vectors_NN[0] ** 2
    return GaussRule(nodes_N, weights_N, grid_SN, vectors_NN * np.sign(vectors_NN[0]) * np.sqrt(weights_N), False)


def _jacobi(points: Floats, start: Floats, n_steps: int) -> tuple[Floats, Floats, Floats]:
    """Return orthonormal columns, and the diagonal of the Jacobi matrix and what is beside it."""
    basis, diagonal, beside = start[:, None], [], []
    for _ in range(n_steps - 1):
        following = points * basis[:, -1]
        diagonal.append(basis[:, -1] @ following)
        for _ in range(2):  # once leaves rounding that grows with the degree
            following = following - basis @ (basis.T @ following)
        beside.append(np.linalg.norm(following))
        basis = np.column_stack([basis, following / beside[-1]])
    diagonal.append(basis[:, -1] @ (points * basis[:, -1]))
    return basis, np.array(diagonal), np.array(beside)


@dataclass(frozen=True)
class NodeGrid:
    """Shifts to measure in place of a grid, and the way from their changes to those of the grid."""

    shifts_S: Floats
    """The grid."""
    shifts_M: Floats
    """Nodes of all pieces, the innermost first; without zero, where nothing changes."""
    grid_SM: Floats
    """Takes changes at the nodes to those at the grid's points, on the polynomial through each piece's nodes."""
    tails_TM: Floats
    """Takes changes at the nodes to the last two coefficients of every piece that is not measured whole."""
    tails_RT: NDArray[np.bool_]
    """Coefficients that count in each range."""
    ranges_RS: NDArray[np.bool_]
    """Points of the grid in each range, the smallest first, the whole grid last."""

    def on_grid(self, changes_KM: Floats) -> Floats:
        """Return changes (K, S) at the grid's points, whose sums over a range are its Gauss sums."""
        return changes_KM @ self.grid_SM.T

    def tail_energies(self, changes_KM: Floats) -> Floats:
        """Return the sum of squares of the last coefficients in each range: shape (K, R)."""
        squares_KT = (changes_KM @ self.tails_TM.T) ** 2
        return squares_KT @ self.tails_RT.T.astype(np.float64)


def node_grid(shifts_S: Floats, n_nodes: int, ranges: Sequence[float] = ()) -> NodeGrid:
    """Choose the nodes of a grid of shifts other than zero.

    Parameters
    ----------
    shifts_S : float array of shape (S,)
    n_nodes : int
        Nodes of each piece, from `LEAST_NODES`; a piece of no more points is measured whole.
    ranges : sequence of float
        Largest sizes of the ranges whose sums are to be those of the grid, beside the whole grid.

    Raises
    ------
    NegError
        If there are too few nodes.
    """
    if n_nodes < LEAST_NODES:
        raise NegError(
            f"nodes {n_nodes} is too few to see a curve's bend; give at least {LEAST_NODES}, or leave it out"
        )
    ranges_RS = range_masks(shifts_S, ranges)
    pieces_RS = ranges_RS & ~np.vstack([np.zeros_like(ranges_RS[:1]), ranges_RS[:-1]])
    parts = [_piece(shifts_S, piece_S, n_nodes) for piece_S in pieces_RS]
    piece_T = np.repeat(np.arange(len(parts)), [len(part.tails) for part in parts])
    return NodeGrid(
        shifts_S=shifts_S,
        shifts_M=np.concatenate([part.shifts for part in parts]),
        grid_SM=np.hstack([part.on_grid for part in parts]),
        tails_TM=block_diag(*(part.tails for part in parts)),
        tails_RT=piece_T <= np.arange(len(parts))[:, None],
        ranges_RS=ranges_RS,
    )


def range_masks(shifts_S: Floats, ranges: Sequence[float]) -> NDArray[np.bool_]:
    """Return the shifts within each range, and all: shape (R, S), the smallest first, none empty, none twice."""
    largest = np.abs(shifts_S).max()
    masks = [within_range(shifts_S, size) for size in sorted({*ranges, float(largest)})]
    return np.array([mask for mask, before in zip(masks, [~masks[-1], *masks], strict=False) if (mask & ~before).any()])


def within_range(shifts_S: Floats, largest: float) -> NDArray[np.bool_]:
    """Tell which shifts are of at most this size, up to rounding."""
    return np.abs(shifts_S) <= largest * (1 + 1e-9)


class _Piece(NamedTuple):
    shifts: Floats
    on_grid: Floats
    tails: Floats


def _piece(shifts_S: Floats, piece_S: NDArray[np.bool_], n_nodes: int) -> _Piece:
    rule = gauss_rule(shifts_S[piece_S], n_nodes)
    moved_N = rule.nodes_N != 0
    on_grid = np.zeros((len(shifts_S), int(moved_N.sum())))
    on_grid[piece_S] = (rule.grid_SN @ rule.coefficients_NN)[:, moved_N]
    tails = rule.coefficients_NN[len(rule.nodes_N) if rule.complete else -2 :, moved_N]
    return _Piece(rule.nodes_N[moved_N], on_grid, tails)
