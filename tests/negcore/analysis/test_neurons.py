"""The best neurons of a ranking, and how sure their places are, beside a twin that draws rows and ranks them again."""

import numpy as np
import pytest
from stored_negs import N_ALL, N_LAYERS, N_NEURONS, N_OPTIONS, Numbers, numbers, write_split

import negcore
from negcore.analysis import neurons as module
from negcore.analysis.linearity import bootstrap_weights
from negcore.analysis.neurons import neuron_means, neurons_ahead, read_neuron, scores_in_samples, top_neurons
from negcore.errors import NegError, ShardError
from negcore.measure.votes import SCORES, VOTES, Ranking, Vote, row_scores

STORED = ("values", "bfloat16", "codes")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return {
        storage: write_split(tmp_path_factory.mktemp(storage), "train", numbers("train"), storage=storage)
        for storage in (*STORED, "stats")
    }


def effects(data: Numbers, signal: str) -> np.ndarray:
    """The values that a vote compares, each computed as its definition says."""
    activations_P1M = data.activations_PM[:, None]
    factor = {"neg": 1, "gradient": np.where(activations_P1M > 0, 1, -1), "gxa": np.abs(activations_P1M)}[signal]
    return data.negs_POM * factor


def drawn_places(data: Numbers, vote: Vote, top: int, n_bootstrap: int, seed: int) -> np.ndarray:
    """Draw the rows of every sample one by one, rank all neurons on them, and look up each of the best: (B, K)."""
    effects_POM = effects(data, vote.signal)
    best = Ranking.from_scores(SCORES[vote.rule](effects_POM, data.gold_P)).order_K[:top]
    places = []
    for counts_P in bootstrap_weights(len(data.gold_P), n_bootstrap, seed)[1:].astype(int):
        rows = np.repeat(np.arange(len(data.gold_P)), counts_P)
        order = Ranking.from_scores(SCORES[vote.rule](effects_POM[rows], data.gold_P[rows])).order_K.tolist()
        places.append([order.index(neuron) + 1 for neuron in best])
    return np.array(places)


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("vote", VOTES, ids=lambda vote: vote.name)
def test_places_and_agreement_are_those_of_samples_drawn_row_by_row(splits, storage, vote):
    found = top_neurons(splits[storage], *vote, top=6, n_bootstrap=30, seed=3)
    places_BK = drawn_places(numbers("train"), vote, 6, 30, 3)
    assert [one.agreement for one in found] == (places_BK <= 6).mean(axis=0).tolist()
    sorted_BK = np.sort(places_BK, axis=0)  # of 30 samples, the 2nd smallest is the 5 % quantile, the 29th the 95 %
    assert [(one.place_low, one.place_high) for one in found] == list(zip(*sorted_BK[[1, 28]].tolist(), strict=True))
    assert len({one.agreement for one in found}) > 1


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("vote", VOTES, ids=lambda vote: vote.name)
def test_scores_in_samples_are_those_of_rows_drawn_one_by_one_in_any_block_of_layers(splits, storage, vote):
    data = numbers("train")
    effects_POM = effects(data, vote.signal)
    counts_BP = bootstrap_weights(len(data.gold_P), 5, 3)[1:].astype(int)
    found = [scores_in_samples(splits[storage], layers, vote, counts_BP) for layers in (range(2), range(2, 3))]
    for counts_P, scores_M in zip(counts_BP, np.concatenate(found, axis=1), strict=True):
        rows = np.repeat(np.arange(len(data.gold_P)), counts_P)
        assert scores_M.tolist() == SCORES[vote.rule](effects_POM[rows], data.gold_P[rows]).tolist()


def test_vote_sums_hold_no_rows_to_draw(splits):
    with pytest.raises(NegError, match="storage 'stats' keeps no rows to draw samples of"):
        scores_in_samples(splits["stats"], range(N_LAYERS), VOTES[0], np.ones((2, 12), int))


@pytest.mark.parametrize("storage", [*STORED, "stats"])
def test_the_listed_neurons_are_the_first_of_the_ranking_with_their_scores(splits, storage):
    data = numbers("train")
    scores_M = SCORES["magn"](data.negs_POM, data.gold_P)
    ranking = negcore.rank(splits[storage])
    found = top_neurons(splits[storage], top=4, n_bootstrap=2)
    assert [one.place for one in found] == [1, 2, 3, 4]
    assert [(one.layer, one.neuron) for one in found] == list(map(tuple, ranking.top(4).neurons_K2.tolist()))
    assert [one.score for one in found] == ranking.scores_K[:4].tolist()
    for one in found:
        of_layer = scores_M.reshape(N_LAYERS, N_NEURONS)[one.layer]
        assert one.score == of_layer[one.neuron] and one.polarity == np.sign(one.score)
        assert one.random_score == pytest.approx(np.abs(of_layer).mean())


