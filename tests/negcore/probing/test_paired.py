"""Paired tests between probes: by pencil, against slow twins, and on probes that differ by chance alone."""

from itertools import permutations
from math import comb

import numpy as np
import pytest
from scipy.stats import binom

from negcore.errors import NegError
from negcore.probing.paired import Paired, holm, paired


def test_prompts_that_both_or_neither_answered_right_do_not_decide():
    first, second = [1, 1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 1, 1]
    compared = paired(first, second)
    assert compared == Paired(n=7, n_first=3, n_second=1)
    assert compared.difference == pytest.approx(2 / 7)
    assert compared.p == pytest.approx(2 * (1 + 4) / 16)  # 0 or 1 of 4 for the second, and as many at the other end
    assert (compared + Paired(3, 0, 2)) == Paired(10, 3, 3)


def test_probes_that_are_right_on_the_same_prompts_have_p_one():
    assert paired([True, False], [True, False]).p == 1.0


@pytest.mark.parametrize("n_first", range(12))
def test_p_is_the_share_of_ways_to_deal_out_the_prompts_that_are_at_least_as_one_sided(n_first):
    n = 11
    ways = [comb(n, k) for k in range(n + 1)]
    expected = sum(way for way in ways if way <= ways[n_first]) / 2**n
    assert Paired(40, n_first, n - n_first).p == pytest.approx(expected)


def test_swapping_the_probes_turns_the_difference_and_leaves_p():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 50)) < [[0.7], [0.5]]
    one, other = paired(first, second), paired(second, first)
    assert (one.p, one.difference) == (other.p, -other.difference)


def test_equally_good_probes_are_told_apart_in_at_most_one_of_twenty_samples():
    """Counted over every number of prompts that one alone answers right, not drawn: no sample to be unlucky with."""
    for n_either in (5, 10, 25, 60):
        counts = np.arange(n_either + 1)
        p = np.array([Paired(200, int(k), n_either - int(k)).p for k in counts])
        assert binom.pmf(counts, n_either, 0.5)[p <= 0.05].sum() <= 0.05


def test_a_better_probe_is_told_apart_more_often_the_more_prompts_there_are():
    def power(n):
        rng = np.random.default_rng(0)
        return np.mean([paired(rng.random(n) < 0.8, rng.random(n) < 0.6).p <= 0.05 for _ in range(60)])

    assert power(20) < power(80) < power(320) > 0.95


def slow_holm(p):
    """Call a test significant at every level at which Holm's steps would come to it; the smallest is its p."""
    corrected = {}
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        before = max(corrected.values(), default=0)
        corrected[index] = min(max(before, (len(p) - rank) * p[index]), 1)
    return [corrected[index] for index in range(len(p))]


def test_holm_by_pencil_in_any_order():
    for p in permutations([0.01, 0.04, 0.03, 0.005]):
        expected = {0.005: 0.02, 0.01: 0.03, 0.03: 0.06, 0.04: 0.06}
        assert holm(p) == pytest.approx([expected[one] for one in p])
    assert holm([]).tolist() == []


def test_holm_is_its_slow_twin():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 30):
        p = rng.random(n) ** 3
        assert holm(p) == pytest.approx(slow_holm(p.tolist()))


def test_among_many_equally_good_probes_hardly_any_two_are_told_apart_after_the_correction():
    rng, n_wrong = np.random.default_rng(0), 0
    for _ in range(200):
        right = rng.random((6, 60)) < 0.5
        p = [paired(right[a], right[b]).p for a in range(6) for b in range(a)]
        n_wrong += holm(p).min() <= 0.05
        assert (holm(p) >= p).all()
    assert n_wrong / 200 <= 0.05


@pytest.mark.parametrize("counts", [(0, 0, 0), (2, 2, 1), (3, -1, 0)])
def test_counts_that_contradict_each_other_are_refused(counts):
    with pytest.raises(NegError, match="is no comparison: give at least one prompt"):
        Paired(*counts)


def test_answers_to_different_prompts_are_refused():
    with pytest.raises(NegError, match=r"answers to \(2,\) and to \(3,\) prompts"):
        paired([1, 0], [1, 0, 1])
