"""Shares of neurons that datasets use, beside a twin that goes through every choice of rows, and of random choices."""

from itertools import combinations

import numpy as np
import pytest
from stored_negs import LayerNumbers, write_layers

from negcore.analysis.utilisation import Used, shared_neurons, used_neurons
from negcore.errors import NegError

ROWS, OPTION_COUNT, LAYERS, NEURONS = 9, 2, 2, 6


def split_of(root, seed, *, shard_rows=4):
    rng = np.random.default_rng(seed)
    shape = (ROWS, OPTION_COUNT, LAYERS, NEURONS)
    numbers = LayerNumbers(
        rng.standard_normal(shape).astype(np.float32),
        rng.standard_normal((ROWS, LAYERS, NEURONS)).astype(np.float32),
        np.arange(ROWS) % OPTION_COUNT,
    )
    return write_layers(root, "test", numbers, shard_rows=shard_rows), numbers


def slow_sets(numbers, score, per_layer):
    """The neurons that each row uses; all options are as likely, so the first is the answer."""
    sets = []
    for row in range(ROWS):
        used = set()
        for layer in range(LAYERS):
            scores = numbers.negs_POLN[row, 0, layer].copy()
            if score == "contribution":
                scores *= np.abs(numbers.activations_PLN[row, layer])
            best = sorted(range(NEURONS), key=lambda n, scores=scores: -scores[n])[:per_layer]
            used |= {layer * NEURONS + n for n in best if scores[n] > 0}
        sets.append(used)
    return sets


@pytest.mark.parametrize("score", ["contribution", "neg"])
@pytest.mark.parametrize(("share", "per_layer"), [(1e-3, 1), (0.5, 3), (1.0, 6)])
def test_the_share_is_the_mean_over_every_choice_of_rows(tmp_path, score, share, per_layer):
    split, numbers = split_of(tmp_path, 1)
    used = used_neurons([split], score, share=share)
    sets = slow_sets(numbers, score, per_layer)
    assert (used.per_layer, used.n_rows) == (per_layer, ROWS)
    for n_rows in (1, 2, 5, ROWS):
        unions = [len(set().union(*chosen)) for chosen in combinations(sets, n_rows)]
        assert used.share(n_rows) == pytest.approx(np.mean(unions) / (LAYERS * NEURONS))


def test_shared_neurons_are_the_mean_over_every_pair_of_choices(tmp_path):
    (first, one), (second, two) = split_of(tmp_path / "a", 1), split_of(tmp_path / "b", 2)
    found = shared_neurons(used_neurons([first]), used_neurons([second]), 3)
    unions = [
        [set().union(*rows) for rows in combinations(slow_sets(numbers, "contribution", 1), 3)]
        for numbers in (one, two)
    ]
    both = np.mean([len(a & b) for a in unions[0] for b in unions[1]])
    either = np.mean([len(a | b) for a in unions[0] for b in unions[1]])
    assert found.shared == pytest.approx(both / (LAYERS * NEURONS))
    assert found.jaccard == pytest.approx(both / either)


def test_several_splits_count_together_and_shards_of_any_size_give_the_same(tmp_path):
    split, _ = split_of(tmp_path / "a", 1)
    again, _ = split_of(tmp_path / "b", 1, shard_rows=2)
    assert (used_neurons([split]).counts_M == used_neurons([again]).counts_M).all()
    assert (used_neurons([split, split]).counts_M == 2 * used_neurons([split]).counts_M).all()


def test_the_share_grows_with_rows_and_that_of_random_choices_is_known():
    rng = np.random.default_rng(0)
    per_layer, width, n_rows = 3, 50, 40
    counts = sum(np.bincount(rng.choice(width, per_layer, replace=False), minlength=width) for _ in range(n_rows))
    used = Used(counts, n_rows, 1, per_layer)
    shares = [used.share(n) for n in (1, 2, 4, 8, 16, 32)]
    assert shares == sorted(shares)
    assert used.share(1) == pytest.approx(per_layer / width)
    assert used.share(8) == pytest.approx(used.unrelated(8), abs=0.05)


def test_datasets_that_choose_at_random_share_what_chance_says():
    rng = np.random.default_rng(0)
    shape = (4, 500)  # layers and neurons
    drawn = [Used(rng.binomial(10, 0.02, shape).ravel(), 10, 4, 10) for _ in range(2)]
    found = shared_neurons(*drawn, 10)
    assert found.jaccard == pytest.approx(found.chance, rel=0.15)
    same = shared_neurons(drawn[0], drawn[0], 10)
    assert same.jaccard == pytest.approx(1)


def test_what_cannot_be_said_is_refused(tmp_path):
    split, _ = split_of(tmp_path, 1)
    used = used_neurons([split])
    for n_rows in (0, ROWS + 1):
        with pytest.raises(NegError, match=f"{n_rows} rows cannot be chosen of {ROWS}"):
            used.share(n_rows)
    for share in (0, 1.1, float("nan")):
        with pytest.raises(NegError, match="above 0 and at most 1"):
            used_neurons([split], share=share)
    with pytest.raises(NegError, match="other shapes"):
        shared_neurons(used, Used(used.counts_M[:6], ROWS, 1, 1), 2)
