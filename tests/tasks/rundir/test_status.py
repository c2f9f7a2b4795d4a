"""How far a run is, read from its directory alone."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from support import REPOSITORY, identity_of, negs_place, write_negs

from flows.show.inspect_tables import status_lines, status_tables
from flows.show.text import duration
from negcore.errors import RunError
from negcore.store.publish import SetAside, receipt_path, shard_path
from tasks.config.dataset_runs import EvaluationRun, SkillRun
from tasks.config.linearity_run import LinearityRun
from tasks.config.run_file import write_run_file
from tasks.rundir.claim import claim
from tasks.rundir.layout import PLAN_FILE, note_failures, shard_folders, write_plan_file
from tasks.rundir.status import pace, run_status

BEGAN_S = 1_700_000_000.0
TRAIN, TEST = (negs_place("org/model", "mini/fact", split) for split in ("train", "test"))


identity = partial(identity_of, 1, 2, model="org/model")


def planned(place, n_shards, n_rows=3):
    """A part with so many shards of so many rows."""
    rows = [
        [SimpleNamespace(id=f"{place.part}/{shard}-{row}", prompt="Sky?", answer=0, group="") for row in range(n_rows)]
        for shard in range(n_shards)
    ]
    return SimpleNamespace(place=place, identity=identity(), shards=rows, examples=sum(rows, []))


def publish(root, part, index, *, at_s=BEGAN_S, set_aside=(), **changes):
    rows = [row for row in part.shards[index] if row.id not in {aside.id for aside in set_aside}]
    n = len(rows)
    write_negs(
        root,
        part.place,
        index,
        len(part.shards),
        identity=identity(**changes),
        examples=rows,
        label_ids_PO=np.ones((n, 2)),
        negs_POLN=np.ones((n, 2, 1, 2)),
        activations_PLN=np.ones((n, 1, 2)),
        probs_PO=np.ones((n, 2)),
        set_aside=set_aside,
    )
    os.utime(receipt_path(part.place.path(root), index), (at_s, at_s))


@pytest.fixture
def parts():
    return planned(TRAIN, 4), planned(TEST, 2)


@pytest.fixture
def run(tmp_path, parts):
    """A directory in which a run has begun a moment ago."""
    run = SkillRun(model=("org/model@main",), dataset=("mini/fact",), out=tmp_path / "run", backend="local", workers=1)
    write_run_file(run)
    write_plan_file(run.directory, parts)
    os.utime(run.directory / PLAN_FILE, (BEGAN_S, BEGAN_S))
    return run


def shown(directory):
    status = run_status(directory)
    console = Console(width=100, record=True, force_terminal=False)
    for table in status_tables(status, directory):
        console.print(table)
    console.print("\n".join(status_lines(status, directory)), soft_wrap=True, markup=False)
    return console.export_text()


# What is there, and what is not


def test_a_run_that_has_just_begun_has_everything_before_it(run):
    status = run_status(run.directory)
    assert [(part.folder.names[2], part.n_shards, part.n_missing) for part in status.folders] == [
        ("train", 4, 4),
        ("test", 2, 2),
    ]
    assert (status.n_missing, status.pace, status.left_s) == (6, None, None)
    assert "no shard finished in this session yet" in shown(run.directory)


def test_finished_shards_their_rows_and_bytes_are_counted_and_the_others_are_missing(run, parts):
    publish(run.directory, parts[0], 0)
    publish(run.directory, parts[0], 2)
    train, test = run_status(run.directory).folders
    assert (train.n_finished, train.n_missing, train.n_rows) == (2, 2, 6)
    assert train.n_bytes == sum(path.stat().st_size for path in run.directory.rglob("*.arrow"))
    assert (test.n_finished, test.n_missing, test.n_rows) == (0, 2, 0)
    assert "6 prompts in 2 shards" in shown(run.directory)
    assert "not begun" in shown(run.directory)


def test_a_whole_run_is_done_and_has_no_time_left(run, parts):
    for part in parts:
        for index in range(len(part.shards)):
            publish(run.directory, part, index, at_s=BEGAN_S + 60 + index)
    assert run_status(run.directory).left_s == 0
    text = shown(run.directory)
    assert text.count("done") == 2
    assert "; 0 missing" in text
    assert "left" not in text


def test_shards_that_are_gone_or_cut_are_damaged_and_missing(run, parts):
    for index in range(3):
        publish(run.directory, parts[0], index)
    folder = parts[0].place.path(run.directory)
    shard_path(folder, 0).unlink()
    shard_path(folder, 1).write_bytes(b"half")
    train, _ = run_status(run.directory).folders
    assert (train.n_damaged, train.n_missing) == (2, 3)
    assert "2 damaged, 3 missing" in shown(run.directory)


def test_shards_of_another_run_are_not_counted_and_in_the_way(run, parts):
    publish(run.directory, parts[0], 0, site="act")
    train, _ = run_status(run.directory).folders
    assert (train.n_foreign, train.n_finished, train.n_missing) == (1, 0, 4)
    assert "1 of another run in the way" in shown(run.directory)


def test_rows_set_aside_are_counted_and_named_with_their_reason(run, parts):
    reason = "OverflowError: \x1b[31mtoo large[/red]"
    publish(run.directory, parts[0], 0, set_aside=[SetAside(id="train/0-1", cause="failure", reason=reason)])
    (train, _) = run_status(run.directory).folders
    assert (train.n_rows, train.n_missing, len(train.set_aside)) == (2, 3, 1)
    text = shown(run.directory)
    assert "set aside: negs org/model mini/fact train: train/0-1: OverflowError: \\x1b[31mtoo large[/red]" in text


def test_shards_that_failed_are_named_until_they_are_made(run, parts):
    note_failures(run.directory, TRAIN, {0: "OSError: disk gone", 1: "OSError: disk gone"})
    publish(run.directory, parts[0], 0)
    train, _ = run_status(run.directory).folders
    assert train.failures == {1: "OSError: disk gone"}
    assert "failed: negs org/model mini/fact train: shard 1: OSError: disk gone" in shown(run.directory)
    note_failures(run.directory, TRAIN, {})
    assert run_status(run.directory).folders[0].failures == {}


def test_what_nothing_but_a_run_file_tells_of_is_named(tmp_path):
    run = SkillRun(model=("org/model@main",), dataset=("mini/fact", "mini/nli"), out=tmp_path)
    write_run_file(run)
    status = run_status(tmp_path)
    assert status.not_planned == (("org/model", "mini/fact"), ("org/model", "mini/nli"))
    assert (status.folders, status.n_missing) == ((), None)
    assert "not planned yet: org/model mini/nli" in shown(tmp_path)


def test_without_a_plan_receipts_tell_how_many_shards_a_begun_dataset_has(run, parts):
    (run.directory / PLAN_FILE).unlink()
    write_run_file(run.model_copy(update={"dataset": ("mini/fact", "data/mine.jsonl")}))
    publish(run.directory, parts[0], 1)
    status = run_status(run.directory)
    assert [(part.n_shards, part.n_missing) for part in status.folders] == [(4, 3)]
    assert status.not_planned == (("org/model", "data/mine.jsonl"),)


def test_the_runs_below_an_evaluation_are_told_one_by_one(tmp_path, parts):
    run = EvaluationRun(model=("org/model",), dataset=("mini/fact",), out=tmp_path / "run")
    write_run_file(run)
    assert run_status(run.directory).not_planned == (("org/model", "mini/fact"),)
    for one, part in zip(run.settings, parts, strict=True):
        write_run_file(one)
        write_plan_file(one.directory, [part])
    status = run_status(run.directory)
    assert [part.folder.root.name for part in status.folders] == ["shots-0", "shots-1"]
    assert (status.not_planned, status.n_missing) == ((), 6)
    assert "shots-1 negs, org/model" in shown(run.directory)


def test_a_linearity_study_that_is_not_planned_is_named_by_its_facts(tmp_path):
    write_run_file(LinearityRun(model=("org/model",), facts="mini/facts", out=tmp_path))
    assert run_status(tmp_path).not_planned == (("org/model", "mini/facts"),)


def test_a_part_of_a_run_directory_can_be_asked_for(run, parts):
    publish(run.directory, parts[0], 0)
    (train,) = run_status(TRAIN.path(run.directory)).folders
    assert (train.n_shards, train.n_finished) == (4, 1)


@pytest.mark.parametrize("place", ["1", "../model=a/dataset=b/split=c", "/etc/model=a/dataset=b/split=c", "negs/../.."])
def test_a_damaged_plan_or_one_that_leads_elsewhere_is_one_line_that_says_what_to_do(run, place):
    plan = [{"place": place, "digest": "", "n_shards": 1, "n_rows": 1}]
    (run.directory / PLAN_FILE).write_text(json.dumps(plan))
    with pytest.raises(RunError, match=r"plan .* is damaged .*: delete it and run the same command again"):
        shard_folders(run.directory)


@pytest.mark.parametrize(("name", "says"), [("absent", "does not exist"), ("", "holds no shards and no run.yaml")])
def test_a_directory_without_a_run_is_refused(tmp_path, name, says):
    with pytest.raises(RunError, match=says):
        run_status(tmp_path / name)


# How fast it is


def test_a_steady_worker_publishes_a_shard_every_ten_seconds():
    steady = pace([100.0 + 10 * i for i in range(1, 6)], [4] * 5, started_s=100.0, workers=1)
    assert steady is not None
    assert (steady.shards_per_s, steady.rows_per_s, steady.newest_s) == (0.1, 0.4, 150.0)


def test_pauses_do_not_count_nor_the_shard_that_was_being_computed():
    times = [10, 20, 30, 3630, 3640, 3650, 90_000, 90_010]
    paused = pace(times, [4] * len(times), started_s=0.0, workers=1)
    assert paused is not None
    assert (paused.shards_per_s, paused.rows_per_s) == (0.1, 0.4)


def test_workers_that_publish_at_the_same_moment_make_no_pauses():
    burst = [60.0 * (1 + i // 16) + i % 16 / 100 for i in range(48)]
    together = pace(burst, [2] * 48, started_s=0.0, workers=16)
    assert together is not None
    assert together.shards_per_s == pytest.approx(16 / 60, rel=0.01)


def test_shards_of_an_earlier_session_do_not_count():
    shards = [1.0, 2.0, 1000.0, 1010.0], [9, 9, 1, 1]
    now = pace(*shards, started_s=990.0, workers=1)
    assert now is not None
    assert now.shards_per_s == 0.1
    assert pace(*shards, started_s=2000.0, workers=1) is None


def test_without_a_known_beginning_the_first_shard_starts_the_clock():
    now = pace([30.0, 10.0, 20.0], [5, 5, 5], started_s=None, workers=4)
    assert now is not None
    assert (now.shards_per_s, now.rows_per_s) == (0.1, 0.5)
    assert pace([10.0], [5], started_s=None, workers=4) is None


def test_the_time_left_is_what_is_missing_at_the_pace_of_what_is_measured_now(run, parts):
    for index in range(2):
        publish(run.directory, parts[0], index, at_s=BEGAN_S + 30 * (index + 1))
    other = planned(negs_place("org/first", "mini/fact", "test"), 1)
    publish(run.directory, other, 0, at_s=BEGAN_S + 1)  # another model is no measure for this one
    status = run_status(run.directory)
    assert status.pace is not None
    assert status.pace.rows_per_s == pytest.approx(0.1)
    assert status.n_missing == 4
    assert status.left_s == pytest.approx(120)
    assert "pace: 6 prompts a minute" in shown(run.directory)
    assert "2 min left" in shown(run.directory)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3600, "1 h 00 min"), (4 * 86400, "4.0 days")]
)
def test_lengths_of_time_are_said_in_the_units_that_matter(seconds, text):
    assert duration(seconds) == text


# Who works on it


def test_the_driver_that_works_on_it_is_named_also_for_a_part(run, parts):
    with claim(run.directory):
        (holder,) = run_status(run.directory).holders
        assert holder.pid == os.getpid()
        publish(run.directory, parts[0], 0)
        assert run_status(run.directory / "negs").holders == (holder,)
        assert f"held by pid {os.getpid()} on " in shown(run.directory)
    assert "nobody works on it: the same command goes on from here" in shown(run.directory)


def test_nobody_works_on_a_copy_because_of_the_claim_that_came_with_it(run, tmp_path):
    with claim(run.directory):
        copy = shutil.copytree(run.directory, tmp_path / "copy")
        assert run_status(copy).holders == ()
        assert run_status(run.directory).holders


def test_a_driver_that_died_is_said_to_have_ended(run):
    code = f"""
import os
from pathlib import Path
from tasks.rundir.claim import claim
with claim(Path({str(run.directory)!r})):
    os._exit(9)
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY)
    assert "ended without giving it back" in shown(run.directory)


# At any time


def test_asking_imports_nothing_heavy(run):
    code = f"""
import sys
from flows.cli.app import app
app(["status", {str(run.directory)!r}], standalone_mode=False)
assert not {{"torch", "transformers", "ray", "prefect"}} & set(sys.modules)
"""
    asked = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    assert "0 of 4" in asked.stdout
