"""`neg sql`, `neg export` and `neg compare --format` as a user meets them."""

import csv
import io
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet
import pytest
from stored_negs import N_ROWS, numbers, write_split
from typer.testing import CliRunner

from flows.cli import tables as module
from flows.cli.app import _exit_code, app
from negcore.probing.evaluation import Accuracy
from tasks.probe import AccuracyRow
from tasks.rundir.manifest import begin, finish, shards_of
from tasks.rundir.tables import write_arrow, write_table


def accuracy_row(dataset, n_correct, probe="magn", group=""):
    low, high = Accuracy(n_correct, N_ROWS).interval
    counts = {"n_correct": n_correct, "n_test": N_ROWS, "n_train": 40, "accuracy": n_correct / N_ROWS}
    floors = {"majority": 0.5, "random": 0.25, "overlapping": False}
    names = {"model": "m", "shots": 0, "genre": "", "dataset": dataset, "group": group, "probe": probe}
    return AccuracyRow(**names, n_neurons=None, low=low, high=high, **counts, **floors)


def make_run(root, *datasets):
    """A finished run that was never computed."""
    before = begin(root)
    write_split(root, "test", numbers("test"))
    rows = [accuracy_row(dataset, 20 + i, group=group) for dataset in datasets for i, group in enumerate(("", "en"))]
    write_table(root / "accuracy.arrow", AccuracyRow, [asdict(row) for row in rows])
    write_arrow(root / "skills" / "causal.arrow", pa.table({"probe": ["magn"], "share": [1 / 3]}))
    finish(root, before, shards_of(root))
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one", "a", "=b")


@pytest.fixture(scope="module")
def other(run):
    return make_run(run.with_name("two"), "=b", "c")


def neg(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a command that the user has to correct, and return the one line that says so."""

    def run_it(*arguments):
        monkeypatch.setattr("sys.argv", ["neg", *map(str, arguments)])
        assert _exit_code() == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err

    return run_it


def test_an_answer_is_a_table_and_all_of_it_as_csv(run, monkeypatch):
    asked = neg("sql", run, "SELECT dataset, accuracy FROM accuracy WHERE subgroup = '' ORDER BY dataset")
    assert asked.exit_code == 0 and "2 rows" in asked.output
    assert [line.split() for line in asked.stdout.splitlines() if "0.5" in line] == [["=b", "0.5"], ["a", "0.5"]]
    monkeypatch.setattr(module, "_MOST_ROWS", 7)
    shown = neg("sql", run, "SELECT id, gold FROM prompts")
    assert "the first 7 of 40 rows; --csv gives all of them" in shown.output
    whole = neg("sql", run, "SELECT id, gold FROM prompts", "--csv").stdout
    assert [row[0] for row in csv.reader(io.StringIO(whole))] == ["id", *(f"test/{i}" for i in range(N_ROWS))]


def test_without_a_query_the_views_are_shown(run):
    assert all(view in neg("sql", run).output for view in ("accuracy", "prompts", "negs(layer)", "skills.causal"))


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELECT * FROM read_csv('/etc/passwd')", "/etc/passwd"),
        ("COPY (SELECT 1) TO 'x.csv'", "a statement of the kind COPY is refused"),
        ("ATTACH 'x.db'", "a statement of the kind ATTACH is refused"),
        ("INSTALL httpfs", "a statement of the kind LOAD is refused"),
        ("PRAGMA database_list", "a statement of the kind PRAGMA is refused"),
        ("SET threads = 1", "a statement of the kind SET is refused"),
        ("SELECT 1; SELECT 2", "2 statements is refused"),
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM x", "the views are accuracy, skills.causal, prompts, negs(layer)"),
    ],
)
def test_what_a_query_may_not_do_is_one_line_and_exit_code_2(run, refused, sql, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused("sql", run, sql)
    assert list(tmp_path.iterdir()) == []


def test_options_that_contradict_each_other_are_refused(run, other, refused, tmp_path):
    assert "contradict each other" in refused("sql", run, "SELECT 1", "--csv", "--format", "md")
    for command in (("sql", run, "SELECT 1"), ("compare", run, other)):
        assert "--out needs a format" in refused(*command, "--out", tmp_path / "x")
        assert "parquet is no text to be shown" in refused(*command, "--format", "parquet")
    assert list(tmp_path.iterdir()) == []


def test_every_table_is_exported_to_a_file_of_its_own(run, tmp_path):
    done = neg("export", run, "--out", tmp_path / "csv")
    assert done.exit_code == 0, done.output
    assert sorted(path.relative_to(tmp_path / "csv").as_posix() for path in (tmp_path / "csv").rglob("*.csv")) == [
        "accuracy.csv",
        "skills/causal.csv",
    ]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "csv" / "accuracy.csv").read_text())))
    assert [row["dataset"] for row in rows] == ["a", "a", "'=b", "'=b"]
    assert float(rows[0]["low"]) == accuracy_row("a", 20).low
    assert "2 texts begin like formulas" in " ".join(done.output.split())


@pytest.mark.parametrize(("name", "suffix"), [("md", "md"), ("latex", "tex"), ("parquet", "parquet")])
def test_a_chosen_table_is_exported_in_every_format(run, tmp_path, name, suffix):
    done = neg("export", run, "--format", name, "--table", "skills/causal", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file == tmp_path / "skills" / f"causal.{suffix}"
    if name == "parquet":
        assert pyarrow.parquet.read_table(file).to_pylist() == [{"probe": "magn", "share": 1 / 3}]
    else:
        assert "magn" in file.read_text() and "0.3333" in file.read_text()


def test_exports_lie_in_the_run_directory_by_default_and_it_stays_as_it_finished(tmp_path):
    run = make_run(tmp_path / "run", "a")
    assert neg("export", run).exit_code == 0
    assert (run / "export" / "accuracy.csv").is_file()
    assert neg("export", run, "--format", "md").exit_code == 0
    assert "no longer as it finished" not in neg("status", run).output


def test_a_table_that_does_not_exist_is_answered_with_those_that_do(run, refused, tmp_path):
    assert "has no table 'acuracy': name one of accuracy, skills/causal" in refused("export", run, "--table", "acuracy")
    assert "holds no tables of results" in refused("export", tmp_path)


def test_a_table_that_changed_is_not_given_on_and_one_of_an_unfinished_run_with_a_warning(tmp_path, refused):
    run = make_run(tmp_path / "run", "a")
    write_arrow(run / "skills" / "causal.arrow", pa.table({"probe": ["forged"]}))
    for command in (("export", run), ("sql", run, "SELECT 1")):
        assert "causal.arrow' cannot be trusted (it is not what the run finished with)" in refused(*command)
    (run / "manifest.json").unlink()
    done = neg("sql", run, "FROM skills.causal", "--csv")
    assert (done.exit_code, done.stdout) == (0, "probe\nforged\n")
    assert "has no manifest.json" in done.stderr


def test_a_comparison_is_written_as_rows_with_the_name_of_the_run(run, other, tmp_path):
    done = neg("compare", run, other, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["run"], row["dataset"], row["probe"], row["accuracy"]) for row in rows] == [
        ("one", "'=b", "magn", "0.5"),
        ("two", "'=b", "magn", "0.5"),
    ]
    file = tmp_path / "compared.parquet"
    assert neg("compare", run, other, "--format", "parquet", "--out", file).exit_code == 0
    assert [row["run"] for row in pyarrow.parquet.read_table(file).to_pylist()] == ["one", "two"]
    assert r"magn" in neg("compare", run, other, "--format", "latex").stdout
