"""The state of a run, read from its directory alone: no model is loaded, and the run may go on meanwhile."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from negcore.errors import RunError
from negcore.store.files import is_remote, n_bytes, written_s
from negcore.store.publish import SetAside
from negcore.store.receipt_columns import read_columns
from tasks.config.reading import recorded_run
from tasks.config.run_file import RUN_FILE
from tasks.rundir.claim import Holder, holder_of
from tasks.rundir.layout import (
    PLAN_FILE,
    ShardFolder,
    own_run,
    read_failures,
    regular_files,
    run_roots,
    shard_folders,
)
from tasks.rundir.manifest import Shards, read_manifest

_PAUSE = 5.0
"""Times that a gap between two shards must be longer than usual to count as a pause of the run."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FolderStatus:
    """The state of one directory of shards."""

    folder: ShardFolder
    n_shards: int | None
    """Shards of the whole directory; None if their number is not known yet."""
    n_finished: int
    n_rows: int
    n_bytes: int
    """Finished shards, the rows in them, and their bytes."""
    n_set_aside: int
    """Rows that could not be computed."""
    set_aside: tuple[SetAside, ...] = ()
    """The same by name; none where the manifest told."""
    published: npt.NDArray[np.void] | None = None
    """Records of the finished shards, as in `ReceiptColumns.rows`; None where the manifest told."""
    n_damaged: int = 0
    """Receipts whose shard is missing or has another length: these shards are computed again."""
    n_foreign: int = 0
    """Receipts of other runs, which are in the way of this one."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Errors of the shards that the last run could not make, by index."""

    @property
    def n_missing(self) -> int | None:
        return None if self.n_shards is None else self.n_shards - self.n_finished


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
    finished_with: Mapping[str, str]
    """Versions of the packages that the run finished with; nothing if it is not finished."""
    gone: tuple[str, ...]
    """Lines for what the run finished with and is no longer there."""

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
    manifests = cache(_manifest)  # of runs in buckets, where to list and read thousands of receipts takes long
    folders = tuple(
        _noted_status(one, noted) if (noted := manifests(one.root).get(one.place)) else _folder_status(one)
        for one in shard_folders(directory)
    )
    if not folders and not run_roots(directory):
        raise RunError(f"{str(directory)!r} holds no shards and no {RUN_FILE}: give a run directory")
    return RunStatus(
        folders,
        tuple(_not_planned(directory, folders)),
        _pace_now(directory, folders),
        tuple(_holders(directory)),
        *_finished_with(directory, folders),
    )


