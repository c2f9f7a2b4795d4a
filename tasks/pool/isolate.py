"""Do jobs without the rows that make them fail: such rows are found by computing a job in ever smaller halves.

Whatever a row does to its worker, each half is a job of its own on the pool, and only the row's half fails. What is
found is then done without those rows, as one job: rows computed together round alike, so a shard has the same bytes
however it came about.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from negcore.datasets import Example
from negcore.errors import NegError
from negcore.store.publish import SetAside
from negcore.texts import public
from tasks.pool.base import Jobs, NodeLost, Outcome, OutOfMemory, Pool, PoolStatus

if TYPE_CHECKING:
    from tasks.measure.shard_set import ShardJob

logger = logging.getLogger(__name__)

Tick = Callable[[PoolStatus], None]

_TICK_S = 2.0
_LONGEST_REASON = 300
_SHORT = 2
"""Texts of so few characters are in many words, and tell nothing."""
_QUOTED = 16
"""Characters of a row that make a quotation; lines, labels and ids that are shorter must be there whole."""


def map_isolating(
    pool: Pool, jobs: Jobs, *, stop: threading.Event, on_tick: Tick, turn: int = 0
) -> Generator[Outcome, None, None]:
    """Run jobs as `Pool.map` does, and a job that fails because of single rows once more without them.

    As long as nothing could be computed, a failure is not taken for a row's: the first job that fails is then searched
    alone, and if none of its rows can be computed either, no row is set aside.

    Parameters
    ----------
    jobs : Jobs
        Of `ShardJob`, or of others with `examples`, `trial` and `without`; those without `trial` are handed back as
        they fail.
    turn : int
        As in `Pool.map`.

    Yields
    ------
    Outcome
        Of every job as it was given.
    """
    failed: list[Outcome] = []
    is_proven = False
    options = _Options(stop, on_tick, turn)
    for outcome in pool.map(jobs, **options.of_map()):
        if _is_suspect(outcome):
            failed.append(outcome)
        else:
            is_proven = is_proven or outcome.exception is None
            yield outcome
    while failed:
        chosen, failed = (failed, []) if is_proven else (failed[:1], failed[1:])
        finding = _Search(pool, options, len(chosen)).run([outcome.job for outcome in chosen])
        is_proven = is_proven or finding.is_any_computed
        if not is_proven:
            yield from (*chosen, *failed)
            return
        yield from _without(pool, chosen, finding, options)


class _Options(NamedTuple):
    """Options of every call of the pool."""

    stop: threading.Event
    on_tick: Tick
    turn: int

    def of_map(self, note: str = "") -> dict[str, Any]:
        """Return them as `Pool.map` takes them, with a note for whoever watches."""

        def tick(status: PoolStatus) -> None:
            self.on_tick(replace(status, note=status.note or note))

        return {"stop": self.stop, "on_tick": tick, "tick_s": _TICK_S, "turn": self.turn}


class _Finding(NamedTuple):
    rows: dict[int, SetAside]
    """Rows that fail alone, by the `id()` of their example."""
    is_any_computed: bool


class _Search:
    """A search for the rows that make some jobs fail."""

    def __init__(self, pool: Pool, options: _Options, n_jobs: int) -> None:
        self._pool, self._options = pool, options
        self._note = f"looking for the rows at fault in {n_jobs} shard{'s' * (n_jobs > 1)}"
        self._is_any_computed = False

    def run(self, jobs: Sequence[ShardJob]) -> _Finding:
        """Halve the jobs, and every half that fails, down to single rows; these must fail twice more."""
        logger.warning("%s", self._note)
        suspects = [job.trial(job.examples) for job in jobs]
        rows = [job for job in suspects if len(job.examples) == 1]
        while suspects := [job for job in suspects if len(job.examples) > 1]:
            halves = [half for job in suspects for half in _halves(job)]
            rows += [half for half in halves if len(half.examples) == 1]
            suspects = [outcome.job for outcome in self._failing([half for half in halves if len(half.examples) > 1])]
        outcomes = self._failing([outcome.job for outcome in self._failing(rows)])
        found = {id(row): _set_aside(row, outcome) for outcome in outcomes for row in outcome.job.examples}
        return _Finding(found, self._is_any_computed)

    def _failing(self, jobs: Sequence[ShardJob]) -> list[Outcome]:
        outcomes = list(self._pool.map(jobs, suspect=True, **self._options.of_map(self._note)) if jobs else ())
        self._is_any_computed = self._is_any_computed or any(outcome.exception is None for outcome in outcomes)
        return [outcome for outcome in outcomes if _is_suspect(outcome)]


def _without(pool: Pool, failed: Sequence[Outcome], finding: _Finding, options: _Options) -> Iterator[Outcome]:
    """Do the jobs again without the rows that were found; each outcome names the job as it was given."""
    given = {}
    for outcome in failed:
        rows = [finding.rows[id(row)] for row in outcome.job.examples if id(row) in finding.rows]
        again = outcome.job.without(rows)
        given[id(again)] = (again, outcome.job)
    for outcome in pool.map([again for again, _ in given.values()], **options.of_map()):
        yield replace(outcome, job=given[id(outcome.job)][1])


def _is_suspect(outcome: Outcome) -> bool:
    """Tell whether one of the job's rows may have made it fail: it is not the user's error, the disk's or a node's."""
    if outcome.exception is None or isinstance(outcome.exception, (NegError, OSError, NodeLost, OutOfMemory)):
        return False
    return hasattr(outcome.job, "trial")


def _halves(job: ShardJob) -> tuple[ShardJob, ShardJob]:
    middle = len(job.examples) // 2
    return job.trial(job.examples[:middle]), job.trial(job.examples[middle:])


def _set_aside(row: Example, outcome: Outcome) -> SetAside:
    return SetAside(id=row.id, cause="failure", reason=without_text(str(outcome.error), [row])[:_LONGEST_REASON])


def without_text(error: str, rows: Sequence[Example]) -> str:
    """Return an error, or only its type if it quotes a row: receipts, logs and pages never hold their text."""
    error = public(error)
    kind, _, message = error.partition(":")
    parts = {message[i : i + _QUOTED] for i in range(len(message) - _QUOTED + 1)}
    texts = {
        line.strip()
        for row in rows
        for text in (row.prompt, *row.labels, *([row.id] if row.has_own_id else []))
        for line in text.splitlines()
    }
    is_quoted = any(
        any(part in text for part in parts) if len(text) >= _QUOTED else len(text) > _SHORT and text in message
        for text in texts
    )
    return kind if is_quoted else error
