"""Tables of skill neurons, at most 100 columns wide in a terminal.

The causal check comes first and every other title points back to it: a probe can also read an answer from neurons
that do not make it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from types import MappingProxyType

import numpy as np

from flows.show.accuracy_tables import (
    BESIDE_CAPTION,
    FLOORS_TITLE,
    PROBE_TITLES,
    accuracy_cell,
    floor_cell,
    floor_mark,
    kept,
    rows_cell,
    short,
)
from flows.show.model_names import shown_model
from flows.show.table import Block, Cell, Number, Piece, Style, Table, Words, by, interval, numbers, texts
from flows.show.text import bare, change, printable, share, times
from negcore.analysis.effects import CausalRow
from negcore.analysis.shared_neurons import CommonNeuronRow, OverlapRow
from negcore.analysis.skills import TrainingRowsRow
from tasks.skills import DatasetFindings, SkillFindings

NEURON_TITLES = MappingProxyType({"top": "best", "random": "random", "bottom": "last"})
"""The sets of neurons of a causal check."""
DIRECTION_TITLES = MappingProxyType({"gold": "NEG", "polarity": "rank"})
"""The judge of which way is towards the gold option: each neuron's NEG for it, or the ranking."""
_CHECKED = "(causal check above)"
_INTERVALS = "Below an accuracy: 95 % interval (Wilson)."
_KEPT = "After an accuracy: neurons kept, chosen on valid."
_MOST_COLUMNS = 6
_MOST_PAIRS = 28
"""All pairs of eight datasets."""
_MOST_COMMON = 10
_RICHEST = 5

Rows = list[list[Cell]]


def check_causal(findings: SkillFindings) -> None:
    """Check that no ranking is shown without its causal check; no analysis returns one without it."""
    for one in findings.datasets:
        assert {row.probe for row in one.neuron_counts} <= {row.probe for row in one.causal}, one.dataset


def probes(findings: SkillFindings) -> list[str]:
    """Return the probes whose rankings were analysed."""
    return list(dict.fromkeys(row.probe for one in findings.datasets for row in one.causal))


def tops(findings: SkillFindings) -> list[int]:
    """Return the numbers of neurons that counted as the skill neurons, in rising order."""
    return sorted({row.size for row in findings.datasets[0].causal})


def has_forests(findings: SkillFindings) -> bool:
    """Tell whether forests were grown: they need Magn's ranking, which chooses their neurons."""
    return any(one.forests for one in findings.datasets)


def fitted(one: DatasetFindings, probe: str) -> TrainingRowsRow:
    """Return the probe itself: fitted on all training rows, with the number of neurons chosen on valid."""
    return max((row for row in one.training_rows if row.probe == probe), key=lambda row: row.n_train)


def depth_title(depth: int | None) -> str:
    """Return how deep the trees of a forest may grow."""
    return "any" if depth is None else str(depth)


def summary(findings: SkillFindings) -> str:
    """Return model, datasets, rows and conditions in one line."""
    names = ", ".join(short(one.dataset) for one in findings.datasets)
    known = [one.reference for one in findings.datasets]
    n_train, n_valid, n_test = (sum(getattr(row, name) for row in known) for name in ("n_train", "n_valid", "n_test"))
    what = "rows" if known[0].n_orders == 1 else f"prompts, {known[0].n_orders} orders of each row"
    rows = f"{n_train} training, {n_valid} validation and {n_test} test {what}"
    line = f"{shown_model(findings.model)} on {names}: {rows}; asked: {'; '.join(findings.conditions)}"
    return printable(line).replace("\n", " ").replace("`", "'")


def skill_tables(findings: SkillFindings) -> list[Table]:
    """Return the tables of one model, the causal check of every dataset first."""
    check_causal(findings)
    tables = [table for one in findings.datasets for table in _causal_tables(findings, one)]
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
    "option (+) or away from it (-). by NEG: as each neuron's NEG for that option says; by rank: as the ranking says, "
    "which does not know the option. random: from the layers of the best, mean over draws. Below: 95 % interval "
    "(bootstrap over rows); bold: without 0. Of several shifts only the furthest; the figures show all."
)


_BY_ANSWER = (
    "The same by answer, whatever letter it stood at: probabilities are means over the orders of a row, and the model "
    "answers with the answer whose mean is the largest."
)


def _causal_tables(findings: SkillFindings, one: DatasetFindings) -> Iterator[Table]:
    """Return the causal check of a dataset, and by answer if rows were asked in several orders of their options."""
    caption = _CAUSAL if one is findings.datasets[0] else ""
    yield _causal(findings, one, one.causal, "", caption)
    if one.by_answer:
        yield _causal(findings, one, one.by_answer.causal_by_answer, ", by answer", _BY_ANSWER)


