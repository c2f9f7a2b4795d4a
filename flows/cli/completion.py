"""Completion in the shell: aliases of models, names of datasets, run directories, files (`--install-completion`)."""

from collections.abc import Callable, Iterator
from pathlib import Path

ALIASES = ("smollm2-135m", "gemma3-270m")
"""Models that ship as packages, by name: the module that knows them takes seconds to import."""


def complete_model(incomplete: str) -> list[str]:
    """Return aliases, directories and .gguf files that begin so."""
    aliases = [alias for alias in ALIASES if alias.startswith(incomplete)]
    return [*aliases, *_paths(incomplete, lambda path: path.suffix.lower() == ".gguf")]


def complete_dataset(incomplete: str) -> list[str]:
    """Return names of datasets, .jsonl files, and directories that lead to some."""
    from negcore.datasets import list_datasets

    names = [info.name for info in list_datasets() if info.name.startswith(incomplete)]
    return [*names, *_paths(incomplete, lambda path: path.suffix.lower() == ".jsonl")]


def complete_table(incomplete: str) -> list[str]:
    """Return files that `neg import` reads, and directories that lead to some."""
    from negcore.datasets.sheets import READERS

    return list(_paths(incomplete, lambda path: path.suffix.lower() in READERS))


def complete_run(incomplete: str) -> list[str]:
    """Return run directories, run files, and directories that lead to some."""
    return list(_paths(incomplete, lambda path: path.suffix in (".yaml", ".yml")))


def _paths(incomplete: str, is_wanted: Callable[[Path], bool]) -> Iterator[str]:
    """Yield the directories and wanted files that a path may go on to; hidden ones only where they are asked for."""
    folder, _, beginning = incomplete.rpartition("/")
    above = f"{folder}/" if "/" in incomplete else ""
    try:
        found = sorted(Path(above or ".").expanduser().iterdir())
    except (OSError, RuntimeError, ValueError):  # there is no such folder, or no home
        return
    for path in found:
        if path.name.startswith(beginning) and not (path.name.startswith(".") and not beginning):
            if path.is_dir():
                yield f"{above}{path.name}/" if not (path / "run.yaml").exists() else f"{above}{path.name}"
            elif is_wanted(path):
                yield f"{above}{path.name}"
