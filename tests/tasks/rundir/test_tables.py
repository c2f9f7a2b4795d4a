"""Tables of results as Arrow files."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from tasks.rundir.tables import read_table, write_tables


@dataclass(frozen=True)
class CountRow:
    name: str
    n: int | None


@dataclass(frozen=True)
class Findings:
    ids: list[str]
    counts: list[CountRow] = field(default_factory=list)
    others: Sequence[CountRow] = ()


def read(path):
    return pa.ipc.open_file(path).read_all()


def test_every_list_of_rows_is_a_table_with_the_labels_of_its_findings(tmp_path):
    first, second = Findings(["x"], [CountRow("a", 1), CountRow("b", None)]), Findings([], [CountRow("c", 3)])
    write_tables(tmp_path, Findings, [(("m",), first), (("k",), second)], names=("model",))
    assert [path.name for path in tmp_path.iterdir()] == ["counts.arrow"]
    assert read(tmp_path / "counts.arrow").to_pylist() == [
        {"model": "m", "name": "a", "n": 1},
        {"model": "m", "name": "b", "n": None},
        {"model": "k", "name": "c", "n": 3},
    ]


def test_findings_without_rows_make_a_table_with_the_same_columns(tmp_path):
    write_tables(tmp_path / "none", Findings, [], names=("model",))
    write_tables(tmp_path / "some", Findings, [(("m",), Findings([], [CountRow("a", 1)]))], names=("model",))
    none, some = read(tmp_path / "none" / "counts.arrow"), read(tmp_path / "some" / "counts.arrow")
    assert none.num_rows == 0
    assert none.schema == some.schema


def test_rows_without_labels_are_read_back(tmp_path):
    rows = [CountRow("a", 1), CountRow("b", None)]
    write_tables(tmp_path, Findings, [((), Findings([], rows))])
    assert read_table(tmp_path / "counts.arrow", CountRow) == rows
