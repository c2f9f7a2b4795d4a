"""Every recipe in CONTRIBUTING.md is followed in a copy of the repository."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import blocks, commands, save_stand_in
from support import REPOSITORY

RECIPES = [block for block in blocks(REPOSITORY / "CONTRIBUTING.md") if "recipe" in block.marks]
PLACE = re.compile(r"# (?P<file>\S+), (?P<where>below|above|new)(?:: (?P<anchor>.+))?")
RUN_ALL = "import sys; from documents import run_neg; [run_neg(command) for command in sys.argv[1:]]"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository in which every recipe was followed, with a tiny model."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("negcore", "tasks", "flows", "tests"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    save_stand_in(copy / "tiny-model")
    for block in RECIPES:
        if block.language in ("python", "toml"):
            follow(copy, block)
    return copy


def follow(copy, block):
    """Put a block where its first line says, or run it."""
    head, _, text = block.text.partition("\n")
    if head == "# run once":
        subprocess.run([sys.executable, "-c", text], cwd=copy, check=True)
        return
    file, where, anchor = PLACE.fullmatch(head).group("file", "where", "anchor")
    if where == "new":
        assert not (copy / file).exists(), str(block)
        (copy / file).write_text(text)
        return
    lines = (copy / file).read_text().splitlines()
    found = [number for number, line in enumerate(lines) if line.lstrip().startswith(anchor)]
    assert len(found) == 1, f"{block}: {len(found)} lines of {file} begin with {anchor}"
    at, blank = (found[0] + 1, []) if where == "below" else (found[0], ["", ""])
    (copy / file).write_text("\n".join([*lines[:at], *text.splitlines(), *blank, *lines[at:]]) + "\n")


def python(copy, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(copy), str(copy / "tests")])}
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_was_added_works(copy):
    by_program = {"neg": [], "pytest": []}
    for block in RECIPES:
        for command in commands(block) if block.language == "bash" else ():
            by_program[command.split()[0]].append(command)
    python(copy, "-c", RUN_ALL, *by_program["neg"])
    for command in by_program["pytest"]:  # fails if no test is selected
        python(copy, "-m", *shlex.split(command), "-q", "-p", "no:cacheprovider")


@pytest.mark.parametrize("block", [block for block in RECIPES if block.language in ("python", "toml")], ids=str)
def test_a_recipe_is_well_formatted(block):
    assert block.text == block.text.rstrip() and not re.search(r"[ \t]+$", block.text, re.MULTILINE)
    assert max(map(len, block.text.splitlines())) <= 120


def test_no_recipe_needs_a_path_that_is_not_there():
    for block in RECIPES:
        if place := PLACE.fullmatch(block.text.partition("\n")[0]):
            assert place["where"] == "new" or (REPOSITORY / Path(place["file"])).is_file(), str(block)
