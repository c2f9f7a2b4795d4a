"""Runs on mixtures of experts: shards hold the routed experts' neurons alone, and everything behind them knows so."""

import csv
import re

import numpy as np
import pytest
from support import neg, save_tiny_model, tiny_model, write_questions

from flows.pipeline import run_extract, run_pipeline
from flows.show.check_tables import facts_table
from flows.show.dataset_card import dataset_card
from flows.skills import run_skills
from negcore.analysis.causal import ExpertNeurons, skill_sets
from negcore.analysis.neurons import neuron_means, read_neuron, top_neurons
from negcore.errors import ModelError, NegError, ShardError
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.votes import Vote
from negcore.probing.fitted import FittedVote, fit_vote, forest_features
from negcore.probing.rankings import rank
from negcore.probing.saved_probes import load_probe
from negcore.store.integrity import shard_faults
from negcore.store.levels import has_columns_of
from negcore.store.publish import receipts
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillRun, SkillsRun
from tasks.config.reading import read_run_file
from tasks.controls import with_permuted_gold
from tasks.forecast.needs import count_parameters, forecast
from tasks.forecast.shard_size import shard_bytes
from tasks.neurons import best_neurons
from tasks.plan import plan
from tasks.publish import read_publication
from tasks.resamples import sample_counts
from tasks.rundir.layout import shard_folders
from tasks.rundir.query import query
from tasks.rundir.verify import verify
from tasks.steps import PlainSteps

