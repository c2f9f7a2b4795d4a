"""Tables of skill neurons: for the terminal, at most 100 columns wide, and for Prefect.

The causal check comes first and every other title points back to it: a probe can also read an answer from neurons
that do not make it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from flows.show.accuracy_tables import PROBE_TITLES, share, short
from flows.show.display import printable
from negcore.analysis.shared_neurons import CommonNeuronRow, OverlapRow
from negcore.analysis.skills import BandRow, ForestRow, NeuronCountRow, TrainingRowsRow, TransferRow
from tasks.skills import DatasetFindings, SkillFindings

NEURON_TITLES = MappingProxyType({"top": "best", "random": "random", "bottom": "last"})
"""The sets of neurons of a causal check."""
DIRECTION_TITLES = MappingProxyType({"gold": "NEG", "polarity": "rank"})
"""By what a causal check knows which way is towards the gold option."""
_CHECKED = "(causal check above)"
_INTERVALS = "Below an accuracy: 95 % interval (Wilson)."
_KEPT = "After an accuracy: neurons kept, chosen on valid."
_MOST_COLUMNS = 6
_MOST_PAIRS = 28
"""Of eight datasets all pairs."""
_MOST_COMMON = 10
_RICHEST = 5

Cells = list[str]
Measured = NeuronCountRow | TransferRow | BandRow | ForestRow


def check_causal(findings: SkillFindings) -> None:
    """Make sure that no ranking is shown without its causal check: none leaves an analysis without one."""
    for one in findings.datasets:
        assert {row.probe for row in one.neuron_counts} <= {row.probe for row in one.causal}, one.dataset


def probes(findings: SkillFindings) -> list[str]:
    """Probes whose rankings were analysed."""
    return list(dict.fromkeys(row.probe for one in findings.datasets for row in one.causal))


def tops(findings: SkillFindings) -> list[int]:
    """Numbers of neurons that counted as the skill neurons, rising."""
    return sorted({row.size for row in findings.datasets[0].causal})


def has_forests(findings: SkillFindings) -> bool:
    """Whether forests were grown: not without Magn's ranking, from which they have their neurons."""
    return any(one.forests for one in findings.datasets)


def fitted(one: DatasetFindings, probe: str) -> TrainingRowsRow:
    """The probe itself: of all training rows, with the number of neurons that was chosen on valid."""
    return max((row for row in one.training_rows if row.probe == probe), key=lambda row: row.n_train)


def depth_title(depth: int | None) -> str:
    """How deep the trees of a forest may grow."""
    return "any" if depth is None else str(depth)


def summary(findings: SkillFindings) -> str:
    """Model, datasets, rows and conditions, in one line."""
    names = ", ".join(short(one.dataset) for one in findings.datasets)
    known = [one.reference for one in findings.datasets]
    n_train, n_valid, n_test = (sum(getattr(row, name) for row in known) for name in ("n_train", "n_valid", "n_test"))
    rows = f"{n_train} training, {n_valid} validation and {n_test} test rows"
    line = f"{findings.model} on {names}: {rows}; asked: {'; '.join(findings.conditions)}"
    return printable(line).replace("\n", " ").replace("`", "'")


def skill_tables(findings: SkillFindings) -> list[Table]:
    """The tables of one model, the causal check of every dataset first."""
    check_causal(findings)
    tables = [_causal(one) for one in findings.datasets]
    tables[0].caption = _CAUSAL
    tables += [_accuracies(findings), _by_neurons(findings), _by_rows(findings)]
    if len(findings.conditions) > 1:
        tables.append(_transfers(findings))
    tables.append(_bands(findings))
    if has_forests(findings):
        tables.append(_forests(findings))
    if findings.overlaps:
        tables += [_overlaps(findings), _genres(findings), _common(findings)]
    return [*tables, _layers(findings)]


# The causal check

_CAUSAL = (
    "Change of accuracy and of the gold option's probability when k neurons are shifted together towards the gold "
    "option (+) or away from it (-), as each one's NEG for it says, or as the ranking says, which does not know it. "
    "random: of the layers of the best, mean over draws. Below: 95 % interval (bootstrap over rows); bold: without 0. "
    "Of several shifts the furthest; the figures show all."
)


