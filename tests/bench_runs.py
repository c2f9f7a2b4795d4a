"""Rows of whole runs: workers beside the computing itself, the queue, memory beside the plan."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import pool_bench
import torch
from anonymous_memory import Peak
from bench_rows import Goal, Item, Row, Setting, seconds
from pool_bench import Figures, in_own_process
from support import save_tiny_model

from flows.pipeline import run_extract
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.forecast.needs import forecast
from tasks.measure.shard_set import ShardJob
from tasks.measure.worker import model_pool
from tasks.plan import plan
from tasks.pool.base import Pool
from tasks.pool.ray_session import ray_session
from tasks.steps import PlainSteps

WORDS = ("best", "times", "worst", "season", "light", "capital", "France", "river", "which", "one", "two", "three")
_STARTS = 3
HERE = ("--backend", "local", "--orchestrator", "none")


def a_run(setting: Setting, name: str, n_prompts: int, n_words: int, **settings: Any) -> SkillRun:
    """Return a run on made-up prompts in a directory of its own, by one thread a worker."""
    model = setting.model
    if setting.tiny:
        model = str(save_tiny_model("llama", setting.folder / "tiny", n_positions=4096))
    rng, file = random.Random(0), setting.folder / f"{name}.jsonl"
    rows = [
        {"prompt": f"{index}: {' '.join(rng.choices(WORDS, k=n_words))}, answer:", "labels": [" A", " B", " C", " D"],
         "answer": index % 4, "split": ("train", "valid", "test")[(index < 8) + (index < 4)]}
        for index in range(n_prompts)
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    values = {"model": [model], "dataset": [str(file)], "out": str(setting.folder / name), "cpus": 1}
    return read_run_file(SkillRun, None, values | settings)


# Workers


def workers(setting: Setting) -> Iterator[Item]:
    """Compare one and two actors with one worker in the driver's own process, on the same shards."""
    yield Item("local, 1 and 2 actors", partial(_worker_rows, setting))


def _worker_rows(setting: Setting) -> list[Row]:
    n_prompts, n_words, shard_rows = (16, 2, 2) if setting.tiny else (192, 40, 8)
    times: dict[str, float] = {}
    with ExitStack() as session:
        for name, backend, n_workers in (("local", "local", 1), ("1 actor", "ray", 1), ("2 actors", "ray", 2)):
            if backend == "ray" and n_workers == 1:
                session.enter_context(ray_session("local"))
            run = a_run(setting, name, n_prompts, n_words, backend=backend, workers=n_workers, shard_rows=shard_rows)
            times[name] = _seconds_of_jobs(run) / n_prompts
    torch.set_num_threads(setting.threads)  # the local worker sets its own
    return [
        Row(f"{name}, one thread each", "s a prompt", times[name], "local", times["local"], [], Goal(limit))
        for name, limit in (("1 actor", 1.05), ("2 actors", 0.55))
    ]


def _seconds_of_jobs(run: SkillRun) -> float:
    """Return how long all shards of a run take, once every worker has measured some."""
    (model,) = plan(run)
    splits = [split for dataset in model.datasets for split in dataset.splits]
    jobs = [split.job(run.directory, index) for split in splits for index in range(len(split.shards))]
    with model_pool(run, model.card) as pool:
        _run(pool, list(islice(jobs, 2 * run.resources.workers)))
        return seconds(partial(_run, pool, jobs))


def _run(pool: Pool, jobs: list[ShardJob]) -> None:
    failed = [outcome.error for outcome in pool.map(jobs) if outcome.exception is not None]
    assert not failed, failed[0]


# The queue


def queue(setting: Setting) -> Iterator[Item]:
    """Measure what handing out shards costs, with workers that sleep, really or in simulated time."""
    tiny = setting.tiny
    for n_workers in (1, 2) if tiny else (1, 2, 4, 8, 16, 32, 64):
        yield Item(f"{n_workers} sleeping workers", partial(_sleeping_rows, n_workers, tiny))
    for n_actors in () if tiny else (1, 2):
        yield Item(f"{n_actors} Ray actors with nothing to do", partial(_actor_rows, n_actors))
    yield Item("64 workers, 22 x 3 splits", partial(_busy_rows, 2 if tiny else 64))
    yield Item("1,000 workers, a million shards", partial(_large_rows, *((10, 200) if tiny else (1000, 1_000_000))))
    yield Item("resuming a run", partial(_resumed_rows, 50 if tiny else 20_000))


def _figures(function: Any, *args: Any) -> Figures:
    return in_own_process(function, *args)


def _sleeping_rows(n_workers: int, tiny: bool) -> list[Row]:
    job_s = 0.01 if tiny else 0.1
    figures = _figures(pool_bench.sleeping, n_workers, 20 if tiny else min(4000, 60 * n_workers), job_s)
    name = f"{n_workers} workers that sleep {job_s} s a shard"
    return [Row(f"{name}: a worker idle", "ms a shard", figures["ms a shard, a worker idle"], goal=Goal(3, "ours"))]


