"""Real runs of the command line to disturb, and what they leave behind compared with an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from support import NEG, save_tiny_model

N_ROWS = 240
SHARD_ROWS = 4
N_SHARDS = N_ROWS // SHARD_ROWS
LONGEST_RUN_S = 1800.0
_LEFT_BEHIND_S = 120.0
"""What a killed driver started must be gone after this time."""
POLL_S = 0.01

LOCAL = ("--backend", "local")
RAY = ("--backend", "ray", "--workers", "2")

Files = Mapping[str, bytes]
"""Shards and receipts by their place in the run directory."""


class CannotTry(Exception):
    """This machine does not let the suite make the fault."""


@dataclass(frozen=True)
class Outcome:
    """What became of runs with a fault."""

    tried: int
    survived: int
    rows_lost: int = 0
    redone: int = 0
    """Finished shards that were written again."""
    not_tried: str = ""
    """Why the fault cannot be made here."""

    @property
    def is_clean(self) -> bool:
        return self.survived == self.tried and not self.rows_lost and not self.redone

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(
            self.tried + other.tried,
            self.survived + other.survived,
            self.rows_lost + other.rows_lost,
            self.redone + other.redone,
        )


# What runs leave behind


def published(directory: Path) -> Files:
    """Every shard and receipt of a run directory."""
    files = (path for path in (directory / "negs").rglob("part-*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def rows_lost(expected: Files, directory: Path) -> int:
    """Rows of the expected shards that are missing or differ; a shard's rows count together."""
    there = published(directory)
    lost = 0
    for receipt, content in expected.items():
        if receipt.endswith(".json"):
            shard = receipt.replace("/_receipts/", "/").replace(".json", ".arrow")
            is_same = all(there.get(name) == expected[name] for name in (shard, receipt))
            lost += 0 if is_same else json.loads(content)["n_rows"]
    return lost


def finished(directory: Path) -> dict[Path, tuple[int, ...]]:
    """The shards that have a receipt, with the inodes and times of both files."""
    found = {}
    for receipt in directory.glob("negs/*/*/*/_receipts/part-*.json"):
        shard = receipt.parents[1] / f"{receipt.stem}.arrow"
        with suppress(FileNotFoundError):  # being written again: its stamp will be another
            files = (shard.stat(), receipt.stat())
            found[shard] = tuple(number for file in files for number in (file.st_ino, file.st_mtime_ns))
    return found


# Runs of the command line


class Bench:
    """A tiny model, rows to ask it, and what one undisturbed worker writes."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.random = home, random.Random(seed)
        self.runs: set[Run] = set()
        self.model = save_tiny_model("llama", home / "tiny-llama")
        self.rows = write_rows(home / "rows.jsonl", N_ROWS)
        reference = Run(self, home / "reference", *LOCAL)
        assert reference.finish() == 0, reference.said
        self.reference = published(reference.directory)
        assert len(self.reference) == 2 * N_SHARDS

    def shard_counts(self, count: int) -> list[int]:
        """Moments of a run, in order: how many shards are finished."""
        return sorted(self.random.sample(range(N_SHARDS), count))


def write_rows(file: Path, n_rows: int, words: Mapping[int, str] | None = None) -> Path:
    """A file of prompts of different lengths in three splits; some, by number, with a word of their own."""
    rows = [
        {
            "prompt": f"Question: {'the best of times ' * (row % 5)}{row} {(words or {}).get(row, '')} Answer:",
            "labels": [" A", " B", " C"],
            "answer": row % 3,
            "split": ("train", "valid", "test")[row * 3 // n_rows],
        }
        for row in range(n_rows)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


class Run:
    """A run that is disturbed, and started again until it is whole."""

    def __init__(self, bench: Bench, directory: Path, *options: str, orchestrator: str = "none", **environment: str):
        self.directory = directory
        self._bench = bench
        self._log = bench.home / f"{directory.name}.log"
        self._command = [
            NEG, "extract", "--model", bench.model, "--dataset", bench.rows, "--out", directory,
            "--shard-rows", str(SHARD_ROWS), "--orchestrator", orchestrator, *options,
        ]  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self._environment = inherited | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(bench.home)} | environment
        self._seen: dict[Path, tuple[int, ...]] = {}
        self._started: list[psutil.Process] = []

    def start(self) -> None:
        """Start the command, which goes on from the finished shards."""
        self._bench.runs.add(self)
        with self._log.open("wb") as log:
            self.driver = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=subprocess.STDOUT)

    def wait_for(self, n_shards: int) -> bool:
        """Wait until so many shards are finished and a random moment more; whether the driver still works then."""
        deadline = time.monotonic() + LONGEST_RUN_S
        while self.driver.poll() is None and len(finished(self.directory)) < n_shards:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.directory}: no {n_shards} shards within {LONGEST_RUN_S:g} s")
            time.sleep(POLL_S)
        time.sleep(self._bench.random.uniform(0, 2 * POLL_S))
        return self.driver.poll() is None

    def end(self) -> int:
        """The exit code."""
        return self.driver.wait(LONGEST_RUN_S)

    def finish(self) -> int:
        """Run the command to its end."""
        self.start()
        return self.end()

    def descendants(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.driver.pid).children(recursive=True)
        return []

    def kill(self) -> bool:
        """Kill the driver, and it alone; whether it still worked."""
        self._started += self.descendants()
        is_alive = self.driver.poll() is None
        self.driver.kill()
        self.driver.wait()
        self.look()
        return is_alive

    def forget(self, shard: Path) -> None:
        """Let a shard be written again."""
        del self._seen[shard]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the driver stand still."""
        self.driver.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.driver.send_signal(signal.SIGCONT)

    def look(self) -> None:
        """Remember what is finished now: it must not be written again."""
        self._seen = finished(self.directory) | self._seen

    @property
    def said(self) -> str:
        """What the command printed last time."""
        return self._log.read_text()

    def says(self, words: str) -> bool:
        """Whether the command told the user so, in a line and without a traceback."""
        return words in self.said and "Traceback" not in self.said

    def outcome(self, tried: int, *, ok: bool = True) -> Outcome:
        """The outcome of faults of which this run survived all or none."""
        now = finished(self.directory)
        redone = sum(now.get(shard) != stamps for shard, stamps in self._seen.items())
        lost = rows_lost(self._bench.reference, self.directory)
        _, left = psutil.wait_procs(self._started, timeout=_LEFT_BEHIND_S)
        for process in left:
            print(f"{self.directory}: the killed driver left {process} behind")
        return Outcome(tried, tried if ok and not lost and not left else 0, lost, redone)

    def bury(self) -> None:
        """End whatever this run started."""
        if self.driver.poll() is None:
            self.kill()
        for process in self._started:
            with suppress(psutil.NoSuchProcess):
                process.kill()


# Disks


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A disk of its own, in memory."""
    place.mkdir()
    with mounted("-t", "tmpfs", "-o", f"size={size}", "faults", place):
        yield place


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[None]:
    """Have something mounted; the last argument says where."""
    mount(*arguments)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", arguments[-1]], check=True)


def mount(*arguments: str | Path) -> None:
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotTry(" ".join((getattr(error, "stderr", "") or str(error)).split())) from error