def _causal(one: DatasetFindings) -> Table:
    first = one.causal[0]
    where = f"{_name(one.dataset)}: {first.n_prompts} test rows, accuracy {share(first.base_accuracy)} without a shift"
    table = _table(f"Causal check of the rankings\n{where}")
    sets = [f"{measure}\n{NEURON_TITLES[name]}" for measure in ("accuracy", "probability") for name in NEURON_TITLES]
    _add_numeric(table, ["k", "by", "shift", *sets])
    found = {(row.probe, row.size, row.direction, row.shift, row.neurons): row for row in one.causal}
    sizes, furthest = sorted({row.size for row in one.causal}), max(row.shift for row in one.causal)
    for probe in dict.fromkeys(row.probe for row in one.causal):
        table.add_section()
        table.add_row(f"[italic]{PROBE_TITLES[probe]}[/italic]")
        for size, direction, shift in product(sizes, DIRECTION_TITLES, (furthest, -furthest)):
            rows = [found[probe, size, direction, shift, neurons] for neurons in NEURON_TITLES]
            accuracy = [_change(row.accuracy_change, row.change_low, row.change_high) for row in rows]
            prob = [_change(row.prob_change, row.prob_low, row.prob_high) for row in rows]
            table.add_row(str(size), DIRECTION_TITLES[direction], f"{shift:+g}", *accuracy, *prob)
    return table


def _change(value: float, low: float, high: float) -> str:
    signed = _bare(f"{value:+.3f}")
    shown = f"[bold]{signed}[/bold]" if low > 0 or high < 0 else signed
    return f"{shown}\n{_bare(f'{low:.3f}')} {_bare(f'{high:.3f}')}"


# Accuracies, a block of rows for every dataset


def _accuracies(findings: SkillFindings) -> Table:
    def rows(one: DatasetFindings) -> Iterable[Cells]:
        known = one.reference
        yield [
            _name(known.genre),
            f"{known.n_train}\n{known.n_valid}, {known.n_test}",
            f"{share(known.random)}\n{share(known.majority)}",
            f"[bold]{share(known.lm)}[/bold]\n{share(known.low)}-{share(known.high)}",
            *(_kept(fitted(one, probe)) for probe in probes(findings)),
        ]

    title = f"Accuracy on test: {escape(printable(findings.model))}"
    names = ["train\nvalid, test", "random\nmajority", "LM-Prob", *_titles(probes(findings))]
    return _over_datasets(findings, title, f"{_KEPT} {_INTERVALS}", ["genre"], names, rows)


def _by_neurons(findings: SkillFindings) -> Table:
    counts = few({row.n_neurons for one in findings.datasets for row in one.neuron_counts}, 5)

    def rows(one: DatasetFindings) -> Iterable[Cells]:
        found = {(row.probe, row.order, row.n_neurons): _cell(row) for row in one.neuron_counts}
        for probe, order in dict.fromkeys((row.probe, row.order) for row in one.neuron_counts):
            yield [PROBE_TITLES[probe], order, *(found[probe, order, k] for k in counts)]

    caption = f"random: drawn from all neurons, each with its own polarity. {_INTERVALS}"
    left, right = ["probe", "neurons"], [str(k) for k in counts]
    return _over_datasets(findings, "Accuracy by number of neurons", caption, left, right, rows)


def _by_rows(findings: SkillFindings) -> Table:
    whole = {one.dataset: one.reference.n_train for one in findings.datasets}
    parts = {row.n_train for one in findings.datasets for row in one.training_rows if row.n_train < whole[one.dataset]}
    sizes = few(parts, _MOST_COLUMNS - 1)

    def rows(one: DatasetFindings) -> Iterable[Cells]:
        found = {(row.probe, row.n_train): _kept(row) for row in one.training_rows}
        for probe in probes(findings):
            yield [PROBE_TITLES[probe], *(found.get((probe, n), "") for n in sizes), found[probe, whole[one.dataset]]]

    title, right = "Accuracy by number of training rows", [*map(str, sizes), "all"]
    return _over_datasets(findings, title, f"{_KEPT} {_INTERVALS}", ["probe"], right, rows)


