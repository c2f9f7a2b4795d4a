"""Properties of skill neurons: pencil examples, and slow twins that see whole arrays and use plain loops and sets."""

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from stored_negs import N_ALL, N_LAYERS, N_ROWS, Numbers, numbers, write_split, write_splits

from negcore.analysis.shared_neurons import (
    common_neurons,
    genre_overlaps,
    jaccard_chance,
    layer_shares,
    overlaps,
    rank_with_random_ties,
)
from negcore.analysis.skills import (
    accuracy_by_neurons,
    accuracy_by_rows,
    band_starts,
    bands,
    forest_grid,
    training_sizes,
    transfer,
)
from negcore.errors import NegError
from negcore.measure.votes import VOTES, Ranking, Vote, argmax_features, magn_scores, polar_scores
from negcore.probing.evaluation import accuracy, choose_n_kept
from negcore.probing.fitted import fit_forest, fit_vote
from negcore.probing.forest import Forest
from negcore.probing.probes import MagnProbe, PolarProbe, TreeProbe
from negcore.probing.rankings import Rankings, rank_layers, training_scores

POLAR, MAGN = Vote("polar", "neg"), Vote("magn", "neg")
BOTH = pytest.mark.parametrize("vote", [POLAR, MAGN])
ESTIMATORS = {"polar": PolarProbe, "magn": MagnProbe}
SCORES = {"polar": polar_scores, "magn": magn_scores}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("run"))


def train_scores(vote, n_rows=N_ROWS):
    data = numbers("train")
    return SCORES[vote.rule](data.negs_POM[:n_rows], data.gold_P[:n_rows])


def measured(data, predicted_P):
    """The last three columns of a row."""
    result = accuracy(data.gold_P, np.asarray(predicted_P))
    return (result.value, *result.interval)


def figures(row):
    return (row.accuracy, row.low, row.high)


def sign(x):
    return int(x > 0) - int(x < 0)


def plain_votes(rule, v_O, polarity):
    if rule == "polar":
        return [sign(v) * polarity for v in v_O]
    directed = [v * polarity for v in v_O]
    return [int(v == max(directed)) for v in directed]


def plain_answers(rule, scores_M, neurons, negs_POM):
    """What these neurons vote for, each with the sign of its own score; ties go to the lowest option."""
    answers = []
    for negs_OM in negs_POM:
        totals = [0] * len(negs_OM)
        for m in neurons:
            for option, vote in enumerate(plain_votes(rule, negs_OM[:, m], sign(scores_M[m]))):
                totals[option] += vote
        answers.append(totals.index(max(totals)))
    return answers


def plain_order(scores_M):
    return sorted(range(len(scores_M)), key=lambda m: (-abs(scores_M[m]), m))


# Scores of the first rows


@pytest.mark.parametrize("shard_rows", [16, 40])
def test_scores_of_the_first_rows_are_those_of_a_split_with_only_these_rows(tmp_path, shard_rows):
    data, sizes = numbers("train"), [1, 7, 16, 20, 32, 33, 40]
    whole = write_split(tmp_path / "whole", "train", data, shard_rows=shard_rows)
    blocks = [training_scores(whole, layers, VOTES, [33, *sizes[::-1]]) for layers in (range(1), range(1, 3))]
    assert [list(block) for block in blocks] == [sizes, sizes]
    for size in sizes:
        few = write_split(tmp_path / str(size), "train", Numbers(*(values[:size] for values in data)))
        expected = rank_layers(few, range(N_LAYERS), VOTES, act=False)
        found = Rankings.joined([block[size] for block in blocks])
        for vote in VOTES:
            assert found.votes_M[vote].tolist() == expected.votes_M[vote].tolist(), (size, vote)


def test_scores_of_the_first_rows_read_every_row_once_and_none_behind_the_last_size(splits, monkeypatch):
    seen = []

    def counting(negs_PON, gold_P):
        seen.append(len(gold_P))
        return magn_scores(negs_PON, gold_P)

    monkeypatch.setattr("negcore.measure.votes.SCORES", {"magn": counting})
    training_scores(splits["train"], range(2, 3), [MAGN], [4, 16, 20])
    assert seen == [4, 12, 4]


