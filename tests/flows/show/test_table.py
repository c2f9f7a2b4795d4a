"""Tables as data, and what terminals and Prefect show of them."""

import json
from math import nan

from rich.console import Console

from flows.show.accuracy_tables import accuracy_cell
from flows.show.table import Column, Number, Table, Words, numbers, texts
from flows.show.text import bare, correlation, share
from tasks.results import Average

HOSTILE = "[red]a[/red] \x1b[31m :smile:"


def table_of(*blocks, columns=None):
    return Table("key", "Title", columns or [*texts("name"), *numbers("train\ntest", "r")], blocks, "Caption.")


def printed(table, width=100):
    console = Console(width=width, record=True, force_terminal=False)
    console.print(table)
    return console.export_text()


def test_a_terminal_shows_title_columns_blocks_and_caption():
    text = printed(table_of([["one", "20\n10", Number(0.25, share)]], [["second", "5", Number(1.0, share)]]))
    assert text.splitlines() == [
        "",
        "Title",
        "        train      ",
        "name     test     r",
        "───────────────────",
        "one        20  .250",
        "           10      ",
        "                   ",
        "second      5  1.00",
        "Caption.",
    ]


def test_titles_and_captions_may_be_wider_than_their_table():
    table = Table("key", "A title of many words " * 3, numbers("n"), [[[Number(1)]]], "A caption of many words " * 3)
    assert max(map(len, printed(table, width=80).splitlines())) > 60


def test_text_is_never_markup_and_control_characters_are_spelled_out():
    table = Table("key", HOSTILE, texts(HOSTILE), [[[HOSTILE]]], HOSTILE)
    assert printed(table).count("[red]a[/red] \\x1b[31m :smile:") == 4
    assert table.records() == [{"[red]a[/red] \\x1b[31m :smile:": "[red]a[/red] \\x1b[31m :smile:"}]


def test_markdown_shows_every_text_as_it_is_on_one_line():
    table = Table("key", "A *title*", columns=[*texts("name"), *numbers("n\nof it")], blocks=[[["a|b\n<c>", "1"]]])
    assert table.markdown == "## A \\*title\\*\n\n| name | n of it |\n| --- | ---: |\n| a\\|b \\<c\\> | 1 |"
    assert table_of([["one"]]).markdown.endswith("| one |  |  |\n\nCaption.")


def test_prefect_gets_numbers_as_numbers_and_lines_side_by_side():
    blocks = (
        [["one", "20\n10", Number(0.123456, share)]],
        [[Words("two", "bold"), Number(70000), Number(nan)]],
        [["three"]],
    )
    records = table_of(*blocks).records()
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert records == [
        {"name": "one", "train test": "20 / 10", "r": 0.1235},
        {"name": "two", "train test": 70000, "r": None},
        {"name": "three", "train test": "", "r": ""},
    ]


def test_prefect_gets_no_private_column():
    table = table_of([["model", "the prompt was"]], columns=[Column("model"), Column("why", is_private=True)])
    assert table.records() == [{"model": "model"}]
    assert "the prompt was" in printed(table)


def test_an_accuracy_stands_above_its_interval():
    mean = Average("m", 0, "", "lm", 0.5, 0.25, 0.75, 2, 0.5, 0.5, False)
    row = [accuracy_cell(mean, Words(" 64", "dim"))]
    table = table_of([row], columns=numbers("LM-Prob"))
    assert [line.strip() for line in printed(table).splitlines()[4:6]] == [".500 64", ".250-.750"]
    assert table.records() == [{"LM-Prob": ".500 64 / .250-.750"}]


def test_numbers_lose_the_zero_before_their_point_only():
    assert [bare(text) for text in ("0.5", "-0.5", "+0.5", "10.5", "100.0", "1e-07")] == [
        ".5", "-.5", "+.5", "10.5", "100.0", "1e-07"
    ]  # fmt: skip


def test_a_correlation_is_one_only_where_it_is():
    values = (1.0, 0.99996, 0.9996, 0.5, -1.0, -0.9996, nan)
    assert [*map(correlation, values)] == ["1.00", ">.9999", ".9996", ".500", "-1.000", "-.9996", "-"]
