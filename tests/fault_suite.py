"""What runs survive: each fault is done to real runs, and what these leave behind is compared with an undisturbed run.

`make faults` prints a line for each fault: how often it was tried and survived, rows lost (missing, or other bytes than
one undisturbed worker writes), and finished shards that were written again. Models are tiny and random; drivers, Ray
actors, nodes, disks and the Prefect server are real.
"""

import argparse
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import psutil
import transformers
from clusters import ray_cluster
from fault_bench import (
    LOCAL,
    N_SHARDS,
    RAY,
    Bench,
    CannotTry,
    Files,
    Outcome,
    Run,
    mount,
    published,
    rows_lost,
    small_disk,
    write_rows,
)
from fault_hosts import host_lost, link_cut
from fault_moved import moved_directory
from fault_preemption import preemptions
from fault_prefect import lost_prefect_server, lost_server_of_deployed_run, lost_server_of_served_run
from fault_shards import cuts, flips, foreign_shards, swapped_shards, wrong_answers
from fault_slurm import slurm_time_limit
from fault_weights import flipped_bucket, flipped_conversion, flipped_weights
from faults import FaultyWorker, by_value
from rich.console import Console
from rich.table import Table

from flows.pipeline import run_extract
from negcore.store.publish import receipts
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.measure.worker import ModelWorker
from tasks.plan import plan
from tasks.pool.ray_session import ray_session
from tasks.rundir.layout import shard_folders
from tasks.steps import PlainSteps

# Killed processes


def actor_kills(bench: Bench) -> Outcome:
    run = Run(bench, bench.home / "actors", *RAY)
    run.start()
    kills = 0
    for n_shards in bench.shard_counts(10):
        actors: list[psutil.Process] = []
        while run.wait_for(n_shards) and not actors:
            actors = [process for process in run.descendants() if is_actor(process)]
        run.look()
        with suppress(IndexError, psutil.NoSuchProcess):  # the run came to its end
            bench.random.choice(actors).kill()
            kills += 1
    return run.outcome(kills, ok=run.end() == 0)