@pytest.mark.parametrize("size", [0, 41])
def test_scores_of_rows_that_do_not_exist_are_refused_in_one_line(splits, size):
    with pytest.raises(
        NegError, match=rf"cannot score the first {size} rows of d: give a number in 1\.\.40"
    ) as refused:
        training_scores(splits["train"], range(N_LAYERS), [MAGN], [size])
    assert "\n" not in str(refused.value)


def test_a_neg_that_is_no_number_is_refused_with_the_place_of_its_piece_of_a_shard(tmp_path):
    data = numbers("train")
    data.negs_POM[17, 0, 6] = np.nan
    split = write_split(tmp_path, "train", data, shard_rows=40)
    with pytest.raises(NegError, match="d, rows from 'train/10' on, layer 1: NEG of row 7, option 0, neuron 1 is nan"):
        training_scores(split, range(N_LAYERS), [MAGN], [10, 40])
    assert list(training_scores(split, range(N_LAYERS), [MAGN], [10])) == [10]


def test_numbers_of_training_rows_double_from_sixteen_and_end_with_all():
    assert training_sizes(200) == [16, 32, 64, 128, 200]
    assert training_sizes(33) == [16, 32, 33]
    assert training_sizes(32) == [16, 32]
    assert training_sizes(16) == [16]
    assert training_sizes(1) == [1]


def test_votes_are_named_as_in_run_files():
    assert [vote.name for vote in VOTES[:3]] == ["polar", "polar-gradient", "polar-gxa"]


# Efficiency


@BOTH
def test_accuracy_by_neurons_is_that_of_the_best_and_of_as_many_drawn_ones(splits, vote):
    data, scores_M = numbers("test"), train_scores(vote)
    drawn = np.random.default_rng(3).choice(N_ALL, size=N_ALL, replace=False)
    neurons = {"best": plain_order(scores_M), "random": drawn.tolist()}
    rows = accuracy_by_neurons(vote, scores_M, splits["test"], seed=3)
    expected = [(order, k) for order in ("best", "random") for k in (1, 2, 4, 8, 15)]
    assert [(row.order, row.n_neurons) for row in rows] == expected
    assert {row.probe for row in rows} == {vote.rule}
    for row in rows:
        answers = plain_answers(vote.rule, scores_M, neurons[row.order][: row.n_neurons], data.negs_POM)
        assert figures(row) == measured(data, answers), row


def test_accuracy_by_neurons_ends_with_the_power_of_two_where_the_model_has_more(splits):
    rows = accuracy_by_neurons(MAGN, train_scores(MAGN), splits["test"], max_neurons=8, seed=0)
    assert [row.n_neurons for row in rows] == [1, 2, 4, 8] * 2


@BOTH
def test_accuracy_by_rows_is_that_of_probes_that_saw_the_first_rows_alone(splits, vote):
    sizes = [5, 16, 33, 40]
    scores = training_scores(splits["train"], range(N_LAYERS), [vote], sizes)
    by_size = {size: found.votes_M[vote] for size, found in scores.items()}
    rows = accuracy_by_rows(vote, by_size, splits["valid"], splits["test"], max_neurons=8)
    assert [row.n_train for row in rows] == sizes
    train, valid, test = (numbers(split) for split in ("train", "valid", "test"))
    for row in rows:
        few = train.negs_POM[: row.n_train], train.gold_P[: row.n_train]
        probes = {k: ESTIMATORS[vote.rule](n_kept=k).fit(*few) for k in (1, 2, 4, 8)}
        best = choose_n_kept({k: accuracy(valid.gold_P, one.predict(valid.negs_POM)) for k, one in probes.items()})
        assert (row.probe, row.n_neurons) == (vote.rule, best)
        assert figures(row) == measured(test, probes[best].predict(test.negs_POM))


# Robustness


def test_transfer_tests_the_probe_of_each_condition_on_the_prompts_of_every_condition(tmp_path):
    names = ["wording a", "wording b", "wording c"]
    data = {name: {split: numbers(split, name) for split in ("train", "valid", "test")} for name in names}
    splits = {
        name: {split: write_split(tmp_path, split, data[name][split], dataset=name) for split in data[name]}
        for name in names
    }
    fitted, scores = {}, {}
    for name in names:
        scores[name] = magn_scores(data[name]["train"].negs_POM, data[name]["train"].gold_P)
        fitted[name] = fit_vote(MAGN, scores[name], splits[name]["valid"], max_neurons=15)
    rows = transfer("magn", fitted, {name: splits[name]["test"] for name in names})
    assert [(row.trained_on, row.tested_on) for row in rows] == [(a, b) for a in names for b in names]
    for row in rows:
        kept = plain_order(scores[row.trained_on])[: row.n_neurons]
        test = data[row.tested_on]["test"]
        answers = plain_answers("magn", scores[row.trained_on], kept, test.negs_POM)
        assert row.n_neurons == fitted[row.trained_on].n_kept
        assert figures(row) == measured(test, answers), row


