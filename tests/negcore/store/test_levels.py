"""Storage levels: each is what it says it is, and one reader serves shards of every kind."""

from functools import partial
from itertools import pairwise
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from support import Row, identity_of, negs_place
from support import write_negs as publish_negs

from negcore.errors import NegError, ShardError
from negcore.store.identity import StorageName, choice_digest
from negcore.store.levels import STORAGE_LEVELS, NeuronPlaces, has_columns_of
from negcore.store.publish import SetAside, ShardPlace, publish_shard
from negcore.store.reader import ShardReader, open_negs
from negcore.store.schema import ShardColumns
from negcore.store.study import read_study, study_batch

N_ROWS, N_OPTIONS, N_LAYERS, N_NEURONS = 4, 3, 2, 5
CHOSEN = (1, 6, 9)
identity_with = partial(identity_of, N_LAYERS, N_NEURONS)
SHAPES = [*((name, None) for name in STORAGE_LEVELS), ("stats", CHOSEN)]
"""Every kind of shard: the name of its level, and its chosen neurons."""


def numbers(n_rows=N_ROWS, n_options=N_OPTIONS):
    rng = np.random.default_rng(0)
    return {
        "label_ids_PO": np.tile(np.arange(n_options), (n_rows, 1)),
        "negs_POLN": rng.normal(size=(n_rows, n_options, N_LAYERS, N_NEURONS)).astype(np.float32),
        "activations_PLN": rng.normal(size=(n_rows, N_LAYERS, N_NEURONS)).astype(np.float32),
        "probs_PO": rng.random((n_rows, n_options)).astype(np.float32),
    }


def batch(storage, neurons=None, **changes):
    values = numbers() | changes
    rows = [Row(str(index), answer=1, group="g") for index in range(len(values["probs_PO"]))]
    return STORAGE_LEVELS[storage].batch(rows, **values, neurons=neurons)


def shard(storage, neurons=None):
    return ShardColumns("a shard", batch(storage, neurons), slice(0, N_ROWS))


def places(*flat):
    flat_K = np.array(flat, np.int64)
    return NeuronPlaces(*np.divmod(flat_K, N_NEURONS), flat_K)


# What a level says of itself


def test_every_name_of_a_run_file_has_its_level():
    assert tuple(STORAGE_LEVELS) == get_args(StorageName)
    assert all(level.name == name for name, level in STORAGE_LEVELS.items())


@pytest.mark.parametrize(("storage", "neurons"), SHAPES)
def test_columns_are_known_before_anything_is_measured(storage, neurons):
    n_chosen = None if neurons is None else len(neurons)
    schema = batch(storage, neurons).schema
    assert schema.equals(STORAGE_LEVELS[storage].schema(N_OPTIONS, N_LAYERS, N_NEURONS, n_chosen))
    assert not schema.equals(STORAGE_LEVELS[storage].schema(N_OPTIONS + 1, N_LAYERS, N_NEURONS, n_chosen))


@pytest.mark.parametrize(("storage", "neurons"), SHAPES)
def test_a_file_has_the_columns_of_its_own_identity_alone(storage, neurons):
    digest = None if neurons is None else choice_digest(neurons)
    identity = identity_with(storage=storage, neurons=digest).comparable()
    assert has_columns_of(identity, batch(storage, neurons).schema)
    others = [kind for kind in SHAPES if kind != (storage, neurons)]
    assert not any(has_columns_of(identity, batch(*other).schema) for other in others)


@pytest.mark.parametrize(("storage", "neurons"), SHAPES)
def test_every_column_of_numbers_has_a_meaning(storage, neurons):
    said = STORAGE_LEVELS[storage].axes
    for name in set(batch(storage, neurons).schema.names) - {"id", "text_hash", "group", "gold", "label_ids"}:
        kind = "sum_VOTE" if name.startswith("sum_") else f"{name[:-2]}LL" if name[-2:].isdigit() else name
        assert kind in said


@pytest.mark.parametrize("storage", STORAGE_LEVELS)
def test_a_level_with_values_gives_negs_and_every_other_refuses(storage):
    level, stored = STORAGE_LEVELS[storage], shard(storage, CHOSEN if storage == "stats" else None)
    if level.has_values:
        picked = level.negs(stored, places(*CHOSEN))
        np.testing.assert_allclose(picked, numbers()["negs_POLN"].reshape(N_ROWS, N_OPTIONS, -1)[..., CHOSEN], 2**-8)
    else:
        with pytest.raises(ShardError, match="run with --storage values"):
            level.negs(stored, places(*CHOSEN))


