"""Tables that compare the models of a campaign: for the terminal, at most 100 columns wide, and for Prefect."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from math import isnan
from statistics import fmean
from types import MappingProxyType
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from flows.show.accuracy_tables import PROBE_TITLES, SHOTS, share
from flows.show.display import printable
from flows.show.linearity_tables import number
from tasks.campaign import N_DEPTHS, Comparison, GainRow, LinearityRow, ProfileRow
from tasks.results import Average

_MEASURES = MappingProxyType(
    {
        "linear_share": "share of linear neurons",
        "median_size": "median |NEG|, in parts of the model's mean",
        "skill_share": "share of skill neurons",
    }
)
_OUTCOME_STYLES = MappingProxyType({"whole": "green", "in part": "yellow", "failed": "red"})

T = TypeVar("T", Average, GainRow, ProfileRow)


def campaign_tables(comparison: Comparison) -> Iterator[Table]:
    """What became of every stage, then accuracy, best probes, linearity and profiles, as far as they were measured."""
    yield _outcomes(comparison)
    for shots in dict.fromkeys(mean.shots for mean in comparison.accuracy):
        yield _accuracy(comparison, shots)
    if comparison.gains:
        yield _gains(comparison)
    if comparison.linearity:
        yield _linearity(comparison)
    if comparison.profiles:
        yield _profiles(comparison)


def artifact_tables(comparison: Comparison) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Title and rows by artifact key: names and numbers only, so no reasons, which may quote a prompt."""
    outcomes = [
        {"model": printable(row.name), "stage": row.stage, "result": row.outcome, "problems": row.n_problems}
        for row in comparison.outcomes
    ]
    tables: dict[str, tuple[str, list[Any]]] = {
        "accuracy": ("Mean accuracy by genre, each dataset counting the same", comparison.accuracy),
        "gains": ("Best probe beside LM-Prob", comparison.gains),
        "linearity": ("Linearity of models", comparison.linearity),
        "profiles": ("Layer profiles by tenths of depth", comparison.profiles),
    }
    return {
        "outcomes": ("Models and stages", outcomes),
        **{
            key: (title, [_record(asdict(row), comparison.names) for row in rows])
            for key, (title, rows) in tables.items()
            if rows
        },
    }


