"""What the start and the queue of a run cost, and what the queue keeps busy: `PYTHONPATH=. python tests/pool_bench.py`.

Rows named "start" run the command until its first shard is there. In the others workers sleep, in simulated time where
there are many, so that no model is needed and one core is enough. Each row is a measurement of the code that runs use:
`flows.extraction`, `tasks.measure.missing`, `tasks.pool`. Rows can be chosen by a part of their name; all of them take
some minutes.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import track
from rich.table import Table
from simulated_pool import Numbers, SimulatedPool, SleepingPool, simulated_pool
from simulated_runs import extract, planned_model, receipt, seconds, shard_set
from xxhash import xxh3_128_hexdigest

from negcore.store import publish
from negcore.store.publish import Receipt, checksum, receipt_path, shard_path
from tasks.forecast.needs import missing_shards
from tasks.forecast.shard_size import shard_bytes
from tasks.measure.measurement import Columns
from tasks.measure.missing import measure_missing
from tasks.measure.shard_set import ShardSet
from tasks.pool.base import Jobs, Outcome, Resources
from tasks.steps import Step

T = TypeVar("T")
Figures = dict[str, float]


class OneSplitAtATime(SimulatedPool):
    """Is given one split after the other."""

    calls_at_once = 1


def busy(cls: type[SimulatedPool], n_workers: int) -> Figures:
    """Measure the share of their time that workers compute for MCEval8K's 22 datasets with 3 splits each."""
    pools: list[SimulatedPool] = []

    @contextmanager
    def open_pool(run: Any, card: Any) -> Iterator[SimulatedPool]:
        pool = cls(Resources(workers=n_workers), seconds, answer=receipt)
        pool._n_callers = min(pool.calls_at_once, 64)
        pools.append(pool)
        with closing(pool):
            yield pool

    with tempfile.TemporaryDirectory() as root:
        results = extract(Path(root), [planned_model()], open_pool)
    assert not results.problems, results.problems
    return {"busy, %": 100 * pools[0].share_busy, "shards": sum(one.n_computed for one in results.extracted)}


def sleeping(n_workers: int, n_jobs: int = 4000, job_s: float = 0.1) -> Figures:
    """Measure what a job costs beside its time, with threads that really sleep."""
    pool = SleepingPool(Resources(workers=n_workers), lambda job: job_s)
    began, cpu = time.perf_counter(), time.process_time()
    with closing(pool):
        assert sum(1 for _ in pool.map(Numbers(n_jobs))) == n_jobs
    spent_s = time.perf_counter() - began
    idle_s = spent_s * n_workers - sum(end - begin for begin, end in pool.spans)
    return {
        "ms a shard, driver's CPU": 1000 * (time.process_time() - cpu) / n_jobs,
        "ms a shard, a worker idle": 1000 * idle_s / n_jobs,
        "busy, %": 100 * pool.share_busy,
    }


class Nothing:
    """A worker that does nothing."""

    def run(self, job: int) -> int:
        return job


def actors(n_workers: int, n_jobs: int = 2000) -> Figures:
    """Measure what a job costs that does nothing, with Ray's actors."""
    from tasks.pool.opening import open_pool
    from tasks.pool.ray_session import ray_session

    resources = Resources(workers=n_workers, cpus=0.01, address="local")
    with ray_session("local"):
        from ray import cloudpickle  # where it would be imported earlier, Ray would not know the session's token

        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import the tests
        with open_pool("ray", Nothing, {}, resources, label="nothing") as pool:
            assert sum(1 for _ in pool.map(Numbers(10 * n_workers))) == 10 * n_workers  # all actors are made
            began = time.perf_counter()
            assert sum(1 for _ in pool.map(Numbers(n_jobs))) == n_jobs
            return {"ms a shard": 1000 * (time.perf_counter() - began) / n_jobs}


