"""Rankings over shards, fitted probes that read few neurons, and probes on disk."""

import json
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression
from support import negs_place, write_negs

from negcore.errors import NegError, ProbeError
from negcore.measure.votes import argmax_features
from negcore.probing import fitted, saved_probes
from negcore.probing.evaluation import accuracy, choose_n_neurons
from negcore.probing.fitted import (
    check_forest_size,
    fit_act,
    fit_forest,
    fit_logistic,
    fit_vote,
    random_vote,
)
from negcore.probing.probes import ActProbe, MagnProbe, PolarProbe, TreeProbe
from negcore.probing.rankings import Rankings, Vote, rank_layers
from negcore.probing.saved_probes import Origin, load_probe, save_probe
from negcore.store.identity import RunIdentity
from negcore.store.reader import open_negs

N_LAYERS, N_NEURONS, N_OPTIONS = 3, 5, 3
POLAR, MAGN = Vote("polar", "neg"), Vote("magn", "neg")
VOTES = [Vote(rule, signal) for rule in ("polar", "magn") for signal in ("neg", "gradient", "gxa")]
ESTIMATORS = {"polar": PolarProbe, "magn": MagnProbe}


class Row(NamedTuple):
    id: str
    prompt: str
    answer: int
    group: str


class Numbers(NamedTuple):
    negs_POM: np.ndarray
    activations_PM: np.ndarray
    gold_P: np.ndarray


def numbers(split, n_rows=40, n_options=N_OPTIONS):
    """Small whole numbers: many ties and zeros, and means without rounding."""
    rng = np.random.default_rng([len(split), n_options])
    gold_P = rng.permutation(np.arange(n_rows) % n_options)
    negs_POM = rng.integers(-2, 3, (n_rows, n_options, N_LAYERS * N_NEURONS)).astype(np.float32)
    negs_POM[np.arange(n_rows), gold_P, 7] += 1  # a neuron with a little skill
    activations_PM = rng.integers(-3, 4, (n_rows, N_LAYERS * N_NEURONS)).astype(np.float32)
    return Numbers(negs_POM, activations_PM, gold_P)


def identity(**changes):
    settings = {"model": "m", "model_revision": "r", "tokenizer_hash": "t", "site": "up", "dtype": "float32"}
    settings |= {"n_layers": N_LAYERS, "n_neurons": N_NEURONS, "prompt": {}, "dataset_fingerprint": "f"}
    return RunIdentity(**settings | changes)


def write(root, split, *, n_options=N_OPTIONS, shard_rows=16, labels=(5, 6, 7), dataset="d", **changes):
    data = numbers(split, n_options=n_options)
    starts = range(0, len(data.gold_P), shard_rows)
    for index, start in enumerate(starts):
        rows = slice(start, start + shard_rows)
        gold_P = data.gold_P[rows]
        n = len(gold_P)
        write_negs(
            root,
            negs_place("m", dataset, split),
            index,
            len(starts),
            identity=identity(**changes),
            examples=[Row(f"{split}/{start + i}", "?", int(gold), "") for i, gold in enumerate(gold_P)],
            label_ids_PO=np.tile(labels[:n_options], (n, 1)),
            negs_POLN=data.negs_POM[rows].reshape(n, n_options, N_LAYERS, N_NEURONS),
            activations_PLN=data.activations_PM[rows].reshape(n, N_LAYERS, N_NEURONS),
            probs_PO=np.full((n, n_options), 0.1),
        )
    return open_negs(root).select("m", dataset, split)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return {split: write(root, split) for split in ("train", "valid", "test")}


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
    widest = ESTIMATORS[vote.rule](n_neurons=15).fit(effects["train"], data["train"].gold_P)
    curve = widest.accuracy_by_k(effects["valid"][:, :, widest.kept_], data["valid"].gold_P)
    whole = ESTIMATORS[vote.rule](n_neurons=choose_n_neurons(curve)).fit(effects["train"], data["train"].gold_P)
    probe = fit_vote(vote, ranked(splits["train"]).votes_M[vote], splits["valid"], max_neurons=15)
    assert probe.ranking.order_K.tolist() == whole.kept_.tolist()
    assert probe.accuracy_by_k(splits["valid"]) == {k: v for k, v in curve.items() if k <= probe.n_neurons}
    assert probe.predict(splits["test"]).tolist() == whole.predict(effects["test"]).tolist()


@pytest.mark.parametrize("n_blocks", [1, 3])
def test_blocks_of_layers_join_to_the_whole(splits, n_blocks):
    joined, whole = ranked(splits["train"], n_blocks=n_blocks), ranked(splits["train"], n_blocks=2)
    for vote in VOTES:
        assert joined.votes_M[vote].tolist() == whole.votes_M[vote].tolist()
    assert joined.act.scores_SM.tolist() == whole.act.scores_SM.tolist()


