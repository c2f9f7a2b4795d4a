"""Temporary directories vanish with their process, however it ends."""

import os
import subprocess
import sys

import pytest
from support import REPOSITORY

from negcore.store import temporary
from negcore.store.temporary import temporary_directory

WAITS = """
import sys, time
from pathlib import Path
from negcore.store.temporary import temporary_directory
with temporary_directory(Path(sys.argv[1])) as folder:
    (folder / "content").write_text("some")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Directories are looked through once in a process, and every test plays one."""
    temporary._remove_abandoned.cache_clear()


@pytest.fixture
def other(tmp_path):
    """Another process, which has a directory here."""
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        yield process, tmp_path / process.stdout.readline().strip()
        process.kill()


def test_a_directory_is_this_users_alone_and_gone_at_the_end(tmp_path):
    with temporary_directory(tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "content").write_text("some")
    assert not list(tmp_path.iterdir())


def test_the_directory_of_a_living_process_stays(tmp_path, other):
    with temporary_directory(tmp_path):
        assert (other[1] / "content").exists()


def test_the_directory_of_a_killed_process_is_removed_by_the_next(tmp_path, other):
    other[0].kill()
    other[0].wait()
    assert other[1].exists()
    with temporary_directory(tmp_path):
        assert not other[1].exists()


def test_directories_that_are_not_ours_stay(tmp_path):
    strange, linked = tmp_path / "neg-notes", tmp_path / "neg-link"
    strange.mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "in-use").touch()
    linked.symlink_to(tmp_path / "target")
    with temporary_directory(tmp_path):
        assert strange.exists() and (tmp_path / "target" / "in-use").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's directory")
def test_another_users_directory_stays(tmp_path, other):
    other[0].kill()
    other[0].wait()
    os.chown(other[1], 12345, 12345)
    with temporary_directory(tmp_path):
        assert other[1].exists()
