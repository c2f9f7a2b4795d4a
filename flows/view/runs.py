"""The runs below a directory, and what is read of one: nothing leads out of the directory, and nothing is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

from flows.show.report import REPORT_FILE
from negcore.datasets import Example
from negcore.errors import NegError, RunError
from negcore.store.files import n_bytes, read_bytes, written_s
from negcore.store.reader import NegSplit
from tasks.config.reading import recorded_run
from tasks.run_negs import StoredSplit, card_of, examples_of, stored_splits
from tasks.rundir.layout import regular_files, run_roots
from tasks.rundir.manifest import MANIFEST_FILE, read_manifest

SPLITS = ("test", "valid", "train")
_HELD = 8
"""Splits whose columns and texts are held in memory."""
_KINDS: Mapping[str, str] = MappingProxyType({".svg": "image/svg+xml", ".png": "image/png", ".pdf": "application/pdf"})


@dataclass(frozen=True)
class RunSummary:
    """A run as the index tells of it."""

    name: str
    kind: str
    models: tuple[str, ...]
    subjects: tuple[str, ...]
    state: str
    written_s: float | None
    """Time of its manifest, or else of its run file, in seconds since the epoch."""


class Runs:
    """The runs in a directory: the directory itself, if it is one, and all below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if not self.places():
            raise RunError(f"{str(root)!r} holds no run (no run.yaml in it or below): give a run directory, or runs/")

    def places(self) -> dict[str, Path]:
        """Return the directory of every run by its name, which is its place below the root's parent."""
        return {place.relative_to(self.root.parent).as_posix(): place for place in run_roots(self.root)}

    def at(self, name: str) -> Path:
        """Return the directory of a run; `RunError` if there is none of this name."""
        found = self.places().get(name)
        if found is None:
            raise RunError(f"there is no run {name!r:.200} in {str(self.root)!r}")
        return found

    def summary(self, name: str) -> RunSummary:
        """Return what the index tells of a run; what cannot be read of it is told as its state."""
        place = self.at(name)
        times = [file for file in (place / MANIFEST_FILE, place / "run.yaml") if n_bytes(file) is not None]
        written = written_s(times[0]) if times else None
        try:
            run = recorded_run(place, to_look_at=True)
            state = "finished" if read_manifest(place) else "not finished"
        except NegError as error:
            return RunSummary(name, "", (), (), f"{error}", written)
        return RunSummary(name, run.kind, tuple(run.model), run.subjects, state, written)

    def splits(self, name: str) -> dict[str, StoredSplit]:
        """Return the splits whose NEGs a run holds, by a name for addresses; none if it holds none."""
        try:
            found = stored_splits(self.at(name), SPLITS)
        except RunError:
            return {}
        return {"/".join(quote(part, safe="") for part in (one.part, *one.place[1:])): one for one in found}

    def split(self, name: str, part: str) -> StoredSplit:
        """Return the split of that name; `RunError` if the run has no such NEGs."""
        found = self.splits(name).get(part)
        if found is None:
            raise RunError(f"run {name!r:.200} has no NEGs {part!r:.200}")
        return found

    def report_file(self, name: str, file: str) -> tuple[bytes, str]:
        """Return the content and the kind of a run's report, or of a figure beside it.

        Raises
        ------
        RunError
            If the run has no such file.
        """
        place = self.at(name)
        known = {path.relative_to(place).as_posix(): path for path in regular_files(place)}
        kind = "text/html" if file == REPORT_FILE else _KINDS.get(Path(file).suffix)
        if kind is None or file not in known:
            raise RunError(f"run {name!r:.200} has no {file!r:.200} to show here")
        return read_bytes(known[file]), kind


@lru_cache(_HELD)
def opened(split: StoredSplit) -> NegSplit:
    """Open the NEGs of a split; they are checked once."""
    return split.open()


@lru_cache(_HELD)
def texts(split: StoredSplit) -> Mapping[str, Example]:
    """Make the prompts of a split again from the run's data, by row.

    Raises
    ------
    NegError
        If model or data are no longer there.
    """
    return examples_of(split, card_of(split), opened(split))