def test_activations_scored_over_shards_make_the_act_probe_that_sees_everything(splits):
    data = {split: numbers(split) for split in splits}
    acts = {k: ActProbe(n_neurons=k).fit(data["train"].activations_PM, data["train"].gold_P) for k in (1, 2, 4, 8)}
    curve = {k: accuracy(data["valid"].gold_P, act.predict(data["valid"].activations_PM)) for k, act in acts.items()}
    probe = fit_act(ranked(splits["train"]).act, splits["train"].gold_P, splits["valid"], max_neurons=15)
    assert probe.n_neurons == choose_n_neurons(curve)
    expected = acts[probe.n_neurons].predict(data["test"].activations_PM)
    assert probe.predict(splits["test"]).tolist() == expected.tolist()


def test_gradient_times_activation_votes_as_neg_does_where_no_activation_is_zero():
    data = numbers("test")
    away = np.where(data.activations_PM == 0, 1, data.activations_PM)
    gxa = effects_of(data._replace(activations_PM=away), "gxa")
    assert np.array_equal(np.sign(gxa), np.sign(data.negs_POM))
    assert np.array_equal(argmax_features(gxa), argmax_features(data.negs_POM))


def test_a_neg_that_is_no_number_is_refused_with_its_prompts_and_layer(tmp_path, monkeypatch):
    broken = numbers("train")
    broken.negs_POM[17, 0, 6] = np.nan
    monkeypatch.setitem(globals(), "numbers", lambda split, **options: broken)
    split = write(tmp_path, "train")
    with pytest.raises(NegError, match="d, rows from 'train/16' on, layer 1: NEG of row 1, option 0, neuron 1 is nan"):
        rank_layers(split, range(N_LAYERS), [MAGN], act=False)


# Forest and baselines


def test_the_forest_as_arrays_answers_as_scikit_learns(splits):
    order_K = np.arange(15)
    train, test = (argmax_features(numbers(split).negs_POM) for split in ("train", "test"))
    expected = TreeProbe(random_state=3).fit(train, numbers("train").gold_P).predict(test)
    assert fit_forest(splits["train"], order_K, seed=3).predict(splits["test"]).tolist() == expected.tolist()


def test_a_forest_that_would_not_fit_is_refused_with_the_number_that_does():
    with pytest.raises(NegError, match="set tree_neurons to at most 858") as refused:
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
    train, test = (write(tmp_path, split, n_options=n_options) for split in ("train", "test"))
    order_K = np.array([7, 2, 11])
    values = {split: numbers(split, n_options=n_options).negs_POM[:, :, order_K] for split in ("train", "test")}
    mean, scale = values["train"].mean(axis=0), values["train"].std(axis=0)
    flat = {split: ((x - mean) / scale).reshape(len(x), -1) for split, x in values.items()}
    model = LogisticRegression(max_iter=200).fit(flat["train"], numbers("train", n_options=n_options).gold_P)
    probe = fit_logistic(POLAR, order_K, train)
    assert probe.predict(test).tolist() == model.predict(flat["test"]).tolist()
    assert len(set(probe.predict(test).tolist())) == n_options


def test_logistic_regression_reads_no_more_neurons_than_there_is_room_for(splits, monkeypatch):
    monkeypatch.setattr(fitted, "LOGISTIC_VALUES", 40 * N_OPTIONS * 4)
    probe = fit_logistic(MAGN, np.arange(15), splits["train"])
    assert probe.order_K.tolist() == [0, 1, 2, 3]


# On disk


def every_kind(splits):
    rankings = ranked(splits["train"])
    magn = fit_vote(MAGN, rankings.votes_M[MAGN], splits["valid"], max_neurons=15)
    gradient = Vote("polar", "gradient")
    return {
        "magn": magn,
        "polar-gradient": fit_vote(gradient, rankings.votes_M[gradient], splits["valid"], max_neurons=15),
        "magn-random": random_vote(magn, rankings.votes_M[MAGN], seed=1),
        "magn-logistic": fit_logistic(MAGN, magn.ranking.order_K, splits["train"]),
        "act": fit_act(rankings.act, splits["train"].gold_P, splits["valid"], max_neurons=15),
        "tree": fit_forest(splits["train"], np.arange(15), seed=0),
    }


