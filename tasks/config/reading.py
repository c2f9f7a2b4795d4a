"""Reading run files: of the kind that a command is for, or of whichever kind the file says."""

import logging
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from negcore.errors import RunError, one_line
from negcore.store.files import is_dir, location, near_path, read_bytes
from negcore.texts import quoted
from tasks.config.kinds import run_classes
from tasks.config.places import check_relative_paths, moved_here
from tasks.config.plain_yaml import PlainLoader
from tasks.config.problems import as_options, problem_lines
from tasks.config.run_file import RUN_FILE, RunFile, kind_of

_MOST_BYTES = 2**19
"""Bytes of a run file: a list of some thousand models and datasets."""

_COMMAND_LINE = "command line"

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=RunFile)


def read_run_file(run_class: type[R], path: str | Path | None, overrides: Mapping[str, Any]) -> R:
    """Read a run file of one kind, with the command line's values in place of its own.

    Parameters
    ----------
    run_class : subclass of RunFile
    path : path, optional
        A YAML file of plain values, or a run directory that holds one; on disk or ``s3://BUCKET/...``.
    overrides : mapping of field to value

    Raises
    ------
    RunError
        Naming file, field, value and what is allowed, in a line for each problem; or the command that the file is for.
    """
    if path is None:
        return _validated(run_class, dict(overrides), _COMMAND_LINE)
    own = kind_of(run_class)
    values = _read_values(path, overrides, first=own)
    if values["kind"] != own:
        raise RunError(f"{path} holds a {values['kind']} run: use neg {values['kind']}")
    return _validated(run_class, values, str(path))


def recorded_run(path: str | Path, overrides: Mapping[str, Any] | None = None, *, to_look_at: bool = False) -> RunFile:
    """Read the run file of a run directory, or a file, as the kind of run that it says it is.

    Parameters
    ----------
    path, overrides
        As for `read_run_file`.
    to_look_at : bool
        True if the run is not to be carried out: it does not matter where its models and data are, and `out` is left.

    Raises
    ------
    RunError
        If it cannot be read, or no kind is the file's.
    """
    values = _read_values(path, overrides or {}, to_look_at=to_look_at)
    classes = run_classes()
    any_class: Any = Annotated[Union[tuple(classes.values())], Field(discriminator="kind")]  # noqa: UP007
    any_run: TypeAdapter[RunFile] = TypeAdapter(any_class)
    try:
        return any_run.validate_python(values)
    except ValidationError as error:
        kind = values["kind"]
        raise _refusal(str(path), problem_lines(classes[kind], error, below=kind)) from None


def _validated(run_class: type[R], values: Mapping[str, Any], place: str) -> R:
    try:
        return run_class.model_validate(values)
    except ValidationError as error:
        lines = problem_lines(run_class, error)
        raise _refusal(place, lines if place != _COMMAND_LINE else as_options(run_class, lines)) from None


def _refusal(place: str, lines: Iterable[str]) -> RunError:
    return RunError("\n".join(f"{place}: {line}" for line in lines))


def _read_values(
    path: str | Path, overrides: Mapping[str, Any], first: str | None = None, *, to_look_at: bool = False
) -> dict[str, Any]:
    """Return what a file holds, overridden; the kind of a file that names none is guessed."""
    place = location(path)
    file = place / RUN_FILE if is_dir(place) else place
    found = _read_yaml(file)
    if not to_look_at:
        check_relative_paths(file, found, overrides)
        found = found if file.name != RUN_FILE or "out" in overrides else moved_here(file, found)
    values = found | dict(overrides)
    if "kind" not in values:
        values["kind"] = _guessed_kind(file, values, first)
    if values["kind"] not in list(run_classes()):
        raise RunError(f"{file}: kind is {quoted(values['kind'])}, but must be one of {', '.join(run_classes())}")
    return values


def _guessed_kind(file: Path, values: dict[str, Any], first: str | None) -> str:
    """Return the kind that values fit, and say so; if they fit none, the wanted one or that of most of the fields."""
    classes = run_classes()
    wanted = {first: classes[first]} if first in classes else {}
    for kind, run_class in (wanted | classes).items():
        try:
            run_class.model_validate(values)
        except ValidationError:
            continue
        _tell_missing_kind(file, kind)
        return kind
    return first or min(classes, key=lambda kind: len(values.keys() - classes[kind].key_descriptions().keys()))


@cache
def _tell_missing_kind(file: Path, kind: str) -> None:
    logger.warning("%s names no kind and is read as a %s run; a later version needs `kind: %s` in it", file, kind, kind)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(read_bytes(file, _MOST_BYTES).decode("utf-8"), PlainLoader)
    except RunError:
        raise
    except OSError as error:
        near = near_path(file) if isinstance(error, FileNotFoundError) else ""
        reason = f"{error.strerror or error}" + f"; {near}" * bool(near)
        raise RunError(f"run file {str(file)!r} cannot be read: {reason}") from error
    except RecursionError:
        raise RunError(f"run file {str(file)!r} is not YAML of a run: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        quotes = "; text that begins with it needs quotes" * ("cannot start any token" in f"{error}")
        raise RunError(f"run file {str(file)!r} is not YAML: {one_line(error):.400}{quotes}") from error
    if not isinstance(values, dict):
        raise RunError(f"run file {str(file)!r} must hold a mapping of fields, but holds {type(values).__name__}")
    return values
