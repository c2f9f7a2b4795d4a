"""Tables of single neurons: the best of each ranking, and everything that a run knows of one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from flows.show.accuracy_tables import asked, probe_title, short
from flows.show.table import Cell, Column, Number, Table, Words, by, interval, numbers, texts
from flows.show.text import change, correlation, count, share
from negcore.analysis.logit_lens import LensTokens
from negcore.analysis.neurons import N_BOOTSTRAP, N_TOP, Moved, NeuronRows
from negcore.datasets import Example
from negcore.measure.sweeps import SweepResult
from negcore.targets import DEFAULT_TARGET, neg_unit
from negcore.texts import private, quoted
from tasks.neurons import NeuronRow
from tasks.probe import AccuracyRow

_SURE = 0.5
"""Share of samples below which a place is marked as unsure."""
_NAMED = 3
_MOST_COLUMNS = 6
"""Options that have columns of their own; more of them stand in one."""
_LONGEST_TEXT = 160
_SHOWN_SHIFTS = (-2.0, -1.0, -0.4, 0.4, 1.0, 2.0)
SIGNS = {1: "+", 0: "0", -1: "-"}


def neg_size(value: float) -> str:
    """Return a NEG with its sign and two digits."""
    return f"{value:+.1e}"


def of_unit(target: str) -> str:
    """Return the unit of NEGs, behind a comma, where they are not of probabilities."""
    return "" if target == DEFAULT_TARGET else f", in {neg_unit(target)}"


def name_of(layer: int, neuron: int) -> str:
    """Return the name of a neuron: its layer and its number there."""
    return f"{layer}.{neuron}"


def listed_name(row: NeuronRow) -> str:
    """Return the name of a listed neuron."""
    return row.name or name_of(row.layer, row.neuron)


# The best neurons of rankings


def neuron_tables(rows: Sequence[NeuronRow], titles: Mapping[str, str] | None = None) -> Iterator[Table]:
    """Return the best neurons of every model, shots, dataset and probe, each in a table.

    Parameters
    ----------
    titles : mapping of dataset to str, optional
        Names of the datasets for people.
    """
    groups: dict[tuple[str, int, str, str], list[NeuronRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.shots, row.dataset, row.probe), []).append(row)
    for (model, shots, dataset, probe), best in groups.items():
        name = (titles or {}).get(dataset, short(dataset))
        yield best_table(best, f"{name}: best neurons by {probe_title(probe)}; {asked(model, shots, best[0].target)}")


def best_table(best: Sequence[NeuronRow], title: str) -> Table:
    """Return the best neurons of one ranking."""
    options, cells = _by_option(best[0].labels, [row.mean_negs for row in best])
    columns = [
        *numbers("place"),
        *texts("neuron"),
        *numbers("score", "random", f"in top\n{len(best)}", "places\n5-95 %"),
        *numbers(*["rows\nwith it"] * _have_experts(best)),
        *options,
    ]
    rows = [[*_place_cells(row), *negs] for row, negs in zip(best, cells, strict=True)]
    return Table(f"neurons-{best[0].dataset}-{best[0].probe}", title, columns, [rows], _best_caption(best))


def _place_cells(row: NeuronRow) -> list[Cell]:
    places = "-" if row.place_low is None else f"{row.place_low}-{row.place_high}"
    return [
        Number(row.place),
        Words(listed_name(row), "bold"),
        Number(row.score, "{:+d}".format),
        Number(row.random_score, "{:.1f}".format),
        _agreement_cell(row),
        places,
        *([] if row.active is None else [Number(row.active, share)]),
    ]


def _have_experts(rows: Sequence[NeuronRow]) -> bool:
    return any(row.active is not None for row in rows)


def _agreement_cell(row: NeuronRow) -> Cell:
    if row.agreement is None:
        return "-"
    return Number(row.agreement, share, "yellow" if row.agreement < _SURE else "")


def _best_caption(best: Sequence[NeuronRow]) -> str:
    what = (
        "score: positive favours the right option, negative disfavours it; random: mean size of the scores in its layer"
    )
    rows = "training rows"
    if _have_experts(best):
        what += "; neurons are layer.expert.unit, and a row has those of the experts that it was routed to"
        rows = "the training rows with it"
    means = (
        f"mean NEG over {rows}, by option{of_unit(best[0].target)}"
        if best[0].mean_negs
        else "NEGs: this storage level keeps none"
    )
    if best[0].agreement is None:
        return f"{what}; places: this storage level keeps no rows to sample; {means}."
    n_sure = sum(row.agreement is not None and row.agreement >= _SURE for row in best)
    return (
        f"{n_sure} of {len(best)} stay in the top {len(best)} in at least half of {N_BOOTSTRAP} bootstrap samples of "
        f"the training rows. {what}; places: where the middle 90 % of the samples rank it; {means}."
    )


def _by_option(
    labels: Sequence[str] | None, negs_by_row: Sequence[Sequence[float] | None]
) -> tuple[list[Column], list[list[Cell]]]:
    """Return columns of NEGs by option, and their cells in each row."""
    n_options = max((len(negs) for negs in negs_by_row if negs is not None), default=0)
    names = option_names(labels, n_options)
    if n_options > _MOST_COLUMNS:
        listed = [
            ", ".join(f"{name} {neg_size(neg)}" for name, neg in zip(names, negs or (), strict=False))
            for negs in negs_by_row
        ]
        return texts("NEG by option"), [[one] for one in listed]
    return numbers(*names), [[_neg_cell(neg) for neg in negs or ()] for negs in negs_by_row]


def _neg_cell(neg: float) -> Cell:
    return "-" if np.isnan(neg) else Number(neg, neg_size)


def option_names(labels: Sequence[str] | None, n_options: int) -> list[str]:
    """Return the options' labels, or their numbers where these differ from row to row."""
    return [label.strip() or quoted(label) for label in labels] if labels else [str(o) for o in range(n_options)]


