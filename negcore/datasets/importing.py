"""Import a table of others: its columns become the fields of a JSONL file of your own.

Nothing is changed or guessed without a word: `Imported.told` says what each field was taken from, what was read
differently than it is written, and which columns were not used.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from negcore.datasets.base import SPLITS, in_one_line
from negcore.datasets.files import Record
from negcore.datasets.local import source_of
from negcore.datasets.sheets import Sheet
from negcore.errors import DatasetError
from negcore.orders import LETTERS
from negcore.texts import did_you_mean, row_text

Answers = Literal["text", "letter", "0", "1"]
"""The form of a cell of the answer column: an option's text, its letter, or its number counted from 0 or from 1."""

_ANSWERS = {"text": "texts of options", "letter": "letters", "0": "numbers from 0", "1": "numbers from 1"}
_USUAL: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "prompt": ("prompt", "question", "text", "sentence", "input"),
        "answer": ("answer", "label", "target", "gold", "correct", "answerkey", "correct_answer", "class", "category"),
        "options": ("options", "choices", "choices.text", "labels", "endings"),
        "split": ("split",),
        "group": ("group",),
        "unit": ("unit",),
        "id": ("id",),
        "probe_at": ("probe_at",),
    }
)
"""Names by which a column is taken without being named, if it is the only one with any of them."""
_OPTION_NAME = re.compile(r"(?:option|choice|answer|ending)?[ _-]?([a-z]|\d)", re.IGNORECASE)
_SPLITS = {"validation": "valid", "val": "valid", "dev": "valid", "training": "train", "testing": "test"}
OPTIONS = "options"
"""Name in a prompt's template that stands for the options with letters, a line each."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns that the fields are taken from. None: the only column with a usual name, if there is one."""

    prompt: str | None = None
    """A column, or a text with columns in braces such as ``{question}``; ``{options}`` lists the options by letter."""
    answer: str | None = None
    options: tuple[str, ...] = ()
    """One column that holds a list of options, or a column for each option."""
    labels: tuple[str, ...] = ()
    """No columns, but the options of every row themselves."""
    answers: Answers | None = None
    """None: whatever alone fits every row."""
    split: str | None = None
    group: str | None = None
    unit: str | None = None
    id: str | None = None
    probe_at: str | None = None


@dataclass(frozen=True)
class Imported:
    """Rows as a JSONL file of your own has them."""

    rows: list[dict[str, Any]]
    told: tuple[str, ...]
    """Remarks on what was done, a line each."""
    has_letters: bool
    """True if the labels are letters of options that the prompt lists."""


_Taken = Mapping[str, tuple[str, ...]]
"""The columns of every field that has any."""


class _Question(NamedTuple):
    place: str
    record: Record
    options: tuple[str, ...]
    answer: str


def import_sheet(
    sheet: Sheet, columns: Columns, target: Path, *, unreadable: Literal["fail", "skip"] = "fail", seed: int = 0
) -> Imported:
    """Make the rows of a JSONL file out of a table, and check them as such.

    Parameters
    ----------
    sheet : Sheet
    columns : Columns
    target : Path
        The file that they are for.
    unreadable : str
        `skip` to leave out, and count, rows without a prompt, an answer or two options.

    Raises
    ------
    DatasetError
        If a column is not there, is missing and cannot be told by its name, or a row does not say what it must: with
        the row's place, and what to do.
    """
    taken, told = _taken(sheet, columns)
    pieces = _pieces(columns.prompt, sheet.columns) if "prompt" not in taken else [("", taken["prompt"][0])]
    has_letters = any(name == OPTIONS for _, name in pieces)
    labels, of_labels = _labels(sheet, columns, taken)
    letters = columns.labels if has_letters and not labels and columns.labels else tuple(LETTERS)
    questions, left_out = _questions(sheet, taken, labels, pieces, len(letters) if has_letters else None)
    if unreadable == "skip":
        left_out |= _without_answer(questions, columns.answers)
        questions = [one for one in questions if one.place not in left_out]
    elif left_out:
        raise DatasetError(f"{in_one_line(left_out)}; mend that, or leave such rows out with --unreadable skip")
    if not questions:
        raise DatasetError(f"no row can be imported: {in_one_line(left_out)}")
    reading, indices = _read_answers(questions, columns.answers)
    rows = []
    for one, index in zip(questions, indices, strict=True):
        options = letters[: len(one.options)] if has_letters else one.options
        row = {"prompt": _prompt(pieces, one, letters), "labels": list(options), "answer": options[index]}
        rows.append(row | {name: _kept(one.record[taken[name][0]]) for name in _MORE if _holds(one, taken, name)})
    told += [*of_labels, f"answers: {_ANSWERS[reading]}", *_renamed_splits(rows), *_cut_spaces(rows)]
    told += [f"left out: {in_one_line(left_out)}"] if left_out else []
    source_of([(n, one.place, row) for n, (one, row) in enumerate(zip(questions, rows, strict=True), 1)], target, seed)
    used = {name for names in taken.values() for name in names} | {name for _, name in pieces}
    unused = [name for name in sheet.columns if name not in used]
    told += [f"not used: the columns {_listed(unused)}"] if unused else []
    return Imported(rows, (*sheet.notes, *told), has_letters)


