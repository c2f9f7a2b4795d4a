"""How the project installs: the library alone, the workflow as an extra, and what each says where it cannot run."""

import ast
import importlib
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import REPOSITORY

import negcore
from flows.cli.__main__ import WORKFLOW

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
COMMAND_LINES_OF_OTHERS = {"typer", "pydantic"}
"""Needed by the commands that transformers installs, not by its library: negcore must do without them."""


def closure(requirements: list[str], without: set[str] = frozenset()) -> dict[str, importlib.metadata.Distribution]:
    """Return every installed distribution that these requirements ask for, directly or through others."""
    found, asked = {}, set()
    queue = [(Requirement(line), "") for line in requirements]
    while queue:
        requirement, extra = queue.pop()
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not wanted or name in without or (name, frozenset(requirement.extras)) in asked:
            continue
        asked.add((name, frozenset(requirement.extras)))
        found[name] = importlib.metadata.distribution(name)
        inner = [Requirement(line) for line in found[name].requires or ()]
        queue += [(one, extra) for one in inner for extra in ("", *requirement.extras)]
    return found


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def imported(top: str) -> set[str]:
    """Return the distributions whose modules a package of ours imports anywhere."""
    trees = [ast.parse(path.read_text()) for path in (REPOSITORY / top).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    tops = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"negcore", "tasks", "flows"}
    homes = importlib.metadata.packages_distributions()
    return {canonicalize_name(homes[name][0]) for name in tops}


# Names of the library


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)


@pytest.mark.parametrize("name", negcore.__all__)
def test_every_public_name_is_there_and_documented(name):
    thing = getattr(negcore, name)
    assert name in dir(negcore)
    assert name.isupper() or thing.__doc__


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(AttributeError, match="module 'negcore' has no attribute 'extract'"):
        negcore.extract  # noqa: B018


def test_importing_the_library_and_listing_its_names_imports_nothing_heavy():
    code = "import sys, negcore; dir(negcore); assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)"
    assert run_python(code).stderr == ""


@pytest.mark.parametrize("module", ["negcore", "negcore.store.locks", "negcore.errors"])
def test_on_windows_the_import_names_the_way_round(module):
    ran = run_python(f"import sys; sys.platform = 'win32'; sys.modules['fcntl'] = None; import {module}")
    assert "ImportError: neg-at-scale does not run on Windows" in ran.stderr.splitlines()[-1]
    assert "WSL" in ran.stderr.splitlines()[-1]