def _causal(
    findings: SkillFindings, one: DatasetFindings, causal: Sequence[CausalRow], how: str, caption: str
) -> Table:
    first = causal[0]
    where = f"{short(one.dataset)}: {first.n_prompts} test rows, accuracy {share(first.base_accuracy)} without a shift"
    sets = [f"{measure}\n{title}" for measure in ("accuracy", "probability") for title in NEURON_TITLES.values()]
    return Table(
        key=f"causal-{findings.model}-{one.dataset}" + "-by-answer" * bool(how),
        title=f"Causal check of the rankings{how}\n{where}",
        columns=numbers("k", "by", "shift", *sets),
        blocks=[_causal_block(of_probe) for of_probe in by(causal, "probe").values()],
        caption=caption,
    )


def _causal_block(causal: Sequence[CausalRow]) -> Rows:
    found = {(row.size, row.direction, row.shift, row.neurons): row for row in causal}
    furthest = max(row.shift for row in causal)
    rows: Rows = [[Words(PROBE_TITLES[causal[0].probe], "italic")]]
    for size, direction, shift in product(sorted(by(causal, "size")), DIRECTION_TITLES, (furthest, -furthest)):
        own = [found[size, direction, shift, neurons] for neurons in NEURON_TITLES]
        accuracy = [change_cell(row.accuracy_change, row.change_low, row.change_high) for row in own]
        prob = [change_cell(row.prob_change, row.prob_low, row.prob_high) for row in own]
        rows.append([Number(size), DIRECTION_TITLES[direction], f"{shift:+g}", *accuracy, *prob])
    return rows


def change_cell(value: float, low: float, high: float) -> Cell:
    """Return a change with its interval below, bold where that is without 0."""
    style: Style = "bold" if low > 0 or high < 0 else ""
    return Number(value, change, style), interval(low, high, lambda end: bare(f"{end:.3f}"), " ")


# Accuracies, a block of rows for every dataset


def _accuracies(findings: SkillFindings) -> Table:
    def rows(one: DatasetFindings) -> Rows:
        known, chosen = one.reference, [fitted(one, probe) for probe in probes(findings)]
        sizes = rows_cell(known, f"{known.n_train}", f"{known.n_valid}, {known.n_test}")
        lm: Cell = (Number(known.lm, share, "bold"), interval(known.low, known.high))
        return [[known.genre, sizes, floor_cell(known), lm, *((*_kept(row), floor_mark(row, known)) for row in chosen)]]

    names = ["train\nvalid, test\nmass", FLOORS_TITLE, "LM-Prob", *_titles(probes(findings))]
    title, caption = f"Accuracy on test: {shown_model(findings.model)}", f"{_KEPT} {_INTERVALS} {BESIDE_CAPTION}"
    return _over_datasets(findings, "accuracy", title, caption, ["genre"], names, rows)


def _by_neurons(findings: SkillFindings) -> Table:
    counts = few({row.n_neurons for one in findings.datasets for row in one.neuron_counts}, 5)

    def rows(one: DatasetFindings) -> Rows:
        found = {(row.probe, row.order, row.n_neurons): accuracy_cell(row) for row in one.neuron_counts}
        orders = dict.fromkeys((row.probe, row.order) for row in one.neuron_counts)
        return [[PROBE_TITLES[probe], order, *(found[probe, order, k] for k in counts)] for probe, order in orders]

    title = "Accuracy by number of neurons"
    caption = f"random: drawn from all neurons, each with its own polarity. {_INTERVALS}"
    return _over_datasets(findings, "neuron-counts", title, caption, ["probe", "neurons"], map(str, counts), rows)


def _by_rows(findings: SkillFindings) -> Table:
    whole = {one.dataset: one.reference.n_train for one in findings.datasets}
    parts = {row.n_train for one in findings.datasets for row in one.training_rows if row.n_train < whole[one.dataset]}
    sizes = few(parts, _MOST_COLUMNS - 1)

    def rows(one: DatasetFindings) -> Rows:
        found = {(row.probe, row.n_train): _kept(row) for row in one.training_rows}
        asked = [*sizes, whole[one.dataset]]
        return [[PROBE_TITLES[probe], *(found.get((probe, n), "") for n in asked)] for probe in probes(findings)]

    title, caption = "Accuracy by number of training rows", f"{_KEPT} {_INTERVALS}"
    return _over_datasets(findings, "training-rows", title, caption, ["probe"], [*map(str, sizes), "all"], rows)


