"""16-bit values: the bits are PyTorch's, what is read back is the nearest, and shards take half the room."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import LABELS, PROMPTS, Row, identity_of, negs_place, tiny_model, write_negs

from negcore.measure.neurgrad import neurgrad
from negcore.store.levels import STORAGE_LEVELS, bfloat16_bits, bfloat16_values
from negcore.store.reader import open_negs

N_ROWS, N_OPTIONS, N_LAYERS, N_NEURONS = 9, 3, 2, 5
SHARD_ROWS = 3
VALUES = identity_of(N_LAYERS, N_NEURONS, model="tiny")
BFLOAT16 = replace(VALUES, storage="bfloat16")


def torch_bits(values):
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def test_numbers_that_fit_on_paper():
    # 1 + 2^-8 is half way between 1 and the next number, 1 + 2^-7: the even one wins. 1 + 3 * 2^-8 goes up.
    values = np.array([0, -0.0, 1, -2, 1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf], np.float32)
    assert bfloat16_bits(values).tolist() == [0, 0x8000, 0x3F80, 0xC000, 0x3F80, 0x3F82, 0x7F80, 0xFF80]


def test_all_that_16_bits_can_say_comes_back_as_it_was():
    bits = np.arange(2**16, dtype=np.uint16)
    values = bfloat16_values(bits)
    is_number = ~np.isnan(values)
    assert np.array_equal(bfloat16_bits(values)[is_number], bits[is_number])
    assert np.isnan(bfloat16_values(bfloat16_bits(values))[~is_number]).all()


def test_rounding_is_pytorchs():
    words = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    values = words.view(np.float32)
    values = np.concatenate([values[~np.isnan(values)], np.float32([3.4e38, -3.4e38, 1e-45, 2.0**-134])])
    assert np.array_equal(bfloat16_bits(values), torch_bits(values))


@pytest.mark.filterwarnings("error")
def test_every_nan_becomes_the_same_one_without_a_warning():
    nans = np.array([0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    assert set(bfloat16_bits(nans).tolist()) == {0x7FC0}
    assert np.isnan(bfloat16_values(bfloat16_bits(nans))).all()


def test_numbers_below_the_smallest_of_float32s_full_precision_are_rounded_not_flushed():
    # Subnormals: 2^-133 is the smallest of bfloat16; half of it is a tie with zero, and zero is even.
    half = np.float32(2.0**-134)
    values = np.array([2 * half, half, np.nextafter(half, np.float32(1)), 3 * half, -1e-40], np.float32)
    assert bfloat16_bits(values).tolist() == [1, 0, 1, 2, 0x8001]


def test_negs_of_improbable_answers_keep_their_sign_and_three_digits():
    values = np.float32(10.0 ** np.random.default_rng(0).uniform(-12, -6, 10_000))
    assert (np.abs(bfloat16_values(bfloat16_bits(values)) / values - 1) <= 2**-8).all()


@pytest.fixture
def stored(tmp_path):
    """NEGs and activations as they should be read, and the split in which they were stored."""
    rng = np.random.default_rng(0)
    negs = rng.normal(0, 1e-7, (N_ROWS, N_OPTIONS, N_LAYERS, N_NEURONS)).astype(np.float32)
    activations = rng.normal(0, 1, (N_ROWS, N_LAYERS, N_NEURONS)).astype(np.float32)
    for index in range(N_ROWS // SHARD_ROWS):
        own = slice(index * SHARD_ROWS, (index + 1) * SHARD_ROWS)
        write_negs(
            tmp_path,
            negs_place("tiny", "questions", "test"),
            index,
            N_ROWS // SHARD_ROWS,
            identity=BFLOAT16,
            examples=[Row(f"row {row}") for row in range(N_ROWS)[own]],
            label_ids_PO=np.zeros((SHARD_ROWS, N_OPTIONS)),
            probs_PO=np.zeros((SHARD_ROWS, N_OPTIONS)),
            negs_POLN=negs[own],
            activations_PLN=activations[own],
        )
    rounded = [bfloat16_values(bfloat16_bits(values)) for values in (negs, activations)]
    return *rounded, open_negs(tmp_path).select()


def test_every_way_to_read_gives_the_nearest_16_bit_numbers(stored):
    negs_POLN, activations_PLN, split = stored
    assert (split.storage, split.layer(0).dtype) == ("bfloat16", np.float32)
    for layer in range(N_LAYERS):
        assert np.array_equal(split.layer(layer), negs_POLN[:, :, layer])
    chosen = [N_LAYERS * N_NEURONS - 1, 0, N_NEURONS]
    layers, neurons = np.divmod(chosen, N_NEURONS)
    assert np.array_equal(split.neurons(chosen), negs_POLN[:, :, layers, neurons])
    assert np.array_equal(split.activations(chosen), activations_PLN[:, layers, neurons])
    assert split.neurons([]).shape == (N_ROWS, N_OPTIONS, 0)
    for block, start in zip(split.shards(), (0, 3, 6), strict=True):
        own = slice(start, start + 3)
        assert np.array_equal(block.negs(chosen), negs_POLN[own][:, :, layers, neurons])
        assert np.array_equal(block.signed_ranks(chosen), negs_POLN[own][:, :, layers, neurons])
        assert np.array_equal(block.activations(chosen), activations_PLN[own][:, layers, neurons])
        assert np.array_equal(block.signed_ranks_PON(1), negs_POLN[own][:, :, 1])
        assert np.array_equal(block.activations_PN(1), activations_PLN[own][:, 1])


def test_the_columns_take_half_the_room():
    def n_bits(storage):
        schema = STORAGE_LEVELS[storage].schema(4, 3, 16)
        types = [type_ for name, type_ in _fields(schema) if name.startswith(("act", "neg"))]
        return sum(type_.list_size * type_.value_type.bit_width for type_ in types)

    assert n_bits("values") == 2 * n_bits("bfloat16")


def _fields(schema):
    return zip(schema.names, schema.types, strict=True)


def test_it_is_another_run_than_one_with_whole_values():
    assert "storage: 'bfloat16' here, 'values' there" in BFLOAT16.difference(VALUES)
    assert BFLOAT16.digest != VALUES.digest


def test_nothing_is_lost_of_a_model_that_computes_in_bfloat16():
    lm = tiny_model("llama", dtype=torch.bfloat16)
    batch = neurgrad(lm, PROMPTS[:3], LABELS[:3])
    for values in (batch.negs_POLN, batch.activations_PLN):
        assert np.array_equal(bfloat16_values(bfloat16_bits(values)), values)
        assert np.count_nonzero(values) > values.size / 2
