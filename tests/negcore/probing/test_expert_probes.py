"""Probes of mixtures of experts, against twins that go through masked arrays one number at a time."""

from typing import NamedTuple

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from stored_negs import N_LAYERS, N_NEURONS, numbers, write_split
from support import Row, identity_of, negs_place, write_negs

from negcore.analysis.neurons import top_neurons
from negcore.measure.votes import Ranking, Vote, neuron_pairs
from negcore.model.layer_shapes import LayerShape, neuron_groups, shapes_json
from negcore.probing.act_scores import halvings
from negcore.probing.draws import random_of_experts
from negcore.probing.fitted import FittedVote, fit_act, fit_logistic, fit_vote, random_vote
from negcore.probing.probe_parts import parts_of
from negcore.probing.rankings import act_scores, of_neurons, rank, rank_layers
from negcore.probing.saved_probes import load_probe, save_probe
from negcore.store.levels import Routed
from negcore.store.reader import open_negs

# A dense layer, experts beside shared neurons, and experts alone: layers of 6, 14 and 12 neurons.
SHAPES = (LayerShape(6), LayerShape(2, 3, 2, 4), LayerShape(0, 6, 1, 2))
WIDTH, N_ALL = 14, 42
MAGN = Vote("magn", "neg")


class Data(NamedTuple):
    """Numbers of all neurons, masked where a prompt does not have one."""

    negs_POM: np.ma.MaskedArray
    activations_PM: np.ma.MaskedArray
    gold_P: np.ndarray