def is_actor(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.name().startswith("ray::_Host")
    return False


def node_kills(bench: Bench) -> Outcome:
    with ray_cluster(2) as cluster:
        run = Run(bench, bench.home / "nodes", *RAY, RAY_ADDRESS=cluster.address)
        run.start()
        kills = 0
        for n_shards in bench.shard_counts(3):
            if run.wait_for(n_shards):
                run.look()
                node = bench.random.choice(sorted(cluster.worker_nodes, key=lambda node: node.unique_id))
                with run.paused():  # it takes seconds, in which the other node would do all that is left
                    cluster.remove_node(node, allow_graceful=False)
                    cluster.add_node(num_cpus=1)
                kills += 1
        return run.outcome(kills, ok=run.end() == 0)


def driver_kills(bench: Bench) -> Outcome:
    return _driver_kills(bench, 15, *LOCAL) + _driver_kills(bench, 5, *RAY)


def _driver_kills(bench: Bench, count: int, *options: str) -> Outcome:
    """Kill one run again and again: a quarter of the times while it starts, else as its work proceeds."""
    run = Run(bench, bench.home / f"drivers-{options[1]}", *options)
    kills, start_s = 0, 0.0
    for n_shards in bench.shard_counts(count):
        started_at = time.monotonic()
        run.start()
        if start_s and bench.random.random() < 0.25:
            time.sleep(bench.random.uniform(0, start_s))
        else:
            run.wait_for(n_shards)
            start_s = start_s or time.monotonic() - started_at
        kills += run.kill()
    return run.outcome(kills, ok=run.finish() == 0)


# Disks


def full_disk(bench: Bench) -> Outcome:
    """A disk that is too small from the start, then one that fills up in the middle of the run."""
    with small_disk(bench.home / "small", "128k") as disk:
        run = Run(bench, disk / "full", *RAY)
        refused = run.finish() == 2 and run.says("the run does not fit")
        mount("-o", "remount,size=16m", disk)
        run.start()
        run.wait_for(N_SHARDS // 4)
        with run.paused():
            fill(disk / "ballast")
        ended = run.end() == 1 and run.says("No space left on device")
        run.look()
        (disk / "ballast").unlink()
        return run.outcome(2, ok=run.finish() == 0 and refused and ended)


def fill(file: Path) -> None:
    """Leave no room on the disk."""
    with suppress(OSError), file.open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


def read_only_directory(bench: Bench) -> Outcome:
    """A disk that cannot be written to from the start, then one that becomes so in the middle of the run."""
    with small_disk(bench.home / "locked", "16m") as disk:
        run = Run(bench, disk / "read-only", *LOCAL)
        mount("-o", "remount,ro", disk)
        refused = run.finish() == 2 and run.says("cannot be written: Read-only file system")
        mount("-o", "remount,rw", disk)
        run.start()
        while run.wait_for(N_SHARDS // 4):
            with run.paused():
                if is_locked(disk):
                    break
        ended = run.end() == 1 and run.says("Read-only file system")
        run.look()
        mount("-o", "remount,rw", disk)
        return run.outcome(2, ok=run.finish() == 0 and refused and ended)


def is_locked(disk: Path) -> bool:
    """Make a disk read-only, which fails as long as a file is being written."""
    with suppress(CannotTry):
        mount("-o", "remount,ro", disk)
        return True
    return False


# Rows


def poison_rows(bench: Bench) -> Outcome:
    return _rows_at_fault(bench, "!die", "!kill")


def hang(bench: Bench) -> Outcome:
    return _rows_at_fault(bench, "!hang", job_timeout_s=20)


def _rows_at_fault(bench: Bench, *words: str, **limits: float) -> Outcome:
    """Rows that do something to their actor are set aside and named, and all others are as if these were not there."""
    place = bench.home / words[0].strip("!")
    chosen = dict(zip(bench.random.sample(range(18), len(words)), words, strict=True))
    rows = write_rows(place.with_suffix(".jsonl"), 18, chosen)
    values = {"model": [str(bench.model)], "dataset": [str(rows)], "shard_rows": 2, "workers": 2, **limits}
    run = read_run_file(SkillRun, None, values | {"out": place})
    with ray_session(), patch("tasks.measure.worker.ModelWorker", FaultyWorker):
        by_value()
        first, again = run_extract(run, PlainSteps()), run_extract(run, PlainSteps())
    splits = plan(run)[0].datasets[0].splits
    examples = [example for split in splits for example in split.examples]
    at_fault = {example.id for example in examples if any(word in example.prompt for word in words)}
    set_aside = {row.id for split in splits for one in receipts(split.place.path(place)) for row in one.set_aside}
    lost = rows_lost(_undisturbed(run, at_fault), place) + len(set_aside - at_fault)
    survived = 0 if first.problems or again.problems else len(set_aside & at_fault)
    return Outcome(len(words), survived, lost, sum(part.n_computed for part in again.extracted))


def _undisturbed(run: SkillRun, at_fault: set[str]) -> Files:
    """What one worker writes that knows which rows to leave out; the reasons are those that the run found."""
    reasons = {
        row.id: row for folder in shard_folders(run.directory) for one in receipts(folder.path) for row in one.set_aside
    }

    class Told(ModelWorker):
        def run(self, job):
            left_out = [reasons[row.id] for row in job.examples if row.id in at_fault and row.id in reasons]
            return super().run(job.without(left_out))

    twin = run.model_copy(update={"out": run.directory.with_name(f"{run.directory.name}-twin"), "backend": "local"})
    with patch("tasks.measure.worker.ModelWorker", Told):
        assert not run_extract(twin, PlainSteps()).problems
    return published(twin.directory)


FAULTS: dict[str, Callable[[Bench], Outcome]] = {
    "actor kills": actor_kills,
    "node kills": node_kills,
    "preemptions": preemptions,
    "driver kills": driver_kills,
    "cuts": cuts,
    "flipped bits": flips,
    "flipped bits in weights": flipped_weights,
    "flipped bits in a converted model": flipped_conversion,
    "flipped bits in a bucket": flipped_bucket,
    "foreign shards": foreign_shards,
    "swapped shards": swapped_shards,
    "wrong answers": wrong_answers,
    "full disk": full_disk,
    "read-only directory": read_only_directory,
    "poison rows": poison_rows,
    "hang": hang,
    "lost Prefect server": lost_prefect_server,
    "lost server of a served run": lost_server_of_served_run,
    "lost server of a deployed run": lost_server_of_deployed_run,
    "Slurm time limit": slurm_time_limit,
    "directory moved": moved_directory,
    "host lost": host_lost,
    "link cut": link_cut,
}


def table_of(outcomes: Mapping[str, tuple[Outcome, float]]) -> Table:
    table = Table("fault", title="Faults")
    for name in ("tried", "survived", "rows lost", "finished work redone", "seconds"):
        table.add_column(name, justify="right")
    for name, (outcome, seconds) in outcomes.items():
        if outcome.not_tried:
            table.add_row(name, f"not tried: {outcome.not_tried}")
        else:
            numbers = (outcome.tried, outcome.survived, outcome.rows_lost, outcome.redone)
            table.add_row(name, *map(str, numbers), f"{seconds:.0f}", style=None if outcome.is_clean else "red")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=FAULTS, help="A fault; may be given several times.")
    parser.add_argument("--seed", type=int, default=0, help="Of everything that is chosen at random.")
    arguments = parser.parse_args()
    console = Console()
    home = Path(tempfile.mkdtemp(prefix="nf-", dir="/tmp"))  # Ray's sockets need a short path
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # lost workers are what is wanted here
    bench = Bench(home, arguments.seed)
    outcomes: dict[str, tuple[Outcome, float]] = {}
    try:
        for name in arguments.only or FAULTS:
            started_at = time.monotonic()
            try:
                outcome = FAULTS[name](bench)
            except CannotTry as reason:
                outcome = Outcome(0, 0, not_tried=str(reason))
            except Exception:
                console.print_exception()
                outcome = Outcome(1, 0)
            outcomes[name] = (outcome, time.monotonic() - started_at)
            console.print(f"{name}: {outcome.survived} of {outcome.tried} survived", highlight=False)
    finally:
        for run in bench.runs:
            run.bury()
    console.print(table_of(outcomes))
    if not all(outcome.is_clean for outcome, _ in outcomes.values()):
        console.print(f"not every fault was survived: see {home}")
        sys.exit(1)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
