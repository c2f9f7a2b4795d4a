"""What earlier versions wrote is written byte for byte again, and still read: shards, receipts, probes, run files."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from fixtures.make_shards import (
    CAUSAL_CHECKS,
    CHOSEN,
    FIXTURES,
    GROUPS,
    KINDS,
    N_ALL,
    N_LAYERS,
    N_NEURONS,
    NEG_PARTS,
    RUN_CASES,
    STUDY_PARTS,
    answers_of,
    aside_of,
    case_folder,
    causal_set_of,
    contents,
    fact_rows,
    facts_of,
    identity_of,
    place_of,
    place_of_negs,
    probed_splits,
    read_json,
    run_of,
    shard_folders,
    study_identity_of,
    sweep_of,
    write_shards,
)

from negcore.analysis.causal import Condition
from negcore.measure.votes import vote_sums
from negcore.probing.probe_parts import parts_of
from negcore.probing.saved_probes import load_probe, save_probe
from negcore.store.identity import text_hash
from negcore.store.integrity import finished_shards, mapped_batch
from negcore.store.publish import receipts
from negcore.store.reader import open_negs
from negcore.store.study import joined_sweep, read_studies, read_study
from tasks.config.reading import read_run_file, recorded_run
from tasks.measure.causal import read_causal

SHARDS, PROBES, RUNS = (FIXTURES / name for name in ("shards", "probes", "runs"))
PARTS = [*NEG_PARTS, *STUDY_PARTS, *CAUSAL_CHECKS]
PROBE_NAMES = ["magn", "polar-gradient", "magn-random", "magn-logistic", "act", "tree"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All shards, written anew."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(root)
    return root


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """The splits that the saved probes were fitted on and asked."""
    return probed_splits(tmp_path_factory.mktemp("probed"))


def folder_of(root: Path, name: str) -> Path:
    return next(folder for known, _, folder in shard_folders(root) if known == name)


def opened(name: str):
    """A stored partition, its checksums compared."""
    part = NEG_PARTS[name]
    return part, open_negs(SHARDS / part.storage).at(place_of_negs(part))


# Written anew


@pytest.mark.parametrize("name", NEG_PARTS)
def test_shards_and_receipts_are_written_byte_for_byte_as_before(written, name):
    old, new = contents(folder_of(SHARDS, name)), contents(folder_of(written, name))
    n_shards = len([path for path in old if path.endswith(".arrow")])
    assert n_shards >= 2
    assert len([path for path in old if path.startswith("_receipts/")]) == n_shards
    assert list(new) == list(old)
    for path, content in old.items():
        assert new[path] == content, path


@pytest.mark.parametrize("name", sorted(set(PARTS) - set(NEG_PARTS)))
def test_studies_are_written_as_before_but_for_the_form_of_their_place(written, name):
    """A study's shards used to call their place `place`; now all shards say it in the form of NEGs."""
    old, new = folder_of(SHARDS, name), folder_of(written, name)
    assert list(contents(new)) == list(contents(old))
    for path in sorted(old.glob("part-*.arrow")):
        was, now = mapped_batch(path), mapped_batch(new / path.name)
        assert now.equals(was, check_metadata=False)
        said_before, says_now = (json.loads(batch.schema.metadata[b"neg"]) for batch in (was, now))
        place, partition = said_before.pop("place"), says_now.pop("partition")
        assert says_now == said_before
        assert (partition.pop("model"), partition.pop("dataset")) == (place["model"], place["dataset"])
        assert list(partition.values()) == [place["part"]]
    as_published = {"file_xxh3": "", "n_bytes": 0}
    assert [replace(one, **as_published) for one in receipts(new)] == [
        replace(one, **as_published) for one in receipts(old)
    ]


def test_shards_are_where_they_were_and_there_are_no_others(written):
    assert list(contents(written)) == list(contents(SHARDS))


