"""The benchmark's figures as tables: in the terminal, and as docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

HEAD = ("what", "unit", "ours", "beside", "its", "ours / its", "goal", "")

INTRODUCTION = """# Benchmarks

<!-- Written by `make bench` (and `make docs`) from bench.json: edit neither this file nor that. -->

```bash parsed
make bench
```

measures all rows below in some half an hour on two quiet cores and writes them here; the raw figures, with the ratio
of every repeat, are in [bench.json](bench.json). `PYTHONPATH=. python tests/bench.py --only NAME` measures some rows
again and leaves the others as they are.

Both sides run in turns in one process, after a first call of each, and medians are compared; rows without a second
side are measured once. Prompts are random tokens in the lengths of datasets, and every NEG is that of all neurons of
SmolLM2-135M in float32 for four options, unless the row says otherwise. Figures of a GPU are in
[results](results.md#on-a-gpu).
"""


def console_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of a group as they are shown in the terminal."""
    table = Table(*HEAD, title=title, title_justify="left")
    for row in rows:
        table.add_row(*cells(row))
    return table


def document(figures: Mapping[str, Any]) -> str:
    """Return docs/benchmarks.md."""
    machine = ", ".join(f"{name} {value}" for name, value in figures["machine"].items())
    goals = [row["met"] for group in figures["groups"].values() for row in group["rows"] if row["met"] is not None]
    parts = [INTRODUCTION, f"Measured on: {machine}.", *[f"Goals: {sum(goals)} of {len(goals)} are met."] * bool(goals)]
    for title, group in figures["groups"].items():
        lines = [HEAD, ["---"] * len(HEAD), *map(cells, group["rows"])]
        parts += [f"## {title}", group["about"], "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row, in the order of `HEAD`."""
    other, ratio = ("" if row[name] is None else number(row[name]) for name in ("other", "ratio"))
    verdict = {True: "met", False: "missed", None: ""}[row["met"]]
    return [row["name"], row["unit"], number(row["ours"]), row["against"], other, ratio, goal(row["goal"]), verdict]


def goal(goal: Mapping[str, Any] | None) -> str:
    """Return a goal in words."""
    if goal is None:
        return ""
    words = "at least" if goal["is_least"] else "at most"
    return f"{words} {number(goal['limit'])}" + ("" if goal["what"] == "ours" else " times")


def number(value: float) -> str:
    """Return a number with three digits, and no fewer than it has before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
