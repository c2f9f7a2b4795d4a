"""Extraction survives what rows do: a row at fault is set aside with its reason, and every other number is the same."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from faults import FaultyWorker, by_value
from support import neg, save_tiny_model, tiny_model

from flows.pipeline import run_extract, run_pipeline, run_probe
from negcore.errors import ShardError
from negcore.store.publish import receipt_path, receipts, shard_path
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.measure.missing import measure_missing
from tasks.measure.worker import ModelWorker
from tasks.plan import plan
from tasks.pool.base import Resources
from tasks.pool.opening import open_pool
from tasks.pool.ray_session import ray_session
from tasks.steps import PlainSteps, Step

SHARD_ROWS = 4
N_ROWS = 36


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture
def run_with(model, tmp_path):
    """Makes a run on 36 prompts of which some, by number, have a fault."""

    def make(faults=None, name="run", **changes):
        rows = [
            {
                "prompt": f"Question: {'the best ' * (i % 4)}{i} {(faults or {}).get(i, '')} Answer:",
                "labels": [" A", " B"],
                "answer": i % 2,
                "split": ("train", "valid", "test")[i * 3 // N_ROWS],
            }
            for i in range(N_ROWS)
        ]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        values = {"model": [model], "dataset": [str(file)], "backend": "local", "shard_rows": SHARD_ROWS}
        return read_run_file(SkillRun, None, values | {"out": tmp_path / name} | changes)

    return make


@pytest.fixture
def faulty(monkeypatch):
    monkeypatch.setattr("tasks.measure.worker.ModelWorker", FaultyWorker)


def split_of(run, split="train"):
    (dataset,) = plan(run)[0].datasets
    return next(one for one in dataset.splits if one.place.part == split)


def files(run):
    """Every published file and its bytes."""
    found = (path for path in (run.directory / "negs").rglob("part-*") if path.is_file())
    return {path.relative_to(run.directory): path.read_bytes() for path in found}


def places(run, word):
    """Split, shard and id of the rows whose prompt has a word: a run samples and orders its rows."""
    return [
        (split.place.part, index, example.id)
        for split in plan(run)[0].datasets[0].splits
        for index, shard in enumerate(split.shards)
        for example in shard
        if word in example.prompt
    ]


# A row that fails


def test_a_row_that_fails_is_set_aside_with_its_reason_and_all_others_are_there(run_with, faulty):
    run = run_with({5: "!fail"})
    results = run_extract(run, PlainSteps())
    ((split, index, id_),) = places(run, "!fail")
    assert results.problems == []
    assert results.set_aside == [f"{split_of(run, split).title}: {id_}: RuntimeError: a deliberate fault"]
    negs = open_negs(run.directory).select(split=split)
    assert [(row.id, row.cause) for row in negs.set_aside] == [(id_, "failure")]
    assert negs.ids == [example.id for example in split_of(run, split).examples if example.id != id_]
    known = receipts(split_of(run, split).place.path(run.directory))
    assert [receipt.n_rows for receipt in known] == [SHARD_ROWS - (place == index) for place in range(len(known))]


def test_the_bytes_are_those_of_an_undisturbed_worker(run_with, faulty):
    run = run_with({5: "!fail", 17: "!fail"})
    run_extract(run, PlainSteps())
    model = plan(run)[0].card.ref
    worker = ModelWorker(model, dtype="float32", device="cpu", site="paper", threads=run.cpus)
    for split in plan(run)[0].datasets[0].splits:
        twins = twin_receipts(split, run.directory, worker)
        assert twins == receipts(split.place.path(run.directory))
        assert len(twins) == 3
    twin = replace_directory(run, run.directory / "twin")
    assert files(twin) == files(run)


def replace_directory(run, directory):
    return run.model_copy(update={"out": directory})


def test_the_same_command_again_computes_nothing_and_tells_again_what_was_set_aside(run_with, faulty, monkeypatch):
    run = run_with({5: "!fail"})
    first = run_extract(run, PlainSteps())
    before = files(run)
    monkeypatch.setattr("tasks.measure.worker.ModelWorker", None)  # nobody makes one
    again = run_extract(run, PlainSteps())
    assert (again.problems, again.set_aside) == ([], first.set_aside)
    assert sum(part.n_computed for part in again.extracted) == 0
    assert files(run) == before
    assert run_probe(run, PlainSteps()).set_aside == first.set_aside


def test_a_shard_of_which_no_row_is_left_is_a_file_of_no_rows(run_with, faulty):
    run = run_with({0: "!fail"}, shard_rows=1)
    results = run_extract(run, PlainSteps())
    ((split, index, id_),) = places(run, "!fail")
    assert (results.problems, len(results.set_aside)) == ([], 1)
    known = receipts(split_of(run, split).place.path(run.directory))
    assert [receipt.n_rows for receipt in known] == [int(place != index) for place in range(len(known))]
    negs = open_negs(run.directory, verify=True).select(split=split)
    assert negs.n_rows == N_ROWS // 3 - 1
    assert negs.layer(1).shape[0] == N_ROWS // 3 - 1
    assert run_extract(run, PlainSteps()).set_aside == results.set_aside


def test_a_split_of_which_no_row_is_left_cannot_be_read_and_says_so(run_with, faulty):
    run = run_with(dict.fromkeys(range(12), "!nan"), nonfinite="skip")
    results = run_pipeline(run, PlainSteps())
    assert len(results.set_aside) == 12
    assert len(results.problems) == 1
    assert "has no rows: all 12 were set aside" in results.problems[0]
    with pytest.raises(ShardError, match="has no rows"):
        open_negs(run.directory).select(split="train")


def test_where_no_training_row_is_left_no_neurons_are_chosen_and_the_run_says_so(run_with, faulty):
    results = run_pipeline(run_with(dict.fromkeys(range(12), "!nan"), nonfinite="skip", storage="stats"), PlainSteps())
    (problem,) = results.problems
    assert "has no rows: all 12 were set aside" in problem
    assert results.scores == []


def test_nothing_is_set_aside_where_nothing_can_be_computed(run_with, faulty):
    run = run_with(dict.fromkeys(range(N_ROWS), "!fail"))
    results = run_extract(run, PlainSteps())
    assert results.set_aside == []
    assert len(results.problems) == 9
    assert all("4 rows lost: RuntimeError: a deliberate fault" in problem for problem in results.problems)
    assert files(run) == {}


def test_an_error_that_is_no_rows_fault_loses_the_shard(run_with, faulty):
    run = run_with({5: "!refuse"})
    results = run_extract(run, PlainSteps())
    assert results.set_aside == []
    assert len(results.problems) == 1
    assert len(files(run)) == 2 * 8


def test_an_error_that_quotes_a_prompt_loses_its_message(run_with, monkeypatch):
    class Quoting(ModelWorker):
        def run(self, job):
            raise OSError(f"cannot keep {job.examples[0].prompt!r}")

    monkeypatch.setattr("tasks.measure.worker.ModelWorker", Quoting)
    problems = run_extract(run_with(), PlainSteps()).problems
    assert len(problems) == 9
    assert all(problem.endswith("4 rows lost: OSError") for problem in problems)


def test_a_full_disk_ends_the_extraction_instead_of_computing_for_nothing(run_with, faulty, monkeypatch):
    run = run_with({5: "!disk"})
    results = run_extract(run, PlainSteps())
    (problem,) = results.problems
    assert re.search("takes no more shards .No space left on device.: finished ones are kept; make room", problem)
    assert results.set_aside == []
    kept = files(run)
    assert len(kept) < 2 * 8  # the other splits are not even begun
    monkeypatch.undo()
    assert run_extract(run, PlainSteps()).problems == []
    assert len(files(run)) == 2 * 9
    assert {name: files(run)[name] for name in kept} == kept


def test_the_pipeline_goes_on_without_the_row(run_with, faulty):
    results = run_pipeline(run_with({5: "!fail", 14: "!fail", 30: "!fail"}), PlainSteps())
    assert results.problems == []
    assert len(results.set_aside) == 3
    assert {score.n_train for score in results.scores} == {11}
    assert {score.n_test for score in results.scores} == {11}


# Numbers that are not finite


def test_numbers_that_are_not_finite_fail_their_shard_and_are_located(run_with, faulty):
    run = run_with({5: "!nan"})
    results = run_extract(run, PlainSteps())
    ((_, index, id_),) = places(run, "!nan")
    assert results.set_aside == []
    assert len(results.problems) == 1
    where = f"{id_}: 3 NaN or infinite values, in layers 1, 2"
    assert f"shard {index}, 4 rows lost: NegError: {where}: use a wider dtype, or skip or keep" in results.problems[0]


def test_rows_that_are_not_finite_can_be_skipped(run_with, faulty):
    run = run_with({5: "!nan"}, nonfinite="skip")
    results = run_extract(run, PlainSteps())
    ((split, _, id_),) = places(run, "!nan")
    assert results.problems == []
    assert results.set_aside == [f"{split_of(run, split).title}: {id_}: 3 NaN or infinite values, in layers 1, 2"]
    negs = open_negs(run.directory).select(split=split)
    assert (id_ in negs.ids, [row.cause for row in negs.set_aside]) == (False, ["nonfinite"])
    assert all(np.isfinite(negs.layer(layer)).all() for layer in range(negs.n_layers))


def test_skipping_changes_no_number_of_the_other_rows(run_with, faulty, monkeypatch):
    skipping = run_with({5: "!nan"}, nonfinite="skip")
    run_extract(skipping, PlainSteps())
    monkeypatch.setattr("tasks.measure.worker.ModelWorker", ModelWorker)
    whole = replace_directory(skipping, skipping.directory.with_name("whole"))
    run_extract(whole, PlainSteps())
    ((split, _, id_),) = places(skipping, "!nan")
    ours, all_rows = (open_negs(run.directory).select(split=split) for run in (skipping, whole))
    kept = [place for place, one in enumerate(all_rows.ids) if one != id_]
    np.testing.assert_array_equal(ours.layer(1), all_rows.layer(1)[kept])


def test_rows_that_are_not_finite_can_be_kept_and_are_counted(run_with, faulty):
    run = run_with({5: "!nan"}, nonfinite="keep")
    results = run_extract(run, PlainSteps())
    ((split, index, _),) = places(run, "!nan")
    assert (results.problems, results.set_aside) == ([], [])
    known = receipts(split_of(run, split).place.path(run.directory))
    assert [receipt.n_nonfinite for receipt in known] == [3 * (place == index) for place in range(len(known))]


@pytest.mark.parametrize("row", [5, 17, 30])
def test_a_kept_nan_never_enters_a_vote_silently(run_with, faulty, row):
    probes = ["polar", "magn", "act", "tree", "polar-gradient", "magn-gxa", "polar-random", "magn-logistic"]
    run = run_with({row: "!nan"}, nonfinite="keep", probe=probes, max_neurons=64, tree_neurons=72)
    results = run_pipeline(run, PlainSteps())
    assert results.scores == []
    assert len(results.problems) == 1
    assert "NaN and inf are refused" in results.problems[0]


def test_another_policy_computes_again_only_what_it_changes(run_with, faulty):
    run = run_with({5: "!nan", 17: "!fail"}, nonfinite="keep")
    run_extract(run, PlainSteps())
    stored = {}
    for policy in ("keep", "skip", "skip", "keep"):
        results = run_extract(run.model_copy(update={"nonfinite": policy}), PlainSteps())
        assert results.problems == []
        assert len(results.set_aside) == 1 + (policy == "skip")
        computed = sum(part.n_computed for part in results.extracted)
        assert computed == (policy != stored.get("policy", "keep"))
        assert stored.setdefault(policy, files(run)) == files(run)
        stored["policy"] = policy
    failing = run_extract(run.model_copy(update={"nonfinite": "fail"}), PlainSteps())
    assert "NaN or infinite" in failing.problems[0]


# On actors


@pytest.mark.slow
def test_a_row_that_kills_its_actor_is_set_aside_and_the_bytes_are_those_of_one_worker(run_with):
    run = run_with({5: "!die"}, shard_rows=2)
    split = split_of(run)
    ((_, _, id_),) = places(run, "!die")
    recipe = {"model": plan(run)[0].card.ref, "dtype": "float32", "device": "cpu", "site": "paper"}
    recipe |= {"threads": 1}
    with ray_session():
        by_value()
        with open_pool("ray", FaultyWorker, recipe, Resources(max_attempts=1), label="tiny") as pool:
            (extracted,) = measure_missing(pool, [split], run.directory, Step())
    assert extracted.failures == ()
    assert [row.id for row in extracted.set_aside] == [id_]
    assert extracted.set_aside[0].reason.startswith("WorkerLost: ")
    assert twin_receipts(split, run.directory, ModelWorker(**recipe)) == receipts(split.place.path(run.directory))


def twin_receipts(split, root, worker):
    """What a worker makes of the shards of a split, elsewhere, if it is told which rows to leave out."""
    found = []
    for receipt in receipts(split.place.path(root)):
        found.append(worker.run(split.job(root / "twin", receipt.index).without(receipt.set_aside)))
    return found


# On the command line


@pytest.fixture
def nan_command(tmp_path):
    """Options of a run on a model whose embedding of one sign is NaN; a single prompt has that sign."""
    lm = tiny_model("gpt2", dtype=torch.float32)
    (token,) = lm.tokenizer("~")["input_ids"]
    lm.model.get_input_embeddings().weight.data[token] = float("nan")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{'~' * (i == 7)} {i} Answer:", "labels": [" A", " B"], "answer": i % 2} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"--model": "model", "--dataset": "rows.jsonl", "--out": "run"}
    plain = ["--orchestrator", "none", "--backend", "local"]
    return [*plain, *(part for name, path in options.items() for part in (name, tmp_path / path))]


def test_a_run_without_the_rows_set_aside_has_an_exit_code_of_its_own(nan_command):
    skipped = neg("extract", *nan_command, "--nonfinite", "skip")
    assert skipped.returncode == 3, skipped.stderr
    (line,) = (line for line in skipped.stderr.splitlines() if line.startswith("set aside: "))
    assert line.endswith(" NaN or infinite values, in layers 0, 1, 2")
    assert "~" not in skipped.stderr


# A shard whose worker was lost before it could tell


@pytest.fixture
def published(run_with):
    """A worker, and the job of a shard that it published."""
    run = run_with()
    worker = ModelWorker(plan(run)[0].card.ref, dtype="float32", device="cpu", site="paper", threads=run.cpus)
    job = split_of(run).job(run.directory, 1)
    return worker, job, worker.run(job)


def refuse_to_measure(worker, monkeypatch):
    def refused(*args):
        raise AssertionError("it was measured")

    monkeypatch.setattr(worker, "_measure", refused)


def test_a_shard_that_a_lost_worker_published_is_not_measured_again(published, monkeypatch):
    worker, job, receipt = published
    before = {path: path.stat().st_mtime_ns for path in job.root.rglob("part-*")}
    refuse_to_measure(worker, monkeypatch)
    assert worker.run(job.again()) == receipt
    assert {path: path.stat().st_mtime_ns for path in job.root.rglob("part-*")} == before
    with pytest.raises(AssertionError, match="it was measured"):
        worker.run(job)


def test_a_trial_is_measured_whatever_is_published(published):
    worker, job, _ = published
    assert worker.run(job.trial(job.examples[:1]).again()) == 1


def test_a_shard_that_is_damaged_another_or_not_there_is_measured_again(published, run_with, monkeypatch):
    worker, job, _ = published
    refuse_to_measure(worker, monkeypatch)

    def is_measured(one):
        with pytest.raises(AssertionError, match="it was measured"):
            worker.run(one.again())

    is_measured(split_of(run_with()).job(job.root, 0))
    is_measured(replace(job, identity=replace(job.identity, model_revision="other")))
    is_measured(replace(job, examples=[replace(one, answer=1 - one.answer) for one in job.examples]))
    folder = job.place.path(job.root)
    shard = shard_path(folder, job.index)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    is_measured(job)
    receipt_path(folder, job.index).write_text("{")
    is_measured(job)


def test_a_shard_that_was_published_under_another_policy_is_measured_again(run_with, monkeypatch):
    run = run_with({0: "!nan"}, nonfinite="keep")
    monkeypatch.setattr("tasks.measure.worker.ModelWorker", FaultyWorker)
    assert not run_extract(run, PlainSteps()).problems
    worker = ModelWorker(plan(run)[0].card.ref, dtype="float32", device="cpu", site="paper", threads=run.cpus)
    ((split, index, _),) = places(run, "!nan")
    job = split_of(run, split).job(run.directory, index)
    assert worker.run(job.again()).n_nonfinite > 0
    assert worker.run(replace(job, nonfinite="skip").again()).n_nonfinite == 0
