"""Nothing damaged or misplaced is read: not by a reader, and not by a run that goes on from finished shards."""

import errno
import json
import os
import random
import shutil
import threading
import time
from contextlib import nullcontext
from functools import partial

import pytest
from support import Row, identity_of, named_numbers, negs_place, write_negs

from negcore.errors import ShardError
from negcore.store import integrity
from negcore.store.identity import canonical_json, content_digest
from negcore.store.integrity import finished_shards, shard_fault
from negcore.store.publish import read_receipts, receipt_path, receipts, shard_path
from negcore.store.reader import open_negs
from negcore.texts import plain, public

N_SHARDS, SIZE = 2, 2
SHAPE = {"n_options": 2, "n_layers": 2, "n_neurons": 3}
TEST = negs_place("org/tiny", "mini/fact", "test")

identity = partial(identity_of, 2, 3, model="org/tiny", versions={"torch": "2.13"})


def rows(index, answer=0, split="test"):
    numbers = range(index * SIZE, (index + 1) * SIZE)
    return [Row(f"fact/{split}/{i}", f"Which? {i}", (i + answer) % 2, "é") for i in numbers]


def write(root, place=TEST, index=0, answer=0, **changes):
    numbers = named_numbers(index * SIZE, SIZE, **SHAPE)
    return write_negs(
        root, place, index, N_SHARDS, identity=identity(**changes), examples=rows(index, answer, place.part), **numbers
    )


def write_split(root, place=TEST, **changes):
    for index in range(N_SHARDS):
        write(root, place, index, **changes)
    return place.path(root)


def finished(root, place=TEST):
    return finished_shards(root, place, identity(), [rows(index) for index in range(N_SHARDS)])


@pytest.fixture
def split(tmp_path):
    return write_split(tmp_path)


def swap(one, other):
    for path, content in ((one, other.read_bytes()), (other, one.read_bytes())):
        path.write_bytes(content)


def settle(folder):
    """Make files so old that the time of their next change will be another one."""
    for path in folder.rglob("part-*.arrow"):
        os.utime(path, (1, 1))


def reseal(path, **changes):
    record = json.loads(path.read_bytes()) | changes
    del record["seal"]
    path.write_text(canonical_json(record | {"seal": content_digest(record)}) + "\n")


# Bits and lengths


def damages(content, count):
    """Contents with one bit flipped, at random, and cut at random."""
    chosen = random.Random(len(content))
    for _ in range(count):
        at = chosen.randrange(len(content))
        yield content[:at] + bytes([content[at] ^ 1 << chosen.randrange(8)]) + content[at + 1 :]
        yield content[: chosen.randrange(len(content) - 1)]


def read_all(root, **options):
    for negs in open_negs(root, **options):
        negs.layer(1)
        negs.activations([0, 5])
        assert negs.metadata["index"] == 0


@pytest.mark.parametrize("kind", ["arrow", "json"])
def test_every_flipped_bit_and_every_cut_is_refused_by_name_and_computed_again(tmp_path, split, kind):
    path = shard_path(split, 1) if kind == "arrow" else receipt_path(split, 1)
    whole = path.read_bytes()
    for damage in damages(whole, 150):
        path.write_bytes(damage)
        with pytest.raises(ShardError, match=rf"{path.name}' is damaged \(.*run the same command again"):
            read_all(tmp_path)
        assert list(finished(tmp_path).damaged) == [1]
    path.write_bytes(whole)
    read_all(tmp_path)
    assert finished(tmp_path).damaged == {}


def test_without_checksums_a_flipped_bit_is_no_raw_error_either(tmp_path, split):
    path = shard_path(split, 1)
    for damage in damages(path.read_bytes(), 200):
        path.write_bytes(damage)
        try:
            read_all(tmp_path, verify=False)
        except ShardError as error:
            assert path.name in str(error)


def test_every_letter_of_a_receipt_is_sealed(split):
    """`\\u00e9` and `\\u00E9` are one letter to a JSON parser."""
    path = receipt_path(split, 1)
    reseal(path, first_id="fact/é")
    assert read_receipts(split).damaged == []
    path.write_text(path.read_text().replace("\\u00e9", "\\u00E9"))
    assert read_receipts(split).damaged == [path]


# Whole files in a wrong place


@pytest.mark.parametrize("with_receipts", [True, False])
def test_shards_of_another_model_are_refused_under_this_ones_name(tmp_path, with_receipts):
    place = TEST._replace(model="other")
    own, other = write_split(tmp_path / "own"), write_split(tmp_path / "other", place, model="other")
    shutil.copytree(other, own, dirs_exist_ok=True, ignore=None if with_receipts else lambda *_: ["_receipts"])
    with pytest.raises(ShardError, match="part-00000.arrow' is damaged"):
        open_negs(tmp_path / "own").select()


def test_a_directory_that_was_copied_from_another_models_names_it(tmp_path):
    shutil.copytree(write_split(tmp_path / "other", TEST._replace(model="other"), model="other"), TEST.path(tmp_path))
    with pytest.raises(ShardError, match="it belongs to other, mini/fact, test"):
        open_negs(TEST.path(tmp_path)).select()


@pytest.mark.parametrize("with_receipts", [True, False])
def test_swapped_splits_are_refused(tmp_path, split, with_receipts):
    train = write_split(tmp_path, TEST._replace(part="train"))
    for index in range(N_SHARDS):
        swap(shard_path(train, index), shard_path(split, index))
        if with_receipts:
            swap(receipt_path(train, index), receipt_path(split, index))
    assert set(finished(tmp_path).damaged) == {0, 1}
    for name in ("train", "test"):
        with pytest.raises(ShardError, match="it belongs to org/tiny, mini/fact" if with_receipts else "is damaged"):
            open_negs(tmp_path).select(split=name)


