"""Two drivers on one run directory: one works, the other is told who holds it; a dead one's claim ends."""

import contextvars
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from support import neg, save_tiny_model

from negcore.errors import RunError
from negcore.store.files import find, location, read_bytes
from tasks.rundir.claim import CLAIM_FILE, claim

HOLDING = """
import pathlib, sys, time
from tasks.rundir.claim import claim
with claim(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(directory):
    """Another process that holds the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def hasty(monkeypatch):
    """Renewed and given up in fractions of a second."""
    monkeypatch.setattr("tasks.rundir.claim._BEAT_S", 0.05)
    monkeypatch.setattr("tasks.rundir.claim._POLL_S", 0.02)
    monkeypatch.setattr("tasks.rundir.claim._SILENCE_S", 1.0)
    monkeypatch.setattr("tasks.rundir.claim._SETTLE_S", 0.2)


def recorded(directory):
    return json.loads((directory / CLAIM_FILE).read_text())


def leave(directory, **changes):
    """Leave the claim of this process behind, changed, as if it had died."""
    with claim(directory):
        record = recorded(directory)
    (directory / CLAIM_FILE).write_text(json.dumps(record | changes))


def elsewhere(body):
    """Call in another context, as another thread would."""
    return contextvars.Context().run(body)


def attempt(directory):
    with claim(directory):
        return True


def test_a_directory_is_held_inside_the_block_and_free_after_it(tmp_path):
    run = tmp_path / "new" / "run"
    with claim(run):
        assert recorded(run)["pid"] == os.getpid()
    assert list(run.iterdir()) == []
    with claim(run):
        pass


def test_it_is_free_after_an_error_too(tmp_path):
    with pytest.raises(KeyError), claim(tmp_path):
        raise KeyError("mine")
    assert list(tmp_path.iterdir()) == []


def test_the_second_driver_is_told_who_holds_it_and_changes_nothing(tmp_path):
    with holder(tmp_path) as first:
        before = (tmp_path / CLAIM_FILE).read_bytes()
        with pytest.raises(RunError) as refused:
            attempt(tmp_path)
        assert f"is held by pid {first.pid} on " in str(refused.value)
        assert str(refused.value).endswith(": wait, stop it, or use another --out")
        assert "\n" not in str(refused.value)
        assert (tmp_path / CLAIM_FILE).read_bytes() == before


def test_a_killed_drivers_claim_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.rundir.claim._POLL_S", 1000)  # it is not waited for
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
        assert attempt(tmp_path)


