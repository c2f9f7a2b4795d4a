"""Codes hold order and signs of NEGs, ties included, so that probes cannot tell them from the values."""

import json
from itertools import product

import numpy as np
import pytest
from stored_negs import LayerNumbers, awkward_numbers, rows_of, write_layers
from support import identity_of

from negcore.errors import NegError, ShardError
from negcore.measure.votes import argmax_features
from negcore.probing.fitted import fit_act, fit_forest, fit_logistic, fit_vote, random_vote
from negcore.probing.rankings import Vote, chosen_effects, rank_layers, training_scores
from negcore.probing.saved_probes import load_probe, save_probe
from negcore.store.codes import decode, encode
from negcore.store.identity import canonical_json, content_digest
from negcore.store.integrity import finished_shards
from negcore.store.publish import receipts
from negcore.store.reader import open_negs

N_LAYERS, N_NEURONS, N_ROWS = 3, 11, 48
N_ALL = N_LAYERS * N_NEURONS
ORDERS = {2: 13, 3: 75, 4: 541, 5: 4683}
"""Ways in which so many options and zero can be ordered, ties included."""
VOTES = [Vote(rule, signal) for rule in ("polar", "magn") for signal in ("neg", "gradient", "gxa")]
TINY = np.float32(1e-45)  # the smallest number of float32


def encoded(*columns):
    """Codes of neurons, each given by its options' NEGs."""
    return encode(np.array(columns, np.float32).T[None])[0]


def decoded(codes, n_options):
    return decode(np.array([codes], np.uint16), n_options)[0].T.tolist()


def plain_ranks(values):
    """By sorting in plain Python: distance from zero among the distinct values of one sign."""
    above = sorted({value for value in values if value > 0})
    below = sorted({value for value in values if value < 0}, reverse=True)
    return [above.index(v) + 1 if v > 0 else -below.index(v) - 1 if v < 0 else 0 for v in values]


# Codes


def test_two_options_on_paper():
    # Option 0 below, at or above zero; then option 1 among zero and option 0.
    codes = encoded([0, 0], [-1, -2], [-1, -1], [-1, -0.5], [-1, 0], [-1, 1], [1, -1], [2, 2], [2, 3])
    assert codes.tolist() == [5 * 1 + 2, 0, 1, 2, 3, 4, 5 * 2 + 0, 5 * 2 + 3, 5 * 2 + 4]


def test_three_options_come_back_as_ranks_on_both_sides_of_zero():
    codes = encoded([0.3, -7, 0.1], [5, 5, 0], [-1, -3, -2], [-0.0, 0.0, -1e-30])
    assert decoded(codes, 3) == [[2, -1, 1], [1, 1, 0], [-1, -3, -2], [0, 0, -1]]


@pytest.mark.parametrize("n_options", ORDERS)
def test_every_order_has_a_code_of_its_own_and_comes_back(n_options):
    orders = sorted(
        {tuple(plain_ranks(values)) for values in product(range(-n_options, n_options + 1), repeat=n_options)}
    )
    codes = encoded(*orders)
    assert len(orders) == len(set(codes.tolist())) == ORDERS[n_options]
    assert decoded(codes, n_options) == [list(order) for order in orders]


@pytest.mark.parametrize("n_options", ORDERS)
def test_random_values_come_back_in_their_order(n_options):
    rng = np.random.default_rng(n_options)
    usual = rng.normal(size=(7, n_options, 300)).astype(np.float32)
    special = rng.choice(
        np.array([0, -0.0, TINY, -TINY, 3 * TINY, 1, np.nextafter(1, 2), -3e38], np.float32), usual.shape
    )
    negs_PON = np.where(rng.random(usual.shape) < 0.5, usual, special)
    signed_ranks_PON = decode(encode(negs_PON), n_options)
    assert signed_ranks_PON.dtype == np.int8
    assert np.array_equal(np.apply_along_axis(plain_ranks, 1, negs_PON), signed_ranks_PON)
    assert np.array_equal(argmax_features(signed_ranks_PON), argmax_features(negs_PON))


