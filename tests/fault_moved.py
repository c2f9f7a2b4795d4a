"""Run directories that are copied, moved or mounted elsewhere when half of the run is done, and named there."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from fault_bench import LOCAL, N_SHARDS, Bench, Outcome, Run, mounted
from support import NEG


def moved_directory(bench: Bench) -> Outcome:
    """Finish a run in a copy, after a move, at another mount point, and after a move that its driver did not notice."""
    outcomes = [_finished_in(bench, how) for how in PLACES]
    return sum(outcomes, _moved_under_its_driver(bench))


def _finished_in(bench: Bench, how: str) -> Outcome:
    run = Run(bench, bench.home / f"{how}-original", *LOCAL)
    run.start()
    run.wait_for(N_SHARDS // 2)
    run.kill()
    with PLACES[how](run.directory, bench.home / how) as directory:
        there = _NamedRun(bench, directory)
        there.look()
        before = contents(run.directory)
        ok = there.finish() == 0 and f"was written for {run.directory}" in there.said.replace("\n", " ")
        outcome = there.outcome(1, ok=ok)
        return outcome if contents(run.directory) == before else replace(outcome, survived=0)


def _moved_under_its_driver(bench: Bench) -> Outcome:
    run = Run(bench, bench.home / "driven-original", *LOCAL)
    run.start()
    run.wait_for(N_SHARDS // 2)
    with run.paused():
        directory = run.directory.rename(bench.home / "driven")
    ended = run.end() == 1 and run.says("was moved or emptied while the run went on")
    there = _NamedRun(bench, directory)
    there.look()
    return there.outcome(1, ok=there.finish() == 0 and ended)


class _NamedRun(Run):
    """A run that is told nothing but its directory."""

    def __init__(self, bench: Bench, directory: Path) -> None:
        super().__init__(bench, directory)
        self._command = [NEG, "extract", directory, "--orchestrator", "none"]


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Return every file below a directory with the time of its last change."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@contextmanager
def copied(original: Path, other: Path) -> Iterator[Path]:
    yield shutil.copytree(original, other)


@contextmanager
def renamed(original: Path, other: Path) -> Iterator[Path]:
    yield original.rename(other)


@contextmanager
def mounted_elsewhere(original: Path, other: Path) -> Iterator[Path]:
    """Mount a directory elsewhere, and an empty disk where it was."""
    other.mkdir()
    with mounted("--bind", original, other), mounted("-t", "tmpfs", "-o", "size=1m", "faults", original):
        yield other


PLACES: dict[str, Callable[[Path, Path], AbstractContextManager[Path]]] = {
    "copied": copied,
    "renamed": renamed,
    "mounted": mounted_elsewhere,
}
