"""The origin of a run's results: the head of its page, so that a page that was mailed explains itself."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from flows.show.text import duration
from negcore.store.files import MOST_RECORD_BYTES, parse_json, read_bytes, small_files
from negcore.targets import DEFAULT_TARGET
from tasks.config.run_file import RUN_FILE
from tasks.rundir.manifest import Shards


class Fact(NamedTuple):
    """A line of the head."""

    name: str
    values: tuple[str, ...]
    """One line each."""


@dataclass(frozen=True)
class About:
    """The head of a page."""

    facts: tuple[Fact, ...]
    command: str
    """Repeats the run."""
    run_file: str
    """Text of the run file; empty if it cannot be read."""


def about_run(root: Path, shards: Mapping[str, Shards], started: datetime) -> About:
    """Read the origin of a run from its run file and from one receipt of every directory of shards.

    Parameters
    ----------
    root : Path
        The run directory.
    shards : mapping of place to Shards
        From `tasks.rundir.manifest.shards_of`.
    started : datetime
        Time at which this call of the run began.
    """
    text = _run_file(root)
    run = _mapping(text)
    identities = [identity for place in shards if (identity := _identity(root / place))]
    kind = str(run.get("kind") or "pipeline")
    facts = (
        Fact(name, tuple(dict.fromkeys(filter(None, lines))))
        for name, lines in _facts(run, identities, shards, started)
    )
    command = shlex.join(["neg", kind, str(root / RUN_FILE)])
    return About(tuple(fact for fact in facts if fact.values), command, text)


def _facts(
    run: Mapping[str, Any], identities: list[dict[str, Any]], shards: Mapping[str, Shards], started: datetime
) -> Iterator[tuple[str, Iterable[str]]]:
    models = [f"{one['model']}, revision {one['model_revision']}" for one in identities]
    yield "model", models or _several(run.get("model"))
    data = [f"{one['dataset']}, fingerprint {one['dataset_fingerprint']}" for one in identities]
    yield "data", data or _several(run.get("dataset"))
    yield "site", [one["site"] for one in identities] or _several(run.get("site"))
    yield "target", [one["target"] for one in identities] or _several(run.get("target"))
    yield "number type", [one["dtype"] for one in identities] or _several(run.get("dtype"))
    yield "seed", _several(run.get("seed"))
    n_lost = sum(one.n_set_aside for one in shards.values())
    yield (
        "rows",
        [f"{sum(one.n_rows for one in shards.values())} measured, {n_lost} lost (set aside)"] if shards else [],
    )
    yield "versions", _versions(run, shards)
    now = datetime.now(UTC)
    yield "finished", [f"{now:%Y-%m-%d %H:%M} UTC, {duration((now - started).total_seconds())} after this call began"]
    yield "called as", _several(_mapping_of(run, "written_by").get("command"))


def _versions(run: Mapping[str, Any], shards: Mapping[str, Shards]) -> list[str]:
    by = _mapping_of(run, "written_by")
    revision = f" ({by['revision']})" if by.get("revision") else ""
    own = [f"neg-at-scale {by['version']}{revision}"] if by.get("version") else []
    found = {(package, name) for one in shards.values() for package, names in one.versions.items() for name in names}
    return own + [f"{package} {name}" for package, name in sorted(found)]


def _run_file(root: Path) -> str:
    try:
        return read_bytes(root / RUN_FILE, MOST_RECORD_BYTES).decode()
    except (OSError, ValueError):  # the run says itself that its file is gone
        return ""


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _mapping_of(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = run.get(name)
    return found if isinstance(found, dict) else {}


def _several(value: Any) -> list[str]:
    return [] if value is None else [str(one) for one in (value if isinstance(value, list) else [value])]


def _identity(folder: Path) -> dict[str, Any] | None:
    """Return what a directory's shards were made of, and the dataset's name; None if no receipt can be read."""
    from urllib.parse import unquote

    for receipt in small_files(folder / "_receipts", "part-*.json"):
        try:
            identity = parse_json(receipt.content)["identity"]
            known = {name: str(identity[name]) for name in ("model", "model_revision", "site", "dtype")}
            known["target"] = str(identity.get("target", DEFAULT_TARGET))
            fingerprint = str(identity["dataset_fingerprint"])
        except (ValueError, KeyError, TypeError):  # a damaged one, or of an earlier version
            continue
        return {**known, "dataset_fingerprint": fingerprint, "dataset": unquote(folder.parent.name.partition("=")[2])}
    return None
