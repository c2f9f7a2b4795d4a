"""Vote sums rank as values do, and shards of chosen neurons answer for them what values would."""

from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from stored_negs import awkward_numbers, rows_of, write_layers
from support import identity_of, negs_place

from negcore.errors import NegError, ShardError
from negcore.measure.votes import VOTES, Vote, vote_sums
from negcore.probing.draws import random_neurons
from negcore.probing.fitted import fit_forest, fit_logistic, fit_vote, random_vote
from negcore.probing.rankings import rank_layers, training_scores
from negcore.store.identity import RunIdentity, choice_digest
from negcore.store.integrity import finished_shards
from negcore.store.publish import receipts, shard_path
from negcore.store.reader import open_negs

N_LAYERS, N_NEURONS, N_ROWS = 3, 11, 48
N_ALL = N_LAYERS * N_NEURONS
CHOSEN = (0, 3, 7, 10, 11, 12, 20, 25, 32)


def numbers(split, n_options, n_rows=N_ROWS):
    return awkward_numbers(split, n_options, (n_rows, N_LAYERS, N_NEURONS))


def identity(storage="values", neurons=None):
    digest = None if neurons is None else choice_digest(neurons)
    return identity_of(N_LAYERS, N_NEURONS, storage=storage, neurons=digest)


def write(root, split, storage, *, neurons=None, n_options=4, data=None, **options):
    return write_layers(root, split, data or numbers(split, n_options), storage=storage, neurons=neurons, **options)


# Sums


def plain_scores(vote, data):
    """By the definitions, one prompt, option and neuron at a time."""
    scores_LN = np.zeros((N_LAYERS, N_NEURONS), int)
    for row, layer, neuron in product(range(len(data.gold_P)), range(N_LAYERS), range(N_NEURONS)):
        activation, gold = data.activations_PLN[row, layer, neuron], data.gold_P[row]
        direction = 1 if vote.signal == "neg" or activation > 0 else -1
        direction = abs(int(np.sign(activation))) if vote.signal == "gxa" else direction
        values = [direction * float(value) for value in data.negs_POLN[row, :, layer, neuron]]
        for option, value in enumerate(values):
            if vote.rule == "polar":
                scores_LN[layer, neuron] += np.sign(value) * (1 if option == gold else -1)
            else:
                scores_LN[layer, neuron] += (values[gold] > value) - (values[gold] < value)
    return scores_LN.ravel().tolist()


def test_two_prompts_by_pencil():
    negs_POLN = np.array([[[[3.0]], [[-1.0]]], [[[2.0]], [[2.0]]]])  # option 0 ahead with signs + -; then a tie
    sums = vote_sums(negs_POLN, np.array([[[-1.0]], [[0.0]]]), [0, 1])
    assert {f"{vote.rule} {vote.signal}": int(sums_M[0]) for vote, sums_M in sums.items()} == {
        "polar neg": 2 + 0,
        "polar gradient": -2 + 0,
        "polar gxa": 2 + 0,
        "magn neg": 1 + 0,
        "magn gradient": -1 + 0,
        "magn gxa": 1 + 0,
    }


@pytest.mark.parametrize("n_options", [2, 4, 6])
def test_sums_are_those_of_the_definitions(n_options):
    data = numbers("train", n_options)
    sums = vote_sums(*data)
    assert tuple(sums) == VOTES
    for vote in VOTES:
        assert sums[vote].tolist() == plain_scores(vote, data)


@pytest.mark.parametrize("n_options", [2, 4, 6])
def test_sums_of_shards_rank_as_values_do(tmp_path, n_options):
    values = write(tmp_path / "values", "train", "values", n_options=n_options)
    sums = write(tmp_path / "sums", "train", "stats", n_options=n_options, shard_rows=7)
    for layers in (range(N_LAYERS), range(1, 2), range(1, 3)):
        expected = rank_layers(values, layers, VOTES, act=False).votes_M
        found = rank_layers(sums, layers, VOTES, act=False).votes_M
        assert {vote: scores.tolist() for vote, scores in found.items()} == {
            vote: scores.tolist() for vote, scores in expected.items()
        }
    assert (sums.ids, sums.gold_P.tolist(), sums.n_options) == (values.ids, values.gold_P.tolist(), n_options)


