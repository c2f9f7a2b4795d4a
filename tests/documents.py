"""The project's documents as tests see them: their fenced blocks, and small stand-ins for what these name.

A block that says nothing behind its language is run as it stands. `stand-in` says that a tiny random model and small
made-up data take the place of what it names, `parsed` that nothing is run and only commands and options are checked.
"""

import json
import os
import random
import re
import shlex
import signal
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.feather
import torch
import transformers
from support import CONFIGS, LABELS, REPOSITORY, tiny_tokenizer
from tokenizers import AddedToken
from typer.main import get_command
from typer.testing import CliRunner

from flows.cli.app import app
from negcore.datasets.mceval8k import SPECS
from negcore.datasets.rows import OptionsField, Spec

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
MARKS = {"stand-in", "parsed", "recipe", "message"}
MODEL = "smollm2-135m"
ANSWERS = (" Paris", " Berlin", " Africa", " America", " Asia", " Europe")
"""Single tokens of the stand-in, beside the letters of options: some of them are answers in mini/facts."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    document: Path
    line: int
    """Of its first line of text."""
    language: str
    marks: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(REPOSITORY)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks of a document, in order."""
    found, lines = [], document.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines, 1):
        if start is None and line.startswith("```"):
            start = number
        elif start is not None and line == "```":
            language, *marks = lines[start - 1].removeprefix("```").split() or [""]
            found.append(Block(document, start + 1, language, tuple(marks), "\n".join(lines[start : number - 1])))
            start = None
    assert start is None, f"{document}: the block of line {start} has no end"
    return found


def commands(block: Block) -> list[str]:
    """Return the commands of a bash block, without comments, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def run_python(text: str, name: str, names: dict[str, Any]) -> None:
    """Run Python of a document, with the names that earlier pieces of it defined."""
    exec(compile(text, name, "exec"), names)  # noqa: S102 (a document of this repository)


NEG = get_command(app)


def run_neg(command: str) -> None:
    """Run one command in this process, on no Ray and under no Prefect; figures, which take long, stay empty."""
    words = shlex.split(command)[1:]
    options = {option for parameter in NEG.commands[words[0]].params for option in parameter.opts}
    for option, value in (("--backend", "local"), ("--orchestrator", "none")):
        words = [*words, option, value] if option in options and option not in words else words
    with _as_before(), patch("flows.show.drawing.vl_convert", _Undrawn):
        result = CliRunner().invoke(app, words, env={"COLUMNS": "100", "HF_HUB_OFFLINE": "1"})
    assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"


class _Undrawn:
    """What stands in for vl-convert."""

    @staticmethod
    def vegalite_to_svg(specification: dict[str, Any], **options: Any) -> str:
        return '<svg xmlns="http://www.w3.org/2000/svg"/>'

    @staticmethod
    def svg_to_png(svg: str, **options: Any) -> bytes:
        return b""

    svg_to_pdf = svg_to_png


@contextmanager
def _as_before() -> Iterator[None]:
    """Put back what a command changes in its process: signal handlers and the environment."""
    handler, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.clear()
        os.environ.update(environment)


# Stand-ins


def save_stand_in(directory: Path) -> Path:
    """Write a tiny random model that reads long prompts, and whose tokenizer knows the answers of the mini facts."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        pad_token="<end>",
        eos_token="<end>",
        mask_token="<mask>",
        model_max_length=4096,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    answers = [*LABELS, *ANSWERS]
    tokenizer.add_tokens([AddedToken(answer, normalized=False) for answer in answers])
    torch.manual_seed(0)
    settings = {**CONFIGS["llama"], "vocab_size": 512, "max_position_embeddings": 4096, "initializer_range": 0.5}
    assert len(tokenizer) <= settings["vocab_size"]
    config = transformers.LlamaConfig(**settings, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_mceval8k(root: Path, n_rows: int = 20) -> Path:
    """Write small made-up files in place of MCEval8K's: rows of distinct words, with every answer in turn."""
    rng = random.Random(0)
    for spec in SPECS.values():
        folder = root / spec.genre / spec.name
        folder.mkdir(parents=True)
        for split in ("train", "valid", "test"):
            rows = [_record(spec, split, number, rng) for number in range(n_rows)]
            (folder / f"{split}.json").write_text(json.dumps(rows))
    return root


def _record(spec: Spec, split: str, number: int, rng: random.Random) -> Mapping[str, Any]:
    answers = spec.answer_values or range(spec.n_options)
    record: dict[str, Any] = {name: f"{split} {number} {rng.choice('abcdef')}" for name in spec.fields}
    if isinstance(spec.options, OptionsField):
        known = list(spec.option_names) or [f"option {i}" for i in range(spec.n_options)]
        record[spec.options.name] = rng.sample(known, spec.n_options)
    if spec.group:
        record[spec.group] = ("en", "de")[number // len(answers) % 2]
    return record | {spec.answer: answers[number % len(answers)]}


def write_facts(file: Path) -> Path:
    """Write facts in MyriadLAMA's form."""
    rows = [
        {"uuid": f"{number}", "prompt": f"Place {number} is {word}", "tpl": word, "answer": answer.strip()}
        for number, answer in enumerate(ANSWERS * 4)
        for word in ("in", "located in")
    ]
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), file)
    return file


def write_own_table(file: Path) -> Path:
    """Write a table of 60 rows, as a user would have it, whose labels are single tokens of the stand-in."""
    rows = [f"The {number} was {word},{label}" for number in range(30) for word, label in (("ripe", "A"), ("raw", "B"))]
    file.write_text("\n".join(["text,label", *rows]))
    return file


def check_other(command: str) -> None:
    """Check what can be checked of a command that is no `neg`: targets of make, extras of the package, scripts."""
    program, *words = shlex.split(command)
    if program == "make":
        targets = re.findall(r"(?m)^([a-z-]+):", (REPOSITORY / "Makefile").read_text())
        assert {word for word in words if "=" not in word} <= set(targets), command
    if program == "pip":
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\w+", " ".join(re.findall(r"\[(.*)\]", command)))) <= set(extras), command
    if program == "python":
        file = f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0]
        assert (REPOSITORY / file).is_file(), command