def test_forests_are_transferred_too(splits):
    forest = fit_forest(splits["train"], np.arange(N_ALL), seed=0)
    (row,) = transfer("tree", {"a": forest}, {"b": splits["test"]})
    assert (row.probe, row.n_neurons) == ("tree", N_ALL)
    assert figures(row) == measured(numbers("test"), forest.predict(splits["test"]))


def test_transfer_to_other_options_is_refused(splits, tmp_path):
    two = write_split(tmp_path, "test", numbers("test", n_options=2))
    probe = fit_vote(MAGN, train_scores(MAGN), splits["valid"], max_neurons=4)
    with pytest.raises(NegError, match="give 3 options"):
        transfer("magn", {"a": probe}, {"b": two})


# Flexibility


def test_bands_start_at_doubling_ranks_and_the_last_one_ends_the_ranking():
    assert band_starts(46080, 64)[:5] == [0, 64, 128, 256, 512]
    assert band_starts(46080, 64)[-2:] == [32768, 46016]
    assert band_starts(16, 4) == [0, 4, 8, 12]
    assert band_starts(17, 4) == [0, 4, 8, 13]
    assert band_starts(8, 4) == [0, 4]
    assert band_starts(7, 4) == [0]
    assert band_starts(4, 4) == [0]


@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_bands_never_have_a_neuron_in_common(width):
    for n_all in range(width, 80):
        starts = band_starts(n_all, width)
        assert all(start + width <= following for start, following in zip(starts, starts[1:], strict=False))
        assert starts[-1] + width == n_all or n_all < 2 * width


@BOTH
@pytest.mark.parametrize("width", [1, 2, 99])
def test_a_band_answers_by_the_votes_of_its_neurons_alone(splits, vote, width):
    data, scores_M = numbers("test"), train_scores(vote)
    scores_M[2:9:3] = 0  # these rank last and favour no option
    rows = bands(vote, scores_M, splits["test"], width=width)
    assert [row.first_rank for row in rows] == band_starts(N_ALL, min(width, N_ALL))
    assert rows[-1].end_rank == N_ALL
    for row in rows:
        neurons = plain_order(scores_M)[row.first_rank : row.end_rank]
        assert row.end_rank - row.first_rank == len(neurons) == min(width, N_ALL)
        assert figures(row) == measured(data, plain_answers(vote.rule, scores_M, neurons, data.negs_POM)), row


def test_a_band_without_neurons_is_refused(splits):
    with pytest.raises(NegError, match="keep at least 1 neuron"):
        bands(MAGN, train_scores(MAGN), splits["test"], width=0)


# Interdependency


def test_every_forest_of_the_grid_is_the_forest_grown_alone(splits):
    order_K = np.array([7, 3, 11, 0, 14, 5])
    train, test = numbers("train"), numbers("test")
    train_PF, test_PF = (argmax_features(data.negs_POM[:, :, order_K]) for data in (train, test))
    rows = forest_grid(splits["train"], splits["test"], order_K, seed=5, trees=(1, 3, 8), depths=(1, 3, None))
    assert [(row.depth, row.n_trees) for row in rows] == [(d, t) for d in (1, 3, None) for t in (1, 3, 8)]
    for row in rows:
        alone = TreeProbe(n_trees=row.n_trees, max_depth=row.depth, random_state=5).fit(train_PF, train.gold_P)
        assert max(tree.get_depth() for tree in alone.forest_.estimators_) <= (row.depth or 99)
        assert row.n_neurons == len(order_K)
        assert figures(row) == measured(test, alone.predict(test_PF)), row


