"""Neurons of two models matched by their NEGs: planted permutations, a slow twin, chance, and rows that differ."""

import numpy as np
import pytest
import torch
from stored_negs import LayerNumbers, write_layers
from support import LABELS, PROMPTS, tiny_model

from negcore.analysis import matching
from negcore.analysis.matching import match_neurons
from negcore.errors import NegError
from negcore.measure.neurgrad import neurgrad

ROWS, OPTION_COUNT = 24, 3


def written(root, negs_POLN, gold_P=None, **changes):
    negs_POLN = np.asarray(negs_POLN, np.float32)
    gold_P = np.arange(len(negs_POLN)) % negs_POLN.shape[1] if gold_P is None else gold_P
    numbers = LayerNumbers(negs_POLN, np.ones((len(negs_POLN), *negs_POLN.shape[2:]), np.float32), gold_P)
    return write_layers(root, "train", numbers, shard_rows=10, **changes)


def drawn(seed, n_layers, n_neurons, n_rows=ROWS):
    return np.random.default_rng(seed).standard_normal((n_rows, OPTION_COUNT, n_layers, n_neurons))


def places(matches):
    return [(one.other_layer, one.other_neuron) for one in matches]


def measured(lm, root):
    prompts = [f"{number} {prompt}" for number in range(3) for prompt in PROMPTS]
    return written(root, neurgrad(lm, prompts, LABELS).negs_POLN)


def permute_neurons(lm, orders):
    """Give the neurons of every layer other places, which changes nothing that the model computes."""
    with torch.no_grad():
        for layer, order in zip(lm.model.model.layers, orders, strict=True):
            for name in ("gate_proj", "up_proj"):
                weight = getattr(layer.mlp, name).weight
                weight.copy_(weight[order].clone())
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order].clone())


@pytest.mark.parametrize("plant", ["itself", "permuted", "rotated"])
def test_every_neuron_of_a_model_is_found_where_it_was_put(tmp_path, plant):
    lm = tiny_model("llama")
    width = lm.card.layer_width
    rng = np.random.default_rng(0)
    identity, rotated = np.arange(width), np.roll(np.arange(width), 3)
    order = {"itself": lambda: identity, "permuted": lambda: rng.permutation(width), "rotated": lambda: rotated}[plant]
    orders = [order() for _ in range(lm.n_layers)]
    first = measured(lm, tmp_path / "a")
    other = tiny_model("llama")
    permute_neurons(other, orders)
    second = measured(other, tmp_path / "b")
    matches = match_neurons([first], [second], n_shuffles=19)
    expected = [
        (layer, int(np.argsort(orders[layer])[neuron])) for layer in range(lm.n_layers) for neuron in range(width)
    ]
    assert places(matches) == expected
    assert all(one.is_mutual and one.r > 0.999 and one.p == 0.05 for one in matches)


def slow_match(first_POM, second_POM, shuffles, k):
    """Loop over neurons, in double precision."""
    first_POM, second_POM = (values - values.mean(axis=0) for values in (first_POM, second_POM))

    def correlations(first_PO):
        return [
            float(np.corrcoef(first_PO.ravel(), second_POM[:, :, m].ravel())[0, 1]) for m in range(second_POM.shape[2])
        ]

    found = correlations(first_POM[:, :, k])
    highest = [max(correlations(first_POM[shuffle_P, :, k])) for shuffle_P in shuffles]
    back = [
        float(np.corrcoef(first_POM[:, :, m].ravel(), second_POM[:, :, int(np.argmax(found))].ravel())[0, 1])
        for m in range(first_POM.shape[2])
    ]
    as_high = sum(high >= max(found) for high in highest)
    return int(np.argmax(found)), max(found), (1 + as_high) / (1 + len(highest)), int(np.argmax(back)) == k


@pytest.mark.parametrize("blocks", [(2**25, 2048), (2**25, 3), (ROWS * OPTION_COUNT * 2, 2048)])
def test_matches_are_those_of_a_slow_twin_in_blocks_of_any_size(tmp_path, monkeypatch, blocks):
    monkeypatch.setattr(matching, "_MOST_NUMBERS", blocks[0])
    monkeypatch.setattr(matching, "_MOST_NEURONS", blocks[1])
    first, second = drawn(1, 2, 4), drawn(2, 3, 3)
    second[..., 1, 2] += first[..., 1, 0]
    found = match_neurons(
        [written(tmp_path / "a", first)], [written(tmp_path / "b", second)], np.array([4, 1, 6]), n_shuffles=20, seed=3
    )
    shuffles = [np.random.default_rng([3, number]).permutation(ROWS) for number in range(20)]
    first_POM, second_POM = (
        values.astype(np.float32).astype(float).reshape(ROWS, OPTION_COUNT, -1) for values in (first, second)
    )
    for one, k in zip(found, (4, 1, 6), strict=True):
        at, r, p, is_mutual = slow_match(first_POM, second_POM, shuffles, k)
        assert (one.layer, one.neuron, one.other_layer, one.other_neuron) == (k // 4, k % 4, at // 3, at % 3)
        assert (one.p, one.is_mutual) == (p, is_mutual)
        assert one.r == pytest.approx(r, abs=1e-6)
    assert (found[0].other_layer, found[0].other_neuron, found[0].p) == (1, 2, 1 / 21)


def test_random_models_have_no_more_matches_than_the_stated_share(tmp_path):
    """Neurons of a model are alike, as those of real ones are, and those of two models have nothing in common."""
    rng = np.random.default_rng(0)
    shares = []
    for number in range(40):
        mixes = [rng.standard_normal((8, 12)) for _ in range(2)]
        splits = [
            written(
                tmp_path / f"{side}{number}",
                (rng.standard_normal((16, OPTION_COUNT, 8)) @ mix).reshape(16, OPTION_COUNT, 2, 6),
            )
            for side, mix in enumerate(mixes)
        ]
        p = np.array([one.p for one in match_neurons(*([split] for split in splits), n_shuffles=19, seed=number)])
        shares.append((p <= 0.05).mean())
    error = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) <= 0.05 + 3 * error
    assert error < 0.02