def test_a_killed_driver_that_nobody_buried_is_dead_too(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.rundir.claim._POLL_S", 1000)
    with holder(tmp_path) as first:
        first.kill()
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        assert attempt(tmp_path)


def test_a_claim_that_was_copied_with_a_living_drivers_directory_ends_by_silence(tmp_path, hasty):
    with holder(tmp_path / "original") as first:
        shutil.copytree(tmp_path / "original", tmp_path / "copy")
        assert attempt(tmp_path / "copy")
        (tmp_path / "link").symlink_to("original")
        for same in ("original", "link"):
            with pytest.raises(RunError, match=f"held by pid {first.pid} "):
                attempt(tmp_path / same)


def test_a_claim_of_an_earlier_version_is_believed(tmp_path):
    leave(tmp_path)
    record = recorded(tmp_path)
    del record["place"]
    (tmp_path / CLAIM_FILE).write_text(json.dumps(record))
    with pytest.raises(RunError, match=f"held by pid {os.getpid()} "):
        attempt(tmp_path)


def test_a_process_that_only_has_the_holders_number_is_not_the_holder(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.rundir.claim._POLL_S", 1000)
    leave(tmp_path, birth="1")
    assert attempt(tmp_path)


def test_a_driver_on_another_machine_lives_as_long_as_it_renews_its_claim(tmp_path, hasty):
    leave(tmp_path, machine="far pid:[1]")
    beats, ended = recorded(tmp_path), threading.Event()

    def renew():
        while not ended.wait(0.1):
            beats["beat"] += 1
            (tmp_path / CLAIM_FILE).write_text(json.dumps(beats))

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(RunError, match=f"is held by pid {os.getpid()} on far "):
        attempt(tmp_path)
    ended.set()
    thread.join()
    assert attempt(tmp_path)  # silent now


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"pid": 1e999}', b"\xff"])
def test_a_damaged_claim_ends_by_silence(tmp_path, hasty, monkeypatch, content):
    monkeypatch.setattr("tasks.rundir.claim._SILENCE_S", 0.1)
    (tmp_path / CLAIM_FILE).write_bytes(content)
    assert attempt(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_claim_says_cannot_steer_a_terminal(tmp_path):
    leave(tmp_path, command="\x1b[2Jneg\nlies")
    with pytest.raises(RunError, match=r"\(\?\[2Jneg\?lies\)"):
        attempt(tmp_path)


def test_a_claim_is_renewed_while_it_is_held_even_if_its_file_is_removed(tmp_path, hasty):
    with claim(tmp_path):
        (tmp_path / CLAIM_FILE).unlink()
        wait_for(lambda: (tmp_path / CLAIM_FILE).exists())
        beat = recorded(tmp_path)["beat"]
        wait_for(lambda: recorded(tmp_path)["beat"] > beat)
    assert list(tmp_path.iterdir()) == []


def test_claiming_again_from_inside_changes_nothing(tmp_path):
    with claim(tmp_path):
        before = recorded(tmp_path)["token"]
        with claim(tmp_path):
            assert recorded(tmp_path)["token"] == before
        assert recorded(tmp_path)["token"] == before
        with pytest.raises(RunError, match=f"is held by pid {os.getpid()} on "):
            elsewhere(lambda: attempt(tmp_path))


def test_a_driver_whose_claim_was_taken_over_is_stopped_and_told_by_whom(tmp_path, hasty):
    stop = threading.Event()
    said = r"no longer belongs to this run, pid \d+ on far .* took it over: stopped"
    with pytest.raises(RunError, match=said), claim(tmp_path), claim(tmp_path, when_lost=stop.set):
        usurper = recorded(tmp_path) | {"machine": "far pid:[1]", "token": "another"}
        while not stop.wait(0.1):  # the claim may be just about to be renewed
            (tmp_path / CLAIM_FILE).write_text(json.dumps(usurper))
        raise InterruptedError("how the run ends when it is stopped")
    assert recorded(tmp_path) == usurper


def test_of_many_who_claim_a_dead_drivers_directory_at_once_one_works(tmp_path, hasty, monkeypatch):
    monkeypatch.setattr("tasks.rundir.claim._SETTLE_S", 1.0)
    leave(tmp_path, birth="1")
    start, working, refused = threading.Barrier(8), [], []
    most = threading.Semaphore(1)

    def work():
        start.wait()
        try:
            with claim(tmp_path):
                working.append(most.acquire(blocking=False))
                time.sleep(1)
                most.release()
        except RunError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert working == [True]
    assert len(refused) == 7


def test_a_directory_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written: ") as refused:
        attempt(tmp_path / "file" / "run")
    assert "\n" not in str(refused.value)


def test_a_claim_that_cannot_be_renewed_for_too_long_is_lost(tmp_path, hasty, monkeypatch):
    monkeypatch.setattr("tasks.rundir.claim._SILENCE_S", 0.2)
    stop = threading.Event()

    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(RunError, match=r"its claim could not be renewed for 0.2 s"),
        claim(tmp_path, when_lost=stop.set),
    ):
        monkeypatch.setattr("tasks.rundir.claim._rewrite", full)
        assert stop.wait(10)


def test_a_claim_is_renewed_on_a_full_disk(tmp_path, hasty, monkeypatch):
    def full(target):
        raise OSError(28, "No space left on device")

    with claim(tmp_path):
        monkeypatch.setattr("tasks.rundir.claim.draft", full)
        beat = recorded(tmp_path)["beat"]
        wait_for(lambda: recorded(tmp_path)["beat"] > beat)


def test_the_second_of_two_commands_is_refused_in_one_line_and_leaves_the_directory_as_it_is(tmp_path):
    model = save_tiny_model("gpt2", tmp_path / "model")
    run = tmp_path / "run"
    with claim(run):
        (run / "run.yaml").write_text("the first one's")
        refused = neg("extract", "--model", model, "--dataset", "mini/fact", "--limit", 8, "--out", run)
        assert sorted(path.name for path in run.iterdir()) == [CLAIM_FILE, "run.yaml"]
    assert refused.returncode == 2
    assert f"is held by pid {os.getpid()} on " in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert (run / "run.yaml").read_text() == "the first one's"


@pytest.fixture
def bucket(monkeypatch):
    """A run directory in an empty bucket of a server on this machine."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    location("s3://claims").fs.mkdir("claims")
    yield location("s3://claims/runs/one")
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_run_in_a_bucket_is_claimed_like_any_other(bucket, hasty):
    with claim(bucket):
        first = read_bytes(bucket / CLAIM_FILE)
        with pytest.raises(RunError, match=f"is held by pid {os.getpid()} on "):
            elsewhere(lambda: attempt(bucket))
        wait_for(lambda: read_bytes(bucket / CLAIM_FILE) != first)  # renewed
    assert find(bucket, "*") == []
    bucket.fs.pipe_file(str(bucket.path) + "/" + CLAIM_FILE, json.dumps(json.loads(first) | {"birth": "1"}).encode())
    assert attempt(bucket)  # left by a process that is gone
    assert find(bucket, "*") == []


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
