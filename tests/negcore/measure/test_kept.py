"""What is kept of NEGs on the device has the bytes of what storage levels make of all numbers in NumPy."""

import numpy as np
import pytest
import torch
from stored_negs import awkward_numbers
from support import LABELS, Row, kept_columns, prompts_for, tiny_model

from negcore.measure import neurgrad as engine
from negcore.measure.kept import bfloat16_bits, codes, keeping
from negcore.measure.neurgrad import measure_negs, neurgrad
from negcore.model.encoding import encode
from negcore.store import levels
from negcore.store.codes import encode as numpy_codes
from negcore.store.levels import STORAGE_LEVELS, Measured, Routed
from tasks.measure.negs import NegMeasurement

KINDS = [(name, None) for name in STORAGE_LEVELS] + [("stats", (0, 3, 11, 32, 40))]
DTYPES = ["float64", "float32", "bfloat16", "float16"]


def twin(storage, neurons, gold_P, negs_POLN, activations_PLN, routed=None):
    """All numbers on the host, as float32, then what the level says in NumPy."""
    with np.errstate(over="ignore"):
        wide = negs_POLN.astype(np.float32), activations_PLN.astype(np.float32)
    return STORAGE_LEVELS[storage].kept(Measured(*wide, np.asarray(gold_P), neurons, routed))


def assert_same_bytes(kept, expected):
    for name, values in expected.items():
        assert kept[name].dtype == values.dtype, name
        assert kept[name].tobytes() == values.tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(("storage", "neurons"), KINDS)
def test_models_of_every_number_type_keep_what_numpy_makes_of_all_numbers(storage, neurons, family, dtype):
    lm = tiny_model(family, dtype=getattr(torch, dtype))
    encoded = encode(lm.card, prompts_for(lm), LABELS[:3])
    gold_P = np.arange(len(encoded.ids)) % 3
    every = neurgrad(lm, encoded, batch_size=3)
    keep = keeping(lm, storage, gold_P, neurons)
    kept = measure_negs(lm, encoded, keep, dtype=torch.float32, batch_size=3)
    expected = twin(storage, neurons, gold_P, every.negs_POLN, every.activations_PLN)
    assert set(kept) == {*expected, "probs_PO", "nonfinite_PL"}
    assert_same_bytes(kept, expected | {"probs_PO": every.probs_PO.astype(np.float32)})
    assert kept["nonfinite_PL"].shape == (len(encoded.ids), lm.n_layers)
    assert kept["nonfinite_PL"].sum() == sum(one.n_values for one in every.nonfinite())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize(("storage", "neurons"), [*KINDS, ("stats", (0, 30, 95, 96, 107, 150, 215, 320, 323))])
def test_experts_keep_what_numpy_makes_of_the_neurons_that_a_prompt_has(storage, neurons, family, dtype):
    lm = tiny_model(family, dtype=getattr(torch, dtype))
    encoded = encode(lm.card, prompts_for(lm), LABELS[:3])
    gold_P = np.arange(len(encoded.ids)) % 3
    every = neurgrad(lm, encoded, batch_size=3)
    neurons = neurons and tuple(number for number in neurons if number < lm.n_layers * lm.layer_width)
    kept = measure_negs(lm, encoded, keeping(lm, storage, gold_P, neurons), dtype=torch.float32, batch_size=3)
    routed = Routed(lm.layer_shapes, every.experts_PLK, every.router_weights_PLK)
    expected = twin(storage, neurons, gold_P, every.negs_POLN, every.activations_PLN, routed)
    assert set(kept) == {*expected, "probs_PO", "nonfinite_PL", "experts_PLK", "router_weights_PLK"}
    assert_same_bytes(kept, expected | {"experts_PLK": every.experts_PLK})
    assert any(values.any() for values in expected.values())


