"""Tables of probes' results: for the terminal, at most 100 columns wide, and for Prefect."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from flows.show.display import printable
from tasks.probe import AccuracyRow, Confusion
from tasks.results import Average, SplitAccount

PROBE_TITLES = MappingProxyType(
    {
        "lm": "LM-Prob",
        "polar": "Polar",
        "magn": "Magn",
        "act": "Act",
        "tree": "Tree",
        "polar-gradient": "Polar\ngradient",
        "magn-gradient": "Magn\ngradient",
        "polar-gxa": "Polar\ngrad. x act.",
        "magn-gxa": "Magn\ngrad. x act.",
        "polar-random": "Polar\nrandom",
        "magn-random": "Magn\nrandom",
        "polar-logistic": "Polar\nlogistic",
        "magn-logistic": "Magn\nlogistic",
    }
)
SHOTS = ("zero-shot", "one-shot")
_PROBES_A_TABLE = 5
_OVERLAPPING = "[red]overlapping[/red]"

Row = AccuracyRow | Average
T = TypeVar("T")


def result_tables(scores: Sequence[AccuracyRow], averages: Sequence[Average], n_datasets: int) -> Iterator[Table]:
    """A table for every model and number of demonstrations; where there are many probes, several.

    Parameters
    ----------
    n_datasets : int
        Datasets that were asked for: averages over fewer say so.
    """
    for model, shots in dict.fromkeys((score.model, score.shots) for score in scores):
        own = [score for score in scores if (score.model, score.shots) == (model, shots)]
        own_averages = [mean for mean in averages if (mean.model, mean.shots) == (model, shots)]
        names = list(dict.fromkeys(score.probe for score in own))
        for start in range(0, len(names), _PROBES_A_TABLE):
            probes = names[start : start + _PROBES_A_TABLE]
            title = f"Accuracy on test: {_model(model)}, {SHOTS[shots]}"
            yield _accuracy_table(title, probes, own, own_averages, n_datasets)


def _accuracy_table(
    title: str, probes: Sequence[str], scores: Sequence[AccuracyRow], averages: Sequence[Average], n_datasets: int
) -> Table:
    table = _table(title)
    table.caption = "After an accuracy: neurons kept, chosen on valid. Below: 95 % interval (Wilson)."
    if averages:
        table.caption += (
            " Averages count every dataset the same; their interval (MOVER of Wilson's) is for other rows "
            "of the same datasets."
        )
    table.add_column("dataset", overflow="fold")
    for name in ("train\ntest", "random\nmajority", *(PROBE_TITLES[probe] for probe in probes)):
        table.add_column(name, justify="right", no_wrap=True)
    means = {(mean.genre, mean.probe): mean for mean in averages}
    for genre, of_genre in _by(scores, "genre").items():
        if averages:
            table.add_row(f"[bold]{escape(genre)}[/bold]")
        for of_dataset in _by(of_genre, "dataset").values():
            for of_group in _by(of_dataset, "group").values():
                table.add_row(*_score_cells(of_group, probes))
        if (genre, probes[0]) in means and means[genre, probes[0]].n_datasets > 1:
            table.add_row(*_average_cells(f"average of {means[genre, probes[0]].n_datasets}", genre, means, probes))
        if averages:
            table.add_section()
    if averages:
        n = means["", probes[0]].n_datasets
        whole = f"average of {n}" if n == n_datasets else f"average of {n}\n({n_datasets - n} missing)"
        table.add_row(*_average_cells(f"[bold]all genres[/bold]\n{whole}", "", means, probes))
    return table


def _score_cells(scores: Sequence[AccuracyRow], probes: Sequence[str]) -> list[str]:
    first, by_probe = scores[0], {score.probe: score for score in scores}
    name = escape(printable(f"  {first.group}" if first.group else short(first.dataset)))
    mark = f"\n{_OVERLAPPING}" if first.overlapping and not first.group else ""
    sizes = f"{first.n_train}\n{first.n_test}" if not first.group else f"\n{first.n_test}"
    return [name + mark, sizes, _floors(first), *(_cell(by_probe[probe]) for probe in probes)]


def _average_cells(name: str, genre: str, means: Mapping[tuple[str, str], Average], probes: Sequence[str]) -> list[str]:
    first = means[genre, probes[0]]
    mark = f"\n{_OVERLAPPING}" if first.overlapping else ""
    return [f"[italic]{name}[/italic]{mark}", "", _floors(first), *(_cell(means[genre, probe]) for probe in probes)]


def _floors(row: Row) -> str:
    return f"{share(row.random)}\n{share(row.majority)}"


def _cell(row: Row) -> str:
    n_neurons = row.n_neurons if isinstance(row, AccuracyRow) else None
    kept = "" if n_neurons is None else f" [dim]{n_neurons}[/dim]"
    return f"[bold]{share(row.accuracy)}[/bold]{kept}\n{share(row.low)}-{share(row.high)}"


def comparison_table(runs: Mapping[str, Sequence[AccuracyRow]]) -> Table:
    """Accuracies of several runs side by side: for every model, shots and dataset that two of them have, a line a run.

    Parameters
    ----------
    runs : mapping of name to scores
        Those of groups of rows are left out.
    """
    named = [(name, score) for name, scores in runs.items() for score in scores if not score.group]
    probes = list(dict.fromkeys(score.probe for _, score in named))
    table = _table("Accuracy on test, run by run")
    table.caption = "After an accuracy: neurons kept, chosen on valid. Below: 95 % interval (Wilson)."
    table.add_column("dataset", overflow="fold")
    table.add_column("run", overflow="fold")
    for name in ("train\ntest", "random\nmajority", *(PROBE_TITLES[probe] for probe in probes)):
        table.add_column(name, justify="right", no_wrap=True)
    asked: dict[tuple[str, int, str], dict[str, dict[str, AccuracyRow]]] = {}
    for name, score in named:
        asked.setdefault((score.model, score.shots, score.dataset), {}).setdefault(name, {})[score.probe] = score
    for question, by_run in asked.items():
        if len(by_run) > 1:
            title = _question(*question, several=len({key[:2] for key in asked}) > 1)
            for at, (name, by_probe) in enumerate(by_run.items()):
                table.add_row(title if at == 0 else "", *_run_cells(name, by_probe, probes))
            table.add_section()
    return table


def _question(model: str, shots: int, dataset: str, *, several: bool) -> str:
    where = f"\n[dim]{_model(model)}, {SHOTS[shots]}[/dim]" if several else ""
    return escape(printable(short(dataset))) + where


def _run_cells(name: str, by_probe: Mapping[str, AccuracyRow], probes: Sequence[str]) -> list[str]:
    first = next(iter(by_probe.values()))
    mark = f"\n{_OVERLAPPING}" if first.overlapping else ""
    cells = [_cell(by_probe[probe]) if probe in by_probe else "" for probe in probes]
    return [escape(printable(name)) + mark, f"{first.n_train}\n{first.n_test}", _floors(first), *cells]


def rows_table(accounts: Sequence[SplitAccount]) -> Table:
    """How many rows of every dataset were used, and what became of the others (with demonstrations, if any)."""
    shots = max(account.shots for account in accounts)
    table = _table(f"Rows released and used, {SHOTS[shots]}, split policy {accounts[0].policy}")
    table.add_column("dataset", overflow="fold")
    for name in ("train", "valid", "test"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("left out, or drawn from elsewhere")
    for dataset, splits in _by([account for account in accounts if account.shots == shots], "dataset").items():
        mark = f"\n{_OVERLAPPING}" if splits[0].overlapping else ""
        sizes = [f"{split.n_released}\n{split.n_used}" for split in splits]
        notes = [f"{split.split}: {split.changes}" for split in splits if split.changes]
        table.add_row(escape(printable(short(dataset))) + mark, *sizes, escape("\n".join(notes)))
    return table


def confusion_tables(confusion: Sequence[Confusion]) -> Iterator[Table]:
    """For every model, number of demonstrations and dataset: a row a probe and gold option, a column an answer."""
    for of_model in _by(confusion, "model").values():
        for of_shots in _by(of_model, "shots").values():
            for of_dataset in _by(of_shots, "dataset").values():
                yield _confusion_table(of_dataset)


def _confusion_table(counts: Sequence[Confusion]) -> Table:
    first, n_options = counts[0], max(count.gold for count in counts) + 1
    name = escape(printable(short(first.dataset)))
    table = _table(f"{name}: answers by gold option\n{_model(first.model)}, {SHOTS[first.shots]}")
    table.add_column("probe", min_width=30)
    table.add_column("gold", justify="right")
    for option in range(n_options):
        table.add_column(f"{option}", justify="right")
    for probe, of_probe in _by(counts, "probe").items():
        for gold, of_gold in _by(of_probe, "gold").items():
            title = PROBE_TITLES[probe].replace("\n", " ") if gold == 0 else ""
            cells = [f"[bold]{one.n}[/bold]" if one.predicted == gold else str(one.n) for one in of_gold]
            table.add_row(title, str(gold), *cells)
        table.add_section()
    return table


def artifact_tables(
    scores: Sequence[AccuracyRow], averages: Sequence[Average], accounts: Sequence[SplitAccount]
) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Title and rows by artifact key."""
    tables = {"accuracy": ("Accuracy of probes on test", [_score_row(score) for score in scores])}
    if averages:
        title = "Mean accuracy over datasets, each counting the same"
        tables["averages"] = (title, [_average_row(mean) for mean in averages])
    rows = [
        {
            "dataset": _marked(account.dataset, account.overlapping),
            "shots": account.shots,
            "split": account.split,
            "released": account.n_released,
            "used": account.n_used,
            "left out, or drawn from elsewhere": account.changes,
        }
        for account in accounts
    ]
    return tables | {"rows": ("Rows released and used", rows)}