def top_table(rows: Sequence[NeuronRow], scores: Sequence[AccuracyRow]) -> Iterator[Table]:
    """Return the three best neurons of every dataset's best vote probe; no table if no probe votes."""
    accuracies = {(one.model, one.shots, one.dataset, one.probe): one.accuracy for one in scores if not one.group}
    best: dict[tuple[str, int, str], list[NeuronRow]] = {}
    for of_dataset in by(rows, "dataset").values():
        for key in dict.fromkeys((row.model, row.shots, row.dataset) for row in of_dataset):
            own = by((row for row in of_dataset if (row.model, row.shots, row.dataset) == key), "probe")
            best[key] = max(own.values(), key=lambda group: accuracies.get((*key, group[0].probe), -1.0))
    if best:
        several = len({key[:2] for key in best}) > 1
        yield Table(
            key="neurons",
            title="Best neurons, layer.neuron, by the vote probe that answers test best",
            columns=[*texts("dataset", "probe"), *numbers("1st", "2nd", "3rd")],
            blocks=[[_top_row(*key, own, several=several) for key, own in best.items()]],
            caption="Below: share of bootstrap samples of the training rows in which it stays among the 20 best; "
            "in yellow where that is less than half. To list more of them, run neg neurons.",
        )


def _top_row(model: str, shots: int, dataset: str, best: Sequence[NeuronRow], *, several: bool) -> list[Cell]:
    where = Words(f"\n{asked(model, shots)}" if several else "", "dim")
    named: list[Cell] = [
        (Words(listed_name(row), "bold"), "\n", *_pieces(_agreement_cell(row))) for row in best[:_NAMED]
    ]
    return [(short(dataset), where), probe_title(best[0].probe), *named]


def _pieces(cell: Cell) -> tuple[str | Words | Number, ...]:
    return cell if isinstance(cell, tuple) else (cell,)


# One neuron


def places_line(rows: Sequence[NeuronRow]) -> str:
    """Return in which lists of best neurons a neuron is, and how often samples of the rows leave it there."""
    if not rows:
        return f"among the {N_TOP} best of no dataset and probe of the run"
    listed = [
        f"{short(row.dataset)} {probe_title(row.probe)} (place {row.place}"
        + ("" if row.agreement is None else f", in {share(row.agreement)} of samples")
        + ")"
        for row in rows
    ]
    return f"among the {N_TOP} best of {', '.join(listed)}"


def neuron_table(title: str, numbers_of: NeuronRows, labels: Sequence[str] | None) -> Table:
    """Return what a neuron does on the rows of a split: over all of them, and by their right option."""
    names = option_names(labels, numbers_of.signs_PO.shape[1])
    has_all = bool(numbers_of.active_P.all())
    groups = {"all" if has_all else "all with it": numbers_of.active_P}
    groups |= {
        f"right: {name}": (numbers_of.gold_P == option) & numbers_of.active_P for option, name in enumerate(names)
    }
    chosen = {name: numbers_of.chosen(rows) for name, rows in groups.items() if rows.any()}
    means = [None if one.negs_PO is None else one.negs_PO.mean(axis=0).tolist() for one in chosen.values()]
    options, cells = _by_option(labels, means)
    rows = [
        [name, Number(len(one.gold_P)), _activation_cell(one), _sign_cell(one), *negs]
        for (name, one), negs in zip(chosen.items(), cells, strict=True)
    ]
    same = (numbers_of.same_sign(option) for option in range(len(names)))
    said = ", ".join(f"{name} {SIGNS[one.sign]} in {share(one.share)}" for name, one in zip(names, same, strict=True))
    what = "Mean NEG by option" if numbers_of.negs_PO is not None else "This storage level keeps no values of NEGs"
    if not has_all:
        n_active, n_rows = int(numbers_of.active_P.sum()), len(numbers_of.active_P)
        what = f"{n_active} of {n_rows} rows have it, the others were not routed to its expert. {what}"
        if not n_active:
            said = "none"
    caption = f"{what}. Most frequent sign of the NEG for the right option, and its share of rows; for each: {said}."
    return Table(
        f"neuron-{title}",
        title,
        [*texts("rows"), *numbers("", "activation\n5-95 %", "sign for\nright"), *options],
        [rows],
        caption,
    )


