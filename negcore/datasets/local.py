"""Read a JSONL file of your own: ready-made prompts with labels."""

from __future__ import annotations

import json
import logging
import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from negcore.datasets.base import SPLITS
from negcore.datasets.files import Record, read_json_lines
from negcore.datasets.rows import Row, Source, check_unicode, normalised
from negcore.datasets.splits import ONE_IN, by_unit, split_rows
from negcore.errors import DatasetError, PromptError
from negcore.model.prompt_ids import end_of_piece
from negcore.texts import row_text

logger = logging.getLogger(__name__)

FIELDS = ("prompt", "labels", "answer", "id", "group", "unit", "split", "probe_at")
_LONGEST_LABEL = 1000
NEEDED = "each line needs prompt (text), labels (a list of texts), answer (an index into labels or a label)"


def read_local(path: Path, seed: int) -> Source:
    """Read a JSONL file with the fields `prompt`, `labels` and `answer`, optionally `id`, `group`, `unit`, `split` and
    `probe_at`.

    Without `split`, the rows are cut 60/20/20 in an order that depends on `seed`, with answers in equal proportions;
    rows of one unit, or of one text, go into the same split.

    Raises
    ------
    DatasetError
        If the file is empty, a line is malformed, an id occurs twice, or only some lines name a split.
    """
    lines = read_json_lines(path)
    if not lines:
        raise DatasetError(f"{path}: the file has no rows; {NEEDED}")
    _tell_unread(path, tuple(dict.fromkeys(name for _, record in lines for name in record if name not in FIELDS)))
    return source_of([(number, f"{path}:{number}", record) for number, record in lines], path, seed)


def source_of(lines: Sequence[tuple[int, str, Record]], path: Path, seed: int) -> Source:
    """Check the rows of a JSONL file and cut them into splits.

    Parameters
    ----------
    lines : sequence of (int, str, Record)
        The number of each line in the file, the place that messages name, and its object.
    path : Path
        The file.

    Raises
    ------
    DatasetError
        As `read_local`.
    """
    rows: dict[str, Row] = {}
    split_of: dict[str, str | None] = {}
    indexed = {_names(record) for _, _, record in lines if _is_only_index(record)}
    for number, place, record in lines:
        row = _row(record, path.stem, number, place, is_index=_names(record) in indexed)
        if row.id in rows:
            raise DatasetError(f"{place}: id {row_text(row.id)} occurs twice; ids must be unique")
        rows[row.id] = row
        split_of[row.id] = _split(record, place)
    return Source("local", _cut(rows, split_of, path, seed), dict.fromkeys(SPLITS, 0), ())


@cache
def _tell_unread(path: Path, fields: tuple[str, ...]) -> None:
    if fields:
        known = ", ".join(FIELDS)
        logger.warning("%s: not read are the fields %s; known are %s", path, ", ".join(map(repr, fields)), known)


def _cut(rows: dict[str, Row], split_of: dict[str, str | None], path: Path, seed: int) -> dict[str, list[Row]]:
    named = {split for split in split_of.values() if split}
    if not named and len(rows) < ONE_IN:
        raise DatasetError(f"{path}: {len(rows)} rows cannot be cut into splits; give {ONE_IN} or a split field")
    if not named and (n_units := len({by_unit(row) for row in rows.values()})) < len(SPLITS):
        raise DatasetError(f"{path}: rows of {n_units} texts or units cannot be cut into splits; give a split field")
    if not named:
        return {split: list(part) for split, part in split_rows(list(rows.values()), seed, path.stem).items()}
    if None in split_of.values():
        raise DatasetError(f"{path}: some rows have a split and some have none; give all rows one, or none")
    return {split: [row for row in rows.values() if split_of[row.id] == split] for split in SPLITS}


def _split(record: Record, place: str) -> str | None:
    split = record.get("split")
    if split is not None and split not in SPLITS:
        raise DatasetError(f"{place}: split is {row_text(split)}; allowed: {', '.join(map(repr, SPLITS))}")
    return split


