"""What is mistyped is answered with the nearest there is: models, datasets, files and directories."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from flows.cli.app import app
from negcore.errors import NegError
from negcore.store.files import near_path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/tiny", "runs/skills"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "a", "labels": ["A", "B"], "answer": 0}))
    (tmp_path / "runs/skills/run.yaml").write_text("kind: skills\n")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("pipeline --model model/tiny --dataset mini/fact", "(did you mean 'models/tiny'?)"),
        ("pipeline --model ./models/tini --dataset mini/fact", "(did you mean 'models/tiny'?)"),
        ("pipeline --model smollm2-135 --dataset mini/fact", "(did you mean 'smollm2-135m'?)"),
        ("pipeline --model smollm2-135m --dataset mine.jsnl", "unknown dataset 'mine.jsnl'"),
        ("pipeline --model smollm2-135m --dataset mine.csv", "must end in .jsonl: neg import mine.csv makes one"),
        ("pipeline --model smollm2-135m --dataset mine", "must end in .jsonl, as 'mine.jsonl' does"),
        ("pipeline --model smollm2-135m --dataset facts", "did you mean 'mini/fact'"),
        ("pipeline --model smollm2-135m --dataset mceval8k/agnew", "did you mean 'mceval8k/agnews'"),
        ("datasets mines.jsonl", "did you mean 'mine.jsonl'?"),
        ("skills run/skils", "did you mean 'runs/skills'?"),
        ("status runs/skils", "did you mean '{here}/runs/skills'?"),
        ("verify run/skills", "did you mean '{here}/runs/skills'?"),
        ("import mine.json", "did you mean 'mine.jsonl'?"),
        ("pipelin", "Did you mean 'pipeline'?"),
        ("pipeline --modell x", "--model"),
    ],
)
def test_the_nearest_is_named(here, command, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Exception) as refused:  # noqa: B017 (typer keeps the class of its errors to itself)
        app(shlex.split(command), standalone_mode=False)
    error = refused.value
    assert isinstance(error, NegError) or hasattr(error, "format_message")
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    assert says.format(here=here) in text and "\n" not in text


def test_nothing_is_named_that_is_not_there_or_not_alike(here):
    assert near_path(here / "runs" / "linearity") == ""
    assert near_path(here / "runs" / "skills") == ""
    assert near_path(here / "zzz" / "skills") == ""
    assert near_path(here / ("n" * 300)) == ""
    assert CliRunner().invoke(app, ["models"]).exit_code == 0
