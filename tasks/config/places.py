"""The places in run files: where a run's directory is by now, and what its relative paths are relative to.

Relative paths are relative to the directory in which a command is started, in run files as on the command line. A run
notes that directory, so that a replay from elsewhere finds the same files, or says that it does not.
"""

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from negcore.errors import RunError
from negcore.store.files import is_remote, listing, location

logger = logging.getLogger(__name__)

_PATHS = ("model", "dataset", "facts", "mceval8k")
"""Fields that may hold paths."""


def moved_here(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a run file that a run wrote, with the directory that the file is in now as the run's.

    A file that nobody's run wrote, without shards beside it, names the directory of a run that is still to come, and is
    left as it is.
    """
    here = file.parent if is_remote(file) else file.parent.absolute()
    if not isinstance(values.get("out"), str) or not (values.get("written_by") or _holds_shards(here)):
        return dict(values)
    if _is_same(location(values["out"]), here):
        return dict(values)
    _warn_once(f"{file} was written for {values['out']}: the run is taken to be in {here}")
    return {**values, "out": str(here)}


def _holds_shards(directory: Path) -> bool:
    """Tell whether a directory holds any kind of shards of a model."""
    return any(one.name.startswith("model=") for kind in listing(directory).folders for one in listing(kind).folders)


def _is_same(one: Path, other: Path) -> bool:
    if is_remote(one) or is_remote(other):
        return str(one).rstrip("/") == str(other).rstrip("/")
    try:
        return one.samefile(other)
    except OSError:
        return one.absolute() == other.absolute()


def check_relative_paths(file: Path, values: Mapping[str, Any], overridden: Mapping[str, Any]) -> None:
    """Refuse a run file whose relative paths are there where it was written, or beside it, but not from here.

    Raises
    ------
    RunError
        With both absolute paths. A file that is there and here is taken from here, with a word.
    """
    writer = values.get("written_by")
    noted = writer.get("directory") if isinstance(writer, Mapping) else None
    base = Path(noted) if isinstance(noted, str) else file.parent
    if is_remote(base) or base.absolute() == Path.cwd():
        return
    for given in _paths({name: value for name, value in values.items() if name not in overridden}):
        here, there = Path(given).absolute(), base.absolute() / given
        if Path(given).is_absolute() or not _exists(there) or _is_same(here, there):
            continue
        if not _exists(here):
            raise RunError(
                f"{file}: {given!r} is relative to the directory in which the command is started, and {str(here)!r} is "
                f"not there; {str(there)!r} is: start the command in {str(base)!r}, or give its absolute path"
            )
        _warn_once(f"{file}: {given!r} is taken to be {here}, not {there}")


@cache
def _warn_once(message: str) -> None:
    """Warn once in a process, however often a run file is read in it."""
    logger.warning("%s", message)


def _paths(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):  # the fields of a campaign's study
            yield from _paths(value)
        elif name in _PATHS:
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or with a null character
        return False