def large(n_workers: int = 1000, n_shards: int = 1_000_000) -> Figures:
    """Measure how fast a driver hands out the shards of a very large split, and the memory it takes."""
    before_bytes = peak_bytes()
    split = shard_set("simulated", "large", "train", n_shards, 20, shard_rows=1)
    with (
        tempfile.TemporaryDirectory() as root,
        simulated_pool(Resources(workers=n_workers), seconds, answer=receipt) as pool,
    ):
        began, cpu = time.perf_counter(), time.process_time()
        (extracted,) = measure_missing(pool, [split], Path(root), Step())
        spent_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    assert extracted.n_computed == n_shards, extracted
    return {
        "shards": n_shards,
        "shards a second": n_shards / spent_s,
        "shards a second of the driver's CPU": n_shards / cpu_s,
        "driver, MB": peak_bytes() / 1e6,
        "before, MB": before_bytes / 1e6,
        "busy, %": 100 * pool.share_busy,
    }


class _Begun(Exception):  # noqa: N818
    """The first job was made."""


class _FirstJob:
    """A pool that takes one job."""

    def map(self, jobs: Jobs, **options: Any) -> Iterator[Outcome]:
        for _ in jobs:
            raise _Begun
        yield from ()


def resumed(n_finished: int = 500_000) -> Figures:
    """Measure how long the driver of a half-finished run takes to its first job: disk, receipts, checks, queue."""
    split = shard_set("simulated", "large", "train", 2 * n_finished, 20, shard_rows=1)
    run = SimpleNamespace(directory=Path())
    with tempfile.TemporaryDirectory() as root:
        for index in track(range(n_finished), "writing shards", console=Console(stderr=True), transient=True):
            _write(Path(root), split, index)
        run.directory = Path(root)
        times = [(time.perf_counter(), time.process_time())]
        n_bytes = sum(shard_bytes(split, missing_shards(run, split)))  # type: ignore[arg-type]
        times.append((time.perf_counter(), time.process_time()))
        with suppress(_Begun):
            measure_missing(_FirstJob(), [split], Path(root), Step())  # type: ignore[arg-type]
        times.append((time.perf_counter(), time.process_time()))
        files_s = _seconds_of_files(Path(root), split, n_finished)
    assert n_bytes > n_finished
    (began, began_cpu), (planned, planned_cpu), (ended, ended_cpu) = times
    return {
        "finished shards": n_finished,
        "s to the first job": ended - began,
        "s of CPU": ended_cpu - began_cpu,
        "s for the disk's room alone": planned - began,
        "s for reading, hashing and parsing the same files": files_s,
        "ms a finished shard": 1000 * (ended_cpu - planned_cpu) / n_finished,
        "driver, MB": peak_bytes() / 1e6,
    }


def _seconds_of_files(root: Path, split: ShardSet, n_finished: int) -> float:
    """Return how long it takes to read, hash and parse shards and receipts, and to compare nothing."""
    folder, began = split.place.path(root), time.perf_counter()
    for index in range(n_finished):
        json.loads(receipt_path(folder, index).read_bytes())
        content = shard_path(folder, index).read_bytes()
        xxh3_128_hexdigest(content)
        pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)
    return time.perf_counter() - began