_MORE = ("id", "group", "unit", "split", "probe_at")


def _holds(question: _Question, taken: _Taken, name: str) -> bool:
    return name in taken and taken[name][0] in question.record


def _kept(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else _text(value)


# Columns


def _taken(sheet: Sheet, columns: Columns) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return the columns of every field that has any, and what is to be told of that."""
    taken: dict[str, tuple[str, ...]] = {}
    told = []
    for field in _USUAL:
        given = getattr(columns, field)
        named = given if isinstance(given, tuple) else (given,) * (given is not None)
        if field == "prompt" and given and given not in sheet.columns and "{" in given:
            told.append(f"prompt: made of the text {given!r}")
            continue
        for name in named:
            _check_column(name, field, sheet.columns)
        found = named or _guessed(field, columns, sheet)
        if found:
            taken[field] = found
            by = "" if named else ", by its name" if len(found) == 1 else ", by their names"
            told.append(f"{field}: column{'s' * (len(found) > 1)} {', '.join(map(repr, found))}{by}")
    return taken, told


def _check_column(name: str, field: str, columns: Sequence[str]) -> None:
    if name not in columns:
        near = did_you_mean(name, columns)
        raise DatasetError(f"--{field} {name!r} is no column; {near or 'see these'}: {_listed(columns)}")


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(map(repr, columns[:30])) + f" and {len(columns) - 30} more" * (len(columns) > 30)


def _guessed(field: str, columns: Columns, sheet: Sheet) -> tuple[str, ...]:
    """Return the columns that a field is taken from without being told so; none, if it can do without."""
    usual = [name for name in sheet.columns if name.strip().lower() in _USUAL[field]]
    if field == "options":
        if columns.labels and f"{{{OPTIONS}}}" not in (columns.prompt or ""):
            return ()
        usual = [name for name in usual if all(_as_list(record[name]) for _, record in sheet.records if name in record)]
        if not usual:
            return _option_columns(sheet.columns)
    elif field not in ("prompt", "answer"):
        usual = [name for name in usual if _is_plain(field, [record.get(name) for _, record in sheet.records])]
    if len(usual) > 1:
        raise DatasetError(f"several columns may be the {field}: {_listed(usual)}; name it with --{field}")
    if not usual and field in ("prompt", "answer"):
        known = f"none of the columns {_listed(sheet.columns)} has a usual name of the {field}"
        raise DatasetError(f"{known}, such as {', '.join(_USUAL[field][:3])}; name it with --{field}")
    return tuple(usual)


def _is_plain(field: str, values: Sequence[Any]) -> bool:
    """Tell whether a column with the name of a field holds what the field does: else it is another thing's."""
    if field == "split":
        return all(str(value).strip().lower() in (*SPLITS, *_SPLITS) for value in values)
    return field != "id" or len(set(map(str, values))) == len(values)


def _as_list(value: Any) -> list[Any] | None:
    """Return a list, also one that a text writes as JSON; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def _option_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """Return columns such as A, B, C or option_1, option_2, if there are two or more and none between is missing."""
    marks: dict[str, str] = {}
    for name in columns:
        if found := _OPTION_NAME.fullmatch(name.strip()):
            marks.setdefault(found[1].lower(), name)
    for row in (string.ascii_lowercase, string.digits, string.digits[1:]):
        run = row[: len(marks)]
        if len(marks) > 1 and set(run) == set(marks):
            return tuple(marks[mark] for mark in run)
    return ()


def _labels(sheet: Sheet, columns: Columns, taken: _Taken) -> tuple[tuple[str, ...], list[str]]:
    """Return the options that all rows share, none if rows have their own; and what is to be told of labels."""
    answer = taken["answer"][0]
    if columns.labels:
        is_for_letters = "options" in taken
        if is_for_letters and f"{{{OPTIONS}}}" not in (columns.prompt or ""):
            raise DatasetError(
                "--labels and --options are both given: leave one out, or have the prompt list the options behind "
                "these labels, with --prompt '...{options}...'"
            )
        return () if is_for_letters else columns.labels, [f"labels of every row: {_listed(columns.labels)}"]
    if "options" in taken:
        return (), []
    if answer in sheet.class_names:
        names = sheet.class_names[answer]
        return names, [f"labels of every row, which the file names for {answer!r}: {_listed(names)}"]
    texts = _shared_labels(answer, [record[answer] for _, record in sheet.records if answer in record])
    return texts, [f"labels of every row: the {len(texts)} values of {answer!r}, {_listed(texts)}"]


def _shared_labels(answer: str, values: Sequence[Any]) -> tuple[str, ...]:
    """Return the different values of the answer column, which are the labels of all rows."""
    texts = sorted({_text(value).strip() for value in values})
    if texts and all(map(_is_number, values)):
        raise DatasetError(
            f"column {answer!r} holds numbers such as {row_text(values[0])}: say which labels they stand for, first to "
            "last, with --labels, or which columns hold the options, with --options"
        )
    if len(texts) < 2 or 2 * len(texts) > len(values):
        raise DatasetError(
            f"column {answer!r} has {len(texts)} different values in {len(values)} rows, which are no labels that rows "
            "share: say which columns hold the options with --options, or name the labels with --labels"
        )
    return tuple(texts)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _answer_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else _text(value).strip()


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"[+-]?\d+([.,]\d+)?", value.strip()) is not None
    return isinstance(value, (int, float))


# Prompts


def _pieces(template: str | None, columns: Sequence[str]) -> list[tuple[str, str]]:
    """Return a prompt's template as texts, each with the name of what follows it; empty where nothing does."""
    assert template is not None
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DatasetError(f"--prompt {template!r} is malformed: {error}; write {{{{ for a brace") from None
    for _, name, form, conversion in parsed:
        if name is not None and (form or conversion):
            raise DatasetError(f"--prompt {template!r}: only names of columns may stand in braces, as in {{question}}")
        if name is not None and name != OPTIONS:
            _check_column(name, "prompt", columns)
    return [(text.replace("\\n", "\n"), name or "") for text, name, _, _ in parsed]


def _prompt(pieces: Sequence[tuple[str, str]], question: _Question, letters: Sequence[str]) -> str:
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, question.options, strict=False))
    values = {name: _text(value) for name, value in question.record.items()} | {OPTIONS: listed, "": ""}
    return "".join(text + values[name] for text, name in pieces)


