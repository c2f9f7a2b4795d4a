"""Checks of this machine: packages, devices, memory, disk, models that are here, ports."""

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from negcore.findings import Finding
from negcore.model.embedded import EMBEDDED
from negcore.store.files import cache_directory
from tasks.machine import cores, free_bytes, in_binary_units, memory_bytes

_PROJECT = "neg-at-scale"
_CONSTRAINTS = Path(__file__).parents[2] / "infra" / "constraints.txt"
"""Versions that the test suite runs with; only a checkout of the repository has them."""
DEVICE_S = 60.0
"""Limit for importing torch and computing something on every GPU, in a process of its own."""
_LEAST_FREE_BYTES = 2**30
_LEAST_MEMORY_BYTES = 2 * 2**30
_NAMED = 8
"""Most packages or models that a line names."""
_PORTS = {4200: "a Prefect server", 6379: "the head of a Ray cluster", 8265: "Ray's dashboard"}
"""Ports that these servers take where they are told no other."""
_PORT_S = 0.5

_ASK_TORCH = """
import json, torch
found = {"version": torch.__version__, "gpus": [], "mps": torch.backends.mps.is_available()}
for number in range(torch.cuda.device_count()):
    about = torch.cuda.get_device_properties(number)
    gpu = {"name": about.name, "bytes": about.total_memory, "problem": ""}
    try:
        assert torch.ones(2, device=f"cuda:{number}").sum().item() == 2
    except Exception as error:
        gpu["problem"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    found["gpus"].append(gpu)
print(json.dumps(found))
"""


# Packages


def check_packages(project: str = _PROJECT) -> Iterator[Finding]:
    """Compare the installed packages with what the project declares, and with the versions it is tested with."""
    try:
        declared = [Requirement(line) for line in metadata.requires(project) or ()]
    except metadata.PackageNotFoundError:
        advice = f"pip install '{project}[run]', or pip install '.[run]' in a checkout"
        yield Finding("packages", "look", f"{project} is not installed as a package: its needs are not known", advice)
        return
    needed = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": "run"})]
    optional = [one for one in declared if one not in needed and one.marker and one.marker.evaluate({"extra": "s3"})]
    problems = [*filter(None, map(_problem, needed)), *_unfit_extra(optional)]
    if problems:
        yield Finding("packages", "bad", "; ".join(problems), f"pip install --upgrade '{project}[run]'")
        return
    n_fit = f"{len({one.name for one in needed})} packages are as declared, Python {platform.python_version()}"
    extra = "" if all(_version(one.name) for one in optional) else f"; for s3://, pip install '{project}[s3]'"
    yield Finding("packages", "good", f"{n_fit}{extra}")
    yield from _untested([*needed, *optional])


def _problem(needed: Requirement) -> str | None:
    version = _version(needed.name)
    if version is None:
        return f"{needed.name} is missing"
    fits = needed.specifier.contains(version, prereleases=True)
    return None if fits else f"{needed.name} is {version}, needed: {needed.specifier}"


def _unfit_extra(optional: Sequence[Requirement]) -> list[str]:
    """Return the problems of an extra's packages that are installed."""
    return [problem for one in optional if _version(one.name) and (problem := _problem(one))]


def _untested(declared: Sequence[Requirement]) -> Iterator[Finding]:
    """Name direct dependencies of other versions than those that the test suite runs with."""
    if not _CONSTRAINTS.is_file():
        return
    lines = (Requirement(line) for line in _CONSTRAINTS.read_text().splitlines() if line and line[0] != "#")
    tested = {one.name.lower().replace("_", "-"): one for one in lines}
    here = {one.name: (_version(one.name), tested.get(one.name.lower().replace("_", "-"))) for one in declared}
    other = [
        f"{name} {version} ({pin.specifier})"
        for name, (version, pin) in here.items()
        if version and pin and not pin.specifier.contains(version, prereleases=True)
    ]
    if other:
        advice = "nothing is known to fail; for these versions, make setup"
        yield Finding("tested versions", "look", f"others than in infra/constraints.txt: {_listed(other)}", advice)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# Devices


