"""Tables of what probes add to the model's own answer, at most 100 columns wide in a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flows.show.accuracy_tables import SHOTS, asked, named_target, probe_title, short
from flows.show.comparison_tables import TOLD_APART, listed, p_value
from flows.show.table import Block, Cell, Column, Number, Table, Words, by, numbers, texts
from flows.show.text import bare, count, share
from tasks.beyond_lm import BeyondRow

_CAPTION = (
    "Right: the probe's accuracy. Only: share of the test rows that one of the two answers right and the other wrong. "
    "cal.: LM-Prob calibrated on the training rows (logistic regression on the logarithms of the options' "
    "probabilities). p: exact McNemar test, two-sided, not corrected for the number of lines; in bold where it is at "
    f"most {bare(f'{TOLD_APART}')} and the probe is the better one."
)


def beyond_tables(rows: Sequence[BeyondRow]) -> Iterator[Table]:
    """Return a table for every model and number of demonstrations: a probe of a dataset a row."""
    for of_model in by(rows, "model").values():
        for of_shots in by(of_model, "shots").values():
            first = of_shots[0]
            yield Table(
                key=f"beyond-lm-{first.model}-{SHOTS[first.shots]}",
                title=f"What probes add to the model's own answer: {asked(first.model, first.shots, first.target)}",
                columns=_columns("dataset", "probe"),
                blocks=[_block(short(name), of_dataset) for name, of_dataset in by(of_shots, "dataset").items()],
                caption=_CAPTION,
                says=_says(of_shots),
            )


def beyond_comparison(runs: Mapping[str, Sequence[BeyondRow]]) -> Table:
    """Return the same of several runs, such as those of several targets, where two of them have a dataset."""
    blocks: list[Block] = []
    questions = _questions(runs)
    several = len({key[:2] for key in questions}) > 1
    for (model, shots, dataset), by_run in questions.items():
        if len(by_run) > 1:
            question = Words(short(dataset), "bold"), Words(f"\n{asked(model, shots)}" if several else "", "dim")
            rows = (_block(_run_name(name, own[0]), own) for name, own in by_run.items())
            blocks.append([[question], *(row for of_run in rows for row in of_run)])
    title = "What probes add to the model's own answer, run by run"
    return Table("beyond-lm-runs", title, _columns("dataset\nrun", "probe"), blocks, _CAPTION)


def beyond_compared(runs: Mapping[str, Sequence[BeyondRow]]) -> list[dict[str, Any]]:
    """Return the rows of `beyond_comparison` for other programs, with the run's name first."""
    found = (by_run for by_run in _questions(runs).values() if len(by_run) > 1)
    return [{"run": name} | asdict(one) for by_run in found for name, own in by_run.items() for one in own]


def _questions(
    runs: Mapping[str, Sequence[BeyondRow]],
) -> dict[tuple[str, int, str], dict[str, list[BeyondRow]]]:
    questions: dict[tuple[str, int, str], dict[str, list[BeyondRow]]] = {}
    for name, rows in runs.items():
        for row in rows:
            questions.setdefault((row.model, row.shots, row.dataset), {}).setdefault(name, []).append(row)
    return questions


def _run_name(name: str, row: BeyondRow) -> Cell:
    return f"  {name}", Words(named_target(row.target, "\n  "), "dim")


def _columns(*names: str) -> list[Column]:
    beside_lm = ("right", "LM-\nProb", "only\nprobe", "only\nLM", "p")
    return [*texts(*names), *numbers(*beside_lm, "cal.", "only\nprobe", "only\ncal.", "p")]


def _block(name: Cell, rows: Sequence[BeyondRow]) -> Block:
    return [["" if at else name, probe_title(row.probe), *_cells(row)] for at, row in enumerate(rows)]


def _cells(row: BeyondRow) -> list[Cell]:
    beside_lm = row.accuracy, row.lm, row.only_probe, row.only_lm
    beside_calibrated = row.calibrated, row.only_probe_not_calibrated, row.only_calibrated
    return [
        *(Number(value, share) for value in beside_lm),
        _p_cell(row.p, row.accuracy > row.lm),
        *(Number(value, share) for value in beside_calibrated),
        _p_cell(row.p_calibrated, row.accuracy > row.calibrated),
    ]


def _p_cell(p: float, is_better: bool) -> Cell:
    return Number(p, p_value, "bold" if is_better and p <= TOLD_APART else "")


def _says(rows: Sequence[BeyondRow]) -> str:
    """Return on how many datasets each probe adds something to calibrated LM-Prob."""
    counts = []
    for probe, own in by(rows, "probe").items():
        adds = sum(row.accuracy > row.calibrated and row.p_calibrated <= TOLD_APART for row in own)
        counts.append(f"{probe_title(probe)} on {adds} of {count(len(own), 'dataset')}")
    return f"Better than calibrated LM-Prob (p at most {bare(f'{TOLD_APART}')}): {listed(counts)}."
