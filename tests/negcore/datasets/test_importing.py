"""Importing tables of others: what each field is taken from, what is told, and what is refused."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from negcore.datasets.importing import Columns, import_sheet
from negcore.datasets.local import read_local
from negcore.datasets.sheets import read_sheet
from negcore.errors import DatasetError

REVIEWS = [{"text": f"The {noun} was {word}.", "label": label} for noun in ("film", "soup", "book")
           for word, label in (("great", "good"), ("dull", "bad"), ("poor", "bad"), ("superb", "good"))]  # fmt: skip
QUIZ = [{"question": f"Is it {n}?", "A": "never", "B": "more often", "C": "always", "answer": "BCA"[n % 3]}
        for n in range(9)]  # fmt: skip


def write_csv(path: Path, records, delimiter=","):
    names = list(records[0])
    lines = [names, *([record[name] for name in names] for record in records)]
    path.write_text("\n".join(delimiter.join(f'"{cell}"' if delimiter in cell else cell for cell in line)
                              for line in lines) + "\n")  # fmt: skip
    return path


def write(path: Path, records):
    match path.suffix:
        case ".csv":
            write_csv(path, records)
        case ".tsv":
            write_csv(path, records, "\t")
        case ".json":
            path.write_text(json.dumps(records))
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, records)))
        case ".parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
        case ".feather":
            pyarrow.feather.write_feather(pa.Table.from_pylist(records), path)
    return path


def imported(path: Path, unreadable="fail", **columns):
    return import_sheet(read_sheet(path), Columns(**columns), path.with_suffix(".jsonl"), unreadable=unreadable)


def from_text(folder: Path, text: str, **columns):
    file = folder / "table.csv"
    file.write_text(text)
    return imported(file, **columns)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".feather"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    found = imported(write(tmp_path / f"reviews{suffix}", REVIEWS))
    assert found.rows == [{"prompt": r["text"], "labels": ["bad", "good"], "answer": r["label"]} for r in REVIEWS]
    assert found.told == (
        "prompt: column 'text', by its name",
        "answer: column 'label', by its name",
        "labels of every row: the 2 values of 'label', 'bad', 'good'",
        "answers: texts of options",
    )


def test_imported_rows_are_read_back_as_they_were_told(tmp_path):
    found = imported(write(tmp_path / "quiz.csv", QUIZ), prompt="{question}\n{options}\nAnswer:")
    file = tmp_path / "quiz.jsonl"
    file.write_text("\n".join(map(json.dumps, found.rows)))
    rows = [row for split in read_local(file, seed=0).rows.values() for row in split]
    assert {row.id: (row.fields["prompt"], row.gold) for row in rows} == {
        f"quiz/{n + 1}": (f"{r['question']}\nA. never\nB. more often\nC. always\nAnswer:", r["answer"])
        for n, r in enumerate(QUIZ)
    }


def test_a_template_names_columns_and_writes_a_line_break_as_such(tmp_path):
    found = imported(write(tmp_path / "reviews.csv", REVIEWS), prompt=r"{{x}} {text}\nMood:")
    assert found.rows[0]["prompt"] == "{x} The film was great.\nMood:"


def test_labels_take_the_place_of_letters(tmp_path):
    quiz = write(tmp_path / "quiz.csv", QUIZ)
    found = imported(quiz, prompt="{question} {options}", labels=("1", "2", "3"))
    assert (found.rows[0]["labels"], found.rows[0]["answer"]) == (["1", "2", "3"], "2")
    assert found.rows[0]["prompt"] == "Is it 0? 1. never\n2. more often\n3. always"
    with pytest.raises(DatasetError, match="--labels and --options are both given"):
        imported(quiz, labels=("1", "2", "3"), options=("A", "B", "C"))


@pytest.mark.parametrize(
    ("answers", "labels", "given", "right"),
    [
        (["yes", "no", "yes"] * 2, ("no", "yes"), None, [1, 0, 1]),
        (["0", "1", "1"] * 2, ("no", "yes"), None, [0, 1, 1]),
        (["0.0", "1.0", "1.0"] * 2, ("no", "yes"), None, [0, 1, 1]),
        (["1", "2", "2"] * 2, ("no", "yes"), None, [0, 1, 1]),
        (["a", "B", "b"] * 2, ("no", "yes"), None, [0, 1, 1]),
        (["1", "2", "2"] * 2, ("a", "b", "c"), "1", [0, 1, 1]),
        (["1", "2", "2"] * 2, ("a", "b", "c"), "0", [1, 2, 2]),
        (["1", "0", "1"] * 2, ("0", "1"), None, [1, 0, 1]),
    ],
    ids=["text", "from 0", "floats", "from 1", "letters", "told from 1", "told from 0", "the same as text and number"],
)
def test_answers_are_texts_letters_or_numbers(tmp_path, answers, labels, given, right):
    records = [{"prompt": f"row {n}", "answer": answer} for n, answer in enumerate(answers)]
    found = imported(write(tmp_path / "t.csv", records), labels=labels, answers=given)
    assert [row["labels"].index(row["answer"]) for row in found.rows] == right * 2


@pytest.mark.parametrize(
    ("answers", "labels"),
    [(["1", "2", "2"], ("no", "yes", "maybe")), (["1", "0", "1"], ("1", "0")), (["A", "B", "B"], ("B", "A"))],
    ids=["numbers from 0 or 1", "numbers or texts", "letters or texts"],
)
def test_answers_with_two_meanings_are_refused(tmp_path, answers, labels):
    records = [{"prompt": f"row {n}", "answer": answer} for n, answer in enumerate(answers * 2)]
    with pytest.raises(DatasetError, match=r"t\.csv:2: answer .* may be one of .*: say which with --answers"):
        imported(write(tmp_path / "t.csv", records), labels=labels)


def test_an_answer_that_is_no_option_is_refused_or_left_out_and_named(tmp_path):
    quiz = write(tmp_path / "quiz.csv", [*QUIZ, QUIZ[0] | {"question": "Who?", "answer": "E"}])
    with pytest.raises(DatasetError, match=r"quiz\.csv:11: answer 'E' is none of its options .*--unreadable skip"):
        imported(quiz, prompt="{question}{options}")
    found = imported(quiz, prompt="{question}{options}", unreadable="skip")
    assert len(found.rows) == 9
    assert any(line.startswith("left out: ") and "quiz.csv:11" in line for line in found.told)


def test_numbers_without_names_are_refused_and_class_names_of_the_file_are_used(tmp_path):
    table = pa.table({"text": [f"row {n}" for n in range(6)], "label": [0, 1, 1, 0, 1, 0]})
    bare, named = tmp_path / "bare.parquet", tmp_path / "named.parquet"
    pyarrow.parquet.write_table(table, bare)
    features = {"info": {"features": {"label": {"names": ["World", "Sports"], "_type": "ClassLabel"}}}}
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), named)
    with pytest.raises(DatasetError, match="column 'label' holds numbers such as 0: say which labels"):
        imported(bare)
    assert [row["answer"] for row in imported(named).rows[:2]] == ["World", "Sports"]


def test_lists_of_options_are_read_from_structures_and_from_text(tmp_path):
    records = [{"question": f"q{n}", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
               for n in range(6)]  # fmt: skip
    expected = [{"prompt": f"q{n}", "labels": ["x", "y"], "answer": "xy"[n % 2]} for n in range(6)]
    assert imported(write(tmp_path / "arc.parquet", records)).rows == expected
    assert imported(write(tmp_path / "arc.jsonl", records)).rows == expected
    lines = [f'q{n},"[""x"", ""y""]",{"xy"[n % 2]}' for n in range(6)]
    assert from_text(tmp_path, "\n".join(["question,options,answer", *lines])).rows == expected


def test_split_group_unit_and_id_go_along_and_renamed_splits_are_told(tmp_path):
    records = [REVIEWS[n] | {"split": ("train", "validation", "Test")[n % 3], "id": f"r{n}", "lang": "en"}
               for n in range(12)]  # fmt: skip
    found = imported(write(tmp_path / "reviews.csv", records), group="lang")
    assert found.rows[1]["split"] == "valid" and found.rows[2]["split"] == "test"
    assert (found.rows[3]["id"], found.rows[3]["group"]) == ("r3", "en")
    assert {"split 'validation' is called 'valid'", "split 'Test' is called 'test'"} <= set(found.told)


def test_a_column_that_only_has_the_name_of_a_field_is_not_taken_for_it(tmp_path):
    records = [REVIEWS[n] | {"split": "fold 1", "id": "same", "year": "1999"} for n in range(12)]
    found = imported(write(tmp_path / "reviews.csv", records))
    assert set(found.rows[0]) == {"prompt", "labels", "answer"}
    assert found.told[-1] == "not used: the columns 'split', 'id', 'year'"


def test_semicolons_and_spaces_are_told(tmp_path):
    file = write_csv(tmp_path / "reviews.csv", [r | {"text": r["text"] + " "} for r in REVIEWS], ";")
    told = imported(file).told
    assert told[0] == "its cells are taken to be separated by semicolons"
    assert "spaces at the end of 12 prompts will not be read" in told


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("a,b\n1,2\n", {}, "none of the columns 'a', 'b' has a usual name of the prompt.*--prompt"),
        ("text,question,label\nx,y,z\n", {}, "several columns may be the prompt: 'text', 'question'; name it with"),
        ("text,label\nx,y\n", {"prompt": "txt"}, "--prompt 'txt' is no column; did you mean 'text'"),
        ("text,label\nx,y\n", {"prompt": "{txt}:"}, "--prompt 'txt' is no column; did you mean 'text'"),
        ("text,label\nx,y\n", {"prompt": "{text!r}"}, "only names of columns may stand in braces"),
        ("text,label\nx,y\n", {"prompt": "{text"}, "is malformed"),
        ("text,label\nx,y,z\n", {}, r"table\.csv:2: 3 cells, but the first line names 2 columns"),
        ('text,label\n"x,y\n', {}, r"table\.csv:2: not CSV"),
        ("text,text\nx,y\n", {}, "two columns are named 'text'"),
        ("text,label\n", {}, "the file has no rows"),
        ("", {}, "names no columns"),
        ("text,label\na,x\nb,y\n", {}, "2 different values in 2 rows, which are no labels"),
        ("text,label\na,x\n,y\nb,x\nb,y\nc,x\n", {}, r"table\.csv:3: 'text' is empty; .*--unreadable skip"),
        ("text,A,B,label\na,x,y,A\nb,,y,A\n", {}, r"table\.csv:3: option 1 of 2 is empty"),
        ("text,A,B,label\na,x,y,A\nb,y,,A\n", {}, r"table\.csv:3: 1 options, but two are needed"),
        ("text,A,B,label\n" + "a,x,y,A\nb,x,x,A\n" * 3, {}, "labels .* repeat; each option needs its own label"),
        ("text,label\na,x\nb,y\nc,x\nd,y\n", {}, "4 rows cannot be cut into splits; give 5 or a split field"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_refused_with_the_place_and_the_remedy(tmp_path, text, columns, message):
    with pytest.raises(DatasetError, match=message):
        from_text(tmp_path, text, **columns)


def test_a_file_that_is_not_utf8_or_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "t.csv"
    file.write_bytes("text,label\nna\u00efve,x\n".encode("latin-1"))
    with pytest.raises(DatasetError, match="byte 13 is not UTF-8; save the file as UTF-8"):
        read_sheet(file)
    with pytest.raises(DatasetError, match=r"t\.xlsx: cannot be imported; allowed: .*\.csv"):
        read_sheet(tmp_path / "t.xlsx")
