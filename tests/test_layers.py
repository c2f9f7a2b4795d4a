"""Who may import whom: flows -> tasks -> negcore, never back; inside negcore, down its steps; nowhere in a circle."""

import ast
import graphlib
import subprocess
import sys

import pytest
from support import REPOSITORY

ALLOWED_TOP = {"negcore": {"negcore"}, "tasks": {"negcore", "tasks"}, "flows": {"negcore", "tasks", "flows"}}
HEAVY = {"ray": {f"tasks/pool/{name}.py" for name in ("metrics", "nodes", "ray_pool", "ray_session")}}
FORBIDDEN = {"pickle", "joblib", "dill", "cloudpickle"}
STEPS = (
    {"negcore.orders", "negcore.texts"},
    {"negcore.arrays", "negcore.errors", "negcore.findings"},
    {"negcore.targets"},
    {"negcore.hub", "negcore.store.buckets", "negcore.store.identity", "negcore.store.locks"},
    {"negcore.store.temporary"},
    {"negcore.store.files"},
    {"negcore.model"},
    {"negcore.datasets"},
    {"negcore.measure"},
    {"negcore.store"},
    {"negcore.probing"},
    {"negcore.analysis"},
)
"""Rooms and modules of negcore, lowest first: each may import from itself and from lower steps."""
MODULES = sorted(path for top in ALLOWED_TOP for path in (REPOSITORY / top).rglob("*.py"))


def dotted(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path): path for path in MODULES}


def imported(path):
    """Every module that is imported anywhere in a file: at its top, inside functions, and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (module if module in NAMES else node.module for module in modules)


ARROWS = {(name, module) for name, path in NAMES.items() for module in imported(path) if module in NAMES}


def place(module):
    """Return the step of a module of negcore, and the name that stands there: its room or its own."""
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 1, -1)]
    return next((number, prefix) for prefix in prefixes for number, step in enumerate(STEPS) if prefix in step)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_go_down_the_layers_only(path):
    name = str(path.relative_to(REPOSITORY))
    own = name.split("/")[0]
    for module in imported(path):
        top = module.split(".")[0]
        assert top not in ALLOWED_TOP or top in ALLOWED_TOP[own], f"{name} imports {module}"
        assert top not in HEAVY or name in HEAVY[top], f"{name} imports {module}"
        assert top not in FORBIDDEN, f"{name} imports {module}"
        assert top != "prefect" or own != "negcore", f"{name} imports {module}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: {module for importer, module in ARROWS if importer == name} for name in NAMES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_rooms_of_negcore_import_only_from_lower_steps():
    wrong = []
    for name, module in sorted(ARROWS):
        if name.startswith("negcore."):
            (step, room), (lower, other) = place(name), place(module)
            wrong += [f"{name} imports {module}"] * (lower >= step and other != room)
    assert wrong == []


def test_negcore_imports_where_ray_and_prefect_are_not_installed():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "prefect"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib, pkgutil, negcore
for module in pkgutil.walk_packages(negcore.__path__, "negcore."):
    importlib.import_module(module.name)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


SLOW = ["torch", "transformers", "ray", "prefect", "pandas", "scipy", "sklearn", "vl_convert", "httpx"]


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], [*SLOW, "pyarrow", "numpy"]),
        (["--version"], [*SLOW, "pyarrow", "numpy"]),
        (["pipeline", "--help"], [*SLOW, "pyarrow", "numpy"]),
        (["status", "."], SLOW),
    ],
    ids=["help", "version", "help of a command", "status"],
)
def test_the_command_line_answers_without_the_slow_libraries(arguments, absent, tmp_path):
    (tmp_path / "run.yaml").write_text("kind: linearity\nmodel: org/model\n")
    code = f"""
import sys
from flows.cli.app import app
app({arguments!r}, standalone_mode=False)
print("imported:", [name for name in {absent!r} if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert answer.stdout.splitlines()[-1:] == ["imported: []"], answer.stderr
    assert len(answer.stdout.splitlines()) > 1
