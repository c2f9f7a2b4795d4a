"""Prompts as data frames: the same numbers as in the shards, under names that say which."""

import importlib.util

import numpy as np
import polars
import pytest
from stored_negs import N_NEURONS, N_OPTIONS, N_ROWS, numbers, write_split

from negcore.errors import NegError, ShardError
from negcore.store import frames
from negcore.store.reader import open_negs

KEYS = ["model", "dataset", "split", "id", "group", "gold"]
PROBS = [f"prob_{option}" for option in range(N_OPTIONS)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("negs")
    for split in ("train", "test"):
        write_split(root, split, numbers(split))
    write_split(root, "test", numbers("test", "two", 2), dataset="two")
    return root


@pytest.fixture(scope="module")
def of_test(root):
    return open_negs(root).select(dataset="d", split="test")


def test_a_split_is_a_row_a_prompt(of_test):
    frame = of_test.to_pandas()
    assert list(frame.columns) == [*KEYS, *PROBS]
    assert frame.shape == (N_ROWS, 6 + N_OPTIONS)
    assert frame["id"].tolist() == of_test.ids
    assert set(zip(frame["model"], frame["dataset"], frame["split"], strict=True)) == {("m", "d", "test")}
    assert frame["gold"].tolist() == of_test.gold_P.tolist()
    assert np.array_equal(frame[PROBS].to_numpy(), of_test.probs_PO)


def test_chosen_neurons_are_columns_named_by_layer_neuron_and_option(of_test):
    chosen = [(2, 1), (0, 3)]
    frame = of_test.to_pandas(neurons=chosen)
    negs_POK, activations_PK = of_test.neurons(chosen), of_test.activations(chosen)
    assert list(frame.columns[6 + N_OPTIONS :]) == [
        *("neg_2.1_0", "neg_2.1_1", "neg_2.1_2", "act_2.1"),
        *("neg_0.3_0", "neg_0.3_1", "neg_0.3_2", "act_0.3"),
    ]
    for k, name in enumerate(("2.1", "0.3")):
        for option in range(N_OPTIONS):
            assert np.array_equal(frame[f"neg_{name}_{option}"], negs_POK[:, option, k])
        assert np.array_equal(frame[f"act_{name}"], activations_PK[:, k])
    assert frame["neg_2.1_0"].dtype == np.float32


def test_a_layer_is_all_its_neurons(of_test):
    frame = of_test.to_polars(layer=1)
    assert frame.shape == (N_ROWS, 6 + N_OPTIONS + (N_OPTIONS + 1) * N_NEURONS)
    negs_PON = of_test.layer(1)
    for neuron in range(N_NEURONS):
        for option in range(N_OPTIONS):
            assert np.array_equal(frame[f"neg_1.{neuron}_{option}"], negs_PON[:, option, neuron])


def test_pandas_and_polars_hold_the_same(of_test):
    of_polars, of_pandas = of_test.to_polars(neurons=[(1, 2)]), of_test.to_pandas(neurons=[(1, 2)])
    assert isinstance(of_polars, polars.DataFrame)
    assert of_polars.columns == list(of_pandas.columns)
    assert of_polars.rows() == [tuple(row) for row in of_pandas.itertuples(index=False)]


def test_a_run_is_its_splits_one_below_the_other_with_gaps_where_there_are_fewer_options(root):
    frame = open_negs(root).to_polars(neurons=[(0, 0)])
    assert frame.height == 3 * N_ROWS
    assert frame["prob_2"].null_count() == frame["neg_0.0_2"].null_count() == N_ROWS
    for split in open_negs(root):
        own = frame.filter(dataset=split.place.dataset, split=split.place.part)
        assert own["id"].to_list() == split.ids
        assert np.array_equal(own["neg_0.0_1"], split.neurons([(0, 0)])[:, 1, 0])
    assert open_negs(root).to_pandas()["prob_2"].isna().sum() == N_ROWS


def test_two_selections_and_neurons_that_do_not_exist_are_refused(of_test):
    with pytest.raises(ShardError, match="layer=1 and neurons are two selections: give one of them"):
        of_test.to_pandas(layer=1, neurons=[(0, 0)])
    for wrong in ({"layer": 9}, {"neurons": [(0, 99)]}):
        with pytest.raises(ShardError, match="is no neuron of"):
            of_test.to_polars(**wrong)


def test_shards_without_values_are_refused_but_not_their_prompts(tmp_path):
    codes = write_split(tmp_path, "test", numbers("test"), storage="codes")
    assert codes.to_pandas().shape == (N_ROWS, 6 + N_OPTIONS)
    with pytest.raises(ShardError, match="codes"):
        codes.to_pandas(layer=0)


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_without_the_package_the_extra_is_named(of_test, package, monkeypatch):
    honest = importlib.util.find_spec
    monkeypatch.setattr(frames, "find_spec", lambda name: None if name == package else honest(name))
    with pytest.raises(NegError, match=rf"needs {package}, .*pip install 'neg-at-scale\[look\]'"):
        getattr(of_test, f"to_{package}")()
