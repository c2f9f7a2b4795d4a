"""Types of arrays, by what they hold; their axes are part of the variables' names."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
"""float32 or float64."""
Ints = NDArray[np.int64]


def count_nonfinite(values: NDArray[Any]) -> Ints:
    """Count the NaN and infinite values of each row once they are float32, as shards hold them."""
    with np.errstate(over="ignore"):
        stored = values.astype(np.float32, copy=False)
    return np.asarray(np.count_nonzero(~np.isfinite(stored), axis=tuple(range(1, values.ndim))))
