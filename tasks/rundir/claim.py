"""Claims: one driver for each run directory. The driver writes a claim file there and renews it while it lives.

A claim needs only what every file system offers (create a new file, write, read, delete), so it holds in network
directories and buckets too. On the holder's own machine its death shows at once, elsewhere by its silence: the next
driver watches the file for a while by its own clock, so that no two clocks need to agree.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from negcore.errors import RunError
from negcore.store.buckets import create
from negcore.store.files import MOST_RECORD_BYTES, draft, is_remote, parse_json, read_bytes, remove
from tasks.config.provenance import this_command

__all__ = ["CLAIM_FILE", "HeldError", "Holder", "claim", "holder_of"]

CLAIM_FILE = "claim.json"

logger = logging.getLogger(__name__)

_BEAT_S = 5.0
_SILENCE_S = 60.0
"""A claim that was not renewed for so long belongs to nobody."""
_POLL_S = 1.0
_SETTLE_S = 0.5
"""If two drivers take over the same dead claim, the first sees within this time that the second did."""
_LONGEST_COMMAND = 200


class HeldError(RunError):
    """A living driver holds the run directory."""


@dataclass(frozen=True)
class Holder:
    """The driver that holds a directory."""

    token: str
    """Different for every claim."""
    machine: str
    """Host and, on Linux, its space of process ids: containers may share a host's name."""
    pid: int
    birth: str
    """Start of the process: see `_birth`."""
    since: str
    """Time of the claim for people, in the time zone of the holder."""
    command: str
    place: str = ""
    """The directory that it claims, by its inode or its address in a bucket: not that of a copy."""
    beat: int = 0
    """Times that the claim was renewed."""

    @classmethod
    def this_process(cls, directory: Path) -> "Holder":
        """Return this process as the holder of a new claim on a directory."""
        command = this_command()[:_LONGEST_COMMAND]
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        return cls(uuid.uuid4().hex, _machine(), os.getpid(), _birth(os.getpid()), since, command, _place(directory))

    @property
    def is_dead(self) -> bool | None:
        """True if its process is gone or its id belongs to another process; None if that cannot be told from here."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # another user's
            pass
        birth = _birth(self.pid)
        return birth != self.birth if birth else None

    def is_copied(self, directory: Path) -> bool:
        """Tell whether the claim came here with the files of another directory, as far as inodes can be trusted."""
        return self.place not in ("", _place(directory))

    def __str__(self) -> str:
        text = f"pid {self.pid} on {self.machine.split(' ')[0]} ({self.command}) since {self.since}"
        return "".join(char if char.isprintable() else "?" for char in text)


class _Claim:
    """A held directory, renewed by a thread until it is given back or lost."""

    def __init__(self, directory: Path, holder: Holder) -> None:
        self.directory, self.holder = directory, holder
        self.loss: str | None = None
        """The way the claim was lost; None while it holds."""
        self._listeners: list[Callable[[], None]] = []
        self._given_back = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)
        self._thread.start()

    def when_lost(self, call: Callable[[], None]) -> None:
        """Call `call` in another thread when the claim is lost; at once if it is lost already."""
        self._listeners.append(call)
        if self.loss is not None:
            call()

    def give_back(self) -> None:
        """Leave the directory to the next driver; a claim that cannot be deleted ends by silence."""
        self._given_back.set()
        self._thread.join()
        try:
            if _is_of(holder_of(self.directory), self.holder):
                remove(self.directory / CLAIM_FILE)
        except OSError as error:
            logger.warning("the claim on %s cannot be given back: %s", self.directory, error)

    def error(self) -> RunError:
        """Return the error of a claim that was lost."""
        return RunError(
            f"run directory {str(self.directory)!r} no longer belongs to this run, {self.loss}: stopped; finished "
            "shards are kept"
        )

    def _renew(self) -> None:
        renewed_at = time.monotonic()
        while self.loss is None and not self._given_back.wait(_BEAT_S):
            try:
                self._beat()
                renewed_at = time.monotonic()
            except (OSError, RunError) as error:  # those of a bucket are RunErrors
                logger.warning("the claim on %s cannot be renewed: %s", self.directory, error)
                if time.monotonic() - renewed_at > _SILENCE_S:
                    self.loss = f"its claim could not be renewed for {_SILENCE_S:g} s"
        for call in self._listeners if self.loss is not None else ():
            call()

    def _beat(self) -> None:
        holder = holder_of(self.directory)
        if holder is not None and not _is_of(holder, self.holder):
            self.loss = f"{holder} took it over"
            return
        self.holder = replace(self.holder, beat=self.holder.beat + 1)
        _rewrite(self.directory, self.holder)


_held: ContextVar[Mapping[str, _Claim]] = ContextVar("held")
"""Claims that the callers of the present code hold."""


@contextmanager
def claim(directory: Path, *, when_lost: Callable[[], None] | None = None) -> Iterator[None]:
    """Claim a run directory for this driver alone, and make it if needed; inside the block it may be claimed again.

    Parameters
    ----------
    directory : Path
    when_lost : callable, optional
        Called in another thread if someone else takes the directory over; the work must stop then.

    Raises
    ------
    HeldError
        If a living driver holds the directory. A holder of another machine is watched for a while before, because only
        a claim that is renewed tells that it lives.
    RunError
        If the directory cannot be written; at the end if the claim was lost meanwhile.
    """
    held = _held.get({})
    known = held.get(str(directory))
    mine = known or _Claim(directory, _acquire(directory))
    if when_lost is not None:
        mine.when_lost(when_lost)
    reset = _held.set({**held, str(directory): mine})
    try:
        yield
    except Exception as error:
        if mine.loss is not None:
            raise mine.error() from error
        raise
    finally:
        _held.reset(reset)
        if known is None:
            mine.give_back()
    if mine.loss is not None:
        raise mine.error()


def holder_of(directory: Path) -> Holder | None:
    """Return the driver that claims a directory, dead or alive; None without a claim, or while it is being written."""
    return _parsed(_content(directory))


def _acquire(directory: Path) -> Holder:
    """Claim a directory that nobody holds or that a dead driver left."""
    try:
        if not is_remote(directory):
            directory.mkdir(parents=True, exist_ok=True)
        me = Holder.this_process(directory)
        if _create(directory, me):
            return me
        holder = _living(directory)
        if holder is not None:
            raise HeldError(
                f"run directory {str(directory)!r} is held by {holder}: wait, stop it, or use another --out"
            )
        _write(directory, me)
        time.sleep(_SETTLE_S)
        winner = holder_of(directory)
    except OSError as error:
        raise RunError(f"run directory {str(directory)!r} cannot be written: {error.strerror or error}") from error
    if not _is_of(winner, me):
        raise HeldError(f"run directory {str(directory)!r} was claimed by {winner} at the same moment: wait or stop it")
    return me


def _living(directory: Path) -> str | None:
    """Return the living holder of the directory; None if the holder is dead, silent or gone."""
    first = _content(directory)
    holder = _parsed(first)
    is_dead = holder.is_dead if holder is not None else None
    if is_dead or first is None:
        return None
    if holder is not None and holder.is_copied(directory):
        is_dead = None  # it lives, but perhaps not for this directory
    if is_dead is None:
        logger.warning("%s is held by %s: waiting for a sign of life", directory, holder or "another run")
        deadline = time.monotonic() + _SILENCE_S
        while (content := _content(directory)) == first:
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)
        if content is None:
            return None
        holder = _parsed(content)
    return str(holder or "another run")


def _is_of(holder: Holder | None, other: Holder) -> bool:
    return holder is not None and holder.token == other.token


# The file


def _create(directory: Path, holder: Holder) -> bool:
    """Create the claim file and tell whether it is new: of several drivers that try, exactly one succeeds."""
    file = directory / CLAIM_FILE
    if is_remote(file):
        return create(file, _encoded(holder)) is None
    try:
        with file.open("xb") as new:
            new.write(_encoded(holder))
    except FileExistsError:
        return False
    return True


def _write(directory: Path, holder: Holder) -> None:
    with draft(directory / CLAIM_FILE) as path:
        path.write_bytes(_encoded(holder))


def _rewrite(directory: Path, holder: Holder) -> None:
    """Overwrite the own claim in place: a draft needs space, and a full disk must not end a living driver's claim."""
    file = directory / CLAIM_FILE
    if is_remote(file):
        _write(directory, holder)
        return
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as held:
        held.write(_encoded(holder))
        held.truncate()


def _content(directory: Path) -> bytes | None:
    try:
        return read_bytes(directory / CLAIM_FILE, MOST_RECORD_BYTES)
    except FileNotFoundError:
        return None


def _encoded(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _parsed(content: bytes | None) -> Holder | None:
    """Return the holder in a claim file; None if it holds no claim, for example because it is being written."""
    try:
        record = parse_json(content or b"")
        known = {field.name: field.type for field in fields(Holder) if field.name in record}
        return Holder(**{name: kind(record[name]) for name, kind in known.items()})  # type: ignore[operator]
    except (ValueError, TypeError, KeyError, OverflowError):
        return None


def _place(directory: Path) -> str:
    return str(directory).rstrip("/") if is_remote(directory) else str(directory.stat().st_ino)


# Processes


def _birth(pid: int) -> str:
    """Return the start of a process in ticks since its machine's; "zombie" after its end; empty if it is unknown."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "zombie" if state in "ZX" else numbers[18]


def _machine() -> str:
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"