def test_a_shard_whose_rows_are_all_set_aside_adds_nothing(tmp_path):
    data = numbers("train", 4)
    sums = write(tmp_path, "train", "stats", data=data, empty=[1])
    kept = [*range(20), *range(40, N_ROWS)]
    expected = vote_sums(*(values[kept] for values in data))
    found = rank_layers(sums, range(N_LAYERS), VOTES, act=False).votes_M
    assert all(found[vote].tolist() == expected[vote].tolist() for vote in VOTES)


def test_a_neg_that_is_no_number_enters_no_sum(tmp_path):
    data = numbers("train", 4)
    data.negs_POLN[21, 0, 2, 6] = np.nan
    with pytest.raises(NegError, match="layer 2: NEG of row 1, option 0, neuron 6 is nan"):
        write(tmp_path, "train", "stats", data=data)


def test_the_size_of_sums_does_not_grow_with_rows_and_options(tmp_path):
    sizes = []
    for n_options, n_rows in [(2, 10), (6, 10), (2, 40)]:
        root = tmp_path / f"{n_options}-{n_rows}"
        write(root, "train", "stats", n_options=n_options, data=numbers("train", n_options, n_rows), shard_rows=n_rows)
        (path,) = root.rglob("part-00000.arrow")
        columns = pa.ipc.open_file(path).read_all().select([f"sum_{vote.rule}_{vote.signal}" for vote in VOTES])
        sizes.append(sum(len(column.combine_chunks().flatten()) for column in columns.columns))
    assert sizes == [len(VOTES) * N_ALL] * 3


# Chosen neurons


@pytest.fixture(scope="module", params=[2, 4, 6])
def levels(request, tmp_path_factory):
    """The same splits, stored as values and as those of chosen neurons."""
    root, names = tmp_path_factory.mktemp("run"), ("train", "valid", "test")
    stored = {"values": None, "stats": CHOSEN}
    return {
        storage: {
            split: write(root / storage, split, storage, neurons=neurons, n_options=request.param) for split in names
        }
        for storage, neurons in stored.items()
    }


@pytest.mark.parametrize("selection", [[12], [32, 0, 12, 12], [(2, 10), (0, 3)], []])
def test_chosen_neurons_have_the_values_they_have_in_a_run_of_values(levels, selection):
    for split in ("train", "test"):
        values, stats = levels["values"][split], levels["stats"][split]
        assert np.array_equal(stats.neurons(selection), values.neurons(selection))
        assert np.array_equal(stats.activations(selection), values.activations(selection))


@pytest.mark.parametrize("vote", VOTES)
def test_vote_probes_on_chosen_neurons_are_those_on_values(levels, vote):
    chosen, fitted = np.array(CHOSEN), []
    scores_M = np.zeros(N_ALL, np.int64)  # of the chosen neurons, as others are never read
    scores_M[chosen] = rank_layers(levels["values"]["train"], range(N_LAYERS), [vote], act=False).votes_M[vote][chosen]
    for splits in levels.values():
        probe = fit_vote(vote, scores_M, splits["valid"], max_neurons=int(np.count_nonzero(scores_M)))
        order = probe.ranking.order_K.tolist()
        fitted.append((order, probe.accuracy_by_k(splits["valid"]), probe.predict(splits["test"]).tolist()))
    assert fitted[0] == fitted[1]


def test_what_is_fitted_to_chosen_neurons_is_what_is_fitted_to_values(levels):
    order_K = np.array(CHOSEN[::-1])
    for fit in (lambda train: fit_forest(train, order_K, seed=1), lambda train: fit_logistic(VOTES[1], order_K, train)):
        answers = [fit(splits["train"]).predict(splits["test"]).tolist() for splits in levels.values()]
        assert answers[0] == answers[1]


def test_random_baselines_draw_the_neurons_that_can_be_foreseen(levels):
    vote, splits = VOTES[0], levels["values"]
    scores_M = rank_layers(splits["train"], range(N_LAYERS), [vote], act=False).votes_M[vote]
    probe = fit_vote(vote, scores_M, splits["valid"], max_neurons=N_ALL)
    drawn = random_vote(probe, scores_M, seed=5).ranking.order_K
    assert drawn.tolist() == random_neurons(N_ALL, probe.n_kept, seed=5).tolist()


