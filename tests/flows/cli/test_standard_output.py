"""Output that is lost is no success."""

import errno
import io
import subprocess
import sys

import pytest
from support import NEG

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


def test_a_reader_that_left_early_and_other_errors_stay_what_they_are(monkeypatch):
    monkeypatch.setattr("sys.stdout", Full(errno.EPIPE))
    with pytest.raises(BrokenPipeError), output_kept():
        print("lost")
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
    assert ended.returncode == 1
