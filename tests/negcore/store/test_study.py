import numpy as np
import pytest
from support import Row, identity_of

from negcore.errors import ShardError
from negcore.measure.sweeps import SweepResult
from negcore.store.integrity import finished_shards
from negcore.store.publish import SetAside, ShardPlace, publish_shard
from negcore.store.study import (
    joined_sweep,
    read_studies,
    read_study,
    study_batch,
    sweep_columns,
    write_seconds,
)

SHIFTS = [-1.0, 1.0]


def identity(**study):
    return identity_of(4, 5, model="org/tiny", study={"shifts": SHIFTS} | study)


def a_block(layers, first, count):
    """A sweep of neuron 0 of each layer whose every number names its place."""
    p, k, s = np.ix_(range(first, first + count), layers, range(len(SHIFTS)))
    return SweepResult(
        neurons_K2=np.array([(layer, 0) for layer in layers]),
        shifts_S=np.array(SHIFTS),
        base_P=np.arange(first, first + count) / 10,
        activations_PK=(p + k / 10)[..., 0],
        values_PKS=p + k / 10 + s / 100,
        label_ids_P=np.arange(first, first + count),
    )


def write(root, layers, index, n_shards=2, size=2, seconds=None, without=(), **study):
    place = ShardPlace("sweeps", "org/tiny", "mini/facts", f"layers-{layers[0]:02d}-{layers[-1]:02d}")
    result = a_block(layers, index * size, size)
    rows = [
        Row(f"facts/{number}/u{number}", f"secret {number}", group="P1-x")
        for number in range(index * size, (index + 1) * size)
        if number not in without
    ]
    kept = [row for row in range(size) if index * size + row not in without]
    receipt = publish_shard(
        root,
        place,
        index,
        n_shards,
        identity=identity(**study),
        batch=study_batch(rows, {name: values[kept] for name, values in sweep_columns(result).items()}),
        about={"axes": {"neurons": result.neurons_K2.tolist(), "shifts": SHIFTS}},
        set_aside=[SetAside(id=f"facts/{n}/u{n}", cause="failure", reason="poison") for n in without],
    )
    if seconds is not None:
        write_seconds(place.path(root), index, seconds)
    return place, receipt


def test_blocks_of_layers_and_shards_of_prompts_are_put_together_again(tmp_path):
    places = [write(tmp_path, layers, index)[0] for layers in ([0, 1], [2]) for index in (1, 0)]
    sweep = joined_sweep(read_studies([place.path(tmp_path) for place in dict.fromkeys(places)]))
    whole = a_block([0, 1, 2], 0, 4)
    assert sweep.neurons_K2.tolist() == whole.neurons_K2.tolist()
    assert sweep.shifts_S.tolist() == SHIFTS
    assert sweep.label_ids_P.tolist() == [0, 1, 2, 3]
    for name in ("base_probs_P", "activations_PK", "probs_PKS"):
        np.testing.assert_array_equal(getattr(sweep, name), getattr(whole, name).astype(np.float32))
    study = read_study(places[0].path(tmp_path))
    assert study.ids == [f"facts/{n}/u{n}" for n in range(4)]
    assert study.groups == ["P1-x"] * 4


def test_a_place_is_a_hive_directory_with_quoted_names(tmp_path):
    place = ShardPlace("estimates", "org/tiny", "mini/facts", "neurgrad")
    assert place.path(tmp_path) == (
        tmp_path / "estimates" / "model=org%2Ftiny" / "dataset=mini%2Ffacts" / "estimator=neurgrad"
    )


def test_how_long_it_took_is_known_and_changes_no_byte(tmp_path):
    for index in range(2):
        place, receipt = write(tmp_path / "slow", [0], index, seconds=1.0 + index)
        assert write(tmp_path / "fast", [0], index)[1] == receipt
    assert read_study(place.path(tmp_path / "slow")).seconds_per_prompt == (1 + 2) / 4
    assert np.isnan(read_study(place.path(tmp_path / "fast")).seconds_per_prompt)


def test_the_prompts_text_is_not_stored(tmp_path):
    write(tmp_path, [0], 0)
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_shards_of_another_study_are_refused_with_the_difference(tmp_path):
    place, receipt = write(tmp_path, [0], 0)
    rows = [[Row(f"facts/{n}/u{n}", f"secret {n}", group="P1-x") for n in pair] for pair in ((0, 1), (2, 3))]
    assert finished_shards(tmp_path, place, identity(), rows) == ({0: receipt}, {})
    with pytest.raises(ShardError, match=r"study.seed: 1 here, nothing there"):
        finished_shards(tmp_path, place, identity(seed=1), rows)


def test_an_incomplete_sweep_is_refused(tmp_path):
    place, _ = write(tmp_path, [0], 0)
    with pytest.raises(ShardError, match="incomplete, 1 of 2 shards"):
        joined_sweep(read_studies([place.path(tmp_path)]))


def test_a_row_set_aside_in_one_block_is_left_out_of_the_whole_sweep(tmp_path):
    without = {0: [1], 1: [3]}
    places = [write(tmp_path, [layer], 0, n_shards=1, size=4, without=rows)[0] for layer, rows in without.items()]
    sweep = joined_sweep(read_studies([place.path(tmp_path) for place in places]))
    whole = a_block([0, 1], 0, 4)
    assert sweep.label_ids_P.tolist() == [0, 2]
    np.testing.assert_array_equal(sweep.probs_PKS, whole.probs_PKS[[0, 2]].astype(np.float32))


def test_blocks_without_a_row_in_common_are_refused(tmp_path):
    places = [write(tmp_path, [layer], 0, n_shards=1, without=[layer])[0] for layer in (0, 1)]
    with pytest.raises(ShardError, match="no row is in all of"):
        joined_sweep(read_studies([place.path(tmp_path) for place in places]))