def _sign_cell(numbers_of: NeuronRows) -> Cell:
    sign, of_rows = numbers_of.same_sign()
    return f"{SIGNS[sign]} {share(of_rows)}"


def _activation_cell(numbers_of: NeuronRows) -> Cell:
    low, high = np.quantile(numbers_of.activations_P, [0.05, 0.95])
    form: Callable[[float], str] = "{:+.2f}".format
    return Number(float(numbers_of.activations_P.mean()), form), interval(float(low), float(high), form, " to ")


def moved_table(
    title: str,
    moved: Sequence[Moved],
    ids: Sequence[str],
    numbers_of: NeuronRows,
    labels: Sequence[str] | None,
    examples: Mapping[str, Example],
) -> Table:
    """Return the rows that a neuron moves most, with the texts that are known."""
    names = option_names(labels, numbers_of.signs_PO.shape[1])
    rows: list[list[Cell]] = []
    for one in moved:
        example = examples.get(ids[one.row])
        own = option_names(example.labels, len(names)) if example else names
        rows.append(
            [
                ids[one.row],
                own[one.option],
                own[numbers_of.gold_P[one.row]],
                Number(one.neg, neg_size),
                Number(float(numbers_of.activations_P[one.row]), "{:+.2f}".format),
                private(_end_of(example.prompt)) if example else "(its text is not in the data that is there now)",
            ]
        )
    columns = [
        *texts("row", "moves", "right"),
        *numbers("NEG", "activation"),
        Column("end of the prompt", is_private=True),
    ]
    return Table(f"moved-{title}", f"{title}: prompts it moves most", columns, [rows])


def _end_of(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= _LONGEST_TEXT else f"... {line[-_LONGEST_TEXT:]}"


def lens_table(name: str, tokens: LensTokens) -> Table:
    """Return the tokens that a neuron's row promotes and suppresses."""
    rows: list[list[Cell]] = [
        [*_token_cells(up), *_token_cells(down)] for up, down in zip_longest(tokens.promoted, tokens.suppressed)
    ]
    return Table(
        key="lens",
        title=f"Tokens that the output row of {name} writes",
        columns=[*texts("promotes"), *numbers("logit"), *texts("suppresses"), *numbers("logit")],
        blocks=[rows],
        caption="Logit lens: final normalisation (without its bias) and unembedding, applied to the row alone; layers "
        "in between are left out. Where the input of the down projection is negative, the two lists change places.",
    )


def _token_cells(written: tuple[str, float] | None) -> list[Cell]:
    return ["", ""] if written is None else [quoted(written[0]), Number(written[1], "{:+.1f}".format)]


def sweep_table(
    title: str, ids: Sequence[str], labels: Sequence[str], stored: Sequence[float], sweep: SweepResult
) -> Table:
    """Return the measured change of the moved option's target under shifts of a neuron, row by row."""
    at = [int(np.abs(sweep.shifts_S - shift).argmin()) for shift in _SHOWN_SHIFTS]
    rows: list[list[Cell]] = [
        [
            row,
            label.strip() or quoted(label),
            Number(neg, neg_size),
            Number(float(sweep.negs_PK[index, 0]), neg_size),
            Number(float(sweep.pearson_PK[index, 0]), correlation),
            *(Number(float(sweep.changes_PKS[index, 0, one]), _small_change) for one in at),
        ]
        for index, (row, label, neg) in enumerate(zip(ids, labels, stored, strict=True))
    ]
    return Table(
        key=f"sweep-{title}",
        title=f"{title}: measured curve",
        columns=[
            *texts("row", "moves"),
            *numbers("stored\nNEG", "measured\nNEG", "r", *(f"{sweep.shifts_S[one]:+g}" for one in at)),
        ],
        blocks=[rows],
        caption=f"Change of the option's {sweep.target} with the neuron shifted by so many units of activation, away "
        f"from zero; measured NEG: slope over {count(len(sweep.shifts_S), 'shift')}.",
    )


def _small_change(value: float) -> str:
    return change(value) if abs(value) >= 0.0005 or value == 0 else neg_size(value)
