"""Nothing but the content of a whole row tells the answer of a mini dataset."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import GroupKFold

from negcore.datasets import SPLITS
from negcore.datasets.files import read_json_lines
from negcore.datasets.mini import MINI_ROWS, MINI_SPECS, read_mini
from negcore.datasets.specs import Spec
from negcore.errors import DatasetError

Record = Mapping[str, Any]
Table = np.ndarray[Any, Any]
ROWS = {
    name: [row for _, row in read_json_lines(MINI_ROWS / f"{spec.genre}.jsonl")] for name, spec in MINI_SPECS.items()
}
each_set = pytest.mark.parametrize("name", MINI_SPECS)


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.casefold())


def by_unit(rows: Iterable[Record]) -> dict[str, list[Record]]:
    units = defaultdict(list)
    for row in rows:
        units[row["unit"]].append(row)
    return units


# Units and splits

# The parts of a row that go with every answer equally often, within each unit.
PARTS: dict[str, list[Callable[[Record], Any]]] = {
    "mini/classification": [lambda row: len(row["text"])],
    "mini/fact": [lambda row: row["template"], lambda row: sorted(row["options"])],
    "mini/linguistic": [lambda row: row["template"], lambda row: len(row["text"])],
    "mini/multilingual": [lambda row: row["lang"], lambda row: row["language"]],
    "mini/nli": [lambda row: row["template"], lambda row: row["premise"], lambda row: row["hypothesis"]],
    "mini/self-reflection": [
        lambda row: row["template"],
        lambda row: (row["note"], row["question"]),
        lambda row: row["reply"],
    ],
}


@each_set
def test_within_a_unit_no_part_of_a_row_goes_with_an_answer(name):
    for rows in by_unit(ROWS[name]).values():
        for part in (lambda row: None, *PARTS[name]):
            golds = defaultdict(Counter)
            for row in rows:
                golds[repr(part(row))][row["label"]] += 1
            for value, counts in golds.items():
                assert len(counts) == MINI_SPECS[name].n_options and len(set(counts.values())) == 1, (value, counts)


@each_set
def test_a_unit_stands_in_one_split_and_its_words_are_new_to_the_others(name):
    split_of = {row["unit"]: row["split"] for row in ROWS[name]}
    assert all(row["split"] == split_of[row["unit"]] for row in ROWS[name])
    met = {split: set() for split in SPLITS}
    for row in ROWS[name]:
        met[row["split"]] |= words_shown(name, row)
    for row in ROWS[name]:
        for other in set(SPLITS) - {row["split"]}:
            assert words_shown(name, row) - met[other], row


def words_shown(name: str, row: Record) -> set[str]:
    return {word for field in MINI_SPECS[name].fields for word in words(row[field])}


@each_set
def test_splits_are_large_enough_balanced_and_without_doubles(name):
    rows = read_mini(name).rows
    contents = [row.content for split in SPLITS for row in rows[split]]
    assert len(set(contents)) == len(contents) and 200 <= len(contents) <= 250
    assert all(len(set(row.options)) == len(row.options) for split in SPLITS for row in rows[split])
    for split in SPLITS:
        counts = Counter(row.answer for row in rows[split])
        assert len(rows[split]) >= 48 and len(set(counts.values())) == 1 and len(counts) == MINI_SPECS[name].n_options


def test_every_decoy_is_gold_once_and_stands_once_in_each_place():
    for rows in by_unit(ROWS["mini/fact"]).values():
        for template in (0, 1):
            asked = [row for row in rows if row["template"] == template]
            options = set(asked[0]["options"])
            assert len(options) == 4 and {row["options"][row["label"]] for row in asked} == options
            assert all({row["options"][place] for row in asked} == options for place in range(4))


def test_the_place_of_an_item_in_the_premise_goes_with_no_answer():
    for rows in by_unit(ROWS["mini/nli"]).values():
        items = {row["hypothesis"].rstrip(".").split()[-1] for row in rows}
        answers = Counter()
        for row in rows:
            order = sorted(items, key=row["premise"].index)
            answers[order.index(row["hypothesis"].rstrip(".").split()[-1]), row["label"]] += 1
        assert answers == {(place, answer): 1 for place in range(3) for answer in range(3)}


def test_the_classes_of_the_multilingual_set_are_as_many_in_each_language_of_each_split():
    counts = Counter((row["split"], row["lang"], row["label"]) for row in ROWS["mini/multilingual"])
    assert {split: {n for (of, *_), n in counts.items() if of == split} for split in SPLITS} == {
        "train": {6},
        "valid": {3},
        "test": {3},
    }
    assert len(counts) == len(SPLITS) * 5 * 4


def test_a_row_without_a_split_is_refused(tmp_path, monkeypatch):
    (tmp_path / "nli.jsonl").write_text('{"split": "dev", "premise": "a", "hypothesis": "b", "label": 0}\n')
    monkeypatch.setattr("negcore.datasets.mini.MINI_ROWS", tmp_path)
    with pytest.raises(DatasetError, match=r"nli.jsonl:1: split is 'dev'; allowed: 'train', 'valid', 'test'"):
        read_mini("mini/nli")


# Forests that see everything but the question

N_TREES = 50
ERROR = 0.01
"""Probability that one of all the checks fails though rows tell nothing (two-sided, Bonferroni)."""


@dataclass(frozen=True)
class View:
    """What a forest may see of the rows."""

    name: str
    make: Callable[[Sequence[Record], Sequence[Record]], tuple[Table, Table]]
    """Makes the features of rows to fit and of rows to answer."""


def views_of(spec: Spec) -> Iterator[View]:
    """Every set of fields as a bag of words, and what is no text: order, lengths, numbers, template, language."""
    yield View("nuisances", lambda fit, ask: (nuisances(spec, fit), nuisances(spec, ask)))
    for size in range(1, len(spec.fields) + 1):
        for fields in combinations(spec.fields, size):
            yield View(" + ".join(fields), lambda fit, ask, fields=fields: bags(fields, fit, ask))


def bags(fields: Sequence[str], fit: Sequence[Record], ask: Sequence[Record]) -> tuple[Table, Table]:
    """Which words stand in each of the fields."""
    counters = [
        (field, CountVectorizer(analyzer=words, binary=True).fit(row[field] for row in fit)) for field in fields
    ]

    def table(rows: Sequence[Record]) -> Table:
        return np.hstack([counter.transform(row[field] for row in rows).toarray() for field, counter in counters])

    return table(fit), table(ask)


def nuisances(spec: Spec, rows: Sequence[Record]) -> Table:
    """Row number, template, language, lengths of fields, and order, identity and lengths of the row's options."""
    languages = sorted({row.get("lang", "") for row in rows})
    options = sorted({option for row in rows for option in row.get("options", ())})
    return np.array(
        [
            [
                row["number"],
                row.get("template", 0),
                languages.index(row.get("lang", "")),
                *(measure(row[field]) for field in spec.fields for measure in (len, lambda text: len(text.split()))),
                *(len(option) for option in row.get("options", ())),
                *np.argsort(np.argsort(row.get("options", ()))),
                *np.argsort(np.argsort([len(option) for option in row.get("options", ())], kind="stable")),
                *(options.index(option) for option in row.get("options", ())),
                options.index(min(row["options"])) if options else 0,
            ]
            for row in rows
        ]
    )


