"""The manifest of a finished run, written last: it ties tables, probes and report to the shards that they were made of.

A run takes the manifest away before it changes anything, so a directory that has one is whole, and what it names
belongs together. The run of a part (a model and study of a campaign) has a manifest of its own, and is one of the files
of the whole run's.
"""

import platform
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from xxhash import xxh3_128_hexdigest

from negcore.errors import RunError
from negcore.store.files import MOST_RECORD_BYTES, draft, n_bytes, parse_json, read_bytes, remove, small_files
from negcore.store.identity import canonical_json, content_digest
from negcore.store.integrity import Stamp, stamp_of
from negcore.store.publish import checksum
from tasks.config.run_file import RUN_FILE
from tasks.rundir.layout import PLAN_FILE, other_files, regular_files, shard_folders

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_PACKAGES = ("neg-at-scale", "torch", "transformers", "numpy", "pyarrow", "scikit-learn")
_NUMBERS_FROM = ("torch", "transformers")
"""Packages whose versions can change the last digits of what is measured."""
_RESULTS = frozenset(
    {RUN_FILE, PLAN_FILE, "report.html", "figures", "probes", "checks", "linearity", "skills", "campaign"}
)
"""Files and folders of a run directory that hold results, beside the tables in it."""
_SIZES = re.compile(rb'"n_bytes":(\d+),"n_nonfinite":\d+,"n_rows":(\d+),')
_VERSIONS = b'"versions":'


@dataclass(frozen=True)
class Shards:
    """The shards of one directory, as their receipts say."""

    n_shards: int
    n_rows: int
    n_bytes: int
    n_set_aside: int
    """Rows that are not in the shards, because they could not be computed."""
    receipts_xxh3: str
    """Digest of the names and checksums of all receipts, each of which holds its shard's checksum."""
    versions: dict[str, dict[str, int]]
    """Numbers of shards by package and its version, of the packages that decide numbers."""


@dataclass(frozen=True)
class Manifest:
    """All that a finished run consists of."""

    versions: dict[str, str]
    """Versions of the packages, and of Python, of the run that finished."""
    plan_xxh3: str | None
    """Checksum of the run's plan; None where it makes no shards of its own."""
    shards: dict[str, Shards] = field(default_factory=dict)
    """By directory, below the run directory."""
    files: dict[str, str] = field(default_factory=dict)
    """Checksums of tables, probes, figures and report, by their place below the run directory."""


@dataclass(frozen=True)
class Before:
    """The state of a run directory before a run changes it."""

    manifest: Manifest | None
    stamps: Mapping[Path, Stamp | None]


# A run


def begin(root: Path) -> Before:
    """Take the manifest of a directory away, since a run is about to change what is there."""
    try:
        manifest = read_manifest(root)
    except RunError:  # a damaged one says nothing
        manifest = None
    before = Before(manifest, {path: stamp_of(path) for path in _results(root)})
    remove(root / MANIFEST_FILE)
    return before