def _actor_rows(n_actors: int) -> list[Row]:
    figures = _figures(pool_bench.actors, n_actors)
    return [Row(f"{n_actors} Ray actors, empty shards", "ms a shard", figures["ms a shard"], goal=Goal(3, "ours"))]


def _busy_rows(n_workers: int) -> list[Row]:
    figures = _figures(pool_bench.busy, pool_bench.SimulatedPool, n_workers)
    return [Row(f"{n_workers} workers, 22 x 3 splits: busy", "%", figures["busy, %"], goal=Goal(95, "ours", True))]


def _large_rows(n_workers: int, n_shards: int) -> list[Row]:
    figures = _figures(pool_bench.large, n_workers, n_shards)
    name = f"{n_workers:,} simulated workers, {n_shards:,} shards"
    return [
        Row(f"{name}: handed out", "shards a second", figures["shards a second"], goal=Goal(2000, "ours", True)),
        Row(f"{name}: driver's memory", "MB", figures["driver, MB"], goal=Goal(2000, "ours")),
    ]


def _resumed_rows(n_finished: int) -> list[Row]:
    figures = _figures(pool_bench.resumed, n_finished)
    name = f"run of {2 * n_finished:,} shards, half of them finished: to the first job"
    ours, files = (
        1000 * figures[f"s {what}"] / n_finished
        for what in ("to the first job", "for reading, hashing and parsing the same files")
    )
    goal = Goal(0.12, "ours")  # a minute for half a million
    return [Row(name, "ms a finished shard", ours, "files read, hashed and parsed, nothing compared", files, goal=goal)]


# Starting


def start(setting: Setting) -> Iterator[Item]:
    """Time what commands do until their first shard is there, the demo beside the start of its packages alone."""
    small: tuple[str, ...] = ("--model", "smollm2-135m", "--dataset", "mini/fact", "--limit", "60")
    if setting.tiny:
        run = a_run(setting, "start", 12, 2)
        small = ("--model", *run.model, "--dataset", *run.dataset)
    else:
        yield Item("the demo", _demo_rows)
    name = "60 rows in this process, no Prefect"
    yield Item("a small run", partial(_start_rows, name, ("pipeline", *small, *HERE), {}))


def _demo_rows() -> list[Row]:
    goals = {"first line": Goal(1, "ours"), "first shard": Goal(15, "ours")}
    *before, first_shard = _start_rows("demo", ("demo",), goals)
    packages_s = median(_packages_start_s() for _ in range(_STARTS))
    return [*before, first_shard._replace(against="start of its packages alone", other=packages_s)]


def _start_rows(name: str, command: tuple[str, ...], goals: Mapping[str, Goal]) -> list[Row]:
    figures = [pool_bench.start(*command) for _ in range(_STARTS)]
    events = [event for event in figures[0] if event.startswith("s to the ")]
    return [
        Row(f"{name}: {what}", "s", median(one[event] for one in figures), goal=goals.get(what))
        for event in events
        for what in [event.removeprefix("s to the ")]
    ]


def _packages_start_s() -> float:
    """Return how long it takes until all packages are there that the demo starts."""
    began = time.perf_counter()
    script = Path(__file__).with_name("packages_start.py")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return time.perf_counter() - began


# Memory


def memory(setting: Setting) -> Iterator[Item]:
    """Compare the most anonymous memory that a worker had with what the plan says."""
    for name, n_words, shard_rows in (("short", 20, 32), ("long", 300, 32), ("large shards", 20, 128)):
        n_prompts = shard_rows + 8
        if setting.tiny:
            n_words, n_prompts, shard_rows = 2, 12, 4
        run = a_run(setting, f"memory of {name}", n_prompts, n_words, backend="local", shard_rows=shard_rows)
        yield Item(f"memory, {name}", partial(_memory_rows, run, name))


def _memory_rows(run: SkillRun, name: str) -> list[Row]:
    planned_bytes, most_bytes = in_own_process(_memory_of, run)
    gibibytes, title = 2**30, f"{name} prompts, shards of {run.shard_rows}: most memory"
    return [Row(title, "GiB", most_bytes / gibibytes, "neg plan", planned_bytes / gibibytes, [], Goal(1.0))]


def _memory_of(run: SkillRun) -> tuple[int, int]:
    """Return the bytes that the plan says a worker needs, and the most that a process with one had."""
    models = plan(run)
    (needs,) = forecast([(run, models)])
    peak = Peak()
    results = run_extract(run, PlainSteps())
    assert not results.problems, results.problems
    return needs.host_bytes + needs.device_bytes, peak.end()