@pytest.mark.parametrize("storage", STORAGE_LEVELS)
def test_a_level_with_all_neurons_gives_activations_of_a_layer_and_every_other_refuses(storage):
    level, stored = STORAGE_LEVELS[storage], shard(storage, CHOSEN if storage == "stats" else None)
    if level.has_all_neurons:
        np.testing.assert_allclose(level.activations(stored, 1), numbers()["activations_PLN"][:, 1], 2**-8)
        assert level.signed_ranks(stored, 1).shape == (N_ROWS, N_OPTIONS, N_NEURONS)
    else:
        with pytest.raises(ShardError, match="not whole layers: run with --storage values"):
            level.activations(stored, 1)


@pytest.mark.parametrize("storage", STORAGE_LEVELS)
def test_signs_and_order_are_those_of_the_values_on_every_level(storage):
    stored = shard(storage, CHOSEN if storage == "stats" else None)
    ranks_POK = STORAGE_LEVELS[storage].signed_ranks(stored, places(*CHOSEN))
    negs_POK = numbers()["negs_POLN"].reshape(N_ROWS, N_OPTIONS, -1)[..., CHOSEN]
    assert np.array_equal(np.sign(ranks_POK), np.sign(negs_POK))
    assert np.array_equal(np.argsort(ranks_POK, axis=1), np.argsort(negs_POK, axis=1))


@pytest.mark.parametrize(("storage", "neurons"), SHAPES)
def test_every_level_keeps_the_probability_of_all_options_together(storage, neurons, tmp_path):
    values = numbers()
    digest = None if neurons is None else choice_digest(neurons)
    identity, rows = identity_with(storage=storage, neurons=digest), [Row(str(row)) for row in range(N_ROWS)]
    publish_negs(
        tmp_path, negs_place("m", "d", "test"), 0, 1, identity=identity, examples=rows, neurons=neurons, **values
    )
    (split,) = open_negs(tmp_path)
    slow = [sum(float(prob) for prob in probs) for probs in values["probs_PO"]]
    assert split.label_mass_P.tolist() == pytest.approx(slow, abs=1e-15)


@pytest.mark.parametrize(("storage", "neurons"), SHAPES)
def test_no_neurons_are_an_empty_answer(storage, neurons):
    level, stored = STORAGE_LEVELS[storage], shard(storage, neurons)
    assert level.activations(stored, places()).shape == (N_ROWS, 0)
    assert level.signed_ranks(stored, places()).shape == (N_ROWS, N_OPTIONS, 0)


@pytest.mark.parametrize("storage", STORAGE_LEVELS)
def test_a_level_without_nan_refuses_one(storage):
    values = numbers()["negs_POLN"]
    values[1, 0, 1, 3] = np.nan
    if STORAGE_LEVELS[storage].has_nonfinite:
        stored = ShardColumns("a shard", batch(storage, negs_POLN=values), slice(0, N_ROWS))
        assert np.isnan(STORAGE_LEVELS[storage].negs(stored, 1)[1, 0, 3])
    else:
        with pytest.raises(NegError, match="layer 1: NEG of row 1, option 0, neuron 3 is nan"):
            batch(storage, negs_POLN=values)


@pytest.mark.parametrize("storage", STORAGE_LEVELS)
def test_vote_sums_are_kept_by_the_level_that_says_so(storage):
    has_sums = any(name.startswith("sum_") for name in batch(storage).schema.names)
    assert has_sums == STORAGE_LEVELS[storage].has_vote_sums


@pytest.mark.parametrize("n_options", [2, 5, 6, 40])
def test_a_number_of_options_that_passes_can_be_stored(n_options):
    for storage, level in STORAGE_LEVELS.items():
        try:
            level.check_n_options(n_options)
        except NegError as error:
            assert (storage, "use storage 'values'" in str(error)) == ("codes", True)
            with pytest.raises(NegError, match=f"{n_options} options"):
                batch(storage, **numbers(n_options=n_options))
        else:
            assert batch(storage, **numbers(n_options=n_options)).num_rows == N_ROWS


# Columns against a receipt


CLAIMS = [{"storage": "later"}, {"storage": ["values"]}, {"n_layers": "2"}, {"neurons": "a digest"}]
SIZES = [{"n_layers": -1}, {"n_layers": 10**12}, {"n_neurons": 10**30}, {"n_neurons": -5}]


