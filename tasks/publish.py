"""A folder to publish: the shards of a finished run with their receipts, its tables and probes, and a dataset card.

Shards stay Arrow files with their receipts, byte for byte, so that whoever has the folder can check it as a run is
checked, map it into memory, and read it with this program or with any that reads Arrow. Left out is all that may quote
prompts (reports) or names places of a machine (run files, plans, records of Prefect).
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from negcore.errors import RunError
from negcore.store.buckets import fetch
from negcore.store.files import find, hidden, is_remote
from negcore.store.integrity import metadata_of, sound_batch
from negcore.store.publish import checksum, receipts, shard_of
from tasks.config.reading import recorded_run
from tasks.config.run_file import RUN_FILE, RunFile
from tasks.machine import free_bytes, in_binary_units
from tasks.rundir.layout import ShardFolder, other_files, shard_folders
from tasks.rundir.manifest import (
    MANIFEST_FILE,
    Manifest,
    Shards,
    finished_runs,
    manifest_faults,
    read_manifest,
    shards_of,
    write_manifest,
)
from tasks.rundir.verify import verify

CARD_FILE = "README.md"
_RESULTS = re.compile(r"(.+/)?([^/]+\.arrow|checks/[^/]+\.json|probes/.+)")
"""Files that hold results without any text of prompts: tables, findings of checks at load, fitted probes."""
_LAYER = re.compile(r"_\d\d+$")


class PublishedColumn(NamedTuple):
    """A column of shards; `LL` in its name stands for the number of a layer, which has one each."""

    name: str
    type: str
    meaning: str
    """As the shards' metadata say; empty where they say nothing."""


class PublishedPart(NamedTuple):
    """One directory of shards."""

    name: str
    """The split, or another part of a measurement."""
    place: str
    shards: Shards


@dataclass(frozen=True)
class PublishedData:
    """Directories of shards with the same columns: of one measurement, model and dataset."""

    condition: str
    """Folder of the run that they are in; empty for the run directory itself."""
    kind: str
    model: str
    dataset: str
    parts: tuple[PublishedPart, ...]
    identity: Mapping[str, Any]
    """Settings that decided the numbers."""
    columns: tuple[PublishedColumn, ...]


@dataclass(frozen=True)
class Publication:
    """A finished, undamaged run, and what of it is published."""

    root: Path
    run: RunFile
    data: tuple[PublishedData, ...]
    shards: Mapping[str, Shards]
    """By directory below the run directory."""
    files: Mapping[str, str]
    """Checksums of the other files, by their place below the run directory."""
    versions: Mapping[str, str]

    @property
    def n_bytes(self) -> int:
        return sum(one.n_bytes for one in self.shards.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines about names that tell of this machine: they are parts of paths and receipts, and cannot be others."""
        names = dict.fromkeys(name for one in self.data for name in (one.model, one.dataset))
        places = [name for name in names if name.startswith(("/", "~", "./", "../"))]
        return tuple(f"{name!r} is a path of this machine, and is published as the name that it is" for name in places)

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of settings whose own texts stand in the metadata of all shards: they are parts of every prompt."""
        prompts = [one.identity.get("prompt", {}) for one in self.data]
        named = {"system_prompt": any(one.get("system_prompt") for one in prompts)}
        named["wording"] = any(not isinstance(one.get("wording", ""), str) for one in prompts)
        return tuple(name for name, is_there in named.items() if is_there)


# The run


def read_publication(root: Path, checked: Callable[[int], None] = lambda n_bytes: None) -> Publication:
    """Check a run as `neg verify` does, and return what of it can be published.

    Parameters
    ----------
    root : Path
        Run directory.
    checked : callable
        Called with the bytes of every shard that was checked.

    Raises
    ------
    RunError
        If the run is not finished, or anything of it is damaged or missing.
    """
    folders = shard_folders(root)
    manifest = read_manifest(root)
    if manifest is None or not folders:
        raise RunError(
            f"{str(root)!r} is no finished run: neg status tells what is missing; only whole runs are published"
        )
    manifests = {one: read_manifest(one) or manifest for one in finished_runs(root)}
    _refuse_damaged(root, folders, manifests, checked)
    shards = {_below(root, one, place): held for one, of in manifests.items() for place, held in of.shards.items()}
    files = {_below(root, one, place): xxh3 for one, of in manifests.items() for place, xxh3 in of.files.items()}
    return Publication(
        root=root,
        run=recorded_run(root, to_look_at=True),
        data=tuple(_data(root, folders, shards)),
        shards=dict(sorted(shards.items())),
        files={place: xxh3 for place, xxh3 in sorted(files.items()) if _RESULTS.fullmatch(place)},
        versions=manifest.versions,
    )


def _refuse_damaged(
    root: Path, folders: Sequence[ShardFolder], finished: Iterable[Path], checked: Callable[[int], None]
) -> None:
    found = [f"{one.folder.place}: {fault.what}" for one in verify(folders, checked) for fault in one.faults]
    found += [line for one in finished for line in manifest_faults(one, shards_of(one))]
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise RunError(
            f"{str(root)!r} is damaged ({found[0]}{more}): neg verify names all; mend it before it is published"
        )


def _below(root: Path, part: Path, place: str = "") -> str:
    return str(part / place).removeprefix(str(root)).strip("/")


def _data(root: Path, folders: Sequence[ShardFolder], shards: Mapping[str, Shards]) -> Iterator[PublishedData]:
    """Put directories of the same columns together."""
    groups: dict[tuple[str, str, str, str, str], list[tuple[ShardFolder, pa.Schema]]] = {}
    for folder in folders:
        schema, (model, dataset, _) = _schema(folder), folder.names
        key = (_below(root, folder.root), folder.kind, model, dataset, str(schema.remove_metadata()))
        groups.setdefault(key, []).append((folder, schema))
    for (condition, kind, model, dataset, _), group in groups.items():
        places = [(folder.names[2], _below(root, folder.path)) for folder, _ in group]
        parts = tuple(PublishedPart(name, place, shards[place]) for name, place in places)
        about = metadata_of(group[0][1])
        columns = tuple(dict.fromkeys(_columns(group[0][1], about.get("axes", {}))))
        yield PublishedData(condition, kind, model, dataset, parts, about.get("identity", {}), columns)


def _schema(folder: ShardFolder) -> pa.Schema:
    found = receipts(folder.path)
    first = next((receipt for receipt in found if receipt.n_rows), found[0])
    return sound_batch(folder.path, first, verify=False).schema


def _columns(schema: pa.Schema, axes: Mapping[str, Any]) -> Iterator[PublishedColumn]:
    for column in schema:
        name = _LAYER.sub("_LL", column.name)
        told = axes.get(name) or axes.get(re.sub("^sum_.*", "sum_VOTE", name))
        yield PublishedColumn(name, _type(column.type), told if isinstance(told, str) else "")


def _type(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"{kind.list_size} x {_type(kind.value_type)}"
    if pa.types.is_list(kind):
        return f"list of {_type(kind.value_type)}"
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))


