"""Compute in batches that fit in memory: where memory runs out, the batch and all after it are halved."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

# Messages of PyTorch's errors for a lack of memory, where it has no exception type of its own for it.
_OUT_OF_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "MPS backend out of memory")
_OUT_OF_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"

logger = logging.getLogger(__name__)


class BatchLimit:
    """The most items of a batch: unlimited until memory runs out, then halved until a batch fits.

    Computations that need as much memory for each item should share one limit, so that memory runs out only once.

    Parameters
    ----------
    unit : str
        Name of the items in the log.
    """

    def __init__(self, unit: str) -> None:
        self._unit, self._most = unit, sys.maxsize

    def run(self, n_items: int, batch_size: int, work: Callable[[list[int], int], Iterator[Sequence[int]]]) -> None:
        """Work through items in batches.

        Parameters
        ----------
        n_items : int
            Items are numbered from 0.
        batch_size : int
            Most items of a batch while memory suffices.
        work : callable
            Takes the numbers of the items to do and the size of a batch; yields the numbers of each finished batch.

        Raises
        ------
        RuntimeError
            If memory does not suffice for a single item (for CUDA, `torch.OutOfMemoryError`).
        """
        todo = list(range(n_items))
        first = size = max(1, min(n_items, batch_size, self._most))
        while not _finish(todo, size, work):
            size = size // 2
            torch.cuda.empty_cache()
        if size < first:
            self._most = size
            logger.warning("out of memory: batches were halved until they fit, to %d %s", size, self._unit)

    def compute(self, n_items: int, batch_size: int, part: Callable[[list[int]], T]) -> list[T]:
        """Compute consecutive parts of some items; return the results of the parts in order.

        Parameters
        ----------
        part : callable
            Takes the numbers of a part's items.
        """
        results: list[T] = []

        def work(todo: list[int], size: int) -> Iterator[Sequence[int]]:
            for start in range(0, len(todo), size):
                items = todo[start : start + size]
                results.append(part(items))
                yield items

        self.run(n_items, batch_size, work)
        return results


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of PyTorch says that memory did not suffice, on a GPU or on the host."""
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and (message.startswith(_OUT_OF_MEMORY) or _OUT_OF_HOST_MEMORY in message)
    )


def _finish(todo: list[int], size: int, work: Callable[[list[int], int], Iterator[Sequence[int]]]) -> bool:
    """Work through `todo` and remove what was finished; return False where memory ran out."""
    finished: set[int] = set()
    try:
        for items in work(list(todo), size):
            finished.update(items)
    except RuntimeError as error:
        if not is_out_of_memory(error) or size == 1:
            raise
        todo[:] = [item for item in todo if item not in finished]
        return False
    return True