def test_blocks_of_rows_have_the_codes_of_the_whole(monkeypatch):
    negs_PON = np.random.default_rng(0).integers(-2, 3, (9, 4, 13)).astype(np.float32)
    whole = encode(negs_PON)
    monkeypatch.setattr("negcore.measure.votes._BLOCK_VALUES", 100)
    assert np.array_equal(encode(negs_PON), whole)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_neg_that_is_no_number_has_no_code(value):
    negs_PON = np.zeros((4, 3, 5), np.float32)
    negs_PON[2, 1, 4] = value
    with pytest.raises(NegError, match=f"NEG of row 2, option 1, neuron 4 is {value}"):
        encode(negs_PON)


@pytest.mark.parametrize("n_options", [1, 6])
def test_other_numbers_of_options_are_refused(n_options):
    with pytest.raises(NegError, match=f"{n_options} options: codes hold 2..5 of them, use storage 'values'"):
        encode(np.zeros((1, n_options, 1), np.float32))


def test_a_code_that_none_has_is_refused_with_its_place():
    with pytest.raises(NegError, match="code of row 1, neuron 2 is 65535, which stands for no order of 3 options"):
        decode(np.array([[7, 7, 7], [7, 7, 65535]], np.uint16), 3)


# Runs that store them


def numbers(split, n_options):
    """Awkward numbers in which three neurons have some skill."""
    data = awkward_numbers(split, n_options, (N_ROWS, N_LAYERS, N_NEURONS))
    skill = np.random.default_rng(n_options).choice([0, 1, 3], (N_ROWS, 3))
    data.negs_POLN[np.arange(N_ROWS), data.gold_P, 1, 2:5] += skill
    return data


def identity(storage="values"):
    return identity_of(N_LAYERS, N_NEURONS, storage=storage)


def write(root, split, storage, *, n_options=4, data=None, **options):
    return write_layers(root, split, data or numbers(split, n_options), storage=storage, **options)


@pytest.fixture(scope="module", params=[2, 5])
def levels(request, tmp_path_factory):
    """The same splits, stored as values and as codes."""
    root = tmp_path_factory.mktemp("run")
    return {
        storage: {
            split: write(root / storage, split, storage, n_options=request.param)
            for split in ("train", "valid", "test")
        }
        for storage in ("values", "codes")
    }


def scores(split, votes=VOTES):
    return rank_layers(split, range(N_LAYERS), votes, act=True)


@pytest.mark.parametrize("vote", VOTES)
def test_vote_probes_are_the_same_in_scores_neurons_accuracy_and_answers(levels, vote):
    fitted = {}
    for storage, splits in levels.items():
        scores_M = scores(splits["train"]).votes_M[vote]
        probe = fit_vote(vote, scores_M, splits["valid"], max_neurons=N_ALL)
        lot = random_vote(probe, scores_M, seed=0)
        fitted[storage] = (
            scores_M.tolist(),
            probe.ranking.order_K.tolist(),
            probe.ranking.polarity_K.tolist(),
            probe.accuracy_by_k(splits["valid"]),
            probe.predict(splits["test"]).tolist(),
            lot.ranking.order_K.tolist(),
            lot.predict(splits["test"]).tolist(),
        )
    assert fitted["values"] == fitted["codes"]


def test_scores_of_fewer_training_rows_are_the_same(levels):
    sizes = [3, 20, 31, N_ROWS]
    values, codes = (training_scores(splits["train"], range(1, N_LAYERS), VOTES, sizes) for splits in levels.values())
    for size, vote in product(sizes, VOTES):
        assert values[size].votes_M[vote].tolist() == codes[size].votes_M[vote].tolist()


