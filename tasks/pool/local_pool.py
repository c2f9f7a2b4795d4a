"""The pool that runs jobs in this process, one after the other."""

import logging
from collections.abc import Iterator
from typing import Any

from negcore.errors import NegError
from tasks.pool.base import Attempt, Batch, Outcome, Pool, PoolStatus

__all__ = ["LocalPool"]

logger = logging.getLogger(__name__)


class LocalPool(Pool):
    """One worker in this process."""

    _worker: Any = None

    def _outcomes(self, batch: Batch) -> Iterator[Outcome]:
        while batch.todo:
            batch.check_stop()
            outcome = self._run(batch, batch.todo.popleft())
            if outcome is not None:
                yield outcome
            if batch.tick_due():
                batch.tick(self._status(batch))

    def _run(self, batch: Batch, attempt: Attempt) -> Outcome | None:
        if self._worker is None:
            self._worker = self._build()
        try:
            return batch.succeeded(attempt, self._worker.run(attempt.job))
        except Exception as error:
            logger.debug("%s: attempt %d failed", self._label, attempt.number, exc_info=True)
            return batch.failed_once(attempt, error)

    def _build(self) -> Any:
        try:
            return self._cls(**self._kwargs)
        except NegError:
            raise
        except Exception as error:
            raise self._cannot_start(error) from error

    def _status(self, batch: Batch) -> PoolStatus:
        ready = int(self._worker is not None)
        return PoolStatus(self._label, batch.done, batch.failed, 0, len(batch.todo), ready, 0, 0)
