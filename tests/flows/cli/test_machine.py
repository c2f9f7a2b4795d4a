import os
import pwd
import subprocess
import sys
import tempfile

import pytest

from flows.cli.machine import check_machine
from negcore.errors import ModelError, NegError, RunError
from negcore.model.language_model import describe_model
from negcore.store.files import cache_directory, location


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch):
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def homeless(monkeypatch):
    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_usual_machine_is_content():
    check_machine()


def test_a_user_without_a_home_is_told_to_set_one(homeless):
    with pytest.raises(RunError, match=r"HOME is not set, and user \d+ has no home directory: set HOME"):
        check_machine()


def test_the_cache_of_a_user_without_a_home_needs_a_place(homeless, monkeypatch, tmp_path):
    monkeypatch.delenv("NEG_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(NegError, match="set HOME, or NEG_CACHE"):
        cache_directory()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "neg"


def test_a_machine_without_a_temporary_directory_is_refused(monkeypatch):
    def full():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", full)
    with pytest.raises(RunError, match="no temporary directory .*No usable.*set TMPDIR"):
        check_machine()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ALL_PROXY", "socks5://me:secret@127.0.0.1:9", r"all_proxy is a SOCKS proxy.*pip install 'httpx\[socks\]'"),
        ("https_proxy", "htp://127.0.0.1:9", "https_proxy begins with 'htp'; allowed: http, https, socks5, socks5h"),
        ("http_proxy", "http://[::1", "http_proxy is no address .*: mend it, or unset it"),
        ("http_proxy", "http://127.0.0.1:9", None),
        ("HTTP_PROXY", "127.0.0.1:9", None),
        ("no_proxy", "*", None),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    if message is None:
        check_machine()
        return
    with pytest.raises(RunError, match=message) as error:
        check_machine()
    assert "secret" not in str(error.value)


def test_all_problems_are_named_at_once(homeless, monkeypatch):
    monkeypatch.setenv("http_proxy", "ftp://127.0.0.1")
    with pytest.raises(RunError, match="HOME.*http_proxy"):
        check_machine()


NOBODY = """
import os, pwd, sys
def unknown(number):
    raise KeyError(number)
pwd.getpwuid = unknown
del os.environ["HOME"]
from flows.cli.app import main
main()
"""


@pytest.mark.parametrize("command", ["pipeline", "plan", "serve"])
def test_a_user_without_a_home_is_refused_before_a_library_looks_for_it(command, tmp_path):
    options = [] if command == "serve" else ["--model", str(tmp_path), "--dataset", "mini/fact"]
    arguments = [command, *(options or [str(tmp_path / "run.yaml")])]
    done = subprocess.run([sys.executable, "-c", NOBODY, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert command == "plan" or "HOME is not set" in done.stderr


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "cache").touch()
    monkeypatch.setenv("NEG_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"the cache .*cache/gguf' cannot be written .*set NEG_CACHE"):
        describe_model(str(tmp_path / "model.gguf"))


def test_a_place_with_a_name_that_no_disk_takes_is_refused():
    assert location("n" * 255).name == "n" * 255
    with pytest.raises(RunError, match="a name of 256 bytes is in it, and at most 255 are possible"):
        location("runs/" + "é" * 128 + "/x")
