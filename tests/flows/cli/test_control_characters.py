"""Names and rows of others give the terminal no orders: the raw output of every command is searched."""

import json
import re
import subprocess
import sys

import pytest
from support import REPOSITORY, save_tiny_model
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from flows.cli.app import main
from flows.show.console import PlainConsole

ORDERS = "\x1b[31m\x1b]0;title\x07\x9b5A\b\r\u202egnp\u200b"
"""Colour, the window's title, a cursor movement in one byte, backspace, carriage return, reversed and unseen text."""
FORBIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufdd0\ufdd1]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder, model and data whose names, labels, ids and texts are orders."""
    folder = tmp_path_factory.mktemp("orders") / f"in{ORDERS}"
    save_tiny_model("llama", folder / f"model{ORDERS}")
    rows = []
    for n in range(24):
        row = {"id": f"{ORDERS}{n}", "prompt": f"{ORDERS}{n} Answer:", "labels": ["A", "B"], "answer": n // 3 % 2}
        rows.append(row | {"group": f"{ORDERS}{n % 2}", "split": ("train", "valid", "test")[n % 3]})
    (folder / f"data{ORDERS}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows[7] |= {"labels": [f"A{ORDERS}", f"B{ORDERS}"]}
    (folder / f"bad{ORDERS}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows[7] |= {ORDERS: 1, "answer": ORDERS}
    (folder / f"worse{ORDERS}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / f"run{ORDERS}.yaml").write_text(json.dumps({ORDERS: 1, "model": [ORDERS], "dataset": [ORDERS]}))
    disable_progress_bar()  # the command line does so before it is imported
    yield folder
    enable_progress_bar()


def shown(capfd, monkeypatch, *arguments):
    """Exit code and raw output of a command."""
    monkeypatch.setattr(sys, "argv", ["neg", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    return ended.value.code, out + err


def model(place):
    return place / f"model{ORDERS}"


def data(place, name="data"):
    return place / f"{name}{ORDERS}.jsonl"


def run_of(place, *more):
    out = ("--out", place / f"out{ORDERS}", "--backend", "local", "--orchestrator", "none")
    return ("pipeline", "--model", model(place), "--dataset", data(place), "--probe", "polar", *out, *more)


COMMANDS = {
    "a run": (0, lambda place: run_of(place)),
    "its status": (0, lambda place: ("status", place / f"out{ORDERS}")),
    "its check": (0, lambda place: ("verify", place / f"out{ORDERS}")),
    "its best neurons": (0, lambda place: ("neurons", place / f"out{ORDERS}", "--probe", "polar")),
    "a neuron": (0, lambda place: ("neuron", place / f"out{ORDERS}", "1.2", "--sweep")),
    "no neuron": (2, lambda place: ("neuron", place / f"out{ORDERS}", ORDERS)),
    "a neuron of no dataset": (2, lambda place: ("neuron", place / f"out{ORDERS}", "1.2", "--dataset", ORDERS)),
    "a plan": (0, lambda place: ("plan", "--model", model(place), "--dataset", data(place))),
    "a dataset": (0, lambda place: ("datasets", data(place), "--model", model(place))),
    "labels that do not fit": (2, lambda place: ("datasets", data(place, "bad"), "--model", model(place))),
    "a row at fault": (2, lambda place: ("datasets", data(place, "worse"), "--model", model(place))),
    "a missing file": (2, lambda place: ("datasets", data(place, "none"), "--model", model(place))),
    "an unknown dataset": (2, lambda place: ("datasets", ORDERS, "--model", model(place))),
    "a model": (0, lambda place: ("models", model(place))),
    "an unknown model": (2, lambda place: ("models", ORDERS)),
    "a run file": (2, lambda place: ("pipeline", place / f"run{ORDERS}.yaml")),
    "a value of an option": (2, lambda place: run_of(place, "--storage", ORDERS)),
    "an option": (2, lambda place: ("status", f"--{ORDERS}")),
    "a command": (2, lambda place: (ORDERS,)),
    "an audit": (
        0,
        lambda place: ("datasets", "--audit", data(place), "--model", model(place), "--rows", "2"),
    ),
    "an audit of nothing": (
        1,
        lambda place: ("datasets", "--audit", data(place, "worse"), "--model", model(place)),
    ),
    "a comparison": (2, lambda place: ("compare", place / f"out{ORDERS}", place / f"none{ORDERS}")),
    "another status": (2, lambda place: ("status", place / f"none{ORDERS}")),
    "a benchmark": (2, lambda place: ("benchmark", "--model", ORDERS)),
    "a schedule": (2, lambda place: ("serve", place / f"none{ORDERS}.yaml", "--cron", ORDERS)),
    "another plan": (2, lambda place: ("plan", "--model", place / ORDERS, "--dataset", data(place))),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_shows_an_order(place, capfd, monkeypatch, name):
    code, arguments = COMMANDS[name]
    ended, output = shown(capfd, monkeypatch, *arguments(place))
    assert FORBIDDEN.findall(output) == [], output
    assert ended == code, output
    assert "\\x1b[31m" in output.replace("\n", ""), output


def test_a_terminal_gets_the_styles_of_the_console_alone(tmp_path):
    console = PlainConsole(force_terminal=True, color_system="standard", width=200, file=(tmp_path / "o").open("w"))
    console.print("[red]ours[/red]", f"theirs {ORDERS}", markup=True)
    console.rule(f"rule {ORDERS}")
    console.file.close()
    written = (tmp_path / "o").read_text()
    assert "\x1b[31mours" in written
    assert FORBIDDEN.findall(re.sub("\x1b\\[[0-9;]*m", "", written)) == []
    assert "\\x1b]0;title" in re.sub("\x1b\\[[0-9;]*m", "", written)


def test_a_bug_shows_no_order_either():
    program = "from flows.show.console import show_all_through_consoles as show; import warnings, logging; show();"
    program += (
        f"orders = {ORDERS!r}; warnings.warn(orders); logging.getLogger('x').warning(orders); raise KeyError(orders)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, cwd=REPOSITORY)
    written = ended.stderr.decode()
    assert FORBIDDEN.findall(written) == []
    assert written.count("\\x1b[31m") >= 2 and "Traceback" in written
