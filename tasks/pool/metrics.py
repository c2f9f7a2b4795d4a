"""Metrics of a run for Prometheus, by way of Ray.

In a Ray session the agent of the driver's node exports them under ``/metrics``, beside Ray's own, every ten seconds.
Ray puts ``ray_`` before each name and forgets a gauge that is not recorded again: after 20 s there is none of a step
that is over. Without a session nothing is recorded. Labels are names, never the text of a row.
"""

import functools
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from negcore.store.publish import Receipt, ShardPlace
from tasks.pool.base import PoolStatus

__all__ = ["METRICS", "Meter", "meter_of"]


class Metric(NamedTuple):
    """A metric: its kind, what it counts, and its labels."""

    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...]


_OF_SHARDS = ("run", "kind", "model", "dataset", "part")
_OF_WORKERS = ("run", "model")

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "neg_rows_measured_total": Metric("counter", "Rows that were measured and stored.", _OF_SHARDS),
        "neg_rows_set_aside_total": Metric("counter", "Rows that were set aside.", _OF_SHARDS),
        "neg_shards_measured_total": Metric("counter", "Shards that were measured and stored.", _OF_SHARDS),
        "neg_shards_failed_total": Metric("counter", "Shards that were given up.", _OF_SHARDS),
        "neg_shards_finished": Metric("gauge", "Shards of the step under way that are there.", _OF_SHARDS),
        "neg_shards_wanted": Metric("gauge", "Shards of the step under way when it is done.", _OF_SHARDS),
        "neg_workers": Metric("gauge", "Workers of the step under way, by state.", (*_OF_WORKERS, "state")),
        "neg_workers_lost_total": Metric("counter", "Workers that died or were ended.", _OF_WORKERS),
    }
)
"""Every metric, by its name before Ray's prefix."""

_COUNTERS_OF_SHARDS = [
    name for name, metric in METRICS.items() if metric.kind == "counter" and metric.labels == _OF_SHARDS
]


class Meter:
    """The metrics of one run directory. Threads may share it."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._lost: dict[str, tuple[int, int]] = {}
        """By model, the number of its last pool and that pool's losses."""
        self._lock = threading.Lock()

    def shards(self, place: ShardPlace, finished: int, wanted: int) -> None:
        """Record how many shards of a directory are there, of how many, and that its counters exist."""
        labels = self._of_place(place)
        for name in _COUNTERS_OF_SHARDS:
            _record(name, 0, labels)
        _record("neg_shards_finished", finished, labels)
        _record("neg_shards_wanted", wanted, labels)

    def measured(self, place: ShardPlace, receipt: Receipt) -> None:
        """Record a shard that was published."""
        labels = self._of_place(place)
        _record("neg_shards_measured_total", 1, labels)
        _record("neg_rows_measured_total", receipt.n_rows, labels)
        _record("neg_rows_set_aside_total", len(receipt.set_aside), labels)

    def failed(self, place: ShardPlace) -> None:
        """Record a shard that was given up."""
        _record("neg_shards_failed_total", 1, self._of_place(place))

    def workers(self, status: PoolStatus) -> None:
        """Record what the workers of a pool are doing, and those lost since its last status."""
        labels = {"run": self._run, "model": status.label}
        busy = min(status.ready, status.running + status.elsewhere)  # some have a job that waits behind another
        for state, number in (("busy", busy), ("idle", status.ready - busy), ("starting", status.starting)):
            _record("neg_workers", number, labels | {"state": state})
        with self._lock:
            pool, before = self._lost.get(status.label, (status.pool, 0))
            if pool != status.pool:
                before = 0
            # Several steps tell of one pool, and one may be late with what another has told.
            self._lost[status.label] = status.pool, max(status.lost, before)
        _record("neg_workers_lost_total", max(status.lost - before, 0), labels)

    def _of_place(self, place: ShardPlace) -> dict[str, str]:
        return {"run": self._run, **place._asdict()}


@functools.cache
def meter_of(root: Path) -> Meter:
    """Return the meter of a run directory; it is named as the directory, without those around it."""
    return Meter(root.name)


def _record(name: str, value: float, labels: Mapping[str, str]) -> None:
    """Set a gauge, or raise a counter, if only by nothing; outside a Ray session do nothing."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return
    tags = {key: _in_ascii(text) for key, text in labels.items()}
    # `inc` does not take zero, but a counter that Prometheus has not seen at zero has no first increase.
    _instrument(name)._record(value, tags)


@functools.cache
def _instrument(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge

    metric = METRICS[name]
    cls = {"counter": Counter, "gauge": Gauge}[metric.kind]
    return cls(name, description=metric.help, tag_keys=metric.labels)


def _in_ascii(text: str) -> str:
    """Escape what Ray refuses in a label, and control characters."""
    return text.encode("unicode_escape").decode("ascii")
