"""The pages: an index of runs, a run, its tables, its rows, a row, a neuron, and runs side by side."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from flows.cli.neurons import check_name
from flows.show.accuracy_tables import accuracy_tables, comparison_table
from flows.show.beyond_tables import beyond_comparison
from flows.show.model_names import distinct_names, shown_model, told_apart
from flows.show.neuron_tables import moved_table, neg_size, neuron_table, neuron_tables, places_line
from flows.show.report import REPORT_FILE
from flows.show.table import Cell, Column, Number, Table, Words, numbers, texts
from flows.show.text import count, share
from flows.view.page import Link, LinkOf, Page, Part, address
from flows.view.runs import Runs, RunSummary, opened
from flows.view.runs import texts as texts_of
from negcore.analysis.neurons import read_neuron
from negcore.datasets import Example
from negcore.errors import NegError, RunError
from negcore.store.files import n_bytes, read_bytes
from negcore.store.reader import NegSplit
from negcore.targets import neg_unit
from tasks.beyond_lm import compared_files, read_beyond
from tasks.neurons import listed_neurons
from tasks.predictions import PREDICTIONS_FILE
from tasks.probe import AccuracyRow
from tasks.run_negs import StoredSplit, only_model
from tasks.rundir.manifest import check_results
from tasks.rundir.tables import read_arrow, read_table, result_tables

ROWS = 50
"""Rows of a dataset on one page."""
_MOST_CELLS = 1000
"""Rows of a table that are shown."""
_MOVED, _STRONGEST = 10, 20
_END = 120
INDEX = Link("runs", "/")


def index(runs: Runs) -> Page:
    """Return the index of all runs, the newest first; several can be chosen to be compared."""
    found = sorted(map(runs.summary, runs.places()), key=lambda one: -(one.written_s or 0))
    rows = [[*_summary_cells(one)] for one in found]
    table = Table("runs", count(len(found), "run"), texts("run", "kind", "models", "data", "state", "date"), [rows])
    names = [one.name for one in found]
    links: dict[str, LinkOf] = {"run": lambda row: address("run", run=row[0])}
    return Page(str(runs.root), [Part(table=table, links=links, choices=names if len(names) > 1 else ())])


def _summary_cells(one: RunSummary) -> Iterator[Cell]:
    yield from (one.name, one.kind, "\n".join(distinct_names(one.models).values()), _listed(one.subjects))
    yield Words(one.state, "green" if one.state == "finished" else "yellow")
    yield "" if one.written_s is None else f"{datetime.fromtimestamp(one.written_s, UTC):%Y-%m-%d %H:%M} UTC"


def _listed(names: Sequence[str], most: int = 4) -> str:
    return "\n".join([*names[:most], *([f"and {len(names) - most} more"] if len(names) > most else [])])


def run_page(runs: Runs, name: str, report: str) -> Page:
    """Return what there is of a run: results, best neurons, rows, run file, and its report below that address."""
    splits = runs.splits(name)
    with told_apart(one.place.model for one in splits.values()):
        return _run_page(runs, name, report, splits)


def _run_page(runs: Runs, name: str, report: str, splits: Mapping[str, StoredSplit]) -> Page:
    place, summary = runs.at(name), runs.summary(name)
    parts = [Part(lines=[f"{summary.kind}: {summary.state}", str(place)])]
    if n_bytes(place / REPORT_FILE) is not None:
        parts.append(Part(lines=[Link("report of the run", f"{report}{REPORT_FILE}")]))
    parts += _accuracy_parts(runs, name)
    for model in dict.fromkeys(one.place.model for one in splits.values()):
        parts.append(Part(f"Neurons of {shown_model(model)}", asked={"run": name, "model": model}))
    parts += _best_parts(runs, name)
    if splits:
        parts.append(_splits_part(name, splits))
    if tables := result_tables(place):
        lines = [Link(table, address("table", run=name, table=table)) for table in tables]
        parts.append(Part("Tables of results", lines=lines))
    parts.append(Part("Run file", text=_text(read_bytes(place / "run.yaml"))))
    return Page(name, parts, [INDEX])


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _accuracy_parts(runs: Runs, name: str) -> Iterator[Part]:
    file = runs.at(name) / "accuracy.arrow"
    if n_bytes(file) is None:
        return
    try:
        warning, scores = check_results(file.parent, [file]), read_table(file, AccuracyRow)
    except NegError as error:
        yield Part("Accuracy", lines=[f"{error}"])
        return
    if warning:
        yield Part(lines=[warning])
    yield from (Part(table=table) for table in accuracy_tables(scores, [], 0))


def _best_parts(runs: Runs, name: str) -> Iterator[Part]:
    """Return the best neurons of every probe; each leads to its page."""
    try:
        rows = listed_neurons(runs.at(name)).rows
    except NegError as error:
        yield Part("Best neurons", lines=[f"{error}"])
        return
    for model in dict.fromkeys(row.model for row in rows):
        links = _to_neuron(name, model, 1)
        own = [row for row in rows if row.model == model]
        yield from (Part(table=table, links=links, is_folded=True) for table in neuron_tables(own))


def _splits_part(name: str, splits: Mapping[str, StoredSplit]) -> Part:
    keys: dict[tuple[str, ...], str] = {
        (shown_model(one.place.model), one.title, one.place.part): key for key, one in splits.items()
    }
    table = Table("negs", "Rows whose NEGs are stored", texts("model", "dataset", "rows"), [[*map(list, keys)]])
    return Part(table=table, links={"rows": lambda row: address("rows", run=name, part=keys[tuple(row)])})


def compare_page(runs: Runs, names: Sequence[str]) -> Page:
    """Return the accuracies of several runs side by side.

    Raises
    ------
    RunError
        If there are fewer than two, one has no accuracies, or no dataset is in two of them.
    """
    chosen = list(dict.fromkeys(names))
    if len(chosen) < 2:
        raise RunError("choose at least two runs: there is nothing to compare one with")
    files = {name: compared_files(runs.at(name)) for name in chosen}
    warnings = [warning for found in files.values() if (warning := check_results(found[0].parent, found))]
    scores = {name: read_table(found[0], AccuracyRow) for name, found in files.items()}
    with told_apart(row.model for rows in scores.values() for row in rows):
        tables = [comparison_table(scores), beyond_comparison({name: read_beyond(runs.at(name)) for name in chosen})]
    if not tables[0].blocks:
        raise RunError(f"no dataset is in two of the runs {', '.join(chosen)}, asked of the same model")
    lines: list[str | Link] = [*warnings, *(Link(name, address("run", run=name)) for name in chosen)]
    parts = [Part(lines=lines), *(Part(table=table) for table in tables if table.blocks)]
    return Page("Runs side by side", parts, [INDEX])


def table_page(runs: Runs, name: str, table: str) -> Page:
    """Return the first rows of a table of results, as they are stored."""
    file = result_tables(runs.at(name)).get(table)
    if file is None:
        raise RunError(f"run {name!r:.200} has no table {table!r:.200}")
    warning, stored = check_results(runs.at(name), [file]), read_arrow(file)
    columns = [Column(one.name, is_numeric=_is_number(one.type)) for one in stored.schema]
    rows = [[_stored_cell(value) for value in row.values()] for row in stored.slice(0, _MOST_CELLS).to_pylist()]
    caption = f"The first {_MOST_CELLS} rows." if stored.num_rows > _MOST_CELLS else ""
    lines = [warning] if warning else []
    shown = Table(table, count(stored.num_rows, "row"), columns, [rows], caption)
    return Page(table, [Part(lines=lines, table=shown)], _way(name))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _stored_cell(value: Any) -> Cell:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(str(_stored_cell(one)) if isinstance(one, float) else repr(one) for one in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def rows_page(runs: Runs, name: str, part: str, first: int) -> Page:
    """Return some rows of a split, with what the model answered and the ends of the prompts."""
    split = runs.split(name, part)
    negs = opened(split)
    if first >= negs.n_rows:
        raise RunError(f"{split.title} has {negs.n_rows} rows: there is no row {first}")
    examples, lines = _examples(split)
    shown = range(first, min(first + ROWS, negs.n_rows))
    columns = [*texts("row", "right", "likeliest"), *numbers("p(right)", "mass"), *texts("end of the prompt")]
    cells = [_row_cells(negs, row, examples.get(negs.ids[row])) for row in shown]
    title = f"{split.title}, {split.place.part}: rows {first} to {shown.stop - 1} of {negs.n_rows}"
    links: dict[str, LinkOf] = {"row": lambda row: address("row", run=name, part=part, row=row[0])}
    steps = [(first - ROWS, "rows before"), (first + ROWS, "rows after")]
    turns = [Link(t, address("rows", run=name, part=part, first=at)) for at, t in steps if 0 <= at < negs.n_rows]
    table = Table("rows", title, columns, [cells], "p: probability; mass: that of all options together.")
    return Page(split.title, [Part(lines=lines), Part(table=table, links=links), Part(lines=turns)], _way(name))


def _examples(split: StoredSplit) -> tuple[Mapping[str, Example], list[str]]:
    """Return the texts of a split's rows, or a line that says why there are none."""
    try:
        return texts_of(split), []
    except NegError as error:
        return {}, [f"The texts cannot be shown: {error}"]