def _transfers(findings: SkillFindings) -> Table:
    names = findings.conditions

    def rows(one: DatasetFindings) -> Rows:
        found = {(row.probe, row.trained_on, row.tested_on): accuracy_cell(row) for row in one.transfers}
        return [
            [PROBE_TITLES[probe], trained_on, *(found[probe, trained_on, name] for name in names)]
            for probe, trained_on in product(probes(findings), names)
        ]

    title, caption = "Accuracy under other conditions", f"Columns: tested on. {_INTERVALS}"
    right = [name.replace(", ", ",\n") for name in names]
    return _over_datasets(findings, "transfers", title, caption, ["probe", "trained on"], right, rows)


def _bands(findings: SkillFindings) -> Table:
    starts = few({row.first_rank for one in findings.datasets for row in one.bands}, _MOST_COLUMNS)

    def rows(one: DatasetFindings) -> Rows:
        found = {(row.probe, row.first_rank): accuracy_cell(row) for row in one.bands}
        return [[PROBE_TITLES[probe], *(found[probe, start] for start in starts)] for probe in probes(findings)]

    title = f"Accuracy of {band_width(findings)} neurons further down the ranking"
    caption = f"Columns: rank of the first of them; 0 is the best of all. {_INTERVALS}"
    return _over_datasets(findings, "bands", title, caption, ["probe"], map(str, starts), rows)


def band_width(findings: SkillFindings) -> int:
    """Return the number of neurons in a band of the ranking."""
    band = findings.datasets[0].bands[0]
    return band.end_rank - band.first_rank


def _forests(findings: SkillFindings) -> Table:
    trees = sorted({row.n_trees for one in findings.datasets for row in one.forests})

    def rows(one: DatasetFindings) -> Rows:
        found = {(row.depth, row.n_trees): accuracy_cell(row) for row in one.forests}
        rows: Rows = [[depth_title(depth), *(found[depth, n] for n in trees)] for depth in by(one.forests, "depth")]
        rows[0] += [_kept(fitted(one, probe)) for probe in probes(findings)]
        return rows

    title = f"Accuracy of forests on the best {findings.datasets[0].forests[0].n_neurons} neurons by Magn's score"
    caption = f"Columns: number of trees; beside them the probes that vote, with neurons kept. {_INTERVALS}"
    right = [*map(str, trees), *_titles(probes(findings))]
    return _over_datasets(findings, "forests", title, caption, ["depth"], right, rows)


def _over_datasets(
    findings: SkillFindings,
    key: str,
    title: str,
    caption: str,
    left: Iterable[str],
    right: Iterable[str],
    rows: Callable[[DatasetFindings], Rows],
) -> Table:
    """Return a table in which every dataset has its rows, with its name before the first."""
    return Table(
        key=f"{key}-{findings.model}",
        title=f"{title} {_CHECKED}",
        columns=[*texts("dataset", *left), *numbers(*right)],
        blocks=[
            [["" if i else short(one.dataset), *cells] for i, cells in enumerate(rows(one))]
            for one in findings.datasets
        ],
        caption=caption,
    )


# Shared neurons, and where they are


def _overlaps(findings: SkillFindings) -> Table:
    caption = "Number shared and Jaccard index; bold: more than random sets share in 39 of 40 cases."
    found = {(row.probe, row.dataset_a, row.dataset_b, row.top): row for row in findings.overlaps}
    pairs = {(row.dataset_a, row.dataset_b): 0.0 for row in findings.overlaps}
    for row in findings.overlaps:
        pairs[row.dataset_a, row.dataset_b] += row.jaccard
    shown = list(pairs)
    if len(pairs) > _MOST_PAIRS:
        caption += f" The {_MOST_PAIRS} of {len(pairs)} pairs that share most."
        shown = sorted(pairs, key=lambda pair: -pairs[pair])[:_MOST_PAIRS]
    rows: Rows = [
        [f"{short(a)}, {short(b)}", PROBE_TITLES[probe], *(_shared(found[probe, a, b, top]) for top in tops(findings))]
        for (a, b), probe in product(shown, probes(findings))
    ]
    chance = {row.top: row for row in findings.overlaps}
    by_chance: Rows = [
        ["two random sets: mean", "", *(Number(chance[top].chance, _small) for top in tops(findings))],
        ["in 39 of 40 cases up to", "", *(Number(chance[top].chance_high, _small) for top in tops(findings))],
    ]
    blocks = [rows, by_chance]
    return _of_tops(findings, "overlaps", "Skill neurons that datasets share", caption, ["datasets", "probe"], blocks)


def _shared(row: OverlapRow) -> Cell:
    return f"{row.n_shared}  ", Number(row.jaccard, share, "bold" if row.jaccard > row.chance_high else "")


