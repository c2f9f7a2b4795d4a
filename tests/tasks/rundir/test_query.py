"""SQL about a run: its views hold what the run holds, shards are checked when asked for, nothing else is read."""

import json
import signal
import sys
import threading
import time
from dataclasses import asdict, is_dataclass
from typing import get_args, get_origin, get_type_hints

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from stored_negs import N_LAYERS, N_NEURONS, N_OPTIONS, N_ROWS, numbers, write_split

from negcore.errors import RunError, ShardError
from negcore.store import reader
from negcore.store.reader import open_negs
from tasks.audit import DatasetAudit
from tasks.campaign import Comparison
from tasks.comparisons import ComparisonRow
from tasks.linearity import Findings
from tasks.neurons import NeuronRow
from tasks.probe import AccuracyRow, Confusion
from tasks.resamples import ResampleRow
from tasks.results import Average, SplitAccount
from tasks.rundir import query as module
from tasks.rundir.query import LIST_VIEWS, query
from tasks.rundir.tables import write_arrow, write_table
from tasks.skills import DatasetFindings, SkillFindings

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on two datasets, with a table of its own and one in a folder."""
    root = tmp_path_factory.mktemp("run")
    for dataset in ("d", "e's"):
        for split in SPLITS:
            write_split(root, split, numbers(split, dataset), dataset=dataset)
    row = ComparisonRow("m", 0, "d", "lm", "magn", 40, 3, 5, -0.05, 0.7, 0.7, 1)
    write_table(root / "comparisons.arrow", ComparisonRow, [asdict(row)])
    write_arrow(root / "skills" / "causal.arrow", pa.table({"probe": ["magn"], "top": [16]}))
    return root


def rows(root, sql):
    return query(root, sql).to_pylist()


def test_the_views_are_listed_with_their_columns(run):
    listed = {row["view"]: row["columns"] for row in rows(run, LIST_VIEWS)}
    assert list(listed) == ["comparisons", "negs(layer)", "prompts", "skills.causal"]
    for view, columns in listed.items():
        names = query(run, f"SELECT * FROM {view.replace('layer', '0')} LIMIT 0").column_names
        assert ", ".join(names) == columns


def test_tables_of_results_are_views(run):
    assert rows(run, "SELECT first, second, p FROM comparisons") == [{"first": "lm", "second": "magn", "p": 0.7}]
    assert rows(run, "FROM skills.causal") == [{"probe": "magn", "top": 16}]


def test_prompts_are_those_of_every_split_in_their_order(run):
    found = rows(run, "SELECT * FROM prompts")
    assert len(found) == 2 * 3 * N_ROWS
    for dataset in ("d", "e's"):
        for split in SPLITS:
            negs = open_negs(run).select(dataset=dataset, split=split)
            own = [row for row in found if (row["dataset"], row["split"]) == (dataset, split)]
            assert [row["id"] for row in own] == negs.ids
            assert [row["gold"] for row in own] == negs.gold_P.tolist()
            assert [row["probs"] for row in own] == negs.probs_PO.tolist()
            assert [row["label_mass"] for row in own] == negs.label_mass_P.tolist()
            assert {(row["folder"], row["model"], row["subgroup"]) for row in own} == {("", "m", "")}


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_negs_of_a_layer_are_those_of_the_shards_one_by_one(run, layer):
    found = rows(run, f"SELECT * FROM negs({layer}) WHERE dataset = 'e''s' AND split = 'test'")
    data = numbers("test", "e's")
    expected = [
        (f"test/{p}", data.gold_P[p], o, n, data.negs_POM[p, o, flat], data.activations_PM[p, flat], layer)
        for p in range(N_ROWS)
        for o in range(N_OPTIONS)
        for n, flat in enumerate(range(layer * N_NEURONS, (layer + 1) * N_NEURONS))
    ]
    names = ("id", "gold", "option", "neuron", "neg", "activation", "layer")
    assert [tuple(row[name] for name in names) for row in found] == expected


def test_a_query_that_names_a_layer_twice_reads_it_twice(run):
    sql = "SELECT count(*) AS n FROM negs(1) a JOIN NEGS ( 1 ) b USING (dataset, split, id, option, neuron)"
    assert rows(run, sql) == [{"n": 2 * 3 * N_ROWS * N_OPTIONS * N_NEURONS}]
    found = rows(run, "SELECT * FROM (SELECT max(layer) m FROM negs(layer := 2)), (SELECT max(layer) k FROM negs(0))")
    assert found == [{"m": 2, "k": 0}]


def test_views_can_be_joined_and_agree_with_numpy(run):
    sql = """
        SELECT neuron, avg(neg) AS mean FROM negs(1) JOIN prompts USING (folder, model, dataset, split, id, gold)
        WHERE option = gold AND dataset = 'd' AND split = 'train' GROUP BY neuron ORDER BY neuron
    """
    data = numbers("train", "d")
    expected = data.negs_POM[np.arange(N_ROWS), data.gold_P, N_NEURONS : 2 * N_NEURONS].mean(axis=0, dtype=np.float64)
    assert [row["mean"] for row in rows(run, sql)] == pytest.approx(expected)


@pytest.fixture
def opened(monkeypatch):
    """The directories of shards that are opened."""
    found = []
    honest = reader.ShardReader.__init__

    def noting(self, folder, **options):
        found.append(folder.name)
        honest(self, folder, **options)

    monkeypatch.setattr(reader.ShardReader, "__init__", noting)
    return found


def test_shards_are_opened_only_if_their_rows_are_asked_for(run, opened):
    query(run, "SELECT * FROM comparisons")
    query(run, "DESCRIBE prompts")
    assert opened == []
    query(run, "SELECT count(*) FROM negs(1) WHERE dataset = 'd' AND split = 'valid'")
    assert set(opened) == {"split=valid"}


def test_a_damaged_shard_is_named_and_the_others_can_be_read(run, tmp_path):
    for split in SPLITS:
        write_split(tmp_path, split, numbers(split))
    file = sorted((tmp_path / "negs").rglob("split=valid/part-*.arrow"))[0]
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1
    file.write_bytes(content)
    assert len(rows(tmp_path, "SELECT id FROM prompts WHERE split = 'test'")) == N_ROWS
    for sql in ("SELECT * FROM prompts", "SELECT sum(neg) FROM negs(0)"):
        with pytest.raises(ShardError, match="part-00000.arrow.*damaged"):
            query(tmp_path, sql)


def test_an_unfinished_split_is_refused_not_left_out(tmp_path):
    split = write_split(tmp_path, "test", numbers("test"))
    (split.folder / "_receipts" / "part-00001.json").unlink()
    for sql in ("SELECT count(*) FROM prompts", "SELECT count(*) FROM negs(0)"):
        with pytest.raises(ShardError, match="is incomplete, 2 of 3 shards"):
            query(tmp_path, sql)


def test_shards_without_values_are_refused_with_the_reason(tmp_path):
    write_split(tmp_path, "test", numbers("test"), storage="codes")
    assert rows(tmp_path, "SELECT count(*) AS n FROM prompts") == [{"n": N_ROWS}]
    with pytest.raises(ShardError, match="codes"):
        query(tmp_path, "SELECT * FROM negs(0)")


def test_runs_in_folders_are_told_apart(tmp_path):
    for folder in ("shots-0", "shots-1"):
        write_split(tmp_path / folder, "test", numbers("test"))
    found = rows(tmp_path, "SELECT folder, count(*) AS n FROM prompts GROUP BY folder ORDER BY folder")
    assert found == [{"folder": "shots-0", "n": N_ROWS}, {"folder": "shots-1", "n": N_ROWS}]


@pytest.mark.parametrize("layer", ["7", "1000", "999999"])
def test_a_layer_that_no_model_has_is_refused(run, layer):
    with pytest.raises(RunError, match=rf"no model of this run has a layer {layer}: they have 0..2 \(m\)"):
        query(run, f"SELECT * FROM negs({layer})")


@pytest.mark.parametrize("asked", ["negs(1 + 1)", "negs(-1)", "negs('x')", "negs_1"])
def test_a_layer_is_named_by_its_digits(run, asked):
    with pytest.raises(RunError, match=r"negs takes the number of a layer as digits, such as negs\(0\): 0..2 \(m\)"):
        query(run, f"SELECT * FROM {asked}")


def test_a_view_that_does_not_exist_is_answered_with_those_that_do(run):
    with pytest.raises(RunError) as error:
        query(run, "SELECT * FROM acuracy")
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("the views are comparisons, skills.causal, prompts, negs(layer)")


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no tables of results and no NEGs"):
        query(tmp_path, "SELECT 1")
    with pytest.raises(RunError, match="does not exist"):
        query(tmp_path / "none", "SELECT 1")


# What a query may not do


SECRET = "the content of a file that is nobody's business"

READING = [
    "SELECT * FROM read_csv('{file}')",
    "SELECT * FROM read_text('{file}')",
    "SELECT * FROM read_blob('{file}')",
    "SELECT * FROM read_json('{file}')",
    "SELECT * FROM read_parquet('{file}')",
    "SELECT * FROM parquet_metadata('{file}')",
    "SELECT * FROM sniff_csv('{file}')",
    "SELECT * FROM '{file}'",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM query('SELECT * FROM read_text(''{file}'')')",
    "SELECT * FROM query_table('{file}')",
    "WITH a AS MATERIALIZED (SELECT * FROM read_text('{file}')) SELECT * FROM a",
    "SELECT (SELECT content FROM read_text('{file}'))",
    "SELECT * FROM read_csv('https://example.org/x.csv')",
    "SELECT * FROM read_csv('s3://bucket/x.csv')",
    "SELECT getenv('HOME')",
    "SELECT * FROM sqlite_scan('{file}', 't')",
]
CHANGING = [
    "COPY (SELECT 1) TO '{folder}/new.csv'",
    "COPY comparisons TO '{folder}/new.csv'",
    "EXPORT DATABASE '{folder}/new'",
    "IMPORT DATABASE '{folder}'",
    "ATTACH '{folder}/new.db'",
    "ATTACH '{folder}/new.db' AS x; SELECT 1",
    "SELECT 1; ATTACH '{folder}/new.db'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "SET enable_external_access = true",
    "SET threads = 1",
    "RESET lock_configuration",
    "CREATE TABLE x AS SELECT 1",
    "CREATE OR REPLACE VIEW comparisons AS SELECT 1",
    "DROP VIEW comparisons",
    "INSERT INTO comparisons VALUES (1)",
    "UPDATE comparisons SET p = 0",
    "DELETE FROM comparisons",
    "CALL pragma_version()",
    "USE memory",
    "CHECKPOINT",
    "BEGIN",
    "PREPARE p AS SELECT 1",
    "CREATE SECRET (TYPE s3)",
    "",
    ";",
    "not SQL at all",
]


@pytest.mark.parametrize("sql", READING + CHANGING)
def test_hostile_queries_are_refused_in_one_line_and_change_nothing(run, tmp_path, sql, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "secret.csv"
    file.write_text(SECRET)
    with pytest.raises(RunError) as error:
        query(run, sql.format(file=file, folder=tmp_path))
    assert SECRET not in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"] and file.read_text() == SECRET


def test_a_query_does_not_see_variables_of_the_program(run):
    table = pa.table({"secret": [SECRET]})
    for name in ("table", "views", "sys", "SECRET"):
        with pytest.raises(RunError):
            query(run, f"SELECT * FROM {name}")
    assert table.num_rows == 1


def test_a_query_that_sorts_much_leaves_no_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    query(run, "SELECT max(a.neg + b.neg) FROM negs(0) a, negs(1) b WHERE a.split = 'test' AND b.split = 'test'")
    assert list(tmp_path.iterdir()) == []


def test_what_duckdb_makes_of_a_stop_is_a_stop(run, monkeypatch):
    def stopped(self, connection, sql):
        raise RuntimeError("Query interrupted")  # DuckDB's own after Ctrl-C

    monkeypatch.setattr(module._Views, "create", stopped)
    with pytest.raises(KeyboardInterrupt):
        query(run, "SELECT 1")


def test_a_stop_while_rows_are_read_is_a_stop(run, monkeypatch):
    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(reader.NegSplit, "shards", stopped)
    with pytest.raises(KeyboardInterrupt):
        query(run, "SELECT sum(neg) FROM negs(0)")


def test_a_disk_that_fails_under_a_query_is_the_disks_error(run, monkeypatch):
    def failing(self):
        raise OSError(5, "Input/output error", "part-00000.arrow")

    monkeypatch.setattr(reader.NegSplit, "shards", failing)
    with pytest.raises(OSError, match="Input/output error"):
        query(run, "SELECT sum(neg) FROM negs(0)")


@pytest.fixture
def ctrl_c():
    """SIGINT as a terminal's program has it: what is started in the background of a script ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_a_query_that_computes(run, ctrl_c):
    ending = threading.Timer(1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    ending.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        query(run, "SELECT count(*) FROM range(10000000000) a, range(100000) b WHERE a.range + b.range = 7")
    assert time.monotonic() - began < 30


KINDS = (AccuracyRow, Average, ComparisonRow, Confusion, DatasetAudit, NeuronRow, ResampleRow, SplitAccount)


def test_no_column_of_a_view_needs_quotes(tmp_path):
    of_findings = (DatasetFindings, SkillFindings, Findings, Comparison)
    kinds = [*KINDS, *(get_args(hint)[0] for found in of_findings for hint in lists_of(found))]
    for number, kind in enumerate(kinds):
        write_table(tmp_path / f"t{number}.arrow", kind, [])
    for number, kind in enumerate(kinds):
        names = query(tmp_path, f"FROM t{number}").column_names
        assert query(tmp_path, f"SELECT {', '.join(names)} FROM t{number}").column_names == names, kind


def lists_of(kind):
    """The fields that are tables of a run."""
    return [
        hint for hint in get_type_hints(kind).values() if get_origin(hint) is list and is_dataclass(get_args(hint)[0])
    ]


def test_columns_that_are_words_of_sql_have_other_names(run, tmp_path):
    write_arrow(tmp_path / "t.arrow", pa.table({"group": ["de"], "right": [True], "order": [3]}))
    asked = "SELECT subgroup, is_right, ordering FROM t WHERE is_right GROUP BY ALL"
    assert rows(tmp_path, asked) == [{"subgroup": "de", "is_right": True, "ordering": 3}]
    for column in ("group", '"group"', "p.group"):
        with pytest.raises(RunError, match="group is subgroup, right is is_right, order is ordering"):
            query(run, f"SELECT {column} FROM prompts p")


def test_names_in_a_run_are_names_not_sql(tmp_path):
    hostile = "x'); DROP VIEW prompts; --"
    write_split(tmp_path, "test", numbers("test"), dataset=hostile)
    write_arrow(tmp_path / 'odd" name; DROP VIEW prompts.arrow', pa.table({"a": [1]}))
    assert rows(tmp_path, "SELECT DISTINCT dataset FROM prompts") == [{"dataset": hostile}]
    assert rows(tmp_path, 'SELECT * FROM "odd"" name; DROP VIEW prompts"') == [{"a": 1}]


def test_without_duckdb_the_extra_is_named(run, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(RunError, match=r"pip install 'neg-at-scale\[look\]'"):
        query(run, "SELECT 1")


def test_settings_that_keep_files_out_are_those_of_this_duckdb():
    connection = duckdb.connect(":memory:", config=module._LOCKED)
    found = dict(connection.sql("SELECT name, value FROM duckdb_settings()").fetchall())
    connection.close()
    assert json.loads(found["enable_external_access"]) is False
    assert json.loads(found["python_enable_replacements"]) is False