def _score_row(score: AccuracyRow) -> dict[str, Any]:
    return {
        "model": score.model,
        "shots": score.shots,
        "dataset": _marked(score.dataset, score.overlapping),
        "group": score.group,
        "probe": PROBE_TITLES[score.probe].replace("\n", " "),
        "neurons": score.n_neurons,
        **_figures(score),
        "test rows": score.n_test,
        "train rows": score.n_train,
    }


def _average_row(mean: Average) -> dict[str, Any]:
    return {
        "model": mean.model,
        "shots": mean.shots,
        "genre": _marked(mean.genre or "all", mean.overlapping),
        "probe": PROBE_TITLES[mean.probe].replace("\n", " "),
        **_figures(mean),
        "datasets": mean.n_datasets,
    }


def _figures(row: Row) -> dict[str, Any]:
    return {
        "accuracy": round(row.accuracy, 3),
        "95 % interval": f"{share(row.low)} - {share(row.high)}",
        "majority": round(row.majority, 3),
        "random": round(row.random, 3),
    }


def _marked(name: str, overlapping: bool) -> str:
    return f"{name} (overlapping)" if overlapping else name


def _table(title: str) -> Table:
    return Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def _by(rows: Iterable[T], name: str) -> dict[Any, list[T]]:
    """Rows by the value of one of their fields, in order of appearance."""
    groups: dict[Any, list[T]] = {}
    for row in rows:
        groups.setdefault(getattr(row, name), []).append(row)
    return groups


def _model(model: str) -> str:
    """A model's name for a title; of a folder only the last part."""
    return escape(printable(Path(model).name if Path(model).is_absolute() else model))


def short(dataset: str) -> str:
    """A dataset's name without the benchmark's."""
    return dataset.removeprefix("mceval8k/")


def share(value: float) -> str:
    """Three decimals without the leading zero."""
    return f"{value:.3f}".removeprefix("0") if value < 0.9995 else "1.00"