def _transfers(findings: SkillFindings) -> Table:
    names = findings.conditions

    def rows(one: DatasetFindings) -> Iterable[Cells]:
        found = {(row.probe, row.trained_on, row.tested_on): _cell(row) for row in one.transfers}
        for probe in probes(findings):
            for trained_on in names:
                yield [PROBE_TITLES[probe], _name(trained_on), *(found[probe, trained_on, name] for name in names)]

    title, right = "Accuracy under other conditions", [_name(name).replace(", ", ",\n") for name in names]
    return _over_datasets(findings, title, f"Columns: tested on. {_INTERVALS}", ["probe", "trained on"], right, rows)


def _bands(findings: SkillFindings) -> Table:
    starts = few({row.first_rank for one in findings.datasets for row in one.bands}, _MOST_COLUMNS)

    def rows(one: DatasetFindings) -> Iterable[Cells]:
        found = {(row.probe, row.first_rank): _cell(row) for row in one.bands}
        for probe in probes(findings):
            yield [PROBE_TITLES[probe], *(found[probe, start] for start in starts)]

    title = f"Accuracy of {band_width(findings)} neurons further down the ranking"
    caption = f"Columns: rank of the first of them; 0 is the best of all. {_INTERVALS}"
    return _over_datasets(findings, title, caption, ["probe"], [str(start) for start in starts], rows)


def band_width(findings: SkillFindings) -> int:
    """Neurons of a band of the ranking."""
    band = findings.datasets[0].bands[0]
    return band.end_rank - band.first_rank


def _forests(findings: SkillFindings) -> Table:
    trees = sorted({row.n_trees for one in findings.datasets for row in one.forests})

    def rows(one: DatasetFindings) -> Iterable[Cells]:
        found = {(row.depth, row.n_trees): _cell(row) for row in one.forests}
        votes = [_kept(fitted(one, probe)) for probe in probes(findings)]
        for depth in dict.fromkeys(row.depth for row in one.forests):
            yield [depth_title(depth), *(found[depth, n] for n in trees), *votes]
            votes = []

    title = f"Accuracy of forests on the best {findings.datasets[0].forests[0].n_neurons} neurons by Magn's score"
    caption = f"Columns: number of trees; beside them the probes that vote, with neurons kept. {_INTERVALS}"
    right = [*map(str, trees), *_titles(probes(findings))]
    return _over_datasets(findings, title, caption, ["depth"], right, rows)


def _over_datasets(
    findings: SkillFindings,
    title: str,
    caption: str,
    left: Sequence[str],
    right: Sequence[str],
    rows: Callable[[DatasetFindings], Iterable[Cells]],
) -> Table:
    """A table in which every dataset has its rows, with its name before the first."""
    table = _table(f"{title} {_CHECKED}", caption)
    for name in ("dataset", *left):
        table.add_column(name, overflow="fold")
    _add_numeric(table, right)
    for one in findings.datasets:
        name = _name(one.dataset)
        for cells in rows(one):
            table.add_row(name, *cells)
            name = ""
        table.add_section()
    return table


# Shared neurons, and where they are


def _overlaps(findings: SkillFindings) -> Table:
    caption = "Shared ones and Jaccard index; bold: more than random sets share in 39 of 40 cases."
    found = {(row.probe, row.dataset_a, row.dataset_b, row.top): row for row in findings.overlaps}
    pairs = {(row.dataset_a, row.dataset_b): 0.0 for row in findings.overlaps}
    if len(pairs) > _MOST_PAIRS:
        caption += f" The {_MOST_PAIRS} of {len(pairs)} pairs that share most."
    for row in findings.overlaps:
        pairs[row.dataset_a, row.dataset_b] += row.jaccard
    shown = list(pairs) if len(pairs) <= _MOST_PAIRS else sorted(pairs, key=lambda pair: -pairs[pair])[:_MOST_PAIRS]
    table = _of_tops(findings, "Skill neurons that datasets share", caption, ["datasets", "probe"])
    for a, b in shown:
        for probe in probes(findings):
            cells = [_shared(found[probe, a, b, top]) for top in tops(findings)]
            table.add_row(f"{_name(a)}, {_name(b)}", PROBE_TITLES[probe], *cells)
    table.add_section()
    chance = {row.top: row for row in findings.overlaps}
    table.add_row("two random sets: mean", "", *(_small(chance[top].chance) for top in tops(findings)))
    table.add_row("in 39 of 40 cases up to", "", *(_small(chance[top].chance_high) for top in tops(findings)))
    return table


