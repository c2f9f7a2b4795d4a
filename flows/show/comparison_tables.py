"""Sentences on which probes can be told apart, at most 100 columns wide in a terminal."""

from collections.abc import Iterator, Sequence

from flows.show.accuracy_tables import SHOTS, asked, probe_title, short
from flows.show.table import Cell, Table, by, lines, numbers, texts
from flows.show.text import bare, count, share
from tasks.comparisons import ComparisonRow

TOLD_APART = 0.05
"""Two probes are told apart if the corrected p of their difference is at most this."""
_NAMED = 4
"""So many pairs that cannot be told apart are named; of more, the one with the smallest p."""
_CAPTION = (
    "Exact McNemar test, two-sided, on the rows that one of two probes answered right and the other wrong, which are "
    "taken as independent; p is corrected for {} by Holm's method{}. Told apart: p at most {}."
)
_OVER_ALL = ", over all datasets for their number there"


def comparison_tables(comparisons: Sequence[ComparisonRow]) -> Iterator[Table]:
    """Return a table for every model and number of demonstrations: a dataset a row, and all of them in the last."""
    for of_model in by(comparisons, "model").values():
        for of_shots in by(of_model, "shots").values():
            yield _table(of_shots)


def _table(rows: Sequence[ComparisonRow]) -> Table:
    first, by_dataset = rows[0], by(rows, "dataset")
    number = count(first.n_comparisons, "comparison")
    return Table(
        key=f"comparisons-{first.model}-{SHOTS[first.shots]}",
        title=f"Probes compared on the same test rows: {asked(first.model, first.shots)}",
        columns=[*texts("dataset"), *numbers("rows"), *texts("which can be told apart")],
        blocks=[[_dataset_row(of_dataset) for of_dataset in by_dataset.values()]],
        caption=_CAPTION.format(number, _OVER_ALL if "" in by_dataset else "", bare(f"{TOLD_APART}")),
    )


def _dataset_row(rows: Sequence[ComparisonRow]) -> list[Cell]:
    first = rows[0]
    return [short(first.dataset) or "all datasets", f"{first.n_test}", lines(*sentences(rows))]


def sentences(rows: Sequence[ComparisonRow]) -> list[str]:
    """Return what the comparisons of one dataset say: who is better than whom, and who cannot be told apart."""
    better: dict[str, list[ComparisonRow]] = {}
    alike = []
    for row in rows:
        if row.p_corrected > TOLD_APART:
            alike.append(row)
        else:
            better.setdefault(row.first if row.difference > 0 else row.second, []).append(row)
    said = [_better(probe, of_probe) for probe, of_probe in better.items()]
    return [*said, _alike(alike, others=len(alike) < len(rows))] if alike else said


def _better(probe: str, rows: Sequence[ComparisonRow]) -> str:
    others = (
        f"{probe_title(row.second if row.first == probe else row.first)} (by {share(abs(row.difference))}, {_p(row)})"
        for row in rows
    )
    return f"{probe_title(probe)} is better than {listed(list(others))}."


def _alike(rows: Sequence[ComparisonRow], *, others: bool) -> str:
    """Return which pairs cannot be told apart, by name if they are few or the only ones."""
    here = f"on these {count(rows[0].n_test, 'row')}"
    if len(rows) == 1:
        return f"{_pair(rows[0])} cannot be told apart {here} (McNemar {_p(rows[0])})."
    least = min(rows, key=lambda row: row.p)
    if not others:
        return f"No two probes can be told apart {here} (smallest McNemar {_p(least)}: {_pair(least)})."
    if len(rows) > _NAMED:
        which = f"The other {len(rows)} pairs of probes cannot be told apart"
        return f"{which} {here} (smallest McNemar {_p(least)}: {_pair(least)})."
    return f"Not to be told apart {here}: {', '.join(f'{_pair(row)} ({_p(row)})' for row in rows)}."


def _pair(row: ComparisonRow) -> str:
    return f"{probe_title(row.first)} and {probe_title(row.second)}"


def _p(row: ComparisonRow) -> str:
    """Return the corrected p, or a bound on a very small one."""
    said = p_value(row.p_corrected)
    return f"p {said}" if said.startswith("<") else f"p = {said}"


def p_value(p: float) -> str:
    """Return a p with one or two digits, or a bound on a very small one."""
    return "< .0001" if p < 1e-4 else bare(f"{p:.1g}" if p < 0.01 else f"{p:.2f}")


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence."""
    *firsts, last = names
    return f"{', '.join(firsts)} and {last}" if firsts else last