# The folder


def write_folder(
    publication: Publication, target: Path, card: str, copied: Callable[[int], None] = lambda n_bytes: None
) -> None:
    """Write a folder that can be published, whole or not at all; its bytes depend on run and card alone.

    Parameters
    ----------
    target : Path
        Folder to make; it may be there already if it is empty.
    card : str
        Content of README.md. It is the one file that may be changed afterwards.
    copied : callable
        Called with the bytes of every shard that was copied.

    Raises
    ------
    RunError
        If the folder is not empty or in a bucket, there is no room, or the run changes or is damaged meanwhile.
    """
    check_target(target, publication.n_bytes)
    with _whole(target) as folder:
        for place, held in publication.shards.items():
            _copy_shards(publication.root / place, folder / place, held, copied)
        for place, xxh3 in publication.files.items():
            _copy(publication.root / place, folder / place, xxh3)
        if shards_of(folder) != dict(publication.shards):
            raise RunError(
                f"run {str(publication.root)!r} changed while it was copied: do it again when it is finished"
            )
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        files = dict(publication.files)
        write_manifest(folder, Manifest(dict(publication.versions), None, dict(publication.shards), files))


def check_target(target: Path, needed_bytes: int = 0) -> None:
    """Refuse a folder that cannot be made.

    Raises
    ------
    RunError
        If it is not empty or in a bucket, or there is no room for so many bytes.
    """
    if is_remote(target):
        raise RunError(f"{str(target)!r} is in a bucket: give a folder of this machine")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise RunError(f"{str(target)!r} is there already: name another folder, or remove it")
    there = free_bytes(target.absolute())
    if there is not None and there < needed_bytes:
        raise RunError(
            f"{in_binary_units(needed_bytes)} do not fit into {str(target)!r}, {in_binary_units(there)} are free: make "
            "room, or name a folder of another disk"
        )


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Give a folder beside the target that takes its place at the end, and is removed after an error."""
    folder = hidden(target.absolute())
    try:
        folder.mkdir(parents=True)
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)
    except OSError as error:
        raise RunError(f"{str(target)!r} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy_shards(source: Path, target: Path, held: Shards, copied: Callable[[int], None]) -> None:
    found = receipts(source)
    if len(found) != held.n_shards:
        raise RunError(f"{str(source)!r} changed while it was copied: do it again when the run is finished")
    for receipt in found:
        shard = shard_of(source, receipt)
        _copy(shard, target / shard.name, receipt.file_xxh3)
        copied(receipt.n_bytes)
    for proof in find(source, "_receipts/part-*.json"):
        _copy(proof, target / "_receipts" / proof.name, checksum(proof))


def _copy(source: Path, target: Path, xxh3: str) -> None:
    """Copy a file, and refuse a copy of another content than it should have."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(source):
        fetch(source, target)
    else:
        shutil.copyfile(source, target)
    if checksum(target) != xxh3:
        raise RunError(f"{str(source)!r} changed while it was copied: do it again when the run is finished")


def is_publication(folder: Path) -> bool:
    """Tell whether a folder was made to be published."""
    return all((folder / name).is_file() for name in (CARD_FILE, MANIFEST_FILE)) and not (folder / RUN_FILE).exists()


def check_publication(folder: Path) -> None:
    """Refuse a folder that is not as it was made, but for its card.

    Raises
    ------
    RunError
    """
    _refuse_damaged(folder, shard_folders(folder), [folder], lambda n_bytes: None)
    known = {CARD_FILE, MANIFEST_FILE, *(read_manifest(folder) or Manifest({}, None)).files}
    places = [_below(folder, path) for path in other_files(folder)]
    strange = [place for place in places if place not in known and not place.startswith(".")]
    if strange:
        raise RunError(f"{strange[0]!r} in {str(folder)!r} is no part of what was published there: move it away")
