"""The files under infra/ as tests see them, and what the installed Ray takes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from support import REPOSITORY

INFRA = REPOSITORY / "infra"


def documents(path: Path) -> list[dict[str, Any]]:
    """Every object in a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def mappings(value: Any) -> list[dict[str, Any]]:
    """Every mapping inside a document."""
    found = [value] if isinstance(value, dict) else []
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        found += mappings(inner)
    return found


def pinned() -> dict[str, str]:
    """The version of every package in the constraints."""
    lines = (INFRA / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def ray_options(commands: list[str]) -> dict[str, list[str]]:
    """The options of some commands of the installed Ray."""
    # In a process of its own: Ray must not be imported before the sessions that other tests open.
    script = (
        "import json, sys; from ray.scripts.scripts import cli\n"
        "print(json.dumps({name: sum([one.opts for one in cli.commands[name].params], []) for name in sys.argv[1:]}))"
    )
    printed = subprocess.run([sys.executable, "-c", script, *commands], capture_output=True, text=True, check=True)
    return json.loads(printed.stdout)


def dashboard() -> dict[str, Any]:
    """The dashboard for Grafana."""
    return json.loads((INFRA / "monitoring" / "dashboard.json").read_text())


def queries() -> list[str]:
    """Every query of the dashboard."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def queried() -> set[str]:
    """Every metric that the dashboard asks for."""
    return {name for query in queries() for name in re.findall(r"\bray_\w+", query)}
