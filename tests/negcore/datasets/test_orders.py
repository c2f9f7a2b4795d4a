"""Rows that are asked in several orders of their options."""

import json
from itertools import permutations
from math import factorial

import pytest
from support import tiny_tokenizer

from negcore.datasets import SPLITS, PromptSettings, Wording, load_dataset
from negcore.datasets.orders import draw_orders, refers_to_options
from negcore.errors import DatasetError
from negcore.orders import ordered_id, split_id


def load(name="mini/fact", **settings):
    return load_dataset(str(name), tiny_tokenizer(), settings=PromptSettings(**settings))


def by_hand(example, order):
    """Return the given prompt with its options written down in another order."""
    begin = example.prompt.rindex("\nA. ")
    options = "".join(f"\n{letter}. {example.options[answer]}" for letter, answer in zip("ABCDE", order, strict=False))
    end = example.prompt.rindex("\nAnswer:")
    return example.prompt[:begin] + options + example.prompt[end:]


@pytest.mark.parametrize("shots", [0, 1])
def test_every_prompt_is_the_one_permuted_by_hand(shots):
    given, asked = load(limit=6, shots=shots), load(limit=6, shots=shots, permutations="all")
    for split in SPLITS:
        expected = [(one, order) for one in given.splits[split] for order in permutations(range(4))]
        for (one, order), example in zip(expected, asked.splits[split], strict=True):
            assert example.prompt == by_hand(one, order)
            assert example.id == f"{one.id}@{''.join('ABCD'[answer] for answer in order)}"
            assert example.options == tuple(one.options[answer] for answer in order)
            assert example.options[example.answer] == one.options[one.answer]
            assert (example.labels, example.group) == (one.labels, one.group)
    assert asked.demonstrations == given.demonstrations


def test_one_order_is_todays_dataset_prompt_for_prompt():
    assert load(limit=6, permutations=1).fingerprint == load(limit=6).fingerprint
    assert not any("@" in example.id for example in load(limit=6).splits["test"])


def test_splits_never_mix_orders_of_a_row_and_keep_the_rows_of_one_order():
    given, asked = load(limit=40), load(limit=40, permutations=3)
    rows = {split: [split_id(one.id).row for one in asked.splits[split]] for split in SPLITS}
    assert all(len({*rows[a]} & {*rows[b]}) == 0 for a in SPLITS for b in SPLITS if a != b)
    for split in SPLITS:
        assert rows[split] == [one.id for one in given.splits[split] for _ in range(3)]
        assert asked.split_report.n_used[split] == len(given.splits[split])


def test_the_given_order_comes_first_and_more_orders_begin_with_fewer():
    for n_options in range(2, 6):
        drawn = draw_orders(n_options, factorial(n_options), 0, "some", "row")
        assert {*drawn} == {*permutations(range(n_options))} and drawn[0] == tuple(range(n_options))
        assert all(draw_orders(n_options, n, 0, "some", "row") == drawn[:n] for n in range(1, len(drawn)))
    assert len(set(draw_orders(26, 50, 0, "row"))) == 50


def test_orders_depend_on_seed_and_row_and_not_on_the_limit():
    def asked(**settings):
        return {one.id for one in load(permutations=2, **settings).splits["test"]}

    small, large = asked(limit=10), asked(limit=20)
    assert small < large and asked(limit=20, seed=0) == large
    orders = {split_id(one).order for one in large}
    assert len(orders) > 5, "every row has an order of its own"
    seeds = [{split_id(one) for one in asked(seed=seed)} for seed in (0, 1)]
    assert {one.row for one in seeds[0]} == {one.row for one in seeds[1]} and seeds[0] != seeds[1]


def test_drawn_orders_are_all_about_as_frequent():
    orders = [draw_orders(3, 2, 0, "rows", row)[1] for row in range(2000)]
    assert {orders.count(order) for order in {*orders}} < {*range(340, 460)} and len({*orders}) == 5


def test_an_id_tells_row_and_order_whatever_the_row_is_called():
    for row in ("mini-fact/test/3", "me@home", "a@BA", ""):
        assert split_id(ordered_id(row, (2, 0, 1))) == (row, "CAB")


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("mini/linguistic", {"permutations": 3}, "2 options, so 2 orders, and permutations is 3: give at most 2"),
        ("mini/fact", {"permutations": 25}, "4 options, so 24 orders, and permutations is 25"),
        ("mini/fact", {"permutations": 0}, "permutations is 0; allowed: a whole number from 1, or 'all'"),
        ("mini/fact", {"permutations": "some"}, "permutations is 'some'; allowed"),
    ],
)
def test_orders_that_there_are_not_are_refused_in_a_line(name, settings, told):
    with pytest.raises(DatasetError, match=told) as refused:
        load(name, **settings)
    assert "\n" not in str(refused.value)


def test_all_orders_of_more_than_four_options_are_refused(monkeypatch):
    from negcore.datasets import orders

    monkeypatch.setattr(orders, "MOST_FOR_ALL", 3)
    with pytest.raises(
        DatasetError, match="mini/fact: rows have 4 options, so 24 orders, and permutations 'all' is for"
    ):
        load(permutations="all")


def test_prompts_that_list_no_options_are_refused(tmp_path):
    lines = [{"prompt": f"Is {i} right? A. yes B. no Answer:", "labels": ["A", "B"], "answer": i % 2} for i in range(9)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DatasetError, match="local/mine: its prompts are ready-made"):
        load(file, permutations=2)
    for option in ("{letter}", "{text}", "-"):
        own = Wording(name="own", instruction="", question="{text}", option=option)
        with pytest.raises(DatasetError, match="without their letter or text"):
            load(permutations=2, wording=own)
    assert load(permutations=2, limit=4, wording="inline").splits["test"]


@pytest.mark.parametrize(
    "text",
    [
        "All of the above",
        "none of the above.",
        "Both A and C",
        "A and B",
        "(B) or (C)",
        "All of these",
        "Neither B nor D",
    ]
    + ["any of the options", "The preceding answer", "Option C is wrong", "both of the answers above"],
)
def test_options_that_speak_of_others_are_seen(text):
    assert refers_to_options(text)


@pytest.mark.parametrize(
    "text",
    [
        "all of the sale of coffee",
        "one of the graves",
        "the Americas",
        "A",
        "vitamin A and D",
        "none",
        "Both sides",
        "No",
    ]
    + ["above the clouds", "A and E Networks"],
)
def test_other_options_are_taken_as_they_are(text):
    assert not refers_to_options(text)
