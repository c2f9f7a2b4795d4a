"""Columns of progress bars: how many parts there are, how fast they come, and how long the rest will take."""

from rich.progress import ProgressColumn, Task
from rich.text import Text

from flows.show.text import count, duration


class Parts(ProgressColumn):
    """The parts that are done: shards, and steps of probes and analyses."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.0f}/{count(int(task.total or 0), 'part')}", "progress.download")


class Pace(ProgressColumn):
    """The parts a minute and the time left, at the mean pace of this session: it falls as long as nothing comes.

    A task has two fields: `since`, the time at which its work began (None: it has not), and `reused`, the parts that
    were there already and took no time.
    """

    def render(self, task: Task) -> Text:
        return Text(pace(task.completed - task.fields["reused"], task.remaining or 0, _elapsed_s(task)), "dim")


def _elapsed_s(task: Task) -> float:
    since = task.fields["since"]
    return 0.0 if since is None else task.get_time() - since


def pace(gained: float, remaining: float, elapsed_s: float) -> str:
    """Return the parts a minute and the time left, for people; empty where nothing can be known or nothing is left."""
    if gained <= 0 or remaining <= 0 or elapsed_s <= 0:
        return ""
    rate = gained / elapsed_s
    return f"{rate * 60:.3g} a minute, {duration(remaining / rate)} left"
