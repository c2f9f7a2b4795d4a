"""Bounds on missed neurons: against counting by hand, and by simulation of the claim that they make."""

from math import comb

import numpy as np
import pytest

from negcore.analysis.certificates import (
    Sizes,
    certificates,
    largest_share,
    missed_neurons,
    most_in_population,
)
from negcore.errors import NegError


def chance_of_so_few(n_hits, n_drawn, n_all, n_in_population):
    """Count samples one by one: the share of all with `n_hits` or fewer."""
    of_all = comb(n_all, n_drawn)
    return (
        sum(comb(n_in_population, hits) * comb(n_all - n_in_population, n_drawn - hits) for hits in range(n_hits + 1))
        / of_all
    )


@pytest.mark.parametrize("n_all", [2, 7, 24])
@pytest.mark.parametrize("confidence", [0.6, 0.95, 0.99])
def test_the_bound_of_a_population_is_the_largest_that_counting_allows(n_all, confidence):
    for n_drawn in range(1, n_all):
        for n_hits in range(n_drawn + 1):
            possible = range(n_hits, n_all - (n_drawn - n_hits) + 1)
            twin = max(k for k in possible if chance_of_so_few(n_hits, n_drawn, n_all, k) > 1 - confidence)
            assert most_in_population(n_hits, n_drawn, n_all, confidence) == twin


def test_bounds_by_pencil():
    assert most_in_population(0, 4, 1536) == 808  # (728 * 727 * 726 * 725) / (1536 * 1535 * 1534 * 1533) = .0503
    assert largest_share(0, 120) == pytest.approx(1 - 0.05 ** (1 / 120))
    assert largest_share(2, 2) == 1 and largest_share(1, 2) == 1


@pytest.mark.parametrize("n_missed", [1, 5, 20, 45])
def test_a_layers_bound_holds_as_often_as_it_says(n_missed):
    random, n_all, n_drawn, n_trials = np.random.default_rng(n_missed), 60, 12, 4000
    hits = random.hypergeometric(n_missed, n_all - n_missed, n_drawn, n_trials)
    covered = np.mean([most_in_population(int(one), n_drawn, n_all) >= n_missed for one in hits])
    assert covered >= 0.95 - 3 * (0.95 * 0.05 / n_trials) ** 0.5


@pytest.mark.parametrize(
    "missed_L",
    [[0, 0, 0, 12], [3, 3, 3, 3], [1, 0, 0, 0], [40, 0, 0, 0], [20, 30, 39, 5], [40, 40, 40, 0], [10, 0, 40, 9]],
)
def test_the_models_bound_holds_where_layers_differ(missed_L):
    random, n_layers, layer_width, n_swept, n_trials = np.random.default_rng(0), len(missed_L), 40, 6, 1500
    layers_K = np.repeat(np.arange(n_layers), n_swept)
    population_LN = np.arange(layer_width) < np.array(missed_L)[:, None]
    held = np.zeros(n_layers + 1)
    for _ in range(n_trials):
        drawn_LN = random.permuted(population_LN, axis=1)
        missed_K = drawn_LN[:, :n_swept].ravel()
        found = certificates(missed_K, missed_K, layers_K, n_layers=n_layers, layer_width=layer_width)
        others = [*drawn_LN[:, n_swept:].sum(1), drawn_LN[:, n_swept:].sum()]
        held += [one.most_missed >= so_many for one, so_many in zip(found, others, strict=True)]
    assert (held / n_trials >= 0.95 - 3 * (0.95 * 0.05 / n_trials) ** 0.5).all()


def test_a_bound_taken_from_the_pooled_population_would_fail_where_the_models_holds():
    """Two layers of two neurons, one missed in each, one swept in each: a quarter of the samples shows none."""
    assert chance_of_so_few(0, 2, 4, 2) == pytest.approx(1 / 6)  # pooled, it looks rarer than it is
    assert largest_share(0, 2, confidence=0.74) >= 0.5 > 1 / 4


def test_a_neuron_is_missed_where_it_is_large_and_its_estimate_small_in_the_same_prompt():
    measured_PK = np.array([[3.0, -3.0, 3.0, 1.0, 0.0], [0.0, 3.0, 0.1, 0.1, 0.0]])
    estimated_PK = np.array([[3.0, 0.5, -2.5, 0.0, 0.0], [0.0, -3.0, 0.1, 0.1, 9.0]])
    assert missed_neurons(measured_PK, estimated_PK, Sizes(2.0, 1.0)).tolist() == [False, True, False, False, False]
    assert missed_neurons(measured_PK, estimated_PK, Sizes(2.0, 2.6)).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("measured", "estimated", "said"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), "do not go together"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "do not go together"),
        (np.array([[np.nan]]), np.zeros((1, 1)), "measured NEG of row 0, swept neuron 0 is nan"),
        (np.zeros((1, 1)), np.array([[np.inf]]), "estimate of row 0, swept neuron 0 is inf"),
    ],
)
def test_numbers_that_cannot_be_compared_are_refused(measured, estimated, said):
    with pytest.raises(NegError, match=said):
        missed_neurons(measured, estimated, Sizes(1, 1))


@pytest.mark.parametrize(
    ("layers", "confidence", "said"),
    [
        ([0, 0, 1], 0.95, "1 to 2 swept neurons a layer"),
        ([0, 0], 0.95, "0 to 2 swept neurons a layer"),
        ([0] * 4 + [1] * 4, 0.95, "at least 1 and not all"),
        ([0, 1], 1.0, "confidence 1.0 is none"),
    ],
)
def test_samples_that_prove_nothing_are_refused(layers, confidence, said):
    none = np.zeros(len(layers), bool)
    with pytest.raises(NegError, match=said):
        certificates(none, none, layers, n_layers=2, layer_width=4, confidence=confidence)