def test_forests_are_the_same(levels):
    trees = {storage: fit_forest(splits["train"], np.arange(N_ALL)[::-1], seed=1) for storage, splits in levels.items()}
    assert trees["values"].forest.feature_V.tolist() == trees["codes"].forest.feature_V.tolist()
    answers = [trees[storage].predict(splits["test"]).tolist() for storage, splits in levels.items()]
    assert answers[0] == answers[1]


def test_act_probes_are_the_same_as_activations_are_stored_as_they_are(levels):
    answers = []
    for splits in levels.values():
        probe = fit_act(scores(splits["train"], []).act, splits["train"].gold_P, splits["valid"], max_neurons=N_ALL)
        answers.append((probe.n_kept, probe.predict(splits["test"]).tolist()))
    assert answers[0] == answers[1]


def test_gradient_times_activation_is_ordered_as_neg_though_a_product_would_be_rounded(tmp_path):
    step = np.float32(2**-23)  # between numbers of float32 above 1
    gold_N, other_N = [1.875 + 2 * step, TINY], [1.875 + step, 0]
    negs_POLN = np.array([gold_N, other_N], np.float32)[None, :, None]
    data = LayerNumbers(negs_POLN, np.array([[[1.125, 0.25]]], np.float32), np.array([0]))
    of_level = [write(tmp_path / storage, "train", storage, n_options=2, data=data) for storage in ("values", "codes")]
    (block,) = of_level[0].shards()
    product_ON = chosen_effects(block, "gxa", [0, 1])[0]
    assert product_ON[0].tolist() == product_ON[1].tolist()
    for split in of_level:
        vote = Vote("magn", "gxa")
        assert rank_layers(split, range(1), [vote], act=False).votes_M[vote].tolist() == [1, 1]


@pytest.mark.parametrize("signal", ["gradient", "gxa"])
@pytest.mark.parametrize("storage", ["values", "codes"])
def test_an_activation_that_is_no_number_enters_no_vote(tmp_path, storage, signal):
    data = numbers("train", 4)
    data.activations_PLN[21, 1, 6] = np.nan
    split = write(tmp_path, "train", storage, data=data)
    with pytest.raises(NegError, match="'train/20' on, layer 1: activation of row 1, neuron 6 is nan"):
        rank_layers(split, range(N_LAYERS), [Vote("polar", signal)], act=False)


# What cannot be asked of codes


def test_whoever_asks_codes_for_values_is_told_to_run_with_values(tmp_path):
    split = write(tmp_path, "train", "codes")
    assert (split.storage, write(tmp_path / "v", "train", "values").storage) == ("codes", "values")
    (shard, *_) = split.shards()
    questions = [
        lambda: split.layer(0),
        lambda: split.neurons([3]),
        lambda: shard.negs([3]),
        lambda: shard.negs_PON(0),
        lambda: fit_logistic(VOTES[0], np.arange(4), split),
    ]
    for question in questions:
        with pytest.raises(ShardError, match="part-00000.arrow' holds codes, not values: .* run with --storage values"):
            question()
    assert np.array_equal(split.activations([3]), numbers("train", 4).activations_PLN[:, 0, 3:4])


def test_a_neg_that_is_no_number_is_not_stored(tmp_path):
    data = numbers("train", 4)
    data.negs_POLN[21, 0, 2, 6] = np.nan
    with pytest.raises(NegError, match="layer 2: NEG of row 1, option 0, neuron 6 is nan"):
        write(tmp_path, "train", "codes", data=data)


def test_a_damaged_code_is_refused_with_its_place(tmp_path):
    split = write(tmp_path, "train", "codes")
    path = next(tmp_path.rglob("part-00001.arrow"))
    whole = path.read_bytes()
    (_, shard, _) = split.shards()
    column = np.ascontiguousarray(shard.numbers("code_02")).tobytes()
    assert whole.count(column) == 1
    path.write_bytes(whole.replace(column, b"\xff" * len(column)))
    with pytest.raises(NegError, match="'train/20' on, layer 2: code of row 0, neuron 0 is 65535"):
        rank_layers(open_negs(tmp_path, verify=False).select(), range(N_LAYERS), VOTES, act=False)
    with pytest.raises(ShardError, match="part-00001.arrow' is damaged"):
        open_negs(tmp_path).select()


