"""Shards on disk: what is written is read back, by us and by others, and nothing half-written is ever trusted."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pytest
from support import Row, identity_of, named_numbers, negs_place, write_negs

from negcore.errors import ShardError
from negcore.store import publish as shards
from negcore.store.identity import text_hash
from negcore.store.integrity import finished_shards
from negcore.store.publish import shard_path
from negcore.store.reader import open_negs

PARTITION = negs_place("meta-llama/Llama-2-7b", "mceval8k/agnews", "test")
N_OPTIONS, N_LAYERS, N_NEURONS = 2, 3, 5


identity = partial(
    identity_of,
    n_layers=N_LAYERS,
    n_neurons=N_NEURONS,
    model="meta-llama/Llama-2-7b",
    prompt={"shots": 4, "style": ["letters"]},
    versions={"torch": "2.13"},
)


numbers = partial(named_numbers, n_options=N_OPTIONS, n_layers=N_LAYERS, n_neurons=N_NEURONS)


def rows(first: int, count: int) -> list[Row]:
    return [Row(f"agnews/test/{i}", f"Which? {i}", i % N_OPTIONS, "en") for i in range(first, first + count)]


def write(root, index=0, n_shards=1, size=3, **changes):
    first = index * size
    return write_negs(
        root,
        changes.pop("partition", PARTITION),
        index,
        n_shards,
        identity=identity(**changes),
        examples=rows(first, size),
        **numbers(first, size),
    )


def planned_rows(n_shards=1, size=3) -> list[list[Row]]:
    return [rows(index * size, size) for index in range(n_shards)]


def planned_ids(n_shards=1, size=3) -> list[list[str]]:
    return [[row.id for row in shard] for shard in planned_rows(n_shards, size)]


def finished(root, n_shards=1):
    return finished_shards(root, PARTITION, identity(), planned_rows(n_shards)).receipts


def receipt_path(root, index=0) -> Path:
    return PARTITION.path(root) / "_receipts" / f"part-{index:05d}.json"


def stray_files(root) -> list[str]:
    return [path.name for path in Path(root).rglob("*.tmp")]


# What is written is read back


def test_one_row_that_fits_on_paper_is_read_back(tmp_path):
    write_negs(
        tmp_path,
        PARTITION,
        0,
        1,
        identity=identity(n_layers=2, n_neurons=2),
        examples=[Row("a/1", "Sky?", 1, "")],
        label_ids_PO=[[317, 350]],
        negs_POLN=[[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]],
        activations_PLN=[[[-1, -2], [-3, -4]]],
        probs_PO=[[0.25, 0.5]],
    )
    split = open_negs(tmp_path).select()
    assert split.layer(0).tolist() == [[[1, 2], [5, 6]]]
    assert split.layer(1).tolist() == [[[3, 4], [7, 8]]]
    assert split.neurons([(1, 0), (0, 1)]).tolist() == [[[3, 2], [7, 6]]]
    assert split.neurons([2, 1]).tolist() == [[[3, 2], [7, 6]]]
    assert split.activations([(1, 0)]).tolist() == [[-3]]
    assert (split.ids, split.groups, split.text_hashes) == (["a/1"], [""], [text_hash("Sky?")])
    assert split.gold_P.tolist() == [1]
    assert split.label_ids_PO.tolist() == [[317, 350]]
    assert split.probs_PO.tolist() == [[0.25, 0.5]]
    assert (split.n_rows, split.n_options, split.n_layers, split.n_neurons) == (1, 2, 2, 2)
    assert split.identity == identity(n_layers=2, n_neurons=2)
    assert split.identity.versions == {"torch": "2.13"}


def test_rows_come_in_order_of_shard_whatever_was_finished_first(tmp_path):
    for index in (2, 0, 1):
        write(tmp_path, index, n_shards=3)
    split = open_negs(tmp_path).select()
    expected = numbers(0, 9)
    assert split.ids == [row.id for row in rows(0, 9)]
    for layer in range(N_LAYERS):
        np.testing.assert_array_equal(split.layer(layer), expected["negs_POLN"][:, :, layer])
        per_shard = [shard.activations_PN(layer) for shard in split.shards()]
        np.testing.assert_array_equal(np.concatenate(per_shard), expected["activations_PLN"][:, layer])
    np.testing.assert_array_equal(split.probs_PO, expected["probs_PO"])
    np.testing.assert_array_equal(split.label_ids_PO, expected["label_ids_PO"])
    assert split.gold_P.tolist() == [row.answer for row in rows(0, 9)]


def test_chosen_neurons_are_those_of_the_whole_array(tmp_path):
    for index in range(2):
        write(tmp_path, index, n_shards=2)
    split = open_negs(tmp_path).select()
    expected = numbers(0, 6)
    flat_K = np.random.default_rng(0).integers(0, N_LAYERS * N_NEURONS, size=40)
    pairs = [divmod(int(index), N_NEURONS) for index in flat_K]
    np.testing.assert_array_equal(split.neurons(flat_K), expected["negs_POLN"].reshape(6, N_OPTIONS, -1)[..., flat_K])
    np.testing.assert_array_equal(split.neurons(pairs), split.neurons(flat_K))
    np.testing.assert_array_equal(split.activations(flat_K), expected["activations_PLN"].reshape(6, -1)[:, flat_K])
    assert split.neurons([]).shape == (6, N_OPTIONS, 0)


@pytest.mark.parametrize("wrong", [[15], [-1], [(3, 0)], [(0, 5)], [(0, -1)], [0.5], [True], [(0, 0, 0)]])
def test_a_neuron_that_does_not_exist_is_refused(tmp_path, wrong):
    write(tmp_path)
    with pytest.raises(ShardError, match="flat indices|is no neuron of"):
        open_negs(tmp_path).select().neurons(wrong)


@pytest.mark.parametrize("layer", [-1, N_LAYERS])
def test_a_layer_that_does_not_exist_is_refused(tmp_path, layer):
    write(tmp_path)
    with pytest.raises(ShardError, match=r"layers 0\.\.2"):
        open_negs(tmp_path).select().layer(layer)


def test_signs_of_zero_and_the_smallest_numbers_survive(tmp_path):
    values = numbers(0, 3)
    values["negs_POLN"][0, 0, 0] = [-0.0, 0.0, 1e-45, -1e-38, np.finfo(np.float32).max]
    write_negs(tmp_path, PARTITION, 0, 1, identity=identity(), examples=rows(0, 3), **values)
    stored = open_negs(tmp_path).select().layer(0)
    assert stored.tobytes() == np.ascontiguousarray(values["negs_POLN"][:, :, 0]).tobytes()


def test_the_prompts_text_is_not_stored(tmp_path):
    write(tmp_path)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"Which?" not in stored
    assert b"agnews/test/2" in stored


def test_a_prompt_with_a_lone_surrogate_can_be_stored(tmp_path):
    examples = [row._replace(prompt="\ud800") for row in rows(0, 3)]
    write_negs(tmp_path, PARTITION, 0, 1, identity=identity(), examples=examples, **numbers(0, 3))
    assert len(set(open_negs(tmp_path).select().text_hashes)) == 1


def test_the_same_content_gives_the_same_bytes(tmp_path):
    receipts = [write(tmp_path / name) for name in ("one", "two")]
    files = [sorted(path for path in (tmp_path / name).rglob("part-*") if path.is_file()) for name in ("one", "two")]
    assert receipts[0] == receipts[1]
    assert [path.name for path in files[0]] == ["part-00000.json", "part-00000.arrow"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_other_content_gives_another_checksum(tmp_path):
    assert write(tmp_path / "one").file_xxh3 != write(tmp_path / "two", size=2).file_xxh3


# Memory-mapped, without a copy


@pytest.mark.parametrize(("size", "extra"), [(1, ""), (3, "x"), (32, "y" * 13)])
def test_a_layer_is_a_view_of_the_mapped_file_at_64_bytes(tmp_path, size, extra):
    write(tmp_path, size=size, model_revision=extra)
    split = open_negs(tmp_path).select()
    views = [split.layer(layer) for layer in range(N_LAYERS)]
    (shard,) = split.shards()
    views += [array for la in range(N_LAYERS) for array in (shard.negs_PON(la), shard.activations_PN(la))]
    mapped = mapped_ranges(shard_path(PARTITION.path(tmp_path), 0))
    for view in views:
        address = view.ctypes.data
        assert any(begin <= address and address + view.nbytes <= end for begin, end in mapped)
        assert address % 64 == 0
        assert not view.flags.owndata
        assert not view.flags.writeable


def mapped_ranges(path: Path) -> list[tuple[int, int]]:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]


# Others read it too


def arrow_dataset(root) -> pyarrow.dataset.Dataset:
    return pyarrow.dataset.dataset(root / "negs", format="ipc", partitioning="hive")


def test_pyarrow_gives_the_original_names_back(tmp_path):
    partitions = [
        PARTITION,
        negs_place("/models/a b=c%2F", "é", "train"),
        negs_place("..", "_hidden", ".x"),
        negs_place("C:\\m", "中文?*", "valid"),
    ]
    for partition in partitions:
        write(tmp_path, partition=partition)
    table = arrow_dataset(tmp_path).to_table(columns=["model", "dataset", "split"])
    assert {tuple(row.values()) for row in table.to_pylist()} == {partition[1:] for partition in partitions}
    assert set(open_negs(tmp_path).places) == set(partitions)
    for partition in partitions:
        assert open_negs(partition.path(tmp_path)).places == [partition]


def test_pyarrow_duckdb_and_polars_give_the_same_numbers(tmp_path):
    for index in range(2):
        write(tmp_path, index, n_shards=2)
    (tmp_path / "negs" / "_elsewhere.tmp").write_bytes(b"not arrow")
    files = arrow_dataset(tmp_path)
    expected = numbers(0, 6)["negs_POLN"][:, :, 1].reshape(6, -1)

    ours = files.to_table().sort_by("id")
    from_duckdb = duckdb.sql("select id, neg_01, model from files order by id").fetchall()
    from_polars = pl.scan_pyarrow_dataset(files).select("id", "neg_01", "model").sort("id").collect()
    from_ipc = pl.scan_ipc(str(tmp_path / "negs/**/*.arrow"), hive_partitioning=True).sort("id").collect()

    assert ours["id"].to_pylist() == [row.id for row in rows(0, 6)]
    np.testing.assert_array_equal(np.array(ours["neg_01"].to_pylist(), dtype=np.float32), expected)
    np.testing.assert_array_equal(np.array([row[1] for row in from_duckdb], dtype=np.float32), expected)
    np.testing.assert_array_equal(from_polars["neg_01"].to_numpy(), expected)
    np.testing.assert_array_equal(from_ipc["neg_01"].to_numpy(), expected)
    models = [ours["model"].to_pylist(), [row[2] for row in from_duckdb]]
    models += [from_polars["model"].to_list(), from_ipc["model"].to_list()]
    assert models == [[PARTITION.model] * 6] * 4


def test_a_file_says_itself_what_it_holds(tmp_path):
    write(tmp_path)
    schema = pa.ipc.open_file(shard_path(PARTITION.path(tmp_path), 0)).schema
    about = json.loads(schema.metadata[b"neg"])
    assert about["digest"] == identity().digest
    assert about["identity"] == identity().comparable()
    assert about["versions"] == {"torch": "2.13"}
    assert about["partition"] == PARTITION.names
    assert about["axes"]


# Who a run is


def test_the_digest_hangs_on_everything_but_the_versions():
    changes = [
        {"model": "x"},
        {"model_revision": "x"},
        {"tokenizer_hash": "x"},
        {"site": "act"},
        {"dtype": "bfloat16"},
        {"n_layers": 4},
        {"n_neurons": 6},
        {"prompt": {"shots": 0, "style": ["letters"]}},
        {"dataset_fingerprint": "x"},
        {"number_format": 2},
    ]
    digests = {identity(**change).digest for change in [{}, *changes]}
    assert len(digests) == len(changes) + 1
    assert identity(versions={"torch": "3"}).digest == identity().digest
    assert identity(prompt={"style": ("letters",), "shots": 4}).digest == identity().digest


def test_a_difference_is_explained_in_one_line():
    other = identity(site="act", prompt={"shots": 0, "style": ["letters"], "wording": "line\nbreak" * 20})
    said = identity().difference(other)
    assert said.startswith("prompt.shots: 4 here, 0 there; prompt.wording: nothing here, 'line\\nbreak")
    assert said.endswith("... there; site: 'up' here, 'act' there")
    assert "\n" not in said
    assert identity().difference(identity(versions={})) == ""


# What is finished


def test_a_finished_shard_is_found_again(tmp_path):
    assert finished(tmp_path) == {}
    receipt = write(tmp_path)
    assert finished(tmp_path) == {0: receipt}
    assert (receipt.n_rows, receipt.first_id, receipt.last_id) == (3, "agnews/test/0", "agnews/test/2")
    assert stray_files(tmp_path) == []


def test_shards_of_another_run_are_refused_with_the_difference(tmp_path):
    write(tmp_path, site="act")
    with pytest.raises(ShardError) as refused:
        finished(tmp_path)
    message = str(refused.value)
    assert str(PARTITION.path(tmp_path)) in message
    assert "site: 'up' here, 'act' there" in message
    assert "another output directory" in message
    assert "\n" not in message


@pytest.mark.parametrize("plan", [planned_rows(2), planned_rows(1, size=2), planned_rows(1)[::-1] + [[Row("x")]], []])
def test_shards_cut_into_other_rows_are_refused(tmp_path, plan):
    write(tmp_path)
    with pytest.raises(ShardError, match="cut into other rows"):
        finished_shards(tmp_path, PARTITION, identity(), plan)


def test_shards_of_two_runs_are_not_read_as_one(tmp_path):
    write(tmp_path, 0, n_shards=2)
    write(tmp_path, 1, n_shards=2, site="act")
    with pytest.raises(ShardError, match="several runs"):
        open_negs(tmp_path).select()


# Damage


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_shard_cut_short_is_computed_again(tmp_path):
    receipt = write(tmp_path)
    cut_short(shard_path(PARTITION.path(tmp_path), 0))
    assert finished(tmp_path) == {}
    with pytest.raises(ShardError, match=r"part-00000.arrow' is damaged \(5529 bytes long, 5530 in its receipt"):
        open_negs(tmp_path).select()
    write(tmp_path)
    assert finished(tmp_path) == {0: receipt}


def test_a_flipped_bit_anywhere_is_found_when_verifying(tmp_path):
    write(tmp_path)
    path = shard_path(PARTITION.path(tmp_path), 0)
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert finished(tmp_path) == {}
        with pytest.raises(ShardError, match=r"part-00000.arrow' is damaged \(its checksum"):
            open_negs(tmp_path).select()


def test_a_flipped_bit_in_a_receipt_makes_it_no_receipt(tmp_path):
    write(tmp_path)
    path = receipt_path(tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert finished(tmp_path) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"seal": 1}', b"\xff"])
def test_a_damaged_receipt_is_no_receipt(tmp_path, content):
    write(tmp_path)
    receipt_path(tmp_path).write_bytes(content)
    assert finished(tmp_path) == {}


def test_a_receipt_of_another_shard_is_no_receipt(tmp_path):
    write(tmp_path, 0, n_shards=2)
    receipt_path(tmp_path, 1).write_bytes(receipt_path(tmp_path, 0).read_bytes())
    assert list(finished(tmp_path, n_shards=2)) == [0]


def test_a_file_that_is_not_arrow_is_refused_by_name(tmp_path):
    receipt = write(tmp_path)
    path = shard_path(PARTITION.path(tmp_path), 0)
    path.write_bytes(b"x" * receipt.n_bytes)
    with pytest.raises(ShardError, match=re.escape(f"{str(path)!r} is damaged")):
        open_negs(tmp_path).select()


# Reading what is not there


def test_an_incomplete_partition_is_refused(tmp_path):
    for index in (0, 2):
        write(tmp_path, index, n_shards=3)
    with pytest.raises(ShardError, match="2 of 3 shards: run the same command again"):
        open_negs(tmp_path).select()


def test_a_shard_without_receipt_is_not_read(tmp_path):
    write(tmp_path)
    receipt_path(tmp_path).unlink()
    with pytest.raises(ShardError, match="no finished shards"):
        open_negs(tmp_path).select()


def test_a_directory_without_negs_is_refused(tmp_path):
    with pytest.raises(ShardError, match="holds no NEGs"):
        open_negs(tmp_path)


def test_selecting_names_what_exists_when_none_or_several_match(tmp_path):
    for split in ("test", "train"):
        write(tmp_path, partition=PARTITION._replace(part=split))
    negs = open_negs(tmp_path)
    assert [part.place.part for part in negs] == ["test", "train"]
    assert negs.select(split="train").place.part == "train"
    with pytest.raises(ShardError, match="2 partitions match .*split='test'; .*split='train'"):
        negs.select(dataset=PARTITION.dataset)
    with pytest.raises(ShardError, match="0 partitions match .*split='test'; .*split='train'"):
        negs.select(split="valid")
    assert PARTITION.model in repr(negs)
    assert "3 rows x 2 options x 3 layers x 5 neurons in 1 shards" in repr(negs.select(split="test"))


def test_a_run_its_negs_and_a_partition_can_be_opened(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(PARTITION.path(tmp_path))
    for path in (tmp_path, tmp_path / "negs", PARTITION.path(tmp_path), str(tmp_path), "."):
        assert open_negs(path).places == [PARTITION]


# Crashes and races

DYING_WRITER = """
import os, pathlib, sys
sys.path[:0] = [sys.argv[1], sys.argv[1].removesuffix("/negcore/store")]
import test_publish, negcore.store.publish

