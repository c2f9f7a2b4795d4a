"""Receipts read in columns say what the same receipts say when each is parsed."""

import os
from dataclasses import replace
from functools import partial

import pytest
from support import Row, identity_of, named_numbers, negs_place, write_negs

from negcore.store import receipt_columns
from negcore.store.files import SmallFile
from negcore.store.identity import choice_digest
from negcore.store.publish import SetAside, receipt_path, receipts, shard_path
from negcore.store.receipt_columns import read_columns

PLACE = negs_place("org/tiny", 'mini/"fact" \\ ü', "test")
numbers = partial(named_numbers, n_options=2, n_layers=2, n_neurons=3)


def write(root, index, n_shards=4, set_aside=(), **changes):
    who = replace(identity_of(2, 3, model="org/tiny", versions={"torch": "2.13"}), **changes)
    rows = [Row(f'"index":7, \\{{}} é {index}-{i}', "Which?", i, "en") for i in range(2)]
    shard = numbers(2 * index, 2)
    return write_negs(root, PLACE, index, n_shards, identity=who, examples=rows, set_aside=set_aside, **shard)


@pytest.fixture
def folder(tmp_path):
    aside = SetAside(id="lost", cause="failure", reason='it said "no"')
    write(tmp_path, 0)
    write(tmp_path, 1, set_aside=[aside])
    write(tmp_path, 2, site="act")
    write(tmp_path, 3, n_shards=5)
    return PLACE.path(tmp_path)


def test_columns_say_what_the_receipts_say(folder):
    columns, known = read_columns(folder), receipts(folder)
    assert [tuple(row)[:3] for row in columns.rows] == [(one.index, one.n_rows, one.n_bytes) for one in known]
    runs = [columns.runs[run] for run in columns.rows["run"]]
    assert runs == [(one.planned_digest, one.n_shards) for one in known]
    assert columns.set_aside == {1: known[1].set_aside}
    assert columns.rows["time_s"].tolist() == [receipt_path(folder, index).stat().st_mtime for index in range(4)]
    assert columns.rows["is_listed"].all()


def test_a_shard_that_is_gone_or_cut_is_not_listed(folder):
    shard_path(folder, 0).unlink()
    shard_path(folder, 1).write_bytes(b"half")
    assert read_columns(folder).rows["is_listed"].tolist() == [False, False, True, True]


def test_receipts_of_chosen_neurons_have_the_digest_that_the_plan_knows(tmp_path):
    receipt = write(tmp_path, 0, neurons=choice_digest([1, 2]))
    ((digest, _),) = read_columns(PLACE.path(tmp_path)).runs
    assert digest == receipt.planned_digest != receipt.digest


def test_a_flipped_bit_anywhere_in_a_receipt_leaves_it_out(folder):
    file = receipt_path(folder, 0)
    whole = file.read_bytes()
    assert receipt_columns._plainly_said(SmallFile(file.name, whole, 0.0)) is not None
    for place in range(len(whole) - 1):  # the last byte is the end of the line
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        assert receipt_columns._plainly_said(SmallFile(file.name, flipped, 0.0)) is None, place
    file.write_bytes(whole[:100])
    assert read_columns(folder).rows["index"].tolist() == [1, 2, 3]


def test_a_receipt_under_another_name_and_a_pipe_are_no_receipts(folder):
    receipt_path(folder, 0).rename(receipt_path(folder, 7))
    os.mkfifo(receipt_path(folder, 0))
    assert read_columns(folder).rows["index"].tolist() == [1, 2, 3]


def test_a_directory_that_does_not_exist_has_no_receipts(tmp_path):
    columns = read_columns(tmp_path / "nothing")
    assert (len(columns.rows), columns.runs, columns.set_aside) == (0, (), {})
