"""Time the engine, the shards, the probes and the queue beside their plain twins on this machine's CPU: `make bench`.

Both sides run in turns in one process, and the medians' ratio is what counts. The figures are written as JSON after
every row, and at the end as docs/benchmarks.md if they are docs/bench.json. `--only` measures some rows again and
leaves the others in the file as they are.
"""

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import bench_engine
import bench_runs
import bench_store
import torch
import transformers
from bench_rows import Item, Setting
from bench_tables import console_table, document
from rich.console import Console

DOCS = Path(__file__).parents[1] / "docs"
PACKAGES = ("torch", "transformers", "numpy", "pyarrow", "scikit-learn", "ray")


class Group(NamedTuple):
    """Rows that belong together."""

    items: Callable[[Setting], Iterator[Item]]
    about: str


GROUPS: Mapping[str, Group] = {
    "NEGs": Group(
        bench_engine.negs,
        "A forward pass is SDPA without gradients, one prompt after the other: of own tokens after a copy of the "
        "shared prefix's cache, or of whole prompts. Autograd takes one backward pass over the whole prompt for each "
        "of the four options. Ours keeps the shared prefix from call to call, as a worker does from shard to shard.",
    ),
    "Sweeps": Group(bench_engine.sweeps, "One prompt of 40 tokens, neurons of all layers, shifts from -2 to 2 by .2."),
    "Growth": Group(
        bench_engine.growth,
        "One thing grows at a time, from 8 prompts with 16 shared and 86 own tokens and four options. Layers (of 1,024 "
        "neurons) and neurons (in 8 layers) are those of random models of width 256.",
    ),
    "Shards": Group(
        bench_store.shards, "32 rows of SmolLM2-135M's shape, all values; the plain file has as many bytes (28 MiB)."
    ),
    "Rankings and probes": Group(
        bench_store.probes,
        "Random numbers in Llama-2-7B's shape with four options, each row measured once. Four shards of 32 rows are "
        "written and come again and again, so that they are in memory: 31 GiB of NEGs are read, and no disk is "
        "measured. Random numbers are the worst case of a forest, whose trees grow to single rows.",
    ),
    "Workers": Group(
        bench_runs.workers, "The same shards of 8 prompts of some 50 tokens each, with the model loaded, once."
    ),
    "Queue": Group(
        bench_runs.queue,
        "What handing out shards costs. Workers sleep: threads for real, those of the larger rows in simulated time, "
        "which stands still while the driver computes. Finished shards of the last row hold one row of a model with "
        "one neuron, so that it is the driver's work for a shard that counts; larger ones cost the reading of their "
        "bytes besides. A minute for half a million of them is .12 ms. What its files alone do not take is the "
        "comparing of receipt, shard and dataset, in Python and one thread: several would wait for each other.",
    ),
    "Start": Group(
        bench_runs.start,
        "From the command to its first line and its first shard on the disk. Its packages alone are a Prefect server "
        "that answers, Ray, and two actors that have imported torch and transformers, with nothing of ours: where that "
        "takes as long as the goal, no demo can meet it, which plans, loads a model and computes a shard besides.",
    ),
    "Memory": Group(
        bench_runs.memory,
        "Anonymous memory of one local worker in a process of its own, that of the driver included. Pages of weights "
        "that are being read come on top for as long as that takes; the system drops them where memory is short.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="part of the name of a group or of rows; several are possible")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few rows: tries the script alone")
    parser.add_argument("--out", type=Path, default=DOCS / "bench.json", help="file for the figures")
    args = parser.parse_args()
    if args.tiny and args.out == DOCS / "bench.json":
        parser.error("--tiny measures nothing that the documents could show: give another --out")
    torch.set_num_threads(args.threads)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), args.repeats, args.threads, args.tiny)
        figures = measure(setting, console, args.out, args.only or [""])
    for title, group in figures["groups"].items():
        console.print(console_table(title, group["rows"]))
    if args.out == DOCS / "bench.json":
        (DOCS / "benchmarks.md").write_text(document(figures), encoding="utf-8")


def measure(setting: Setting, console: Console, out: Path, only: list[str]) -> dict[str, Any]:
    """Measure the rows that are asked for, write the figures after each, and return them all."""
    todo = [
        (title, item)
        for title, group in GROUPS.items()
        for item in group.items(setting)
        if any(part in f"{title}: {item.name}" for part in only)
    ]
    if not todo:
        sys.exit(f"--only {' '.join(only)}: no row has this in its name; groups are {', '.join(GROUPS)}")
    about = machine(setting)
    earlier = json.loads(out.read_text()) if out.exists() and only != [""] else {"machine": about, "groups": {}}
    if earlier["machine"] != about:
        sys.exit(f"{out} holds figures of {earlier['machine']}, and this is {about}: give another --out")
    found = {title: _by_name(earlier["groups"].get(title, {}).get("rows", ())) for title in GROUPS}
    figures: dict[str, Any] = {}
    for number, (title, item) in enumerate(todo, 1):
        console.print(f"{number} of {len(todo)}: {title}: {item.name}", highlight=False)
        began = time.perf_counter()
        found[title] |= _by_name(row.record() for row in item.measure())
        console.print(f"    {time.perf_counter() - began:.1f} s", highlight=False)
        filled = {name: list(rows.values()) for name, rows in found.items() if rows}
        groups = {name: {"about": GROUPS[name].about, "rows": rows} for name, rows in filled.items()}
        figures = {"machine": about, "groups": groups}
        out.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _by_name(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["name"], row["against"]): row for row in rows}


def machine(setting: Setting) -> dict[str, str]:
    """Return what the figures depend on."""
    cpu = re.search(r"(?m)^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text())
    about = {
        "CPU": cpu[1] if cpu else platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(setting.threads),
    }
    return about | {"Python": platform.python_version()} | {name: version(name) for name in PACKAGES}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