def test_the_first_trees_of_a_forest_answer_as_the_smaller_forest_of_the_same_seed():
    rng = np.random.default_rng(1)
    features_PF, gold_P = rng.integers(0, 3, (150, 6)).astype(np.uint8), rng.integers(0, 3, 150)
    counts = [1, 2, 5, 12]
    large = TreeProbe(n_trees=12, max_depth=2, random_state=9).fit(features_PF[:60], gold_P[:60])
    found_PJ = Forest.of(large.forest_).predict_by_trees(features_PF, counts)
    for n_trees, found_P in zip(counts, found_PJ.T, strict=True):
        small = TreeProbe(n_trees=n_trees, max_depth=2, random_state=9).fit(features_PF[:60], gold_P[:60])
        assert found_P.tolist() == small.predict(features_PF).tolist()
    assert len({tuple(found_P) for found_P in found_PJ.T}) == len(counts)


def test_a_tree_of_one_question_cannot_learn_what_two_neurons_tell_together():
    features_PF = np.array([[0, 0], [0, 1], [1, 0], [1, 1]] * 20, np.uint8)
    gold_P = features_PF[:, 0] ^ features_PF[:, 1]
    shallow, deep = (TreeProbe(n_trees=10, max_depth=depth).fit(features_PF, gold_P) for depth in (1, None))
    assert accuracy(gold_P, deep.predict(features_PF)).value == 1
    assert accuracy(gold_P, shallow.predict(features_PF)).value < 1


# Shared neurons


