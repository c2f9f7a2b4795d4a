"""Data files as people bring them: nothing in them is altered, dropped or guessed without a word."""

import copy
import json
import logging
import os
import re

import pytest
from support import tiny_tokenizer

from negcore.datasets import PromptSettings, load_dataset, load_facts
from negcore.datasets.local import read_local
from negcore.errors import DatasetError, LabelError

GOOD = {"prompt": "Question: Answer:", "labels": ["A", "B"], "answer": 0}


def lines(rows):
    return "\n".join(map(json.dumps, rows))


def rows_of(path, content, n=10):
    """The rows of a file that begins with a content, filled up with good ones."""
    good = [{**GOOD, "prompt": f"Question {i}: Answer:", "answer": i % 2} for i in range(n)]
    path.write_bytes((content if isinstance(content, bytes) else content.encode()) + b"\n" + lines(good).encode())
    return {row.id: row for rows in read_local(path, 0).rows.values() for row in rows}


def row(path, **fields):
    """The row that a line with some fields becomes."""
    return next(
        row for row in rows_of(path, json.dumps(GOOD | fields)).values() if row.fields["prompt"] == GOOD["prompt"]
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data.jsonl"


@pytest.mark.parametrize("missing", ["null", "NaN"])
def test_null_and_nan_are_as_if_the_field_were_not_there(path, missing):
    empty = f', "id": {missing}, "group": {missing}, "split": {missing}, "unit": {missing}}}'
    found = rows_of(path, json.dumps(GOOD)[:-1] + empty)
    assert found["data/1"].group == "" and len(found) == 11
    with pytest.raises(DatasetError, match="data.jsonl:1: 'answer' is missing"):
        rows_of(path, json.dumps(GOOD | {"answer": None}))


@pytest.mark.parametrize(("labels", "answer", "gold"), [(["0", "1"], 1, 1), (["A", "B"], 1, 1), (["3", "1"], 0, 0)])
def test_a_number_is_an_index(path, labels, answer, gold):
    assert row(path, labels=labels, answer=answer).answer == gold


@pytest.mark.parametrize(("labels", "answer"), [(["1", "0"], 0), (["1", "0"], 1), (["2", "3", "1"], 1)])
def test_a_number_that_is_another_options_label_is_ambiguous(path, labels, answer):
    with pytest.raises(DatasetError, match=f"data.jsonl:1: answer {answer} is ambiguous with labels .* as an index it"):
        row(path, labels=labels, answer=answer)


def test_numbers_are_indices_where_another_row_with_these_labels_shows_it(path):
    shown = [GOOD | {"labels": ["2", "1"], "answer": 0, "prompt": "Which?"}]
    proof = [GOOD | {"labels": ["1", "2"], "answer": answer, "prompt": f"Q{answer}?"} for answer in (0, 1)]
    golds = {row.fields["prompt"]: row.gold for row in rows_of(path, lines(shown + proof)).values()}
    assert [golds[prompt] for prompt in ("Which?", "Q0?", "Q1?")] == ["2", "1", "2"]
    with pytest.raises(DatasetError, match="answer 1 is ambiguous"):  # labels from 1, as answers from 1
        rows_of(path, lines(GOOD | {"labels": ["1", "2", "3"], "answer": answer} for answer in (1, 2)))


@pytest.mark.parametrize(("answer", "gold"), [("1", 0), ("0", 1), (" 0 ", 1)])
def test_text_is_a_label_even_if_it_is_a_number(path, answer, gold):
    assert row(path, labels=["1", "0"], answer=answer).answer == gold


@pytest.mark.parametrize("answer", ["0", True, 1.0, [0], {"a": 0}, "a", 10**40])
def test_other_answers_are_refused_with_what_is_allowed(path, answer):
    with pytest.raises(DatasetError, match=r"data.jsonl:1: answer is .*; allowed: 0 to 1, or one of the labels"):
        row(path, answer=answer)


@pytest.mark.parametrize(("value", "name"), [(7, "7"), (1.5, "1.5"), ("x", "x"), (10**30, str(10**30))])
def test_ids_and_groups_may_be_text_or_numbers(path, value, name):
    found = row(path, id=value, group=value)
    assert (found.id, found.group) == (name, name)


@pytest.mark.parametrize("field", ["id", "group"])
@pytest.mark.parametrize("value", ["true", "[1]", "{}", "1e999", '"\\ud800"'])
def test_other_ids_and_groups_are_refused(path, field, value):
    with pytest.raises(DatasetError, match=f"data.jsonl:1.*{field}"):
        rows_of(path, json.dumps(GOOD)[:-1] + f', "{field}": {value}}}')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "prompt": "b", "labels": ["A", "B"], "answer": 0}', "'prompt' occurs twice in an object"),
        ('{"prompt": "a", "labels": ["A", "B"], "answer": Infinity}', "Infinity is no value of JSON"),
        (json.dumps(GOOD) + json.dumps(GOOD), "not JSON"),
        (json.dumps(GOOD).encode("utf-16"), "not JSON"),
        (b'{"prompt": "caf\xe9"}', "not JSON"),
        (json.dumps(GOOD | {"labels": ["caf\u00e9", "cafe\u0301"]}), "repeat; each option needs its own label"),
        (json.dumps(GOOD | {"labels": [["A"], ["B"]]}), "label is"),
        (json.dumps(GOOD | {"labels": {"A": 1, "B": 2}}), "labels is"),
        (json.dumps(GOOD | {"labels": "AB"}), "labels is 'AB'"),
        (json.dumps(GOOD | {"prompt": [{"role": "user"}]}), "prompt is"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(path, content, message):
    with pytest.raises(DatasetError, match="data.jsonl:1: ") as error:
        rows_of(path, content)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_marks_of_byte_order_line_ends_and_empty_lines_do_not_matter(path):
    plain = rows_of(path, json.dumps(GOOD))
    dressed = rows_of(path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n  \r\n\r")
    texts = [sorted(row.fields["prompt"] for row in found.values()) for found in (plain, dressed)]
    assert texts[0] == texts[1]


def test_long_lines_are_read_whole(path):
    assert len(row(path, group="g" * 10**6).group) == 10**6


def test_fields_that_are_not_read_are_named(path, caplog):
    with caplog.at_level(logging.WARNING):
        row(path, subject="x", spllt="test")
    (message,) = caplog.messages
    assert "not read are the fields 'subject', 'spllt'; known are prompt" in message


def directory(path):
    path.mkdir()


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read .No such file"),
        (directory, "is a (directory|pipe); a file is needed"),
        (os.mkfifo, "is a (directory|pipe); a file is needed"),
        (lambda path: path.symlink_to("nowhere"), "cannot be read .No such file"),
        (lambda path: path.symlink_to(path), "cannot be read .Too many levels of symbolic links"),
        (pointer, "is a Git LFS pointer, not the file that it stands for: run git lfs pull"),
        (lambda path: path.write_text(" \n"), "no rows"),
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "DATA.JSONL"])
def test_what_is_no_data_file_is_refused_in_one_line(tmp_path, monkeypatch, name, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    with pytest.raises(DatasetError, match=message) as error:
        load_dataset(name, tiny_tokenizer(), settings=PromptSettings())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("split", "make", "message"),
    [
        ("train", lambda path: path.symlink_to("nowhere"), "train.json.* cannot be read .No such file"),
        ("train", directory, "train.json.* is a (directory|pipe); a file is needed"),
        ("valid", pointer, "valid.json is a Git LFS pointer"),
        ("test", lambda path: path.write_text('[{"text": "a", "text": "b", "label": 1}]'), "'text' occurs twice"),
        ("test", lambda path: path.write_text('[{"text": "a", "label": NaN}]'), "'label' is None; allowed: 0, 1, 2, 3"),
        ("test", lambda path: path.write_text("[\n{"), "test.json:2: not JSON"),
        ("test", lambda path: path.write_text("[]"), "there are no test rows"),
    ],
)
def test_damaged_files_of_a_released_dataset_are_refused_in_one_line(tmp_path, split, make, message):
    folder = tmp_path / "classification" / "agnews"
    folder.mkdir(parents=True)
    for name in {"train", "valid", "test"} - {split}:
        rows = [{"text": f"{name} {number}", "label": number % 4} for number in range(8)]
        (folder / f"{name}.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    make(folder / f"{split}.json")
    with pytest.raises(DatasetError, match=message) as error:
        load_dataset("mceval8k/agnews", tiny_tokenizer(), settings=PromptSettings(), root=tmp_path)
    assert "\n" not in str(error.value)


def test_a_relative_path_that_is_not_there_is_told_as_the_absolute_one_that_was_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=str(tmp_path / "sub" / "data.jsonl")):
        load_dataset("sub/data.jsonl", tiny_tokenizer(), settings=PromptSettings())
    with pytest.raises(DatasetError, match=str(tmp_path / "facts.parquet")):
        load_facts("facts.parquet", tiny_tokenizer())