def finish(root: Path, before: Before, shards: Mapping[str, Shards]) -> None:
    """Write the manifest of a run that is whole: of what it wrote, and of what an earlier one made of these shards.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    plan = root / PLAN_FILE
    manifest = Manifest(
        versions={package: version(package) for package in _PACKAGES} | {"python": platform.python_version()},
        plan_xxh3=checksum(plan) if n_bytes(plan) is not None else None,
        shards=dict(shards),
        files=dict(_files(root, before, shards)),
    )
    write_manifest(root, manifest)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write a manifest.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    record = {"format": _FORMAT, **asdict(manifest)}
    try:
        with draft(root / MANIFEST_FILE) as file:
            file.write_text(canonical_json(record | {"seal": content_digest(record)}) + "\n", encoding="ascii")
    except OSError as error:
        raise RunError(f"run directory {str(root)!r} cannot be written: {error.strerror or error}") from error


def _files(root: Path, before: Before, shards: Mapping[str, Shards]) -> Iterator[tuple[str, str]]:
    """Return the files that belong to the shards; those that an earlier run made of other shards do not."""
    earlier = before.manifest
    kept = earlier.files if earlier and all(shards.get(place) == one for place, one in earlier.shards.items()) else {}
    for path in _results(root):
        place, xxh3 = _place(root, path), checksum(path)
        if stamp_of(path) != before.stamps.get(path) or kept.get(place) == xxh3:
            yield place, xxh3


def _results(root: Path) -> list[Path]:
    return sorted(path for path in regular_files(root) if _is_result(_place(root, path)))


def _is_result(place: str) -> bool:
    first, *below = place.split("/")
    if place.endswith(f"/{MANIFEST_FILE}"):
        return True
    return not Path(place).name.startswith(".") and (first in _RESULTS or (not below and first.endswith(".arrow")))


def shards_of(root: Path) -> dict[str, Shards]:
    """Summarise the shards of a run directory, but for those of parts that have a manifest of their own."""
    parts = [one for one in finished_runs(root) if one != root]
    folders = [one.path for one in shard_folders(root)]
    own = [folder for folder in folders if not any(folder.is_relative_to(part) for part in parts)]
    return {_place(root, folder): _shards(folder) for folder in own}


def _shards(folder: Path) -> Shards:
    n_rows = total_bytes = n_set_aside = 0
    versions: Counter[bytes] = Counter()
    digests = []
    for file in small_files(folder / "_receipts", "part-*.json"):
        digests.append((file.name, xxh3_128_hexdigest(file.content)))
        if sizes := _SIZES.search(file.content):
            total_bytes, n_rows = total_bytes + int(sizes[1]), n_rows + int(sizes[2])
        n_set_aside += _n_set_aside(file.content)
        versions[file.content[file.content.rfind(_VERSIONS) + len(_VERSIONS) : file.content.rfind(b"}")]] += 1
    receipts_xxh3 = content_digest(sorted(digests))
    return Shards(len(digests), n_rows, total_bytes, n_set_aside, receipts_xxh3, _counted(versions))


def _n_set_aside(receipt: bytes) -> int:
    if b'"set_aside":[]' in receipt:  # nearly all are like that, and need not be parsed
        return 0
    try:
        return len(parse_json(receipt)["set_aside"])
    except (ValueError, KeyError, TypeError):  # of a damaged receipt, or of an earlier version
        return 0


def _counted(versions: Mapping[bytes, int]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {package: {} for package in _NUMBERS_FROM}
    for text, n_shards in versions.items():
        try:
            known = parse_json(text)
        except ValueError:  # of a damaged receipt
            continue
        for package in counts.keys() & known:
            counts[package][known[package]] = counts[package].get(known[package], 0) + n_shards
    return counts


def mixed_versions(shards: Iterable[Shards]) -> list[str]:
    """Return a line for every package of which several versions made the shards of a directory."""
    totals = {package: Counter[str]() for package in _NUMBERS_FROM}
    for one in shards:
        for package, counts in one.versions.items():
            totals[package].update(counts)
    return [
        f"shards were made by several versions of {package} "
        f"({', '.join(f'{name}: {n_shards}' for name, n_shards in sorted(counts.items()))}): the last digits of their "
        "numbers may differ for that"
        for package, counts in totals.items()
        if len(counts) > 1
    ]


# Readers


def read_manifest(root: Path) -> Manifest | None:
    """Return the manifest of a run directory; None if the run is not finished, or was by an earlier version.

    Raises
    ------
    RunError
        If it is damaged.
    """
    file = root / MANIFEST_FILE
    try:
        record = parse_json(read_bytes(file, MOST_RECORD_BYTES))
        seal = record.pop("seal")
        if seal != content_digest(record) or record.pop("format") != _FORMAT:
            raise ValueError("its seal does not fit its content")
        shards = {place: Shards(**one) for place, one in record.pop("shards").items()}
        return Manifest(**record, shards=shards)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{str(file)!r} is damaged ({error}): run the same command again") from error


def manifest_faults(root: Path, shards: Mapping[str, Shards]) -> list[str]:
    """Return a line for everything in a finished run's directory that is not what its manifest names.

    Parameters
    ----------
    shards : mapping of place to Shards
        From `shards_of`.
    """
    try:
        manifest = read_manifest(root)
    except RunError as error:
        return [str(error)]
    if manifest is None:
        return []
    faults = []
    for place, one in manifest.shards.items():
        if shards.get(place) != one:
            faults.append(f"{place}: not the shards that tables, probes and report were made of")
    for place, xxh3 in manifest.files.items():
        fault = _file_fault(root / place, xxh3)
        if fault:
            faults.append(f"{place}: {fault}")
    return [f"{fault}; run the same command again" for fault in faults]


def check_results(root: Path, tables: Sequence[Path]) -> str | None:
    """Refuse tables of a run that are not of the shards in it; return a warning if nothing tells what they are of.

    Raises
    ------
    RunError
        If the run has no such table, or its manifest names another one, or other shards.
    """
    manifest = read_manifest(root)
    if manifest is None:
        return f"{str(root)!r} has no {MANIFEST_FILE}: its run is not finished, or was made by an earlier version"
    finished = {path: manifest.files.get(_place(root, path)) for path in tables}
    now = {path: _checksum(path) for path in tables}
    if missing := [path for path in tables if finished[path] is None and now[path] is None]:
        raise RunError(f"run {str(root)!r} has no table {_place(root, missing[0])}: its kind of run has none")
    reason = None
    if changed := [path for path in tables if finished[path] != now[path]]:
        reason = "it is gone" if now[changed[0]] is None else "it is not what the run finished with"
    elif tables and manifest.shards != shards_of(root):
        reason = "the shards beside it are no longer those that it was made of"
    if reason:
        path = [*changed, *tables][0]
        raise RunError(f"table {str(path)!r} cannot be trusted ({reason}): run the same command again")
    return None


def _checksum(path: Path) -> str | None:
    """Return the checksum of a file; None if it is gone."""
    try:
        return checksum(path)
    except FileNotFoundError:
        return None


def _file_fault(path: Path, xxh3: str) -> str | None:
    if n_bytes(path) is None:
        return "missing"
    return None if checksum(path) == xxh3 else "changed since the run was finished"


def _place(root: Path, path: Path) -> str:
    return str(path).removeprefix(str(root)).lstrip("/")


def finished_runs(directory: Path) -> list[Path]:
    """Return the directory and those below it whose run is finished."""
    return sorted(path.parent for path in other_files(directory) if path.name == MANIFEST_FILE)
