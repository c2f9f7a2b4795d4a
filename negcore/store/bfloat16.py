"""float32 numbers in 16 bits: the upper half of each, rounded to the nearest (bfloat16).

The range is that of float32, so that small NEGs keep their sign, which float16 takes from one in five where answers are
improbable; the precision is 8 binary digits. Numbers of a model that computes in bfloat16 come back as they were.
"""

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint16]

_QUIET_NAN = 0x7FC0


def to_bits(values: npt.NDArray[np.float32]) -> Bits:
    """Bits of the nearest bfloat16 numbers, of two that are as near the even one: uint16, of the same shape.

    Infinity and NaN stay what they are, and nothing above 2^-134 in size becomes zero.
    """
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = ((words >> 16) & 1) + np.uint32(0x7FFF)
    bits = ((words + half) >> 16).astype(np.uint16)
    bits[np.isnan(values)] = _QUIET_NAN  # rounding could have carried into its exponent
    return bits


def from_bits(bits: Bits) -> npt.NDArray[np.float32]:
    """The numbers that the bits stand for, exactly: float32, of the same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