def test_a_name_that_is_too_long_for_any_file_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="File name too long"):
        load_dataset("n" * 300 + ".jsonl", tiny_tokenizer(), settings=PromptSettings())


@pytest.mark.parametrize("name", ["facts.feather", "facts.parquet", "FACTS.PARQUET"])
def test_facts_in_a_damaged_table_are_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1" + bytes(99) + b"PAR1")
    with pytest.raises(DatasetError, match="cannot be read"):
        load_facts(tmp_path / name, tiny_tokenizer())


def asked(path, rows, tokenizer=None, **settings):
    """The test examples of a file as one tokenizer reads them."""
    path.write_text(lines(rows))
    return load_dataset(str(path), tokenizer or tiny_tokenizer(), settings=PromptSettings(**settings)).splits["test"]


SPLITS = [*["train"] * 4, "valid", "valid", "test", "test"]
ROWS = [
    {"prompt": f"Question {n}: which answer? Answer:", "labels": ["A", "B"], "answer": n % 2, "split": split}
    for n, split in enumerate(SPLITS)
]


def test_a_row_names_a_piece_of_its_prompt_whose_end_is_the_probed_place(path):
    rows = [one | {"probe_at": f"Question {n}"} for n, one in enumerate(ROWS)]
    (first, _) = asked(path, rows)
    assert row(path, probe_at="Question").probe_at == "Question" and row(path).probe_at == ""
    assert {one.probe_end for one in asked(path, ROWS)} == {None} and first.probe_end == len("Question 6")


