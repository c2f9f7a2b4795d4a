"""Answer SQL about a run with DuckDB, which sees the run's tables and shards as views and nothing else.

Nothing is copied before it is asked for: a view of shards opens them, and checks them, when a query reads its rows.

Axes: P prompts, O options, N neurons a layer.
"""

import importlib.util
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from negcore.errors import RunError
from negcore.orders import split_id
from negcore.store.publish import receipts
from negcore.store.reader import NegSplit, Shard
from tasks.rundir.layout import ShardFolder, shard_folders
from tasks.rundir.tables import read_arrow, result_tables

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_PATIENCE_S = 1.0
"""Time that a query which is stopped has to end; a step of DuckDB's that takes longer goes on in its thread."""
_POLL_S = 0.1
_LOCKED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",  # no file, no network, no extension
    "python_enable_replacements": "false",  # no variable of this program
    "temp_directory": "",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
}
RENAMED: Mapping[str, str] = MappingProxyType({"group": "subgroup", "right": "is_right", "order": "ordering"})
"""Columns of tables that are words of SQL, and their names in views, which need no quotes."""
_PROMPTS = pa.schema(
    [
        ("id", pa.string()),
        (RENAMED["group"], pa.string()),
        ("gold", pa.int16()),
        ("probs", pa.list_(pa.float32())),
        ("label_mass", pa.float64()),
        ("row", pa.string()),
        (RENAMED["order"], pa.string()),
        ("answers", pa.list_(pa.int16())),
    ]
)
_NEGS = pa.schema(
    [
        ("id", pa.string()),
        ("gold", pa.int16()),
        ("option", pa.int16()),
        ("neuron", pa.int32()),
        ("neg", pa.float32()),
        ("activation", pa.float32()),
    ]
)
LIST_VIEWS = """
    SELECT IF(table_schema = 'main', '', table_schema || '.') || table_name AS view,
        string_agg(column_name, ', ' ORDER BY ordinal_position) AS columns
    FROM information_schema.columns WHERE table_catalog = 'memory' GROUP BY table_schema, table_name
    UNION ALL SELECT 'negs(' || parameters[1] || ')', 'folder, model, dataset, split, layer, {}'
    FROM duckdb_functions() WHERE function_name = 'negs' ORDER BY ALL
""".format(", ".join(_NEGS.names))
"""Query for the views of a run and their columns."""
_ASKED_LAYER = re.compile(r"\bnegs\s*\(\s*(?:layer\s*(?::=|=>)\s*)?(\d{1,6})\s*\)", re.IGNORECASE)


def query(root: Path, sql: str) -> pa.Table:
    """Answer one SELECT about a run.

    Its views are every table of results (those in a folder as FOLDER.NAME), and of the shards of NEGs

    - ``prompts``: a row for every prompt, with its probabilities of the options, the row of the dataset that it asks,
      the order of the options (empty if a run has one order alone) and the answer at each of them;
    - ``negs(layer)``: a row for every prompt, option and neuron of that layer.

    Both have the columns ``folder`` (below the run directory, empty if there are none), ``model``, ``dataset`` and
    ``split``.

    Raises
    ------
    RunError
        If DuckDB is not installed, there is no such run, or the query cannot be answered.
    ShardError
        If shards that the query reads are incomplete or damaged, or do not hold what it asks for.
    KeyboardInterrupt
        If it is stopped. Python cannot end as usual then: DuckDB may still compute, and has no way to stop at once.
    """
    if importlib.util.find_spec("duckdb") is None:
        raise RunError("SQL needs a package that is not installed; run: pip install 'neg-at-scale[look]'")
    import duckdb

    connection = duckdb.connect(":memory:", config=_LOCKED)
    answer = _in_thread(lambda: _answer(connection, _Views(root), sql))
    try:
        return answer.result()
    except KeyboardInterrupt:
        deadline = time.monotonic() + _PATIENCE_S
        while not answer.done() and time.monotonic() < deadline:
            with suppress(duckdb.Error):  # it has ended
                connection.interrupt()  # forgotten by DuckDB if the query has yet to begin
            wait([answer], _POLL_S)
        raise


def _in_thread(work: Callable[[], pa.Table]) -> "Future[pa.Table]":
    """Start work in a thread that ends with the program: Python hears no signal while DuckDB computes in its own."""
    future: Future[pa.Table] = Future()

    def fulfil() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=fulfil, daemon=True).start()
    return future


