"""Places other than a local disk: buckets, behind a server that speaks S3's protocol, and directories without locks."""

import errno
import fcntl
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from support import REPOSITORY, Row, identity_of, named_numbers, neg, negs_place, save_tiny_model, write_negs

from negcore.errors import ProbeError, RunError, ShardError
from negcore.probing.saved_probes import load_probe
from negcore.store import publish as shards
from negcore.store.files import (
    draft,
    find,
    hidden,
    is_remote,
    local_directory,
    location,
    n_bytes,
    output,
    read_bytes,
    sizes,
)
from negcore.store.identity import canonical_json, content_digest
from negcore.store.integrity import finished_shards, local_shard, shard_fault
from negcore.store.publish import Receipt, ShardPlace, receipts, shard_of
from negcore.store.reader import open_negs
from negcore.store.study import write_seconds
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.config.run_file import write_run_file

PARTITION = negs_place("org/tiny", "mini/fact", "test")
N_OPTIONS, N_LAYERS, N_NEURONS = 2, 2, 3


identity = partial(identity_of, n_layers=N_LAYERS, n_neurons=N_NEURONS, model="org/tiny", versions={"torch": "2.13"})
numbers = partial(named_numbers, n_options=N_OPTIONS, n_layers=N_LAYERS, n_neurons=N_NEURONS)


def write(root, index=0, n_shards=1, size=2, partition=PARTITION, **changes) -> Receipt:
    first = index * size
    who = identity(**changes)
    return write_negs(
        root, partition, index, n_shards, identity=who, examples=rows(first, size), **numbers(first, size)
    )


def rows(first, size):
    return [Row(f"fact/{i}", f"Which? {i}", i % 2, "en") for i in range(first, first + size)]


def finished(root, n_shards=1, size=2):
    shards = [rows(index * size, size) for index in range(n_shards)]
    return finished_shards(root, PARTITION, identity(), shards).receipts


def receipt_path(root, index=0):
    return PARTITION.path(root) / "_receipts" / f"part-{index:05d}.json"


def put(path, content):
    """Write an object as somebody would who knows nothing of us."""
    path.fs.pipe_file(path.path, content)


# A server on this machine


class Request(NamedTuple):
    method: str
    key: str
    if_none_match: str | None
    if_match: str | None


