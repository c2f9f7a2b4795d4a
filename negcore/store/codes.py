"""The order and signs of the options' NEGs in 16 bits a prompt and neuron: all that vote probes and forests read.

A code says which options of a prompt have a negative, zero or positive NEG, and which of two options has the larger
one, ties included. It is built option by option. Option o has one of 2o + 3 places among zero and the o options before
it: equal to one of their o + 1 values, between two of them, or beyond an end (where values are tied, some places
coincide). Five options therefore have 3*5*7*9*11 = 10 395 codes, of which 4683 occur; six options would not fit.

Axes: P prompts, O options, N neurons, V values of 16 bits.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

from negcore.errors import NegError
from negcore.measure.votes import Numbers, check_negs, row_blocks

MOST_OPTIONS = 5

Codes = npt.NDArray[np.uint16]
SignedRanks = npt.NDArray[np.int8]

_UNUSED = -128


def encode(negs_PON: Numbers) -> Codes:
    """Return the codes of the order and signs of the options' NEGs.

    Parameters
    ----------
    negs_PON : array, shape (P, O, N), target per unit of activation
        O in 2..5. Negative zero equals zero.

    Returns
    -------
    array of uint16, shape (P, N)

    Raises
    ------
    NegError
        If a NEG is NaN or infinite, or the options are too many.
    """
    n_rows, n_options, n_neurons = check_negs(negs_PON).shape
    check_n_options(n_options)
    codes_PN = np.empty((n_rows, n_neurons), np.uint16)
    for rows in row_blocks(negs_PON.shape):
        codes_PN[rows] = _encode_block(negs_PON[rows])
    return codes_PN


def decode(codes_PN: Codes, n_options: int) -> SignedRanks:
    """Return small whole numbers with the order and the signs of the NEGs that were encoded.

    Parameters
    ----------
    codes_PN : array of uint16, shape (P, N)
    n_options : int
        O, in 2..5.

    Returns
    -------
    array of int8, shape (P, O, N), rank
        0 for a NEG of zero; the smallest of a neuron's positive NEGs is 1, the next larger 2, and so on; the negative
        NEG nearest to zero is -1. Equal NEGs have equal ranks.

    Raises
    ------
    NegError
        If a code stands for no order of so many options: the data are damaged.
    """
    check_n_options(n_options)
    ranks_OV = _ranks(n_options)
    signed_ranks_PON = np.empty((len(codes_PN), n_options, codes_PN.shape[1]), np.int8)
    for option, ranks_V in enumerate(ranks_OV):
        signed_ranks_PON[:, option] = ranks_V[codes_PN]
    is_unused_PN = signed_ranks_PON[:, 0] == _UNUSED
    if is_unused_PN.any():
        row, neuron = np.argwhere(is_unused_PN)[0]
        raise NegError(
            f"code of row {row}, neuron {neuron} is {codes_PN[row, neuron]}, which stands for no order of {n_options} "
            "options: the shard is damaged, delete it and run the same command again"
        )
    return signed_ranks_PON


def check_n_options(n_options: int) -> None:
    """Refuse a number of options that 16 bits cannot hold, or of which there is no order.

    Raises
    ------
    NegError
    """
    if not 2 <= n_options <= MOST_OPTIONS:
        raise NegError(f"{n_options} options: codes hold 2..{MOST_OPTIONS} of them, use storage 'values'")


def _encode_block(negs_PON: Numbers) -> Codes:
    codes_PN = np.zeros((len(negs_PON), negs_PON.shape[2]), np.uint16)
    for option in range(negs_PON.shape[1]):
        value_PN = negs_PON[:, option]
        # The place counts twice each value that this one is above, and once each value that it equals.
        place_PN = (value_PN > 0).view(np.uint8) + (value_PN >= 0).view(np.uint8)
        for before in range(option):
            place_PN += value_PN > negs_PON[:, before]
            place_PN += value_PN >= negs_PON[:, before]
        codes_PN *= 2 * option + 3
        codes_PN += place_PN
    return codes_PN


@cache
def _ranks(n_options: int) -> SignedRanks:
    """Return the options' ranks for each code, shape (O, V); `_UNUSED` where a code does not occur."""
    ranks_OX = np.indices((2 * n_options + 1,) * n_options, np.int8).reshape(n_options, -1) - np.int8(n_options)
    # Among all ranks with one order, those without gaps are nearest to zero.
    nearest_first_OX = ranks_OX[:, np.argsort(np.abs(ranks_OX).sum(axis=0), kind="stable")]
    codes, first = np.unique(_encode_block(nearest_first_OX[None])[0], return_index=True)
    ranks_OV = np.full((n_options, 2**16), _UNUSED, np.int8)
    ranks_OV[:, codes] = nearest_first_OX[:, first]
    ranks_OV.setflags(write=False)
    return ranks_OV
