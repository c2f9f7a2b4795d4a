"""The check at load in a run: every shard says its verdict, the run directory and the page its figures."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from support import save_tiny_model, tiny_model, write_questions

from flows.pipeline import run_extract, run_pipeline
from negcore.measure.loading import load_model
from negcore.model.check import COMPARED, TOLERANCES, ModelCheck
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.measure.shard_set import ShardJob
from tasks.rundir.checks import note_check, read_checks
from tasks.steps import PlainSteps


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture
def run(model, tmp_path):
    values = {"model": [model], "dataset": [write_questions(tmp_path)], "backend": "local", "shard_rows": 8}
    return read_run_file(SkillRun, None, values | {"max_neurons": 64, "out": tmp_path / "run"})


def metadata(shard):
    return json.loads(pa.ipc.open_file(pa.memory_map(str(shard))).schema.metadata[b"neg"])


def failing(check, name):
    comparisons = [replace(one, difference=0.5) if one.name == name else one for one in check.comparisons]
    failed = replace(check, comparisons=tuple(comparisons))
    return failed.in_place_of(failed, "done slowly")


def test_every_shard_says_verdict_and_tolerance_and_the_page_the_figures(run, model):
    results = run_pipeline(run, PlainSteps())
    shards = list(run.directory.rglob("*.arrow"))
    said = [metadata(shard)["check"] for shard in shards if "negs" in str(shard)]
    expected = {name: {"tolerance": TOLERANCES["float32"][name], "verdict": "passed"} for name in COMPARED}
    assert said and all(one == expected for one in said)
    (noted,) = read_checks(run.directory)
    assert (noted.model, noted.site, noted.dtype, noted.device) == (model, "up", "float32", "cpu")
    assert noted.check == load_model(model, device="cpu").check
    page = (run.directory / "report.html").read_text()
    assert all(title in page for title in COMPARED.values())
    assert not any("virtual" in warning for warning in results.warnings)


def test_a_path_that_is_done_without_is_a_warning_of_the_run(run, model, monkeypatch):
    def load(*args, **options):
        lm = load_model(*args, **options)
        return replace(lm, check=failing(lm.check, "virtual"))

    monkeypatch.setattr("tasks.measure.worker.load_model", load)
    (warning,) = run_extract(run, PlainSteps()).warnings
    assert warning.startswith(
        f"{Path(model).name}: virtual sweep against hooks: failed (difference 5.0e-01, tolerance 1e-03)"
    )
    shard = next(run.directory.rglob("negs/**/*.arrow"))
    assert metadata(shard)["check"]["virtual"]["verdict"] == "failed"
    # Whoever comes back to the finished run, without a model, is told again.
    monkeypatch.setattr("tasks.measure.worker.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run_extract(run, PlainSteps()).warnings == [warning]


def test_a_run_of_an_earlier_version_goes_on_and_its_shards_stay(run, monkeypatch):
    publish = ShardJob.publish
    with monkeypatch.context() as earlier:
        earlier.setattr(ShardJob, "publish", lambda job, columns, aside, check: publish(job, columns, aside))
        run_extract(run, PlainSteps())
    shards = sorted(run.directory.rglob("split=train/*.arrow"))
    old = [shard.read_bytes() for shard in shards]
    assert "check" not in metadata(shards[0])
    receipt = shards[1].parent / "_receipts" / f"{shards[1].stem}.json"
    receipt.unlink()
    results = run_extract(run, PlainSteps())
    assert (results.problems, sum(one.n_computed for one in results.extracted)) == ([], 1)
    assert [shard.read_bytes() == before for shard, before in zip(shards, old, strict=True)] == [
        index != 1 for index in range(len(shards))
    ]
    assert "check" in metadata(shards[1])
    assert len(open_negs(run.directory).select(split="train").ids) == 20


def test_damaged_notes_are_no_notes(tmp_path):
    note_check(tmp_path, "tiny-bert", tiny_model("bert"))
    (file,) = (tmp_path / "checks").iterdir()
    (noted,) = read_checks(tmp_path)
    assert noted.check == tiny_model("bert").check
    for damaged in ("", "[]", "{}", file.read_text()[:-9], '{"model": 1, "check": {"comparisons": [1], "notes": []}}'):
        file.write_text(damaged)
        assert list(read_checks(tmp_path)) == []


def test_a_shard_is_as_long_whatever_the_verdict():
    found = tiny_model("bert").check
    assert len(json.dumps(found.metadata)) == len(json.dumps(ModelCheck.expected("float64").metadata))
    assert len(json.dumps(failing(found, "batch").metadata)) == len(json.dumps(found.metadata))
