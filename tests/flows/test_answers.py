"""Runs whose rows name a probed token, or have answers of several tokens: what they store, say, and refuse."""

import json

import numpy as np
import pytest
from support import save_tiny_model
from typer.testing import CliRunner

from flows.cli.app import app
from flows.pipeline import run_pipeline
from flows.show.accuracy_tables import accuracy_tables
from negcore import load_probe, neurgrad, sweep
from negcore.errors import ModelError, NegError, ProbeError
from negcore.measure.loading import load_model
from negcore.model.encoding import encode
from negcore.store.reader import open_negs
from negcore.store.study import joined_sweep, read_study
from tasks.config.dataset_runs import SkillRun, SkillsRun
from tasks.config.reading import read_run_file
from tasks.plan import plan
from tasks.probe import probe_path
from tasks.skills import plan_skills
from tasks.steer import side_effect
from tasks.steps import PlainSteps

LABELS = ["Paris", "the best of times", "one two three"]
NAMES = ["Alder Birch", "Cedar Elm", "Fir Hazel", "Ivy Maple", "Oak", "Pine Rowan"]


def write_rows(file, **changes):
    """Write 36 rows that name the token of a subject, and have labels of several tokens."""
    rows = [
        {
            "prompt": f"Question {n}: which answer fits {NAMES[n % 6]} here? Answer:",
            "labels": LABELS,
            "answer": n % 3,
            "probe_at": NAMES[n % 6],
            "split": ("train", "valid", "test")[n // 12],
        }
        | changes
        for n in range(36)
    ]
    file.write_text("\n".join(json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    model = save_tiny_model("llama", folder / "tiny-llama")
    values = {"model": [str(model)], "backend": "local", "dataset": [write_rows(folder / "rows.jsonl")]}
    return values | {"max_neurons": 16, "probe": ["magn"], "shard_rows": 5, "answers": "sequence"}, folder


@pytest.fixture(scope="module")
def finished(made):
    values, folder = made
    run = read_run_file(SkillRun, None, values | {"out": folder / "run", "certify": 2, "certify_rows": 2})
    results = run_pipeline(run, PlainSteps())
    assert results.problems == []
    return run, results


def test_shards_hold_the_negs_at_the_named_tokens_for_all_tokens_of_the_answers(finished):
    run, results = finished
    split = open_negs(run.directory).select(split="test")
    examples = {example.id: example for example in plan(run)[0].datasets[0].splits[2].examples}
    own = [examples[id_] for id_ in split.ids]
    lm, prompts = load_model(run.model[0]), [one.prompt for one in own]
    encoded = encode(lm.card, prompts, own[0].labels, probe_at=[one.probe_end for one in own], answers="sequence")
    assert {lm.tokenizer.decode(ids[: at + 1])[-3:] for ids, at in zip(encoded.ids, encoded.probed_P, strict=True)} == {
        name[-3:] for name in NAMES
    }
    expected = neurgrad(lm, encoded)
    stored_POLN = np.stack([split.layer(layer) for layer in range(split.n_layers)], axis=2)
    np.testing.assert_allclose(stored_POLN, expected.negs_POLN, atol=1e-4 * np.abs(expected.negs_POLN).max())
    np.testing.assert_allclose(split.probs_PO, expected.probs_PO, rtol=1e-3)
    prompt = split.identity.prompt
    assert prompt["answers"] == "sequence" and prompt["probed"] == "probe_at"


def test_certificates_sweep_at_the_named_tokens(finished):
    run, results = finished
    (sweeps,) = plan(run)[0].datasets[0].sweeps
    stored = joined_sweep([read_study(sweeps.place.path(run.directory))])
    own, lm = sweeps.examples, load_model(run.model[0])
    encoded = encode(
        lm.card,
        [one.prompt for one in own],
        [one.labels for one in own],
        probe_at=[one.probe_end for one in own],
        answers="sequence",
    )
    expected = sweep(lm, encoded, answers=[one.answer for one in own], neurons=stored.neurons_K2)
    np.testing.assert_allclose(stored.base_P, expected.base_P, rtol=1e-3)
    np.testing.assert_allclose(stored.negs_PK, expected.negs_PK, rtol=0.02, atol=1e-3 * np.abs(expected.negs_PK).max())


def test_tables_and_names_say_how_prompts_were_read(finished):
    run, results = finished
    assert {one.reading for one in results.scores} == {"neurons at probe_at, answers of several tokens"}
    (table,) = accuracy_tables(results.scores, [], 1)
    assert "neurons at probe" in table.markdown and "answers of several tokens" in table.markdown
    assert "answers of several tokens" in plan(run)[0].datasets[0].name


def test_a_run_of_the_usual_kind_has_the_name_and_identity_from_before_there_was_a_choice(made, finished):
    values, folder = made
    usual = write_rows(folder / "usual.jsonl", probe_at=None, labels=["A", "B", "C"])
    silent = read_run_file(SkillRun, None, values | {"dataset": [usual], "answers": "token"})
    assert "answers" not in silent.science and "answers" in finished[0].science
    prompt = plan(silent)[0].datasets[0].splits[0].identity.comparable()["prompt"]
    assert not {"answers", "probed"} & prompt.keys()


def test_a_probe_answers_no_negs_of_another_place(made, finished):
    values, folder = made
    usual = write_rows(folder / "rows-at-end.jsonl", probe_at=None)
    other = read_run_file(SkillRun, None, values | {"dataset": [usual], "out": folder / "end"})
    assert run_pipeline(other, PlainSteps()).problems == []
    split = open_negs(finished[0].directory).select(split="test")
    probe = load_probe(probe_path(finished[0].directory, split.place.model, split.place.dataset, "magn"))
    assert len(probe.predict(split)) == split.n_rows
    with pytest.raises(
        ProbeError, match="fitted with probed 'probe_at' and cannot answer NEGs with probed .the prompt"
    ):
        probe.predict(open_negs(other.directory).select(split="test"))


def test_what_cannot_follow_is_refused_in_the_plan(made, finished):
    values, folder = made
    moe = save_tiny_model("mixtral", folder / "moe")
    with pytest.raises(NegError, match="probe_at and answers of several tokens are not made for mixtures of experts"):
        plan(read_run_file(SkillRun, None, values | {"model": [str(moe)]}))
    with pytest.raises(ModelError, match="weights that wait on cpu pass .* leave device_map out"):
        plan(read_run_file(SkillRun, None, values | {"device_map": "cpu"}))
    skills = {name: value for name, value in values.items() if name not in ("probe", "max_neurons")}
    with pytest.raises(NegError, match="curves of rankings know no answers of several tokens"):
        plan_skills(read_run_file(SkillsRun, None, skills | {"curves": True, "variant": ["shots"]}))
    planned = plan(finished[0])[0].datasets[0]
    with pytest.raises(NegError, match="steered answers know no answers of several tokens: NEGs, sweeps"):
        side_effect(load_model(values["model"][0]), planned, [(0, 1, 1.0)], 2, lambda row: None)


def test_warnings_tell_of_labels_that_others_go_on_from_and_of_rows_of_both_kinds(made):
    values, folder = made
    file = folder / "mixed.jsonl"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        del row["probe_at"]
    file.write_text("\n".join(json.dumps(row | {"labels": ["one", "one two", "three"]}) for row in rows))
    planned = plan(read_run_file(SkillRun, None, values | {"dataset": [str(file)]}))[0].datasets[0]
    assert "in 36 of 36 prompts" in planned.warnings[0] and "never more probable" in planned.warnings[0]
    assert "18 of 36 prompts are read at a token that probe_at names" in planned.warnings[1]


def test_the_probed_token_is_marked_where_a_dataset_is_shown_and_imported(made):
    values, folder = made
    runner, model = CliRunner(), values["model"][0]
    shown = runner.invoke(app, ["datasets", values["dataset"][0], "--answers", "sequence", "--model", model])
    assert shown.exit_code == 0, shown.output
    assert "probe_at names in 36 of 36 rows" in shown.output and "[[" in shown.output
    table = folder / "table.csv"
    rows = "\n".join(f"{name} number {n} is?,{'AB'[n % 2]},{name}" for n, name in enumerate(NAMES * 2))
    table.write_text(f"prompt,answer,probe_at\n{rows}\n")
    target = folder / "imported.jsonl"
    done = runner.invoke(app, ["import", str(table), "--out", str(target), "--model", model])
    assert done.exit_code == 0, done.output
    assert json.loads(target.read_text().splitlines()[0])["probe_at"] == NAMES[0]


def test_a_neurons_curve_is_measured_where_its_negs_were_read(finished, monkeypatch):
    run, calls = finished[0], []

    def recorded(lm, prompts, *given, **options):
        calls.append((prompts, sweep(lm, prompts, *given, **options)))
        return calls[-1][1]

    monkeypatch.setattr("negcore.measure.sweeps.sweep", recorded)
    shown = CliRunner().invoke(app, ["neuron", str(run.directory), "0.3", "--sweep", "--rows", "2"])
    assert shown.exit_code == 0, shown.output
    ((prompts, swept),) = calls
    examples = {tuple(one.token_ids.tolist()): one for one in plan(run)[0].datasets[0].splits[2].examples}
    own = [examples[tuple(ids)] for ids in prompts.ids]
    assert prompts.probed_P.tolist() == [one.probed for one in own]
    assert [len(tokens) for tokens in prompts.label_tokens_PO[0]] == [len(one) for one in own[0].label_tokens]
    split = open_negs(run.directory).select(split="test")
    stored_PO = split.layer(0)[[split.ids.index(one.id) for one in own], :, 3]
    assert np.isclose(swept.negs_PK, stored_PO, rtol=0.2).any(axis=1).all()
