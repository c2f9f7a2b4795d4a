"""Probes: pencil examples, slow twins, sums over blocks, and scikit-learn's own checks."""

from fractions import Fraction

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from negcore.errors import NegError
from negcore.measure import votes
from negcore.measure.votes import Ranking, argmax_features, magn_scores, polar_scores
from negcore.probing.act_probe import ActProbe
from negcore.probing.act_scores import halvings
from negcore.probing.evaluation import accuracy
from negcore.probing.probes import LMProbe, MagnProbe, PolarProbe, TreeProbe

VOTE_PROBES = pytest.mark.parametrize("probe_type", [PolarProbe, MagnProbe])
OPTIONS = pytest.mark.parametrize("n_options", [2, 3, 4, 5])

# Two prompts, two options, three neurons; the gold options are 0 and 1.
PENCIL_NEGS = np.array([[[1, -2, 0], [-1, -1, 3]], [[2, 5, 1], [3, -1, -1]]], np.float32)
PENCIL_GOLD = np.array([0, 1])


def tied_negs(n_options, n_rows=23, n_neurons=21, seed=0):
    """NEGs and gold options with many zeros and many equal options."""
    rng = np.random.default_rng([seed, n_options])
    negs_POM = rng.integers(-2, 3, (n_rows, n_options, n_neurons)).astype(np.float32)
    return negs_POM, rng.integers(0, n_options, n_rows)


def sign(x):
    return int(x > 0) - int(x < 0)


def from_scores(probe_type, scores_M, *, n_kept, n_options):
    ranking = Ranking.from_scores(scores_M).top(n_kept)
    return probe_type.from_ranking(ranking, n_options=n_options, n_all=len(scores_M))


# Slow twins


def polar_score(negs_PO, gold_P):
    return sum(2 * sign(v_O[g]) - sum(sign(v) for v in v_O) for v_O, g in zip(negs_PO, gold_P, strict=True))


def magn_score(negs_PO, gold_P):
    return sum(sign(v_O[g] - v) for v_O, g in zip(negs_PO, gold_P, strict=True) for v in v_O)


def polar_vote(v_O, polarity):
    return [sign(v) * polarity for v in v_O]


def magn_vote(v_O, polarity):
    directed = [v * polarity for v in v_O]
    return [int(v == max(directed)) for v in directed]


TWINS = {PolarProbe: (polar_score, polar_vote), MagnProbe: (magn_score, magn_vote)}
SCORES = {PolarProbe: polar_scores, MagnProbe: magn_scores}


def twin_predictions(probe_type, train_POM, gold_P, test_POM, k):
    score, vote = TWINS[probe_type]
    scores = [score(train_POM[:, :, m], gold_P) for m in range(train_POM.shape[2])]
    kept = sorted(range(len(scores)), key=lambda m: (-abs(scores[m]), m))[:k]
    predictions = []
    for negs_OM in test_POM:
        totals = np.sum([vote(negs_OM[:, m], sign(scores[m])) for m in kept], axis=0)
        predictions.append(min(o for o in range(len(totals)) if totals[o] == max(totals)))
    return predictions


# Polar and Magn


def test_polar_by_pencil():
    assert polar_scores(PENCIL_NEGS, PENCIL_GOLD).tolist() == [2, -2, -3]
    probe = PolarProbe(n_kept=2).fit(PENCIL_NEGS, PENCIL_GOLD)
    assert probe.kept_.tolist() == [2, 0]
    assert probe.polarity_.tolist() == [-1, 1]
    assert probe.classes_.tolist() == [0, 1]
    # Neuron 2 says (-1, +1), neuron 0 (+1, +1).
    assert probe.predict(np.array([[[4.0, 9.0, 1.0], [3.0, -9.0, -1.0]]])).tolist() == [1]