def _row_cells(negs: NegSplit, row: int, example: Example | None) -> list[Cell]:
    gold, likeliest = int(negs.gold_P[row]), int(negs.probs_PO[row].argmax())
    names = _option_names(negs, example)
    prompt = " ".join(example.prompt.split()) if example else "(its text is not in the data that is there now)"
    return [
        negs.ids[row],
        names[gold],
        Words(names[likeliest], "" if likeliest == gold else "red"),
        Number(float(negs.probs_PO[row, gold]), share),
        Number(float(negs.label_mass_P[row]), share),
        prompt if len(prompt) <= _END else f"... {prompt[-_END:]}",
    ]


def _option_names(negs: NegSplit, example: Example | None) -> list[str]:
    return list(example.labels) if example else [str(option) for option in range(negs.n_options)]


def row_page(runs: Runs, name: str, part: str, row: str) -> Page:
    """Return everything of one row: its prompt, options, the probes' answers, and the neurons that move it most."""
    split = runs.split(name, part)
    negs = opened(split)
    if row not in negs.ids:
        raise RunError(f"{split.title} has no row {row!r:.200}")
    at = negs.ids.index(row)
    examples, lines = _examples(split)
    example = examples.get(row)
    if example is None and not lines:
        lines = ["Its text is not in the data that is there now."]
    parts = [Part("Prompt", lines=lines, text=example.prompt if example else "")]
    parts.append(Part(table=_options_table(negs, at, example)))
    parts += _predictions_parts(runs, name, split, row, _option_names(negs, example))
    parts.append(_strongest_part(name, negs, at))
    way = [*_way(name), Link(f"{split.title}, {split.place.part}", address("rows", run=name, part=part))]
    return Page(row, parts, way)