# One kind of layers alone, and dense layers beside layers with shared experts, whose widths differ.
FAMILIES = ["mixtral", "qwen2_moe"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    for family in (*FAMILIES, "llama"):
        save_tiny_model(family, folder / family)
    return folder, write_questions(folder)


@pytest.fixture(scope="module")
def run_on(home):
    folder, questions = home

    def make(family, name="run", **changes):
        values = {"model": [str(folder / family)], "dataset": [questions], "backend": "local", "shard_rows": 8}
        values |= {"out": folder / f"{name}-{family}", "probe": ["polar", "magn", "tree"]}
        return read_run_file(SkillRun, None, values | changes)

    return make


@pytest.fixture(scope="module", params=FAMILIES)
def done(request, run_on):
    run = run_on(request.param)
    run_pipeline(run, PlainSteps())
    return run


def train_of(run):
    return open_negs(run.directory).select(split="train")


def planned_splits(run):
    return plan(run)[0].datasets[0].splits


def measured(run, split="train"):
    planned = next(one for one in planned_splits(run) if one.place.part == split)
    lm = load_model(run.model[0], router=run.router)
    return lm, neurgrad(lm, [one.prompt for one in planned.examples], [one.labels for one in planned.examples])


def full(lm, batch, layer):
    """NEGs and activations of all neurons of a layer, and which there are, put down one by one."""
    shape = lm.layer_shapes[layer]
    n_rows, n_options = batch.probs_PO.shape
    negs, acts = np.zeros((n_rows, n_options, lm.layer_width)), np.zeros((n_rows, lm.layer_width))
    there = np.zeros((n_rows, lm.layer_width), bool)
    for row in range(n_rows):
        experts = batch.experts_PLK[row, layer, : shape.top_k]
        numbers = [e * shape.n_units + unit for e in experts for unit in range(shape.n_units)]
        numbers += range(shape.n_experts * shape.n_units, shape.n_neurons)
        for at, number in enumerate(numbers):
            negs[row, :, number] = batch.negs_POLN[row, :, layer, at]
            acts[row, number] = batch.activations_PLN[row, layer, at]
            there[row, number] = True
    return negs, acts, there


def test_shards_give_back_what_was_measured_and_mask_what_a_prompt_does_not_have(done):
    lm, batch = measured(done)
    split = train_of(done)
    assert split.layer_shapes == lm.layer_shapes and split.n_neurons == lm.layer_width
    for layer, shape in enumerate(lm.layer_shapes):
        negs, acts, there = full(lm, batch, layer)
        stored = split.layer(layer)
        assert (stored.mask == np.broadcast_to(~there[:, None], stored.shape)).all()
        np.testing.assert_allclose(stored.data, negs, rtol=1e-3, atol=1e-4 * np.abs(negs).max())
        flat = layer * split.n_neurons + np.arange(split.n_neurons)
        np.testing.assert_allclose(split.activations(flat).data, acts, rtol=1e-3, atol=1e-4)
        assert np.isfinite(stored.data).all()
        assert (split.experts(layer) == batch.experts_PLK[:, layer, : shape.top_k]).all()
        np.testing.assert_allclose(split.router_weights(layer), batch.router_weights_PLK[:, layer, : shape.top_k], 1e-3)
        chosen = [(layer, shape.n_neurons - 1), (layer, 0)]
        assert (split.active(chosen) == there[:, [shape.n_neurons - 1, 0]]).all()
        assert (split.neurons(chosen).filled(7) == stored.filled(7)[:, :, [shape.n_neurons - 1, 0]]).all()


def test_a_shard_is_flat_and_holds_no_more_than_the_routed_experts(done):
    split = train_of(done)
    shard = next(split.shards())
    for layer, shape in enumerate(split.layer_shapes):
        width = shape.top_k * shape.n_units + shape.n_dense
        assert shard.numbers(f"neg_{layer:02d}").shape == (shard.n_rows, split.n_options * width)
        assert not shard.numbers(f"neg_{layer:02d}").flags.owndata
        names = {f"experts_{layer:02d}", f"router_{layer:02d}"}
        assert (names <= set(shard.batch.schema.names)) == (shape.n_experts > 0)
    assert all(not field.nullable for field in shard.batch.schema)


def test_the_plan_knows_the_bytes_of_every_shard_and_the_parameters_that_a_token_runs_through(done):
    for split in planned_splits(done):
        paths = sorted(split.place.path(done.directory).glob("part-*.arrow"))
        assert [path.stat().st_size for path in paths] == shard_bytes(split)
    model = plan(done)[0]
    counts, needs = count_parameters(model.card), forecast([(done, [model])])
    lm = load_model(done.model[0])
    all_of_layers = sum(one.numel() for one in lm.model.model.layers.parameters())
    stacks = [lm.experts(layer) for layer in range(lm.n_layers)]
    of_experts = sum(one.numel() for stack in stacks if stack is not None for one in stack.parameters())
    assert counts.n_in_layers == all_of_layers - of_experts // 2  # two of four experts run
    assert needs[0].operations == 0  # all is there


def test_a_file_has_the_columns_of_its_own_layers_alone(done):
    split = train_of(done)
    proven = receipts(split.folder)
    assert [reason for _, reason in shard_faults(split.folder, proven)] == [None] * len(proven)
    own = proven[0].identity
    assert has_columns_of(own, split.schema)
    layers = own["experts"]["layers"]
    for other in ([[*counts[:-1], counts[-1] + 1] for counts in layers], layers[1:], None, "layers"):
        assert not has_columns_of(own | {"experts": {"router": "through", "layers": other}}, split.schema)
    assert not has_columns_of({name: value for name, value in own.items() if name != "experts"}, split.schema)


def test_the_router_and_the_layers_are_in_the_identity_and_a_dense_one_says_nothing_of_them(run_on):
    through, dense = (planned_splits(run_on(family))[0].identity.comparable() for family in ("mixtral", "llama"))
    fixed = planned_splits(run_on("mixtral", "fixed", router="fixed"))[0].identity.comparable()
    assert through["experts"] == {"router": "through", "layers": [[0, 4, 2, 24]] * 3}
    assert fixed["experts"]["router"] == "fixed" and "experts" not in dense
    asked = run_on("mixtral", router="fixed").science
    assert asked.pop("router") == "fixed" and run_on("mixtral").science == asked


def test_a_fixed_router_gives_other_negs_in_shards_of_its_own(run_on):
    run = run_on("mixtral", "fixed", router="fixed", probe=["magn"])
    run_extract(run, PlainSteps())
    _, batch = measured(run)
    split = train_of(run)
    stored = split.neurons([(0, unit) for unit in range(96)])
    assert split.identity.experts["router"] == "fixed"
    lm = load_model(run.model[0])
    np.testing.assert_allclose(stored.data, full(lm, batch, 0)[0], rtol=1e-3, atol=1e-4 * np.abs(stored).max())


PROBES = ("magn", "act", "tree", "polar-gxa", "magn-random", "polar-logistic")
"""One of each kind."""
SERVED = {"codes": PROBES[:-1], "stats": tuple(name for name in PROBES if name != "act")}


@pytest.fixture(scope="module", params=FAMILIES)
def of_values(request, run_on):
    """A run of every probe that stores values, and its results."""
    run = run_on(request.param, "every", probe=list(PROBES), max_neurons=32, tree_neurons=20)
    return run, run_pipeline(run.model_copy(update={"controls": 1, "train_samples": 2}), PlainSteps())


@pytest.mark.parametrize("storage", SERVED)
def test_codes_and_vote_sums_score_as_values_do(of_values, storage, tmp_path):
    values, results = of_values
    run = values.model_copy(update={"storage": storage, "probe": SERVED[storage], "out": tmp_path})
    found = run_pipeline(run, PlainSteps())
    expected = [row for row in results.scores if row.probe in ("lm", *run.probe)]
    assert (found.scores, found.problems) == (expected, [])
    assert len({row.accuracy for row in expected}) > 1
    assert [fault for one in verify(shard_folders(run.directory), lambda size: None) for fault in one.faults] == []
    for planned in plan(run)[0].datasets[0].splits:
        paths = sorted(planned.place.path(run.directory).glob("part-*.arrow"))
        assert [path.stat().st_size for path in paths] == shard_bytes(planned)


def test_controls_fit_every_probe_on_permuted_answers_and_random_weights(of_values):
    run, results = of_values
    assert {(row.control, row.probe) for row in results.controls} == {
        *(("permuted answers", probe) for probe in PROBES),
        *(("random weights", probe) for probe in ("lm", *PROBES)),
    }
    train, valid, test = (open_negs(run.directory).select(split=split) for split in ("train", "valid", "test"))
    permuted = with_permuted_gold(train, run.seed, 0)
    scores_M = slow_row_scores(permuted, "magn").sum(axis=0)
    probe = fit_vote(Vote("magn", "neg"), scores_M, with_permuted_gold(valid, run.seed, 0), max_neurons=32)
    (row,) = (row for row in results.controls if (row.control, row.probe) == ("permuted answers", "magn"))
    assert (row.n_neurons, row.n_correct) == (probe.n_kept, (probe.predict(test) == test.gold_P).sum())


def test_probes_fitted_on_samples_of_rows_count_the_prompts_that_have_a_neuron(of_values):
    run, results = of_values
    train, valid, test = (open_negs(run.directory).select(split=split) for split in ("train", "valid", "test"))
    rows = [row for row in results.resamples if row.probe == "magn"]
    counts_BP = sample_counts(run.model_copy(update={"train_samples": 2}), "q", train)
    for row, scores_M in zip(rows, counts_BP @ slow_row_scores(train, "magn"), strict=True):
        probe = fit_vote(Vote("magn", "neg"), scores_M, valid, max_neurons=32)
        assert (row.n_neurons, row.n_correct) == (probe.n_kept, (probe.predict(test) == test.gold_P).sum())


def test_bfloat16_shards_hold_the_same_with_fewer_digits(run_on, done):
    family = done.model[0].rsplit("/", 1)[-1]
    run = run_on(family, "bfloat16", storage="bfloat16", probe=["magn"])
    run_extract(run, PlainSteps())
    exact, short = train_of(done), train_of(run)
    for layer in range(exact.n_layers):
        assert (exact.layer(layer).mask == short.layer(layer).mask).all()
        np.testing.assert_allclose(short.layer(layer).data, exact.layer(layer).data, rtol=2**-8)


# Rankings and probes


def slow_row_scores(split, rule):
    """The vote of every prompt and neuron that the prompt has, one by one: (P, M)."""
    scores = np.zeros((split.n_rows, split.n_layers * split.n_neurons), int)
    for flat in range(scores.shape[1]):
        negs, there = split.neurons([flat]).data[:, :, 0], split.active([flat])[:, 0]
        for row in np.flatnonzero(there):
            gold = split.gold_P[row]
            if rule == "polar":
                scores[row, flat] = 2 * np.sign(negs[row, gold]) - np.sign(negs[row]).sum()
            else:
                scores[row, flat] = np.sign(negs[row, gold] - negs[row]).sum()
    return scores


@pytest.mark.parametrize("rule", ["polar", "magn"])
def test_a_ranking_counts_the_votes_of_prompts_that_have_the_neuron(done, rule):
    split = train_of(done)
    ranking, expected = rank(split, rule), slow_row_scores(split, rule).sum(axis=0)
    assert (ranking.scores_K == expected[ranking.order_K]).all()
    assert np.abs(expected).max() > 0


@pytest.mark.parametrize("rule", ["polar", "magn"])
def test_a_vote_probe_hears_the_neurons_that_a_prompt_has(done, rule):
    saved = {path.stem: load_probe(path) for path in done.directory.rglob(f"*{rule}*.safetensors")}
    probe = next(iter(saved.values())).probe
    assert isinstance(probe, FittedVote) and probe.vote == Vote(rule, "neg")
    test = open_negs(done.directory).select(split="test")
    negs, there = test.neurons(probe.kept_K).data, test.active(probe.kept_K)
    expected = []
    for row in range(test.n_rows):
        votes = np.zeros(test.n_options)
        for k in np.flatnonzero(there[row]):
            directed = negs[row, :, k] * probe.ranking.polarity_K[k]
            votes += np.sign(directed) if rule == "polar" else directed == directed.max()
        expected.append(int(votes.argmax()))
    assert probe.predict(test).tolist() == expected


def test_a_forest_tells_an_absent_neuron_from_every_option(done):
    split = train_of(done)
    flat = np.arange(split.n_neurons)
    features, there = forest_features(split, flat), split.active(flat)
    assert (features[~there] == 0).all()
    assert (features[there] == split.layer(0).data.argmax(axis=1)[there] + 1).all()


def test_the_best_neurons_have_names_a_share_of_rows_and_means_over_these(done):
    split = train_of(done)
    for one in top_neurons(split, "magn", top=5):
        shape = split.layer_shapes[one.layer]
        there = split.active([(one.layer, one.neuron)])[:, 0]
        assert one.active == there.mean() > 0
        assert one.name == f"{one.layer}.{shape.name_of(one.neuron)}" and split.number_of(one.name) == (
            one.layer,
            one.neuron,
        )
        negs = split.neurons([(one.layer, one.neuron)]).data[there, :, 0]
        np.testing.assert_allclose(one.mean_negs, negs.mean(axis=0), rtol=1e-5)
    listed = best_neurons(done.directory, "magn").rows
    assert [row.name for row in listed[:5]] == [one.name for one in top_neurons(split, "magn", seed=0)[:5]]


def test_a_neuron_that_no_prompt_has_has_no_numbers(done):
    split = train_of(done)
    shape = split.layer_shapes[0]
    never = sorted(set(range(shape.n_experts)) - set(split.experts(0).ravel().tolist()))
    rows = read_neuron(split, 0, 0)
    assert (rows.active_P == split.active([(0, 0)])[:, 0]).all()
    assert len(rows.active.gold_P) == rows.active_P.sum()
    assert all(rows.active_P[moved.row] for moved in rows.most_moved(100))
    if never:
        means = neuron_means(split, [(0, never[0] * shape.n_units)])
        assert np.isnan(means.by_option_KO).all()


def test_names_lead_to_neurons_and_back(done):
    split = train_of(done)
    for layer, shape in enumerate(split.layer_shapes):
        for number in range(shape.n_neurons):
            assert split.number_of(split.name_of(layer, number)) == (layer, number)
    for wrong in ("0.4.0", "0.0.24", "9.0.0", "0.shared.99", "0.1.2.3", "0"):
        with pytest.raises(ShardError, match=re.escape(f"{wrong} is no neuron of ")):
            split.number_of(wrong)


def test_numbers_that_a_prompt_does_not_have_are_missing_in_frames_and_no_rows_in_queries(done):
    split = train_of(done)
    shape = split.layer_shapes[0]
    frame = split.to_pandas(layer=0)
    columns = [f"act_{split.name_of(0, number)}" for number in range(shape.n_neurons)]
    there = split.active([(0, number) for number in range(shape.n_neurons)])
    assert (frame[columns].notna().to_numpy() == there).all()
    (counted,) = query(done.directory, "select count(*) as n from negs(0) where split = 'train'").to_pylist()
    assert counted["n"] == there.sum() * split.n_options


def test_the_card_of_published_shards_says_what_experts_a_row_has(done):
    publication = read_publication(done.directory)
    card = dataset_card(publication, None)
    assert ("beside 12 neurons of every token" in card) == ("qwen2_moe" in done.model[0])
    assert "2 of them a token" in card and "router: through" in card
    assert all(column.meaning for one in publication.data for column in one.columns if column.name.endswith("_LL"))


# Analyses and the command line


def test_the_facts_of_a_model_count_its_experts():
    (rows,) = facts_table(tiny_model("qwen2_moe")).blocks
    assert ["experts", "4 of 8 neurons, 2 of them a token, beside 12 neurons of every token"] in rows


@pytest.fixture(scope="module")
def analysed(home):
    folder, questions = home
    values = {"model": [str(folder / "mixtral")], "dataset": [questions], "backend": "local", "shard_rows": 8}
    values |= {"out": folder / "skills", "variant": ["shots"], "top": [4, 16], "shift": [0.5], "draws": 2, "band": 8}
    run = read_run_file(SkillsRun, None, values)
    (findings,) = run_skills(run, PlainSteps()).findings
    return run, findings


def test_a_causal_check_compares_with_random_neurons_of_the_same_experts(analysed):
    run, findings = analysed
    assert {(row.neurons, row.size) for row in findings.datasets[0].causal} >= {
        ("top", 4),
        ("random", 4),
        ("bottom", 4),
    }
    train = open_negs(run.conditions[0].run.directory).select(split="train")
    experts = ExpertNeurons.of(train)
    active = np.concatenate([train.active([(layer, n) for n in range(96)]) for layer in range(3)], axis=1)
    assert (experts.in_training_M == active.any(axis=0)).all()
    top, *random, bottom = skill_sets(rank(train), [8], 3, 96, draws=3, seed=0, experts=experts)
    for one in random:
        assert not set(one.neurons_K) & set(top.neurons_K)
        assert (active[:, one.neurons_K].sum(axis=1) == active[:, top.neurons_K].sum(axis=1)).all()
    assert active[:, bottom.neurons_K].any(axis=0).all()
    with pytest.raises(NegError, match="neurons that training prompts have take 1 to"):
        skill_sets(rank(train), [145], 3, 96, draws=1, seed=0, experts=experts)


def test_shifted_skill_neurons_change_what_their_prompts_answer_and_no_others(analysed):
    run, findings = analysed
    changes = {row.shift: row.prob_change for row in findings.datasets[0].causal if row.neurons == "top"}
    assert any(change != 0 for change in changes.values())
    assert all(np.isfinite(change) for change in changes.values())


@pytest.mark.slow
def test_the_command_line_runs_a_mixture_of_experts_from_shards_to_the_curve_of_a_neuron(home):
    folder, questions = home
    out = folder / "command"
    common = ["--model", folder / "mixtral", "--dataset", questions, "--backend", "local", "--shard-rows", 8]
    ran = neg("pipeline", *common, "--probe", "magn", "--router", "fixed", "--out", out)
    assert ran.returncode == 0, ran.stderr
    name = next(csv.DictReader(neg("neurons", out, "--csv").stdout.splitlines()))["name"]
    looked = neg("neuron", out, name, "--split", "train", "--rows", 1, "--sweep")
    assert looked.returncode == 0, looked.stderr
    assert f"neuron {name} of" in looked.stdout and "measured curve" in looked.stdout
    wrong = neg("neuron", out, "0.9.9")
    assert wrong.returncode == 2 and "0.9.9 is no neuron of" in wrong.stderr


# What is refused


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mixtral", {"certify": 2}, "certificates are not made for mixtures of experts"),
        ("llama", {"router": "fixed"}, "has no experts, and router 'fixed' is for mixtures of experts: leave it out"),
    ],
)
def test_what_a_run_cannot_have_is_refused_before_anything_is_computed(run_on, family, changes, reason):
    with pytest.raises(ModelError, match=re.escape(reason)):
        plan(run_on(family, "refused", **changes))
