"""Each name stands for one thing, and fits into a file system: told before anything is computed."""

import json

import pytest
from support import save_tiny_model

from flows.show.drawing import file_name
from negcore.errors import RunError
from negcore.store.publish import ShardPlace
from tasks.config.campaign_run import CampaignRun
from tasks.config.dataset_runs import SkillRun
from tasks.names import check_distinct
from tasks.plan import plan


def write(path, answers="01"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{path} {i} Answer:", "labels": ["A", "B"], "answer": int(answers[i % 2])} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama", n_positions=4096))


def test_two_files_of_one_stem_are_refused_before_anything_is_read(tmp_path):
    a, b = write(tmp_path / "a" / "data.jsonl"), write(tmp_path / "b" / "data.jsonl", "10")
    with pytest.raises(RunError, match=rf"datasets '{a}' and '{b}' would both be stored as 'local/data'"):
        plan(SkillRun(model="no/model", dataset=(a, b)))


@pytest.mark.parametrize("other", ["DATA.jsonl", "data.JSONL", "sub/../data.jsonl", "link/data.jsonl"])
def test_one_file_under_two_names_and_names_that_differ_in_case_are_refused(tmp_path, monkeypatch, other):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="would both be stored as 'local/"):
        plan(SkillRun(model="no/model", dataset=("data.jsonl", other)))


def test_two_spellings_of_a_dataset_are_one_and_revisions_that_differ_in_case_alone_are_refused():
    with pytest.raises(RunError, match="stored as 'mceval8k/agnews'"):
        plan(SkillRun(model="no/model", dataset=("mceval8k/agnews", "MCEval8K/AGNews")))
    with pytest.raises(RunError, match="models 'org/m@a' and 'org/m@A' would both be stored as 'org/m@A'"):
        plan(SkillRun(model=("org/m@a", "org/m@A"), dataset="mini/fact"))


def test_what_is_given_twice_alike_is_one_thing_and_what_has_no_name_no_matter():
    def name_of(given):
        if given == "none":
            raise RunError("no name")
        return given

    check_distinct("things", ["a", "b", "a", "none", "none", "\u00e4"], name_of)
    with pytest.raises(RunError, match="would both be stored"):
        check_distinct("things", ["\u00e4", "a\u0308"], name_of)


@pytest.mark.parametrize("stem", ["n" * 240, "\u540d" * 30])
def test_a_name_that_no_directory_can_have_is_refused_by_the_plan(llama, tmp_path, stem):
    file = write(tmp_path / f"{stem}.jsonl")
    with pytest.raises(RunError, match=r"dataset 'local/.* as the name of a directory .*but at most 255 are possible"):
        plan(SkillRun(model=llama, dataset=file, out=tmp_path / "run"))


def test_the_longest_name_that_a_directory_can_have_is_allowed():
    ShardPlace("negs", "m" * (255 - len("model=")), "d", "train").check()
    with pytest.raises(RunError, match="model 'm.* takes 256 bytes"):
        ShardPlace("negs", "m" * (256 - len("model=")), "d", "train").check()


def test_names_of_directories_are_cut_where_they_get_too_long(tmp_path):
    model = f"/models/{chr(0x540D) * 85}"
    assert len(SkillRun(model=model, dataset="mini/fact").name.encode()) < 255
    folders = CampaignRun(model=(model, f"/other{model}", "a/M", "b/m"), out=tmp_path).folders
    assert len({folder.casefold() for folder in folders.values()}) == 4
    assert all(len(folder.encode()) <= 255 for folder in folders.values())


def test_figures_of_models_whose_names_differ_in_signs_alone_are_different_files():
    names = ["org/m.1", "org/m-1", "org-m-1", "\u6a21\u578b", "\u6a21\u5f0f", "n" * 300]
    assert len({file_name(name) for name in names}) == len(names)
    assert file_name("smollm2-135m") == "smollm2-135m" and all(len(file_name(name)) < 200 for name in names)
