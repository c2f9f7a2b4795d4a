"""Rows that a model cannot read: named with their place, or left out and counted."""

import json

import pytest
from support import save_tiny_model

from negcore.datasets import PromptSettings
from negcore.errors import NegError
from negcore.model.language_model import describe_model
from tasks.config.dataset_runs import SkillRun
from tasks.plan import plan, read_dataset

ODD = {
    "labels": ({"labels": ["A", "B", "C"]}, "has 3 labels, but most rows have 2"),
    "long": ({"prompt": "word " * 200 + "Answer:"}, "tokens, but .* reads at most 128"),
    "tokens": ({"labels": ["A", "Xylophone"]}, "label ' ?Xylophone' is .* tokens of this model"),
}


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return describe_model(str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")))


@pytest.fixture
def file(tmp_path):
    """A function that writes a file of 30 rows, of which those in lines 7 and 21 have other fields."""

    def write(fields):
        rows = [{"id": f"q{i}", "prompt": f"{i}? Answer:", "labels": ["A", "B"], "answer": i % 2} for i in range(30)]
        for index in (6, 20):
            rows[index] |= fields | {"prompt": f"{index} {fields.get('prompt', 'Answer:')}"}
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    return write


@pytest.mark.parametrize("kind", ODD)
def test_the_first_row_at_fault_is_named_with_file_and_line_and_the_way_out(card, file, kind):
    fields, reason = ODD[kind]
    path = file(fields)
    with pytest.raises(NegError, match=rf"row 'q(6|20)' \({path}:(7|21)\).*{reason}.*--unreadable skip") as error:
        read_dataset(card, path, PromptSettings())
    assert "\n" not in str(error.value) and "word word" not in str(error.value)


@pytest.mark.parametrize("kind", ODD)
def test_such_rows_can_be_left_out_and_are_counted(card, file, kind):
    fields, reason = ODD[kind]
    path = file(fields)
    dataset, encoded = read_dataset(card, path, PromptSettings(unreadable="skip"))
    ids = {example.id for examples in encoded.values() for example in examples}
    assert ids == {f"q{i}" for i in range(30)} - {"q6", "q20"}
    assert {split: len(examples) for split, examples in encoded.items()} == dataset.split_report.n_used
    changes = dataset.split_report.dropped
    assert sum(change.n_rows for change in changes) == 2
    assert all(f"({path}:" in change.reason for change in changes)


def test_rows_of_the_first_line_on_are_named_in_the_files_order(card, file):
    with pytest.raises(NegError, match=r"row 'q6' .*:7\) has 3 labels, but most rows have 2 \(and 1 rows more\)"):
        read_dataset(card, file({"labels": ["A", "B", "C"]}), PromptSettings())


def test_a_file_without_any_row_that_can_be_read_is_refused_all_the_same(card, tmp_path):
    rows = [{"prompt": f"{i}? Answer:", "labels": ["Xylophone", "Zither"], "answer": 0} for i in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(NegError, match="no row can be read: .*Xylophone"):
        read_dataset(card, str(tmp_path / "data.jsonl"), PromptSettings(unreadable="skip"))


def test_leaving_rows_out_gives_a_run_another_name_and_its_shards_another_identity(card, file, tmp_path):
    path = file({})
    runs = [SkillRun(model=card.name, dataset=path, unreadable=how, out=tmp_path) for how in ("fail", "skip")]
    assert runs[0].name != runs[1].name
    whole, same = (plan(run)[0].datasets[0].dataset.fingerprint for run in runs)
    changed = SkillRun(model=card.name, dataset=file(ODD["long"][0]), unreadable="skip", out=tmp_path)
    assert whole == same != plan(changed)[0].datasets[0].dataset.fingerprint
