"""What a person at a terminal sees of a run: progress while it goes on, a table at its end."""

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tasks.pool import PoolStatus
from tasks.probe import Score

PROBE_TITLES = {"lm": "LM-Prob", "polar": "Polar", "magn": "Magn"}


class Display:
    """Progress bars: the whole run and each stage under way; without a terminal, a plain line a stage."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._whole = self._progress.add_task(escape(title), total=total, note="")
        self._bars: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, stage: str, done: int, total: int, status: PoolStatus | None) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(f"  {escape(stage)}", total=total, note="")
        self._progress.update(self._bars[stage], completed=done, note=_note(status))
        self._done[stage] = done
        self._progress.update(self._whole, completed=sum(self._done.values()))

    def finish(self, stage: str, error: BaseException | None) -> None:
        if stage in self._bars:
            self._progress.remove_task(self._bars[stage])
            del self._bars[stage]
        if error is not None:
            self._console.print(f"[red]failed[/red] {escape(stage)}: {escape(str(error))}")
        elif not self._console.is_terminal and stage in self._done:
            self._console.print(f"finished {escape(stage)}: {self._done[stage]} shards", highlight=False)


def _note(status: PoolStatus | None) -> str:
    if status is None:
        return ""
    if status.note:
        return escape(status.note)
    return "" if status.ready else "workers load the model"


def accuracy_table(scores: Sequence[Score]) -> Table:
    """One line a dataset: accuracy with its 95 % interval for each probe, the floors beside them."""
    probes = list(dict.fromkeys(score.probe for score in scores))
    several_models = len({score.model for score in scores}) > 1
    table = Table(title="Accuracy on test, 95 % interval in brackets, k = neurons kept (chosen on valid)")
    if several_models:
        table.add_column("model")
    table.add_column("dataset", no_wrap=True)
    table.add_column("rows train/test", justify="right")
    for name in ("random", "majority"):
        table.add_column(name, justify="right")
    for probe in probes:
        table.add_column(PROBE_TITLES[probe], justify="right")
    for (model, dataset), group in _by_dataset(scores).items():
        first = group[0]
        mark = " (overlapping)" if first.overlapping else ""
        cells = [escape(model)] if several_models else []
        cells += [escape(dataset) + mark, f"{first.n_train}/{first.n_test}"]
        cells += [_share(first.random), _share(first.majority)]
        by_probe = {score.probe: score for score in group}
        table.add_row(*cells, *(_cell(by_probe[probe]) for probe in probes))
    return table


def score_rows(scores: Sequence[Score]) -> list[dict[str, object]]:
    """The table's content, one line a probe, for a Prefect table artifact."""
    return [
        {
            "model": score.model,
            "dataset": score.dataset + (" (overlapping)" if score.overlapping else ""),
            "probe": PROBE_TITLES[score.probe],
            "neurons": score.n_neurons,
            "accuracy": round(score.accuracy, 3),
            "95 % interval": f"{_share(score.low)} - {_share(score.high)}",
            "majority": round(score.majority, 3),
            "random": round(score.random, 3),
            "test rows": score.n_test,
            "train rows": score.n_train,
        }
        for score in scores
    ]


def _by_dataset(scores: Sequence[Score]) -> dict[tuple[str, str], list[Score]]:
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.model, score.dataset), []).append(score)
    return groups


def _cell(score: Score) -> str:
    kept = "" if score.n_neurons is None else f" k={score.n_neurons}"
    return rf"{_share(score.accuracy)} \[{_share(score.low)}-{_share(score.high)}]{kept}"


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0") if value < 1 else "1.00"
