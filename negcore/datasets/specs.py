"""Specs: the named datasets as data, read from the TOML files beside this module.

To add a dataset, add one table to `mceval8k.toml`, or to `mini.toml` together with its rows in `mini_rows/`. The
table's name is the dataset's, its keys are the fields of `Spec`, and `wordings.NAME` holds the fields of a `Wording`.
The key `like` names another table of the file, whose keys count where the table has none of its own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from negcore.datasets.base import Wording
from negcore.errors import DatasetError

T = TypeVar("T")
INLINE = {"option": "({letter}) {text}", "separator": "  ", "cue": "The letter of the right option is"}
"""Layout of every wording called `inline`: the options in one line. Other wordings list them."""


@dataclass(frozen=True, slots=True)
class OptionsField:
    """A field that holds each row's own options."""

    name: str
    n_options: int


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One dataset as data: its place, the fields of its records and its wordings."""

    name: str
    genre: str
    fields: tuple[str, ...]
    """Fields in the question; two rows with the same text in them ask the same."""
    options: tuple[str, ...] | OptionsField
    """Options of every row, or the field that holds a row's own."""
    answer: str = "label"
    """Field with the gold option: an index into the options, unless `answer_values` is given."""
    answer_values: tuple[Any, ...] = ()
    """Values of the answer field in the order of the options."""
    option_names: Mapping[str, str] = field(default_factory=dict)
    """Words for options that are codes."""
    options_are_content: bool = False
    """True if rows with the same fields but other options ask something else."""
    group: str | None = None
    """Field with the group, such as the language."""
    unit: str | None = None
    """Field with the unit that several rows may be about, such as the sentence: policy `clean` keeps it whole."""
    aliases: tuple[str, ...] = ()
    """Other accepted spellings of the name and of the folder."""
    wordings: tuple[Wording, ...]

    @property
    def folders(self) -> tuple[str, ...]:
        """Folder names to look for, in this order."""
        return (self.name, *self.aliases)

    @property
    def n_options(self) -> int:
        return self.options.n_options if isinstance(self.options, OptionsField) else len(self.options)


def read_specs(path: Path) -> tuple[Spec, ...]:
    """Read the specs of a TOML file, one from each table, in their order.

    Raises
    ------
    DatasetError
        If the file is not TOML, or a table has an unknown key or lacks one that is needed.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise DatasetError(f"{path}: not TOML ({error})") from None
    return tuple(_spec(name, tables, f"{path}, dataset {name!r}") for name in tables)


def _spec(name: str, tables: Mapping[str, Any], place: str) -> Spec:
    keys = _keys(name, tables, place)
    if isinstance(keys.get("options"), dict):
        keys["options"] = _made(OptionsField, keys["options"], f"{place}, options")
    if "wordings" in keys:
        keys["wordings"] = [_wording(wording, texts, place) for wording, texts in keys["wordings"].items()]
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    return _made(Spec, frozen, place, name=name)


def _wording(name: str, keys: Mapping[str, str], place: str) -> Wording:
    layout = INLINE if name == "inline" else {}
    return _made(Wording, {**layout, **keys}, f"{place}, wording {name!r}", name=name)


def _keys(name: str, tables: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the keys of a table, with those of the table that it is like."""
    keys = dict(tables[name])
    if (base := keys.pop("like", name)) not in tables:
        raise DatasetError(f"{place}: like is {base!r}; allowed: the other datasets of the file")
    return {key: value for key, value in tables[base].items() if key != "like"} | keys


def _made(kind: type[T], keys: Mapping[str, Any], place: str, **given: str) -> T:
    """Make a dataclass of what is given and of keys, none of which may be unknown or missing."""
    needed = {
        one.name: one.default is MISSING and one.default_factory is MISSING
        for one in fields(kind)  # type: ignore[arg-type]
        if one.name not in given
    }
    for key in keys:
        if key not in needed:
            raise DatasetError(f"{place}: the key {key!r} is unknown; allowed: {', '.join(needed)}")
    for key, is_needed in needed.items():
        if is_needed and key not in keys:
            raise DatasetError(f"{place}: the key {key!r} is missing; add it")
    return kind(**given, **keys)
