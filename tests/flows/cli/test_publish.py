"""`neg publish` as a user meets it: a folder, its upload to a hub on loopback, and what is refused."""

import re
import shutil

import pytest
from hub import serving
from huggingface_hub import constants, snapshot_download
from support import save_tiny_model, write_questions
from typer.testing import CliRunner

from flows.cli.app import app
from flows.pipeline import run_pipeline
from negcore import open_negs
from negcore.errors import NegError
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.steps import PlainSteps


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    model = save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")
    questions = write_questions(tmp_path_factory.mktemp("data"))

    def make(**changes):
        values = {"model": [str(model)], "dataset": [str(questions)], "backend": "local", "probe": ["magn"]}
        values["out"] = tmp_path_factory.mktemp("made") / "run"
        run = read_run_file(SkillRun, None, values | changes)
        assert run_pipeline(run, PlainSteps()).problems == []
        return run.directory

    return make


@pytest.fixture(scope="module")
def made(make):
    return make()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def neg(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    told = neg(*arguments)
    assert isinstance(told.exception, NegError), told.output
    assert "\n" not in str(told.exception)
    return str(told.exception)


def test_a_folder_is_made_and_what_to_do_is_told(made, tmp_path):
    told = neg("publish", made, "--to", tmp_path / "folder")
    assert told.exit_code == 0
    assert "60 rows in 3 files" in told.output
    assert "no licence: " in told.output and "is a path of this machine" in told.output
    told = neg("publish", made, "--to", tmp_path / "other", "--license", "mit")
    assert told.exit_code == 0 and "no licence" not in told.output


def test_an_upload_and_a_download_of_it_are_the_same_and_verify(made, hub, tmp_path):
    folder = tmp_path / "folder"
    assert neg("publish", made, "--to", folder, "--license", "mit").exit_code == 0
    assert hub.requests == []  # nothing is uploaded without being asked for
    (folder / ".secret").write_text("stays here")
    told = neg("publish", folder, "--upload", "org/negs")
    assert told.exit_code == 0, told.exception
    assert f"uploaded to {hub.endpoint}/datasets/org/negs" in told.output.replace("\n", "")
    copy = tmp_path / "copy"
    snapshot_download("org/negs", repo_type="dataset", local_dir=copy)
    assert not (copy / ".secret").exists()
    for file in folder.rglob("*"):
        if file.is_file() and file.name != ".secret":
            assert (copy / file.relative_to(folder)).read_bytes() == file.read_bytes()
    assert neg("verify", copy).exit_code == 0
    assert open_negs(copy).select(split="test").n_rows == 20


def test_a_run_is_published_and_uploaded_at_once(made, hub, tmp_path):
    assert neg("publish", made, "--to", tmp_path / "folder", "--upload", "org/negs").exit_code == 0
    assert (tmp_path / "hub" / "datasets" / "org" / "negs" / "manifest.json").is_file()


def test_uploads_that_the_hub_refuses_are_one_line(made, hub, tmp_path, monkeypatch):
    assert neg("publish", made, "--to", tmp_path / "folder").exit_code == 0
    hub.read_only.add("datasets/org/negs")
    told = refused("publish", tmp_path / "folder", "--upload", "org/negs")
    assert "does not let your token write to dataset 'org/negs'" in told
    assert refused("publish", tmp_path / "folder", "--upload", "no name at all!")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "without a token" in refused("publish", tmp_path / "folder", "--upload", "org/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("publish", tmp_path / "folder", "--upload", "org/other")
    assert not (tmp_path / "hub" / "datasets").exists()


def test_only_what_was_made_to_be_published_is_uploaded(made, hub, tmp_path):
    assert "name the folder to make with --to" in refused("publish", made, "--upload", "org/negs")
    assert "name the folder to make with --to" in refused("publish", made)
    folder = tmp_path / "folder"
    assert neg("publish", made, "--to", folder).exit_code == 0
    (folder / "notes.txt").write_text("my prompts")
    assert "'notes.txt' in" in refused("publish", folder, "--upload", "org/negs")
    (folder / "notes.txt").unlink()
    shutil.rmtree(next(folder.glob("negs/*/*/split=test")))
    assert "is damaged" in refused("publish", folder, "--upload", "org/negs")
    assert not any("commit" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--license", "CC BY 4.0"], "licence 'CC BY 4.0' is no identifier"),
        (["--to", "s3://bucket/folder"], "is in a bucket"),
        (["--to", "/dev/null"], "is there already"),
        (["--to", "/proc/folder"], "cannot be written|do not fit"),
    ],
)
def test_options_that_cannot_be_are_refused(made, tmp_path, options, says):
    assert re.search(says, refused("publish", made, "--to", tmp_path / "folder", *options))
    assert not (tmp_path / "folder").exists()


def test_texts_of_a_runs_own_wording_are_published_only_if_told(make, tmp_path):
    run = make(dataset=["mini/fact"], limit=6, wording={"instruction": "A secret text.", "question": "{text}"})
    told = refused("publish", run, "--to", tmp_path / "folder")
    assert "own wording would be published" in told and "--show-wording" in told
    assert not (tmp_path / "folder").exists()
    assert neg("publish", run, "--to", tmp_path / "folder", "--show-wording").exit_code == 0
