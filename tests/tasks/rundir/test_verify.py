"""Every shard is checked against its receipt, and what is damaged is computed again, to the same bytes."""

import json
import shutil
import threading

import pytest
from support import negs_place, save_tiny_model, write_questions
from typer.testing import CliRunner

from flows.cli.app import app
from flows.extraction import extract_planned
from flows.linearity import run_linearity
from flows.pipeline import Results, run_extract
from negcore.errors import RunError
from negcore.store import integrity
from negcore.store.identity import canonical_json, content_digest
from negcore.store.integrity import mapped_batch
from negcore.store.publish import publish_shard
from tasks.config.dataset_runs import EvaluationRun, SkillRun
from tasks.config.linearity_run import LinearityRun
from tasks.config.reading import read_run_file, recorded_run
from tasks.config.run_file import RUN_FILE, write_run_file
from tasks.plan import plan
from tasks.rundir.claim import claim
from tasks.rundir.layout import PLAN_FILE, shard_folders
from tasks.rundir.verify import total_bytes, verify
from tasks.steps import PlainSteps


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def settings(model, questions):
    return {"model": [model], "dataset": [questions], "backend": "local", "shard_rows": 8}


@pytest.fixture(scope="module")
def made(settings, tmp_path_factory):
    """A finished run: never changed."""
    run = read_run_file(SkillRun, None, settings | {"out": tmp_path_factory.mktemp("made") / "run"})
    assert run_extract(run, PlainSteps()).problems == []
    return run.directory


@pytest.fixture
def copy(made, tmp_path):
    """The same run, moved elsewhere."""
    return shutil.copytree(made, tmp_path / "run")


def found(directory):
    return list(verify(shard_folders(directory), lambda size: None))


def faults(directory):
    return [fault.what for one in found(directory) for fault in one.faults]


def shard(directory, split, index):
    (path,) = directory.rglob(f"split={split}/part-{index:05d}.arrow")
    return path


def receipt(directory, split, index):
    (path,) = directory.rglob(f"split={split}/_receipts/part-{index:05d}.json")
    return path


def resealed(path, **changes):
    """Change a receipt as one who knows how it is sealed."""
    record = json.loads(path.read_bytes()) | changes
    del record["seal"]
    path.write_text(canonical_json(record | {"seal": content_digest(record)}))


