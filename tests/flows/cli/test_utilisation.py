"""`neg mui` as its user sees it: shares at equal numbers of rows, what datasets share, curves, and what is refused."""

import csv
import io
import json
from pathlib import Path

import pytest
from support import save_tiny_model, write_questions
from typer.testing import CliRunner

from flows.cli.app import app
from flows.pipeline import run_extract
from negcore import open_negs
from negcore.analysis.utilisation import used_neurons
from negcore.errors import NegError
from tasks.config.dataset_runs import SkillRun
from tasks.steps import PlainSteps


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on a dataset of 60 rows and one of 30."""
    place = tmp_path_factory.mktemp("mui")
    whole = write_questions(place)
    half = place / "half.jsonl"
    rows = [json.loads(line) for line in Path(whole).read_text().splitlines()]
    half.write_text("\n".join(json.dumps(row) for row in rows[::2]))
    model = str(save_tiny_model("llama", place / "llama"))
    run = SkillRun(model=model, dataset=(whole, str(half)), backend="local", workers=1, out=place / "run")
    assert run_extract(run, PlainSteps()).problems == []
    return place / "run"


def mui(*arguments):
    return CliRunner().invoke(app, ["mui", *map(str, arguments)])


def test_datasets_are_compared_at_the_rows_of_the_smallest(made):
    found = mui(made, "--share", 0.2)
    assert found.exit_code == 0, found.output
    lines = [line.split() for line in found.output.splitlines()]
    splits = [
        [split for split in open_negs(made) if split.place.dataset == f"local/{name}"] for name in ("questions", "half")
    ]
    for name, of_dataset in zip(("questions", "half"), splits, strict=True):
        used = used_neurons(of_dataset, share=0.2)
        (cells,) = [line for line in lines if line[:1] == ["run"] and name in line[2] and len(line) == 9]
        shares = [used.share(4), used.share(30), used.unrelated(30), used.share(used.n_rows)]
        assert [float(cell) for cell in cells[5:]] == pytest.approx([100 * one for one in shares], abs=0.006)
        assert int(cells[3]) == used.n_rows
    assert "Neurons used by two datasets, of 30 rows each" in found.output


def test_curves_are_written_with_every_digit(made):
    found = mui(made, "--dataset", "local/half", "--score", "neg", "--format", "csv")
    assert found.exit_code == 0, found.output
    rows = list(csv.DictReader(io.StringIO(found.stdout)))
    assert [int(row["n_rows"]) for row in rows] == [1, 2, 4, 8, 16, 30]
    used = used_neurons([split for split in open_negs(made) if split.place.dataset == "local/half"], "neg")
    assert [float(row["share"]) for row in rows] == [used.share(int(row["n_rows"])) for row in rows]


def test_two_runs_of_one_name_are_told_apart(made, tmp_path):
    (tmp_path / "run").symlink_to(made)
    found = mui(made, tmp_path / "run", "--dataset", "local/half", "--format", "csv")
    assert found.exit_code == 0, found.output
    names = {row["run"] for row in csv.DictReader(io.StringIO(found.stdout))}
    assert names == {str(made), str(tmp_path / "run")}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rows", 31], "31 rows cannot be compared: the smallest dataset has 30"),
        (["--share", 0], "give one above 0 and at most 1"),
        (["--dataset", "local/none"], "dataset 'local/none' is not in this run"),
    ],
)
def test_what_cannot_be_compared_is_refused(made, options, says):
    found = mui(made, *options)
    assert isinstance(found.exception, NegError)
    assert says in str(found.exception)
