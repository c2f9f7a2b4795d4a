import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from support import REPOSITORY

from negcore.errors import RunError
from tasks.config import provenance
from tasks.config.campaign_run import CampaignRun
from tasks.config.dataset_runs import EvaluationRun, SkillRun, SkillsRun
from tasks.config.kinds import RUN_KINDS
from tasks.config.linearity_run import LinearityRun
from tasks.config.reading import read_run_file, recorded_run
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


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("limits", "did you mean 'limit'?"),
        ("colour", "known are kind, format, model, adapter, out, site, "),
    ],
)
def test_an_unknown_field_is_refused_with_the_kind_and_the_nearest_field_or_all(tmp_path, field, says):
    file = tmp_path / "mine.yaml"
    file.write_text(f"kind: pipeline\nmodel: [m]\ndataset: [d]\n{field}: 3\n")
    with pytest.raises(RunError) as error:
        read_run_file(SkillRun, file, {})
    assert f"mine.yaml: unknown field '{field}' of a pipeline run; {says}" in str(error.value)


def test_all_problems_of_a_file_are_listed_a_line_each(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("kind: linearity\nmodels: [m]\nprompts: 0\nrange: [1, -2]\ndtype: int4\n")
    with pytest.raises(RunError) as refused:
        read_run_file(LinearityRun, file, {})
    lines = str(refused.value).splitlines()
    assert [line.removeprefix(f"{file}: ").split(" ")[0] for line in lines] == [
        "'model'",
        "dtype",
        "prompts",
        "range.1",
        "unknown",
    ]
    with pytest.raises(RunError) as again:
        recorded_run(file)
    assert str(again.value) == str(refused.value)


def test_one_value_may_stand_without_brackets(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("kind: linearity\nmodel: m\nrange: 2\nestimator: neurgrad\n")
    run = read_run_file(LinearityRun, file, {})
    assert (run.model, run.ranges, run.estimator) == (("m",), (2.0,), ("neurgrad",))
    assert read_run_file(CampaignRun, None, {"model": "m", "stage": "linearity"}).stage == ("linearity",)


# Kind, form and writer


def test_a_written_file_says_its_kind_its_form_and_who_wrote_it(values, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/neg", "pipeline", "--out", "s3://key:secret@host/a b"])
    text = write_run_file(read_run_file(SkillRun, None, values)).read_text()
    written = yaml.safe_load(text)
    assert (written["kind"], written["format"]) == ("pipeline", 1)
    assert written["written_by"]["command"] == "neg pipeline --out 's3://***@host/a b'"
    assert written["written_by"]["version"] == version("neg-at-scale")
    assert "secret" not in text


def test_the_git_revision_is_the_commit_of_the_checkout(values):
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", REPOSITORY, "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    written = yaml.safe_load(write_run_file(SkillRun(**values)).read_text())["written_by"]
    assert written["revision"].removesuffix("-dirty") == commit


def test_without_git_the_file_names_no_revision(values, monkeypatch):
    provenance._revision.cache_clear()
    monkeypatch.setenv("PATH", "")
    try:
        written = yaml.safe_load(write_run_file(SkillRun(**values)).read_text())["written_by"]
    finally:
        provenance._revision.cache_clear()
    assert set(written) == {"command", "directory", "version"}


@pytest.mark.parametrize("command", ["extract", "probe", "pipeline"])
def test_the_commands_on_one_directory_share_their_run_files(command):
    assert RUN_KINDS[command].run_class is SkillRun


def test_kind_and_form_decide_no_name_and_no_numbers(values):
    science = read_run_file(SkillRun, None, values).science
    assert not {"kind", "format", "written_by"} & science.keys()


def test_a_directory_of_another_kind_says_which_command_it_is_for(values, tmp_path):
    write_run_file(LinearityRun(model=("m",), out=tmp_path))
    with pytest.raises(RunError, match=f"^{tmp_path} holds a linearity run: use neg linearity$"):
        read_run_file(SkillRun, tmp_path, {"limit": 3})


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("kind: linearty\nmodel: m\n")
    with pytest.raises(RunError, match="kind is 'linearty', but must be one of pipeline, mceval8k, linearity, skills"):
        recorded_run(file)


def test_another_form_is_refused_with_what_to_do_and_nothing_else(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("kind: pipeline\nformat: 2\nmodel: m\nnew: 3\n")
    with pytest.raises(RunError, match="run.yaml: format is 2, but .* reads 1 only: use the version that") as error:
        read_run_file(SkillRun, file, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("run", [LinearityRun(model=("m",)), CampaignRun(model=("m",)), EvaluationRun(model=("m",))])
def test_a_file_without_its_kind_is_still_read_and_says_what_to_add(run, tmp_path, caplog):
    file = write_run_file(run.model_copy(update={"out": tmp_path}))
    old = "".join(file.read_text().splitlines(keepends=True)[2:])
    assert old.startswith("model:")
    file.write_text(old)
    for _ in range(2):
        assert recorded_run(tmp_path) == recorded_run(file) == run.model_copy(update={"out": tmp_path})
    (line,) = caplog.messages
    assert line == (
        f"{file} names no kind and is read as a {run.kind} run; a later version needs `kind: {run.kind}` in it"
    )


def test_a_file_without_its_kind_that_fits_another_says_which_command_it_is_for(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: m\nprompts: 3\n")
    with pytest.raises(RunError, match="mine.yaml holds a linearity run: use neg linearity"):
        read_run_file(SkillRun, file, {})


def test_the_former_name_of_the_shard_size_is_read_and_the_command_line_takes_precedence(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("kind: linearity\nmodel: m\nshard_prompts: 3\n")
    assert read_run_file(LinearityRun, file, {}).shard_rows == 3
    assert read_run_file(LinearityRun, file, {"shard_rows": 4}).shard_rows == 4


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("limit", 0, "limit is 0"),
        ("shots", 3, "shots is 3"),
        ("dtype", "int4", "dtype is 'int4'"),
        ("model", [], "model is"),
        ("gpus", 65, "gpus is 65.*less than or equal to 64"),
    ],
)
def test_a_bad_value_is_refused_with_field_and_value(values, field, value, problem):
    with pytest.raises(RunError, match=problem) as error:
        read_run_file(SkillRun, None, values | {field: value})
    assert "\n" not in str(error.value)


def test_a_missing_field_is_named(values):
    del values["model"]
    with pytest.raises(RunError, match="command line: --model is missing"):
        read_run_file(SkillRun, None, values)


@pytest.mark.parametrize(
    ("field", "value", "in_file", "on_command_line"),
    [
        ("shard_rows", 0, "shard_rows is 0: ", "--shard-rows is 0: "),
        ("probe", ["pollar"], "probe.0 is 'pollar': ", "--probe is 'pollar': "),
        ("dtype", "bfloat", "did you mean 'bfloat16'?", "did you mean 'bfloat16'?"),
        (
            "system_prompt",
            "Hi",
            "system_prompt is for chats: set prompt_format to chat, or leave it out",
            "--system-prompt is for chats: set --prompt-format to chat, or leave it out",
        ),
    ],
)
def test_hints_name_fields_in_a_file_and_options_on_the_command_line(
    values, tmp_path, field, value, in_file, on_command_line
):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"kind": "pipeline", "model": "m", "dataset": "d", field: value}))
    with pytest.raises(RunError) as of_file:
        read_run_file(SkillRun, file, {})
    with pytest.raises(RunError) as of_options:
        read_run_file(SkillRun, None, values | {field: value})
    assert in_file in str(of_file.value) and on_command_line in str(of_options.value)


def test_a_path_that_has_the_name_of_a_field_is_quoted_as_it_is(values):
    with pytest.raises(RunError, match="--node-label is 'a/shard_rows.x': 'a/shard_rows.x' is no label"):
        read_run_file(SkillRun, None, values | {"node_label": "a/shard_rows.x"})


def test_own_prompts_are_asked_in_no_other_wording_unless_that_is_asked_for(values, tmp_path, caplog):
    own = values | {"dataset": ["mini/fact", "mine.jsonl"], "out": tmp_path / "run"}
    run = read_run_file(SkillsRun, None, own)
    assert run.variant == ("shots", "demonstrations")
    assert "the variant wording is left out: prompts of your own, as in mine.jsonl, have no other" in caplog.text
    assert read_run_file(SkillsRun, write_run_file(run), {}).variant == run.variant
    assert read_run_file(SkillsRun, None, own | {"dataset": "mini/fact"}).variant[0] == "wording"
    with pytest.raises(RunError, match="variant 'wording' is not for 'mine.jsonl', .*: leave it out"):
        read_run_file(SkillsRun, None, own | {"variant": ["wording", "shots"]})


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
        ({"nonfinite": "keep"}, "none for NaN and infinity: set --nonfinite to fail or skip, not keep"),
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
    assert [step.run.nonfinite for step in run.steps] == ["skip", "keep"]


def test_an_adapter_belongs_to_the_name_and_its_absence_changes_no_name(values):
    plain, adapted = (read_run_file(SkillRun, None, values | more) for more in ({}, {"adapter": "adapters/a"}))
    assert "adapter" not in plain.science and plain.model_refs == ("m",)
    assert adapted.model_refs == ("m+adapters/a",) and adapted.name != plain.name


def test_a_model_is_spread_over_the_gpus_of_its_worker_unless_a_map_says_otherwise(values, tmp_path):
    def placed(**more):
        return read_run_file(SkillRun, None, values | more)

    assert placed().placement is None and placed(gpus=0.5).placement is None and placed(gpus=1).placement is None
    assert placed(gpus=4).placement == "auto" and placed(gpus=4).resources.gpus == 4
    assert placed(gpus=4, device_map="cpu").placement == "cpu" and placed(gpus=4).name == placed().name
    file = tmp_path / "mine.yaml"
    file.write_text("kind: pipeline\nmodel: m\ndataset: d\ndevice_map: {'': cpu, model.layers: disk}\n")
    assert read_run_file(SkillRun, file, {}).placement == {"": "cpu", "model.layers": "disk"}


@pytest.mark.parametrize(
    ("more", "says"),
    [({"gpus": 1.5}, "a share of one GPU, or a whole number"), ({"device_map": "gpu"}, "'gpu' is not allowed: cpu")],
)
def test_a_place_that_no_model_can_have_is_refused(values, more, says):
    with pytest.raises(RunError, match=says):
        read_run_file(SkillRun, None, values | more)


def test_a_revision_that_lacks_quotes_is_said_to_need_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text('kind: pipeline\nmodel: [org/m@a, "@b"]\ndataset: mini/fact\n')
    assert read_run_file(SkillRun, file, {}).model == ("org/m@a", "org/m@b")
    file.write_text("kind: pipeline\nmodel: [org/m@a, @b]\ndataset: mini/fact\n")
    with pytest.raises(RunError, match="'@' that cannot start any token.*text that begins with it needs quotes"):
        read_run_file(SkillRun, file, {})