def _options_table(negs: NegSplit, at: int, example: Example | None) -> Table:
    gold = int(negs.gold_P[at])
    rows: list[list[Cell]] = [
        [
            repr(label) if example else label,
            Number(float(negs.probs_PO[at, option]), "{:.4g}".format),
            _mark(option == gold),
        ]
        for option, label in enumerate(_option_names(negs, example))
    ]
    return Table("options", "Options", [*texts("option"), *numbers("probability"), *texts("")], [rows])


def _mark(is_right: bool) -> Cell:
    return Words("right", "green") if is_right else ""


def _predictions_parts(runs: Runs, name: str, split: StoredSplit, row: str, options: Sequence[str]) -> Iterator[Part]:
    file = runs.at(name) / PREDICTIONS_FILE
    if split.place.part != "test" or n_bytes(file) is None:
        return
    check_results(runs.at(name), [file])
    stored = read_arrow(file)
    wanted = {"model": split.place.model, "dataset": split.place.dataset, "id": row}
    for column, value in wanted.items():
        stored = stored.filter(pa.compute.equal(stored[column].cast(pa.string()), value))
    cells: list[list[Cell]] = [
        [one["probe"], Number(one["shots"]), options[one["predicted"]], _mark(one["right"])]
        for one in stored.to_pylist()
    ]
    if cells:
        columns = [*texts("probe"), *numbers("shots"), *texts("answer", "")]
        yield Part(table=Table("predictions", "Answers of the probes", columns, [cells]))


