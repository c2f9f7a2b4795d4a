"""Rankings over shards, and fitted probes that read few neurons."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from stored_negs import N_ALL, N_LAYERS, N_OPTIONS, N_ROWS, numbers, write_split, write_splits

from negcore.errors import NegError
from negcore.measure.votes import VOTES, Ranking, Vote, argmax_features
from negcore.probing import fitted
from negcore.probing.act_probe import ActProbe
from negcore.probing.evaluation import accuracy, choose_n_kept
from negcore.probing.fitted import (
    check_forest_size,
    fit_act,
    fit_forest,
    fit_logistic,
    fit_vote,
    random_vote,
)
from negcore.probing.probes import MagnProbe, PolarProbe, TreeProbe
from negcore.probing.rankings import Rankings, rank, rank_layers

POLAR, MAGN = Vote("polar", "neg"), Vote("magn", "neg")
ESTIMATORS = {"polar": PolarProbe, "magn": MagnProbe}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("run"))


def ranked(split, votes=VOTES, n_blocks=2):
    ends = [N_LAYERS * i // n_blocks for i in range(n_blocks + 1)]
    blocks = [range(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return Rankings.joined([rank_layers(split, layers, votes, act=True) for layers in blocks])


def plain_effect(signal, neg, activation):
    """By the definition: NEG is the gradient in the direction away from zero."""
    gradient = neg * (1 if activation > 0 else -1)
    return {"neg": neg, "gradient": gradient, "gxa": gradient * activation}[signal]


def effects_of(data, signal):
    p, o, m = data.negs_POM.shape
    return np.array(
        [
            [
                [plain_effect(signal, data.negs_POM[i, j, k], data.activations_PM[i, k]) for k in range(m)]
                for j in range(o)
            ]
            for i in range(p)
        ],
        np.float32,
    )


# Rankings


@pytest.mark.parametrize("vote", VOTES)
def test_summed_scores_choose_the_neurons_and_answers_of_a_probe_that_sees_everything(splits, vote):
    data = {split: numbers(split) for split in splits}
    effects = {split: effects_of(data[split], vote.signal) for split in splits}
    widest = ESTIMATORS[vote.rule](n_kept=15).fit(effects["train"], data["train"].gold_P)
    curve = widest.accuracy_by_k(effects["valid"][:, :, widest.kept_], data["valid"].gold_P)
    whole = ESTIMATORS[vote.rule](n_kept=choose_n_kept(curve)).fit(effects["train"], data["train"].gold_P)
    probe = fit_vote(vote, ranked(splits["train"]).votes_M[vote], splits["valid"], max_neurons=15)
    assert probe.ranking.order_K.tolist() == whole.kept_.tolist()
    assert probe.accuracy_by_k(splits["valid"]) == {k: v for k, v in curve.items() if k <= probe.n_kept}
    assert probe.predict(splits["test"]).tolist() == whole.predict(effects["test"]).tolist()


@pytest.mark.parametrize("vote", VOTES)
def test_a_ranking_has_all_neurons_in_the_order_of_a_probe_that_keeps_them_all(splits, vote):
    data, ranking = numbers("train"), rank(splits["train"], *vote)
    whole = ESTIMATORS[vote.rule](n_kept=N_ALL).fit(effects_of(data, vote.signal), data.gold_P)
    assert ranking.order_K.tolist() == whole.kept_.tolist()
    assert ranking.polarity_K.tolist() == whole.polarity_.tolist()


@pytest.mark.parametrize("n_blocks", [1, 3])
def test_blocks_of_layers_join_to_the_whole(splits, n_blocks):
    joined, whole = ranked(splits["train"], n_blocks=n_blocks), ranked(splits["train"], n_blocks=2)
    for vote in VOTES:
        assert joined.votes_M[vote].tolist() == whole.votes_M[vote].tolist()
    assert joined.act.scores_SM.tolist() == whole.act.scores_SM.tolist()


def test_activations_scored_over_shards_make_the_act_probe_that_sees_everything(splits):
    data = {split: numbers(split) for split in splits}
    acts = {k: ActProbe(n_kept=k).fit(data["train"].activations_PM, data["train"].gold_P) for k in (1, 2, 4, 8)}
    curve = {k: accuracy(data["valid"].gold_P, act.predict(data["valid"].activations_PM)) for k, act in acts.items()}
    probe = fit_act(ranked(splits["train"]).act, splits["train"].gold_P, splits["valid"], max_neurons=15)
    assert probe.n_kept == choose_n_kept(curve)
    expected = acts[probe.n_kept].predict(data["test"].activations_PM)
    assert probe.predict(splits["test"]).tolist() == expected.tolist()


def test_gradient_times_activation_votes_as_neg_does_where_no_activation_is_zero():
    data = numbers("test")
    away = np.where(data.activations_PM == 0, 1, data.activations_PM)
    gxa = effects_of(data._replace(activations_PM=away), "gxa")
    assert np.array_equal(np.sign(gxa), np.sign(data.negs_POM))
    assert np.array_equal(argmax_features(gxa), argmax_features(data.negs_POM))


def test_a_neg_that_is_no_number_is_refused_with_its_prompts_and_layer(tmp_path):
    broken = numbers("train")
    broken.negs_POM[17, 0, 6] = np.nan
    split = write_split(tmp_path, "train", broken)
    with pytest.raises(NegError, match="d, rows from 'train/16' on, layer 1: NEG of row 1, option 0, neuron 1 is nan"):
        rank_layers(split, range(N_LAYERS), [MAGN], act=False)


def test_a_number_of_a_kept_neuron_that_is_none_is_refused_by_every_probe_with_row_layer_and_number(splits, tmp_path):
    broken = numbers("test")
    broken.negs_POM[17, 2, 7] = np.nan
    broken.activations_PM[20, 11] = np.inf
    test = write_split(tmp_path, "test", broken)
    order_K, gxa = np.array([7, 11]), Vote("magn", "gxa")
    probes = [
        fitted.FittedVote(MAGN, Ranking(order_K, np.ones(2, np.int8)), N_OPTIONS, 15),
        fit_forest(splits["train"], order_K, seed=0),
        fit_logistic(POLAR, order_K, splits["train"]),
    ]
    for probe in probes:
        with pytest.raises(NegError, match=r"^d, row 'test/17': NEG of neuron 1\.2 is nan: NaN and inf are refused"):
            probe.predict(test)
    for probe in (
        fitted.FittedVote(gxa, Ranking(order_K[1:], np.ones(1, np.int8)), N_OPTIONS, 15),
        fit_logistic(gxa, order_K[1:], splits["train"]),
    ):
        with pytest.raises(NegError, match=r"row 'test/20': activation of neuron 2\.1 is inf"):
            probe.predict(test)


# Forest and baselines


def test_the_forest_as_arrays_answers_as_scikit_learns(splits):
    order_K = np.arange(15)
    train, test = (argmax_features(numbers(split).negs_POM) for split in ("train", "test"))
    expected = TreeProbe(random_state=3).fit(train, numbers("train").gold_P).predict(test)
    assert fit_forest(splits["train"], order_K, seed=3).predict(splits["test"]).tolist() == expected.tolist()


def test_a_forest_that_would_not_fit_is_refused_with_the_number_that_does():
    with pytest.raises(NegError, match="set --tree-neurons to at most 858") as refused:
        check_forest_size(1_000_000, 8192)
    check_forest_size(1_000_000, 858)
    assert "\n" not in str(refused.value)


def test_random_neurons_are_as_many_differ_by_seed_and_keep_their_own_polarity(splits):
    scores_M = ranked(splits["train"]).votes_M[MAGN]
    best = fit_vote(MAGN, scores_M, splits["valid"], max_neurons=15).cut(1)
    wide = fitted.FittedVote(MAGN, best.ranking, N_OPTIONS, 15)
    draws = [random_vote(wide, scores_M, seed=seed).ranking for seed in (1, 1, *range(2, 12))]
    assert draws[0].order_K.tolist() == draws[1].order_K.tolist()
    assert len({int(draw.order_K[0]) for draw in draws}) > 1
    assert all(draw.polarity_K.tolist() == np.sign(scores_M[draw.order_K]).tolist() for draw in draws)


@pytest.mark.parametrize("n_options", [2, 3])
def test_logistic_regression_reads_the_standardised_values_of_the_given_neurons(tmp_path, n_options):
    data = {split: numbers(split, n_options=n_options) for split in ("train", "test")}
    train, test = (write_split(tmp_path, split, of_split) for split, of_split in data.items())
    order_K = np.array([7, 2, 11])
    values = {split: of_split.negs_POM[:, :, order_K] for split, of_split in data.items()}
    mean, scale = values["train"].mean(axis=0), values["train"].std(axis=0)
    flat = {split: ((x - mean) / scale).reshape(len(x), -1) for split, x in values.items()}
    model = LogisticRegression(max_iter=200).fit(flat["train"], data["train"].gold_P)
    probe = fit_logistic(POLAR, order_K, train)
    assert probe.predict(test).tolist() == model.predict(flat["test"]).tolist()
    assert len(set(probe.predict(test).tolist())) == n_options


def test_logistic_regression_reads_no_more_neurons_than_there_is_room_for(splits, monkeypatch):
    monkeypatch.setattr(fitted, "LOGISTIC_VALUES", N_ROWS * N_OPTIONS * 4)
    probe = fit_logistic(MAGN, np.arange(15), splits["train"])
    assert probe.order_K.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("probe", ["polar", "magn", "random", "act", "tree", "logistic"])
def test_a_probe_answers_with_the_option_of_the_largest_score(splits, probe):
    train, valid, test = (splits[name] for name in ("train", "valid", "test"))
    rankings, scores_M = ranked(train), ranked(train).votes_M[MAGN]
    made = {
        "polar": lambda: fit_vote(POLAR, rankings.votes_M[POLAR], valid, max_neurons=8),
        "magn": lambda: fit_vote(MAGN, scores_M, valid, max_neurons=8),
        "random": lambda: random_vote(fit_vote(MAGN, scores_M, valid, max_neurons=8), scores_M, seed=0),
        "act": lambda: fit_act(rankings.act, train.gold_P, valid, max_neurons=8),
        "tree": lambda: fit_forest(train, np.arange(6), seed=0),
        "logistic": lambda: fit_logistic(MAGN, np.arange(6), train),
    }[probe]()
    scores_PO = made.scores(test)
    assert scores_PO.shape == (N_ROWS, N_OPTIONS) and scores_PO.dtype == np.float64
    assert scores_PO.argmax(axis=1).tolist() == made.predict(test).tolist()
    if probe in ("tree", "logistic"):
        np.testing.assert_allclose(scores_PO.sum(axis=1), 1, rtol=1e-6)
