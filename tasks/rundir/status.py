"""How far a run is, read from its directory alone: no model is loaded, and the run may be going on meanwhile."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import NamedTuple

from negcore.errors import RunError
from negcore.store.files import find, n_bytes
from negcore.store.publish import Receipt, SetAside, whole_shards
from tasks.config.reading import recorded_run
from tasks.config.run_file import RUN_FILE
from tasks.rundir.claim import Holder, holder_of
from tasks.rundir.layout import (
    PLAN_FILE,
    ShardFolder,
    read_failures,
    receipt_path,
    receipts_of,
    run_roots,
    shard_folders,
)

_PAUSE = 5.0
"""A gap between two shards that is so many times longer than usual is a pause of the run."""


@dataclass(frozen=True)
class PartStatus:
    """How far one directory of shards is."""

    folder: ShardFolder
    n_shards: int | None
    """Of the whole directory; None if it is not known yet."""
    receipts: tuple[Receipt, ...]
    """Of its finished shards."""
    n_damaged: int
    """Receipts whose shard is missing or of another length: these shards are computed again."""
    n_foreign: int
    """Receipts of another run: they are in the way of this one."""
    failures: Mapping[int, str]
    """Errors of the shards that the last run could not make, by index."""

    @property
    def n_missing(self) -> int | None:
        return None if self.n_shards is None else self.n_shards - len(self.receipts)

    @property
    def n_rows(self) -> int:
        return sum(receipt.n_rows for receipt in self.receipts)

    @property
    def n_bytes(self) -> int:
        return sum(receipt.n_bytes for receipt in self.receipts)

    @property
    def set_aside(self) -> tuple[SetAside, ...]:
        """Rows that could not be computed."""
        return tuple(row for receipt in self.receipts for row in receipt.set_aside)


@dataclass(frozen=True)
class Pace:
    """How fast the present session is: the shards that it has published, without its pauses."""

    shards_per_s: float
    rows_per_s: float
    newest_s: float
    """When the newest shard was published: seconds since the epoch."""


@dataclass(frozen=True)
class RunStatus:
    """How far a run directory is."""

    parts: tuple[PartStatus, ...]
    not_planned: tuple[tuple[str, str], ...]
    """Model and dataset of which nothing but the name in the run file is known."""
    pace: Pace | None
    """None if the present session has published nothing yet."""
    holders: tuple[Holder, ...]
    """Drivers that claim the run, alive or not."""

    @property
    def n_missing(self) -> int | None:
        """Shards that are still to come; None if that is not known yet."""
        counts = [part.n_missing for part in self.parts]
        if self.not_planned or None in counts:
            return None
        return sum(count for count in counts if count is not None)

    @property
    def left_s(self) -> float | None:
        """Time left, in seconds, if the pace stays."""
        missing = self.n_missing
        return None if self.pace is None or missing is None else missing / self.pace.shards_per_s


def run_status(directory: Path) -> RunStatus:
    """Read how far a run is.

    Raises
    ------
    RunError
        If there is no such directory, nothing of a run is in it, or its run file or plan is damaged.
    """
    parts = tuple(map(_part_status, shard_folders(directory)))
    if not parts and not run_roots(directory):
        raise RunError(f"{str(directory)!r} holds no shards and no {RUN_FILE}: give a run directory")
    return RunStatus(
        parts, tuple(_not_planned(directory, parts)), _pace_now(directory, parts), tuple(_holders(directory))
    )


def _part_status(folder: ShardFolder) -> PartStatus:
    own, foreign, n_shards = receipts_of(folder)
    whole = tuple(whole_shards(folder.path, own, verify=False))
    done = {receipt.index for receipt in whole}
    failures = {index: error for index, error in read_failures(folder.path).items() if index not in done}
    return PartStatus(folder, n_shards, whole, len(own) - len(whole), len(foreign), failures)


def _not_planned(directory: Path, parts: Sequence[PartStatus]) -> Iterator[tuple[str, str]]:
    """Models and datasets of run files whose plan is not noted, as far as no shard of them is there."""
    roots = run_roots(directory)
    begun = {(part.folder.root, part.folder.names[0], Path(part.folder.names[1]).name) for part in parts}
    for root in roots:
        holds_others = any(root in other.parents for other in roots)
        if holds_others or n_bytes(root / PLAN_FILE) is not None:
            continue
        run = recorded_run(root)
        for model, subject in product((name.partition("@")[0] for name in run.model), run.subjects):
            if (root, model, Path(subject).stem) not in begun:
                yield model, subject


def _holders(directory: Path) -> list[Holder]:
    """Those who claim the directory, a run below it, or the one that it is a part of."""
    found = map(holder_of, [*reversed(directory.parents), directory, *run_roots(directory)])
    return list(dict.fromkeys(holder for holder in found if holder is not None))


def _pace_now(directory: Path, parts: Sequence[PartStatus]) -> Pace | None:
    """The pace of what is measured now: the kind of shards and the model that the newest shard is of."""
    published = [one for part in parts for one in _published(part)]
    if not published:
        return None
    newest = max(published, key=lambda one: one.time_s).folder
    alike = [one for one in published if (one.folder.kind, one.folder.names[0]) == (newest.kind, newest.names[0])]
    workers = recorded_run(newest.root).workers if n_bytes(newest.root / RUN_FILE) is not None else 1
    started = [file.stat().st_mtime for file in find(directory, f"**/{PLAN_FILE}")]
    return pace([(one.time_s, one.n_rows) for one in alike], max(started, default=None), workers)


class _Published(NamedTuple):
    time_s: float
    n_rows: int
    folder: ShardFolder


def _published(part: PartStatus) -> Iterator[_Published]:
    for receipt in part.receipts:
        with suppress(FileNotFoundError):  # its shard is being published anew
            time_s = receipt_path(part.folder.path, receipt.index).stat().st_mtime
            yield _Published(time_s, receipt.n_rows, part.folder)


def pace(published: Iterable[tuple[float, int]], started_s: float | None, workers: int) -> Pace | None:
    """How fast shards are published, without the pauses of the run.

    Every shard counts with the time since the one before it. Where that time is a pause, neither counts: a pause is
    more than five times as long as it usually takes that every worker publishes one shard.

    Parameters
    ----------
    published : iterable of (time in seconds since the epoch, rows)
        A pair a shard.
    started_s : float or None
        When the session began: earlier shards do not count. None counts all but the first.
    workers : int
        Workers that publish side by side: they often do so at the same moment.
    """
    shards = sorted(one for one in published if started_s is None or one[0] >= started_s)
    if started_s is not None:
        shards.insert(0, (started_s, 0))
    if len(shards) < 2:
        return None
    one_of_each = min(workers, len(shards) - 1)
    usual_s = median(later[0] - earlier[0] for earlier, later in zip(shards, shards[one_of_each:], strict=False))
    steps = [(later[0] - earlier[0], later[1]) for earlier, later in pairwise(shards)]
    counted = [(seconds, n_rows) for seconds, n_rows in steps if seconds <= _PAUSE * usual_s]
    total_s = sum(seconds for seconds, _ in counted)
    if not total_s:
        return None
    return Pace(len(counted) / total_s, sum(n_rows for _, n_rows in counted) / total_s, shards[-1][0])