def start(*command: str) -> Figures:
    """Measure when a command says its first word, has planned, and has its first shard on disk; then it is ended."""
    figures: Figures = {"load of the machine before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "run", Path(folder) / "log"
        events: dict[str, Callable[[], bool]] = {
            "s to the first line": lambda: log.stat().st_size > 0,
            "s to the plan": lambda: "run directory" in log.read_text(),
        }
        if "--orchestrator" not in command:
            events["s to the Prefect server and Ray"] = lambda: "watch it at" in log.read_text()
        events["s to the first shard"] = lambda: any(out.rglob("_receipts/part-*.json"))
        with log.open("w") as lines:
            began = time.perf_counter()
            arguments = [sys.executable, "-m", "flows.cli", *command, "--out", str(out)]
            process = subprocess.Popen(arguments, stdout=lines, stderr=lines)
        for event, has_come in events.items():
            while not has_come():
                assert process.poll() is None, log.read_text()
                time.sleep(0.02)
            figures[event] = time.perf_counter() - began
        process.send_signal(signal.SIGINT)
        process.wait()
    return figures


def _write(root: Path, split: ShardSet, index: int) -> None:
    """Write a shard and its receipt as `publish_shard` does, but without waiting for the disk."""
    job = split.job(root, index)
    columns: Columns = {
        name: np.zeros((len(job.examples), *type_.shape), type_.dtype)
        for name, type_ in split.measurement.column_types(2).items()
    }
    batch = split.measurement.record_batch(job.examples, columns)
    folder, made_by = split.place.path(root), split.identity
    which: dict[str, Any] = {"index": index, "n_shards": job.n_shards}
    which |= {"digest": made_by.digest, "identity": made_by.comparable(), "versions": made_by.versions}
    receipt_path(folder, index).parent.mkdir(parents=True, exist_ok=True)
    about = {**split.measurement.about(2), "partition": split.place.names, **which}
    path, ids = shard_path(folder, index), batch.column("id").to_pylist()
    publish._write_batch(publish.with_aligned_metadata(batch, publish.canonical_json(about)), path)
    sealed = publish._sealed(
        Receipt(
            **which, n_rows=len(ids), n_bytes=path.stat().st_size, file_xxh3=checksum(path), first_id=ids[0],
            last_id=ids[-1], ids_xxh3=publish.content_digest(ids),
        )
    )  # fmt: skip
    receipt_path(folder, index).write_text(sealed)


def peak_bytes() -> int:
    """Return the most memory that this process had; `getrusage` counts that of the process it was started by, too."""
    (line,) = re.findall(r"(?m)^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text())
    return int(line) * 1024


def in_own_process(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a fresh process, so that memory and threads are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


_SMALL = (
    *("pipeline", "--model", "smollm2-135m", "--dataset", "mini/fact", "--limit", "60"),
    *("--backend", "local", "--orchestrator", "none"),
)  # fmt: skip
ROWS: dict[str, tuple[Callable[..., Figures], tuple[Any, ...]]] = {
    "64 workers, 22 x 3 splits, one queue": (busy, (SimulatedPool, 64)),
    "64 workers, 22 x 3 splits, one after the other": (busy, (OneSplitAtATime, 64)),
    "1 worker that sleeps 0.1 s a shard": (sleeping, (1, 100)),
    "64 workers that sleep 0.1 s a shard": (sleeping, (64,)),
    "1 Ray actor, empty shards": (actors, (1,)),
    "2 Ray actors, empty shards": (actors, (2,)),
    "1,000 workers, a million shards": (large, ()),
    "1,000 workers, a tenth of a million shards": (large, (1000, 100_000)),
    "resuming a million shards, half of them finished": (resumed, ()),
    "resuming 20,000 shards, half of them finished": (resumed, (10_000,)),
    "start of the demo": (start, ("demo",)),
    "start of the demo without Prefect": (start, ("demo", "--orchestrator", "none")),
    "start of a small run in this process, without Prefect": (start, _SMALL),
}


def main() -> None:
    """Measure the rows that are asked for, each in a process of its own, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"parts of names of rows: {'; '.join(ROWS)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    names = [name for name in ROWS if not options.rows or any(part in name for part in options.rows)]
    figures: dict[str, Figures] = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        function, arguments = ROWS[name]
        figures[name] = in_own_process(function, *arguments)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    if options.json:
        print(json.dumps({"machine": machine, "rows": figures}, indent=1))
        return
    table = Table("row", "figures", title=machine)
    for name, of_row in figures.items():
        table.add_row(name, "; ".join(f"{key} {value:,.{3 if value < 10 else 0}f}" for key, value in of_row.items()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
