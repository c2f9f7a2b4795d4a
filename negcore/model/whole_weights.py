"""Models with all weights of their files and no others: transformers fills gaps and drops what is over in silence."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from negcore.model.model_files import HARMLESS

_NAMED = 3
"""Weights that a message names."""


def load_whole(kind: Any, source: Path | str, **options: Any) -> Any:
    """Load a model with transformers, and check that its weights are those of its files.

    Raises
    ------
    ValueError
        If weights are missing, have other shapes than the configuration says, or have no place in the model.
    """
    model, loading = kind.from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
    )
    if loading["mismatched_keys"]:
        name, there, wanted = min(loading["mismatched_keys"])
        raise ValueError(
            f"its weights do not fit its configuration: {name} is {_shape(there)} in its files, {_shape(wanted)} by "
            f"config.json{_and_more(loading['mismatched_keys'])}"
        )
    if loading["missing_keys"]:
        missing = loading["missing_keys"]
        raise ValueError(f"its files lack the weights {min(missing)}{_and_more(missing)}: fetch or save it again")
    refuse_unused(sorted(name for name in loading["unexpected_keys"] if not HARMLESS.search(name)))
    return model


def refuse_unused(weights: Sequence[str]) -> None:
    """Refuse weights that have no place in their model.

    Raises
    ------
    ValueError
    """
    if weights:
        named = ", ".join(weights[:_NAMED]) + f" (and {len(weights) - _NAMED} more)" * (len(weights) > _NAMED)
        raise ValueError(
            f"its files hold weights that have no place in the model of its configuration: {named}: the configuration "
            "is of another model, or asks for something that cannot be loaded"
        )


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _and_more(names: Collection[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
