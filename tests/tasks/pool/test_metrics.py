"""What Ray's agent exports of a run, read as Prometheus reads it."""

import importlib.util
import json
import os
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
from clusters import ray_cluster
from manifests import queried
from prometheus_client.parser import text_string_to_metric_families
from support import save_tiny_model

from negcore.store.publish import Receipt, SetAside, ShardPlace
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.measure.missing import measure_missing
from tasks.measure.worker import model_pool
from tasks.plan import plan
from tasks.pool.base import PoolStatus
from tasks.pool.metrics import METRICS, Meter
from tasks.pool.ray_session import ray_session
from tasks.steps import Step

PLACE = ShardPlace("negs", "größe\x1b/llama", "mini/fact", "test")
_EXPORTED_S = 30.0
_NUMBERS = ("done", "failed", "running", "queued", "ready", "starting")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """A head and one node, joined by this driver, whose agents export each second."""
    fast = {"RAY_metrics_report_interval_ms": "1000"}
    with patch.dict(os.environ, fast), ray_cluster(1) as cluster, ray_session(cluster.address):
        yield cluster


def exported() -> str:
    """Everything under /metrics of all nodes, asked for without a token."""
    import ray

    texts = []
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            texts.append(answer.read().decode())
    return "".join(texts)


def samples(run: str) -> Samples:
    """What is exported of a run, by name and labels, without those that Ray adds."""
    families = text_string_to_metric_families(exported())
    return {
        (sample.name, frozenset((key, value) for key, value in sample.labels.items() if key in ours)): sample.value
        for family in families
        for sample in family.samples
        for ours in [METRICS[sample.name.removeprefix("ray_")].labels if sample.name.startswith("ray_neg_") else ()]
        if sample.labels.get("run") == run
    }


def of_place(name: str, run: str, place: ShardPlace) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"ray_{name}", frozenset({"run": run, **place._asdict()}.items())