def _record(row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Titles for people, and values that JSON can hold."""
    row["model"] = names[row["model"]]
    if row.get("genre") == "":
        row["genre"] = "all"
    if row.get("probe"):
        row["probe"] = _probe(row["probe"])
    return {name.removeprefix("n_").replace("_", " "): _json(value) for name, value in row.items()}


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return None if isnan(value) else float(f"{value:.4g}")
    return printable(value) if isinstance(value, str) else value


def _outcomes(comparison: Comparison) -> Table:
    table = Table(title="Models and stages", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("model", "stage", "result", "why"):
        table.add_column(name, overflow="fold")
    said = ""
    for row in comparison.outcomes:
        result = f"[{_OUTCOME_STYLES[row.outcome]}]{row.outcome}[/]"
        more = f" (and {row.n_problems - 1} more)" if row.n_problems > 1 else ""
        why = "the same" if row.reason and row.reason == said else escape(printable(row.reason))
        table.add_row(_name(comparison, row.model), row.stage, result, why + more)
        said = row.reason
    return table


def _accuracy(comparison: Comparison, shots: int) -> Table:
    means = [mean for mean in comparison.accuracy if mean.shots == shots]
    table, genres = _by_genre(f"Mean accuracy on test, {SHOTS[shots]}", means)
    table.caption = (
        "Every dataset counts the same. Below: 95 % interval (MOVER of Wilson's), for other rows of the same datasets. "
        "(n): so many datasets only, fewer than another model has. *: splits overlap."
    )
    by_probe = {probe: [mean for mean in means if mean.probe == probe] for probe in PROBE_TITLES}
    most = {genre: max(mean.n_datasets for mean in means if mean.genre == genre) for genre in genres}
    _add_floors(table, by_probe["lm"], genres)
    for probe, of_probe in by_probe.items():
        if of_probe:
            table.add_row(f"[bold]{_probe(probe)}[/bold]")
            for model, of_model in _by_model(of_probe).items():
                cells = {mean.genre: _cell(mean, most[mean.genre]) for mean in of_model}
                table.add_row(_name(comparison, model), *(cells.get(genre, "") for genre in genres))
            table.add_section()
    return table


def _add_floors(table: Table, means: Sequence[Average], genres: Sequence[str]) -> None:
    """One row, or several where models were asked different rows."""
    table.add_row("[bold]floors[/bold]")
    rows: dict[tuple[str, ...], None] = {}
    for of_model in _by_model(means).values():
        cells = {mean.genre: f"{share(mean.random)}\n{share(mean.majority)}" for mean in of_model}
        rows[tuple(cells.get(genre, "") for genre in genres)] = None
    for row in rows:
        table.add_row("random\nmajority", *row)
    table.add_section()


def _cell(mean: Average, most: int) -> str:
    fewer = f" [dim]({mean.n_datasets})[/dim]" if mean.n_datasets < most else ""
    mark = "[red]*[/red]" if mean.overlapping else ""
    return f"[bold]{share(mean.accuracy)}[/bold]{mark}{fewer}\n{share(mean.low)}-{share(mean.high)}"


def _gains(comparison: Comparison) -> Table:
    table, genres = _by_genre("Best probe beside LM-Prob", comparison.gains)
    table.caption = (
        "Accuracy of the probe that is best over all genres, chosen on these very test rows; below, LM-Prob's, and "
        "the difference."
    )
    for shots in dict.fromkeys(row.shots for row in comparison.gains):
        table.add_row(f"[bold]{SHOTS[shots]}[/bold]")
        for model, rows in _by_model([row for row in comparison.gains if row.shots == shots]).items():
            cells = {row.genre: _gain_cell(row) for row in rows}
            label = f"{_name(comparison, model)}\n{_probe(rows[0].probe)}"
            table.add_row(label, *(cells.get(genre, "") for genre in genres))
        table.add_section()
    return table


def _gain_cell(row: GainRow) -> str:
    return f"[bold]{share(row.accuracy)}[/bold]\n{share(row.lm)}\n{_signed(row.gain)}"


def _by_genre(title: str, rows: Sequence[Average | GainRow]) -> tuple[Table, list[str]]:
    """A table with a column for every genre and for all, and these genres."""
    genres = [genre for genre in dict.fromkeys(row.genre for row in rows) if genre]
    table = _table(title, "model", *genres, *(["all\ngenres"] if len(genres) > 1 else []))
    return table, [*genres, *([""] if len(genres) > 1 else [])]


def _linearity(comparison: Comparison) -> Table:
    first = comparison.linearity[0]
    title = f"Linearity within ±{first.range:g} on {escape(printable(first.dataset))}"
    table = _table(title, "model", "prompts x\nneurons", "linear", "NEG > 0", "r of\nNeurGrad")
    table.caption = "Below r: 95 % bootstrap interval over prompts."
    for row in comparison.linearity:
        cells = [number(row.linear_share), number(row.positive_share), _pearson(row)]
        table.add_row(_name(comparison, row.model), f"{row.n_prompts} x {row.n_neurons}", *cells)
    return table


def _pearson(row: LinearityRow) -> str:
    if row.pearson is None or row.pearson_low is None or row.pearson_high is None:
        return ""
    return f"[bold]{number(row.pearson)}[/bold]\n{number(row.pearson_low)}, {number(row.pearson_high)}"


def _profiles(comparison: Comparison) -> Table:
    ends = [f"{100 * depth // N_DEPTHS}%" for depth in range(1, N_DEPTHS + 1)]
    table = _table("Layer profiles", "model", "mean", *ends)
    table.caption = "Columns: tenths of a model's depth, by where they end; layers that lie in two count in both."
    for (measure, probe), rows in _shown(comparison.profiles).items():
        table.add_row(f"[bold]{_MEASURES[measure]}{f' ({_probe(probe)})' if probe else ''}[/bold]")
        for model, of_model in _by_model(rows).items():
            table.add_row(_name(comparison, model), *_profile_cells(of_model))
        table.add_section()
    return table


def _shown(profiles: Sequence[ProfileRow]) -> dict[tuple[str, str], list[ProfileRow]]:
    """Profiles by measure and probe; of several numbers of skill neurons, those of each model's middle one."""
    groups: dict[tuple[str, str], list[ProfileRow]] = {}
    for row in profiles:
        tops = sorted({other.top for other in profiles if other.model == row.model and other.top is not None})
        if row.top is None or row.top == tops[len(tops) // 2]:
            groups.setdefault((row.measure, row.probe), []).append(row)
    return groups


def _profile_cells(rows: Sequence[ProfileRow]) -> list[str]:
    """The mean over all tenths (of skill neurons, how many they are), and every tenth."""
    values = [row.value for row in rows]
    mean = fmean(value for value in values if value is not None)
    if rows[0].measure == "median_size":
        return [f"{mean:.1e}", *("-" if value is None or not mean else f"{value / mean:.2f}" for value in values)]
    first = share(mean) if rows[0].top is None else f"{rows[0].top} best"
    return [first, *("-" if value is None else share(value) for value in values)]


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _by_model(rows: Iterable[T]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for row in rows:
        groups.setdefault(row.model, []).append(row)
    return groups


def _name(comparison: Comparison, model: str) -> str:
    return escape(printable(comparison.names[model]))


def _probe(probe: str) -> str:
    return PROBE_TITLES[probe].replace("\n", " ")


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1)
