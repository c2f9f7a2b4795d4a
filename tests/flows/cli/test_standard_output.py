"""Output that is lost is no success."""

import errno
import io
import os
import subprocess
import sys

import pytest
from support import NEG, neg, save_tiny_model, write_questions

from flows.cli.standard_output import OutputLost, output_kept


class Full(io.StringIO):
    """A stream on a full disk."""

    def __init__(self, number=errno.ENOSPC):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, "No space left on device")


def test_a_stream_that_takes_no_more_is_told_by_its_own_error(monkeypatch):
    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(OutputLost, match="^the output cannot be written: No space left on device$"), output_kept():
        print("lost")


def test_a_closed_stream_is_told_at_once(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(OutputLost, match="standard output is closed; use > /dev/null"), output_kept():
        raise AssertionError("nothing is done")


def test_a_reader_that_left_early_is_nobodys_error(monkeypatch):
    monkeypatch.setattr("sys.stdout", Full(errno.EPIPE))
    monkeypatch.setattr("sys.stderr", Full())
    with output_kept():
        print("unread")
        print("unread, and the disk is full", file=sys.stderr, flush=True)
        print("unread as well", flush=True)


def test_a_terminal_that_is_gone_is_a_reader_that_left_but_a_damaged_disk_is_not(monkeypatch):
    monkeypatch.setattr("sys.stdout", Full(errno.EIO))
    with pytest.raises(OutputLost), output_kept():
        print("lost")
    monkeypatch.setattr(Full, "isatty", lambda self: True)
    monkeypatch.setattr("sys.stdout", Full(errno.EIO))
    with output_kept():
        print("unread")


def test_other_errors_stay_what_they_are(monkeypatch):
    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(OSError, match="elsewhere") as error, output_kept():
        raise OSError(errno.ENOSPC, "elsewhere")
    assert not isinstance(error.value, OutputLost)


def test_what_is_written_arrives_and_the_stream_is_given_back(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    with output_kept():
        print("arrives")
        assert sys.stdout.getvalue() == "arrives\n"
    assert sys.stdout is stream


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")
@pytest.mark.parametrize("command", [["--version"], ["--help"], ["datasets"]])
def test_a_full_disk_ends_a_command_with_one_line_and_exit_code_1(command):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ended = subprocess.run([NEG, *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (1, "error: the output cannot be written: No space left on device\n")


def test_a_reader_that_leaves_early_sees_no_traceback():
    with subprocess.Popen([NEG, "datasets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ended:
        ended.stdout.close()
        assert ended.stderr.read() == ""
    assert ended.returncode == 0


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_run_whose_reader_left_goes_on_to_its_end(tmp_path, closed):
    model, data = save_tiny_model("llama", tmp_path / "model"), write_questions(tmp_path)
    command = ["extract", "--model", model, "--dataset", data, "--backend", "local", "--orchestrator", "none"]
    read_end, write_end = os.pipe()
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, closed: write_end}
    run = subprocess.Popen(list(map(str, [NEG, *command, "--shard-rows", "8", "--out", tmp_path / "run"])), **streams)
    os.close(write_end)
    os.close(read_end)  # nobody ever reads
    assert run.wait(120) == 0
    assert "0 missing" in neg("status", tmp_path / "run").stdout


def test_a_refusal_that_nobody_reads_keeps_its_exit_code():
    command = f"set -o pipefail; {NEG} datasets nowhere.jsonl 2>&1 | true"
    assert subprocess.run(["bash", "-c", command], timeout=120).returncode == 2  # noqa: S607
