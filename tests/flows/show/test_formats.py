"""Tables in other formats: numbers keep their digits, and texts stay texts whatever they say."""

import csv
import io
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet
import pytest

from flows.show.formats import in_latex, written
from flows.show.table import in_markdown
from negcore.texts import printable

HOSTILE = [
    "=cmd|' /C calc'!A0",
    "+1",
    "-2+3",
    "@SUM(A1)",
    "\tx",
    "\rx",
    'say "a, b"',
    "two\nlines",
    "| a | b |",
    r"\input{/etc/passwd}",
    "50 % of $5 & #1_x^2 ~ {y}",
    "<script>alert(1)</script>",
    "[link](javascript:x) `code` *bold* &lt;",
    "*[x] ?`--''",
    "\x1b[2Jbell\x07",
    "naïve 猫",
    "",
]


def table(**columns):
    return pa.table(columns)


def read_csv(content):
    return list(csv.reader(io.StringIO(content.decode(), newline="")))


def test_csv_gives_back_every_text_but_for_the_apostrophe_before_formulas():
    content, n_marked = written(table(name=HOSTILE), "csv")
    head, *rows = read_csv(content)
    formulas = [text for text in HOSTILE if text[:1] in tuple("=+-@\t\r")]
    assert (head, n_marked, len(formulas)) == (["name"], 6, 6)
    assert [row[0] if row else "" for row in rows] == [f"'{text}" if text in formulas else text for text in HOSTILE]


def test_csv_keeps_every_digit_of_numbers_negative_ones_too():
    numbers = [0.1 + 0.2, -1e-300, float("nan"), float("inf"), None]
    columns = {"f": numbers, "n": [1, -2, 3, 2**62, None]}
    halves = pa.array([0.1, -0.2, 1e-8, 0, None], pa.float32())
    content, n_marked = written(table(**columns, h=halves, d=pa.array([Decimal(3)] * 5, pa.decimal128(38, 0))), "csv")
    rows = read_csv(content)
    assert n_marked == 0
    assert [row[0] for row in rows] == ["f", "0.30000000000000004", "-1e-300", "NaN", "inf", ""]
    assert [row[1:] for row in rows[1:3]] == [["1", "0.1", "3"], ["-2", "-0.2", "3"]]


def test_lists_and_truth_values_have_a_form_in_text():
    content = written(table(right=[True, None], probs=[[0.5, 0.25], None], o=[{"a": "=x"}, None]), "csv").content
    assert read_csv(content)[1:] == [["true", "[0.5, 0.25]", '{"a": "=x"}'], ["", "", ""]]


def test_numbers_in_lists_keep_their_digits_or_are_rounded_like_others():
    halves = pa.array([[0.1, 1 / 3], None], pa.list_(pa.float32()))
    lists = table(h=halves, d=[[1 / 3, -1e-9], []])
    assert read_csv(written(lists, "csv").content)[1] == ["[0.1, 0.33333334]", "[0.3333333333333333, -1e-09]"]
    assert r"| \[0.1, 0.3333\] | \[0.3333, -1e-09\] |" in written(lists, "md").content.decode()


def unescaped(text):
    """What a reader of Markdown sees: a backslash before punctuation goes."""
    shown, rest = "", iter(text)
    for char in rest:
        shown += next(rest) if char == "\\" else char
    return shown


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_of_markdown_shows_the_text_on_one_line_and_is_no_markup(text):
    cell = in_markdown(text)
    assert "\n" not in cell and "\x1b" not in cell
    bare = cell.replace("\\\\", "").split("\\")
    assert not {*"|<>*_`[]#&~$"} & {char for piece in [bare[0], *(one[1:] for one in bare[1:])] for char in piece}
    assert unescaped(cell) == " ".join(printable(text).split())


def test_markdown_aligns_numbers_and_rounds_them():
    content = written(table(name=["a|b", None], p=[0.123456, -1e-7], n=[123456, 7]), "md").content.decode()
    assert content.splitlines() == [
        "| name | p | n |",
        "| --- | ---: | ---: |",
        r"| a\|b | 0.1235 | 123456 |",
        "|  | -1e-07 | 7 |",
    ]


def test_latex_by_pencil():
    assert in_latex(r"a_b & 5 % \x {y} #1 $z$ ^ ~ <|>") == (
        r"a\_b \& 5 \% \textbackslash{}x \{y\} \#1 \$z\$ \textasciicircum{} \textasciitilde{} "
        r"\textless{}\textbar{}\textgreater{}"
    )
    assert in_latex("[x]*--") == "{[}x{]}{*}{-}{-}"  # no argument of the line break before it, no dash
    content = written(table(name=["m_1"], p=[-0.5], q=[1.5e-7], n=[3]), "latex").content.decode()
    assert content.splitlines()[1:] == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"name & p & q & n \\",
        r"\midrule",
        r"m\_1 & $-0.5$ & $1.5 \times 10^{-7}$ & 3 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_a_command_or_leaves_its_cell_in_latex(text):
    cell = in_latex(text)
    for known in ("backslash", "asciitilde", "asciicircum", "less", "greater", "bar", "quotedbl"):
        cell = cell.replace(rf"\text{known}{{}}", "")
    for char in "{}$&#%_":
        cell = cell.replace(f"\\{char}", "")
    for char in "[]*'`-":
        cell = cell.replace(f"{{{char}}}", "")
    assert not {*"\\{}$&#%_^~\n"} & {*cell}


@pytest.mark.parametrize("name", ["csv", "md", "latex"])
def test_headings_are_texts_too(name):
    content = written(pa.table([[1]], names=["=a|b_c\n"]), name).content.decode()
    assert "=a|b_c" not in content.replace("'=a|b_c", "").replace('"', "") or name == "csv"
    assert {"csv": "'=a|b_c", "md": r"=a\|b\_c", "latex": r"=a\textbar{}b\_c"}[name] in content


def test_columns_of_one_name_are_all_kept():
    twice = pa.table([[1], [2]], names=["a", "a"])
    assert read_csv(written(twice, "csv").content) == [["a", "a"], ["1", "2"]]


def test_parquet_reads_back_as_it_was():
    names = pa.array(HOSTILE).dictionary_encode()
    whole = table(name=names, p=[0.1] * len(HOSTILE), probs=[[0.5]] * len(HOSTILE))
    assert pyarrow.parquet.read_table(io.BytesIO(written(whole, "parquet").content)).to_pylist() == whole.to_pylist()


def test_a_table_without_rows_has_its_columns_in_every_format():
    empty = table(name=pa.array([], pa.string()), n=pa.array([], pa.int64()))
    assert written(empty, "csv").content == b"name,n\n"
    assert written(empty, "md").content.count(b"\n") == 2
    assert b"name & n" in written(empty, "latex").content
    assert (
        json.loads(json.dumps(pyarrow.parquet.read_table(io.BytesIO(written(empty, "parquet").content)).to_pylist()))
        == []
    )
