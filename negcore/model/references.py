"""References of models: what the user writes to name one.

`BASE+FOLDER` names a base model and the folder of an adapter that is merged into it.
"""

import errno
from pathlib import Path
from typing import NamedTuple

from negcore.errors import ModelError


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