class Server(NamedTuple):
    url: str
    requests: list[Request]

    def made(self, method, ending):
        return [request for request in self.requests if request.method == method and request.key.endswith(ending)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """moto on a free port. It handles one request at a time: S3's conditions hold at once, moto's in two steps."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_):
            pass

    app, one_at_a_time, requests = moto.DomainDispatcherApplication(moto.create_backend_app), threading.Lock(), []

    def atomic(environ, start_response):
        headers = (environ.get(f"HTTP_{name}") for name in ("IF_NONE_MATCH", "IF_MATCH"))
        requests.append(Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], *headers))
        with one_at_a_time:
            return list(app(environ, start_response))

    served = make_server("127.0.0.1", 0, atomic, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{served.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        yield Server(url, requests)
        s3fs.S3FileSystem.clear_instance_cache()
    served.shutdown()
    thread.join()


_numbers = itertools.count()


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """A run directory in an empty bucket."""
    monkeypatch.setenv("NEG_CACHE", str(tmp_path / "cache"))
    url = f"s3://bucket-{next(_numbers)}"
    location(url).fs.mkdir(url)
    server.requests.clear()
    return f"{url}/runs/a run"


def objects(root):
    """Names of all objects below a partition's directory."""
    folder = PARTITION.path(root)
    return sorted(path.name for path in [*find(folder, "*.*"), *find(folder, "_receipts/*")])


def assert_one_whole_shard(root):
    """Exactly one receipt and one shard, and they belong together."""
    folder = PARTITION.path(root)
    (receipt,) = receipts(folder)
    assert objects(root) == sorted([shard_of(folder, receipt).name, "part-00000.json"])
    assert shard_fault(folder, receipt) is None
    return receipt


# Buckets: written, read and resumed


def test_a_bucket_gives_back_what_was_written(bucket):
    for index in (1, 0):
        write(bucket, index, n_shards=2)
    expected = numbers(0, 4)
    for path in (bucket, f"{bucket}/", f"{bucket}/negs", PARTITION.path(bucket), str(PARTITION.path(bucket))):
        assert open_negs(path).places == [PARTITION]
    split = open_negs(bucket).select()
    assert split.ids == [f"fact/{i}" for i in range(4)]
    for layer in range(N_LAYERS):
        np.testing.assert_array_equal(split.layer(layer), expected["negs_POLN"][:, :, layer].astype(np.float32))
    assert split.identity == identity()
    assert "s3://bucket-" in repr(open_negs(bucket))


def test_names_with_any_character_are_given_back(bucket):
    partitions = {negs_place("/models/a b=c%2F?#", "é", "train"), negs_place("..", "[*]", ".x")}
    for partition in partitions:
        write(bucket, partition=partition)
    assert set(open_negs(bucket).places) == partitions
    for partition in partitions:
        assert open_negs(bucket).at(partition).n_rows == 2


def test_a_shard_has_the_same_bytes_in_a_bucket_and_on_disk(bucket, tmp_path):
    there, here = (read_bytes(shard_of(PARTITION.path(root), write(root))) for root in (bucket, tmp_path))
    assert there == here


def test_finished_shards_are_found_again_and_a_missing_one_is_not(bucket):
    assert finished(bucket) == {}
    receipt = write(bucket, 1, n_shards=2)
    assert finished(bucket, n_shards=2) == {1: receipt}
    with pytest.raises(ShardError, match="1 of 2 shards: run the same command again"):
        open_negs(bucket).select()


def test_shards_of_another_run_are_refused_with_the_difference(bucket):
    write(bucket, site="act")
    with pytest.raises(ShardError, match=r"s3://bucket-.*site: 'up' here, 'act' there"):
        finished(bucket)


def test_a_place_in_a_bucket_survives_the_way_to_another_process(bucket):
    place = pickle.loads(pickle.dumps(location(bucket)))  # noqa: S301  (what Ray does)
    write(place)
    assert place == location(bucket)
    assert list(finished(bucket)) == [0]


# Buckets: damage


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def test_a_shard_cut_short_or_lost_is_computed_again(bucket):
    receipt = write(bucket)
    shard = shard_of(PARTITION.path(bucket), receipt)
    whole = read_bytes(shard)
    for damage in (lambda: put(shard, whole[:-1]), lambda: shard.unlink()):
        damage()
        assert finished(bucket) == {}
        with pytest.raises(ShardError, match="is damaged"):
            open_negs(bucket).select()
        assert write(bucket) == receipt
        assert finished(bucket) == {0: receipt}
        assert_one_whole_shard(bucket)


@pytest.mark.parametrize("damage", ["cut", "flipped", "lost"])
def test_a_damaged_shard_does_not_keep_its_receipt_from_being_replaced(bucket, damage):
    """Computed again it has other bytes (in the versions), so the receipt must change with it."""
    shard = shard_of(PARTITION.path(bucket), write(bucket))
    whole = read_bytes(shard)
    if damage == "lost":
        shard.unlink()
    else:
        put(shard, whole[:-1] if damage == "cut" else flip(whole, len(whole) // 2))
    again = write(bucket, versions={"torch": "9"})
    assert again.versions == {"torch": "9"}
    assert again == assert_one_whole_shard(bucket)


def test_a_flipped_bit_is_found_before_anything_is_parsed(bucket, monkeypatch):
    folder = PARTITION.path(bucket)
    receipt = write(bucket)
    shard = shard_of(folder, receipt)
    whole = read_bytes(shard)
    for at in range(0, len(whole), len(whole) // 5):
        put(shard, flip(whole, at))
        assert finished(bucket) == {}
        with monkeypatch.context() as patch, pytest.raises(ShardError, match=r"damaged \(its checksum"):
            patch.setattr(pa.ipc, "open_file", lambda *_: pytest.fail("parsed"))
            open_negs(bucket).select()
    write(bucket)
    assert open_negs(bucket).select().n_rows == 2


@pytest.mark.parametrize("content", [b"", b"{", b'{"seal": 1}', b"flipped"])
def test_a_damaged_receipt_is_replaced_and_only_while_it_is_that_one(bucket, server, content):
    written = write(bucket)
    put(receipt_path(bucket), content if content != b"flipped" else flip(read_bytes(receipt_path(bucket)), 40))
    assert finished(bucket) == {}
    server.requests.clear()
    assert write(bucket, versions={"torch": "9"}) != written
    assert assert_one_whole_shard(bucket).versions == {"torch": "9"}
    assert [request.if_match is not None for request in server.made("PUT", ".json")] == [False, True]


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../../../../elsewhere.arrow"},
        {"file": "part-00001-" + "0" * 32 + ".arrow"},
        {"file_xxh3": "../../../elsewhere", "file": "part-00000-../../../elsewhere.arrow"},
        {"file_xxh3": 7},
        {"index": "0"},
    ],
)
def test_a_receipt_cannot_name_another_file(bucket, change):
    write(bucket)
    record = json.loads(read_bytes(receipt_path(bucket))) | change
    del record["seal"]
    put(receipt_path(bucket), canonical_json(record | {"seal": content_digest(record)}).encode())
    assert receipts(PARTITION.path(bucket)) == []


# Buckets: several writers


def test_a_receipt_is_put_on_condition_that_there_is_none(bucket, server):
    write(bucket)
    (shard,), (receipt,) = server.made("PUT", ".arrow"), server.made("PUT", ".json")
    assert server.requests.index(shard) < server.requests.index(receipt)
    assert receipt.if_none_match == "*"


class Turns:
    """Lets writers in threads make their requests in a given order; who is done has no more turns."""

    STEPS = ("upload", "create", "replace", "_is_whole", "remove", "objects")

    def __init__(self, order):
        self._order = list(order)
        self._changed = threading.Condition()
        self._writer = threading.local()

    def patch(self, monkeypatch):
        for name in self.STEPS:
            monkeypatch.setattr(shards, name, self._in_turn(getattr(shards, name)))

    def _in_turn(self, step):
        def wrapped(*args, **kwargs):
            with self._changed:
                me = self._writer.name
                assert self._changed.wait_for(lambda: me not in self._order or self._order[0] == me, timeout=30)
                result = step(*args, **kwargs)
                if self._order[:1] == [me]:
                    self._order.pop(0)
                self._changed.notify_all()
            return result

        return wrapped

    def write(self, name, root, **changes):
        self._writer.name = name
        try:
            return write(root, **changes)
        finally:
            with self._changed:
                self._order = [other for other in self._order if other != name]
                self._changed.notify_all()


ORDERS = sorted({"A" + "".join(order) for order in itertools.permutations("AABBB")})
"""Of the first three requests of each writer; which of them is called A makes no difference."""


@pytest.mark.parametrize("there", ["nothing", "a damaged receipt"])
@pytest.mark.parametrize("order", ORDERS)
def test_of_two_writers_one_wins_and_the_other_takes_its_receipt(bucket, monkeypatch, order, there):
    """Their bytes differ in the versions; in every order of their requests, one shard and its receipt remain."""
    if there == "a damaged receipt":
        put(receipt_path(bucket), b"{")
    turns = Turns(order)
    turns.patch(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(turns.write, name, bucket, versions={"torch": name}) for name in "AB"]
        written = [one.result() for one in pending]
    monkeypatch.undo()
    assert written == [assert_one_whole_shard(bucket)] * 2
    assert open_negs(bucket).select().n_rows == 2


def test_many_writers_of_one_shard_agree(bucket):
    versions = [{"torch": f"2.{number % 4}"} for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        written = list(pool.map(lambda version: write(bucket, versions=version), versions))
    assert written == [assert_one_whole_shard(bucket)] * 12


@pytest.mark.parametrize("step", ["upload", "create", "objects"])
def test_a_writer_that_dies_leaves_nothing_to_trust_and_nothing_for_good(bucket, monkeypatch, step):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, step, dies)
    with pytest.raises(KeyboardInterrupt):
        write(bucket, versions={"torch": "of the dead"})
    monkeypatch.undo()
    assert bool(finished(bucket)) == (step == "objects")
    write(bucket)
    assert_one_whole_shard(bucket)


def test_a_rival_of_another_run_is_told_so_and_leaves_nothing(bucket):
    receipt = write(bucket)
    with pytest.raises(ShardError, match="another run published shard 0 at the same time"):
        write(bucket, site="act")
    assert assert_one_whole_shard(bucket) == receipt


def test_a_lost_answer_to_the_winner_is_no_defeat(bucket, monkeypatch):
    """The server stored the receipt, the answer was lost, and the request is made again."""
    original = shards.create

    def twice(path, content):
        assert original(path, content) is None
        return original(path, content)

    monkeypatch.setattr(shards, "create", twice)
    assert write(bucket) == assert_one_whole_shard(bucket)


# Copies on this machine


def test_a_shard_is_fetched_once(bucket, server, tmp_path):
    receipt = write(bucket)
    server.requests.clear()
    for _ in range(2):
        open_negs(bucket).select().layer(0)
    assert len(server.made("GET", ".arrow")) == 1
    copy = local_shard(PARTITION.path(bucket), receipt)
    assert copy == tmp_path / "cache" / "shards" / f"{receipt.file_xxh3}.arrow"


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: flip(whole, len(whole) // 2)])
def test_a_damaged_copy_of_a_shard_is_fetched_again(bucket, server, damage):
    copy = local_shard(PARTITION.path(bucket), write(bucket))
    whole, written = copy.read_bytes(), copy.stat()
    copy.write_bytes(damage(whole))
    os.utime(copy, ns=(written.st_atime_ns, written.st_mtime_ns))
    server.requests.clear()
    open_negs(bucket).select().layer(1)
    assert len(server.made("GET", ".arrow")) == 1
    assert copy.read_bytes() == whole


def test_a_copied_run_is_read_where_it_was_copied_to(bucket, tmp_path):
    write(bucket)
    write(tmp_path / "run", size=3)
    local, remote = PARTITION.path(tmp_path / "copy"), location(f"{bucket}-copy")
    local.mkdir(parents=True)
    PARTITION.path(bucket).fs.get(PARTITION.path(bucket).path + "/", str(local) + "/", recursive=True)
    remote.fs.put(f"{tmp_path / 'run'}/", remote.path + "/", recursive=True)
    assert open_negs(tmp_path / "copy").select().n_rows == 2
    assert open_negs(remote).select().n_rows == 3


def test_what_needs_local_files_has_a_directory_of_its_own_for_each_run(bucket, tmp_path):
    assert local_directory(tmp_path) == tmp_path
    here = local_directory(location(bucket))
    assert here.parent == tmp_path / "cache" / "runs"
    assert here != local_directory(location(f"{bucket}/a run"))


# Other files in a bucket


def test_an_output_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match="/file/table.arrow' cannot be written: ") as told,
        output(tmp_path / "file" / "table.arrow") as path,
    ):
        path.touch()
    one_line(told)


def test_a_draft_appears_whole_or_not_at_all(bucket, tmp_path):
    for root in (location(bucket), tmp_path / "disk"):
        target = root / "tables" / "accuracy.arrow"
        with pytest.raises(ZeroDivisionError), draft(target) as file:
            file.write_text("half")
            raise ZeroDivisionError
        assert n_bytes(target) is None
        for text in ("first", "second"):
            with draft(target) as file:
                file.write_text(text)
        assert read_bytes(target) == b"second"
        assert sizes(root, "tables/*") == {"accuracy.arrow": 6}
        assert find(root, "tables/.*") == []


def test_a_missing_probe_in_a_bucket_is_named(bucket):
    with pytest.raises(ProbeError, match="no probe at 's3://bucket-"):
        load_probe(f"{bucket}/probes/polar.safetensors")


def test_how_long_a_shard_took_is_kept_in_a_bucket(bucket):
    folder = ShardPlace("sweeps", "m", "d", "layers-00-01").path(bucket)
    write_seconds(folder, 3, 1.5)
    assert read_bytes(folder / "_seconds" / "part-00003.json") == b"1.5"


# Errors in one line


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("place", ["gs://bucket/x", "file:///tmp", "s3://", "s3:///x", "s3://bucket/*", "s3://bu[k]et"])
def test_a_place_of_an_unknown_kind_is_refused(place):
    with pytest.raises(RunError, match=r"give a directory, or s3://BUCKET/PREFIX") as error:
        location(place)
    assert repr(place) in one_line(error)


def test_a_url_that_was_made_a_path_is_refused():
    with pytest.raises(RunError, match="give it as text"):
        location(Path("s3://bucket/run"))


def test_a_bucket_needs_packages_that_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'neg-at-scale\[s3\]'") as error:
        location("s3://bucket/run")
    one_line(error)


def test_negcore_imports_where_nothing_for_buckets_is_installed():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("s3fs", "upath", "aiobotocore"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import negcore.store.reader, negcore.store.publish, negcore.store.files
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_missing_credentials_are_said_in_one_line(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    location(bucket).fs.clear_instance_cache()
    for reach in (lambda: open_negs(bucket), lambda: write(bucket)):
        with pytest.raises(RunError, match="cannot be reached .*credentials") as error:
            reach()
        one_line(error)
    location(bucket).fs.clear_instance_cache()


def test_a_missing_file_is_named_as_on_disk(bucket, tmp_path):
    for place in (bucket, str(tmp_path / "run")):
        with pytest.raises(FileNotFoundError) as error:
            read_bytes(location(place))
        assert str(error.value) == f"[Errno 2] No such file or directory: {place!r}"


def test_a_bucket_that_does_not_exist_is_no_place_to_write(bucket):
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        write("s3://bucket-elsewhere/run")


# Directories without locks


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def without_locks(request, monkeypatch):
    """As on some network file systems: `flock` fails."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_directory_without_locks_is_written_resumed_and_read(without_locks, tmp_path):
    receipt = write(tmp_path)
    assert write(tmp_path) == receipt
    assert finished(tmp_path) == {0: receipt}
    assert open_negs(tmp_path).select().n_rows == 2
    assert [path.name for path in tmp_path.rglob("*.*") if not path.name.startswith("part")] == [".lock"]


def test_without_locks_many_writers_of_one_shard_do_not_trip_over_each_other(without_locks, tmp_path):
    versions = [{"torch": "2." + "1" * number} for number in range(20)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda version: write(tmp_path, versions=version), versions))
    assert list(finished(tmp_path)) == [0]


def test_without_locks_of_two_writers_one_valid_shard_remains(without_locks, tmp_path, monkeypatch):
    """The second begins between the first one's shard and receipt; their bytes differ (in the versions)."""
    original, second, racing = shards.sync, ThreadPoolExecutor(1), []

    def sync_with_a_rival(path):
        if ".json" in path.name:
            monkeypatch.setattr(shards, "sync", original)
            racing.append(second.submit(write, tmp_path, versions={"torch": "9.99"}))
        original(path)

    monkeypatch.setattr(shards, "sync", sync_with_a_rival)
    write(tmp_path)
    racing[0].result()
    assert list(finished(tmp_path)) == [0]


def test_without_locks_a_dead_holder_is_not_waited_for(without_locks, tmp_path):
    code = """
import os, sys, fcntl, errno, pathlib
def refuse(*_): raise OSError(errno.ENOLCK, "")
fcntl.flock = refuse
from negcore.store.locks import locked
with locked(pathlib.Path(sys.argv[1])):
    os._exit(9)
"""
    folder = PARTITION.path(tmp_path) / "_receipts"
    folder.mkdir(parents=True)
    assert subprocess.run([sys.executable, "-c", code, str(folder / ".lock")]).returncode == 9
    assert (folder / ".lock.held").exists()
    write(tmp_path)
    assert list(finished(tmp_path)) == [0]


def test_without_locks_only_old_temporary_files_count_as_abandoned(without_locks, tmp_path):
    write(tmp_path)
    live, dead = (hidden(PARTITION.path(tmp_path) / name) for name in ("part-00001.arrow", "part-00002.arrow"))
    for path in (live, dead):
        path.touch()
    os.utime(dead, (0, 0))
    write(tmp_path)
    assert (live.exists(), dead.exists()) == (True, False)


def test_another_error_of_a_lock_is_not_hidden(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path)


# A whole run


@pytest.fixture(scope="module")
def run_options(tmp_path_factory):
    """A tiny model and 36 prompts in three splits."""
    folder = tmp_path_factory.mktemp("run")
    rng = random.Random(0)
    rows = [
        {
            "prompt": f"Question: {' '.join(rng.choices(['the', 'best', 'of', 'times'], k=1 + i % 4))} {i} Answer:",
            "labels": [" A", " B"],
            "answer": i % 2,
            "split": ("train", "valid", "test")[i // 12],
        }
        for i in range(36)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = save_tiny_model("gpt2", folder / "tiny-gpt2")
    plain = ["--backend", "local", "--orchestrator", "none", "--shard-rows", 6, "--max-neurons", 16]
    return ["--model", model, "--dataset", folder / "questions.jsonl", *plain]


def test_a_pipeline_into_a_bucket_is_read_from_there_and_computes_nothing_again(bucket, server, run_options):
    ran = neg("pipeline", *run_options, "--out", bucket)
    assert ran.returncode == 0, ran.stderr
    assert f"written to {bucket}" in ran.stdout
    names = {path.name for path in find(location(bucket), "*.*")}
    assert {"run.yaml", "accuracy.arrow", "splits.arrow", "report.html"} <= names
    assert b'href="accuracy.arrow"' in read_bytes(location(bucket) / "report.html")
    assert [split.n_rows for split in open_negs(bucket)] == [12, 12, 12]
    (probe,) = find(location(bucket), "probes/*/*/polar.safetensors")
    assert load_probe(str(probe)).name == "polar"

    server.requests.clear()
    again = neg("pipeline", f"{bucket}/run.yaml", "--orchestrator", "none")
    assert again.returncode == 0, again.stderr
    assert "; 6 shards reused" in again.stdout
    assert [request for request in server.requests if request.method == "PUT" and "/negs/" in request.key] == []
    assert table(again.stdout) == table(ran.stdout) != []

    server.requests.clear()
    state = neg("status", bucket)
    assert "36 prompts in 6 shards" in state.stdout, state.stderr
    assert [request.key for request in server.requests if "_receipts" in request.key] == []  # the manifest tells


def table(output):
    return [line.strip() for line in output.splitlines() if "questions" in line]


def test_a_run_whose_bucket_does_not_exist_is_refused_before_it_starts(bucket):
    run = SkillRun(model=("m",), dataset=("d",), out="s3://bucket-elsewhere/run")
    with pytest.raises(RunError, match="run directory 's3://bucket-elsewhere/run' cannot be written") as error:
        write_run_file(run)
    one_line(error)


def test_a_run_file_in_a_bucket_is_read_back_as_it_was_written(bucket):
    run = SkillRun(model=("m",), dataset=("d",), out=bucket)
    assert str(write_run_file(run)) == f"{bucket}/run.yaml"
    assert read_run_file(SkillRun, bucket, {}) == read_run_file(SkillRun, f"{bucket}/run.yaml", {}) == run
    assert SkillRun.model_validate_json(run.model_dump_json()) == run
    assert is_remote(run.directory) and not is_remote(run.local_directory)
