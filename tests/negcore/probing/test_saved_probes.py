"""Probes on disk: they answer as before, and refuse other data, damage and hostile files."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load, load_file, save
from stored_negs import N_ALL, N_LAYERS, N_NEURONS, numbers, write_split, write_splits
from support import identity_of

import negcore.probing.saved_probes as saved_probes
from negcore.errors import ProbeError
from negcore.measure.votes import Vote
from negcore.probing.fitted import fit_act, fit_forest, fit_logistic, fit_vote, random_vote
from negcore.probing.probe_parts import parts_of
from negcore.probing.rankings import rank_layers
from negcore.probing.saved_probes import Origin, load_probe, save_probe

MAGN, GRADIENT = Vote("magn", "neg"), Vote("polar", "gradient")
NAMES = ["magn", "polar-gradient", "magn-random", "magn-logistic", "act", "tree"]
OLD = Path(__file__).parents[2] / "fixtures" / "probes"


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def probes(splits):
    """A probe of every kind."""
    rankings = rank_layers(splits["train"], range(N_LAYERS), [MAGN, GRADIENT], act=True)
    magn = fit_vote(MAGN, rankings.votes_M[MAGN], splits["valid"], max_neurons=15)
    found = [
        magn,
        fit_vote(GRADIENT, rankings.votes_M[GRADIENT], splits["valid"], max_neurons=15),
        random_vote(magn, rankings.votes_M[MAGN], seed=1),
        fit_logistic(MAGN, np.array([7, 2, 11]), splits["train"]),
        fit_act(rankings.act, splits["train"].gold_P, splits["valid"], max_neurons=15),
        fit_forest(splits["train"], np.arange(15), seed=0),
    ]
    return dict(zip(NAMES, found, strict=True))


@pytest.fixture
def path(probes, splits, tmp_path):
    """A saved Magn-Probe of four neurons."""
    path = tmp_path / "magn.safetensors"
    magn = fit_vote(MAGN, np.arange(N_ALL), splits["valid"], max_neurons=4)
    assert magn.n_kept > 1
    save_probe(path, "magn", magn, splits["train"])
    return path


def read_about(content):
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["neg_probe"])


def refusal_of(path, match):
    with pytest.raises(ProbeError, match=match) as refused:
        load_probe(path)
    assert "\n" not in str(refused.value)


# Round trips


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_probe_answers_the_same_after_a_round_trip(probes, splits, tmp_path, name):
    path = tmp_path / f"{name}.safetensors"
    save_probe(path, name, probes[name], splits["train"])
    loaded = load_probe(path)
    assert loaded.name == name
    assert loaded.probe.n_kept == probes[name].n_kept
    assert loaded.predict(splits["test"]).tolist() == probes[name].predict(splits["test"]).tolist()
    assert loaded.origin == Origin.of(splits["train"])
    assert loaded.origin.digest == identity_of(N_LAYERS, N_NEURONS).digest
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_probe_of_one_class_is_read_back(tmp_path):
    train = write_split(tmp_path, "train", numbers("train"))
    train.gold_P[:] = 1
    act = fit_act(rank_layers(train, range(N_LAYERS), [], act=True).act, train.gold_P, train, max_neurons=4)
    save_probe(tmp_path / "act.safetensors", "act", act, train)
    assert set(load_probe(tmp_path / "act.safetensors").predict(train).tolist()) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_the_arrays_of_a_probe_can_be_read_with_safetensors_alone(probes, splits, tmp_path, name):
    save_probe(tmp_path / "one.safetensors", name, probes[name], splits["train"])
    arrays, expected = load_file(tmp_path / "one.safetensors"), parts_of(probes[name]).arrays
    assert {key: (values.dtype, values.tolist()) for key, values in arrays.items()} == {
        key: (values.dtype, values.tolist()) for key, values in expected.items()
    }


def test_an_array_that_is_a_view_is_stored_in_its_own_order(probes, splits, tmp_path, monkeypatch):
    """safetensors itself would write the memory behind a view as it lies."""
    parts = parts_of(probes["magn-logistic"])
    view = {"coef_COK": np.asfortranarray(parts.arrays["coef_COK"]), "order": np.array([7, 0, 2, 0, 11, 0])[::2]}
    monkeypatch.setattr(saved_probes, "parts_of", lambda probe: parts._replace(arrays={**parts.arrays, **view}))
    save_probe(tmp_path / "one.safetensors", "magn-logistic", probes["magn-logistic"], splits["train"])
    found = load_probe(tmp_path / "one.safetensors").predict(splits["test"])
    assert found.tolist() == probes["magn-logistic"].predict(splits["test"]).tolist()


# Other data


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "other"}, "model 'm' .* model 'other'"),
        ({"model_revision": "r2"}, "model_revision 'r' .* 'r2'"),
        ({"site": "act"}, "site 'up' .* site 'act'"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"first_label": 6}, r"label_ids \[5, 6, 7\] .* \[6, 7, 8\]"),
        ({"data": numbers("test", n_options=2)}, "n_options 3 .* n_options 2"),
    ],
)
def test_a_probe_is_refused_on_another_model_site_or_label_set_in_one_line(path, tmp_path, changes, says):
    other = write_split(tmp_path, "test", **{"data": numbers("test"), **changes})
    with pytest.raises(ProbeError, match=says) as refused:
        load_probe(path).predict(other)
    assert "\n" not in str(refused.value)


def test_a_probe_answers_another_dataset_of_the_same_model_and_labels(path, splits, tmp_path):
    other = write_split(tmp_path, "test", numbers("test"), dataset="other", dataset_fingerprint="g")
    assert load_probe(path).predict(other).tolist() == load_probe(path).predict(splits["test"]).tolist()


# Damage


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[:-40],
        lambda data: data + b"more",
        lambda data: b"",
        lambda data: b"ARROW1\0\0" + data[90:],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" * 10_000 + data[10_008:],
    ],
)
def test_a_damaged_file_is_refused_in_one_line(path, harm):
    path.write_bytes(harm(path.read_bytes()))
    refusal_of(path, "is not a probe or is damaged")


def test_the_neurons_of_a_probe_are_shifted_by_layer_and_number(path):
    saved = load_probe(path)
    assert saved.shifts(2.0, 2) == [(N_LAYERS - 1, N_NEURONS - 1, 2.0), (N_LAYERS - 1, N_NEURONS - 2, 2.0)]
    assert len(saved.shifts(2.0)) == saved.probe.n_kept
    for k in (0, saved.probe.n_kept + 1):
        with pytest.raises(ProbeError, match=f"best {k} are not known"):
            saved.shifts(2.0, k)


@pytest.mark.parametrize("name", ["polar-gradient", "magn-logistic", "act", "tree"])
def test_a_probe_without_polarities_of_negs_gives_no_shifts(probes, splits, tmp_path, name):
    save_probe(tmp_path / name, name, probes[name], splits["train"])
    with pytest.raises(ProbeError, match="use a polar or magn probe"):
        load_probe(tmp_path / name).shifts(2.0)


def test_an_absent_file_is_refused(tmp_path):
    refusal_of(tmp_path / "none.safetensors", "no probe at")


def test_every_byte_of_the_arrays_is_guarded(path):
    whole = path.read_bytes()
    n_bytes = sum(values.nbytes for values in load(whole).values())
    for at in range(len(whole) - n_bytes, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refusal_of(path, "checksum")


@pytest.mark.parametrize("where", ["checksum", "settings"])
def test_a_file_whose_content_was_changed_is_refused(path, where):
    arrays, about = load(path.read_bytes()), read_about(path.read_bytes())
    if where == "settings":
        about["settings"]["vote"] = ["polar", "neg"]
    else:
        arrays["order"] = arrays["order"][::-1].copy()
    path.write_bytes(save(arrays, {"neg_probe": json.dumps(about)}))
    refusal_of(path, "checksum")


def test_an_old_file_whose_content_was_changed_is_refused(tmp_path):
    table = pa.ipc.open_file(OLD / "magn.arrow").read_all()
    (order,) = table.column("order").to_pylist()
    table = table.set_column(table.column_names.index("order"), "order", pa.array([order[::-1]]))
    assert order != order[::-1]
    with pa.OSFile(str(tmp_path / "magn.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    refusal_of(tmp_path / "magn.arrow", "checksum")


# Hostile files: their checksums are right


def forge(path, change):
    """Change arrays or metadata of a saved probe, and correct its checksums."""
    arrays, about = dict(load(path.read_bytes())), read_about(path.read_bytes())
    for key in ("seal", "xxh3"):
        del about[key]
    change(arrays, about)
    about |= saved_probes._checksums(about, arrays)
    path.write_bytes(save(arrays, {"neg_probe": json.dumps(about)}))


def put(name, at, value):
    def change(arrays, about):
        arrays[name] = arrays[name].copy()
        arrays[name].flat[at] = value

    return change


def replace(name, make):
    def change(arrays, about):
        arrays[name] = np.ascontiguousarray(make(arrays[name]))

    return change


def drop(name):
    return lambda arrays, about: arrays.pop(name)


def say(key, value, part="settings"):
    return lambda arrays, about: (about[part] if part else about).__setitem__(key, value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tree", put("left_V", 0, 0)),  # a node that is its own child: a walk without end
        ("tree", put("left_V", 0, 10**6)),
        ("tree", put("right_V", 0, -1)),
        ("tree", put("order", 0, 10**6)),
        ("tree", put("order", 0, -1)),
        ("tree", put("feature_V", 0, 10**6)),
        ("tree", put("root_T", 0, 10**6)),
        ("tree", put("classes_C", 0, 3)),
        ("tree", replace("root_T", lambda values: values[:0])),
        ("tree", replace("classes_C", lambda values: values[:0])),
        ("tree", replace("feature_V", lambda values: values[1:])),
        ("tree", replace("threshold_V", lambda values: values[1:])),
        ("tree", replace("probs_VC", lambda values: values[:, :1])),
        ("tree", replace("probs_VC", lambda values: values.astype(np.int64))),
        ("tree", drop("right_V")),
        ("magn", put("order", 0, 15)),
        ("magn", replace("order", lambda values: values.astype(np.float64))),
        ("magn", replace("order", lambda values: values[None])),
        ("magn", replace("polarity", lambda values: values[:0])),
        ("magn", replace("polarity", lambda values: values.astype(np.float32))),
        ("magn", say("vote", ["polar", "os.system"])),
        ("magn", say("vote", "magn")),
        ("magn", say("n_options", "3", "origin")),
        ("magn", say("more", 1, "origin")),
        ("magn", lambda arrays, about: about["origin"]["identity"].pop("site")),
        ("magn", say("kind", "pickle", None)),
        ("magn", lambda arrays, about: about.pop("name")),
        ("magn-logistic", replace("coef_COK", lambda values: values[:2])),
        ("magn-logistic", replace("intercept_C", lambda values: values[:2])),
        ("magn-logistic", replace("mean_OK", lambda values: values[:, :2])),
        ("magn-logistic", put("classes_C", 0, -1)),
        ("act", put("order", 0, 15)),
        ("act", say("classes", [0, 1, 3])),
        ("act", say("classes", [0, 1])),
        ("act", say("classes", [])),
        ("act", say("classes", [2**70])),
        ("act", say("n_neurons", 0)),
        ("act", replace("threshold", lambda values: values.astype(np.int64))),
    ],
)
def test_a_hostile_file_is_refused_when_it_is_read(probes, splits, tmp_path, name, change):
    path = tmp_path / "probe.safetensors"
    save_probe(path, name, probes[name], splits["train"])
    forge(path, lambda arrays, about: None)
    load_probe(path)
    forge(path, change)
    refusal_of(path, "is not a probe or is damaged")


def test_a_file_of_a_later_version_is_refused_with_both_versions(path):
    forge(path, say("format", 3, None))
    refusal_of(path, "has format 3, not 2: fit the probe again")
