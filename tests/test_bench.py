"""The benchmark: every row can be measured, goals are judged, and some rows can be measured again."""

import json
from itertools import count

import bench
import bench_runs
import bench_store
import pytest
from bench_rows import Goal, Item, Row, Setting
from bench_tables import cells, document
from rich.console import Console


def measure(setting, only=("",)):
    return bench.measure(setting, Console(quiet=True), setting.folder / "bench.json", list(only))


@pytest.mark.slow
def test_every_row_is_measured_of_a_tiny_model(tmp_path, monkeypatch):
    for module in (bench_runs, bench_store):
        monkeypatch.setattr(module, "in_own_process", lambda function, *args: function(*args))
    figures = measure(Setting(tmp_path, repeats=1, tiny=True))
    assert list(figures["groups"]) == list(bench.GROUPS)
    rows = [row for group in figures["groups"].values() for row in group["rows"]]
    assert all(row["ours"] > 0 and (row["other"] is None or row["ratio"] > 0) for row in rows)
    names = [(row["name"], row["against"]) for row in rows]
    assert len(set(names)) == len(names)
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(figures))
    assert all(f"| {row['name']} |" in document(figures) for row in rows)


@pytest.mark.parametrize(
    ("ours", "other", "goal", "is_met", "said"),
    [
        (1.1, 1.0, Goal(1.1), True, "at most 1.10 times"),
        (1.2, 1.0, Goal(1.1), False, "at most 1.10 times"),
        (1999, None, Goal(2000, "ours", is_least=True), False, "at least 2,000"),
        (2.5, None, Goal(3, "ours"), True, "at most 3.00"),
        (2.5, 2.0, None, None, ""),
    ],
)
def test_a_row_says_whether_its_goal_is_met(ours, other, goal, is_met, said):
    row = Row("name", "s", ours, "something", other, goal=goal)
    assert row.is_met is is_met
    assert cells(row.record())[-2:] == [said, {True: "met", False: "missed", None: ""}[is_met]]


@pytest.fixture
def numbered(monkeypatch):
    """Two groups whose rows are numbered in the order in which they are measured."""
    numbers = count(1)

    def group(*names):
        return bench.Group(lambda _: iter([Item(name, lambda name=name: [row(name)]) for name in names]), "about")

    def row(name):
        return Row(name, "s", next(numbers))

    monkeypatch.setattr(bench, "GROUPS", {"first": group("a", "b"), "second": group("c")})


def values(figures):
    return {row["name"]: row["ours"] for group in figures["groups"].values() for row in group["rows"]}


def test_rows_that_are_measured_again_leave_the_others_as_they_are(tmp_path, numbered):
    assert values(measure(Setting(tmp_path))) == {"a": 1, "b": 2, "c": 3}
    assert values(measure(Setting(tmp_path), ["first: b"])) == {"a": 1, "b": 4, "c": 3}
    assert values(measure(Setting(tmp_path), ["second"])) == {"a": 1, "b": 4, "c": 5}


def test_rows_of_another_machine_are_not_mixed(tmp_path, numbered):
    measure(Setting(tmp_path))
    with pytest.raises(SystemExit, match="give another --out"):
        measure(Setting(tmp_path, threads=7), ["second"])


def test_the_whole_benchmark_begins_anew(tmp_path, numbered):
    measure(Setting(tmp_path))
    assert values(measure(Setting(tmp_path, threads=7))) == {"a": 4, "b": 5, "c": 6}