def test_a_planted_neuron_is_the_first_in_every_sample_and_its_rivals_are_not(tmp_path):
    data = numbers("train")
    data.negs_POM[np.arange(len(data.gold_P)), data.gold_P, 8] = 9
    first, *others = top_neurons(write_split(tmp_path, "train", data), top=5)
    assert (first.layer, first.neuron, first.agreement, first.place_high) == (1, 3, 1.0, 1)
    assert all(one.place_high > 5 for one in others)


def test_means_by_option_and_by_right_option_are_those_of_the_rows(splits):
    data, pairs = numbers("train"), [(1, 2), (0, 0), (2, 4)]
    negs_POK = data.negs_POM[:, :, [7, 0, 14]].astype(np.float64)
    means = neuron_means(splits["values"], pairs)
    np.testing.assert_allclose(means.by_option_KO, negs_POK.mean(axis=0).T)
    for gold in range(N_OPTIONS):
        np.testing.assert_allclose(means.by_class_KCO[:, gold], negs_POK[data.gold_P == gold].mean(axis=0).T)
    listed = top_neurons(splits["values"], top=N_ALL, n_bootstrap=1)
    (seventh,) = [one for one in listed if (one.layer, one.neuron) == (1, 2)]
    np.testing.assert_allclose(seventh.mean_negs, means.by_option_KO[0])


def test_an_option_that_is_never_right_has_no_mean_of_its_class(tmp_path):
    data = numbers("train")
    few = Numbers(data.negs_POM, data.activations_PM, np.zeros_like(data.gold_P))
    by_class_KCO = neuron_means(write_split(tmp_path, "train", few), [(0, 1)]).by_class_KCO
    assert np.isnan(by_class_KCO[0, 1:]).all() and np.isfinite(by_class_KCO[0, 0]).all()


def test_codes_have_places_and_no_means(splits):
    codes, values = (top_neurons(splits[name], top=5, n_bootstrap=9) for name in ("codes", "values"))
    assert [one.mean_negs for one in codes] == [None] * 5
    assert [one.agreement for one in codes] == [one.agreement for one in values]


def test_vote_sums_rank_neurons_and_leave_empty_what_needs_rows(splits):
    for one in top_neurons(splits["stats"], top=5):
        assert (one.agreement, one.place_low, one.place_high, one.mean_negs) == (None, None, None, None)


def test_of_chosen_neurons_only_the_stored_ones_have_means(tmp_path):
    data = numbers("train")
    stored = write_split(tmp_path, "train", data, storage="stats", neurons=[3, 7])
    assert stored.stores_values([7, 8, 3]).tolist() == [True, False, True]
    found = module.stored_means(stored, [7, 8, 3])
    assert found[1] is None
    np.testing.assert_allclose([found[0], found[2]], data.negs_POM[:, :, [7, 3]].mean(axis=0).T)
    with pytest.raises(ShardError, match=r"does not hold neuron 1\.3 \(layer\.neuron\)"):
        stored.neurons([(1, 3)])


def test_blocks_of_layers_shards_and_memory_change_nothing(splits, tmp_path, monkeypatch):
    votes = {Vote("polar", "neg"): np.array([7, 2, 11]), Vote("magn", "gxa"): np.array([0, 14])}
    whole = neurons_ahead(splits["values"], range(N_LAYERS), votes, n_bootstrap=20)
    other = write_split(tmp_path, "train", numbers("train"), shard_rows=7)
    monkeypatch.setattr(module, "_SCORE_BYTES", 1)
    parts = [neurons_ahead(other, layers, votes, n_bootstrap=20) for layers in (range(1), range(1, N_LAYERS))]
    for vote, ahead_BK in whole.items():
        np.testing.assert_array_equal(ahead_BK, sum(part[vote] for part in parts))


@pytest.mark.parametrize("rule", ["polar", "magn"])
def test_scores_of_rows_add_up_to_the_score(rule):
    data = numbers("train")
    rows_PM = row_scores(rule, data.negs_POM, data.gold_P)
    np.testing.assert_array_equal(rows_PM.sum(axis=0), SCORES[rule](data.negs_POM, data.gold_P))


