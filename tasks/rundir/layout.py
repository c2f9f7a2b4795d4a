"""The contents of a run directory, read without any model: its plan, and where its shards lie.

The plan is written when a flow starts, so that those who watch or check the directory know what is still to come.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import compress
from operator import not_
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from negcore.errors import RunError
from negcore.store.files import (
    MOST_RECORD_BYTES,
    draft,
    holds,
    is_dir,
    is_remote,
    listing,
    n_bytes,
    near_path,
    parse_json,
    read_bytes,
)
from negcore.store.identity import canonical_json
from negcore.store.publish import Receipt, ShardPlace, receipts
from tasks.config.run_file import RUN_FILE

if TYPE_CHECKING:
    from tasks.measure.shard_set import ShardSet

PLAN_FILE = "plan.json"
FAILURES_FILE = "_failures.json"


@dataclass(frozen=True)
class PlannedShards:
    """The shards that a run is to make in one directory."""

    place: str
    """The directory below the run directory."""
    digest: str
    """Digest of the run's identity, as in `Receipt.planned_digest`."""
    n_shards: int
    n_rows: int

    def __post_init__(self) -> None:
        kind, *pairs = self.place.split("/")  # anybody may have written the file, so it must not lead elsewhere
        if kind in ("", ".", "..") or len(pairs) != 3 or not all("=" in pair for pair in pairs):
            raise ValueError(f"{self.place!r} is no directory of shards")


@dataclass(frozen=True)
class ShardFolder:
    """One directory of shards: planned, begun, or both."""

    root: Path
    """The run directory it belongs to."""
    place: str
    planned: PlannedShards | None

    @property
    def path(self) -> Path:
        return self.root / self.place

    @property
    def kind(self) -> str:
        """``negs``, or the name of a study's measurement."""
        return self.place.split("/")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model, the dataset, and the split or part."""
        return tuple(unquote(pair.partition("=")[2]) for pair in self.place.split("/")[1:])


class Receipts(NamedTuple):
    """The undamaged receipts of one directory of shards, its own run's and those of other runs."""

    own: list[Receipt]
    foreign: list[Receipt]
    n_shards: int | None
    """Shards that make the directory whole; None if neither a plan nor a receipt tells."""


def write_plan_file(root: Path, shard_sets: "Iterable[ShardSet]") -> None:
    """Note in the run directory what the run that starts now is to make.

    Raises
    ------
    RunError
        If the directory cannot be written.
    """
    planned = [
        PlannedShards(one.place.path(Path()).as_posix(), one.identity.digest, len(one.shards), len(one.examples))
        for one in shard_sets
    ]
    try:
        with draft(root / PLAN_FILE) as file:
            file.write_text(canonical_json([asdict(one) for one in planned]), encoding="ascii")
    except OSError as error:
        raise RunError(f"run directory {str(root)!r} cannot be written: {error.strerror or error}") from error


def read_plan_file(root: Path) -> dict[str, PlannedShards]:
    """Return what the directory's last run was to make, by place; nothing if no plan was noted.

    Raises
    ------
    RunError
        If the plan is damaged.
    """
    file = root / PLAN_FILE
    try:
        planned = [PlannedShards(**one) for one in parse_json(read_bytes(file, MOST_RECORD_BYTES))]
        return {one.place: one for one in planned}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise RunError(f"plan {str(file)!r} is damaged ({error}): delete it and run the same command again") from error


def note_failures(root: Path, place: ShardPlace, errors: Mapping[int, str]) -> None:
    """Note beside the shards of a directory which of them the run could not make, by index, and why."""
    file = place.path(root) / FAILURES_FILE
    if errors or n_bytes(file) is not None:
        with draft(file) as new:
            new.write_text(canonical_json({str(index): error for index, error in errors.items()}), encoding="ascii")


def read_failures(folder: Path) -> dict[int, str]:
    """Return the shards that a directory's last run could not make, and why; nothing if the note is damaged."""
    try:
        return {
            int(index): str(error)
            for index, error in parse_json(read_bytes(folder / FAILURES_FILE, MOST_RECORD_BYTES)).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def shard_folders(directory: Path) -> list[ShardFolder]:
    """Return every directory of shards below a run directory or a part of one, planned ones first.

    Raises
    ------
    RunError
        If there is no such directory, or a plan is damaged.
    """
    if not is_dir(directory):
        near = near_path(directory)
        raise RunError(f"run directory {str(directory)!r} does not exist" + f"; {near}" * bool(near))
    here = _contents(directory)
    begun = [folder for folder in here.places if _is_begun(folder)]
    roots = {folder.parents[3] for folder in begun} | {file.parent for file in here.files if file.name == PLAN_FILE}
    plans = {root: read_plan_file(root) for root in sorted(roots)}
    planned = [root / place for root, plan in plans.items() for place in plan]
    folders = dict.fromkeys([*(folder for folder in planned if folder.is_relative_to(directory)), *sorted(begun)])
    return [_shard_folder(folder, plans) for folder in folders]


def receipts_of(folder: ShardFolder) -> Receipts:
    """Return the receipts in a directory, its own run's apart from others; see `own_run`."""
    found = receipts(folder.path)
    runs = [(receipt.planned_digest, receipt.n_shards) for receipt in found]
    own = own_run(folder, Counter(runs))
    is_own = [run == own for run in runs]
    return Receipts(list(compress(found, is_own)), list(compress(found, map(not_, is_own))), own and own[1])


def own_run(folder: ShardFolder, n_receipts: Mapping[tuple[str, int], int]) -> tuple[str, int] | None:
    """Return planned digest and shards of a directory's own run; None without a plan and without receipts.

    It is the planned run, or else the one with the most receipts.
    """
    if folder.planned is not None:
        return folder.planned.digest, folder.planned.n_shards
    return max(n_receipts, key=n_receipts.__getitem__, default=None)


def other_files(directory: Path) -> list[Path]:
    """Return every file below a directory but those in directories of shards."""
    return _contents(directory).files


def regular_files(directory: Path) -> list[Path]:
    """Return those of the other files that can be read: no pipe, device or link to nothing."""
    return [path for path in other_files(directory) if is_remote(path) or path.is_file()]


def run_roots(directory: Path) -> list[Path]:
    """Return those of the directory and the directories below it that hold a run file."""
    return sorted(file.parent for file in _contents(directory).files if file.name == RUN_FILE)


class _Contents(NamedTuple):
    """Everything in a directory but what is inside the directories of shards: that may be too much to list."""

    places: list[Path]
    """Directories that may hold shards, by their names."""
    files: list[Path]


def _contents(directory: Path) -> _Contents:
    found, todo = _Contents([], []), [directory]
    while todo:
        folder = todo.pop()
        if _is_place(folder):
            found.places.append(folder)
        else:
            here = listing(folder)
            todo += [one for one in here.folders if not one.name.startswith(".")]  # such as the hub client's notes
            found.files.extend(folder / name for name in here.files)
    return found


def _is_begun(folder: Path) -> bool:
    """Tell whether a directory holds a shard, a receipt or a writer's leftover; in a bucket it would not exist else."""
    return is_remote(folder) or any(holds(folder / below, "*part-*") for below in ("", "_receipts"))


def _is_place(folder: Path) -> bool:
    return len(folder.parents) > 4 and all("=" in part for part in folder.parts[-3:])


def _shard_folder(folder: Path, plans: Mapping[Path, Mapping[str, PlannedShards]]) -> ShardFolder:
    root = folder.parents[3]
    place = folder.relative_to(root).as_posix()
    return ShardFolder(root, place, plans[root].get(place))