def _row(record: Record, stem: str, number: int, place: str, *, is_index: bool) -> Row:
    missing = [name for name in ("prompt", "labels", "answer") if name not in record]
    if missing:
        raise DatasetError(f"{place}: {missing[0]!r} is missing; {NEEDED}")
    prompt = text_field(record, "prompt", place)
    labels = _labels(record["labels"], place)
    return Row(
        id=_name(record, "id", place) or f"{stem}/{number}",
        fields={"prompt": prompt.rstrip(" ")},
        options=labels,
        answer=_answer(record["answer"], labels, place, is_index=is_index),
        group=_name(record, "group", place),
        content=normalised(prompt),
        whole=json.dumps(record, sort_keys=True),
        unit=normalised(_name(record, "unit", place)),
        place=place,
        probe_at=_probe_at(record, prompt.rstrip(" "), place) if "probe_at" in record else "",
    )


def _probe_at(record: Record, prompt: str, place: str) -> str:
    """Return the piece of the prompt at whose last token neurons are read, which stands in it once."""
    piece = text_field(record, "probe_at", place)
    try:
        end_of_piece(prompt, piece)
    except PromptError as error:
        raise DatasetError(f"{place}: {error}") from None
    return piece


def _name(record: Record, field: str, place: str) -> str:
    """Return an id, a group or a unit, which may be a number; empty if there is none."""
    value = record.get(field, "")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value in (math.inf, -math.inf):
        raise DatasetError(f"{place}: {field} is {row_text(value)}; allowed: text or a number")
    check_unicode(str(value), f"{place}, {field}")
    return str(value)


def text_field(record: Record, name: str, place: str) -> str:
    """Return a field that must hold text other than spaces."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{place}: {name} is {row_text(value)}; allowed: text that is not empty")
    check_unicode(value, place)
    return value


def _labels(value: Any, place: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise DatasetError(f"{place}: labels is {row_text(value)}; allowed: a list of two or more texts")
    labels = tuple(text_field({"label": label}, "label", place).strip() for label in value)
    if (longest := max(map(len, labels))) > _LONGEST_LABEL:
        raise DatasetError(f"{place}: a label of {longest} characters; allowed: up to {_LONGEST_LABEL}")
    if len({unicodedata.normalize("NFC", label) for label in labels}) < len(labels):
        raise DatasetError(f"{place}: labels {row_text(value)} repeat; each option needs its own label")
    return labels


def _names(record: Record) -> tuple[str, ...]:
    """Return the labels of a row in any order, whatever they are."""
    labels = record.get("labels")
    return tuple(sorted(str(label).strip() for label in labels)) if isinstance(labels, list) else ()


def _is_only_index(record: Record) -> bool:
    """Tell whether a row's answer is a number that is none of its labels: then rows with these labels have indices."""
    answer = record.get("answer")
    return isinstance(answer, int) and not isinstance(answer, bool) and str(answer) not in _names(record)


def _answer(value: Any, labels: tuple[str, ...], place: str, *, is_index: bool) -> int:
    """Return the index of the right label: a number is an index and text a label, never the other way round.

    A number that is another option's label too is refused, unless `is_index` says that it can be none.
    """
    if isinstance(value, str) and value.strip() in labels:
        return labels.index(value.strip())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        if not is_index and str(value) in labels and labels[value] != str(value):
            raise DatasetError(
                f"{place}: answer {value} is ambiguous with labels {row_text(labels, 120)}: as an index "
                f"it is {row_text(labels[value])}, as a label {str(value)!r}; give the label as text, in quotes, or "
                "other labels"
            )
        return value
    raise DatasetError(
        f"{place}: answer is {row_text(value)}; allowed: 0 to {len(labels) - 1}, or one of the labels "
        f"{row_text(labels, 120)}"
    )
