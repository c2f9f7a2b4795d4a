"""What a person sees of a run directory: what `neg verify` found, how far `neg status` sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from time import localtime, strftime, time
from typing import TYPE_CHECKING, Protocol, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flows.show.display import printable
from negcore.errors import RunError
from tasks.rundir.claim import Holder
from tasks.rundir.layout import ShardFolder, shard_folders
from tasks.rundir.status import PartStatus, RunStatus

if TYPE_CHECKING:  # it brings pyarrow, which `neg status` does without
    from tasks.rundir.verify import Verified

_MIB = 2**20
_SHOWN = 20
"""Rows set aside that are named one by one."""


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


def verified_tables(verified: Sequence[Verified], directory: Path) -> Iterator[Table]:
    """A table for every run directory and model."""
    for title, of_model in _by_model(verified, directory).items():
        table = _table(title, ("shards", "rows", "MiB"), ("state",))
        for one in of_model:
            state = "whole" if not one.faults else f"[red]{_count(len(one.faults), 'problem')}[/red]"
            table.add_row(*_names(one.folder), *_amounts(one.n_whole, one.n_shards, one.n_rows, one.n_bytes), state)
        yield table


def verified_lines(verified: Iterable[Verified], directory: Path) -> list[str]:
    """A line for everything that is wrong."""
    return [f"{_label(one.folder, directory)}: {printable(fault.what)}" for one in verified for fault in one.faults]


def status_tables(status: RunStatus, directory: Path) -> Iterator[Table]:
    """A table for every run directory and model."""
    for title, of_model in _by_model(status.parts, directory).items():
        table = _table(title, ("shards", "rows", "MiB", "set\naside"), ("state",))
        for part in of_model:
            done = len(part.receipts)
            aside = str(len(part.set_aside) or "")
            amounts = _amounts(done, part.n_shards, part.n_rows, part.n_bytes)
            table.add_row(*_names(part.folder), *amounts, aside, escape(_state(part)))
        yield table


def _state(part: PartStatus) -> str:
    notes = [
        f"{part.n_foreign} of another run in the way" if part.n_foreign else "",
        f"{part.n_damaged} damaged" if part.n_damaged else "",
        f"{len(part.failures)} failed" if part.failures else "",
    ]
    if part.n_missing is None:
        notes.append("receipts are missing")
    elif part.n_missing:
        notes.append(f"{part.n_missing} missing" if part.receipts else "not begun")
    return ", ".join(filter(None, notes)) or "done"


def status_lines(status: RunStatus, directory: Path) -> Iterator[str]:
    """Everything about a run in words: what is set aside, what is not planned, how much there is, and how fast."""
    aside = [(part, row) for part in status.parts for row in part.set_aside]
    for part, row in aside[:_SHOWN]:
        yield f"set aside: {_label(part.folder, directory)}: {printable(row.id)}: {printable(row.reason)}"
    if len(aside) > _SHOWN:
        yield f"set aside: {len(aside) - _SHOWN} more rows, named in the receipts"
    for part in status.parts:
        for index, error in part.failures.items():
            yield f"failed: {_label(part.folder, directory)}: shard {index}: {printable(error)}"
    for model, dataset in status.not_planned:
        yield f"not planned yet: {printable(model)} {printable(dataset)}"
    yield _total(status)
    yield _pace(status)
    yield from map(_holder, status.holders)
    if not status.holders and status.n_missing != 0:
        yield "nobody works on it: the same command goes on from here"


def _holder(holder: Holder) -> str:
    match holder.is_dead:
        case True:
            return f"nobody works on it: {holder} ended without giving it back; the same command goes on from here"
        case False:
            return f"held by {holder}"
    return f"held by {holder}: whether it lives cannot be told from here"


def _total(status: RunStatus) -> str:
    done = sum(len(part.receipts) for part in status.parts)
    rows, size = sum(part.n_rows for part in status.parts), sum(part.n_bytes for part in status.parts)
    missing = "an unknown number" if status.n_missing is None else str(status.n_missing)
    return f"{rows} prompts in {_count(done, 'shard')}, {size / _MIB:.0f} MiB; {missing} missing"


def _pace(status: RunStatus) -> str:
    if status.pace is None:
        return "pace: no shard finished in this session yet"
    pace, now = status.pace, time()
    line = f"pace: {60 * pace.rows_per_s:.3g} prompts a minute without pauses, the newest shard {clock(pace.newest_s)}"
    if status.n_missing == 0 or status.left_s is None:
        return line
    return f"{line}; at that pace {duration(status.left_s)} left, until {clock(now + status.left_s)}"


def clock(time_s: float) -> str:
    """A moment, given in seconds since the epoch, in local time."""
    return strftime("%Y-%m-%d %H:%M:%S", localtime(time_s))


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


class _OfFolder(Protocol):
    @property
    def folder(self) -> ShardFolder: ...


T = TypeVar("T", bound=_OfFolder)


def _by_model(items: Sequence[T], directory: Path) -> dict[str, list[T]]:
    """Directories of shards by the title of their table: where they are, what they hold, and of which model."""
    groups: dict[str, list[T]] = {}
    for item in items:
        title = f"{_where(item.folder, directory)}{item.folder.kind}, {item.folder.names[0]}"
        groups.setdefault(title, []).append(item)
    return groups


def _label(folder: ShardFolder, directory: Path) -> str:
    return printable(f"{_where(folder, directory)}{folder.kind} {' '.join(folder.names)}")


def _where(folder: ShardFolder, directory: Path) -> str:
    """Of a run below the directory, its place there."""
    below = folder.root != directory and folder.root.is_relative_to(directory)
    return f"{folder.root.relative_to(directory)} " if below else ""


def _table(title: str, numbers: Sequence[str], words: Sequence[str]) -> Table:
    table = Table(title=escape(printable(title)), box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("dataset", overflow="fold")
    table.add_column("part", overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in words:
        table.add_column(name)
    return table


def _names(folder: ShardFolder) -> list[str]:
    return [escape(printable(name)) for name in folder.names[1:]]


def _amounts(done: int, n_shards: int | None, n_rows: int, n_bytes: int) -> list[str]:
    return [f"{done} of {'?' if n_shards is None else n_shards}", str(n_rows), f"{n_bytes / _MIB:.1f}"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