def _strongest_part(name: str, negs: NegSplit, at: int) -> Part:
    """Return the neurons whose NEG for the right option is the largest in one row."""
    gold = int(negs.gold_P[at])
    shard = next(one for one in negs.shards() if one.rows.start <= at < one.rows.stop)
    try:
        own = at - shard.rows.start
        negs_LN = np.stack([shard.negs_PON(layer)[own, gold] for layer in range(negs.n_layers)])
        activations_LN = np.stack([shard.activations_PN(layer)[own] for layer in range(negs.n_layers)])
    except NegError as error:
        return Part("Neurons", lines=[f"{error}"])
    largest = np.argsort(-np.abs(negs_LN), axis=None, kind="stable")[:_STRONGEST]
    rows: list[list[Cell]] = [
        [
            negs.name_of(layer, neuron),
            Number(float(negs_LN[layer, neuron]), neg_size),
            f"{activations_LN[layer, neuron]:+.3g}",
        ]
        for layer, neuron in np.stack(np.unravel_index(largest, negs_LN.shape), axis=1).tolist()
    ]
    columns = [*texts("neuron"), *numbers("NEG", "activation")]
    caption = f"NEG for the right option: {neg_unit(negs.target)}, away from zero."
    table = Table("strongest", "Neurons that move the right option most", columns, [rows], caption)
    return Part(table=table, links=_to_neuron(name, negs.place.model, 0))


def _to_neuron(name: str, model: str, column: int) -> dict[str, LinkOf]:
    """Return where a column "neuron" leads that is at some place in its table."""
    return {"neuron": lambda row: address("neuron", run=name, model=model, neuron=row[column])}


def neuron_page(runs: Runs, name: str, neuron: str, model: str) -> Page:
    """Return what a run knows of one neuron: its places, and on every dataset its NEGs and the rows it moves most."""
    check_name(neuron)
    splits = {key: one for key, one in runs.splits(name).items() if one.place.part == "test"}
    splits = {key: one for key, one in splits.items() if model in ("", one.place.model)}
    if not splits:
        raise RunError(
            f"run {name!r:.200} has no test rows{f' of {model!r:.200}' if model else ''} whose NEGs are stored"
        )
    only_model(list(splits.values()))
    first = opened(next(iter(splits.values())))
    layer, number = first.number_of(neuron)
    title = f"Neuron {first.name_of(layer, number)}"
    parts = [Part(lines=_places(runs, name, next(iter(splits.values())).place.model, layer, number))]
    for key, split in splits.items():
        parts += _neuron_parts(name, key, split, layer, number)
    return Page(title, parts, _way(name))


def _places(runs: Runs, name: str, model: str, layer: int, number: int) -> list[str]:
    try:
        listed = listed_neurons(runs.at(name)).rows
    except NegError as error:
        return [shown_model(model), f"{error}"]
    own = [row for row in listed if (row.model, row.layer, row.neuron) == (model, layer, number)]
    return [shown_model(model), *([places_line(own)] if listed else [])]


def _neuron_parts(name: str, key: str, split: StoredSplit, layer: int, number: int) -> Iterator[Part]:
    negs = opened(split)
    negs.locate([(layer, number)])
    try:
        found = read_neuron(negs, layer, number)
    except NegError as error:
        yield Part(split.title, lines=[f"{error}"])
        return
    examples, lines = _examples(split)
    labels = {example.labels for example in examples.values()}
    common = list(labels.pop()) if len(labels) == 1 else None
    yield Part(split.title, lines=lines, table=neuron_table(f"{split.title}, test", found, common))
    if moved := found.most_moved(_MOVED):
        table = moved_table(split.title, moved, negs.ids, found, common, examples)
        yield Part(table=table, links={"row": lambda row: address("row", run=name, part=key, row=row[0])})


def _way(name: str) -> list[Link]:
    return [INDEX, Link(name, address("run", run=name))]