def _shared(row: OverlapRow) -> str:
    jaccard = share(row.jaccard)
    return f"{row.n_shared}  " + (f"[bold]{jaccard}[/bold]" if row.jaccard > row.chance_high else jaccard)


def _genres(findings: SkillFindings) -> Table:
    caption = "Mean Jaccard index over pairs of datasets, and how many times that of random sets it is."
    table = _of_tops(findings, "Skill neurons that genres share", caption, ["genres", "pairs", "probe"])
    found = {(row.genre_a, row.genre_b, row.probe, row.top): row for row in findings.genre_overlaps}
    for (a, b), n_pairs in {(row.genre_a, row.genre_b): row.n_pairs for row in findings.genre_overlaps}.items():
        for probe in probes(findings):
            rows = [found[a, b, probe, top] for top in tops(findings)]
            cells = [f"{share(row.jaccard)}  {times(row.jaccard / row.chance)}" for row in rows]
            names = f"within {_name(a)}" if a == b else f"{_name(a)}, {_name(b)}"
            table.add_row(names, str(n_pairs), PROBE_TITLES[probe], *cells)
    return table


def times(ratio: float) -> str:
    """A ratio with two digits: how many times as much."""
    return f"{ratio:.0f}x" if ratio >= 10 or ratio == 0 else f"{ratio:.1f}x"


def _common(findings: SkillFindings) -> Table:
    caption = f"The {_MOST_COMMON} whose worst rank over the datasets is best; rank 0 is the best of all."
    table = _table(f"Neurons among the best of all {len(findings.datasets)} datasets {_CHECKED}", caption)
    table.add_column("probe")
    _add_numeric(table, ["layer", "neuron", "worst rank", "datasets of\none polarity"])
    for probe in probes(findings):
        counts = {top: sum((row.probe, row.top) == (probe, top) for row in findings.common) for top in tops(findings)}
        table.add_row(f"{PROBE_TITLES[probe]}: " + ", ".join(f"{n} of {top}" for top, n in counts.items()))
        for row in best_common(findings, probe):
            table.add_row("", str(row.layer), str(row.neuron), str(row.worst_rank), str(row.n_same_polarity))
        table.add_section()
    return table


def best_common(findings: SkillFindings, probe: str) -> list[CommonNeuronRow]:
    """The neurons that every dataset shares, as far as they are shown: the largest top has those of the others."""
    return [row for row in findings.common if (row.probe, row.top) == (probe, tops(findings)[-1])][:_MOST_COMMON]


def _layers(findings: SkillFindings) -> Table:
    n_layers = 1 + max(row.layer for one in findings.datasets for row in one.layers)

    def rows(one: DatasetFindings) -> Iterable[Cells]:
        for probe in probes(findings):
            for top in tops(findings):
                profile = _profile(one, probe, top)
                richest = [f"{layer} {_bare(f'{part:.2f}')}" for layer, part in profile.richest.items()]
                yield [PROBE_TITLES[probe], str(top), *map(share, profile.thirds), ", ".join(richest)]

    caption = (
        f"Shares of the skill neurons in each third of the {n_layers} layers, and the {_RICHEST} layers with the most; "
        f"spread evenly a layer would have {share(1 / n_layers)}."
    )
    right = ["first\nthird", "middle\nthird", "last\nthird", "richest layers"]
    return _over_datasets(findings, "Layers of the skill neurons", caption, ["probe", "neurons"], right, rows)