def test_the_fixture_holds_what_is_easily_lost():
    stored = [receipt for _, _, folder in shard_folders(SHARDS) for receipt in receipts(folder)]
    assert {row.cause for receipt in stored for row in receipt.set_aside} == {"failure", "nonfinite"}
    assert {receipt.n_nonfinite for receipt in stored} == {0, 3}
    assert {receipt.n_rows for receipt in stored} == {0, 2, 3}
    assert {receipt.identity.get("storage") for receipt in stored} == {None, "bfloat16", "codes", "stats"}


# NEGs of before are read


@pytest.mark.parametrize("name", NEG_PARTS)
def test_rows_of_old_shards_are_those_that_were_stored(name):
    part, split = opened(name)
    kept = [row for shard in part.shards for row in shard.kept]
    assert split.ids == [row.id for row in kept]
    assert split.groups == [row.group for row in kept]
    assert set(split.groups) == set(GROUPS)
    assert split.text_hashes == [text_hash(row.prompt) for row in kept]
    assert split.gold_P.tolist() == [row.answer for row in kept]
    assert split.label_ids_PO.tolist() == part.joined("label_ids_PO").tolist()
    assert split.probs_PO.tolist() == part.joined("probs_PO").tolist()
    assert split.set_aside == [row for shard in part.shards for row in aside_of(shard)]
    assert (split.storage, split.n_layers, split.n_neurons) == (part.storage, N_LAYERS, N_NEURONS)
    assert split.identity == identity_of(part)
    assert split.identity.versions == identity_of(part).versions


@pytest.mark.parametrize("name", ["values", "bfloat16"])
def test_old_values_are_read_bit_for_bit(name):
    part, split = opened(name)
    negs_POLN, activations_PLN = part.joined("negs_POLN"), part.joined("activations_PLN")
    if name == "bfloat16":  # as somebody else rounds
        negs_POLN, activations_PLN = (rounded(values) for values in (negs_POLN, activations_PLN))
    activations_PM = split.activations(range(N_ALL))
    assert activations_PM.tobytes() == activations_PLN.tobytes()
    for layer in range(N_LAYERS):
        assert split.layer(layer).tobytes() == np.ascontiguousarray(negs_POLN[:, :, layer]).tobytes()
    assert np.isnan(negs_POLN).any() and np.isinf(negs_POLN).any()


def rounded(values):
    found = torch.from_numpy(values).bfloat16().float().numpy()
    found[np.isnan(found)] = np.nan  # one of many
    return found


def test_old_codes_have_the_order_and_signs_of_the_values():
    part, split = opened("codes")
    negs_POLN, activations_PLN = part.joined("negs_POLN"), part.joined("activations_PLN")
    assert split.activations(range(N_ALL)).tobytes() == activations_PLN.tobytes()
    for layer in range(N_LAYERS):
        signed_ranks_PON = np.concatenate([shard.signed_ranks_PON(layer) for shard in split.shards()])
        negs_PON = negs_POLN[:, :, layer]
        assert np.array_equal(np.sign(signed_ranks_PON), np.sign(negs_PON))
        for one, other in product(range(split.n_options), repeat=2):
            is_larger_PN = negs_PON[:, one] > negs_PON[:, other]
            assert np.array_equal(signed_ranks_PON[:, one] > signed_ranks_PON[:, other], is_larger_PN)


def test_old_vote_sums_are_those_of_the_values():
    part, split = opened("stats, vote sums")
    for shard, stored in zip(part.shards, split.shards(), strict=False):  # the last one has no rows
        gold_P = [row.answer for row in shard.kept]
        for vote, sums_M in vote_sums(shard.negs_POLN, shard.activations_PLN, gold_P).items():
            assert stored.sums_M(vote).tolist() == sums_M.tolist()


