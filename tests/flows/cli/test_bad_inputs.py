"""Inputs that are damaged, or made to harm: one short line each, within seconds, in little memory.

Each row of `BAD` makes one, and says what the line must contain. Commands run in this process under limits of time and
memory: what hangs or asks for gigabytes fails.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from support import neg, save_tiny_model, write_questions
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from flows.cli.app import main

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, pipes and limits of memory")

LONGEST_S = 30
MOST_BYTES = 2 * 2**30
"""Memory that a command may take beside what this process has."""
LONGEST_LINE = 1000
MOST_LINES = 25
RUN = ("--backend", "local", "--orchestrator", "none")


class Hangs(BaseException):
    """A command does not answer: nothing may take this for an error of its own."""


class Place(NamedTuple):
    """What the rows make their inputs of."""

    folder: Path
    """An empty folder of the row's own."""
    model: Path
    """A tiny model; copied by `changed_model`."""
    data: Path
    run: Path
    """A finished run; copied by `changed_run`."""

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def large(self, name: str, content: bytes, n_bytes: int, end: bytes = b"") -> Path:
        """Write a file of many bytes, most of them zeros that take no room on the disk, behind some content."""
        path = self.file(name, content)
        with path.open("r+b") as stream:
            stream.truncate(n_bytes)
            stream.seek(n_bytes)
            stream.write(end)
        return path

    def special(self, name: str, kind: str) -> Path:
        """Put something else in place of a file."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "zero":
                path.symlink_to("/dev/zero")
            case "folder":
                path.mkdir()
            case "socket":
                with socket.socket(socket.AF_UNIX) as one, contextlib.chdir(path.parent):
                    one.bind(path.name)
            case "loop":
                path.symlink_to(path.name)
        return path

    def rows(self, **changes: Any) -> Path:
        """Write rows of which the third has other fields."""
        rows = [{"prompt": f"{n}? Answer:", "labels": ["A", "B"], "answer": n % 2} for n in range(24)]
        rows[2] |= changes
        return self.file("rows.jsonl", "\n".join(map(json.dumps, rows)))

    def line(self, line: str | bytes) -> Path:
        """Write rows of which the second is a line of another kind."""
        good = b'{"prompt": "? Answer:", "labels": ["A", "B"], "answer": 0}\n'
        return self.file("line.jsonl", good + (line.encode() if isinstance(line, str) else line) + b"\n" + good * 20)

    def changed_model(self, name: str, content: str | bytes | None = None, kind: str = "", **fields: Any) -> Path:
        """Copy the model with another file in it, or other fields in its configuration."""
        shutil.copytree(self.model, self.folder / "model")
        inside = Place(self.folder / "model", self.model, self.data, self.run)
        if kind:
            inside.special(name, kind)
        elif content is not None:
            inside.file(name, content)
        else:
            values = json.loads((self.model / name).read_text())
            inside.file(name, json.dumps(values | fields))
        return self.folder / "model"

    def changed_run(self, pattern: str, content: str | bytes = b"", kind: str = "") -> Path:
        """Copy the run with another file in it."""
        shutil.copytree(self.run, self.folder / "run")
        found = sorted((self.folder / "run").glob(pattern))
        path = found[0] if found else self.folder / "run" / pattern
        inside = Place(path.parent, self.model, self.data, self.run)
        if kind:
            inside.special(path.name, kind)
        else:
            inside.file(path.name, content)
        return self.folder / "run"


RECEIPT = "**/_receipts/part-*.json"
DEEP = "[" * 200_000
DIGITS = "9" * 5000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
HUGE_LINE = b'{"prompt": "' + b"x" * (9 * 2**20) + b'", "labels": ["A", "B"], "answer": 0}'
FACT = {"uuid": "R", "prompt": "It was the", "tpl": "P", "answer": "A"}


def facts(place: Place, kind: str, **columns: Any) -> Path:
    """Write a table of facts."""
    table = pa.table({name: [value] for name, value in FACT.items()} | columns)
    path = place.folder / f"facts.{kind}"
    (pyarrow.feather.write_feather if kind == "feather" else pyarrow.parquet.write_table)(table, path)
    return path


def repeated(place: Place) -> Path:
    """Write a small table of facts that unpacks to gigabytes."""
    text = pa.array(["x" * 1_000_000]).dictionary_encode()
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), text.dictionary)
    path = place.folder / "many.parquet"
    other = {name: ["a"] * 5000 for name in ("uuid", "tpl", "answer")}
    pyarrow.parquet.write_table(pa.table({"prompt": many, **other}), path)
    return path


def datasets(file: Path) -> Callable[[Place], tuple[Any, ...]]:
    return lambda place: ("datasets", file, "--model", place.model)


def data(make: Callable[[Place], Path]) -> Callable[[Place], tuple[Any, ...]]:
    """The preview of a file of data."""
    return lambda place: ("datasets", make(place), "--model", place.model)


def of_facts(make: Callable[[Place], Any]) -> Callable[[Place], tuple[Any, ...]]:
    return lambda place: (
        "linearity",
        "--model",
        place.model,
        "--facts",
        make(place),
        *RUN,
        "--out",
        place.folder / "o",
    )


def run_file(content: str | bytes) -> Callable[[Place], tuple[Any, ...]]:
    return lambda place: ("pipeline", place.file("run.yaml", content), *RUN[2:])


def given(**fields: Any) -> Callable[[Place], tuple[Any, ...]]:
    """A run file of some fields, with a model, data and a directory."""

    def make(place: Place) -> tuple[Any, ...]:
        usual = {"model": [str(place.model)], "dataset": [str(place.data)], "out": str(place.folder / "o")}
        return ("pipeline", place.file("run.yaml", json.dumps(usual | fields)), *RUN[2:])

    return make


def model(make: Callable[[Place], Path]) -> Callable[[Place], tuple[Any, ...]]:
    return lambda place: ("models", make(place))


def status(make: Callable[[Place], Path]) -> Callable[[Place], tuple[Any, ...]]:
    return lambda place: ("status", make(place))


def verify(make: Callable[[Place], Path]) -> Callable[[Place], tuple[Any, ...]]:
    return lambda place: ("verify", make(place))


def again(make: Callable[[Place], Path]) -> Callable[[Place], tuple[Any, ...]]:
    """The run of a directory once more."""
    return lambda place: ("extract", make(place), *RUN)


BAD: dict[str, tuple[int, str, Callable[[Place], tuple[Any, ...]]]] = {
    # Data
    "data is a pipe": (2, "is a pipe; a file is needed", data(lambda p: p.special("d.jsonl", "pipe"))),
    "data is /dev/zero": (2, "is a device; a file is needed", data(lambda p: p.special("d.jsonl", "zero"))),
    "data is a socket": (2, "is a socket; a file is needed", data(lambda p: p.special("d.jsonl", "socket"))),
    "data is a folder": (2, "is a directory; a file is needed", data(lambda p: p.special("d.jsonl", "folder"))),
    "data is a loop of links": (2, "cannot be read", data(lambda p: p.special("d.jsonl", "loop"))),
    "data is not there": (2, "No such file", data(lambda p: p.folder / "d.jsonl")),
    "data has a null in its name": (2, "null", lambda p: ("datasets", "a\0.jsonl", "--model", p.model)),
    "data has a name that is too long": (2, "File name too long", data(lambda p: p.folder / f"{'n' * 300}.jsonl")),
    "data is empty": (2, "no rows", data(lambda p: p.file("d.jsonl", ""))),
    "data is zeros": (2, "d.jsonl:1: a row of more than", data(lambda p: p.large("d.jsonl", b"{", 1000 * 2**20))),
    "data has no line break": (2, "d.jsonl:1: a row of more than", data(lambda p: p.large("d.jsonl", b"{", 2**33))),
    "a row of 9 MiB": (2, "line.jsonl:2: a row of 9.0 MiB; allowed: 1 MiB", data(lambda p: p.line(HUGE_LINE))),
    "nested data": (2, "line.jsonl:2: not JSON (nested too deeply)", data(lambda p: p.line(DEEP))),
    "a nested field": (2, "not JSON", data(lambda p: p.line(f'{{"x": {DEEP}'))),
    "a number of 5,000 digits": (2, "line.jsonl:2", data(lambda p: p.line(f'{{"answer": {DIGITS}}}'))),
    "no Unicode": (2, "line.jsonl:2: not JSON", data(lambda p: p.line(b"\xff\xfe\x00"))),
    "UTF-16": (2, "d.jsonl:1: not JSON", data(lambda p: p.file("d.jsonl", '{"a": 1}\n'.encode("utf-16")))),
    "an array": (2, "list found", data(lambda p: p.line("[1, 2]"))),
    "infinity": (2, "Infinity is no value", data(lambda p: p.line('{"answer": Infinity}'))),
    "a surrogate": (2, "not valid Unicode", data(lambda p: p.rows(prompt="\ud800 Answer:"))),
    "an answer of 4,000 digits": (2, "answer is 999", data(lambda p: p.rows(answer=int("9" * 4000)))),
    "a negative answer": (2, "answer is -1", data(lambda p: p.rows(answer=-1))),
    "an answer that is a list": (2, "answer is [[[", data(lambda p: p.rows(answer=[[[[[[[[1]]]]]]]]))),
    "an id of an object": (2, "id is {", data(lambda p: p.rows(id={"a": ["b"] * 10_000}))),
    "a prompt that is a number": (2, "prompt is 5", data(lambda p: p.rows(prompt=5))),
    "many labels": (2, "labels", data(lambda p: p.rows(labels=["x"] * 100_000))),
    "labels of 100 KB": (
        2,
        "rows.jsonl:3: a label of 100000",
        data(lambda p: p.rows(labels=["A" * 10**5, "B" * 10**5])),
    ),
    "a prompt of 100 KB": (2, "reads at most", data(lambda p: p.rows(prompt="x " * 50_000 + "Answer:"))),
    "a released file that is a pipe": (2, "a file is needed", lambda p: released(p, kind="pipe")),
    "a released file in one line": (2, "as it is read as a whole", lambda p: released(p, n_bytes=2 * 2**30)),
    "a released file that is nested": (2, "test.json", lambda p: released(p, DEEP)),
    "a released row of 9 MiB": (
        2,
        "record 0: a row of",
        lambda p: released(p, json.dumps([{"text": "x" * 9 * 2**20}])),
    ),
    # Facts
    "facts in a pipe": (2, "is a pipe", of_facts(lambda p: p.special("f.parquet", "pipe"))),
    "facts in /dev/zero": (2, "is a device", of_facts(lambda p: p.special("f.feather", "zero"))),
    "facts that are no table": (2, "cannot be read", of_facts(lambda p: p.file("f.parquet", b"PAR1" + b"\0" * 100))),
    "facts of another format": (2, "allowed: a .feather", of_facts(lambda p: p.file("f.csv", b"a,b"))),
    "facts without a column": (2, "no column", of_facts(lambda p: narrow(p))),
    "facts of numbers": (2, "prompt is 5", of_facts(lambda p: facts(p, "parquet", prompt=[5]))),
    "a fact of 9 MiB": (2, "a row of 9.0 MiB", of_facts(lambda p: facts(p, "parquet", prompt=["x" * 9 * 2**20]))),
    "a feather fact of 9 MiB": (
        2,
        "a row of 9.0 MiB",
        of_facts(lambda p: facts(p, "feather", prompt=["x" * 9 * 2**20])),
    ),
    "facts that unpack to gigabytes": (2, "unpacks to", of_facts(repeated)),
    "facts of 3 GiB": (2, "as it is read as a whole", of_facts(lambda p: p.large("f.parquet", b"PAR1", 3 * 2**30))),
    # Run files
    "a run file that is a pipe": (2, "is a pipe", lambda p: ("pipeline", p.special("r.yaml", "pipe"))),
    "a run file that is /dev/zero": (2, "is a device", lambda p: ("pipeline", p.special("r.yaml", "zero"))),
    "a run file that is a socket": (2, "is a socket", lambda p: ("pipeline", p.special("r.yaml", "socket"))),
    "a run file that is not there": (2, "No such file", lambda p: ("pipeline", p.folder / "r.yaml")),
    "a folder without a run file": (2, "No such file", lambda p: ("pipeline", p.folder)),
    "a run file of a gigabyte": (2, "at most", lambda p: ("pipeline", p.large("r.yaml", b"a: b\n", 2**30))),
    "aliases of aliases": (2, "stands for", run_file(BOMB)),
    "aliases in a field": (2, "stands for", run_file(BOMB + "model: *a9\n")),
    "an alias of itself": (2, "nested deeper", run_file("a: &a [*a]\n")),
    "aliases in plan": (2, "stands for", lambda p: ("plan", p.file("r.yaml", BOMB))),
    "a nested run file": (2, "nested", run_file("model: " + DEEP)),
    "nested mappings": (2, "nested", run_file("{a: " * 5000)),
    "a run file of 5,000 digits": (2, "has 5000 digits", run_file(f"limit: {DIGITS}\n")),
    "an octal number": (2, "would be read as", run_file("limit: 010\n")),
    "a list as a name": (2, "must be plain text", run_file("? [a, b]\n: 1\n")),
    "a number as a name": (2, "Keys should be strings", run_file("1: 2\nmodel: [a]\ndataset: [b]\n")),
    "a name twice": (2, "occurs twice", run_file("model: [a]\nmodel: [b]\n")),
    "Python in YAML": (2, "is not YAML", run_file("model: !!python/object/apply:os.system [ls]\n")),
    "a date that is none": (2, "is not YAML", run_file("model: 2001-99-99\n")),
    "no YAML": (2, "is not YAML", run_file("a: [b\n")),
    "no Unicode in YAML": (2, "is not YAML", run_file(b"\xff\xfe\x00\x01")),
    "a list of YAML": (2, "must hold a mapping", run_file("- a\n")),
    "an empty run file": (2, "must hold a mapping", run_file("")),
    "another kind": (2, "kind is", run_file("kind: [1, 2]\n")),
    "a model of another type": (2, "model", given(model={"a": "b" * 5000})),
    "a long value": (2, "storage is", given(storage="x" * 400_000)),
    "a long name": (2, "unknown field", given(**{"x" * 1000: 1})),
    "many unknown fields": (2, "lines more", given(**{f"x{n}": 1 for n in range(5000)})),
    "a limit of 10^30": (2, "limit", given(limit=-(10**30))),
    "a seed that is infinite": (2, "seed", run_file("model: [a]\ndataset: [b]\nseed: .inf\n")),
    "workers of 10^30": (2, "workers", given(workers=-(10**30))),
    "a directory with a null": (2, "out", given(out="a\0b")),
    "a directory that is too long": (2, "at most 255", given(out="n" * 300)),
    "a directory that is a file": (2, "o", lambda p: file_as_directory(p)),
    "a dataset that is unknown": (2, "unknown dataset", given(dataset=["x" * 100_000])),
    # Models
    "a model that is not there": (2, "no such directory", model(lambda p: p.folder / "nothing")),
    "a configuration that is a pipe": (2, "is no file", model(lambda p: p.changed_model("config.json", kind="pipe"))),
    "a configuration that is /dev/zero": (
        2,
        "config.json",
        model(lambda p: p.changed_model("config.json", kind="zero")),
    ),
    "weights that are a pipe": (2, "is no file", model(lambda p: p.changed_model("model.safetensors", kind="pipe"))),
    "a tokenizer that is a socket": (
        2,
        "is no file",
        model(lambda p: p.changed_model("tokenizer.json", kind="socket")),
    ),
    "a chat template that is a pipe": (
        2,
        "is no file",
        model(lambda p: p.changed_model("chat_template.jinja", kind="pipe")),
    ),
    "a nested configuration": (2, "config.json", model(lambda p: p.changed_model("config.json", DEEP))),
    "a nested tokenizer": (2, "tokenizer", model(lambda p: p.changed_model("tokenizer.json", DEEP))),
    "a nested index": (2, "index.json", model(lambda p: p.changed_model("model.safetensors.index.json", DEEP))),
    "a configuration of a list": (2, "holds a list", model(lambda p: p.changed_model("config.json", "[]"))),
    "10^9 layers": (
        2,
        "num_hidden_layers is 1000000000",
        model(lambda p: p.changed_model("config.json", num_hidden_layers=10**9)),
    ),
    "a width of 10^12": (
        2,
        "hidden_size is 1000000000000",
        model(lambda p: p.changed_model("config.json", hidden_size=10**12)),
    ),
    "a vocabulary of 10^12": (2, "vocab_size is", model(lambda p: p.changed_model("config.json", vocab_size=10**12))),
    "a negative vocabulary": (2, "model", model(lambda p: p.changed_model("config.json", vocab_size=-5))),
    "no layers": (2, "model", model(lambda p: p.changed_model("config.json", num_hidden_layers=0))),
    "layers that are no number": (
        2,
        "model",
        model(lambda p: p.changed_model("config.json", num_hidden_layers=float("nan"))),
    ),
    "a width of infinity": (
        2,
        "model",
        model(lambda p: p.changed_model("config.json", intermediate_size=float("inf"))),
    ),
    "heads of 5,000 digits": (
        2,
        "config.json",
        model(lambda p: p.changed_model("config.json", f'{{"num_attention_heads": {DIGITS}}}')),
    ),
    "a type of another type": (2, "model", model(lambda p: p.changed_model("config.json", model_type=["a"] * 10_000))),
    "weights of zeros": (2, "is not safetensors", model(lambda p: p.changed_model("model.safetensors", b"\0" * 1000))),
    "weights with a huge header": (
        2,
        "is not safetensors",
        model(lambda p: p.changed_model("model.safetensors", b"\xff" * 7 + b"\0" + b"{" * 100)),
    ),
    "a GGUF file that is a pipe": (2, "m.gguf", model(lambda p: p.special("m.gguf", "pipe"))),
    "a GGUF file that is /dev/zero": (2, "m.gguf", model(lambda p: p.special("m.gguf", "zero"))),
    "a GGUF file of zeros": (2, "m.gguf", model(lambda p: p.file("m.gguf", b"GGUF" + b"\xff" * 100))),
    "a model in a run": (
        2,
        "num_hidden_layers is",
        lambda p: ("plan", "--model", p.changed_model("config.json", num_hidden_layers=10**9), "--dataset", p.data),
    ),
    # Run directories
    "a status of nothing": (2, "nothing", status(lambda p: p.folder / "nothing")),
    "a status of a file": (2, "", status(lambda p: p.data)),
    "a plan that is a pipe": (2, "is a pipe", status(lambda p: p.changed_run("plan.json", kind="pipe"))),
    "a plan that is /dev/zero": (2, "is a device", status(lambda p: p.changed_run("plan.json", kind="zero"))),
    "a nested plan": (2, "is damaged", status(lambda p: p.changed_run("plan.json", DEEP))),
    "a plan of another type": (2, "is damaged", status(lambda p: p.changed_run("plan.json", '[{"a": 1}]'))),
    "a plan of numbers": (2, "is damaged", status(lambda p: p.changed_run("plan.json", "[1]"))),
    "a plan of a gigabyte": (2, "at most", status(lambda p: larger(p, "plan.json"))),
    "a claim that is a pipe": (2, "is a pipe", again(lambda p: p.changed_run("claim.json", kind="pipe"))),
    "a nested receipt": (0, "1 missing", status(lambda p: p.changed_run(RECEIPT, DEEP))),
    "a receipt that is a pipe": (
        0,
        "1 missing",
        status(lambda p: p.changed_run(RECEIPT, kind="pipe")),
    ),
    "a receipt of a gigabyte": (0, "1 missing", status(lambda p: larger(p, RECEIPT))),
    "a receipt of numbers": (0, "1 missing", status(lambda p: p.changed_run(RECEIPT, "1"))),
    "a manifest that is a pipe": (1, "is a pipe", verify(lambda p: p.changed_run("manifest.json", kind="pipe"))),
    "a nested manifest": (1, "manifest", verify(lambda p: p.changed_run("manifest.json", DEEP))),
    "a manifest of numbers": (1, "manifest", verify(lambda p: p.changed_run("manifest.json", "[1]"))),
    "a shard that is a pipe": (1, "wrong", verify(lambda p: p.changed_run("**/part-*.arrow", kind="pipe"))),
    "a shard of zeros": (1, "wrong", verify(lambda p: p.changed_run("**/part-*.arrow", b"\0" * 100))),
    "a thousand million cores a worker": (2, "less than or equal to 1024", given(cpus=10**9)),
    "its run file is a pipe": (2, "is a pipe", again(lambda p: p.changed_run("run.yaml", kind="pipe"))),
    "its run file is a bomb": (2, "stands for", again(lambda p: p.changed_run("run.yaml", BOMB))),
    "a table that is a pipe": (2, "is a pipe", lambda p: compared(p, kind="pipe")),
    "a list of neurons that is none": (
        2,
        "neurons.arrow",
        lambda p: ("neurons", p.changed_run("neurons.arrow", b"ARROW1\0\0" * 10)),
    ),
    "a table that is none": (2, "accuracy.arrow", lambda p: compared(p, b"ARROW1\0\0" * 10)),
}


def released(place: Place, content: str = "", kind: str = "", n_bytes: int = 0) -> tuple[Any, ...]:
    folder = place.folder / "classification" / "agnews"
    folder.mkdir(parents=True)
    inside = Place(folder, place.model, place.data, place.run)
    if kind:
        inside.special("test.json", kind)
    elif n_bytes:
        inside.large("test.json", b"[", n_bytes)
    else:
        inside.file("test.json", content)
    return ("datasets", "mceval8k/agnews", "--mceval8k", place.folder, "--model", place.model)


def narrow(place: Place) -> Path:
    path = place.folder / "narrow.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": ["a"]}), path)
    return path


def larger(place: Place, name: str) -> Path:
    run = place.changed_run(name, "[")
    with sorted(run.glob(name))[0].open("r+b") as stream:
        stream.truncate(2**30)
    return run


def file_as_directory(place: Place) -> tuple[Any, ...]:
    place.file("o", "x")
    return given()(place)


def compared(place: Place, content: bytes = b"", kind: str = "") -> tuple[Any, ...]:
    return ("compare", place.changed_run("accuracy.arrow", content, kind), place.run)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model, data and a finished run."""
    folder = tmp_path_factory.mktemp("good")
    directory = save_tiny_model("llama", folder / "model")
    questions = Path(write_questions(folder))
    ran = neg("extract", "--model", directory, "--dataset", questions, *RUN, "--out", folder / "run")
    assert ran.returncode == 0, ran.stderr
    disable_progress_bar()  # the command line does so before it is imported
    yield directory, questions, folder / "run"
    enable_progress_bar()


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Let a block hang no longer than `LONGEST_S`, and take no more than `MOST_BYTES`."""

    def hangs(number: int, frame: Any) -> None:
        raise Hangs(f"no answer within {LONGEST_S} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    former = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LONGEST_S)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def test_the_list_is_long():
    assert len(BAD) >= 80


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_in_a_short_line(made, tmp_path, capfd, monkeypatch, name):
    code, said, make = BAD[name]
    place = Place(tmp_path / "p", *made)
    place.folder.mkdir()
    monkeypatch.setattr(sys, "argv", ["neg", *map(str, make(place))])
    with limited(), pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    assert "Traceback" not in err, err[-3000:]
    lines = err.splitlines()
    assert len(lines) <= MOST_LINES and max(map(len, lines), default=0) <= LONGEST_LINE, err[:3000]
    assert said in (err if code else out + err), (out + err)[:3000]
    assert ended.value.code == code, err[:3000]
