"""The state of a run, read from its directory alone: no model is loaded, and the run may go on meanwhile."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import NamedTuple

from negcore.errors import RunError
from negcore.store.files import find, n_bytes
from negcore.store.publish import Receipt, SetAside, receipt_path, whole_shards
from tasks.config.reading import recorded_run
from tasks.config.run_file import RUN_FILE
from tasks.rundir.claim import Holder, holder_of
from tasks.rundir.layout import (
    PLAN_FILE,
    ShardFolder,
    read_failures,
    receipts_of,
    run_roots,
    shard_folders,
)

_PAUSE = 5.0
"""Times that a gap between two shards must be longer than usual to count as a pause of the run."""


@dataclass(frozen=True)
class FolderStatus:
    """The state of one directory of shards."""

    folder: ShardFolder
    n_shards: int | None
    """Shards of the whole directory; None if their number is not known yet."""
    receipts: tuple[Receipt, ...]
    """Receipts of its finished shards."""
    n_damaged: int
    """Receipts whose shard is missing or has another length: these shards are computed again."""
    n_foreign: int
    """Receipts of other runs, which are in the way of this one."""
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
    """The speed at which the present session publishes shards, without its pauses."""

    shards_per_s: float
    rows_per_s: float
    newest_s: float
    """Time at which the newest shard was published, in seconds since the epoch."""


@dataclass(frozen=True)
class RunStatus:
    """The state of a run directory."""

    folders: tuple[FolderStatus, ...]
    not_planned: tuple[tuple[str, str], ...]
    """Models and datasets that the run file names and that are not planned yet."""
    pace: Pace | None
    """None if the present session has published nothing yet."""
    holders: tuple[Holder, ...]
    """Drivers that claim the run, alive or dead."""

    @property
    def n_missing(self) -> int | None:
        """Number of shards that are still to come; None if it is not known yet."""
        counts = [one.n_missing for one in self.folders]
        if self.not_planned or None in counts:
            return None
        return sum(count for count in counts if count is not None)

    @property
    def left_s(self) -> float | None:
        """Time left, in seconds, if the pace stays."""
        missing = self.n_missing
        return None if self.pace is None or missing is None else missing / self.pace.shards_per_s


def run_status(directory: Path) -> RunStatus:
    """Read the state of a run.

    Raises
    ------
    RunError
        If there is no such directory, nothing of a run is in it, or its run file or plan is damaged.
    """
    folders = tuple(map(_folder_status, shard_folders(directory)))
    if not folders and not run_roots(directory):
        raise RunError(f"{str(directory)!r} holds no shards and no {RUN_FILE}: give a run directory")
    return RunStatus(
        folders, tuple(_not_planned(directory, folders)), _pace_now(directory, folders), tuple(_holders(directory))
    )


def _folder_status(folder: ShardFolder) -> FolderStatus:
    own, foreign, n_shards = receipts_of(folder)
    whole = tuple(whole_shards(folder.path, own, verify=False))
    done = {receipt.index for receipt in whole}
    failures = {index: error for index, error in read_failures(folder.path).items() if index not in done}
    return FolderStatus(folder, n_shards, whole, len(own) - len(whole), len(foreign), failures)


def _not_planned(directory: Path, folders: Sequence[FolderStatus]) -> Iterator[tuple[str, str]]:
    """Return models and datasets of run files without a plan of which no shard is there."""
    roots = run_roots(directory)
    begun = {(one.folder.root, one.folder.names[0], Path(one.folder.names[1]).name) for one in folders}
    for root in roots:
        holds_others = any(root in other.parents for other in roots)
        if holds_others or n_bytes(root / PLAN_FILE) is not None:
            continue
        run = recorded_run(root, to_look_at=True)
        for model, subject in product((name.partition("@")[0] for name in run.model), run.subjects):
            if (root, model, Path(subject).stem) not in begun:
                yield model, subject


def _holders(directory: Path) -> list[Holder]:
    """Return the drivers that claim the directory, a run below it, or the run that it is a part of."""
    found = map(holder_of, [*reversed(directory.parents), directory, *run_roots(directory)])
    return list(dict.fromkeys(holder for holder in found if holder is not None))


def _pace_now(directory: Path, folders: Sequence[FolderStatus]) -> Pace | None:
    """Return the pace of the present work: of shards with the newest one's kind and model."""
    published = [one for folder in folders for one in _published(folder)]
    if not published:
        return None
    newest = max(published, key=lambda one: one.time_s).folder
    alike = [one for one in published if (one.folder.kind, one.folder.names[0]) == (newest.kind, newest.names[0])]
    workers = recorded_run(newest.root, to_look_at=True).workers if n_bytes(newest.root / RUN_FILE) is not None else 1
    started = [file.stat().st_mtime for file in find(directory, f"**/{PLAN_FILE}")]
    return pace([(one.time_s, one.n_rows) for one in alike], max(started, default=None), workers)


class _Published(NamedTuple):
    time_s: float
    n_rows: int
    folder: ShardFolder


def _published(one: FolderStatus) -> Iterator[_Published]:
    for receipt in one.receipts:
        with suppress(FileNotFoundError):  # its shard is being published anew
            time_s = receipt_path(one.folder.path, receipt.index).stat().st_mtime
            yield _Published(time_s, receipt.n_rows, one.folder)


def pace(published: Iterable[tuple[float, int]], started_s: float | None, workers: int) -> Pace | None:
    """Return how fast shards are published, without the pauses of the run.

    Every shard counts with the time since the one before it. If that time is a pause, neither counts: a pause is more
    than five times as long as it usually takes until every worker has published one shard.

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