def test_old_numbers_of_chosen_neurons_are_read_bit_for_bit():
    part, split = opened("stats, chosen neurons")
    negs_POM = part.joined("negs_POLN").reshape(split.n_rows, split.n_options, N_ALL)
    activations_PM = part.joined("activations_PLN").reshape(split.n_rows, N_ALL)
    assert split.neurons(CHOSEN).tobytes() == np.ascontiguousarray(negs_POM[..., CHOSEN]).tobytes()
    assert split.activations(CHOSEN).tobytes() == np.ascontiguousarray(activations_PM[:, CHOSEN]).tobytes()
    assert all(shard.chosen_K.tolist() == list(CHOSEN) for shard in split.shards())


@pytest.mark.parametrize("name", NEG_PARTS)
def test_an_old_run_of_negs_is_finished_and_not_computed_again(name):
    part = NEG_PARTS[name]
    rows = [shard.rows for shard in part.shards]
    root, place = SHARDS / part.storage, place_of_negs(part)
    done, damaged = finished_shards(root, place, identity_of(part), rows)
    assert not damaged
    assert [done[index].n_nonfinite for index in range(3)] == [shard.n_nonfinite for shard in part.shards]


# Studies of before are read


@pytest.mark.parametrize("name", STUDY_PARTS)
def test_an_old_study_is_finished_and_has_its_rows(name):
    part, place = STUDY_PARTS[name], place_of(STUDY_PARTS[name])
    rows = [fact_rows(index) for index in range(2)]
    ids = [[row.id for row in shard] for shard in rows]
    done, damaged = finished_shards(SHARDS / "linearity", place, study_identity_of(part), rows)
    assert (sorted(done), damaged) == ([0, 1], {})
    study = read_study(place.path(SHARDS / "linearity"))
    assert study.ids == ids[0] + ids[1]
    assert study.groups == [row.group for shard in rows for row in shard]


def test_an_old_sweep_is_put_together_again():
    parts = [STUDY_PARTS["sweeps, first block"], STUDY_PARTS["sweeps, second block"]]
    found = joined_sweep(read_studies([place_of(part).path(SHARDS / "linearity") for part in parts]))
    blocks = [[sweep_of(part, index) for index in range(2)] for part in parts]
    assert found.shifts_S.tolist() == blocks[0][0].shifts_S.tolist()
    assert found.neurons_K2.tolist() == [pair for block in blocks for pair in block[0].neurons_K2.tolist()]
    for name in ("base_P", "label_ids_P"):
        assert getattr(found, name).tolist() == joined(blocks[0], name).tolist()
    for name in ("activations_PK", "values_PKS"):
        expected = np.concatenate([joined(block, name) for block in blocks], axis=1)
        assert getattr(found, name).tolist() == expected.tolist()


def joined(shards, name):
    return np.concatenate([getattr(shard, name) for shard in shards])


def test_how_long_old_shards_took_is_still_known():
    seconds = [
        read_study(place_of(part).path(SHARDS / "linearity")).seconds_per_prompt for part in STUDY_PARTS.values()
    ]
    assert seconds[:2] == [(1.5 + 2.25) / 4, 0.125 / 2]
    assert np.isnan(seconds[2:]).all()


@pytest.mark.parametrize("name", ["estimates", "estimates of log-probability increase"])
def test_old_estimates_are_read(name):
    part = STUDY_PARTS[name]
    study = read_study(place_of(part).path(SHARDS / "linearity"))
    expected = np.concatenate([shard["scores"] for shard in part.shards]).astype(np.float32)
    assert study.columns["scores"].tolist() == expected.tolist()
    assert study.axes == {"neurons": [list(pair) for pair in part.settings["neurons"]]}


def test_old_interventions_are_read():
    part = STUDY_PARTS["interventions"]
    study = read_study(place_of(part).path(SHARDS / "linearity"))
    assert study.axes == {"shifts": [0.5, 1.0], "sizes": [1, 2, 4, 1, 2, 4]}
    for column, name in (("predicted", "predicted_DPM"), ("probs", "probs_DPM")):
        expected = np.concatenate([shard[name].swapaxes(0, 1) for shard in part.shards]).astype(np.float32)
        assert study.columns[column].reshape(expected.shape).tolist() == expected.tolist()
    expected = np.concatenate([shard["base_probs_P"] for shard in part.shards])
    assert study.columns["base_prob"].tolist() == expected.tolist()