def n_right(view: View, fit: Sequence[Record], ask: Sequence[Record]) -> int:
    """Number of rows that a forest answers right which saw other rows."""
    known, asked = view.make(fit, ask)
    forest = RandomForestClassifier(N_TREES, random_state=0).fit(known, [row["label"] for row in fit])
    return int(np.sum(forest.predict(asked) == [row["label"] for row in ask]))


def n_right_on_test(view: View, rows: Sequence[Record]) -> tuple[int, int]:
    fit, ask = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    return n_right(view, fit, ask), len(ask)


def n_right_across(view: View, rows: Sequence[Record]) -> tuple[int, int]:
    """Cross-validated by unit: no unit is on both sides."""
    parts = GroupKFold(5).split(rows, groups=[row["unit"] for row in rows])
    return sum(n_right(view, [rows[i] for i in fit], [rows[i] for i in ask]) for fit, ask in parts), len(rows)


def numbered(rows: Sequence[Record]) -> list[Record]:
    """Rows with their place in their split."""
    seen = Counter()
    found = []
    for row in rows:
        found.append({**row, "number": seen[row["split"]]})
        seen[row["split"]] += 1
    return found


N_CHECKS = 2 * sum(len(list(views_of(spec))) for spec in MINI_SPECS.values())


def is_chance(right: int, n: int, n_options: int) -> bool:
    low, high = binom.interval(1 - ERROR / N_CHECKS, n, 1 / n_options)
    return bool(low <= right <= high)


def findings(spec: Spec, rows: Sequence[Record]) -> dict[str, float]:
    """Views that a forest answers better or worse than by chance, with the share of right answers."""
    rows = numbered(rows)
    return {
        f"{view.name}, {how.__name__}": right / n
        for view in views_of(spec)
        for how in (n_right_on_test, n_right_across)
        for right, n in [how(view, rows)]
        if not is_chance(right, n, spec.n_options)
    }


@each_set
def test_a_forest_that_does_not_see_the_question_is_at_chance(name):
    assert findings(MINI_SPECS[name], ROWS[name]) == {}


# The same forests find what such sets often have


def found_in(name: str, change: Callable[[Record], Record]) -> set[str]:
    return {view.partition(",")[0] for view in findings(MINI_SPECS[name], [change(row) for row in ROWS[name]])}


def test_decoys_that_follow_from_the_gold_text_are_found():
    names = sorted({option for row in ROWS["mini/fact"] for option in row["options"] if row["template"] == 1})

    def with_own_decoys(row: Record) -> Record:
        gold = row["options"][row["label"]] if row["template"] else names[row["label"]]
        options = random.Random(gold).sample([option for option in names if option != gold], 3)
        options.insert(row["label"], gold)
        return {**row, "options": options}

    assert found_in("mini/fact", with_own_decoys) == {"nuisances"}


def test_a_word_that_goes_with_an_answer_is_found_in_its_field():
    def with_a_hint(row: Record) -> Record:
        hint = ("surely", "likely", "hardly")[row["label"]]
        return {**row, "hypothesis": f"{hint} {row['hypothesis']}"}

    assert found_in("mini/nli", with_a_hint) == {"hypothesis", "premise + hypothesis"}


def test_units_on_both_sides_are_found_because_memory_then_answers_wrongly():
    rows = [{**row, "unit": number} for number, row in enumerate(ROWS["mini/self-reflection"])]
    shares = findings(MINI_SPECS["mini/self-reflection"], rows)
    assert "note, n_right_across" in shares and max(shares.values()) < 0.4


def test_options_that_stand_in_a_fixed_order_of_length_are_found():
    def longest_first(row: Record) -> Record:
        options = sorted(row["options"], key=len, reverse=True)
        return {**row, "options": options, "label": 0 if int(row["unit"]) % 4 else row["label"]}

    assert "nuisances" in found_in("mini/fact", longest_first)