def _genres(findings: SkillFindings) -> Table:
    caption = "Mean Jaccard index over pairs of datasets, and how many times that of random sets it is."
    found = {(row.genre_a, row.genre_b, row.probe, row.top): row for row in findings.genre_overlaps}
    rows: Rows = []
    for (a, b), n_pairs in {(row.genre_a, row.genre_b): row.n_pairs for row in findings.genre_overlaps}.items():
        for probe in probes(findings):
            own = [found[a, b, probe, top] for top in tops(findings)]
            cells = [f"{share(row.jaccard)}  {times(row.jaccard / row.chance)}" for row in own]
            rows.append([f"within {a}" if a == b else f"{a}, {b}", str(n_pairs), PROBE_TITLES[probe], *cells])
    left = ["genres", "pairs", "probe"]
    return _of_tops(findings, "genre-overlaps", "Skill neurons that genres share", caption, left, [rows])


def _of_tops(
    findings: SkillFindings, key: str, title: str, caption: str, left: Iterable[str], blocks: Sequence[Block]
) -> Table:
    """Return a table with a column for every number of skill neurons."""
    columns = [*texts(*left), *numbers(*(f"best {top}" for top in tops(findings)))]
    return Table(f"{key}-{findings.model}", f"{title} {_CHECKED}", columns, blocks, caption)


def _common(findings: SkillFindings) -> Table:
    blocks: list[Rows] = []
    for probe in probes(findings):
        counts = [sum((row.probe, row.top) == (probe, top) for row in findings.common) for top in tops(findings)]
        listed = ", ".join(f"{n} of {top}" for n, top in zip(counts, tops(findings), strict=True))
        best = [row for row in findings.common if (row.probe, row.top) == (probe, tops(findings)[-1])][:_MOST_COMMON]
        rows: Rows = [[f"{PROBE_TITLES[probe]}: {listed}"]]
        rows += [
            ["", Number(row.layer), _number(row), Number(row.worst_rank), Number(row.n_same_polarity)] for row in best
        ]
        blocks.append(rows)
    return Table(
        key=f"common-{findings.model}",
        title=f"Neurons among the best of all {len(findings.datasets)} datasets {_CHECKED}",
        columns=[*texts("probe"), *numbers("layer", "neuron", "worst rank", "datasets of\none polarity")],
        blocks=blocks,
        caption=f"The {_MOST_COMMON} whose worst rank over the datasets is best; rank 0 is the best of all.",
    )


def _number(row: CommonNeuronRow) -> Cell:
    """Return the number of a neuron in its layer; of a mixture of experts, its expert and unit."""
    below = row.name.partition(".")[2]
    return below if "." in below else Number(row.neuron)


def _layers(findings: SkillFindings) -> Table:
    n_layers = 1 + max(row.layer for one in findings.datasets for row in one.layers)

    def rows(one: DatasetFindings) -> Rows:
        return [
            [PROBE_TITLES[probe], str(top), *_profile(one, probe, top)]
            for probe, top in product(probes(findings), tops(findings))
        ]

    caption = (
        f"Shares of the skill neurons in each third of the {n_layers} layers, and the {_RICHEST} layers with the most; "
        f"spread evenly a layer would have {share(1 / n_layers)}."
    )
    right = ["first\nthird", "middle\nthird", "last\nthird", "richest layers"]
    return _over_datasets(findings, "layers", "Layers of the skill neurons", caption, ["probe", "neurons"], right, rows)


def _profile(one: DatasetFindings, probe: str, top: int) -> list[Cell]:
    """Return the shares of the first, middle and last third of the layers, and the layers with the largest shares."""
    shares = {row.layer: row.share for row in one.layers if (row.probe, row.top) == (probe, top)}
    thirds = np.array_split([shares[layer] for layer in sorted(shares)], 3)
    richest = sorted((layer for layer in shares if shares[layer]), key=lambda layer: -shares[layer])[:_RICHEST]
    listed = ", ".join(f"{layer} {bare(f'{shares[layer]:.2f}')}" for layer in richest)
    return [*(Number(float(part.sum()), share) for part in thirds), listed]


# Cells


def _kept(row: TrainingRowsRow) -> tuple[Piece, ...]:
    return accuracy_cell(row, kept(row.n_neurons))


def _titles(names: Iterable[str]) -> list[str]:
    return [PROBE_TITLES[name] for name in names]


def few(values: Iterable[int], most: int) -> list[int]:
    """Return at most `most` of the values, evenly spread, with the first and the last."""
    ordered = sorted(values)
    step = max(1, -(-(len(ordered) - 1) // (most - 1)))
    return list(dict.fromkeys([*ordered[::step], *ordered[-1:]]))


def _small(value: float) -> str:
    return bare(f"{value:.2g}")