def check_devices() -> Iterator[Finding]:
    """Compute something on every GPU, in a process of its own: a broken driver may end it, or never answer."""
    advice = "see https://pytorch.org/get-started/locally, or hide GPUs with CUDA_VISIBLE_DEVICES="
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH],
            capture_output=True,
            text=True,
            timeout=DEVICE_S,
            stdin=subprocess.DEVNULL,
        )
        found = json.loads(asked.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        yield Finding("device", "bad", f"torch has not computed anything within {DEVICE_S:g} s", advice)
    except (ValueError, IndexError):
        said = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        yield Finding("device", "bad", f"torch cannot be used: {said:.200}", advice)
    else:
        yield from _devices(found, advice)


def _devices(found: dict[str, Any], advice: str) -> Iterator[Finding]:
    for gpu in found["gpus"]:
        if gpu["problem"]:
            yield Finding("device", "bad", f"{gpu['name']} cannot compute: {gpu['problem']}", advice)
    usable = [f"{gpu['name']}, {in_binary_units(gpu['bytes'])}" for gpu in found["gpus"] if not gpu["problem"]]
    torch = f"torch {found['version']}"
    if usable:
        yield Finding("device", "good", f"{'; '.join(usable)}; {torch}")
    elif found["gpus"]:
        return
    elif _has_nvidia_driver():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
        yield Finding("device", "look", f"a driver for NVIDIA is there, but {torch} sees no GPU{why}", advice)
    else:
        also = "; Apple's GPU is there, use it with --device mps in float32" if found["mps"] else ""
        yield Finding("device", "good", f"CPU, {cores()} cores; {torch}{also}")


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


# Memory and disk


def check_memory() -> Iterator[Finding]:
    """Compare the main memory with what a small model needs."""
    limit = memory_bytes()
    free = min(_available_bytes() or limit, limit)
    found = f"{in_binary_units(free)} of {in_binary_units(limit)} are free"
    if free < _LEAST_MEMORY_BYTES:
        yield Finding(
            "memory", "look", found, "end other programs, or use --workers 1; neg plan tells what a run needs"
        )
    else:
        yield Finding("memory", "good", found)


def _available_bytes() -> int | None:
    """Return the memory that could be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def check_disks() -> Iterator[Finding]:
    """Look for room, and leave to write, where runs, models and temporary files go."""
    from huggingface_hub import constants

    sound = []
    for what, directory, variable in (
        ("runs", Path.cwd() / "runs", "--out"),
        ("models of the hub", Path(constants.HF_HUB_CACHE), "HF_HOME"),
        ("copies", cache_directory(), "NEG_CACHE"),
        ("temporary files", Path(tempfile.gettempdir()), "TMPDIR"),
    ):
        there = next(parent for parent in (directory, *directory.parents) if parent.exists())
        free = free_bytes(directory) or 0
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield Finding(
                "disk", "bad", f"{directory} ({what}) cannot be written", f"make it writable, or set {variable}"
            )
        elif free < _LEAST_FREE_BYTES:
            few = f"{in_binary_units(free)} are free in {directory} ({what})"
            yield Finding("disk", "look", few, f"make room, or set {variable}; neg plan tells what a run needs")
        else:
            sound.append(f"{in_binary_units(free)} for {what}")
    if sound:
        yield Finding("disk", "good", f"free: {', '.join(sound)}")


# Models


def check_models() -> Iterator[Finding]:
    """Name the models that need no network: those of packages, and those in the hub's cache."""
    packaged = [alias for alias, one in EMBEDDED.items() if all(find_spec(package) for package, _ in one.parts)]
    cached = _cached_models()
    if not packaged and not cached:
        advice = f"{next(iter(EMBEDDED.values())).command}, or name a model of the hub or a directory"
        yield Finding("models here", "look", "none: neither in packages nor in the hub's cache", advice)
        return
    named = [f"{alias} (package)" for alias in packaged] + cached
    yield Finding("models here", "good", _listed(named))


def _cached_models() -> list[str]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, ValueError, OSError):  # none yet, or no directory
        return []
    models = sorted((one for one in repositories if one.repo_type == "model"), key=lambda one: -one.last_accessed)
    return [f"{one.repo_id} ({in_binary_units(one.size_on_disk)})" for one in models]


# Ports


def check_ports() -> Iterator[Finding]:
    """Tell which of the usual ports of servers are taken on this machine."""
    taken = {port: server for port, server in _PORTS.items() if _is_taken(port)}
    if not taken:
        free = ", ".join(map(str, _PORTS))
        yield Finding("ports", "good", f"free: {free} (those that Prefect and Ray take where they are told no other)")
    for port, server in taken.items():
        found = f"{port} is taken: it is where {server} listens if it is told no other port"
        yield Finding("ports", "look", found, "right if you started that server; to start another, give it --port")


def _is_taken(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=_PORT_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # somebody listens and is too busy to answer
        return True
    return True


# Words


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