def test_on_windows_the_command_is_refused_in_one_line():
    code = (
        "import sys; from flows.cli.__main__ import main; sys.platform = 'win32'; sys.modules['fcntl'] = None; main()"
    )
    ran = run_python(code)
    assert (ran.returncode, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: neg-at-scale does not run on Windows")


# What is declared


def test_the_library_imports_only_what_it_declares():
    assert imported("negcore") <= names(
        PROJECT["dependencies"] + EXTRAS["s3"] + EXTRAS["look"] + EXTRAS["adapters"]
    ) | {"botocore"}  # aiobotocore pins it


@pytest.mark.parametrize("top", ["tasks", "flows"])
def test_the_workflow_imports_only_what_it_declares(top):
    assert imported(top) <= names(PROJECT["dependencies"] + EXTRAS["run"] + EXTRAS["look"])


def test_the_command_looks_for_every_package_of_its_extra():
    homes = importlib.metadata.packages_distributions()
    assert {canonicalize_name(homes[name][0]) for name in WORKFLOW} == names(EXTRAS["run"])


def test_every_extra_that_a_file_tells_to_install_exists():
    folders = [folder.rglob("*") for folder in (REPOSITORY / "infra", REPOSITORY / "docs")]
    files = [REPOSITORY / "Makefile", *REPOSITORY.glob("*.md"), *itertools.chain(*folders)]
    texts = [path.read_text() for path in files if path.is_file() and path.suffix != ".png"]
    named = {extras for text in texts for extras in re.findall(r"(?:neg-at-scale|[' ]\.)\[([a-z0-9,]+)\]", text)}
    assert {"run", "dev", "run,s3"} <= named
    assert {extra for extras in named for extra in extras.split(",")} <= set(EXTRAS)


def test_developers_get_every_extra():
    (own,) = [requirement for requirement in map(Requirement, EXTRAS["dev"]) if requirement.name == PROJECT["name"]]
    assert own.extras == set(EXTRAS) - {"dev"}


def test_the_constraints_pin_everything_that_is_installed():
    """Left out are torch's own packages, which differ by machine, and setuptools, which `pip freeze` does not list."""
    lines = (REPOSITORY / "infra" / "constraints.txt").read_text().splitlines()
    everything = PROJECT["dependencies"] + [line for extra in EXTRAS.values() for line in extra]
    direct = [line for line in everything if Requirement(line).name not in (PROJECT["name"], "torch")]
    assert set(closure(direct, without={"torch", "setuptools"})) <= names([line for line in lines if "==" in line])


# The library in an environment of its own


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Return a fresh virtual environment with the project and what negcore declares, and nothing else.

    A real installation would download gigabytes. Instead the packages that this environment has are linked into the
    fresh one: those in `dependencies` of pyproject.toml, what these ask for in turn, and no others. A package that
    negcore imports but does not declare is therefore missing there, although it is installed here. The project itself
    is installed by pip from a copy, so that files missing from the wheel are missing there too.
    """
    folder = tmp_path_factory.mktemp("library")
    venv.create(folder / "venv", with_pip=False)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for distribution in closure(PROJECT["dependencies"], without=COMMAND_LINES_OF_OTHERS).values():
        link(distribution, site)
    source = folder / "source"
    shutil.copytree(
        REPOSITORY, source, ignore=shutil.ignore_patterns(".*", "runs", "tests", "__pycache__", "*.egg-info")
    )
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", folder / "venv" / "bin" / "python"]
    subprocess.run([*pip, "install", "--no-deps", "--no-build-isolation", source], check=True)
    return folder / "venv"


def link(distribution: importlib.metadata.Distribution, site: Path) -> None:
    tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    for top in tops:
        if not (site / top).exists():  # several may share one folder
            (site / top).symlink_to(distribution.locate_file(top))


def run_in(library: Path, *command: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [library / "bin" / command[0], *map(str, command[1:])],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=library,
        env=clean | {"HF_HUB_OFFLINE": "1"} | variables,
    )


MEASURE = """
import importlib, pkgutil
from importlib.util import find_spec
absent = ("ray", "prefect", "fastapi", "sqlalchemy", "vl_convert", "typer", "pydantic", "s3fs", "upath", "pytest")
assert not [name for name in absent if find_spec(name)]

import negcore
for module in pkgutil.walk_packages(negcore.__path__, "negcore."):
    importlib.import_module(module.name)

from support import LABELS, PROMPTS, tiny_model
lm = tiny_model("llama")
batch = negcore.neurgrad(lm, PROMPTS[:2], LABELS[:2])
swept = negcore.sweep(lm, PROMPTS[:1], LABELS[0], neurons=4)
prompts = negcore.load_dataset("mini/fact", lm.tokenizer, settings=negcore.PromptSettings(limit=4))
print(negcore.__file__, batch.negs_POLN.shape, swept.negs_PK.shape, len(prompts.splits["test"]))
"""


@pytest.mark.slow
def test_the_library_measures_a_model_where_the_workflow_is_not_installed(library):
    ran = run_in(library, "python", "-c", MEASURE, PYTHONPATH=str(REPOSITORY / "tests"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(library))
    assert ran.stdout.split(maxsplit=1)[1].strip() == "(2, 2, 3, 24) (1, 12) 4"


@pytest.mark.slow
def test_without_the_workflow_neg_says_in_one_line_what_to_install(library):
    ran = run_in(library, "neg", "--help")
    assert (ran.returncode, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert "prefect, pydantic, pydantic_core, ray" in line
    assert line.endswith("; run: pip install 'neg-at-scale[run]'")


@pytest.mark.slow
def test_every_file_of_the_packages_is_installed(library):
    (site,) = (library / "lib").glob("python*/site-packages")
    ours = [path for top in ("negcore", "tasks", "flows") for path in (REPOSITORY / top).rglob("*.*") if path.is_file()]
    names = [path.relative_to(REPOSITORY) for path in ours if path.suffix != ".pyc"]
    assert [str(name) for name in names if not (site / name).exists()] == []


@pytest.mark.slow
def test_the_installed_version_is_the_one_the_library_names(library):
    code = "import importlib.metadata as m, negcore; print(m.version('neg-at-scale') == negcore.__version__)"
    assert run_in(library, "python", "-c", code).stdout == "True\n"
