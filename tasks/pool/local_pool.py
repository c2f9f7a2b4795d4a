"""The pool that runs jobs in this process, one after the other."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from negcore.errors import NegError
from tasks.pool.base import POLL_S, Attempt, Batch, Outcome, Pool, PoolStatus, Resources

__all__ = ["LocalPool"]

logger = logging.getLogger(__name__)


class LocalPool(Pool):
    """One worker in this process. Threads that call it at the same time take turns, job by job."""

    calls_at_once = 1

    def __init__(self, cls: type, kwargs: Mapping[str, Any], resources: Resources, label: str) -> None:
        super().__init__(cls, kwargs, resources, label)
        self._worker: Any = None

    def has_room(self, n_calls: int) -> bool:
        return False

    def follow(self, earlier: Pool) -> None: ...

    def _outcomes(self, batch: Batch) -> Iterator[Outcome]:
        while batch.n_waiting:
            batch.check_stop()
            if not self._lock.acquire(timeout=POLL_S):
                continue
            try:
                outcome = self._run(batch, batch.take())
            finally:
                self._lock.release()
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
        return PoolStatus(self._label, batch.done, batch.failed, 0, batch.n_queued, ready, 0, 0, pool=self._number)
