"""Tables of the neurons that datasets use, at most 100 columns wide in a terminal."""

from collections.abc import Iterator

from flows.show.accuracy_tables import short
from flows.show.model_names import shown_model
from flows.show.table import Cell, Number, Table, by, numbers, texts
from flows.show.text import bare, count, share
from tasks.utilisation import UsedRow, Utilisation


def utilisation_tables(found: Utilisation) -> Iterator[Table]:
    """Return the share that each dataset uses, and what datasets of one model share, if there are several."""
    yield _used(found)
    if found.shared:
        yield _shared(found)


def _used(found: Utilisation) -> Table:
    few = max(1, found.n_rows // 4)
    few = max(row.n_rows for row in found.used if row.n_rows <= few)
    blocks = []
    for of_run in by(found.used, "run").values():
        for of_model in by(of_run, "model").values():
            blocks.append([_used_row(rows, few, found.n_rows) for rows in by(of_model, "dataset").values()])
    return Table(
        key="utilisation",
        title="Neurons used",
        columns=[
            *texts("run", "model", "dataset"),
            *numbers("rows", "a row", f"{few} rows", f"{found.n_rows} rows", "unrelated", "all rows"),
        ],
        blocks=blocks,
        caption="Share of all neurons that any of so many rows uses, mean over all choices of rows, in %. A row uses "
        "the neurons of each layer with the highest scores for the model's answer; a row: the most that one can use. "
        f"Unrelated: the share if each of {found.n_rows} rows chose at random. Compare datasets at {found.n_rows} "
        "rows: the share grows with rows.",
    )


def _used_row(rows: list[UsedRow], few: int, n_rows: int) -> list[Cell]:
    known = {row.n_rows: row for row in rows}
    first, last = rows[0], rows[-1]
    shares = [known[few].share, known[n_rows].share, known[n_rows].unrelated, last.share]
    one = first.per_layer * first.n_layers / first.n_neurons
    cells: list[Cell] = [first.run, shown_model(first.model), short(first.dataset), Number(first.n_all)]
    return [*cells, *(Number(value, percent) for value in (one, *shares))]


def percent(value: float) -> str:
    """Return a share in percent with two digits behind the point."""
    return bare(f"{100 * value:.2f}")


def _shared(found: Utilisation) -> Table:
    rows: list[list[Cell]] = [
        [
            row.run,
            f"{short(row.dataset_a)}, {short(row.dataset_b)}",
            Number(row.shared, percent),
            Number(row.jaccard, share),
            Number(row.chance, share),
        ]
        for row in found.shared
    ]
    return Table(
        key="utilisation-shared",
        title=f"Neurons used by two datasets, of {count(found.n_rows, 'row')} each",
        columns=[*texts("run", "datasets"), *numbers("both", "Jaccard", "chance")],
        blocks=[rows],
        caption="Both: share of all neurons, in %. Jaccard: over the share that either uses. Chance: the index of as "
        "many neurons of each layer, drawn at random.",
    )