def test_columns_of_numbers_start_at_64_bytes(tmp_path):
    for storage, neurons in (("stats", None), ("stats", CHOSEN)):
        split = write(tmp_path / str(neurons), "train", storage, neurons=neurons, shard_rows=7)
        names = ["gold", "label_ids", "probs"] + ["act", "neg"] * (neurons is not None)
        for shard, name in product(split.shards(), names):
            assert shard.numbers(name).ctypes.data % 64 == 0


# What cannot be asked


def test_whoever_asks_for_what_is_not_stored_is_told_what_to_do(tmp_path):
    chosen = write(tmp_path / "chosen", "train", "stats", neurons=CHOSEN)
    sums = write(tmp_path / "sums", "train", "stats")
    for split, neuron in ((chosen, 4), (sums, 0)):
        (block, *_) = split.shards()
        for question in (split.neurons, split.activations, block.negs, block.signed_ranks, block.activations):
            with pytest.raises(ShardError, match=rf"does not hold neuron 0\.{neuron} .* or with --storage values"):
                question([neuron])
        questions = [
            lambda split=split: split.layer(0),
            lambda block=block: block.activations_PN(0),
            lambda split=split: rank_layers(split, range(1), [], act=True),
            lambda split=split: training_scores(split, range(1), VOTES, [3]),
        ]
        for question in questions:
            with pytest.raises(NegError, match="holds vote sums or chosen neurons, not whole layers: run with"):
                question()
    with pytest.raises(ShardError, match="holds no vote sums: ask the partition that was written for ranking"):
        rank_layers(chosen, range(1), [Vote("polar", "neg")], act=False)


# Never mixed


def test_the_digests_of_runs_that_store_values_or_codes_are_those_they_always_had():
    assert identity().digest == "6bb50d6bc26af69e2058831fb4047691"
    assert "neurons" not in identity("codes").comparable()
    assert identity("stats").comparable() == identity().comparable() | {"storage": "stats"}
    chosen = identity("stats", CHOSEN)
    assert chosen.comparable() == identity("stats").comparable() | {"neurons": choice_digest(CHOSEN)}
    assert len({identity("stats").digest, chosen.digest, identity("stats", CHOSEN[1:]).digest}) == 3


def test_shards_of_another_choice_are_refused_with_the_difference(tmp_path):
    split = write(tmp_path, "train", "stats", neurons=CHOSEN)
    done = finished_shards(tmp_path, split.place, identity("stats", CHOSEN), rows_of(split))
    assert sorted(done.receipts) == [0, 1, 2]
    for other in (CHOSEN[1:], None):
        with pytest.raises(ShardError, match="this run here, that one there: neurons: .* here, '[0-9a-f]{32}' there"):
            finished_shards(tmp_path, split.place, identity("stats", other), rows_of(split))


def test_a_plan_knows_shards_before_their_neurons_are_chosen(tmp_path):
    planned = RunIdentity(**identity("stats").comparable(), neurons="").digest
    folder = negs_place("m", "d", "train").path(tmp_path)
    for neurons in (CHOSEN, CHOSEN[1:]):
        write(tmp_path, "train", "stats", neurons=neurons)
        assert {receipt.planned_digest for receipt in receipts(folder)} == {planned}
    write(tmp_path, "train", "stats")
    assert {receipt.planned_digest for receipt in receipts(folder)} == {identity("stats").digest}


def test_neurons_that_are_not_those_of_the_receipt_are_damage(tmp_path):
    split = write(tmp_path, "train", "stats", neurons=CHOSEN)
    path = shard_path(split.place.path(tmp_path), 1)
    whole, column = path.read_bytes(), np.array(CHOSEN, np.int32).tobytes()
    assert whole.count(column) == 1
    path.write_bytes(whole.replace(column, np.array((1, *CHOSEN[1:]), np.int32).tobytes()))
    with pytest.raises(ShardError, match=r"part-00001.arrow' is damaged \(its neurons are not those of its receipt\)"):
        open_negs(tmp_path, verify=False).select()
    with pytest.raises(ShardError, match=r"part-00001.arrow' is damaged \(its checksum"):
        split.neurons([7])