@pytest.mark.parametrize(("wrong", "words"), [({"top": 0}, "keep at least 1"), ({"n_bootstrap": 0}, "at least 1")])
def test_numbers_that_make_no_list_are_refused(splits, wrong, words):
    with pytest.raises(NegError, match=words):
        top_neurons(splits["values"], **wrong)


def test_nan_is_refused_with_its_rows_and_layer(tmp_path):
    data = numbers("train")
    data.negs_POM[20, 1, 7] = np.nan
    with pytest.raises(NegError, match="layer 1"):
        top_neurons(write_split(tmp_path, "train", data))


# One neuron


@pytest.mark.parametrize("storage", STORED)
def test_what_a_split_holds_of_a_neuron_is_read_at_every_level(splits, storage):
    data = numbers("train")
    rows = read_neuron(splits[storage], 1, 2)
    np.testing.assert_array_equal(rows.activations_P, data.activations_PM[:, 7])
    np.testing.assert_array_equal(rows.signs_PO, np.sign(data.negs_POM[:, :, 7]))
    if storage == "codes":
        assert rows.negs_PO is None and rows.most_moved(3) == []
    else:
        np.testing.assert_array_equal(rows.negs_PO, data.negs_POM[:, :, 7])


def test_the_prompts_moved_most_are_those_with_the_largest_neg_for_any_option(splits):
    rows = read_neuron(splits["values"], 1, 2)
    largest = sorted(range(len(rows.gold_P)), key=lambda row: (-max(abs(rows.negs_PO[row])), row))
    found = rows.most_moved(5)
    assert [one.row for one in found] == largest[:5]
    assert all(one.neg == rows.negs_PO[one.row, one.option] for one in found)
    assert all(abs(one.neg) == max(abs(rows.negs_PO[one.row])) for one in found)


def test_the_more_frequent_sign_is_told_with_its_share(splits):
    rows = read_neuron(splits["values"], 0, 1)
    for option in range(N_OPTIONS):
        signs = np.sign(numbers("train").negs_POM[:, option, 1]).tolist()
        sign, same = rows.same_sign(option)
        assert same == signs.count(sign) / len(signs) == max(signs.count(one) for one in (-1, 0, 1)) / len(signs)
    right = np.sign(numbers("train").negs_POM[np.arange(len(rows.gold_P)), rows.gold_P, 1]).tolist()
    sign, same = rows.same_sign()
    assert same == right.count(sign) / len(right) == max(right.count(one) for one in (-1, 0, 1)) / len(right)


def test_a_number_that_is_none_is_refused_with_its_row_and_neuron(tmp_path):
    data = numbers("train")
    data.negs_POM[20, 1, 7] = np.nan
    data.activations_PM[3, 2] = np.inf
    split = write_split(tmp_path, "train", data)
    for read in (lambda: read_neuron(split, 1, 2), lambda: neuron_means(split, [(0, 0), (1, 2)])):
        with pytest.raises(NegError, match=r"row 'train/20': NEG of neuron 1\.2 is nan"):
            read()
    with pytest.raises(NegError, match=r"row 'train/3': activation of neuron 0\.2 is inf"):
        read_neuron(split, 0, 2)


def test_rows_can_be_chosen(splits):
    rows = read_neuron(splits["values"], 0, 1)
    chosen = rows.chosen(rows.gold_P == 2)
    assert (chosen.gold_P == 2).all() and len(chosen.activations_P) == (rows.gold_P == 2).sum()
    np.testing.assert_array_equal(chosen.negs_PO, rows.negs_PO[rows.gold_P == 2])


def test_a_neuron_that_does_not_exist_is_named_by_layer_and_number(splits):
    with pytest.raises(ShardError, match=r"1\.5 is no neuron of 'm': it has layers 0\.\.2 with neurons 0\.\.4$"):
        read_neuron(splits["values"], 1, 5)


@pytest.mark.parametrize("rule", ["polar", "magn"])
def test_a_ranking_names_its_neurons_by_layer_and_number(splits, rule):
    ranking = negcore.rank(splits["values"], rule)
    assert (ranking.neurons_K2 @ [N_NEURONS, 1]).tolist() == ranking.order_K.tolist()
    best = ranking.top(3)
    assert best.neurons_K2.tolist() == ranking.neurons_K2[:3].tolist()
    assert best.scores_K.tolist() == ranking.scores_K[:3].tolist()
    negs_POK = splits["values"].neurons(best.neurons_K2)
    np.testing.assert_array_equal(negs_POK, numbers("train").negs_POM[:, :, ranking.order_K[:3]])