def scores_of(names, *, n_all=60, seed=0):
    """Scores with many ties, zeros and both signs."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-4, 5, n_all) for name in names}


def test_a_ranking_by_lot_draws_the_order_of_equal_neurons_and_nothing_else():
    scores = scores_of(["a", "b"])
    for dataset, ranking in rank_with_random_ties(scores, seed=1).items():
        ordered = scores[dataset][ranking.order_K]
        assert sorted(ranking.order_K.tolist()) == list(range(60))
        assert np.all(np.diff(np.abs(ordered)) <= 0)
        assert ranking.polarity_K.tolist() == np.sign(ordered).tolist()
    distinct = np.array([3, -9, 0, 7, -1])
    (drawn,) = rank_with_random_ties({"a": distinct}, seed=1).values()
    assert drawn.order_K.tolist() == Ranking.from_scores(distinct).order_K.tolist()


def test_a_draw_depends_on_the_seed_and_the_dataset_alone():
    scores = dict.fromkeys(("a", "b"), np.zeros(60, np.int64))
    both, again, other = (rank_with_random_ties(scores, seed=seed) for seed in (1, 1, 2))
    alone = rank_with_random_ties({"b": scores["b"]}, seed=1)
    assert both["b"].order_K.tolist() == again["b"].order_K.tolist() == alone["b"].order_K.tolist()
    assert len({tuple(one.order_K) for one in (both["a"], both["b"], other["a"], other["b"])}) == 4


def test_neurons_that_are_equal_in_two_datasets_are_not_shared_more_than_by_chance():
    equal = dict.fromkeys(("a", "b"), np.ones(2000, np.int64))
    (row,) = overlaps("magn", rank_with_random_ties(equal, seed=0), {"a": "x", "b": "x"}, [400])
    assert row.chance / 2 < row.jaccard < 2 * row.chance
    by_index = {name: Ranking.from_scores(scores_M) for name, scores_M in equal.items()}
    assert overlaps("magn", by_index, {"a": "x", "b": "x"}, [400])[0].jaccard == 1


def test_equal_neurons_do_not_look_like_a_preference_for_early_layers():
    (ranking,) = rank_with_random_ties({"a": np.ones(3000, np.int64)}, seed=0).values()
    shares = [row.share for row in layer_shares("magn", ranking, [600], [1000] * 3)]
    assert min(shares) > 0.25


@pytest.mark.parametrize(("n_all", "top"), [(5, 2), (6, 4), (7, 1), (4, 4)])
def test_chance_is_what_counting_all_pairs_of_sets_gives(n_all, top):
    first = set(range(top))
    found = [Fraction(len(first & set(other)), len(first | set(other))) for other in combinations(range(n_all), top)]
    assert len(found) == comb(n_all, top)
    chance = jaccard_chance(top, n_all)
    assert chance.mean == pytest.approx(float(sum(found) / len(found)))
    within = [one for one in sorted(found) if sum(other <= one for other in found) >= 0.975 * len(found)]
    assert chance.high == pytest.approx(float(within[0]))


def test_overlaps_are_those_of_plain_sets():
    names, tops = ["a", "b", "c"], [1, 8, 60, 99]
    genres = {"a": "x", "b": "y", "c": "x"}
    ranked = rank_with_random_ties(scores_of(names), seed=0)
    rows = overlaps("polar", ranked, genres, tops)
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    assert [(row.top, row.dataset_a, row.dataset_b) for row in rows] == [
        (t, *pair) for t in (1, 8, 60) for pair in pairs
    ]
    for row in rows:
        one, other = (set(ranked[name].order_K[: row.top].tolist()) for name in (row.dataset_a, row.dataset_b))
        assert (row.probe, row.genre_a, row.genre_b) == ("polar", genres[row.dataset_a], genres[row.dataset_b])
        assert row.n_shared == len(one & other)
        assert row.jaccard == len(one & other) / len(one | other)
        assert (row.chance, row.chance_high) == jaccard_chance(row.top, 60)


def test_genres_get_the_mean_of_their_pairs_and_one_with_itself_only_if_it_has_two_datasets():
    names = ["a", "b", "c", "d"]
    genres = {"a": "y", "b": "x", "c": "y", "d": "z"}
    rows = overlaps("magn", rank_with_random_ties(scores_of(names), seed=0), genres, [8, 16])
    found = genre_overlaps(rows)
    expected = {("x", "y"): ["ab", "bc"], ("y", "y"): ["ac"], ("y", "z"): ["ad", "cd"], ("x", "z"): ["bd"]}
    assert {(row.genre_a, row.genre_b) for row in found} == set(expected)
    assert len(found) == 8
    for row in found:
        pairs = expected[row.genre_a, row.genre_b]
        values = [one.jaccard for one in rows if one.top == row.top and one.dataset_a + one.dataset_b in pairs]
        assert (row.probe, row.n_pairs) == ("magn", len(pairs))
        assert row.jaccard == pytest.approx(sum(values) / len(pairs))
        assert row.chance == pytest.approx(jaccard_chance(row.top, 60).mean)


def test_layer_shares_by_pencil():
    # Two layers of three neurons; the best are 4, 0 and 5.
    ranking = Ranking.from_scores(np.array([-8, 1, 0, 2, 9, -7]))
    rows = layer_shares("magn", ranking, [1, 3, 50], [3] * 2)
    assert [(row.top, row.layer, row.share) for row in rows] == [
        (1, 0, 0.0),
        (1, 1, 1.0),
        (3, 0, 1 / 3),
        (3, 1, 2 / 3),
        (6, 0, 0.5),
        (6, 1, 0.5),
    ]
    assert {(row.probe, row.uniform) for row in rows} == {("magn", 0.5)}


def test_common_neurons_by_pencil():
    # Layers of two neurons. Orders: 1 3 0 2 and 3 1 2 0 and 3 0 1 2.
    scores = {"a": np.array([5, 9, 1, 7]), "b": np.array([1, -8, 2, 9]), "c": np.array([-6, -5, 0, 9])}
    ranked = {name: Ranking.from_scores(scores_M) for name, scores_M in scores.items()}
    rows = common_neurons("magn", ranked, [1, 3], layer_width=2)
    assert [(row.top, row.layer, row.neuron, row.worst_rank, row.n_same_polarity) for row in rows] == [
        (3, 1, 1, 1, 3),
        (3, 0, 1, 2, 2),
    ]


def test_common_neurons_are_those_of_plain_sets_and_ranks():
    names = ["a", "b", "c", "d"]
    scores = scores_of(names)
    ranked = rank_with_random_ties(scores, seed=0)
    ranks = {name: {m: rank for rank, m in enumerate(ranked[name].order_K.tolist())} for name in names}
    rows = common_neurons("polar", ranked, [30, 60], layer_width=7)
    assert {row.top for row in rows} == {30, 60}
    for top in (30, 60):
        shared = set.intersection(*(set(ranked[name].order_K[:top].tolist()) for name in names))
        worst = {m: max(ranks[name][m] for name in names) for m in shared}
        signs = {m: [sign(scores[name][m]) for name in names] for m in shared}
        expected = [
            (*divmod(m, 7), worst[m], max(signs[m].count(1), signs[m].count(-1)))
            for m in sorted(shared, key=lambda m: (worst[m], m))
        ]
        found = [(row.layer, row.neuron, row.worst_rank, row.n_same_polarity) for row in rows if row.top == top]
        assert found == expected