def make(root, split, n_options, *, n_rows=60, n_experts=(0, 3, 6)):
    """Write random numbers of routed prompts, and return what was written and the split."""
    rng = np.random.default_rng([*split.encode(), n_options])
    gold_P = rng.permutation(np.arange(n_rows) % n_options)
    chosen = [
        np.sort([rng.permutation(max(count, 1))[: shape.top_k] for _ in range(n_rows)])
        for shape, count in zip(SHAPES, n_experts, strict=True)
    ]
    experts_PLK = np.full((n_rows, 3, 2), -1, np.int32)
    negs_PO3A, activations_P3A = np.zeros((n_rows, n_options, 3, 10)), np.zeros((n_rows, 3, 10))
    negs_PO3N = np.ma.masked_all((n_rows, n_options, 3, WIDTH))
    activations_P3N = np.ma.masked_all((n_rows, 3, WIDTH))
    for row in range(n_rows):
        for layer, shape in enumerate(SHAPES):
            experts = chosen[layer][row]
            experts_PLK[row, layer, : shape.top_k] = experts
            for at, number in enumerate(
                [expert * shape.n_units + unit for expert in experts for unit in range(shape.n_units)]
                + list(range(shape.n_experts * shape.n_units, shape.n_neurons))
            ):
                values = rng.integers(-3, 4, n_options) + (np.arange(n_options) == gold_P[row]) * (number % 3)
                negs_PO3A[row, :, layer, at] = negs_PO3N[row, :, layer, number] = values
                activation = rng.integers(-4, 5) + (number % 4) * (gold_P[row] >= n_options // 2)
                activations_P3A[row, layer, at] = activations_P3N[row, layer, number] = activation
    starts = range(0, n_rows, 16)
    identity = identity_of(3, WIDTH, experts={"router": "through", "layers": shapes_json(SHAPES)})
    for index, start in enumerate(starts):
        rows = slice(start, start + 16)
        write_negs(
            root,
            negs_place("m", "d", split),
            index,
            len(starts),
            identity=identity,
            examples=[Row(f"{split}/{start + at}", answer=int(gold)) for at, gold in enumerate(gold_P[rows])],
            label_ids_PO=np.tile(np.arange(n_options), (len(gold_P[rows]), 1)),
            negs_POLN=negs_PO3A[rows],
            activations_PLN=activations_P3A[rows],
            probs_PO=np.full((len(gold_P[rows]), n_options), 0.1),
            routed=Routed(SHAPES, experts_PLK[rows], np.ones((len(gold_P[rows]), 3, 2))),
        )
    data = Data(negs_PO3N.reshape(n_rows, n_options, -1), activations_P3N.reshape(n_rows, -1), gold_P)
    return data, open_negs(root).select("m", "d", split)


@pytest.fixture(scope="module", params=[2, 4])
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("routed")
    return {split: make(root, split, request.param) for split in ("train", "valid", "test")}


@pytest.fixture(scope="module")
def splits(made):
    return {name: split for name, (_, split) in made.items()}


def test_neurons_of_a_group_are_those_that_prompts_have_together(made):
    data, split = made["train"]
    groups_M, there_PM = neuron_groups(SHAPES), ~np.ma.getmaskarray(data.activations_PM)
    assert groups_M.shape == (N_ALL,) and (np.diff(groups_M) >= 0).all()
    for group in np.unique(groups_M):
        of_group_PK = there_PM[:, groups_M == group]
        assert (of_group_PK == of_group_PK[:, :1]).all()
    assert (split.active(np.arange(N_ALL)) == there_PM).all()
    # Dense ones and numbers that the layer does not have; experts and shared ones; experts and such numbers.
    assert np.unique(groups_M, return_counts=True)[1].tolist() == [6, 8, *[4, 4, 4, 2], *[2, 2, 2, 2, 2, 2, 2]]


# Act-Probe


def slow_act(data, start, middle, stop, neuron):
    """Threshold and score of a neuron for a question, from the prompts of its classes that have it."""
    own = [row for row in range(len(data.gold_P)) if start <= data.gold_P[row] < stop]
    own = [row for row in own if data.activations_PM[row, neuron] is not np.ma.masked]
    if not own:
        return 0.0, 0
    threshold = sum(float(data.activations_PM[row, neuron]) for row in own) / len(own)
    right = sum((data.activations_PM[row, neuron] > threshold) == (data.gold_P[row] >= middle) for row in own)
    return threshold, 2 * right - len(own)


def slow_act_answer(train, test, row, n_kept):
    """Go down the halves of the options by the votes of the best neurons that a prompt has."""
    start, stop = 0, test.negs_POM.shape[1]
    while stop - start > 1:
        middle = (start + stop) // 2
        found = [slow_act(train, start, middle, stop, neuron) for neuron in range(N_ALL)]
        best = sorted(range(N_ALL), key=lambda neuron: (-abs(found[neuron][1]), neuron))[:n_kept]
        votes = 0
        for neuron in best:
            value, (threshold, score) = test.activations_PM[row, neuron], found[neuron]
            if value is not np.ma.masked:
                votes += np.sign(score) * (1 if value > threshold else -1)
        start, stop = (middle, stop) if votes > 0 else (start, middle)
    return start


def test_thresholds_and_scores_of_activations_are_those_of_the_prompts_that_have_a_neuron(made):
    data, split = made["train"]
    act = act_scores(split, range(3))
    for at, question in enumerate(halvings(0, split.n_options)):
        expected = [slow_act(data, *question, neuron) for neuron in range(N_ALL)]
        np.testing.assert_allclose(act.thresholds_SM[at], [one[0] for one in expected], rtol=1e-12)
        assert act.scores_SM[at].tolist() == [one[1] for one in expected]
    assert act.scores_SM.any(axis=0).sum() > N_ALL / 2


def test_an_act_probe_hears_the_neurons_that_a_prompt_has(made, splits):
    (train, _), (test, _) = made["train"], made["test"]
    probe = fit_act(act_scores(splits["train"], range(3)), train.gold_P, splits["valid"], max_neurons=16)
    expected = [slow_act_answer(train, test, row, probe.n_kept) for row in range(len(test.gold_P))]
    assert probe.predict(splits["test"]).tolist() == expected
    assert len({*expected}) > 1


# Logistic regression


def slow_features(data, fitted_on, neurons):
    """Standardised values with zeros where a neuron is absent, then a column for each expert some prompts have."""
    columns = []
    for option in range(data.negs_POM.shape[1]):
        for neuron in neurons:
            of_train = fitted_on.negs_POM[:, option, neuron].compressed()
            mean, scale = (of_train.mean(), of_train.std() or 1) if len(of_train) else (0, 1)
            columns.append(((data.negs_POM[:, option, neuron] - mean) / scale).filled(0))
    groups_M, told = neuron_groups(SHAPES), set()
    for neuron in sorted(neurons, key=lambda neuron: (groups_M[neuron], neurons.index(neuron))):
        train, own = (~np.ma.getmaskarray(one.activations_PM)[:, neuron] for one in (fitted_on, data))
        if groups_M[neuron] not in told and 0 < train.sum() < len(train):
            told.add(groups_M[neuron])
            columns.append(own.astype(float))
    return np.column_stack(columns)


NEURONS = [16, 3, 20, 28, 17, 27, 33, 13, 31]  # of every layer; of an expert two, shared, and a number that is none


def test_logistic_regression_reads_values_that_are_there_and_the_experts(made, splits):
    (train, _), (test, _) = made["train"], made["test"]
    model = LogisticRegression(max_iter=200).fit(slow_features(train, train, NEURONS), train.gold_P)
    probe = fit_logistic(MAGN, np.array(NEURONS), splits["train"])
    assert probe.predict(splits["test"]).tolist() == model.predict(slow_features(test, train, NEURONS)).tolist()
    chances = model.predict_proba(slow_features(test, train, NEURONS))
    np.testing.assert_allclose(probe.scores(splits["test"]), chances, atol=2e-3)
    assert probe.experts is not None
    assert sorted(NEURONS[at] for at in probe.experts.first_E) == [16, 20, 28, 31, 33]


def test_an_expert_that_no_training_prompt_has_changes_no_answer(tmp_path):
    _, train = make(tmp_path, "train", 3, n_experts=(0, 2, 1))
    _, test = make(tmp_path, "test", 3)
    probe = fit_logistic(MAGN, np.array([3, 27, 22, 14, 40]), train)  # 22 and 40 are of other experts than these
    alone = fit_logistic(MAGN, np.array([3, 27, 14]), train)
    assert probe.experts is None and np.isfinite(probe.coef_COK).all()
    assert not probe.coef_COK[:, :, [2, 4]].any()
    np.testing.assert_allclose(probe.scores(test), alone.scores(test), rtol=1e-3)


# Experts that every prompt has


def as_experts(root, split, data):
    """Write the numbers of a model without experts as those of one that routes every prompt to all of its experts."""
    shapes = (LayerShape(1, 2, 2, 2),) * N_LAYERS
    identity = identity_of(N_LAYERS, N_NEURONS, experts={"router": "through", "layers": shapes_json(shapes)})
    n_rows, n_options = data.negs_POM.shape[:2]
    write_negs(
        root,
        negs_place("m", "d", split),
        0,
        1,
        identity=identity,
        examples=[Row(f"{split}/{row}", answer=int(gold)) for row, gold in enumerate(data.gold_P)],
        label_ids_PO=np.tile(np.arange(n_options), (n_rows, 1)),
        negs_POLN=data.negs_POM.reshape(n_rows, n_options, N_LAYERS, N_NEURONS),
        activations_PLN=data.activations_PM.reshape(n_rows, N_LAYERS, N_NEURONS),
        probs_PO=np.full((n_rows, n_options), 0.1),
        routed=Routed(shapes, np.tile([0, 1], (n_rows, N_LAYERS, 1)), np.ones((n_rows, N_LAYERS, 2))),
    )
    return open_negs(root).select("m", "d", split)


def test_experts_that_every_prompt_has_give_the_probes_of_a_model_without_experts(tmp_path):
    data = {split: numbers(split) for split in ("train", "valid")}
    dense = {split: write_split(tmp_path / "dense", split, one) for split, one in data.items()}
    routed = {split: as_experts(tmp_path / "routed", split, one) for split, one in data.items()}
    order_K = np.arange(15)[::-1]
    for one, other in [
        (fit_logistic(MAGN, order_K, dense["train"]), fit_logistic(MAGN, order_K, routed["train"])),
        tuple(
            fit_act(act_scores(splits["train"], range(3)), splits["train"].gold_P, splits["valid"], max_neurons=8)
            for splits in (dense, routed)
        ),
    ]:
        arrays, others = parts_of(one).arrays, parts_of(other).arrays
        assert {name: values.tobytes() for name, values in arrays.items()} == {
            name: values.tobytes() for name, values in others.items()
        }


# Random neurons


@pytest.mark.parametrize("seed", range(3))
def test_random_neurons_are_of_the_experts_of_the_best_each_at_the_place_of_one(made, seed):
    best_K = np.array([25, 14, 33, 3, 15, 27, 34, 0, 26])
    drawn_K, groups_M = random_of_experts(best_K, SHAPES, seed=seed), neuron_groups(SHAPES)
    assert groups_M[drawn_K].tolist() == groups_M[best_K].tolist()
    assert len({*drawn_K.tolist()}) == len(best_K)
    assert {*drawn_K.tolist()} & {*best_K.tolist()} == {26, 27}  # the best are all shared ones of this layer
    assert (made["test"][1].active(drawn_K) == made["test"][1].active(best_K)).all()


def test_a_random_probe_has_the_polarities_of_its_neurons_own_scores(splits):
    scores_M = rank_layers(splits["train"], range(3), [MAGN], act=False).votes_M[MAGN]
    best = fit_vote(MAGN, scores_M, splits["valid"], max_neurons=8)
    drawn = random_vote(best, scores_M, seed=1, layer_shapes=SHAPES)
    assert drawn.ranking.polarity_K.tolist() == np.sign(scores_M[drawn.kept_K]).tolist()
    assert drawn.kept_K.tolist() == random_of_experts(best.kept_K, SHAPES, seed=1).tolist()
    assert not (neuron_groups(SHAPES)[Ranking.from_scores(scores_M).order_K[:8]] == 1).any()  # numbers of no neuron


def test_numbers_that_a_layer_does_not_have_are_in_no_ranking_and_no_probe(splits):
    train, valid = splits["train"], splits["valid"]
    there = [(layer, number) for layer, shape in enumerate(SHAPES) for number in range(shape.n_neurons)]
    assert sorted(map(tuple, rank(train).neurons_K2.tolist())) == there
    assert sorted((one.layer, one.neuron) for one in top_neurons(train, top=N_ALL)) == there
    probe = fit_act(act_scores(train, range(3)), train.gold_P, valid, max_neurons=64)
    assert {*map(tuple, neuron_pairs(probe.kept_K, WIDTH).tolist())} <= {*there}
    scores_M = of_neurons(train, rank_layers(train, range(3), [MAGN], act=False).votes_M[MAGN])
    widest = fit_vote(MAGN, scores_M, valid, max_neurons=64)
    wider = FittedVote(MAGN, Ranking.from_scores(scores_M), train.n_options, N_ALL)
    assert max(wider.accuracy_by_k(valid)) == 32 == len(there)
    assert widest.n_kept <= 32


@pytest.mark.parametrize("kind", ["act", "logistic"])
def test_a_probe_of_experts_answers_the_same_from_its_file(splits, tmp_path, kind):
    probe = {
        "act": lambda: fit_act(
            act_scores(splits["train"], range(3)), splits["train"].gold_P, splits["valid"], max_neurons=8
        ),
        "logistic": lambda: fit_logistic(MAGN, np.array(NEURONS), splits["train"]),
    }[kind]()
    save_probe(tmp_path / "one.safetensors", kind, probe, splits["train"])
    loaded = load_probe(tmp_path / "one.safetensors")
    assert (loaded.probe.scores(splits["test"]) == probe.scores(splits["test"])).all()