def _answer(connection: "DuckDBPyConnection", views: "_Views", sql: str) -> pa.Table:
    """Answer one SELECT, and close the connection."""
    import duckdb

    with closing(connection):
        try:
            _check_select(connection.extract_statements(sql))
            views.create(connection, sql)
            connection.execute("SET lock_configuration = true")
            return connection.sql(sql).to_arrow_table()
        except (duckdb.Error, RuntimeError) as error:
            if views.error is not None:
                raise views.error from None
            if isinstance(error, duckdb.InterruptException) or str(error) == "Query interrupted":
                raise KeyboardInterrupt from None
            if not isinstance(error, duckdb.Error):
                raise
            raise RunError(f"the query cannot be answered: {_reason(error)}{views.hint(str(error))}") from None


def _check_select(statements: Sequence[Any]) -> None:
    """Refuse anything but one statement that only reads."""
    kinds = [statement.type.name for statement in statements]
    if kinds != ["SELECT"]:
        what = f"{len(kinds)} statements" if len(kinds) != 1 else f"a statement of the kind {kinds[0]}"
        raise RunError(f"{what} is refused: a run is only read here, so give one SELECT")


def _reason(error: Exception) -> str:
    """Return what is wrong, without the line of the query that DuckDB repeats."""
    return " ".join(re.split(r"\n\s*LINE \d", str(error))[0].split())


class _Views:
    """The views of a run, and the first error of whoever makes their rows: DuckDB would tell it as its own."""

    def __init__(self, root: Path) -> None:
        self._folders = [folder for folder in shard_folders(root) if folder.kind == "negs"]
        self._tables = result_tables(root)
        self._root = root
        self.error: BaseException | None = None
        if not (self._folders or self._tables):
            raise RunError(f"{str(root)!r} holds no tables of results and no NEGs: give a run directory")

    @cached_property
    def _splits(self) -> list["_Split"]:
        return [_Split(folder, self._root) for folder in self._folders]

    def create(self, connection: "DuckDBPyConnection", sql: str) -> None:
        """Create the views that a query may ask for: of layers only those that it names."""
        for number, (name, path) in enumerate(self._tables.items()):
            *folder, table = name.split("/")
            if folder:
                connection.execute(f"CREATE SCHEMA IF NOT EXISTS {_quoted(folder[0])}")
            stored = read_arrow(path)
            names = [RENAMED.get(column, column) for column in stored.column_names]
            connection.register(f"_table_{number}", stored.rename_columns(names))
            connection.execute(
                f"CREATE VIEW {'.'.join(map(_quoted, name.split('/')))} AS SELECT * FROM _table_{number}"
            )
        if not self._folders:
            return
        self._create(connection, "prompts", "", _PROMPTS, {split: split.prompts for split in self._splits})
        for layer in sorted({int(digits) for digits in _ASKED_LAYER.findall(sql)}):
            rows = {split: split.negs_of(layer) for split in self._splits if split.has_layer(layer)}
            if not rows:
                raise RunError(f"no model of this run has a layer {layer}: they have {self._layers}")
            self._create(connection, f"negs_{layer}", f"{layer} AS layer, ", _NEGS, rows)
        connection.execute("CREATE MACRO negs(layer) AS TABLE SELECT * FROM query_table('negs_' || layer)")

    def hint(self, error: str) -> str:
        """Return what a user could have meant who asked for something that is not there."""
        if "negs_" in error and self._folders:
            return f"; negs takes the number of a layer as digits, such as negs(0): {self._layers}"
        if "syntax error" in error or any(f'"{column}"' in error for column in RENAMED):
            names = ", ".join(f"{column} is {name}" for column, name in RENAMED.items())
            return f"; columns that are words of SQL have other names here: {names}"
        if "does not exist" in error:
            known = [name.replace("/", ".") for name in self._tables] + ["prompts", "negs(layer)"] * bool(self._folders)
            return f"; the views are {', '.join(known)}"
        return ""

    @property
    def _layers(self) -> str:
        known = {split.model: split.n_layers for split in self._splits if split.n_layers is not None}
        return ", ".join(f"0..{n_layers - 1} ({model})" for model, n_layers in known.items()) or "no shards yet"

    def _create(
        self,
        connection: "DuckDBPyConnection",
        view: str,
        columns: str,
        schema: pa.Schema,
        rows: "Mapping[_Split, Callable[[], Iterator[pa.RecordBatch]]]",
    ) -> None:
        """Create a view as the union of its splits: DuckDB leaves out those that a condition excludes by name."""
        parts = []
        for number, (split, batches) in enumerate(rows.items()):
            connection.register(f"_{view}_{number}", _Rows(self, schema, batches))
            names = ", ".join(f"{_text(value)} AS {name}" for name, value in split.names.items())
            parts.append(f"SELECT {names}, {columns}* FROM _{view}_{number}")
        connection.execute(f"CREATE VIEW {view} AS {' UNION ALL '.join(parts)}")