def _finished_with(directory: Path, folders: Iterable[FolderStatus]) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Return the versions in the manifest, and a line for everything it names that a listing does not show."""
    try:
        manifest = read_manifest(directory)
    except RunError as error:
        return {}, (str(error),)
    if manifest is None:
        return {}, ()
    shards = [f"{one.folder.place}: shards are missing" for one in folders if one.n_missing != 0]
    there = {str(path) for path in regular_files(directory)}
    missing = (f"{place}: missing" for place in manifest.files if str(directory / place) not in there)
    return manifest.versions, (*shards, *missing)


def _manifest(root: Path) -> Mapping[str, Shards]:
    """Return what the manifest of a finished run in a bucket says of its shards; nothing without one."""
    with suppress(RunError):
        manifest = read_manifest(root) if is_remote(root) else None
        return manifest.shards if manifest else {}
    return {}


def _noted_status(folder: ShardFolder, noted: Shards) -> FolderStatus:
    return FolderStatus(
        folder=folder,
        n_shards=noted.n_shards,
        n_finished=noted.n_shards,
        n_rows=noted.n_rows,
        n_bytes=noted.n_bytes,
        n_set_aside=noted.n_set_aside,
    )


def _folder_status(folder: ShardFolder) -> FolderStatus:
    columns = read_columns(folder.path)
    of_run = np.bincount(columns.rows["run"], minlength=len(columns.runs)).tolist()
    own = own_run(folder, dict(zip(columns.runs, of_run, strict=True)))
    is_own = columns.rows["run"] == (columns.runs.index(own) if own in columns.runs else -1)
    finished = columns.rows[is_own & columns.rows["is_listed"]]
    done = set(finished["index"].tolist())
    set_aside = tuple(row for index, rows in sorted(columns.set_aside.items()) for row in rows if index in done)
    return FolderStatus(
        folder=folder,
        n_shards=own and own[1],
        n_finished=len(finished),
        n_rows=int(finished["n_rows"].sum()),
        n_bytes=int(finished["n_bytes"].sum()),
        n_set_aside=len(set_aside),
        set_aside=set_aside,
        published=finished,
        n_damaged=int(is_own.sum()) - len(finished),
        n_foreign=int((~is_own).sum()),
        failures={index: error for index, error in read_failures(folder.path).items() if index not in done},
    )


def _not_planned(directory: Path, folders: Sequence[FolderStatus]) -> Iterator[tuple[str, str]]:
    """Return models and datasets of run files without a plan of which no shard is there."""
    roots = run_roots(directory)
    begun = {(one.folder.root, one.folder.names[0], Path(one.folder.names[1]).name) for one in folders}
    for root in roots:
        holds_others = any(root in other.parents for other in roots)
        if holds_others or n_bytes(root / PLAN_FILE) is not None:
            continue
        run = recorded_run(root, to_look_at=True)
        for model, subject in product(run.model_names.values(), run.subjects):
            if (root, model, Path(subject).stem) not in begun:
                yield model, subject


def _holders(directory: Path) -> list[Holder]:
    """Return the drivers that claim the directory, a run below it, or the run that it is a part of."""
    places = [*reversed(directory.parents), directory, *run_roots(directory)]
    found = ((place, holder_of(place)) for place in places)
    return list(dict.fromkeys(holder for place, holder in found if holder is not None and not holder.is_copied(place)))


def _pace_now(directory: Path, folders: Sequence[FolderStatus]) -> Pace | None:
    """Return the pace of the present work: of shards with the newest one's kind and model."""
    begun = [(one.folder, one.published) for one in folders if one.published is not None and len(one.published)]
    if not begun:
        return None
    newest = max(begun, key=lambda one: float(one[1]["time_s"].max()))[0]
    alike = [shards for one, shards in begun if (one.kind, one.names[0]) == (newest.kind, newest.names[0])]
    published = np.concatenate([shards[["time_s", "n_rows"]] for shards in alike])
    has_run_file = n_bytes(newest.root / RUN_FILE) is not None
    workers = recorded_run(newest.root, to_look_at=True).resources.workers if has_run_file else 1
    plans = {one.folder.root / PLAN_FILE for one in folders if one.folder.planned is not None}
    return pace(
        published["time_s"], published["n_rows"], max((written_s(plan) for plan in plans), default=None), workers
    )


def pace(time_s: npt.ArrayLike, n_rows: npt.ArrayLike, started_s: float | None, workers: int) -> Pace | None:
    """Return how fast shards are published, without the pauses of the run.

    Every shard counts with the time since the one before it. If that time is a pause, neither counts: a pause is more
    than five times as long as it usually takes until every worker has published one shard.

    Parameters
    ----------
    time_s, n_rows : array (S,)
        When each shard was published, in seconds since the epoch, and its rows.
    started_s : float or None
        When the session began: earlier shards do not count. None counts all but the first.
    workers : int
        Workers that publish side by side: they often do so at the same moment.
    """
    times, rows = np.asarray(time_s, float), np.asarray(n_rows, int)
    order = np.lexsort((rows, times))
    times, rows = times[order], rows[order]
    if started_s is not None:
        of_session = times >= started_s
        times, rows = np.insert(times[of_session], 0, started_s), np.insert(rows[of_session], 0, 0)
    if len(times) < 2:
        return None
    one_of_each = min(workers, len(times) - 1)
    usual_s = np.median(times[one_of_each:] - times[:-one_of_each])
    steps_s = np.diff(times)
    counted = steps_s <= _PAUSE * usual_s
    total_s = float(steps_s[counted].sum())
    if not total_s:
        return None
    return Pace(int(counted.sum()) / total_s, int(rows[1:][counted].sum()) / total_s, float(times[-1]))
