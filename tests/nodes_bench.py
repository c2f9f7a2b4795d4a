"""How near sweeps by nodes come to the whole grid, on a real model.

`PYTHONPATH=. python tests/nodes_bench.py --model smollm2-135m` prints it. Each grid is
measured whole, then by nodes alone (no neuron is measured again) and by nodes with the rule of `sweep`.
"""

import argparse
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
from rich.console import Console

from flows.show.table import Cell, Number, Table, numbers, texts
from flows.show.text import correlation
from negcore.arrays import Floats
from negcore.datasets import load_facts
from negcore.measure import sweeps
from negcore.measure.loading import load_model
from negcore.measure.quadrature import node_grid
from negcore.measure.sweeps import SweepResult, draw_neurons, shift_grid, sweep


def main() -> None:
    """Print one table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--neurons", type=int, default=90)
    parser.add_argument("--range", type=float, nargs="+", default=[2.0, 10.0], help="By steps of 0.2.")
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 5, 7, 9])
    options = parser.parse_args()
    lm = load_model(options.model)
    facts = load_facts("mini/facts", lm.tokenizer, seed=0).examples[: options.prompts]
    prompts, labels = [fact.prompt for fact in facts], [fact.labels[0] for fact in facts]
    neurons_K2 = draw_neurons(lm.layer_shapes, options.neurons)
    rows: list[list[Cell]] = []
    for largest in options.range:
        shifts_S = shift_grid(largest)

        def take(nodes: int | None = None, shifts_S: Floats = shifts_S) -> SweepResult:
            return sweep(lm, prompts, labels, neurons=neurons_K2, shifts=shifts_S, nodes=nodes)

        whole, whole_s = timed(take)
        rows.append([f"±{largest:g}", "all", *[""] * 5, Number(1, "{:.0%}".format), Number(whole_s, "{:.1f}".format)])
        for nodes in options.nodes:
            n_measured = len(node_grid(shifts_S, nodes).shifts_M)
            with mock.patch.object(sweeps, "_unsettled", lambda grid, changes_KM: np.zeros(len(changes_KM), bool)):
                alone, _ = timed(lambda nodes=nodes, take=take: take(nodes))
            ruled, ruled_s = timed(lambda nodes=nodes, take=take: take(nodes))
            rows.append(row(f"±{largest:g}", nodes, n_measured, whole, alone, ruled, ruled_s))
    titles = ["rows", "flags\nalone", "flags", "r of\nNEGs", "difference", "shifts run", "s"]
    title = f"{options.model}, {len(prompts)} prompts x {options.neurons} neurons"
    caption = "flags: share that is linear or not as in the whole grid; difference: median relative one of NEGs."
    Console(width=100).print(Table("nodes", title, [*texts("range", "nodes"), *numbers(*titles)], [rows], caption))


def timed(take: Callable[[], SweepResult]) -> tuple[SweepResult, float]:
    """Return a sweep and its seconds."""
    start = time.perf_counter()
    return take(), time.perf_counter() - start


def row(
    range_: str, nodes: int, n_measured: int, whole: SweepResult, alone: SweepResult, ruled: SweepResult, ruled_s: float
) -> list[Cell]:
    """Compare a sweep by nodes, without and with the rule, with the whole grid."""
    assert ruled.by_nodes_PK is not None
    moved_PK = whole.negs_PK != 0
    differences = np.abs(ruled.negs_PK / np.where(moved_PK, whole.negs_PK, 1) - 1)[moved_PK]
    run_share = n_measured / len(whole.shifts_S) + 1 - ruled.by_nodes_PK.mean()
    pearson = np.corrcoef(ruled.negs_PK.ravel(), whole.negs_PK.ravel())[0, 1]
    return [
        range_,
        str(nodes),
        Number(n_measured),
        *(Number((one.linear_PK == whole.linear_PK).mean(), "{:.4f}".format) for one in (alone, ruled)),
        Number(pearson, correlation),
        Number(float(np.median(differences)), "{:.0e}".format),
        Number(float(run_share), "{:.0%}".format),
        Number(ruled_s, "{:.1f}".format),
    ]


if __name__ == "__main__":
    main()
