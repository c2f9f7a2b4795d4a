"""NEGs over training beside a twin with whole arrays, in shards of any size, and revisions that do not fit."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from stored_negs import LayerNumbers, write_layers

from negcore.analysis.training import revision_profiles
from negcore.errors import NegError

ROWS, OPTION_COUNT, LAYERS, NEURONS = 23, 3, 2, 7


def numbers(seed, shape=(ROWS, OPTION_COUNT, LAYERS, NEURONS)):
    rng = np.random.default_rng(seed)
    negs_POLN = (rng.standard_normal(shape) * rng.choice([0, 1], shape)).astype(np.float32)
    gold_P = np.arange(shape[0]) % shape[1]
    return LayerNumbers(negs_POLN, np.ones((shape[0], *shape[2:]), np.float32), gold_P)


def slow_profile(series, revision, layers):
    """The numbers of some layers of a revision, from whole arrays."""
    gold = [
        data.negs_POLN[np.arange(ROWS), data.gold_P][:, layers].astype(np.float64).reshape(ROWS, -1) for data in series
    ]
    own, last = gold[revision], gold[-1]
    previous = None if revision == 0 else float((np.sign(own) == np.sign(gold[revision - 1])).mean())
    correlation = spearmanr(own.mean(axis=0), last.mean(axis=0)).statistic
    return np.abs(own).mean(), previous, (np.sign(own) == np.sign(last)).mean(), correlation


@pytest.mark.parametrize("shard_rows", [5, 50])
def test_profiles_are_those_of_whole_arrays(tmp_path, shard_rows):
    series = [numbers(seed) for seed in range(3)]
    splits = [
        write_layers(tmp_path / f"{at}", "test", data, shard_rows=shard_rows + at) for at, data in enumerate(series)
    ]
    found = revision_profiles(splits)
    assert [(row.revision, row.layer) for row in found] == [(r, layer) for r in range(3) for layer in (0, 1, None)]
    for row in found:
        layers = [0, 1] if row.layer is None else [row.layer]
        size, previous, last, correlation = slow_profile(series, row.revision, layers)
        assert row.mean_size == pytest.approx(size, rel=1e-12)
        assert row.same_as_previous == (None if previous is None else pytest.approx(previous))
        assert (row.same_as_last, row.rank_correlation) == (pytest.approx(last), pytest.approx(correlation))
    assert [row.same_as_last for row in found[-3:]] == [1, 1, 1]


def test_one_revision_twice_is_the_same_in_every_row(tmp_path):
    one = write_layers(tmp_path / "a", "test", numbers(1))
    two = write_layers(tmp_path / "b", "test", numbers(1), shard_rows=4)
    for row in revision_profiles([one, two])[3:]:
        assert (row.same_as_previous, row.same_as_last, row.rank_correlation) == (1, 1, 1)


def test_revisions_of_other_shapes_sites_and_rows_are_refused(tmp_path):
    first = write_layers(tmp_path / "a", "test", numbers(1))
    wide = write_layers(tmp_path / "b", "test", numbers(1, (ROWS, OPTION_COUNT, LAYERS, NEURONS + 1)))
    act = write_layers(tmp_path / "c", "test", numbers(1), site="act")
    fewer = write_layers(tmp_path / "d", "test", numbers(1, (ROWS - 1, OPTION_COUNT, LAYERS, NEURONS)))
    for other, says in ((wide, "2 layers of 8 neurons"), (act, "site 'act'"), (fewer, "has not")):
        with pytest.raises(NegError, match=says):
            revision_profiles([first, other])


def test_a_layer_that_never_varies_has_no_rank_correlation(tmp_path):
    flat = numbers(1)
    flat.negs_POLN[:, :, 0] = 0.5
    splits = [write_layers(tmp_path / name, "test", data) for name, data in (("a", numbers(2)), ("b", flat))]
    found = {(row.revision, row.layer): row.rank_correlation for row in revision_profiles(splits)}
    assert np.isnan([found[0, 0], found[1, 0]]).all()
    assert not np.isnan(found[0, 1])
