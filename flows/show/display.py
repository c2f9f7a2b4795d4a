"""Progress of a run, and datasets, as a person at a terminal sees them."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars

from flows.show.progress_columns import Pace, Parts
from flows.show.table import Cell, Number, Table, numbers, texts
from flows.show.text import count, printable
from negcore.datasets import Dataset, DatasetInfo, Example
from negcore.model.prompt_ids import ProbedToken, PromptReader
from tasks.pool.base import Stopped
from tasks.steps import Progress


class Display:
    """Progress bars of the whole run and of each step that has workers; without a terminal, one line for each step."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console = console
        self._progress = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            Parts(),
            TimeElapsedColumn(),
            Pace(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._whole = self._progress.add_task(escape(title), total=total, note="starting", since=None, reused=0)
        self._bars: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        self._reused: dict[str, int] = {}
        """Parts that were there when a step began, by its name."""
        self._finished = 0
        """Parts of steps that ended: another step may have the same name."""
        self._lock = threading.Lock()

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def starting(self, what: str) -> None:
        """Show what is being started, as long as no step has begun; without a terminal, in a line."""
        if not self._console.is_terminal:
            self._console.print(escape(f"starting {what} ..."), highlight=False)
        self._progress.update(self._whole, note=escape(f"starting {what}"))

    def advance(self, progress: Progress) -> None:
        with self._lock:
            step, is_shown = progress.step, not progress.is_queued
            if step not in self._bars:
                if not self._reused:
                    self._progress.update(self._whole, note="", since=self._progress.get_time())
                self._reused[step] = self._reused.get(step, 0) + progress.done
                own: dict[str, Any] = {"note": "", "since": self._progress.get_time(), "reused": progress.done}
                self._bars[step] = self._progress.add_task(f"  {escape(step)}", total=progress.total, **own)
            note = escape(progress.note)
            self._progress.update(self._bars[step], completed=progress.done, note=note, visible=is_shown)
            if progress.is_queued:  # its time begins with its first worker
                self._progress.update(self._bars[step], since=self._progress.get_time(), reused=progress.done)
            self._done[step] = progress.done
            done, reused = self._finished + sum(self._done.values()), sum(self._reused.values())
            self._progress.update(self._whole, completed=done, reused=reused)

    def tell(self, line: str) -> None:
        """Show a line above the bars."""
        self._console.print(escape(line), highlight=False, soft_wrap=True)

    def finish(self, step: str, error: BaseException | None) -> None:
        with self._lock:
            if step in self._bars:
                self._progress.remove_task(self._bars[step])
                del self._bars[step]
            if isinstance(error, (Stopped, KeyboardInterrupt)):
                pass  # on request, of which a line tells at the end
            elif error is not None:
                self._console.print(f"[red]failed[/red] {escape(step)}: {escape(str(error))}")
            elif not self._console.is_terminal and step in self._done:
                self._console.print(f"finished {escape(step)}", highlight=False)
            self._finished += self._done.pop(step, 0)


def dataset_table(infos: Sequence[DatasetInfo]) -> Table:
    """Return a table of the datasets that have a name."""
    rows: list[list[Cell]] = [
        [info.name, info.genre, Number(info.n_options), ", ".join(info.wordings)] for info in infos
    ]
    columns = [*texts("dataset", "genre"), *numbers("options"), *texts("wordings")]
    return Table("datasets", "Datasets by name", columns, [rows])


def describe_dataset(console: Console, dataset: Dataset, tokenizer: Any) -> None:
    """Show how a dataset's splits came about and what a prompt looks like."""
    report = dataset.split_report
    counts = (report.n_released, report.n_damaged, report.n_available, report.n_used)
    rows: list[list[Cell]] = [[split, *(Number(count.get(split, 0)) for count in counts)] for split in dataset.splits]
    columns = [*texts("split"), *numbers("released", "damaged", "available", "used")]
    console.print(Table("splits", f"{dataset.name}, split policy {report.policy}", columns, [rows]))
    for change in report.dropped:
        console.print(f"dropped {count(change.n_rows, 'row')} of {change.split}: {change.reason}", markup=False)
    for change in report.drawn:
        console.print(f"drew {count(change.n_rows, 'row')} into {change.split}: {change.reason}", markup=False)
    for split in dataset.splits:
        for remark in report.remarks(split):
            console.print(f"{split} rows: {remark}", markup=False)
    if report.group_is_answer:
        console.print("no groups: each has one answer only, so accuracies by group would say nothing", markup=False)
    console.print(dataset.label_rule, markup=False)
    examples = [example for split in ("test", "train", "valid") for example in dataset.splits[split]]
    example = next((one for one in examples if one.probe_end is not None), examples[0])
    text = example.prompt
    if example.probe_end is not None:
        text = _marked(console, examples, example, tokenizer)
    console.rule(f"prompt {escape(example.id)}, gold {escape(repr(example.labels[example.answer]))}")
    console.print(printable(text), markup=False, highlight=False)


def _marked(console: Console, examples: Sequence[Example], example: Example, tokenizer: Any) -> str:
    """Say how many prompts name a probed token, and return one with that token between double brackets."""
    named = [one for one in examples if one.probe_end is not None]
    reader, texts = PromptReader(tokenizer), [one.prompt for one in named]
    places = reader.probed_tokens(texts, reader.read(texts), [one.probe_end or 0 for one in named])
    found = {one.id: place for one, place in zip(named, places, strict=True) if isinstance(place, ProbedToken)}
    n_more = sum(found[one.id].stop > (one.probe_end or 0) for one in named if one.id in found)
    line = f"neurons are read at the token that probe_at names in {len(named)} of {count(len(examples), 'row')}"
    line += f" (in {n_more} it holds characters behind that piece too)" * bool(n_more)
    console.print(f"{line}; below it stands between [[ ]]", markup=False, highlight=False, soft_wrap=True)
    (_, start, stop), text = found[example.id], example.prompt
    return f"{text[:start]}[[{text[start:stop]}]]{text[stop:]}"
