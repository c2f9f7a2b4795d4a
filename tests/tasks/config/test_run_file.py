from pathlib import Path

import pytest

from negcore.errors import RunError
from tasks.config.campaign_run import CampaignRun
from tasks.config.dataset_runs import SkillRun
from tasks.config.linearity_run import LinearityRun
from tasks.config.reading import read_run_file
from tasks.config.run_file import write_run_file


@pytest.fixture
def values(tmp_path):
    return {"model": ["m"], "dataset": ["mini/fact"], "out": str(tmp_path / "run")}


def test_a_run_file_that_was_written_reads_back_the_same(values, tmp_path):
    run = read_run_file(SkillRun, None, values | {"limit": 7, "shots": 1})
    path = write_run_file(run)
    assert path == tmp_path / "run" / "run.yaml"
    assert (
        read_run_file(SkillRun, path, {})
        == read_run_file(SkillRun, tmp_path / "run", {})
        == run.model_copy(update={"out": Path(run.out)})
    )


def test_the_command_line_takes_precedence_over_the_file(values):
    path = write_run_file(read_run_file(SkillRun, None, values | {"limit": 7}))
    assert read_run_file(SkillRun, path, {"limit": 9}).limit == 9


def test_an_unknown_field_is_refused_with_the_known_ones(values, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: [m]\ndataset: [d]\nlimits: 3\n")
    with pytest.raises(RunError, match=r"mine.yaml: unknown field 'limits'; known are model, out, site, "):
        read_run_file(SkillRun, file, {})


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("limit", 0, "limit is 0"),
        ("shots", 3, "shots is 3"),
        ("dtype", "int4", "dtype is 'int4'"),
        ("model", [], "model is"),
        ("gpus", 4, "gpus is 4.*less than or equal to 1"),
    ],
)
def test_a_bad_value_is_refused_with_field_and_value(values, field, value, problem):
    with pytest.raises(RunError, match=problem) as error:
        read_run_file(SkillRun, None, values | {field: value})
    assert "\n" not in str(error.value)


def test_a_missing_field_is_named(values):
    del values["model"]
    with pytest.raises(RunError, match="'model' is missing"):
        read_run_file(SkillRun, None, values)


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b", "\x00"])
def test_a_file_that_is_no_mapping_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(RunError, match="run.yaml") as error:
        read_run_file(SkillRun, file, {})
    assert "\n" not in str(error.value)


def test_an_unwritable_directory_is_refused(values, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_run_file(SkillRun(**values | {"out": tmp_path / "file" / "run"}))


def test_the_name_depends_on_what_decides_the_numbers_and_on_nothing_else(values):
    run = read_run_file(SkillRun, None, values)
    assert run.model_copy(update={"workers": 7, "backend": "local"}).name == run.name
    assert run.model_copy(update={"seed": 1}).name != run.name


def test_what_is_stored_is_part_of_the_name_unless_it_is_what_was_always_stored(values):
    run, codes = (read_run_file(SkillRun, None, values | {"storage": storage}) for storage in ("values", "codes"))
    assert "storage" not in run.science
    assert codes.science == run.science | {"storage": "codes"}
    assert codes.name != run.name


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"nonfinite": "keep"}, "none for NaN and infinity: set nonfinite to fail or skip, not keep"),
        ({"probe": ["polar", "magn-logistic"]}, "probe 'magn-logistic' reads values, not codes: leave it out"),
    ],
)
def test_what_codes_cannot_do_is_refused_before_anything_is_computed(values, settings, problem):
    read_run_file(SkillRun, None, values | settings)
    with pytest.raises(RunError, match=problem) as error:
        read_run_file(SkillRun, None, values | settings | {"storage": "codes"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("nonfinite", ["fail", "skip", "keep"])
def test_every_kind_of_run_has_a_policy_for_numbers_that_are_not_finite_and_no_name_depends_on_it(nonfinite):
    run = read_run_file(LinearityRun, None, {"model": ["m"], "nonfinite": nonfinite})
    assert run.nonfinite == nonfinite
    assert run.name == LinearityRun(model=("m",)).name


def test_a_stage_of_a_campaign_may_have_its_own_policy_for_numbers_that_are_not_finite():
    values = {"model": ["m"], "nonfinite": "keep", "mceval8k": {"nonfinite": "skip"}}
    run = read_run_file(CampaignRun, None, values)
    assert [part.run.nonfinite for part in run.parts] == ["skip", "keep"]
