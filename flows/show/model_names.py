"""Models by the names that people call them in tables, titles and figures: that of a path is its last part."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath

_told_apart: ContextVar[Mapping[str, str]] = ContextVar("told_apart", default={})  # noqa: B039 (never changed)


def shown_model(model: str) -> str:
    """Return the name of a model for people; inside `told_apart`, no two models have the same."""
    return _told_apart.get().get(model) or _last_parts(model, 1)


@contextmanager
def told_apart(models: Iterable[str]) -> Iterator[None]:
    """Give models that end alike as much more of their paths as tells them apart, inside the block."""
    token = _told_apart.set(distinct_names(models))
    try:
        yield
    finally:
        _told_apart.reset(token)


def distinct_names(models: Iterable[str]) -> dict[str, str]:
    """Return the shortest names of models that are all different, by what they were given as."""
    given = list(dict.fromkeys(models))
    names = {model: _last_parts(model, 1) for model in given}
    for n_parts in range(2, 2 + max((len(PurePosixPath(model).parts) for model in given), default=0)):
        doubled = [model for model in given if list(names.values()).count(names[model]) > 1]
        names |= {model: _last_parts(model, n_parts) for model in doubled}
    return {model: name if list(names.values()).count(name) == 1 else model for model, name in names.items()}


def _last_parts(model: str, n: int) -> str:
    """Return the end of a path, of a model's and of its adapter's; the name of any other model as it is."""
    base, _, adapter = model.partition("+")
    if base and adapter and _is_path(adapter):
        return f"{_last_parts(base, n)}+{_last_parts(adapter, n)}"
    return "/".join(PurePosixPath(model).parts[-n:]).replace("//", "/") if _is_path(model) else model


def _is_path(model: str) -> bool:
    """Tell whether a model was given as a path, also one that is not there any more; `org/name` is the hub's."""
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.lower().endswith(".gguf"):
        return True
    try:
        return Path(model).exists()
    except (OSError, ValueError):  # no name that a file can have
        return False