module, name, dies_in_call, before = sys.argv[3], sys.argv[4], int(sys.argv[5]), sys.argv[6] == "before"
owner = {"os": os, "Path": pathlib.Path, "shards": negcore.store.publish}[module]
original, calls = getattr(owner, name), 0

def deadly(*args, **kwargs):
    global calls
    calls += 1
    if calls == dies_in_call and before:
        os._exit(9)
    result = original(*args, **kwargs)
    if calls == dies_in_call:
        os._exit(9)
    return result

setattr(owner, name, deadly)
test_publish.write(sys.argv[2])
"""

STEPS = [
    ("shards", "_write_batch", 1, "before"),
    ("shards", "_write_batch", 1, "after"),
    ("os", "fsync", 6, "after"),
    ("os", "replace", 1, "after"),
    ("os", "fsync", 7, "after"),
    ("Path", "write_text", 1, "after"),
    ("os", "replace", 2, "before"),
    ("os", "replace", 2, "after"),
]


@pytest.mark.parametrize(("module", "name", "call", "moment"), STEPS)
def test_a_writer_killed_at_any_step_leaves_nothing_to_trust(tmp_path, module, name, call, moment):
    command = [sys.executable, "-c", DYING_WRITER, str(Path(__file__).parent), str(tmp_path)]
    died = subprocess.run([*command, module, name, str(call), moment], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    published = (name, call, moment) == ("replace", 2, "after")
    assert bool(finished(tmp_path)) == published
    receipt = write(tmp_path)
    assert finished(tmp_path) == {0: receipt}
    assert stray_files(tmp_path) == []
    np.testing.assert_array_equal(open_negs(tmp_path).select().layer(2), numbers(0, 3)["negs_POLN"][:, :, 2])


def test_a_writer_that_fails_leaves_the_published_shard_alone(tmp_path, monkeypatch):
    receipt = write(tmp_path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("negcore.store.publish._write_batch", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path)
    assert finished(tmp_path) == {0: receipt}
    assert stray_files(tmp_path) == []


def test_a_receipt_never_stands_beside_a_shard_it_does_not_describe(tmp_path, monkeypatch):
    """A shard computed again dies between shard and receipt: the receipt of the first time must be gone."""
    write(tmp_path)
    monkeypatch.setattr(shards, "sync", lambda path: path.suffix == ".tmp" and ".json" in path.name and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, versions={"torch": "9.99"})
    assert finished(tmp_path) == {}


def test_a_live_writers_file_is_not_cleaned_up(tmp_path, monkeypatch):
    """Another shard of the partition is opened for writing while this one is being written."""
    original = shards._write_batch

    def interrupted(batch, path):
        monkeypatch.setattr(shards, "_write_batch", original)
        original(batch, path)
        write(tmp_path, 1, n_shards=2)
        assert stray_files(tmp_path) == [path.name]

    monkeypatch.setattr(shards, "_write_batch", interrupted)
    write(tmp_path, 0, n_shards=2)
    assert list(finished(tmp_path, n_shards=2)) == [0, 1]
    assert stray_files(tmp_path) == []


def test_of_two_writers_of_one_shard_one_valid_shard_remains(tmp_path, monkeypatch):
    """The second begins between the first one's shard and receipt; their bytes differ (in the versions)."""
    original, second = shards.sync, ThreadPoolExecutor(1)
    racing = []

    def sync_with_a_rival(path):
        if ".json" in path.name:
            monkeypatch.setattr(shards, "sync", original)
            racing.append(second.submit(write, tmp_path, versions={"torch": "9.99"}))
            wait(racing, timeout=0.5)
        original(path)

    monkeypatch.setattr(shards, "sync", sync_with_a_rival)
    write(tmp_path)
    racing[0].result()
    assert list(finished(tmp_path)) == [0]
    assert open_negs(tmp_path).select().ids == planned_ids()[0]


def test_many_writers_of_one_shard_do_not_trip_over_each_other(tmp_path):
    versions = [{"torch": "2." + "1" * number} for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda version: write(tmp_path, versions=version), versions))) == 40
    assert list(finished(tmp_path)) == [0]
    assert stray_files(tmp_path) == []


def test_reading_needs_no_model_library():
    heavy = "('torch', 'transformers', 'ray', 'prefect')"
    check = f"import sys, negcore.store.reader; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("index", [0, 99_999, 123_456, 1_000_000])
def test_the_number_of_a_shard_is_read_from_its_names(index):
    names = (shard_path(Path(), index).name, shards.receipt_path(Path(), index).name)
    assert [shards.index_of(name) for name in (*names, f"part-{index:05d}-{'0' * 32}.arrow")] == [index] * 3


@pytest.mark.parametrize("name", ["part-1.arrow", "part-.arrow", "other-00001.arrow", "part-00001"])
def test_other_names_have_no_number(name):
    assert shards.index_of(name) == -1