def test_magn_by_pencil():
    assert magn_scores(PENCIL_NEGS, PENCIL_GOLD).tolist() == [2, -2, -2]
    probe = MagnProbe(n_kept=3).fit(PENCIL_NEGS, PENCIL_GOLD)
    assert probe.kept_.tolist() == [0, 1, 2]
    assert probe.polarity_.tolist() == [1, -1, -1]
    # Neurons 0 and 2 see equal options and vote for both; neuron 1, against its NEG, for option 1: 2 to 3.
    prompt = np.array([[[1.0, 1.0, 4.0], [1.0, 0.0, 4.0]]])
    assert probe.predict(prompt).tolist() == [1]
    assert MagnProbe(n_kept=1).fit(PENCIL_NEGS, PENCIL_GOLD).predict(prompt).tolist() == [0]


@VOTE_PROBES
@OPTIONS
def test_scores_and_predictions_equal_those_of_plain_loops(probe_type, n_options):
    train, gold = tied_negs(n_options)
    test, _ = tied_negs(n_options, seed=1)
    expected = [TWINS[probe_type][0](train[:, :, m], gold) for m in range(train.shape[2])]
    assert SCORES[probe_type](train, gold).tolist() == expected
    for k in (1, 2, 7, 21):
        predictions = probe_type(n_kept=k).fit(train, gold).predict(test)
        assert predictions.tolist() == twin_predictions(probe_type, train, gold, test, k)


@VOTE_PROBES
def test_scores_add_up_over_rows_and_join_over_neurons(probe_type):
    negs, gold = tied_negs(4)
    scores = SCORES[probe_type]
    joined = [
        sum(scores(negs[rows, :, neurons], gold[rows]) for rows in (slice(0, 9), slice(9, 9), slice(9, None)))
        for neurons in (slice(0, 1), slice(1, 14), slice(14, None))
    ]
    assert scores(negs, gold).dtype == np.int64
    assert np.array_equal(np.concatenate(joined), scores(negs, gold))


@VOTE_PROBES
def test_results_do_not_depend_on_the_size_of_the_inner_blocks(probe_type, monkeypatch):
    negs, gold = tied_negs(3)

    def results():
        probe = probe_type(n_kept=16).fit(negs, gold)
        return SCORES[probe_type](negs, gold).tolist(), probe.accuracy_by_k(negs[:, :, probe.kept_], gold)

    in_one_block = results()
    monkeypatch.setattr(votes, "_BLOCK_VALUES", 2 * 3 * 21)  # two rows at a time, the last alone
    assert results() == in_one_block


@VOTE_PROBES
def test_a_probe_from_summed_scores_is_the_fitted_probe(probe_type):
    negs, gold = tied_negs(4)
    fitted = probe_type(n_kept=5).fit(negs, gold)
    summed = from_scores(probe_type, SCORES[probe_type](negs, gold), n_kept=5, n_options=4)
    for name in ("kept_", "polarity_", "classes_", "n_features_in_"):
        assert np.array_equal(getattr(fitted, name), getattr(summed, name)), name
    assert np.array_equal(summed.predict(negs), fitted.predict(negs))
    assert np.array_equal(summed.predict_kept(negs[:, :, summed.kept_]), fitted.predict(negs))


@VOTE_PROBES
@OPTIONS
def test_accuracy_by_k_equals_a_new_probe_for_each_k(probe_type, n_options):
    train, gold = tied_negs(n_options)
    held_out, held_out_gold = tied_negs(n_options, seed=1)
    widest = probe_type(n_kept=21).fit(train, gold)
    curve = widest.accuracy_by_k(held_out[:, :, widest.kept_], held_out_gold)
    assert list(curve) == [1, 2, 4, 8, 16]
    for k, measured in curve.items():
        refitted = probe_type(n_kept=k).fit(train, gold)
        assert measured == accuracy(held_out_gold, refitted.predict(held_out))