@pytest.mark.parametrize("n_options", [2, 3, 5])
@pytest.mark.parametrize(("storage", "neurons"), KINDS)
def test_shards_of_ties_zeros_and_denormals_have_the_bytes_of_the_numpy_path(storage, neurons, n_options):
    """Width 16 makes some columns views of the measured memory, and 11 makes all of them padded copies."""
    for width in (16, 11):
        data = awkward_numbers("train", n_options, (9, 3, width))
        rows = [Row(str(row), answer=int(gold)) for row, gold in enumerate(data.gold_P)]
        others = {"probs_PO": np.full((9, n_options), 0.1), "label_ids_PO": np.tile(np.arange(n_options), (9, 1))}
        chosen = neurons and neurons[:4]
        numbers = {"negs_POLN": data.negs_POLN, "activations_PLN": data.activations_PLN, **others}
        measurement = NegMeasurement(3, width, storage, None, chosen and len(chosen), chosen)
        ours = measurement.record_batch(rows, kept_columns(measurement, data.gold_P, **numbers))
        plain = STORAGE_LEVELS[storage].batch(rows, **numbers, neurons=chosen)
        assert ours.serialize().to_pybytes() == plain.serialize().to_pybytes()
        assert ours.schema.equals(plain.schema)


def test_every_float32_has_the_bits_of_the_nearest_bfloat16():
    around = np.arange(0, 2**32, 2**15 - 1, np.uint64).astype(np.uint32)  # all ways to round, infinities and NaN
    values = around.view(np.float32)
    found = bfloat16_bits(torch.from_numpy(values)).numpy()
    assert found.tobytes() == levels.bfloat16_bits(values).tobytes()


@pytest.mark.parametrize("n_options", [2, 3, 4, 5])
def test_every_order_and_sign_has_its_code(n_options):
    ranks_OX = np.indices((2 * n_options + 1,) * n_options, np.int8).reshape(n_options, -1) - n_options
    negs_ON = ranks_OX.astype(np.float32)
    found = codes(torch.from_numpy(negs_ON)[None, :, None])[0]
    assert found.numpy().tobytes() == numpy_codes(negs_ON[None]).tobytes()


@pytest.mark.parametrize("storage", STORAGE_LEVELS)
def test_what_is_not_finite_is_counted_by_layer_and_enters_no_sum(storage):
    data = awkward_numbers("train", 3, (6, 2, 16))
    probs_PO = np.full((6, 3), 0.25)
    data.negs_POLN[1, 2, 1, :3] = [np.nan, np.inf, -np.inf]
    data.activations_PLN[4, 0, 7] = np.nan
    probs_PO[5, 0] = np.nan
    measurement = NegMeasurement(2, 16, storage)
    numbers = {"negs_POLN": data.negs_POLN, "activations_PLN": data.activations_PLN, "probs_PO": probs_PO}
    columns = kept_columns(measurement, data.gold_P, **numbers, label_ids_PO=np.zeros((6, 3), int))
    assert columns["nonfinite_PL"].tolist() == [[0, 0], [0, 3], [0, 0], [0, 0], [1, 0], [0, 0]]
    found = [(one.row, one.n_values, one.where) for one in measurement.nonfinite(columns)]
    assert found == [(1, 3, "layer 1"), (4, 1, "layer 0"), (5, 1, "its probabilities")]
    rows = [0, 2, 3]
    left = measurement.rows(columns, rows)
    expected = twin(storage, None, data.gold_P[rows], data.negs_POLN[rows], data.activations_PLN[rows])
    assert_same_bytes(left, expected)
    assert not left["nonfinite_PL"].any()


def test_neither_the_order_of_prompts_nor_a_halved_batch_changes_what_is_kept(monkeypatch):
    lm = tiny_model("llama")
    encoded = encode(lm.card, prompts_for(lm), LABELS[:3])
    keep = keeping(lm, "stats", np.arange(len(encoded.ids)) % 3)
    together = measure_negs(lm, encoded, keep, dtype=torch.float32)
    take = engine.Results.take

    def scarce(results, kept, rows):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        take(results, kept, rows)

    monkeypatch.setattr(engine.Results, "take", scarce)
    halved = measure_negs(lm, encoded, keep, dtype=torch.float32)
    assert_same_bytes(halved, {name: values for name, values in together.items() if name.startswith("sum_")})


def test_a_layers_numbers_lie_side_by_side_as_columns_want_them():
    lm = tiny_model("llama", dtype=torch.float32)
    every = neurgrad(lm, prompts_for(lm), LABELS[:3])
    assert all(every.negs_POLN[:, :, layer].flags.c_contiguous for layer in range(lm.n_layers))


def test_copies_that_lie_side_by_side_are_one():
    assert list(engine._stretches([4, 5, 6, 1, 9, 10])) == [(0, 3), (3, 4), (4, 6)]
    assert list(engine._stretches([7])) == [(0, 1)]