@pytest.mark.parametrize("storage", STORAGE_LEVELS)
def test_an_identity_that_no_shard_can_have_has_no_columns(storage):
    schema, identity = batch(storage).schema, identity_with(storage=storage).comparable()
    assert has_columns_of(identity, schema)
    sizes = SIZES if STORAGE_LEVELS[storage].has_all_neurons else []  # sums are as long as they are
    for change in CLAIMS + sizes:
        assert not has_columns_of(identity | change, schema), change


def test_six_options_are_no_columns_of_codes_though_the_file_says_so():
    schema = batch("codes").schema
    at = schema.get_field_index("probs")
    six = schema.set(at, pa.field("probs", pa.list_(pa.field("item", pa.float32(), nullable=False), 6), nullable=False))
    assert not has_columns_of(identity_with(storage="codes").comparable(), six)


# One reader for NEGs and studies


def publish(root, place, index, identity, batch, set_aside=()):
    about = {"axes": {"neurons": [4]}}
    publish_shard(root, place, index, 3, identity=identity, batch=batch, about=about, set_aside=set_aside)
    return place.path(root)


def write_negs(root, index, n_rows, set_aside=()):
    identity = identity_with(storage="stats", neurons=choice_digest(CHOSEN))
    rows = [Row(f"{index}/{row}", answer=1, group="g") for row in range(n_rows)]
    batch = STORAGE_LEVELS["stats"].batch(rows, **numbers(n_rows), neurons=CHOSEN)
    return publish(root, ShardPlace("negs", "m", "d", "test"), index, identity, batch, set_aside)


def write_study(root, index, n_rows, **columns):
    rows = [Row(f"{index}/{row}", answer=1, group="g") for row in range(n_rows)]
    columns = columns or {"scores": np.arange(n_rows * 2.0).reshape(n_rows, 2)}
    place = ShardPlace("estimates", "m", "d", "neurgrad")
    return publish(root, place, index, identity_with(study={}), study_batch(rows, columns))


@pytest.mark.parametrize("write", [write_negs, write_study])
def test_a_reader_gives_rows_in_order_and_passes_over_shards_without_any(tmp_path, write):
    for index, n_rows in ((2, 1), (0, 2), (1, 0)):
        folder = write(tmp_path, index, n_rows)
    reader = ShardReader(folder)
    assert reader.n_rows == 3
    assert [receipt.n_rows for receipt in reader.receipts] == [2, 0, 1]
    assert [(shard.n_rows, shard.rows) for shard in reader.shards()] == [(2, slice(0, 2)), (1, slice(2, 3))]
    assert reader.read(["id", "group"]) == {"id": ["0/0", "0/1", "2/0"], "group": ["g"] * 3}
    assert reader.metadata["index"] == 0


def test_columns_are_read_into_one_array_each(tmp_path):
    for index in range(3):
        folder = write_study(tmp_path, index, 2)
    columns = ShardReader(folder).read(["scores", "id"])
    assert columns["scores"].tolist() == [[0, 1], [2, 3]] * 3
    assert columns["scores"].dtype == np.float32
    assert len(columns["id"]) == 6


def test_rows_set_aside_are_listed_over_all_shards(tmp_path):
    aside = [SetAside(id=f"lost {index}", cause="failure", reason="?") for index in range(3)]
    for index in range(3):
        folder = write_negs(tmp_path, index, 1, set_aside=[aside[index]])
    assert ShardReader(folder).set_aside == open_negs(tmp_path).select().set_aside == aside


def test_a_study_without_any_row_still_has_its_columns(tmp_path):
    for index in range(3):
        folder = write_study(tmp_path, index, 0)
    assert read_study(folder).columns["scores"].shape == (0, 2)


def test_a_shard_with_other_columns_is_damage(tmp_path):
    for index in range(2):
        folder = write_study(tmp_path, index, 2)
    write_study(tmp_path, 2, 2, scores=np.zeros((2, 3)))
    with pytest.raises(
        ShardError, match=r"part-00002.arrow' is damaged \(its columns are not those of the first shard"
    ):
        read_study(folder)


def test_shards_are_mapped_one_after_the_other(tmp_path, monkeypatch):
    for index in range(3):
        folder = write_study(tmp_path, index, 2)
    reader = ShardReader(folder)
    mapped = []
    monkeypatch.setattr("negcore.store.integrity.mapped_batch", lambda path: mapped.append(path.name) or _batch(path))
    for count, _ in enumerate(reader.shards(), 1):
        assert len(mapped) == count
    assert all(one < other for one, other in pairwise(mapped))


def _batch(path):
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
