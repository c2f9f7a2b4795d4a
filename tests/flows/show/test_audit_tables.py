"""The audit's tables: one row a dataset, in the terminal and in the document that is written from them."""

import re

import pytest
from support import REPOSITORY

from flows.show.audit_tables import audit_tables, check_audit_file, write_audit
from negcore.datasets import PromptSettings, list_datasets
from negcore.errors import RunError
from tasks.audit import DatasetAudit
from tasks.rundir.tables import read_table

DOCUMENT = REPOSITORY / "docs" / "datasets-audit.md"
ANY = DatasetAudit(
    dataset="mceval8k/ner",
    genre="linguistic",
    n_options=4,
    released_train=6000,
    released_valid=1000,
    released_test=1000,
    clean_train=3288,
    clean_valid=839,
    clean_test=997,
    doubles_train=56,
    doubles_valid=3,
    doubles_test=3,
    contradictory_train=0,
    contradictory_valid=0,
    contradictory_test=0,
    test_in_train=1000,
    valid_in_test=999,
    valid_in_train=998,
    units_in_train=496,
    random=0.25,
    majority=0.251,
    options_only=0.315,
    low=0.287,
    high=0.344,
    model="some-model",
    n_asked=64,
    label_mass=0.12,
    notes="valid drawn from train",
)


def test_every_number_of_an_audit_is_in_a_table():
    cells = [record for table in audit_tables([ANY], PromptSettings()) for record in table.records()]
    assert cells == [
        {
            "dataset": "ner",
            "released": "6000 1000 1000",
            "clean": "3288 839 997",
            "doubles": "56 3 3",
            "two answers": "0 0 0",
            "notes": "valid drawn from train",
        },
        {
            "dataset": "ner",
            "test in train": 1000,
            "valid in test": 999,
            "valid in train": 998,
            "same unit in train": 496,
        },
        {
            "dataset": "ner",
            "options": 4,
            "random": 0.25,
            "majority": 0.251,
            "options only": 0.315,
            "95 %": ".287-.344",
            "label mass": 0.12,
        },
    ]


def test_the_caption_says_who_was_asked_how():
    *_, floors = audit_tables([ANY], PromptSettings(shots=1, wording="inline"))
    assert "of some-model on a seeded sample of at most 64 test prompts (one-shot, wording inline)" in floors.caption


def test_an_audit_is_written_with_every_number_or_as_it_is_shown(tmp_path):
    audits = [ANY, DatasetAudit(**{name: getattr(ANY, name) for name in ANY.__dict__} | {"label_mass": None})]
    tables = audit_tables(audits, PromptSettings())
    write_audit(tmp_path / "audit.arrow", audits, tables, "neg datasets --audit")
    assert read_table(tmp_path / "audit.arrow", DatasetAudit) == audits
    write_audit(tmp_path / "audit.md", audits, tables, "neg datasets --audit")
    text = (tmp_path / "audit.md").read_text()
    assert "```bash parsed\nneg datasets --audit\n```" in text and text.endswith("\n") and not text.endswith("\n\n")
    assert "\n| ner | 4 | .250 | .251 | .315 | .287-.344 | - |\n" in text


def test_other_kinds_of_files_are_refused_by_name(tmp_path):
    with pytest.raises(RunError, match=r"'.*audit.csv'; allowed: a file that ends in .md .* or .arrow"):
        check_audit_file(tmp_path / "audit.csv")


def test_the_document_holds_a_row_of_every_dataset_in_every_table():
    """The numbers are of a real model on the real files: `neg datasets --audit` writes them anew."""
    sections = DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]
    tables = audit_tables([ANY], PromptSettings())
    names = [info.name.removeprefix("mceval8k/") for info in list_datasets()]
    assert [section.splitlines()[0] for section in sections] == [table.title for table in tables]
    for section, table in zip(sections, tables, strict=True):
        head, _, *rows = re.findall(r"(?m)^\| (.*) \|$", section)
        assert head.split(" | ") == [column.title for column in table.columns]
        assert [row.split(" | ")[0] for row in rows] == names
        assert all(len(row.split(" | ")) == len(table.columns) for row in rows)