@pytest.mark.parametrize("name", CAUSAL_CHECKS)
def test_an_old_causal_check_is_finished_and_read(name):
    check = CAUSAL_CHECKS[name]
    root, part = SHARDS / check.negs.storage, causal_set_of(check)
    done = finished_shards(root, part.place, part.identity, part.shards).receipts
    assert [list(done[index].set_aside) for index in range(3)] == [aside_of(shard) for shard in check.negs.shards]
    result = read_causal(root, part)
    assert result.conditions[0] == Condition("top", 2, 0, "gold", 0.5)
    assert result.conditions[-1] == Condition("bottom", 2, 0, "polarity", -2.0)
    assert result.gold_P.tolist() == [row.answer for shard in check.negs.shards for row in shard.kept]
    for array in ("base_probs_PO", "probs_PMO"):
        expected = np.concatenate([shard[array] for shard in check.shards])
        assert getattr(result, array).tolist() == expected.tolist()


# Probes of before


@pytest.mark.parametrize("name", PROBE_NAMES)
def test_an_old_probe_answers_as_it_did(probed, name):
    expected = read_json(PROBES / "answers.json")[name]
    assert answers_of(PROBES / f"{name}.arrow", probed["test"]) == expected
    assert len(set(expected["predicted_P"])) > 1


@pytest.mark.parametrize("name", PROBE_NAMES)
def test_an_old_probe_that_is_saved_anew_is_the_same(probed, tmp_path, name):
    """The content is compared: an old probe is an Arrow file, and a new one a safetensors file."""
    old = load_probe(PROBES / f"{name}.arrow")
    assert old.name == name
    save_probe(tmp_path / f"{name}.safetensors", name, old.probe, probed["train"])
    new = load_probe(tmp_path / f"{name}.safetensors")
    assert (new.name, new.origin) == (name, old.origin)
    parts = parts_of(new.probe), parts_of(old.probe)
    assert parts[0][:2] == parts[1][:2]
    assert [
        {key: (values.dtype, values.shape, values.tobytes()) for key, values in one.arrays.items()} for one in parts
    ] == [read_arrays(PROBES / f"{name}.arrow")] * 2


def read_arrays(path):
    """Arrays of an old probe, without the code under test."""
    table = pa.ipc.open_file(path).read_all()
    shapes = json.loads(table.schema.metadata[b"neg_probe"])["shapes"]
    arrays = {key: np.array(table.column(key)[0].values).reshape(shape) for key, shape in shapes.items()}
    return {key: (values.dtype, values.shape, values.tobytes()) for key, values in arrays.items()}


# Run files of before


def as_written_before(name):
    """The run of a case, with the workers that were chosen for it when it was written."""
    run = run_of(name)
    chosen = {"workers": 2, "gpus": 0.0}
    return run.model_copy(update={field: value for field, value in chosen.items() if getattr(run, field) is None})


@pytest.mark.parametrize("file", ["run.yaml", "by-hand.yaml"])
@pytest.mark.parametrize("name", RUN_CASES)
def test_an_old_run_file_gives_the_same_run(name, file):
    path = RUNS / case_folder(name) / file
    assert "kind:" not in path.read_text(encoding="utf-8")
    run = read_run_file(KINDS[RUN_CASES[name].kind], path, {})
    assert run == (run_of(name) if file == "by-hand.yaml" else as_written_before(name))
    assert facts_of(run) == read_json(RUNS / "facts.json")[name]


@pytest.mark.parametrize("name", RUN_CASES)
def test_the_kind_of_an_old_run_is_known_from_its_fields(name):
    run = recorded_run(RUNS / case_folder(name))
    assert type(run) is KINDS[RUN_CASES[name].kind]
    assert run == as_written_before(name)