class _Rows:
    """Rows that are made anew whenever a query reads them."""

    def __init__(self, views: _Views, schema: pa.Schema, batches: Callable[[], Iterator[pa.RecordBatch]]) -> None:
        self._views, self._schema, self._batches = views, schema, batches

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return pa.RecordBatchReader.from_batches(self._schema, self._kept()).__arrow_c_stream__(requested_schema)

    def _kept(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._batches()
        except GeneratorExit:  # the query needs no more rows
            raise
        except BaseException as error:
            self._views.error = self._views.error or error
            raise


class _Split:
    """One directory of NEG shards, opened when its rows are first read."""

    def __init__(self, folder: ShardFolder, root: Path) -> None:
        self._path = folder.path
        self.model, dataset, split = folder.names
        below = str(folder.root).removeprefix(str(root)).strip("/")
        self.names = {"folder": below, "model": self.model, "dataset": dataset, "split": split}

    @cached_property
    def n_layers(self) -> int | None:
        """Layers of the model; None if no receipt tells."""
        known = receipts(self._path)
        return known[0].identity.get("n_layers") if known else None

    def has_layer(self, layer: int) -> bool:
        """Tell whether the model has this layer; of shards that are missing it is found out when they are read."""
        return self.n_layers is None or layer < self.n_layers

    @cached_property
    def _negs(self) -> NegSplit:
        return NegSplit(self._path, verify=True)

    def prompts(self) -> Iterator[pa.RecordBatch]:
        negs = self._negs
        orders = [split_id(id_).order if negs.identity.is_permuted else "" for id_ in negs.ids]
        rows = [negs.answers.rows[at] for at in negs.answers.row_P]
        columns = [negs.ids, negs.groups, negs.gold_P, negs.probs_PO.tolist(), negs.label_mass_P]
        yield _batch([*columns, rows, orders, negs.answers.answer_PO.tolist()], _PROMPTS)

    def negs_of(self, layer: int) -> Callable[[], Iterator[pa.RecordBatch]]:
        def batches() -> Iterator[pa.RecordBatch]:
            return (_layer_rows(shard, layer) for shard in self._negs.shards())

        return batches


def _layer_rows(shard: Shard, layer: int) -> pa.RecordBatch:
    """Return a row for every prompt, option and neuron of a layer, in this order; none for neurons it does not have."""
    negs_PON = shard.negs_PON(layer)
    activations_PN = shard.activations_PN(layer)
    shape_PON = negs_PON.shape
    n_each = shape_PON[1] * shape_PON[2]
    rows = np.repeat(np.arange(shape_PON[0]), n_each)
    columns = [
        pa.array(shard.strings("id"), pa.string()).take(pa.array(rows)),
        np.repeat(shard.numbers("gold"), n_each),
        np.broadcast_to(np.arange(shape_PON[1], dtype=np.int16)[:, None], shape_PON).ravel(),
        np.broadcast_to(np.arange(shape_PON[2], dtype=np.int32), shape_PON).ravel(),
        negs_PON.ravel(),
        np.broadcast_to(activations_PN[:, None], shape_PON).ravel(),
    ]
    batch = _batch(columns, _NEGS)
    if shard.layer_shapes is None:
        return batch
    return batch.filter(pa.array(np.broadcast_to(shard.active_PN(layer)[:, None], shape_PON).ravel()))


def _batch(columns: Sequence[Any], schema: pa.Schema) -> pa.RecordBatch:
    typed = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(typed, schema=schema)


def _quoted(name: str) -> str:
    """Return a name as SQL reads it, whatever it contains."""
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