@VOTE_PROBES
def test_accuracies_by_k_of_two_blocks_add_up(probe_type):
    negs, gold = tied_negs(4)
    probe = probe_type(n_kept=8).fit(negs, gold)
    kept = negs[:, :, probe.kept_]
    first, second = (probe.accuracy_by_k(kept[rows], gold[rows]) for rows in (slice(0, 10), slice(10, None)))
    assert {k: first[k] + second[k] for k in first} == probe.accuracy_by_k(kept, gold)


@VOTE_PROBES
def test_a_table_of_negs_is_read_option_by_option(probe_type):
    negs, gold = tied_negs(3)
    table = np.concatenate([negs[:, 0], negs[:, 1], negs[:, 2]], axis=1)
    labels = np.array(["ant", "bee", "cat"])
    from_table = probe_type(n_kept=4).fit(table, labels[gold])
    from_axes = probe_type(n_kept=4).fit(negs, gold)
    assert from_table.classes_.tolist() == ["ant", "bee", "cat"]
    assert from_table.n_features_in_ == from_axes.n_features_in_ == 3 * 21
    assert np.array_equal(from_table.predict(table), labels[from_axes.predict(negs)])


@VOTE_PROBES
def test_an_option_that_is_never_gold_stays_an_option(probe_type):
    negs, gold = tied_negs(4)
    probe = probe_type().fit(negs, np.minimum(gold, 2))
    assert probe.classes_.tolist() == [0, 1, 2, 3]
    assert 3 in probe.predict(negs)


@VOTE_PROBES
def test_neurons_of_score_zero_favour_no_option(probe_type):
    decided = from_scores(probe_type, [0, 1, 0], n_kept=1, n_options=3)
    with_zeros = from_scores(probe_type, [0, 1, 0], n_kept=3, n_options=3)
    negs, _ = tied_negs(3, n_neurons=3)
    assert with_zeros.polarity_.tolist() == [1, 0, 0]
    assert np.array_equal(with_zeros.predict(negs), decided.predict(negs))


def test_neurons_rank_by_size_of_score_and_then_by_index():
    ranking = Ranking.from_scores(np.array([1, -3, 0, 3, -1, 3]))
    assert ranking.order_K.tolist() == [1, 3, 5, 0, 4, 2]
    assert ranking.polarity_K.tolist() == [-1, 1, 1, 1, -1, 0]
    assert ranking.top(2).order_K.tolist() == [1, 3]
    assert ranking.top(99).order_K.tolist() == ranking.order_K.tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("reader", [polar_scores, magn_scores, lambda negs, gold: argmax_features(negs)])
def test_a_neg_that_is_no_number_is_refused_with_its_place(reader, value, monkeypatch):
    monkeypatch.setattr(votes, "_BLOCK_VALUES", 100)
    negs, gold = tied_negs(4)
    negs[17, 2, 5] = value
    with pytest.raises(NegError, match=f"NEG of row 17, option 2, neuron 5 is {value}"):
        reader(negs, gold)


