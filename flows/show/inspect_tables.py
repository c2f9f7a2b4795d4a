"""Tables and lines about a run directory: what `neg verify` found, and how far it is for `neg status`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from time import localtime, strftime, time
from typing import TYPE_CHECKING, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from flows.show.model_names import shown_model
from flows.show.table import Cell, Number, Table, Words, numbers, texts
from flows.show.text import count, duration, printable
from negcore.errors import RunError
from tasks.rundir.claim import Holder
from tasks.rundir.layout import ShardFolder, shard_folders
from tasks.rundir.status import FolderStatus, RunStatus

if TYPE_CHECKING:  # it brings pyarrow, which `neg status` does without
    from tasks.rundir.verify import Verified

_MIB = 2**20
_SHOWN = 20
"""Most rows set aside that are named one by one."""


def checked(directory: Path, console: Console) -> list[Verified]:
    """Check every shard below a directory, with a progress bar.

    Raises
    ------
    RunError
        If there is no such directory, or nothing in it was planned or made.
    """
    from tasks.rundir.verify import total_bytes, verify

    folders = shard_folders(directory)
    if not folders:
        raise RunError(f"{str(directory)!r} holds no shards and no plan of any: give a run directory")
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("checking", total=total_bytes(folders))
        return list(verify(folders, lambda size: progress.advance(task, size)))


def manifest_lines(directory: Path) -> tuple[list[str], list[str]]:
    """Compare finished runs with their manifests; return a line for everything that is wrong, and for every warning."""
    from tasks.rundir.manifest import finished_runs, manifest_faults, mixed_versions, shards_of

    faults, warnings = [], []
    for root in {directory: None} | dict.fromkeys(finished_runs(directory)):
        where = f"{root.relative_to(directory)}: " if root != directory else ""
        shards = shards_of(root)
        faults += [printable(f"{where}{line}") for line in manifest_faults(root, shards)]
        warnings += [f"{where}{line}" for line in mixed_versions(shards.values())]
    return faults, warnings


def verified_tables(verified: Sequence[Verified], directory: Path) -> Iterator[Table]:
    """Return a table for every run directory and model."""
    columns = [*texts("dataset", "part"), *numbers("shards", "rows", "MiB"), *texts("state")]
    for title, of_model in _by_model(verified, directory).items():
        rows = [
            [
                *one.folder.names[1:],
                *_amounts(one.n_whole, one.n_shards, one.n_rows, one.n_bytes),
                Words(count(len(one.faults), "problem"), "red") if one.faults else "whole",
            ]
            for one in of_model
        ]
        yield Table(title, title, columns, [rows])


def verified_lines(verified: Iterable[Verified], directory: Path) -> list[str]:
    """Return a line for everything that is wrong."""
    return [f"{_label(one.folder, directory)}: {printable(fault.what)}" for one in verified for fault in one.faults]


def status_tables(status: RunStatus, directory: Path) -> Iterator[Table]:
    """Return a table for every run directory and model."""
    columns = [*texts("dataset", "part"), *numbers("shards", "rows", "MiB", "set\naside"), *texts("state")]
    for title, of_model in _by_model(status.folders, directory).items():
        rows = [
            [
                *one.folder.names[1:],
                *_amounts(one.n_finished, one.n_shards, one.n_rows, one.n_bytes),
                str(one.n_set_aside or ""),
                _state(one),
            ]
            for one in of_model
        ]
        yield Table(title, title, columns, [rows])


def _state(one: FolderStatus) -> str:
    notes = [
        f"{one.n_foreign} of another run in the way" if one.n_foreign else "",
        f"{one.n_damaged} damaged" if one.n_damaged else "",
        f"{len(one.failures)} failed" if one.failures else "",
    ]
    if one.n_missing is None:
        notes.append("receipts are missing")
    elif one.n_missing:
        notes.append(f"{one.n_missing} missing" if one.n_finished else "not begun")
    return ", ".join(filter(None, notes)) or "done"


def status_lines(status: RunStatus, directory: Path) -> Iterator[str]:
    """Return in words what is set aside, failed or not planned yet, how much is there, how fast it is and who works."""
    aside = [(one, row) for one in status.folders for row in one.set_aside]
    for one, row in aside[:_SHOWN]:
        yield f"set aside: {_label(one.folder, directory)}: {printable(row.id)}: {printable(row.reason)}"
    n_more = sum(one.n_set_aside for one in status.folders) - min(len(aside), _SHOWN)
    if n_more:
        yield f"set aside: {n_more} more rows, named in the receipts"
    for one in status.folders:
        for index, error in one.failures.items():
            yield f"failed: {_label(one.folder, directory)}: shard {index}: {printable(error)}"
    for model, dataset in status.not_planned:
        yield f"not planned yet: {printable(model)} {printable(dataset)}"
    yield _total(status)
    yield _pace(status)
    yield from map(_holder, status.holders)
    for line in status.gone[:_SHOWN]:
        yield printable(f"no longer as it finished: {line}")
    if len(status.gone) > _SHOWN:
        yield f"no longer as it finished: {len(status.gone) - _SHOWN} more"
    if status.finished_with and not status.gone:
        listed = ", ".join(f"{name} {version}" for name, version in status.finished_with.items())
        tied = "its manifest ties tables and report to these shards (neg verify compares them)"
        yield printable(f"finished: {tied}, made with {listed}")
    if not status.holders and (status.n_missing != 0 or status.gone):
        yield "nobody works on it: the same command goes on from here"


def _holder(holder: Holder) -> str:
    match holder.is_dead:
        case True:
            return f"nobody works on it: {holder} ended without giving it back; the same command goes on from here"
        case False:
            return f"held by {holder}"
    return f"held by {holder}: whether it lives cannot be told from here"


def _total(status: RunStatus) -> str:
    done = sum(one.n_finished for one in status.folders)
    rows, size = sum(one.n_rows for one in status.folders), sum(one.n_bytes for one in status.folders)
    missing = "an unknown number" if status.n_missing is None else str(status.n_missing)
    return f"{rows} prompts in {count(done, 'shard')}, {size / _MIB:.0f} MiB; {missing} missing"


def _pace(status: RunStatus) -> str:
    if status.pace is None and status.folders and all(one.published is None for one in status.folders):
        return "pace: of a finished run in a bucket it is not looked up"
    if status.pace is None:
        return "pace: no shard finished in this session yet"
    pace, now = status.pace, time()
    line = f"pace: {60 * pace.rows_per_s:.3g} prompts a minute without pauses, the newest shard {clock(pace.newest_s)}"
    if status.n_missing == 0 or status.left_s is None:
        return line
    return f"{line}; at that pace {duration(status.left_s)} left, until {clock(now + status.left_s)}"


def clock(time_s: float) -> str:
    """Return a moment, given in seconds since the epoch, in local time."""
    return strftime("%Y-%m-%d %H:%M:%S", localtime(time_s))


class _OfFolder(Protocol):
    @property
    def folder(self) -> ShardFolder: ...


T = TypeVar("T", bound=_OfFolder)


def _by_model(items: Sequence[T], directory: Path) -> dict[str, list[T]]:
    """Return directories of shards by their table's title: where they are, what they hold, and the model."""
    groups: dict[str, list[T]] = {}
    for item in items:
        title = f"{_where(item.folder, directory)}{item.folder.kind}, {shown_model(item.folder.names[0])}"
        groups.setdefault(title, []).append(item)
    return groups


def _label(folder: ShardFolder, directory: Path) -> str:
    return printable(f"{_where(folder, directory)}{folder.kind} {' '.join(folder.names)}")


def _where(folder: ShardFolder, directory: Path) -> str:
    """Return the place of a run below the directory."""
    below = folder.root != directory and folder.root.is_relative_to(directory)
    return f"{folder.root.relative_to(directory)} " if below else ""


def _amounts(done: int, n_shards: int | None, n_rows: int, n_bytes: int) -> list[Cell]:
    shards = f"{done} of {'?' if n_shards is None else n_shards}"
    return [shards, Number(n_rows), Number(n_bytes / _MIB, "{:.1f}".format)]
