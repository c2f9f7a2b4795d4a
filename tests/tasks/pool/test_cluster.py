"""A Ray cluster of two nodes computes the bytes of one worker."""

import json
import sys
import time
from pathlib import Path

import pytest
from clusters import ray_cluster
from support import save_tiny_model

from negcore.errors import RunError
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.measure.missing import measure_missing
from tasks.measure.worker import ModelWorker
from tasks.plan import PlannedModel, plan
from tasks.pool.base import Pool, Resources
from tasks.pool.opening import open_pool
from tasks.pool.ray_session import ray_session
from tasks.steps import Step

N_ROWS = 24
N_SHARDS = 12
_MEETING_S = 120.0


class MeetingWorker(ModelWorker):
    """Measures as `ModelWorker` does, once workers of two nodes have come together."""

    def __init__(self, nodes: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self._nodes = Path(nodes)

    def run(self, job):
        import ray

        node = ray.get_runtime_context().get_node_id()
        with (self._nodes / node).open("a") as ledger:
            ledger.write(f"{job.place.part} {job.index}\n")
        deadline = time.monotonic() + _MEETING_S
        while len(list(self._nodes.iterdir())) < 2:
            assert time.monotonic() < deadline, "nobody works on another node"
            time.sleep(0.05)
        return super().run(job)


@pytest.fixture
def model(tmp_path) -> PlannedModel:
    """A tiny model, and what it is to be asked."""
    rows = [
        {
            "prompt": f"Question: {'the best ' * (i % 4)}{i} Answer:",
            "labels": [" A", " B"],
            "answer": i % 2,
            "split": ("train", "valid", "test")[i * 3 // N_ROWS],
        }
        for i in range(N_ROWS)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tiny = save_tiny_model("llama", tmp_path / "tiny-llama")
    values = {"model": [str(tiny)], "dataset": [str(file)], "shard_rows": N_ROWS // N_SHARDS, "out": tmp_path / "run"}
    return plan(read_run_file(SkillRun, None, values))[0]


def recipe(model: PlannedModel) -> dict:
    return {
        "model": model.card.ref,
        "dtype": "float32",
        "device": "cpu",
        "site": "paper",
        "threads": 1,
    }


def extracted(pool: Pool, model: PlannedModel, root: Path) -> dict[str, bytes]:
    """Every shard and receipt that the pool makes, by its place in the run directory."""
    splits = model.datasets[0].splits
    done = measure_missing(pool, splits, root, Step())
    assert not any(one.failures for one in done)
    files = (path for path in root.rglob("part-*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
def test_two_nodes_write_the_bytes_of_one_worker(model, tmp_path):
    nodes = tmp_path / "nodes"
    nodes.mkdir()
    with ray_cluster(2) as cluster:
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import the tests
        workers = {"nodes": str(nodes), **recipe(model)}
        resources = Resources(workers=2, cpus=1, address=cluster.address)
        with open_pool("ray", MeetingWorker, workers, resources, label="tiny") as pool:
            together = extracted(pool, model, tmp_path / "together")
    with open_pool("local", ModelWorker, recipe(model), Resources(), label="tiny") as pool:
        alone = extracted(pool, model, tmp_path / "alone")
    assert together == alone
    assert len(alone) == 2 * N_SHARDS
    jobs = [node.read_text().splitlines() for node in nodes.iterdir()]
    assert [len(of_node) > 0 for of_node in jobs] == [True, True]
    assert sum(map(len, jobs)) == len(set().union(*jobs)) == N_SHARDS  # each shard was computed once


def test_a_ray_that_does_not_start_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read on import, and kept
    import ray

    def fail(**_):
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(RunError, match=r"Ray cannot start .* during startup\. This could happen"), ray_session("local"):
        pass