class _Profile(NamedTuple):
    thirds: list[float]
    """Shares of the first, middle and last third of the layers."""
    richest: dict[int, float]
    """Share by layer, the largest first."""


def _profile(one: DatasetFindings, probe: str, top: int) -> _Profile:
    shares = {row.layer: row.share for row in one.layers if (row.probe, row.top) == (probe, top)}
    thirds = [float(part.sum()) for part in np.array_split([shares[layer] for layer in sorted(shares)], 3)]
    richest = sorted((layer for layer in shares if shares[layer]), key=lambda layer: -shares[layer])[:_RICHEST]
    return _Profile(thirds, {layer: shares[layer] for layer in richest})


# For Prefect


def artifact_tables(findings: SkillFindings) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Title and rows by artifact key, the causal check first."""
    check_causal(findings)
    tables = {
        key: (title, [{"dataset": one.dataset} | asdict(row) for one in findings.datasets for row in getattr(one, key)])
        for key, title in _OF_DATASETS.items()
        if key != "forests" or has_forests(findings)
    }
    tables |= {key: (title, [asdict(row) for row in getattr(findings, key)]) for key, title in _OF_MODEL.items()}
    common = [row for probe in probes(findings) for row in best_common(findings, probe)]
    tables["common"] = (f"The best of the neurons that all datasets share {_CHECKED}", [asdict(row) for row in common])
    return {key: (title, [_record(row) for row in rows]) for key, (title, rows) in tables.items() if rows}


_OF_DATASETS = {
    "causal": "Causal check: what shifting the best, random and last neurons changes",
    "references": "LM-Prob and floors",
    "neuron_counts": f"Accuracy by number of neurons {_CHECKED}",
    "training_rows": f"Accuracy by number of training rows {_CHECKED}",
    "transfers": f"Accuracy under other conditions {_CHECKED}",
    "bands": f"Accuracy by band of the ranking {_CHECKED}",
    "forests": f"Accuracy of forests {_CHECKED}",
    "layers": f"Layers of the skill neurons {_CHECKED}",
}
_OF_MODEL = {
    "overlaps": f"Skill neurons that datasets share {_CHECKED}",
    "genre_overlaps": f"Skill neurons that genres share {_CHECKED}",
}


def _record(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can hold it, with titles for people."""
    return {name.replace("_", " "): _json(value) for name, value in row.items()}


def _json(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.4g}")
    return value


# Cells


def _table(title: str, caption: str = "") -> Table:
    return Table(title=title, caption=caption, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def _of_tops(findings: SkillFindings, title: str, caption: str, left: Sequence[str]) -> Table:
    """A table with a column for every number of skill neurons."""
    table = _table(f"{title} {_CHECKED}", caption)
    for name in left:
        table.add_column(name, overflow="fold")
    _add_numeric(table, [f"best {top}" for top in tops(findings)])
    return table


def _add_numeric(table: Table, names: Iterable[str]) -> None:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def _cell(row: Measured) -> str:
    return f"[bold]{share(row.accuracy)}[/bold]\n{share(row.low)}-{share(row.high)}"


def _kept(row: TrainingRowsRow) -> str:
    return f"[bold]{share(row.accuracy)}[/bold] [dim]{row.n_neurons}[/dim]\n{share(row.low)}-{share(row.high)}"


def _titles(names: Iterable[str]) -> list[str]:
    return [PROBE_TITLES[name] for name in names]


def _name(name: str) -> str:
    """A name from the data as rich shows it, letter by letter."""
    return escape(printable(short(name)))


def few(values: Iterable[int], most: int) -> list[int]:
    """At most so many of the values, evenly spread, with the first and the last."""
    ordered = sorted(values)
    step = max(1, -(-(len(ordered) - 1) // (most - 1)))
    return list(dict.fromkeys([*ordered[::step], *ordered[-1:]]))


def _bare(number: str) -> str:
    """A number without the zero before its point."""
    return number.replace("0.", ".", 1)


def _small(value: float) -> str:
    return _bare(f"{value:.2g}")