def test_a_place_is_in_the_rows_own_question_and_not_in_a_solved_one(path):
    rows = [one | {"probe_at": "which answer"} for one in ROWS]
    for example in asked(path, rows, shots=1):
        assert example.prompt.count("which answer") == 3
        assert example.probe_end == example.prompt.rindex("which answer") + len("which answer")


def test_a_place_is_in_the_message_that_a_chat_template_wraps(path):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}[which answer]{% endif %}"
    )
    rows = [one | {"probe_at": "which answer"} for one in ROWS]
    (example, _) = asked(path, rows, tokenizer, prompt_format="chat")
    assert example.prompt[: example.probe_end].endswith("6: which answer") and example.prompt.endswith("[which answer]")


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        ("Rome", "'Rome' stands nowhere in the prompt"),
        (":", "':' stands at several places of the prompt; give a longer piece"),
        ("  ", "probe_at is '  '; allowed: text that is not empty"),
        (3, "probe_at is 3; allowed: text"),
    ],
)
def test_a_piece_that_is_no_single_place_is_refused_with_the_line(path, piece, said):
    with pytest.raises(DatasetError, match=f"data.jsonl:1: .*{re.escape(said)}"):
        row(path, probe_at=piece)


def test_places_are_part_of_a_datasets_fingerprint_and_their_absence_changes_none(path):
    def digest(rows):
        path.write_text(lines(rows))
        return load_dataset(str(path), tiny_tokenizer(), settings=PromptSettings()).fingerprint

    assert digest(ROWS) == "ecf0f314544031dca4347493164aa4d8"
    named = {digest([one | {"probe_at": piece} for one in ROWS]) for piece in ("Question", "which")}
    assert len(named | {digest(ROWS)}) == 3


def test_labels_of_several_tokens_are_refused_unless_they_are_asked_for(path):
    rows = [one | {"labels": ["yes or no", "A"], "answer": n % 2} for n, one in enumerate(ROWS)]
    with pytest.raises(LabelError, match="answers: sequence allows several"):
        asked(path, rows)
    (example, _) = asked(path, rows, answers="sequence")
    assert example.labels == (" yes or no", " A")
    with pytest.raises(LabelError, match="is for models that go on with a text"):
        load_dataset(str(path), tiny_tokenizer(), settings=PromptSettings(answers="sequence"), masked=True)
    with pytest.raises(DatasetError, match="answers is 'text'; allowed: 'token', 'sequence'"):
        PromptSettings(answers="text")


def test_facts_of_a_study_are_asked_at_their_prompts_end(path):
    path.write_text(lines([{"uuid": "1", "prompt": "It was", "tpl": "t", "answer": "A", "probe_at": "It"}]))
    with pytest.raises(DatasetError, match="data.jsonl:1: facts are asked at their prompt's last token"):
        load_facts(path, tiny_tokenizer())
