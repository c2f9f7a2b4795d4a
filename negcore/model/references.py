"""References of models: what the user writes to name one.

`BASE+FOLDER` names a base model and the folder of an adapter that is merged into it, `BASE@REVISION` a branch, tag or
commit of a model of the hub.
"""

import errno
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from negcore.errors import ModelError
from negcore.model.embedded import EMBEDDED


class Reference(NamedTuple):
    """A model reference in its parts."""

    base: str
    adapter: Path | None
    """Folder of the adapter that is merged into the base."""


def with_adapter(ref: str, adapter: Path | str | None) -> str:
    """Return the reference of a model with an adapter; of the model alone where there is none."""
    return ref if adapter is None else f"{ref}+{adapter}"


def parse_reference(ref: str) -> Reference:
    """Split a model reference at the `+` behind which a folder is named; one that is a path itself is not split."""
    if not is_directory(ref) and not is_gguf(ref):
        places = [place for place, letter in enumerate(ref) if letter == "+"]
        for place in places:
            if is_directory(ref[place + 1 :]):
                return Reference(ref[:place], Path(ref[place + 1 :]))
        if places and ref[: places[0]]:
            raise ModelError(f"model {ref!r}: {ref[places[0] + 1 :]!r} is no folder of an adapter")
    return Reference(ref, None)


def is_gguf(ref: str) -> bool:
    """Tell whether a model reference names a GGUF file, in whatever case its ending is written."""
    return ref.lower().endswith(".gguf")


def is_directory(ref: str) -> bool:
    """Tell whether a model reference names a directory; False for what can be no path at all.

    Raises
    ------
    ModelError
        If it cannot be looked at.
    """
    try:
        return bool(ref) and Path(ref).is_dir()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise ModelError(f"model {ref!r}: cannot be read ({error.strerror})") from error
    except ValueError:  # a null character
        return False


def is_local(base: str) -> bool:
    """Tell whether a reference without adapter names files of this machine, which have no revisions."""
    return base in EMBEDDED or is_directory(base) or is_gguf(base)


def model_name(ref: str) -> str:
    """Return the name that a model has in every output: its reference, for one of the hub without the revision."""
    base, adapter = parse_reference(ref)
    return with_adapter(base if is_local(base) else base.partition("@")[0], adapter)


def model_names(refs: Iterable[str]) -> dict[str, str]:
    """Return the names of a run's models by their references, in order.

    Names are those of `model_name`; where several are of one model, its references with their revisions.
    """
    names = {ref: _name_or_itself(ref) for ref in refs}
    taken = list(names.values())
    return {ref: name if taken.count(name) == 1 else ref for ref, name in names.items()}


def _name_or_itself(ref: str) -> str:
    try:
        return model_name(ref)
    except ModelError:  # it cannot be used, as is said when it is described
        return ref


def folder_name(ref: str) -> str:
    """Return a name for what is kept of a model: the last part of its reference, with its whole revision."""
    base, _, revision = ref.partition("@")
    return f"{Path(base).name}@{revision.replace('/', '-')}" if revision and not is_local(ref) else Path(ref).name


def whole_references(given: Sequence[str]) -> tuple[str, ...]:
    """Return references in full where `@REVISION` alone repeats the model before it.

    One text may name several revisions: ``org/name@step1000, @step2000``.

    Raises
    ------
    ModelError
        If there is no model before a revision, or it has none.
    """
    whole: list[str] = []
    for text in given:
        for part in [text] if is_directory(text) else re.split(r"\s*,\s*(?=@)", text):
            whole.append(_revision_of(whole[-1] if whole else None, part) if part.startswith("@") else part)
    return tuple(whole)


def _revision_of(before: str | None, revision: str) -> str:
    if revision == "@":
        raise ModelError("'@' names no revision: write a branch, tag or commit behind it")
    if before is None:
        raise ModelError(f"{revision!r} is one of the model before it, and there is none: write org/name{revision}")
    base, adapter = parse_reference(before)
    if is_local(base):
        raise ModelError(f"{revision!r} is one of the model before it, and {before!r} is none of the hub's")
    return with_adapter(base.partition("@")[0] + revision, adapter)