def test_every_kind_of_probe_answers_the_same_after_a_round_trip(splits, tmp_path):
    for name, probe in every_kind(splits).items():
        save_probe(tmp_path / f"{name}.arrow", name, probe, splits["train"])
        loaded = load_probe(tmp_path / f"{name}.arrow")
        assert loaded.name == name
        assert loaded.probe.n_neurons == probe.n_neurons
        assert loaded.predict(splits["test"]).tolist() == probe.predict(splits["test"]).tolist()
        assert loaded.origin == Origin.of(splits["train"])
        assert loaded.origin.digest == identity().digest
    assert {path.suffix for path in tmp_path.iterdir()} == {".arrow"}


def test_a_probe_of_one_class_is_read_back(tmp_path):
    train = write(tmp_path, "train")
    train.gold_P[:] = 1
    act = fit_act(rank_layers(train, range(N_LAYERS), [], act=True).act, train.gold_P, train, max_neurons=4)
    save_probe(tmp_path / "act.arrow", "act", act, train)
    assert set(load_probe(tmp_path / "act.arrow").predict(train).tolist()) == {1}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "other"}, "model 'm' .* model 'other'"),
        ({"model_revision": "r2"}, "model_revision 'r' .* 'r2'"),
        ({"site": "act"}, "site 'up' .* site 'act'"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"labels": (5, 6, 8)}, r"label_ids \[5, 6, 7\] .* \[5, 6, 8\]"),
        ({"n_options": 2}, "n_options 3 .* n_options 2"),
    ],
)
def test_a_probe_is_refused_on_another_model_site_or_label_set_in_one_line(splits, tmp_path, changes, says):
    save_probe(tmp_path / "magn.arrow", "magn", every_kind(splits)["magn"], splits["train"])
    other = write(tmp_path, "test", **changes)
    with pytest.raises(ProbeError, match=says) as refused:
        load_probe(tmp_path / "magn.arrow").predict(other)
    assert "\n" not in str(refused.value)


def test_a_probe_answers_another_dataset_of_the_same_model_and_labels(splits, tmp_path):
    magn = every_kind(splits)["magn"]
    save_probe(tmp_path / "magn.arrow", "magn", magn, splits["train"])
    other = write(tmp_path, "test", dataset="other", dataset_fingerprint="g")
    assert load_probe(tmp_path / "magn.arrow").predict(other).tolist() == magn.predict(other).tolist()


@pytest.mark.parametrize("harm", [lambda data: data[:-40], lambda data: b"", lambda data: b"ARROW1\0\0" + data[90:]])
def test_a_damaged_file_is_refused_in_one_line(splits, tmp_path, harm):
    path = tmp_path / "magn.arrow"
    save_probe(path, "magn", every_kind(splits)["magn"], splits["train"])
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ProbeError, match="no probe or damaged") as refused:
        load_probe(path)
    assert "\n" not in str(refused.value)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(ProbeError, match="no probe at"):
        load_probe(tmp_path / "none.arrow")


@pytest.mark.parametrize("where", ["checksum", "settings"])
def test_a_file_whose_content_was_changed_is_refused(splits, tmp_path, where):
    path = tmp_path / "magn.arrow"
    save_probe(path, "magn", every_kind(splits)["magn"], splits["train"])
    table = pa.ipc.open_file(path).read_all()
    about = json.loads(table.schema.metadata[b"neg_probe"])
    if where == "settings":
        about["settings"]["vote"] = ["polar", "neg"]
    else:
        order = table.column("order").to_pylist()
        table = table.set_column(0, "order", pa.array([order[0][::-1]]))
        assert order[0] != order[0][::-1]
    table = table.replace_schema_metadata({b"neg_probe": json.dumps(about)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ProbeError, match="checksum"):
        load_probe(path)


@pytest.mark.parametrize("name", ["left_V", "order", "feature_V"])
def test_a_forest_that_points_outside_itself_is_refused(splits, tmp_path, name, monkeypatch):
    """A hostile file can have the right checksums."""
    forest = every_kind(splits)["tree"]
    encode = saved_probes._CODECS["forest"].encode

    def hostile(probe):
        plain = encode(probe)
        values = plain.arrays[name].copy()
        values[0] = 10**6 if name != "left_V" else 0  # a node that is its own child: a walk without end
        return plain._replace(arrays=plain.arrays | {name: values})

    codec = saved_probes._CODECS["forest"]._replace(encode=hostile)
    monkeypatch.setattr(saved_probes, "_CODECS", {**saved_probes._CODECS, "forest": codec})
    save_probe(tmp_path / "tree.arrow", "tree", forest, splits["train"])
    with pytest.raises(ProbeError, match="damaged"):
        load_probe(tmp_path / "tree.arrow")