@pytest.mark.parametrize("with_receipts", [True, False])
def test_two_shards_of_a_split_that_were_swapped_are_refused(tmp_path, split, with_receipts):
    swap(shard_path(split, 0), shard_path(split, 1))
    if with_receipts:
        for index in range(N_SHARDS):
            reseal(receipt_path(split, index), index=1 - index)
        swap(receipt_path(split, 0), receipt_path(split, 1))
    with pytest.raises(ShardError, match=r"part-00000.arrow' is damaged"):
        open_negs(tmp_path).select()


@pytest.mark.parametrize("verify", [True, False])
def test_what_a_shard_says_of_itself_is_compared_with_a_receipt_of_other_settings(tmp_path, split, verify):
    write_split(tmp_path / "other", site="act")
    for index in range(N_SHARDS):
        shutil.copy(shard_path(TEST.path(tmp_path / "other"), index), shard_path(split, index))
        theirs = receipts(TEST.path(tmp_path / "other"))[index]
        reseal(receipt_path(split, index), file_xxh3=theirs.file_xxh3, n_bytes=theirs.n_bytes)
    with pytest.raises(ShardError, match="its metadata are not those of its receipt"):
        open_negs(tmp_path, verify=verify).select()


def test_a_right_answer_that_is_not_the_datasets_is_computed_again_though_its_receipt_fits(tmp_path, split):
    assert finished(tmp_path).damaged == {}
    write(tmp_path, index=1, answer=1)
    done = finished(tmp_path)
    assert list(done.receipts) == [0]
    assert plain(done.damaged[1]) == "gold of its row 'fact/test/2' is not that of the dataset"
    assert "fact" not in public(done.damaged[1])


# What a check costs, and when it is made again


def replace_readers(monkeypatch, size, reader):
    """Put something in place of what reads a shard for its checksum: one that is small, or one that is mapped."""
    monkeypatch.setattr(integrity, "_SMALL_BYTES", {"small": 2**20, "mapped": 0}[size])
    name = {"small": "read_bytes", "mapped": "checksum"}[size]
    monkeypatch.setattr(integrity, name, reader(getattr(integrity, name)))


@pytest.fixture(params=["small", "mapped"])
def hashed(monkeypatch, request):
    """Names of the files that were read for their checksum."""
    names, lock = [], threading.Lock()

    def counting(original):
        def counted(path):
            with lock:
                names.append(path.name)
            return original(path)

        return counted

    replace_readers(monkeypatch, request.param, counting)
    return names


def test_a_file_is_read_once_in_a_process_whoever_asks(tmp_path, split, hashed):
    settle(split)
    assert finished(tmp_path).damaged == {}
    read_all(tmp_path)
    read_all(tmp_path)
    assert sorted(hashed) == ["part-00000.arrow", "part-00001.arrow"]


@pytest.mark.parametrize(("waits", "begins_at"), [(False, 1), (True, 0)])
def test_files_that_have_to_be_waited_for_are_read_by_several_threads(waits, begins_at):
    threads = []

    def work(number):
        time.sleep(0.02)
        threads.append(threading.current_thread())
        return number

    assert list(integrity._mapped(work, iter(range(40)), waits=waits)) == list(range(40))
    assert [one is threading.main_thread() for one in threads] == [True] * begins_at + [False] * (40 - begins_at)
    assert len(set(threads[begins_at:])) == integrity._AT_ONCE


def test_files_in_memory_are_read_in_this_thread(monkeypatch):
    monkeypatch.setattr(integrity, "ThreadPoolExecutor", None)  # nobody makes one
    monkeypatch.setattr(integrity, "_WAITS", float("inf"))  # on a busy machine, computing waits too
    assert list(integrity._mapped(str, iter(range(40)), waits=False)) == list(map(str, range(40)))


@pytest.mark.parametrize("changed", ["time", "inode", "receipt"])
def test_a_file_that_may_have_changed_is_read_again(tmp_path, split, hashed, changed):
    settle(split)
    read_all(tmp_path)
    path = shard_path(split, 1)
    if changed == "time":
        os.utime(path, (2, 2))
    elif changed == "inode":
        path.with_suffix(".new").write_bytes(path.read_bytes())
        path.with_suffix(".new").replace(path)
        os.utime(path, (1, 1))
    else:
        reseal(receipt_path(split, 1), file_xxh3="0" * 32)
    hashed.clear()
    with pytest.raises(ShardError, match="its checksum") if changed == "receipt" else nullcontext():
        read_all(tmp_path)
    assert hashed == ["part-00001.arrow"]


def test_bits_that_rot_after_the_check_are_found_by_the_next_process(tmp_path, split):
    settle(split)
    read_all(tmp_path)
    path = shard_path(split, 1)
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    settle(split)
    integrity.forget_checks()
    with pytest.raises(ShardError, match=r"part-00001.arrow' is damaged \(its checksum"):
        read_all(tmp_path)


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, split, hashed):
    """Its next change may fall into the same step of the file system's clock."""
    (receipt, _) = receipts(split)
    for _ in range(2):
        assert shard_fault(split, receipt) is None
    assert len(hashed) == 2


def failing(number):
    def fail(path):
        raise OSError(number, os.strerror(number))

    return lambda original: fail


@pytest.mark.parametrize("size", ["small", "mapped"])
def test_a_lost_sector_is_damage_and_a_lost_network_is_not(tmp_path, split, monkeypatch, size):
    replace_readers(monkeypatch, size, failing(errno.EIO))
    assert "Input/output error" in finished(tmp_path).damaged[0]
    replace_readers(monkeypatch, size, failing(errno.ESTALE))
    with pytest.raises(ShardError, match="part-00000.arrow' cannot be read"):
        finished(tmp_path)