def contents(directory):
    files = (path for path in directory.rglob("*part-*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def neg(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# Every kind of damage, found and mended


def flip_a_bit(directory):
    path = shard(directory, "train", 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_a_shard(directory):
    path = shard(directory, "train", 1)
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_shard(directory):
    shard(directory, "train", 1).unlink()


def lose_a_receipt(directory):
    receipt(directory, "train", 1).unlink()


def lose_both(directory):
    lose_a_shard(directory)
    lose_a_receipt(directory)


def break_a_seal(directory):
    path = receipt(directory, "train", 1)
    path.write_text(path.read_text().replace('"n_rows":8', '"n_rows":9'))


def misname_the_rows(directory):
    resealed(receipt(directory, "train", 1), ids_xxh3=content_digest(["elsewhere"]))


def forge_an_identity(directory):
    path = receipt(directory, "train", 1)
    resealed(path, identity=json.loads(path.read_bytes())["identity"] | {"site": "act"})


def bring_a_shard_from_another_split(directory):
    shutil.copy(shard(directory, "valid", 1), shard(directory, "train", 1))
    shutil.copy(receipt(directory, "valid", 1), receipt(directory, "train", 1))


def leave_a_draft_behind(directory):
    shard(directory, "train", 1).with_name(".part-00001.arrow.7-abcd.tmp").write_bytes(b"half")


DAMAGES = {
    flip_a_bit: "shard 1: its checksum is not the one in its receipt",
    cut_a_shard: "in its receipt",
    lose_a_shard: "shard 1: missing, though its receipt is there",
    lose_a_receipt: "shard 1: it has no receipt",
    lose_both: "1 of 3 shards are missing: 1",
    break_a_seal: "shard 1: its receipt is damaged",
    misname_the_rows: "shard 1: its 8 row ids are not the 8 of its receipt",
    forge_an_identity: "shard 1: the digest in its receipt is not that of the settings in it",
    bring_a_shard_from_another_split: "questions, valid",
    leave_a_draft_behind: ".part-00001.arrow.7-abcd.tmp: left by a writer that died",
}


def test_a_finished_run_has_no_faults(made):
    whole = found(made)
    assert [(one.folder.names[2], one.n_whole, one.n_shards, one.n_rows) for one in whole] == [
        ("train", 3, 3, 20),
        ("valid", 3, 3, 20),
        ("test", 3, 3, 20),
    ]
    assert not any(one.faults for one in whole)
    assert sum(one.n_bytes for one in whole) == total_bytes(shard_folders(made))
    assert neg("verify", made).exit_code == 0


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_computed_again_to_the_same_bytes_and_nothing_else_is(made, copy, damage):
    damage(copy)
    (what,) = faults(copy)
    assert DAMAGES[damage] in what
    good = {path: path.stat().st_mtime_ns for path in copy.rglob("part-*") if path.stem != "part-00001"}
    mended = neg("verify", copy, "--repair")
    assert mended.exit_code == 0, mended.output
    assert contents(copy) == contents(made)
    assert {path: path.stat().st_mtime_ns for path in good} == good


def test_a_lost_split_is_missed_by_the_plan_and_mended_with_everything_else(made, copy):
    flip_a_bit(copy)
    leave_a_draft_behind(copy)
    shutil.rmtree(shard(copy, "test", 0).parent)
    checked = neg("verify", copy)
    assert checked.exit_code == 1
    assert checked.stderr.count("wrong:") == 4  # with the manifest's own
    assert "test: 3 of 3 shards are missing: 0, 1, 2" in checked.stderr
    assert neg("verify", copy, "--repair").exit_code == 0
    assert contents(copy) == contents(made)


def test_without_a_plan_receipts_say_how_many_shards_there_should_be(copy):
    (copy / PLAN_FILE).unlink()
    lose_both(copy)
    assert faults(copy) == ["1 of 3 shards are missing: 1"]


def test_a_receipt_that_speaks_of_endless_shards_is_no_burden(copy):
    (copy / PLAN_FILE).unlink()
    for index in range(3):
        resealed(receipt(copy, "train", index), n_shards=10**12)
    *_, missing = faults(copy)
    assert missing == "999999999997 of 1000000000000 shards are missing: 3, 4, 5, 6, 7, 8, 9, 10, ..."


def publish_elsewhere(copy, place, split, batch):
    """Publish a shard that belongs to one place in the directory of another."""
    publish_shard(copy / "elsewhere", place, 1, 3, identity=split.identity, batch=batch, about={})
    for file in place.path(copy / "elsewhere").rglob("part-*"):
        file.replace(split.place.path(copy) / file.relative_to(place.path(copy / "elsewhere")))
    shutil.rmtree(copy / "elsewhere")


def test_what_a_shard_says_of_itself_cannot_harm_the_terminal(copy):
    place = negs_place("\x1b[31m", "[red]", "train")
    batch = mapped_batch(shard(copy, "train", 1))
    (split,) = [part for part in plan(recorded_run(copy))[0].datasets[0].splits if part.place.part == "train"]
    publish_elsewhere(copy, place, split, batch)
    assert "it belongs to \\x1b[31m, [red], train" in neg("verify", copy).stderr


def test_nothing_is_parsed_whose_checksum_is_wrong(copy, monkeypatch):
    flip_a_bit(copy)
    parsed = []
    parse = integrity._batch_of
    monkeypatch.setattr(integrity, "_batch_of", lambda source: parsed.append(source.size) or parse(source))
    assert len(faults(copy)) == 1
    assert len(parsed) == 8


def test_a_shard_with_other_columns_is_found_though_everything_else_fits(copy):
    (split,) = [part for part in plan(recorded_run(copy))[0].datasets[0].splits if part.place.part == "train"]
    batch = mapped_batch(shard(copy, "train", 1)).drop_columns(["act_00"])
    publish_shard(copy, split.place, 1, 3, identity=split.identity, batch=batch, about={})
    assert faults(copy) == ["shard 1: its columns are not those of its model and dataset"]


# What is not to be mended


def test_shards_of_another_run_are_named_with_the_difference_and_stay(settings, copy, tmp_path):
    other = read_run_file(SkillRun, None, settings | {"out": tmp_path / "other", "site": "act"})
    run_extract(other, PlainSteps())
    shutil.copy(shard(other.directory, "train", 1), shard(copy, "train", 1))
    shutil.copy(receipt(other.directory, "train", 1), receipt(copy, "train", 1))
    flip = shard(copy, "train", 0)
    flip.write_bytes(flip.read_bytes()[:-1])
    damaged, foreign = faults(copy)
    assert damaged.startswith("shard 0: ")
    assert foreign == (
        "1 of 3 shards are of another run, the first is shard 1 (site: 'up' here, 'act' there): move or delete them"
    )
    before = contents(copy)
    assert neg("verify", copy, "--repair").exit_code == 1  # the run would refuse this directory
    assert contents(copy) == before


def test_a_shard_beyond_the_last_is_named_and_left(copy):
    shutil.copy(shard(copy, "train", 1), shard(copy, "train", 1).with_name("part-00007.arrow"))
    assert faults(copy) == ["shard 7: it has no receipt, and this run makes 3 only: delete it"]


def test_without_a_run_file_repair_says_so_and_removes_nothing(copy):
    (copy / RUN_FILE).unlink()
    flip_a_bit(copy)
    before = contents(copy)
    with pytest.raises(RunError, match=r"has no run.yaml, so what is damaged there cannot be computed again"):
        raise neg("verify", copy, "--repair").exception
    assert contents(copy) == before


def test_repair_leaves_a_directory_alone_that_another_driver_works_in(copy):
    flip_a_bit(copy)
    before = contents(copy)
    claimed, done = threading.Event(), threading.Event()

    def drive():
        with claim(copy):
            claimed.set()
            done.wait(60)

    driver = threading.Thread(target=drive)
    driver.start()
    try:
        assert claimed.wait(60)
        with pytest.raises(RunError, match="held by"):
            raise neg("verify", copy, "--repair").exception
        assert contents(copy) == before
    finally:
        done.set()
        driver.join()


@pytest.mark.parametrize(("name", "says"), [("absent", "does not exist"), ("", "holds no shards")])
def test_a_directory_without_a_run_is_refused(tmp_path, name, says):
    with pytest.raises(RunError, match=says):
        raise neg("verify", tmp_path / name).exception


# Runs below runs, and shards that are no NEGs


def test_runs_below_an_evaluation_are_checked_and_mended_each_in_its_place(settings, tmp_path):
    run = read_run_file(EvaluationRun, None, settings | {"out": tmp_path / "run"})
    planned = [(one, plan(one)) for one in run.settings]
    write_run_file(run)
    extract_planned(planned, PlainSteps(), Results(run.directory), when_extracted=lambda run, dataset: None)
    before = contents(tmp_path)
    (one_shot,) = tmp_path.rglob("shots-1/**/split=valid/part-00000.arrow")
    one_shot.write_bytes(one_shot.read_bytes()[:-1])
    checked = neg("verify", run.directory)
    assert checked.exit_code == 1
    assert "wrong: shots-1 negs" in checked.stderr
    assert neg("verify", run.directory, "--repair").exit_code == 0
    assert contents(tmp_path) == before


def test_sweeps_estimates_and_interventions_are_checked_and_mended(model, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.show.report.save_figures", lambda figures, folder: [])
    values = {"model": [model], "facts": str(tmp_path / "facts.jsonl"), "backend": "local", "prompts": 4, "neurons": 6}
    values |= {
        "shard_prompts": 2,
        "bootstrap": 5,
        "draws": 1,
        "range": [1],
        "estimator": ["gradient"],
        "set_shift": [1],
    }
    rows = [{"uuid": f"{i}", "prompt": f"It was {i}", "tpl": f"P{i % 2}", "answer": "AB"[i % 2]} for i in range(8)]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = read_run_file(LinearityRun, None, values | {"out": tmp_path / "run"})
    assert run_linearity(run, PlainSteps()).problems == []
    before = contents(run.directory)
    assert {one.folder.kind for one in found(run.directory)} == {"sweeps", "estimates", "interventions"}
    assert faults(run.directory) == []
    for kind in ("sweeps", "estimates", "interventions"):
        path = next((run.directory / kind).rglob("part-00001.arrow"))
        path.write_bytes(path.read_bytes()[:-1])
    assert len(faults(run.directory)) == 3
    assert neg("verify", run.directory, "--repair").exit_code == 0
    after = contents(run.directory)
    timings = {name for name in before if "_seconds" in name}
    assert timings
    assert {name: after[name] for name in before.keys() - timings} == {
        name: before[name] for name in before.keys() - timings
    }