def of_workers(name: str, run: str, model: str, **more: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"ray_{name}", frozenset({"run": run, "model": model, **more}.items())


def wait_for(run: str, wanted: Samples, record: Callable[[], None] = lambda: None) -> Samples:
    """Read until Ray has exported what is wanted, or give up; return the last value of everything that was seen."""
    deadline = time.monotonic() + _EXPORTED_S
    seen: Samples = {}
    while not wanted.items() <= seen.items() and time.monotonic() < deadline:
        record()
        seen |= samples(run)
        time.sleep(0.2)
    return seen


def status(lost: int = 0, *, label: str = "tiny", pool: int = 1, **numbers: int) -> PoolStatus:
    return PoolStatus(**dict.fromkeys(_NUMBERS, 0) | {"label": label, "lost": lost, "pool": pool} | numbers)


def receipt(n_rows: int, n_set_aside: int) -> Receipt:
    rows = tuple(SetAside(id=str(row), cause="failure", reason="secret") for row in range(n_set_aside))
    return Mock(spec=Receipt, n_rows=n_rows, set_aside=rows)


@pytest.mark.parametrize("name", METRICS)
def test_names_follow_the_rules_of_prometheus(name):
    assert name.startswith("neg_")
    assert name.endswith("_total") == (METRICS[name].kind == "counter")
    assert METRICS[name].help.endswith(".")


def test_rows_shards_and_workers_of_a_run_are_exported(cluster, tmp_path):
    rows = [
        {"prompt": f"Confidential {i} Answer:", "labels": [" A", " B"], "answer": i // 2 % 2, "split": split}
        for i, split in enumerate(("train", "test") * 6)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tiny = save_tiny_model("llama", tmp_path / "tiny-llama")
    values = {"model": [str(tiny)], "dataset": [str(file)], "shard_rows": 2, "out": tmp_path / "nightly"}
    run = read_run_file(SkillRun, None, values)
    (planned,) = plan(run)
    splits = planned.datasets[0].splits
    with model_pool(run, planned.card) as pool:
        done = measure_missing(pool, splits, tmp_path / "nightly", Step())
    wanted = {
        of_place(name, "nightly", one.place): value
        for one in done
        for name, value in (
            ("neg_rows_measured_total", one.n_rows),
            ("neg_rows_set_aside_total", 0),
            ("neg_shards_measured_total", one.n_computed),
            ("neg_shards_failed_total", 0),
            ("neg_shards_finished", one.n_computed),
            ("neg_shards_wanted", one.n_computed),
        )
    }
    found = wait_for("nightly", wanted)
    assert wanted.items() <= found.items()
    states = {dict(labels)["state"] for name, labels in found if name == "ray_neg_workers"}
    assert states == {"busy", "idle", "starting"}
    assert sum(one.n_rows for one in done) == 12
    assert "Confidential" not in exported()


def test_losses_are_exported_with_any_name(cluster):
    meter, run = Meter("größe"), "gr\\xf6\\xdfe"
    meter.measured(PLACE, receipt(5, 2))
    meter.failed(PLACE)

    def tick() -> None:
        meter.shards(PLACE, 4, 9)
        meter.workers(status(2, running=1, elsewhere=1, ready=4, starting=1))

    place = PLACE._replace(model="gr\\xf6\\xdfe\\x1b/llama")
    wanted = {
        of_place("neg_rows_measured_total", run, place): 5,
        of_place("neg_rows_set_aside_total", run, place): 2,
        of_place("neg_shards_measured_total", run, place): 1,
        of_place("neg_shards_failed_total", run, place): 1,
        of_place("neg_shards_finished", run, place): 4,
        of_place("neg_shards_wanted", run, place): 9,
        of_workers("neg_workers", run, "tiny", state="busy"): 2,
        of_workers("neg_workers", run, "tiny", state="idle"): 2,
        of_workers("neg_workers", run, "tiny", state="starting"): 1,
        of_workers("neg_workers_lost_total", run, "tiny"): 2,
    }
    assert wait_for(run, wanted, tick) == wanted
    assert {name.removeprefix("ray_") for name, _ in wanted} == set(METRICS)
    assert "secret" not in exported()


def test_each_lost_worker_is_counted_once_in_pools_that_follow_each_other(cluster):
    meter = Meter("campaign")
    for pool, lost in ((1, 0), (1, 1), (1, 3), (1, 1), (2, 0), (2, 2)):  # steps that share a pool may be late
        meter.workers(status(lost, pool=pool))
    meter.workers(status(4, label="other"))
    wanted = {
        of_workers("neg_workers_lost_total", "campaign", "tiny"): 5,
        of_workers("neg_workers_lost_total", "campaign", "other"): 4,
    }
    found = wait_for("campaign", wanted)
    assert wanted.items() <= found.items()


def test_the_metrics_of_rays_own_that_the_dashboard_shows_exist(cluster):
    reporter = Path(importlib.util.find_spec("ray").origin).parent / "dashboard/modules/reporter/reporter_agent.py"
    elsewhere = set(re.findall(r'"((?:cluster|node)_(?:\w+_nodes|gpus_utilization|gram_\w+))"', reporter.read_text()))
    wanted = {name for name in queried() if not name.startswith("ray_neg_")} - {f"ray_{name}" for name in elsewhere}
    assert {"ray_cluster_pending_nodes", "ray_node_gram_used"} <= {f"ray_{name}" for name in elsewhere}
    deadline = time.monotonic() + _EXPORTED_S
    while missing := {name for name in wanted if f"\n{name}{{" not in exported()}:
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)


def test_without_ray_nothing_is_recorded(monkeypatch):
    def refuse(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr("tasks.pool.metrics._instrument", refuse)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    meter = Meter("local")
    meter.shards(PLACE, 0, 1)
    meter.workers(status(1, ready=1))
    meter.measured(PLACE, receipt(1, 0))