# Values and codes are never mixed


def test_the_digest_of_a_run_that_stores_values_is_the_one_it_always_had():
    plain = identity()
    assert "storage" not in plain.comparable()
    assert plain.digest == "6bb50d6bc26af69e2058831fb4047691"
    assert identity("codes").comparable() == plain.comparable() | {"storage": "codes"}
    assert identity("codes").digest != plain.digest


@pytest.mark.parametrize(("stored", "wanted"), [("values", "codes"), ("codes", "values")])
def test_shards_of_the_other_level_are_refused_with_the_difference(tmp_path, stored, wanted):
    split = write(tmp_path, "train", stored)
    assert sorted(finished_shards(tmp_path, split.place, identity(stored), rows_of(split)).receipts) == [0, 1, 2]
    with pytest.raises(ShardError, match=f"there: storage: '{wanted}' here, '{stored}' there"):
        finished_shards(tmp_path, split.place, identity(wanted), rows_of(split))


def test_a_storage_level_of_another_version_is_not_guessed_at(tmp_path):
    write(tmp_path, "train", "codes")
    for path in tmp_path.rglob("_receipts/*.json"):
        record = json.loads(path.read_text())
        del record["seal"]
        record["identity"]["storage"] = "later"
        path.write_text(canonical_json(record | {"seal": content_digest(record)}))
    with pytest.raises(ShardError, match="written by another version of this software .storage 'later'."):
        open_negs(tmp_path).select()


# Probes on disk


def test_a_probe_fitted_on_one_level_answers_the_other(levels, tmp_path):
    for storage, other in (("values", "codes"), ("codes", "values")):
        train, valid, test = (levels[storage][split] for split in ("train", "valid", "test"))
        ranked = scores(train)
        probes = {vote.name: fit_vote(vote, ranked.votes_M[vote], valid, max_neurons=N_ALL) for vote in VOTES}
        probes |= {"tree": fit_forest(train, np.arange(N_ALL), seed=0)}
        probes |= {"act": fit_act(ranked.act, train.gold_P, valid, max_neurons=N_ALL)}
        for name, probe in probes.items():
            save_probe(tmp_path / f"{name}.safetensors", name, probe, train)
            saved = load_probe(tmp_path / f"{name}.safetensors")
            assert saved.predict(levels[other]["test"]).tolist() == probe.predict(test).tolist()


def test_a_logistic_regression_fitted_on_values_does_not_answer_codes(levels, tmp_path):
    train = levels["values"]["train"]
    save_probe(tmp_path / "one.safetensors", "polar-logistic", fit_logistic(VOTES[0], np.arange(4), train), train)
    with pytest.raises(ShardError, match="holds codes, not values"):
        load_probe(tmp_path / "one.safetensors").predict(levels["codes"]["test"])


# Bytes


@pytest.mark.parametrize(("n_options", "times_less"), [(2, 2), (4, 20 / 6), (5, 4)])
def test_a_neuron_takes_two_bytes_a_prompt_beside_its_activation(tmp_path, n_options, times_less):
    rng = np.random.default_rng(0)
    negs_POLN = rng.normal(size=(32, n_options, 2, 4096)).astype(np.float32)
    data = LayerNumbers(negs_POLN, negs_POLN[:, 0], np.zeros(32, int))
    size = {}
    for storage in ("values", "codes"):
        split = write(tmp_path / storage, "train", storage, n_options=n_options, data=data, shard_rows=32)
        (receipt,) = receipts(split.place.path(tmp_path / storage))
        size[storage] = receipt.n_bytes
    assert size["codes"] == pytest.approx(32 * 2 * 4096 * (4 + 2), rel=0.02)
    assert size["values"] / size["codes"] == pytest.approx(times_less, rel=0.02)