def of_units(rng, mix, n_units, n_rows):
    """Neurons of a model that follow what the rows of a unit have in common, and hardly anything else."""
    shared = np.repeat(rng.standard_normal((n_units, OPTION_COUNT, 4)), n_rows, axis=0)
    values = (shared + 0.1 * rng.standard_normal(shared.shape)) @ mix
    return values.reshape(*values.shape[:2], 2, 6)


def test_units_hold_the_stated_share_where_single_rows_do_not(tmp_path):
    """Two models with nothing in common but that rows of a unit are alike in each."""
    rng, n_units, n_rows = np.random.default_rng(1), 12, 4
    units = [f"u{number // n_rows}" for number in range(n_units * n_rows)]
    by_unit, by_row = [], []
    for number in range(40):
        sides = [of_units(rng, rng.standard_normal((4, 12)), n_units, n_rows) for _ in range(2)]
        splits = [[written(tmp_path / f"{side}{number}", values)] for side, values in enumerate(sides)]
        for shares, given in ((by_unit, units), (by_row, None)):
            p = np.array([one.p for one in match_neurons(*splits, units=given, n_shuffles=19, seed=number)])
            shares.append((p <= 0.05).mean())
    error = np.std(by_unit) / np.sqrt(len(by_unit))
    assert np.mean(by_unit) <= 0.05 + 3 * error
    assert error < 0.03
    assert np.mean(by_row) > 0.3


def test_units_are_given_for_every_row_or_refused(tmp_path):
    split = written(tmp_path / "a", drawn(1, 1, 4))
    with pytest.raises(NegError, match="3 units were given for 24 rows"):
        match_neurons([split], [split], units=["a", "b", "c"])
    alone = [match_neurons([split], [split], units=units, n_shuffles=19) for units in (None, [""] * ROWS)]
    assert alone[0] == alone[1]
    (one, *_) = match_neurons([split], [split], units=["a"] * (ROWS - 1) + ["b"], n_shuffles=3)
    assert one.r == pytest.approx(1)
    assert one.p == 0.25  # rows of a large unit still change places


def test_options_that_neurons_prefer_whatever_is_asked_are_no_match(tmp_path):
    """Two models whose neurons all like option 0: only how they differ from row to row is compared."""
    letters = np.array([3.0, 0, 0])[None, :, None, None]
    first, second = drawn(1, 1, 10), drawn(2, 1, 10)
    plain = match_neurons([written(tmp_path / "a", first)], [written(tmp_path / "b", second)], n_shuffles=19)
    first, second = first + letters, second + letters
    found = match_neurons([written(tmp_path / "c", first)], [written(tmp_path / "d", second)], n_shuffles=19)
    assert places(found) == places(plain)
    assert [one.r for one in found] == pytest.approx([one.r for one in plain], abs=1e-6)
    assert max(one.r for one in found) < 0.5


def test_rows_in_another_order_and_several_splits_are_brought_together(tmp_path):
    values = drawn(1, 2, 4)
    gold_P, order = np.arange(ROWS) % OPTION_COUNT, np.random.default_rng(5).permutation(ROWS)
    first = written(tmp_path / "a", values, gold_P)
    second = written(tmp_path / "b", values[order], gold_P[order])
    second.ids = [first.ids[place] for place in order]
    matches = match_neurons([first], [second], n_shuffles=1)
    assert places(matches) == [(layer, neuron) for layer in range(2) for neuron in range(4)]
    assert places(match_neurons([first, first], [second, second], n_shuffles=1)) == places(matches)


def test_a_neuron_that_never_varies_has_no_match(tmp_path):
    values = drawn(1, 1, 4)
    values[..., 2] = 0.1
    found = match_neurons([written(tmp_path / "a", values)], [written(tmp_path / "b", values)], n_shuffles=1)
    assert [one.other_neuron for one in found] == [0, 1, None, 3]
    assert (found[2].r, found[2].chance, found[2].p, found[2].is_mutual) == (None, None, None, None)


def test_rows_that_differ_are_refused_by_the_first_difference(tmp_path):
    values = drawn(1, 1, 4)
    first = written(tmp_path / "a", values)
    cases = {
        r"has row 'train/20' and .* has not \(4 of 24\)": written(tmp_path / "fewer", values[:20]),
        "options a row: 3 in .* 2 in": written(tmp_path / "options", values[:, :2]),
        "row 'train/0': its right option": written(tmp_path / "gold", values, (np.arange(ROWS) + 1) % OPTION_COUNT),
        "row 'train/0': its options": written(tmp_path / "labels", values, first_label=7),
        "number_format: 1 in .*, 0 in .* not comparable": written(tmp_path / "format", values, number_format=0),
        "target: probability in .*, log-probability in": written(tmp_path / "t", values, target="log-probability"),
    }
    for says, second in cases.items():
        with pytest.raises(NegError, match=says):
            match_neurons([first], [second], n_shuffles=1)
    second = written(tmp_path / "b", values)
    second.text_hashes = [*second.text_hashes[:3], "other", *second.text_hashes[4:]]
    with pytest.raises(NegError, match=r"row 'train/3': its prompt is not the same .*\(1 of 24 rows\)"):
        match_neurons([first], [second], n_shuffles=1)
    others = written(tmp_path / "tokenizer", values, first_label=7, tokenizer_hash="u")
    assert match_neurons([first], [others], n_shuffles=1)[0].r == pytest.approx(1)