@VOTE_PROBES
def test_a_kept_neuron_that_is_no_number_is_refused_by_its_flat_index(probe_type):
    negs, gold = tied_negs(4)
    probe = probe_type(n_kept=4).fit(negs, gold)
    negs[3, 1, probe.kept_[2]] = np.nan
    for answer in (lambda: probe.predict(negs), lambda: probe.accuracy_by_k(negs[:, :, probe.kept_], gold)):
        with pytest.raises(NegError, match=f"row 3, option 1, neuron {probe.kept_[2]} is nan"):
            answer()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: polar_scores(PENCIL_NEGS, [0, 2]), "row 1: gold option 2 is not one of the 2"),
        (lambda: polar_scores(PENCIL_NEGS, [0]), "1 gold options for 2 rows"),
        (lambda: polar_scores(PENCIL_NEGS[0], [0, 1]), "give .prompts, options, neurons"),
        (lambda: PolarProbe(n_kept=0).fit(PENCIL_NEGS, PENCIL_GOLD), "n_kept is 0"),
        (lambda: from_scores(PolarProbe, [1, 2], n_kept=1, n_options=0), "n_options is 0"),
        (lambda: from_scores(PolarProbe, [0.5], n_kept=1, n_options=2), "one integer a neuron"),
        (lambda: PolarProbe().fit(np.ones((2, 3)), [0, 1]), "3 columns, no multiple of the 2 options"),
        (lambda: PolarProbe().fit(PENCIL_NEGS, ["a", "b"]), "one integer a prompt"),
        (
            lambda: PolarProbe().fit(PENCIL_NEGS, PENCIL_GOLD).predict(np.ones((1, 3, 2))),
            "3 options: this probe was fitted on 2",
        ),
        (
            lambda: PolarProbe(n_kept=2).fit(PENCIL_NEGS, PENCIL_GOLD).predict_kept(PENCIL_NEGS),
            "2 options x 2 kept neurons",
        ),
        (lambda: argmax_features(np.ones((1, 1, 2))), "1 options: features of one byte need 2..256"),
        (lambda: argmax_features(np.ones((1, 257, 2))), "257 options"),
    ],
)
def test_input_of_the_wrong_kind_is_refused_in_one_line(call, message):
    with pytest.raises(NegError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# The language model's own answer


def test_lm_answers_the_most_probable_option_and_the_lowest_of_equal_ones():
    probs_PO = np.array([[0.1, 0.3, 0.2], [0.2, 0.1, 0.2], [0.0, 0.0, 0.0]])
    probe = LMProbe().fit(probs_PO)
    assert probe.classes_.tolist() == [0, 1, 2]
    assert probe.predict(probs_PO).tolist() == [1, 0, 0]


def test_a_probability_that_is_no_number_is_refused_with_its_place():
    probs_PO = np.array([[0.1, 0.3], [0.2, np.nan]])
    with pytest.raises(NegError, match="probability of row 1, option 1 is nan"):
        LMProbe().fit(np.ones((2, 2))).predict(probs_PO)


# Activations


def act_twin(train, labels, classes, k, prompt):
    """Predict one prompt, exactly, by the definition: integer activations, fractions, lists."""
    if len(classes) == 1:
        return classes[0]
    lower, upper = classes[: len(classes) // 2], classes[len(classes) // 2 :]
    rows = [i for i, label in enumerate(labels) if label in classes]
    ranked = []
    for m in range(train.shape[1]):
        mean = Fraction(sum(int(train[i, m]) for i in rows), len(rows))
        right = sum((int(train[i, m]) > mean) == (labels[i] in upper) for i in rows)
        edge = Fraction(right, len(rows)) - Fraction(1, 2)
        ranked.append((-abs(edge), m, sign(edge) * (1 if int(prompt[m]) > mean else -1)))
    side = upper if sum(vote for _, _, vote in sorted(ranked)[:k]) > 0 else lower
    return act_twin(train, labels, side, k, prompt)


def test_act_by_pencil():
    # Means 2 and 5. Neuron 0 is above its mean for class 1 only; neuron 1 for class 0 only.
    train = np.array([[1, 6], [1, 6], [3, 4], [3, 4]], np.float32)
    probe = ActProbe(n_kept=2).fit(train, [0, 0, 1, 1])
    assert probe.threshold_.tolist() == [[2, 5]]
    assert probe.kept_.tolist() == [[0, 1]]
    assert probe.polarity_.tolist() == [[1, -1]]
    # At the threshold is not above it, so (2, 5) is one vote each: a draw goes to the lower half.
    assert probe.predict([[9.0, 0.0], [0.0, 9.0], [2.0, 5.0]]).tolist() == [1, 0, 0]


def test_act_splits_sorted_classes_into_halves_the_lower_one_smaller():
    probe = ActProbe().fit(np.arange(10.0).reshape(5, 2), list("ecdba"))
    assert probe.classes_.tolist() == list("abcde")
    assert list(halvings(0, 5)) == [(0, 2, 5), (0, 1, 2), (2, 3, 5), (3, 4, 5)]
    # Neuron 0 holds 8, 6, 2, 4, 0 for the classes a to e, and each split keeps its mean over the split's classes.
    assert probe.threshold_[:, probe.kept_[0] == 0].ravel().tolist() == [4, 7, 2, 2]


@pytest.mark.parametrize("block_values", [2**22, 30])
@OPTIONS
def test_act_equals_its_definition(n_options, block_values, monkeypatch):
    monkeypatch.setattr(votes, "_BLOCK_VALUES", block_values)
    rng = np.random.default_rng(n_options)
    train, test = rng.integers(-2, 3, (2, 30, 9)).astype(np.float32)
    labels = rng.permutation(np.arange(30) % n_options)
    for k in (1, 2, 9):
        predictions = ActProbe(n_kept=k).fit(train, labels).predict(test)
        twins = [act_twin(train, labels, list(range(n_options)), k, prompt) for prompt in test]
        assert predictions.tolist() == twins


def test_act_learns_a_skill_hidden_in_few_neurons():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    activations = rng.standard_normal((400, 50)).astype(np.float32)
    activations[:, 7] += 4 * (labels >= 2)
    activations[:, 8] -= 4 * (labels % 2)
    probe = ActProbe(n_kept=1).fit(activations[:200], labels[:200])
    assert accuracy(labels[200:], probe.predict(activations[200:])).value > 0.9


def test_equal_float32_activations_are_not_above_their_mean():
    activations = np.full((22, 1), 0.1, np.float32)  # 22 of them add up to too little in float32
    probe = ActProbe().fit(activations, [0] * 12 + [1] * 10)
    assert probe.polarity_.tolist() == [[1]]  # never above: right on the twelve of the lower half
    assert not probe.predict(activations).any()


def test_an_activation_that_is_no_number_is_refused_with_its_place():
    activations = np.ones((3, 2), np.float32)
    activations[2, 1] = np.inf
    with pytest.raises(NegError, match="activation of row 2, neuron 1 is inf"):
        ActProbe().fit(activations, [0, 1, 1])


# Forest


def test_features_of_two_options_tell_whether_the_first_is_larger():
    negs_POM = np.array([[[1.0, 2.0, 3.0], [2.0, 2.0, 1.0]]])
    assert argmax_features(negs_POM).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("n_options", [3, 4, 5, 256])
def test_features_are_the_lowest_of_the_largest_options(n_options):
    negs, _ = tied_negs(n_options)
    features = argmax_features(negs)
    assert features.dtype == np.uint8
    assert np.array_equal(features, negs.argmax(axis=1))
    assert np.array_equal(negs, tied_negs(n_options)[0])  # the input is left as it was


def test_the_forest_learns_a_rule_of_two_neurons_that_no_vote_can_tell():
    rng = np.random.default_rng(0)
    features = rng.integers(0, 2, (300, 6)).astype(np.uint8)
    labels = features[:, 1] ^ features[:, 4]
    probe = TreeProbe(n_trees=20).fit(features[:200], labels[:200])
    assert accuracy(labels[200:], probe.predict(features[200:])).value == 1


def test_the_same_seed_grows_the_same_forest():
    negs, gold = tied_negs(4, n_rows=60)
    features = argmax_features(negs)
    first, again, other = (
        TreeProbe(n_trees=5, random_state=seed).fit(features[:30], gold[:30]).predict(features) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# scikit-learn's common checks


class _AnyWidth:
    """The checks' tables have any number of columns: options that miss columns get NEGs of zero."""

    def _unflatten(self, table):
        missing = -table.shape[1] % len(self.classes_)
        return super()._unflatten(np.pad(table, ((0, 0), (0, missing))))


class AnyWidthPolar(_AnyWidth, PolarProbe):
    pass


class AnyWidthMagn(_AnyWidth, MagnProbe):
    pass


@parametrize_with_checks([LMProbe(), ActProbe(), TreeProbe(n_trees=5), AnyWidthPolar(), AnyWidthMagn()])
def test_scikit_learn_common_checks(estimator, check):
    check(estimator)
