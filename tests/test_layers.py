"""Who may import whom: flows -> tasks -> negcore, never back."""

import ast
import subprocess
import sys

import pytest
from support import REPOSITORY

ALLOWED_TOP = {"negcore": {"negcore"}, "tasks": {"negcore", "tasks"}, "flows": {"negcore", "tasks", "flows"}}
HEAVY = {"ray": {"tasks/pool/ray_pool.py", "tasks/pool/ray_session.py"}}
FORBIDDEN = {"pickle", "joblib", "dill", "cloudpickle"}
MODULES = sorted(path for top in ALLOWED_TOP for path in (REPOSITORY / top).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


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


SLOW = ["torch", "transformers", "ray", "prefect", "pandas", "scipy", "sklearn", "matplotlib", "httpx"]


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