# Rows


def _questions(
    sheet: Sheet, taken: _Taken, labels: tuple[str, ...], pieces: Sequence[tuple[str, str]], most: int | None
) -> tuple[list[_Question], dict[str, str]]:
    """Return the rows that have all they need, and why others have not, by their place."""
    answer = taken["answer"][0]
    needed = [name for _, name in pieces if name not in ("", OPTIONS)] + [answer]
    questions, left_out = [], {}
    for place, record in sheet.records:
        try:
            options = labels or _options(record, taken["options"])
            _check_cells(record, needed)
            if most is not None and len(options) > most:
                raise DatasetError(f"{len(options)} options, and labels for {most}")
        except DatasetError as error:
            left_out[place] = f"{place}: {error}"
        else:
            questions.append(_Question(place, record, options, _answer_text(record[answer])))
    return questions, left_out


def _check_cells(record: Record, needed: Iterable[str]) -> None:
    for name in needed:
        if name not in record:
            raise DatasetError(f"{name!r} is empty")
        if isinstance(record[name], (list, dict)):
            raise DatasetError(f"{name!r} is {row_text(record[name])}, which is no text")


def _options(record: Record, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the options of a row; one with a column for each may have fewer than others."""
    if len(columns) > 1:
        values = [record.get(name) for name in columns]
        while values and values[-1] is None:
            values.pop()
    else:
        found = _as_list(record.get(columns[0]))
        if found is None:
            held = row_text(record.get(columns[0]))
            raise DatasetError(f"{columns[0]!r} is {held}, no list; name a column for each option with --options")
        values = found
    if len(values) < 2:
        raise DatasetError(f"{len(values)} options, but two are needed")
    for number, value in enumerate(values, 1):
        if value is None or isinstance(value, (list, dict)) or not _text(value).strip():
            raise DatasetError(f"option {number} of {len(values)} is {'empty' if value is None else row_text(value)}")
    return tuple(map(_text, values))


def _without_answer(questions: Iterable[_Question], wanted: Answers | None) -> dict[str, str]:
    """Return the rows whose answer can be none of their options, and that, by their place."""
    names = (wanted,) if wanted else get_args(Answers)
    return {
        one.place: f"{one.place}: answer {row_text(one.answer)} is none of {row_text(list(one.options), 120)}"
        for one in questions
        if all(_READINGS[name](one) is None for name in names)
    }


def _cut_spaces(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is to be told of spaces that are in the file, and that no model will read."""
    n_prompts = sum(row["prompt"] != row["prompt"].rstrip(" ") for row in rows)
    n_labels = sum(label != label.strip() for row in rows for label in row["labels"])
    told = [f"spaces at the end of {n_prompts} prompts will not be read"] if n_prompts else []
    return told + ([f"spaces around {n_labels} labels will not be read"] if n_labels else [])


def _renamed_splits(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Call splits as they are called here, in the rows themselves, and return what is to be told of that."""
    renamed: dict[str, str] = {}
    for row in rows:
        split = row.get("split")
        if isinstance(split, str):
            usual = split.strip().lower()
            row["split"] = _SPLITS.get(usual, usual)
            if row["split"] != split:
                renamed[split] = row["split"]
    return [f"split {given!r} is called {usual!r}" for given, usual in renamed.items()]


# Answers


def _of_text(question: _Question) -> int | None:
    options = [option.strip() for option in question.options]
    return options.index(question.answer) if question.answer in options else None


def _of_letter(question: _Question) -> int | None:
    letters = LETTERS[: len(question.options)]
    return letters.index(question.answer.upper()) if question.answer and question.answer.upper() in [*letters] else None


def _of_number(question: _Question, first: int) -> int | None:
    if not re.fullmatch(r"\d{1,3}(\.0+)?", question.answer, re.ASCII):  # pandas writes 1.0 beside an empty cell
        return None
    index = int(float(question.answer)) - first
    return index if 0 <= index < len(question.options) else None


_READINGS: Mapping[str, Callable[[_Question], int | None]] = MappingProxyType(
    {
        "text": _of_text,
        "letter": _of_letter,
        "0": lambda question: _of_number(question, 0),
        "1": lambda question: _of_number(question, 1),
    }
)


def _read_answers(questions: Sequence[_Question], wanted: Answers | None) -> tuple[str, list[int]]:
    """Return what the answers are, and the index of every row's right option.

    Raises
    ------
    DatasetError
        If they fit nothing, naming the first row at fault, or several things that differ.
    """
    names = (wanted,) if wanted else get_args(Answers)
    read = {name: [_READINGS[name](one) for one in questions] for name in names}
    fitting = {name: [i for i in indices if i is not None] for name, indices in read.items() if None not in indices}
    if not fitting:
        best = max(names, key=lambda name: sum(index is not None for index in read[name]))
        odd = questions[read[best].index(None)]
        raise DatasetError(
            f"{odd.place}: answer {row_text(odd.answer)} is none of its options {row_text(list(odd.options), 120)} "
            f"(answers are taken to be {_ANSWERS[best]}); mend it, say what answers are with --answers, or leave such "
            "rows out with --unreadable skip"
        )
    (first, indices), *others = fitting.items()
    for other, differing in others:
        if differing != indices:
            row = next(i for i, pair in enumerate(zip(indices, differing, strict=True)) if pair[0] != pair[1])
            raise DatasetError(
                f"{questions[row].place}: answer {row_text(questions[row].answer)} may be one of the "
                f"{_ANSWERS[first]} or of the {_ANSWERS[other]}, as in all rows: say which with --answers {first} or "
                f"--answers {other}"
            )
    return first, indices
