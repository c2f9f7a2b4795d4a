"""Runs of every target: what they store, say, and refuse to mix."""

import json

import numpy as np
import pyarrow as pa
import pytest
from support import save_tiny_model, write_questions

from flows.linearity import run_linearity
from flows.pipeline import run_pipeline, run_probe
from flows.show.accuracy_tables import accuracy_tables, comparison_table
from flows.show.certificate_tables import certificate_tables
from flows.show.linearity_tables import linearity_tables, summary
from flows.show.neuron_tables import neuron_tables
from negcore.errors import NegError, ProbeError
from negcore.measure.estimators import estimate
from negcore.measure.interventions import intervene, random_sets
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.spread import activation_spreads
from negcore.measure.sweeps import sweep
from negcore.probing.saved_probes import load_probe
from negcore.store.integrity import metadata_of
from negcore.store.reader import open_negs
from negcore.store.study import joined_sweep, read_study
from tasks.config.dataset_runs import SkillRun
from tasks.config.linearity_run import LinearityRun
from tasks.config.reading import read_run_file
from tasks.plan import plan
from tasks.plan_linearity import plan_linearity
from tasks.probe import probe_path
from tasks.steps import PlainSteps

OTHERS = ["log-probability", "logit-difference"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny_model("llama", folder / "tiny-llama", n_positions=4096)
    return {"model": [str(model)], "backend": "local"}, folder


@pytest.fixture(scope="module")
def runs(made):
    """A run with certificates of every target, and its results."""
    values, folder = made
    values = values | {"dataset": [write_questions(folder)], "max_neurons": 16, "probe": ["magn"]}
    values |= {"certify": 2, "certify_rows": 2, "shard_rows": 8}
    found = {}
    for target in ("probability", *OTHERS):
        run = read_run_file(SkillRun, None, values | {"target": target, "out": folder / target})
        found[target] = run, run_pipeline(run, PlainSteps())
        assert found[target][1].problems == []
    return found


def test_a_run_that_does_not_name_the_usual_target_has_the_name_and_identity_from_before_there_was_a_choice(made, runs):
    values, folder = made
    named = runs["probability"][0]
    silent = read_run_file(SkillRun, None, values | {"dataset": list(named.dataset)})
    assert "target" not in silent.science and "target" not in named.science
    identity = plan(silent)[0].datasets[0].splits[0].identity
    assert "target" not in identity.comparable()
    assert len({run.name for run, _ in runs.values()}) == 3


@pytest.mark.parametrize("target", OTHERS)
def test_shards_hold_the_negs_of_their_target_and_every_file_names_it(runs, target):
    run, _ = runs[target]
    split = open_negs(run.directory).select(split="test")
    assert split.target == target and split.identity.comparable()["target"] == target
    examples = {example.id: example for example in plan(run)[0].datasets[0].splits[2].examples}
    own = [examples[id_] for id_ in split.ids]
    expected = neurgrad(load_model(run.model[0]), [one.prompt for one in own], own[0].labels, target=target)
    stored_POLN = np.stack([split.layer(layer) for layer in range(split.n_layers)], axis=2)
    np.testing.assert_allclose(stored_POLN, expected.negs_POLN, atol=1e-5 * np.abs(expected.negs_POLN).max())
    np.testing.assert_allclose(split.probs_PO, expected.probs_PO, rtol=1e-4)
    assert metadata_of(split.schema)["axes"]["neg_LL"].endswith(f"; {target} per activation")
    assert f"target={target!r}" in repr(split)


@pytest.mark.parametrize("target", OTHERS)
def test_tables_name_the_target_and_its_unit(runs, target):
    _, results = runs[target]
    (table,) = accuracy_tables(results.scores, [], 1)
    assert table.title.endswith(f"NEG of {target}")
    unit = {"log-probability": "log-probability (nats)", "logit-difference": "logit difference"}[target]
    (certificates,) = certificate_tables(results.certificates)
    assert f"{unit} per unit of activation" in certificates.caption and target in certificates.title
    (neurons,) = neuron_tables(results.neurons)
    assert f"{unit} per unit of activation" in neurons.caption and target in neurons.title
    page = (runs[target][0].directory / "report.html").read_text()
    assert f"NEG of {target}" in page


def test_the_page_of_a_run_says_what_its_negs_are_of(runs):
    for target, (run, _) in runs.items():
        assert f">{target}<" in (run.directory / "report.html").read_text()


def test_runs_of_several_targets_are_compared_with_their_targets_named(runs):
    table = comparison_table({target: results.scores for target, (_, results) in runs.items()})
    names = ["".join(str(piece) for piece in row[1]) for block in table.blocks for row in block]
    assert [f"NEG of {target}" in name for target, name in zip(runs, names, strict=True)] == [False, True, True]


def test_certificates_sweep_the_target_of_their_run(runs):
    for target, (run, _) in runs.items():
        (sweeps,) = plan(run)[0].datasets[0].sweeps
        lm, chosen = load_model(run.model[0]), sweeps.examples
        place = sweeps.place.path(run.directory)
        with pa.memory_map(str(next(place.glob("*.arrow")))) as file:
            columns = pa.ipc.open_file(file).schema.names
        assert ("probs" in columns, "values" in columns) == (target == "probability", target != "probability")
        settings = {"neurons": sweeps.measurement.neurons_K2, "target": target}
        answers = [one.answer for one in chosen]
        twin = sweep(lm, [one.prompt for one in chosen], chosen[0].labels, answers=answers, **settings)
        stored = joined_sweep([read_study(place)])
        assert stored.target == target
        np.testing.assert_allclose(stored.negs_PK, twin.negs_PK, rtol=1e-3, atol=1e-5 * np.abs(twin.negs_PK).max())


def test_shards_of_another_target_are_neither_continued_nor_probed(runs):
    run, other = runs["log-probability"][0], runs["logit-difference"][0]
    mixed = other.model_copy(update={"out": run.directory})
    problems = run_pipeline(mixed, PlainSteps()).problems
    assert problems and any("target: 'logit-difference' here, 'log-probability' there" in str(one) for one in problems)
    probed = run_probe(runs["probability"][0].model_copy(update={"out": run.directory}), PlainSteps())
    assert any("target: 'probability' here, 'log-probability' there" in str(one) for one in probed.problems)
    assert not probed.scores


def test_a_probe_answers_negs_of_its_own_target_alone(runs):
    run, other = runs["probability"][0], runs["log-probability"][0]
    split = open_negs(run.directory).select(split="test")
    probe = load_probe(probe_path(run.directory, split.place.model, split.place.dataset, "magn"))
    assert len(probe.predict(split)) == split.n_rows
    with pytest.raises(ProbeError, match="fitted with target 'probability'"):
        probe.predict(open_negs(other.directory).select(split="test"))


@pytest.fixture(scope="module")
def facts(made):
    rows = [
        {
            "uuid": f"R-{fact}",
            "prompt": f"It was the capital {fact}",
            "tpl": f"P{fact % 2}-0",
            "answer": "ABC"[fact % 3],
        }
        for fact in range(6)
    ]
    file = made[1] / "facts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def linearity(made, facts, target, **changes):
    values = made[0] | {"facts": facts, "prompts": 4, "neurons": 6, "bootstrap": 10, "draws": 1, "range": [1]}
    estimators = ["neurgrad", "gradient", "ablation", "log_probability_increase"]
    values |= {"estimator": estimators, "target": target, "out": made[1] / f"linearity-{target}"}
    return read_run_file(LinearityRun, None, values | changes)


@pytest.mark.parametrize("target", OTHERS)
def test_linearity_measures_estimates_and_shifts_sets_for_its_target(made, facts, target, monkeypatch):
    monkeypatch.setattr("flows.show.report.save_figures", lambda figures, folder: [])
    run = linearity(made, facts, target)
    results = run_linearity(run, PlainSteps())
    assert results.problems == []
    (findings,), (study,) = results.findings, plan_linearity(run)
    lm, examples = load_model(run.model[0]), study.facts.examples
    prompts, labels, answers = [e.prompt for e in examples], [e.labels for e in examples], [0] * len(examples)
    asked = {"answers": answers, "target": target}
    expected = sweep(lm, prompts, labels, neurons=findings.sweep.neurons_K2, shifts=findings.sweep.shifts_S, **asked)
    scale = np.abs(expected.changes_PKS).max()
    assert findings.sweep.target == target
    np.testing.assert_allclose(findings.sweep.changes_PKS, expected.changes_PKS, atol=1e-4 * scale)
    for name, scores_PK in findings.scores_PK.items():
        scores = estimate(lm, prompts, labels, estimator=name, neurons=findings.sweep.neurons_K2, **asked)
        np.testing.assert_allclose(scores_PK, scores, atol=1e-4 * np.abs(scores).max())
    true = intervene(lm, prompts, labels, sets=random_sets(lm, [64]), shifts=[2], **asked)
    (row,) = [row for row in findings.interventions if (row.set_size, row.shift) == (64, 2)]
    pearson = np.corrcoef(true.predicted_PDM.ravel(), true.changes_PDM.ravel())[0, 1]
    assert row.pearson == pytest.approx(pearson, abs=1e-3)
    assert f"NEG of {target}" in summary(findings)
    assert "per unit of activation" in linearity_tables(findings)[0].caption
    assert "probability per unit" not in linearity_tables(findings)[0].caption or target == "log-probability"


def test_a_facts_other_options_are_the_answers_of_the_other_facts(made, facts):
    (study,) = plan_linearity(linearity(made, facts, "logit-difference"))
    for example in study.facts.examples:
        assert example.answer == 0 and set(example.labels) == {" A", " B", " C"}
    (plain,) = plan_linearity(linearity(made, facts, "log-probability"))
    assert {example.id: example.labels[:1] for example in study.facts.examples} == {
        example.id: example.labels for example in plain.facts.examples
    }


def test_facts_with_one_answer_have_nothing_to_differ_from(made, facts):
    with pytest.raises(NegError, match="all 1 have the same; measure more prompts"):
        plan_linearity(linearity(made, facts, "logit-difference", prompts=1))


def test_an_unknown_target_is_refused_with_those_that_are_known(made, facts):
    with pytest.raises(NegError, match="target.*probability.*log-probability.*logit-difference"):
        linearity(made, facts, "log-odds")


def test_a_study_in_units_of_spread_shifts_every_neuron_by_its_own(made, facts, monkeypatch):
    monkeypatch.setattr("flows.show.report.save_figures", lambda figures, folder: [])
    shards = []
    for shard_rows in (1, 4):
        out = made[1] / f"spread-{shard_rows}"
        run = linearity(made, facts, "probability", shift_unit="sd", shard_rows=shard_rows, out=out)
        results = run_linearity(run, PlainSteps())
        assert results.problems == []
        shards.append(results.findings[0].sweep.values_PKS)
    np.testing.assert_allclose(*shards, rtol=1e-5)
    (findings,), (study,) = results.findings, plan_linearity(run)
    lm, sweep_ = load_model(run.model[0]), findings.sweep
    prompts, labels = ([getattr(e, name) for e in study.facts.examples] for name in ("prompt", "labels"))
    ids = [e.token_ids.tolist() for e in study.shard_sets[0].examples]
    spreads_K = activation_spreads(lm, ids, sweep_.neurons_K2)
    np.testing.assert_allclose(sweep_.spreads_K, spreads_K, rtol=1e-5)
    labels = [one[0] for one in labels]
    expected = sweep(lm, prompts, labels, neurons=sweep_.neurons_K2, shifts=sweep_.shifts_S, spreads=spreads_K)
    np.testing.assert_allclose(sweep_.changes_PKS, expected.changes_PKS, atol=1e-4 * np.abs(expected.changes_PKS).max())
    per_activation = estimate(lm, prompts, [[one] for one in labels], estimator="neurgrad", neurons=sweep_.neurons_K2)
    np.testing.assert_allclose(findings.scores_PK["neurgrad"], per_activation * spreads_K, rtol=1e-3, atol=1e-9)
    agreement, ranges = linearity_tables(findings)[:2]
    assert agreement.title.endswith("within ±1 sd") and "per standard deviation of the activation" in agreement.caption
    assert ranges.blocks[0][0][0] == "±1 sd"


def test_a_neuron_with_the_same_activation_everywhere_is_left_out_in_words(made, facts, monkeypatch):
    monkeypatch.setattr("flows.show.report.save_figures", lambda figures, folder: [])

    def with_one_still(lm, ids, neurons_K2):
        spreads_K = activation_spreads(lm, ids, neurons_K2)
        return np.where((neurons_K2 == (0, neurons_K2[0, 1])).all(axis=1), 0.0, spreads_K)

    monkeypatch.setattr("tasks.measure.references.activation_spreads", with_one_still)
    run = linearity(made, facts, "probability", shift_unit="sd", block_layers=3, out=made[1] / "still")
    (findings,) = run_linearity(run, PlainSteps()).findings
    assert findings.n_without_spread == 1 and len(findings.sweep.neurons_K2) == 5
    assert all(scores.shape[1] == 5 for scores in findings.scores_PK.values())
    assert "1 neuron left out: the same activation in all prompts" in summary(findings)


def test_one_prompt_has_no_spread(made, facts):
    with pytest.raises(NegError, match="there is one prompt: measure more, or set shift_unit to activation"):
        plan_linearity(linearity(made, facts, "probability", shift_unit="sd", prompts=1))


def test_units_of_shifts_are_other_measurements(made, facts):
    plain, own = (
        plan_linearity(linearity(made, facts, "probability", shift_unit=unit))[0] for unit in ("activation", "sd")
    )
    digests = [{one.place.kind: one.identity.digest for one in study.shard_sets} for study in (plain, own)]
    assert digests[0]["sweeps"] != digests[1]["sweeps"]
    assert digests[0]["interventions"] != digests[1]["interventions"]
    assert digests[0]["estimates"] == digests[1]["estimates"]
    assert "shift_unit" not in linearity(made, facts, "probability").science
