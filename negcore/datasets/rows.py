"""Rows: the checked and tidied records of a file, before they become prompts."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from negcore.datasets.base import Wording
from negcore.datasets.files import Record
from negcore.datasets.specs import OptionsField, Spec
from negcore.errors import DatasetError
from negcore.texts import row_text


@dataclass(frozen=True, slots=True)
class Row:
    """One question."""

    id: str
    fields: Mapping[str, str]
    """Text by field name, with spacing collapsed."""
    options: tuple[str, ...]
    answer: int
    group: str
    content: str
    """Normalised text of the question, equal for two rows that ask the same."""
    whole: str
    """Unchanged record as JSON with sorted keys."""
    unit: str = ""
    """Normalised text of the sentence, premise or other unit that rows may share; empty if there is none."""
    place: str = ""
    """File and line, for messages; empty for a released dataset, whose ids say it."""
    probe_at: str = ""
    """Piece of the field `prompt` at whose last token neurons are read; empty for the prompt's end."""

    @property
    def gold(self) -> str:
        """Text of the gold option."""
        return self.options[self.answer]


def row_from_record(spec: Spec, record: object, row_id: str, place: str) -> Row | None:
    """Check one record against its dataset's spec.

    Returns
    -------
    Row or None
        None for a damaged record, in which a field or option of the prompt is empty.

    Raises
    ------
    DatasetError
        If a field is missing, or has a type or an answer that the spec does not allow.
    """
    if not isinstance(record, Mapping):
        raise DatasetError(f"{place}: {type(record).__name__} found; a JSON object is needed")
    fields = {name: tidy(_get(record, name, place), f"{place}, field {name!r}") for name in spec.fields}
    options = _options(spec, record, place)
    if not all(fields.values()) or not all(options):
        return None
    shown = [fields[name] for name in spec.fields] + (sorted(options) if spec.options_are_content else [])
    return Row(
        id=row_id,
        fields=fields,
        options=options,
        answer=_answer(spec, record, place),
        group=tidy(_get(record, spec.group, place), place) if spec.group else "",
        content="\n".join(map(normalised, shown)),
        whole=json.dumps(record, sort_keys=True),
        unit=normalised(tidy(_get(record, spec.unit, place), place)) if spec.unit else "",
    )


def _get(record: Record, name: str, place: str) -> Any:
    if name not in record:
        raise DatasetError(f"{place}: field {name!r} is missing; found {row_text(list(record), 300)}")
    return record[name]


def _options(spec: Spec, record: Record, place: str) -> tuple[str, ...]:
    if not isinstance(spec.options, OptionsField):
        return spec.options
    field_name, n_options = spec.options.name, spec.options.n_options
    values = _get(record, field_name, place)
    if not isinstance(values, list) or len(values) != n_options:
        raise DatasetError(f"{place}: {field_name!r} is {row_text(values)}; a list of {n_options} is needed")
    return tuple(tidy(spec.option_names.get(str(v), v), f"{place}, {field_name!r}") for v in values)


def _answer(spec: Spec, record: Record, place: str) -> int:
    value = _get(record, spec.answer, place)
    allowed = spec.answer_values or tuple(range(spec.n_options))
    if isinstance(value, bool) or value not in allowed:
        raise DatasetError(f"{place}: {spec.answer!r} is {row_text(value)}; allowed: {', '.join(map(repr, allowed))}")
    return allowed.index(value)


def tidy(value: object, place: str) -> str:
    """Return text with its spacing collapsed; a list of words is joined, None becomes empty."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        value = " ".join(value)
    if not isinstance(value, str):
        raise DatasetError(f"{place}: {row_text(value)} is not text")
    check_unicode(value, place)
    return " ".join(value.split())


def check_unicode(text: str, place: str) -> None:
    """Refuse lone surrogates, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DatasetError(f"{place}: {row_text(text)} is not valid Unicode (a lone surrogate)") from None


def normalised(text: str) -> str:
    """Return text in NFKC, case-folded, with spacing collapsed, as the `clean` policy compares it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def group_is_answer(rows: Sequence[Row]) -> bool:
    """Tell whether groups give the answer away, as languages do where the language is asked for.

    That is so if each group has one answer (one index, or one text), not all have the same, and most have several rows.
    """
    pairs = ({(row.group, row.answer) for row in rows}, {(row.group, row.gold) for row in rows})
    n_groups = len({row.group for row in rows})
    is_told = any(len(pair) == n_groups and len({answer for _, answer in pair}) > 1 for pair in pairs)
    return is_told and 2 * n_groups <= len(rows)


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of a dataset by split, before any policy."""

    genre: str
    rows: dict[str, list[Row]]
    n_damaged: dict[str, int]
    wordings: tuple[Wording, ...]
    """Wordings of the dataset; empty for ready-made prompts."""
    group_is_answer: bool = False
    """True if groups were taken away from the rows because they gave the answer away."""

    def with_telling_groups(self) -> Source:
        """Return the source without its groups if these give the answer away."""
        if not group_is_answer([row for rows in self.rows.values() for row in rows]):
            return self
        rows = {split: [replace(row, group="") for row in rows] for split, rows in self.rows.items()}
        return replace(self, rows=rows, group_is_answer=True)


def rows_of_records(spec: Spec, records: Mapping[str, Sequence[object]], places: Mapping[str, str]) -> Source:
    """Check the records of every split; errors name each split's origin as in `places`."""
    rows: dict[str, list[Row]] = {}
    for split, found in records.items():
        parsed = (
            row_from_record(spec, record, f"{spec.name}/{split}/{i}", f"{places[split]}, record {i}")
            for i, record in enumerate(found)
        )
        rows[split] = [row for row in parsed if row is not None]
    n_damaged = {split: len(records[split]) - len(rows[split]) for split in records}
    return Source(spec.genre, rows, n_damaged, spec.wordings)
