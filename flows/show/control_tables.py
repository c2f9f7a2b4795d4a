"""Tables of probes beside their controls: permuted answers, and the model with random weights."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from flows.show.accuracy_tables import SHOTS, accuracy_cell, asked, kept, probe_title, short
from flows.show.comparison_tables import listed
from flows.show.table import Block, Cell, Number, Table, by, numbers, texts
from flows.show.text import bare, change, count, share
from tasks.controls import ControlRow
from tasks.probe import AccuracyRow

_CAPTION = (
    "Permuted: the probe fitted on {}, test as it is. p: share of permutations, this fit among them, that answer test "
    "as well. Random weights: the probe fitted on an untrained model of the same configuration. "
    "Above: accuracy less the better of the two controls. Below: 95 % interval (Wilson)."
)


class _Beside(NamedTuple):
    """An accuracy, and those of its controls."""

    score: AccuracyRow
    permuted: Sequence[ControlRow]
    random: Sequence[ControlRow]

    @property
    def mean(self) -> float | None:
        """Mean accuracy with permuted answers; None for LM-Prob, which is not fitted."""
        return sum(one.accuracy for one in self.permuted) / len(self.permuted) if self.permuted else None

    @property
    def p(self) -> float:
        as_good = sum(one.n_correct >= self.score.n_correct for one in self.permuted)
        return (1 + as_good) / (1 + len(self.permuted))

    @property
    def above(self) -> float:
        """Difference to the better control."""
        known = [one for one in (self.mean, *(one.accuracy for one in self.random)) if one is not None]
        return self.score.accuracy - max(known)

    @property
    def is_clear(self) -> bool:
        """True if the intervals of accuracy and random weights do not meet, and no permutation is as good."""
        return all(self.score.low > one.high for one in self.random) and all(
            one.n_correct < self.score.n_correct for one in self.permuted
        )


def control_tables(controls: Sequence[ControlRow], scores: Sequence[AccuracyRow]) -> Iterator[Table]:
    """Return a table for every model and number of demonstrations: a probe a row, beside its controls."""
    known = {(one.model, one.shots, one.dataset, one.probe): one for one in scores if not one.group}
    rows = by([row for row in controls if _key(row) in known], "model")
    for of_model in rows.values():
        for of_shots in by(of_model, "shots").values():
            yield _table(of_shots, known)


def _key(row: ControlRow) -> tuple[str, int, str, str]:
    return row.model, row.shots, row.dataset, row.probe


def _table(rows: Sequence[ControlRow], known: Mapping[tuple[str, int, str, str], AccuracyRow]) -> Table:
    found = {
        dataset: [_beside(known[_key(of_probe[0])], of_probe) for of_probe in by(of_dataset, "probe").values()]
        for dataset, of_dataset in by(rows, "dataset").items()
    }
    n_draws = max((row.draw + 1 for row in rows if row.control == "permuted answers"), default=0)
    titles = ("accuracy", "permuted\nmean", "permuted\nhighest", "p", "random\nweights", "above")
    return Table(
        key=f"controls-{rows[0].model}-{SHOTS[rows[0].shots]}",
        title=f"Probes beside their controls: {asked(rows[0].model, rows[0].shots)}",
        columns=[*texts("dataset", "probe"), *numbers(*titles)],
        blocks=[_block(short(dataset), of_dataset) for dataset, of_dataset in found.items()],
        caption=_CAPTION.format(count(n_draws, "permutation") + " of the training and validation answers"),
        says=_says(found),
    )


def _beside(score: AccuracyRow, rows: Sequence[ControlRow]) -> _Beside:
    by_control = by(rows, "control")
    return _Beside(score, by_control.get("permuted answers", []), by_control.get("random weights", []))


def _block(name: str, found: Sequence[_Beside]) -> Block:
    return [["" if at else name, probe_title(one.score.probe), *_cells(one)] for at, one in enumerate(found)]


def _cells(one: _Beside) -> list[Cell]:
    score = one.score
    accuracy = accuracy_cell(score, "" if score.n_neurons is None else kept(score.n_neurons))
    mean = one.mean
    permuted: list[Cell] = ["-"] * 3
    if mean is not None:
        highest = max(row.accuracy for row in one.permuted)
        permuted = [Number(mean, share), Number(highest, share), Number(one.p, lambda p: bare(f"{p:.2g}"))]
    random = accuracy_cell(one.random[0]) if one.random else "-"
    return [accuracy, *permuted, random, Number(one.above, change, "bold" if one.is_clear else "")]


def _says(found: Mapping[str, Sequence[_Beside]]) -> str:
    """Return on how many datasets each probe is clearly above both controls."""
    clear: dict[str, list[bool]] = {}
    for one in (one for of_dataset in found.values() for one in of_dataset if one.score.probe != "lm"):
        clear.setdefault(probe_title(one.score.probe), []).append(one.is_clear)
    counts = [f"{probe} on {sum(of_probe)} of {len(of_probe)}" for probe, of_probe in clear.items()]
    rule = "the interval above that of random weights, and no permutation as good"
    return f"Clear of both controls, by dataset ({rule}): {listed(counts)}." if counts else ""
