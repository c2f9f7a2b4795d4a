"""Run directories that were moved or copied, and run files that are read from elsewhere."""

import logging
import shutil

import pytest
import yaml

from negcore.errors import RunError
from tasks.config.campaign_run import CampaignRun
from tasks.config.dataset_runs import EvaluationRun, SkillRun
from tasks.config.reading import read_run_file, recorded_run
from tasks.config.run_file import write_run_file

VALUES = {"model": ["org/m"], "dataset": ["mini/fact"]}


@pytest.fixture
def original(tmp_path, monkeypatch):
    """A run directory that a run wrote, started in tmp_path."""
    monkeypatch.chdir(tmp_path)
    write_run_file(SkillRun(**VALUES, out=tmp_path / "original"))
    return tmp_path / "original"


@pytest.mark.parametrize("is_gone", [False, True])
@pytest.mark.parametrize("named", ["{}", "{}/run.yaml"])
def test_the_directory_that_was_named_is_the_runs_wherever_it_was_before(original, caplog, is_gone, named):
    copy = shutil.copytree(original, original.parent / "copy")
    if is_gone:
        shutil.rmtree(original)
    with caplog.at_level(logging.WARNING):
        found = [read_run_file(SkillRun, named.format(copy), {}), recorded_run(named.format(copy))]
    assert [run.directory for run in found] == [copy, copy]
    said = f"{copy / 'run.yaml'} was written for {original}: the run is taken to be in {copy}"
    assert caplog.messages.count(said) == 1  # and not again when it is read again


def test_a_directory_where_it_always_was_or_under_another_name_is_no_matter(original, caplog):
    link = original.parent / "link"
    link.symlink_to(original)
    with caplog.at_level(logging.WARNING):
        assert [recorded_run(place).directory for place in (original, "original", link)] == [original] * 3
    assert not caplog.messages


def test_an_out_on_the_command_line_beats_the_directory_that_was_named(original, tmp_path):
    copy = shutil.copytree(original, tmp_path / "copy")
    assert read_run_file(SkillRun, copy, {"out": str(tmp_path / "other")}).directory == tmp_path / "other"


def test_a_file_of_ones_own_and_a_copy_under_another_name_keep_their_out(original, tmp_path):
    assert recorded_run(shutil.copy(original / "run.yaml", tmp_path / "again.yaml")).directory == original
    own = tmp_path / "runs" / "run.yaml"
    own.parent.mkdir()
    own.write_text(yaml.safe_dump({"kind": "pipeline", **VALUES, "out": str(tmp_path / "elsewhere")}))
    assert recorded_run(own).directory == tmp_path / "elsewhere"


def test_a_run_file_beside_shards_is_of_the_run_that_made_them_whoever_wrote_it(original, tmp_path):
    copy = shutil.copytree(original, tmp_path / "copy")
    values = yaml.safe_load((copy / "run.yaml").read_text())
    del values["written_by"]
    (copy / "run.yaml").write_text(yaml.safe_dump(values))
    assert recorded_run(copy).directory == original
    (copy / "negs" / "model=m" / "dataset=d").mkdir(parents=True)
    assert recorded_run(copy).directory == copy


def test_the_runs_below_an_evaluation_and_a_campaign_move_along(tmp_path):
    for run, below in (
        (EvaluationRun(model="org/m", out=tmp_path / "a"), lambda run: [one.directory for one in run.settings]),
        (CampaignRun(model=("org/m", "o/n"), out=tmp_path / "a"), lambda run: [one.run.directory for one in run.steps]),
    ):
        write_run_file(run)
        moved = shutil.move(tmp_path / "a", tmp_path / "b")
        assert all(place.is_relative_to(moved) for place in below(recorded_run(moved)))
        shutil.rmtree(moved)


@pytest.mark.parametrize("field", ["model", "dataset", "mceval8k"])
def test_a_relative_path_that_is_there_but_not_here_is_refused_with_both(tmp_path, monkeypatch, field):
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    (start / "mine" / "x.jsonl").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(start)
    value = "mine/x.jsonl"
    file = write_run_file(SkillRun(**VALUES | {field: value, "out": start / "run"}))
    assert recorded_run(file).directory == start / "run"
    monkeypatch.chdir(elsewhere)
    both = f"'{elsewhere / value}' is not there; '{start / value}' is: start the command in '{start}'"
    with pytest.raises(RunError, match=both):
        recorded_run(file)
    assert recorded_run(file, {field: str(start / value)}).directory == start / "run"
    assert recorded_run(file, to_look_at=True).directory == start / "run"


def test_a_relative_path_beside_a_run_file_of_ones_own_is_refused_too(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "data.jsonl").touch()
    file = tmp_path / "project" / "mine.yaml"
    file.write_text("kind: campaign\nmodel: org/m\nstage: skills\nskills: {dataset: data.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=f"'{tmp_path / 'data.jsonl'}' is not there; .*start the command in"):
        recorded_run(file)
    monkeypatch.chdir(file.parent)
    assert recorded_run(file).model == ("org/m",)


def test_a_path_that_is_here_and_there_is_taken_from_here_with_a_word(tmp_path, monkeypatch, caplog):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text(name)
    monkeypatch.chdir(tmp_path / "a")
    file = write_run_file(SkillRun(**VALUES | {"dataset": "data.jsonl", "out": tmp_path / "run"}))
    monkeypatch.chdir(tmp_path / "b")
    with caplog.at_level(logging.WARNING):
        recorded_run(file)
    (message,) = caplog.messages
    assert f"{tmp_path / 'b' / 'data.jsonl'}, not {tmp_path / 'a' / 'data.jsonl'}" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("limit: 010", "010 would be read as 8"),
        ("limit: 12:30", "12:30 would be read as 750"),
        ("limit: yes", "limit is true, but is neither true nor false"),
        ("seed: off", "seed is false"),
        ("device: no", "device is false"),
        ("shots: on", "shots is true"),
        ("limit: 1e3", "limit is '1e3'"),
        ("dataset: 2024-01-01", "dataset"),
        ("dataset: mini/nli", "'dataset' occurs twice; give it once"),
        ("wording: {question: a, question: b}", "'question' occurs twice"),
        ("\tlimit: 3", "is not YAML"),
        ("limit: *x", "is not YAML"),
        ("limit: !!python/name:os.system x", "is not YAML"),
        ("a: " + "[" * 5000, "is not YAML"),
    ],
)
def test_what_yaml_would_read_as_something_else_is_refused(tmp_path, line, message):
    file = tmp_path / "mine.yaml"
    file.write_text(f"kind: pipeline\nmodel: m\ndataset: mini/fact\n{line}\n")
    with pytest.raises(RunError) as error:
        read_run_file(SkillRun, file, {})
    assert message in str(error.value) and len(str(error.value)) < 600


def test_anchors_merged_keys_and_plain_numbers_stay(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "kind: campaign\nmodel: [m]\nstage: skills\nseed: 0\nskills: &s {dataset: [mini/fact], limit: 10}\n"
        "mceval8k: {<<: *s, limit: 20}\n"
    )
    assert read_run_file(CampaignRun, file, {}).model_extra["mceval8k"] == {"dataset": ["mini/fact"], "limit": 20}
