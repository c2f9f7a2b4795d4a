"""The linearity flow on tiny models and a small file of facts: plain, on Ray actors, under Prefect, as a command."""

import json
import random
import re
import shutil
import sqlite3
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from support import neg, save_tiny_model

from flows.linearity import run_linearity
from flows.show.linearity_figures import linearity_figures
from flows.show.linearity_tables import linearity_tables, summary
from negcore.errors import DatasetError, NegError
from negcore.measure.estimators import ESTIMATORS, WITH_REFERENCES, estimate
from negcore.measure.interventions import intervene, random_sets
from negcore.measure.loading import load_model
from negcore.measure.sweeps import sweep
from negcore.texts import plain
from tasks.config.linearity_run import EstimatorName, LinearityRun, PatchingName
from tasks.config.reading import read_run_file
from tasks.config.run_file import write_run_file
from tasks.measure.worker import ModelWorker
from tasks.plan_linearity import plan_linearity
from tasks.steps import PlainSteps

CHEAP = ["neurgrad", "gradient"]
HOSTILE = "$x^2$ <script> [link](http://x) "


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: str(save_tiny_model(family, folder / f"tiny-{family}")) for family in ("llama", "bert")}


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A file of 12 facts in two wordings each, and one whose answer is two tokens."""
    rng = random.Random(0)
    words = "the best of times it was capital France Germany Paris Berlin one two three".split()  # noqa: SIM905
    rows = [{"uuid": "odd", "prompt": "It was", "tpl": "P9-0", "answer": "several"}]
    for fact in range(12):
        for wording in range(2):
            prompt = HOSTILE + " ".join(rng.choices(words, k=4 + wording)) + f" {fact}"
            answer = "ABCDE"[fact % 5]
            rows.append({"uuid": f"R-{fact}", "prompt": prompt, "tpl": f"P{fact % 3}-{wording}", "answer": answer})
    file = tmp_path_factory.mktemp("data") / "facts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture
def run(models, facts, tmp_path):
    values = {"model": [models["llama"]], "facts": facts, "backend": "local", "prompts": 6, "neurons": 9}
    sizes = {"shard_prompts": 4, "block_layers": 2, "bootstrap": 20, "draws": 2, "range": [1, 2], "estimator": CHEAP}
    return read_run_file(LinearityRun, None, values | sizes | {"out": tmp_path / "run"})


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take seconds, and most tests are about something else."""
    monkeypatch.setattr("flows.show.report.save_figures", lambda figures, folder: [])


def contents(directory):
    """Every published shard and receipt, and its bytes."""
    files = (path for path in directory.rglob("part-*") if path.parent.name != "_seconds")
    return {path.relative_to(directory): path.read_bytes() for path in files}


def table(run, name):
    return pa.ipc.open_file(run.directory / "linearity" / f"{name}.arrow").read_all().to_pylist()


def test_every_estimator_can_be_asked_for():
    assert [*get_args(EstimatorName), *get_args(PatchingName)] == list(ESTIMATORS)
    assert list(get_args(PatchingName)) == list(WITH_REFERENCES)


def test_estimators_that_need_other_prompts_are_not_measured_unasked(run):
    assert not {*LinearityRun.model_fields["estimator"].default} & {*WITH_REFERENCES}


def test_the_shards_hold_what_the_library_measures(run, models, undrawn):
    results = run_linearity(run, PlainSteps())
    assert results.problems == []
    (findings,), (study,) = results.findings, plan_linearity(run)
    examples = study.facts.examples
    prompts, labels = [e.prompt for e in examples], [e.labels[0] for e in examples]
    lm, neurons = load_model(models["llama"]), findings.sweep.neurons_K2
    assert np.bincount(neurons[:, 0]).tolist() == [3, 3, 3]
    expected = sweep(lm, prompts, labels, neurons=neurons, shifts=findings.sweep.shifts_S)
    scale = np.abs(expected.changes_PKS).max()
    np.testing.assert_allclose(findings.sweep.changes_PKS, expected.changes_PKS, atol=1e-4 * scale)
    for name in CHEAP:
        scores = estimate(lm, prompts, [[label] for label in labels], estimator=name, neurons=neurons)
        np.testing.assert_allclose(findings.scores_PK[name], scores, atol=1e-5 * np.abs(scores).max())
    sets = [neurons for seed in (0, 1) for neurons in random_sets(lm, [64], seed=seed)]
    true = intervene(lm, prompts, labels, sets=sets, shifts=[2])
    (row,) = [row for row in findings.interventions if (row.set_size, row.shift) == (64, 2)]
    pearson = np.corrcoef(true.predicted_PDM.ravel(), true.changes_PDM.ravel())[0, 1]
    assert row.pearson == pytest.approx(pearson, abs=1e-3)


def test_a_run_by_nodes_has_the_lines_of_the_whole_grid_and_says_how_many_curves(run, undrawn):
    by_nodes = run.model_copy(update={"nodes": 5, "out": run.out.with_name("nodes")})
    (whole,), (few,) = (run_linearity(one, PlainSteps()).findings for one in (run, by_nodes))
    share = few.sweep.by_nodes_PK.mean()
    assert share > 0.5 and whole.sweep.by_nodes_PK is None
    assert f"16 shifts, {share:.1%} of the curves by nodes (" in summary(few)
    assert "16 shifts (" in summary(whole)
    for one, other in zip(few.ranges, whole.ranges, strict=True):
        assert (one.range, one.layer, one.n_constant) == (other.range, other.layer, other.n_constant)
        assert one.linear_share == other.linear_share
    scale = np.abs(whole.sweep.negs_PK).max()
    np.testing.assert_allclose(few.sweep.negs_PK, whole.sweep.negs_PK, atol=5e-3 * scale)


def test_shards_of_other_nodes_are_never_mixed(run, undrawn):
    assert not run_linearity(run, PlainSteps()).problems
    before = contents(run.directory)
    for other in ({"nodes": 5}, {"nodes": 6}):
        problems = run_linearity(run.model_copy(update=other), PlainSteps()).problems
        assert problems and "sweeps" in str(problems)
    assert contents(run.directory) == before
    assert len({one.model_copy(update={"out": None}).directory for one in (run, by(run, 5), by(run, 6))}) == 3


def by(run, nodes):
    return run.model_copy(update={"nodes": nodes})


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_run_compares_every_estimator_in_tables(run, models, family, undrawn):
    run = run.model_copy(update={"model": (models[family],), "estimator": tuple(ESTIMATORS)})
    results = run_linearity(run, PlainSteps())
    assert results.problems == []
    (findings,) = results.findings
    assert (findings.n_facts, findings.n_multi_token) == (25, 1)
    agreement = {row["estimator"]: row for row in table(run, "agreement") if row["layer"] is None and row["range"] == 1}
    assert set(agreement) == set(ESTIMATORS)
    assert agreement["neurgrad"]["pearson"] == max(row["pearson"] for row in agreement.values()) > 0.9
    assert [name for name, row in agreement.items() if row["mae"] is not None] == ["neurgrad", "gradient"]
    effects = {row["estimator"]: row for row in table(run, "effects")}
    assert list(effects) == ["attribution_patching", "atp_star", "relp"]
    assert {row["measured"] for row in effects.values()} == {"resample_ablation"}
    assert effects["attribution_patching"]["pearson"] > 0.5
    scores = findings.scores_PK
    error = np.abs(scores["relp"] - scores["resample_ablation"].astype(np.float64)).mean()
    assert effects["relp"]["mae"] == pytest.approx(error)
    assert "another prompt, drawn at random" in str(linearity_tables(findings)[1].caption)
    assert {row["pairs"] for row in table(run, "stability")} >= {"all", "same fact, other wording"}
    assert {row["set_size"] for row in table(run, "interventions")} == {1, 2, 4, 8, 16, 32, 64}
    assert all(row["seconds_per_prompt"] > 0 for row in table(run, "costs"))


def test_figures_are_drawn_in_three_forms_each_and_show_no_prompt(run):
    results = run_linearity(run, PlainSteps())
    assert results.problems == []
    written = sorted((run.directory / "linearity" / "figures").iterdir())
    assert [path.suffix for path in written] == [".pdf", ".png", ".svg"] * 5
    for path in written:
        assert path.read_bytes()[:4] in (b"%PDF", b"\x89PNG", b"<svg")
        assert b"[link]" not in path.read_bytes()
    page = (run.directory / "report.html").read_text()
    assert "[link]" not in page and page.count('data-figure="') == 7


def test_a_fact_comes_in_all_its_wordings(run):
    (study,) = plan_linearity(run)
    facts = [example.id.split("/")[-1] for example in study.facts.examples]
    assert facts[0::2] == facts[1::2]
    assert len(set(facts)) == 3


def test_a_sweep_of_all_neurons_of_one_prompt_goes_on_in_the_middle(run, monkeypatch, undrawn):
    run = run.model_copy(update={"prompts": 1, "neurons": "all", "block_layers": 1})
    whole = run.model_copy(update={"out": run.directory.with_name("whole")})
    assert run_linearity(whole, PlainSteps()).problems == []
    honest = ModelWorker.run

    def interrupted(self, job):
        if job.place.part == "layers-02-02":
            raise KeyboardInterrupt
        return honest(self, job)

    monkeypatch.setattr(ModelWorker, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_linearity(run, PlainSteps())
    monkeypatch.undo()
    resumed = run_linearity(run, PlainSteps())
    assert sum(part.n_reused for part in resumed.extracted) == sum(part.n_computed for part in resumed.extracted) + 4
    assert [part.place.part for part in resumed.extracted if part.n_computed] == ["layers-02-02"]
    assert contents(run.directory) == contents(whole.directory)


def test_a_written_run_file_asks_for_the_very_same_numbers(models, facts, tmp_path):
    run = read_run_file(LinearityRun, None, {"model": [models["llama"]], "facts": facts, "out": tmp_path, "neurons": 9})
    replayed = read_run_file(LinearityRun, write_run_file(run), {})
    (study,), (again,) = plan_linearity(run), plan_linearity(replayed)
    assert replayed.name == run.name
    assert [one.identity.digest for one in again.shard_sets] == [one.identity.digest for one in study.shard_sets]


def with_counterfactuals(facts, folder):
    """The same facts, each beside a prompt of as many tokens whose last digit is another."""
    rows = [json.loads(line) for line in Path(facts).read_text().splitlines()]
    for row in rows:
        row["counterfactual"] = row["prompt"][:-1] + "01"[row["prompt"].endswith("0")]
    file = folder / Path(facts).name
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_a_counterfactual_of_the_dataset_is_what_a_prompt_is_patched_from(run, models, facts, tmp_path, undrawn):
    run = run.model_copy(update={"facts": with_counterfactuals(facts, tmp_path), "estimator": tuple(WITH_REFERENCES)})
    results = run_linearity(run, PlainSteps())
    assert results.problems == []
    (findings,), (study,) = results.findings, plan_linearity(run)
    assert "its counterfactual" in str(linearity_tables(findings)[1].caption)
    lm, neurons = load_model(models["llama"]), findings.sweep.neurons_K2
    rows = [(e.prompt, e.counterfactual, e.labels) for e in study.facts.examples]
    prompts, counterfactuals, labels = (list(column) for column in zip(*rows, strict=True))
    for name in WITH_REFERENCES:
        references = prompts if name == "mean_ablation" else counterfactuals
        scores = estimate(lm, prompts, labels, estimator=name, neurons=neurons, references=references)
        np.testing.assert_allclose(findings.scores_PK[name], scores, atol=2e-5 * np.abs(scores).max())


def test_counterfactuals_change_no_number_that_does_not_come_from_them(run, facts, tmp_path):
    pairs = run.model_copy(update={"facts": with_counterfactuals(facts, tmp_path)})
    patched = {"estimator": (*CHEAP, "attribution_patching", "mean_ablation")}

    def identities(one):
        (study,) = plan_linearity(one.model_copy(update=patched))
        return {one.place.part: one.identity.comparable() for one in study.shard_sets}

    drawn, paired = identities(run), identities(pairs)
    assert {part for part in drawn if drawn[part] != paired[part]} == {"attribution_patching"}


def test_another_estimator_later_computes_that_one_only(run, undrawn):
    run_linearity(run, PlainSteps())
    more = run.model_copy(update={"estimator": (*CHEAP, "ablation")})
    results = run_linearity(more, PlainSteps())
    assert [part.place.part for part in results.extracted if part.n_computed] == ["ablation"]


def test_ray_actors_write_the_same_bytes_as_one_local_worker(run, tmp_path, undrawn):
    run_linearity(run, PlainSteps())
    other = run.model_copy(update={"backend": "ray", "workers": 2, "out": tmp_path / "ray"})
    assert run_linearity(other, PlainSteps()).problems == []
    assert contents(other.directory) == contents(run.directory)
    for name in ("ranges", "agreement", "interventions"):
        assert table(other, name) == table(run, name)


def test_lost_prompts_are_reported_and_their_model_has_no_tables(run, monkeypatch):
    honest = ModelWorker.run

    def failing(self, job):
        if job.place.part == "gradient" and job.index == 1:
            raise RuntimeError("poison row")
        return honest(self, job)

    monkeypatch.setattr(ModelWorker, "run", failing)
    results = run_linearity(run, PlainSteps())
    assert results.findings == []
    (problem,) = results.problems
    assert "estimates gradient: shard 1, 2 rows lost: RuntimeError: poison row" in problem


def faulty_prompts(monkeypatch, row_of_kind, fault):
    """Let a fault befall one prompt of each kind of measurement, by its number among the prompts."""
    honest = ModelWorker._measure

    def measured(self, job, examples):
        columns = honest(self, job, examples)
        for row, example in enumerate(examples):
            if job.place.kind in row_of_kind and example.id == row_of_kind[job.place.kind]:
                fault(columns, row)
        return columns

    monkeypatch.setattr(ModelWorker, "_measure", measured)


def poison(columns, row):
    raise RuntimeError("poison row")


def test_a_poison_row_is_isolated_and_the_study_goes_on_without_it(run, monkeypatch):
    (study,) = plan_linearity(run)
    ids = [example.id for example in study.facts.examples]
    faulty_prompts(monkeypatch, {"sweeps": ids[1], "estimates": ids[4], "interventions": ids[5]}, poison)
    results = run_linearity(run, PlainSteps())
    assert results.problems == []
    aside = {plain(row).rsplit(": ", 3)[1].partition(" (")[0] for row in results.set_aside}
    assert aside == {ids[1], ids[4], ids[5]}
    assert all(row.endswith("RuntimeError: poison row") for row in results.set_aside)
    (findings,) = results.findings
    assert findings.ids == [id_ for id_ in ids if id_ not in (ids[1], ids[4])]
    assert findings.sweep.probs_PKS.shape[0] == findings.scores_PK["gradient"].shape[0] == 4
    monkeypatch.undo()
    again = run_linearity(run, PlainSteps())
    assert (sum(one.n_computed for one in again.extracted), again.set_aside) == (0, results.set_aside)


def test_a_prompt_without_the_poison_row_has_the_numbers_that_it_has_with_it(run, monkeypatch, tmp_path):
    whole = run_linearity(run.model_copy(update={"out": tmp_path / "whole"}), PlainSteps()).findings[0]
    faulty_prompts(monkeypatch, {"sweeps": whole.ids[1]}, poison)
    partly = run_linearity(run, PlainSteps()).findings[0]
    kept = [whole.ids.index(id_) for id_ in partly.ids]
    np.testing.assert_allclose(partly.sweep.probs_PKS, whole.sweep.probs_PKS[kept], rtol=1e-5)
    np.testing.assert_allclose(partly.scores_PK["gradient"], whole.scores_PK["gradient"][kept], rtol=1e-5)


def spoil(columns, row):
    """Make one number of a row NaN: of the first column, whichever that is."""
    first = next(values for values in columns.values() if values.dtype.kind == "f")
    first.reshape(len(first), -1)[row, 0] = np.nan


def is_located(line):
    """Whether a line names the place of a row in its file, and what is wrong with it."""
    return re.search(r"facts\.jsonl:\d+\): 1 NaN or infinite values, in ", line)


@pytest.mark.parametrize("kind", ["sweeps", "estimates", "interventions"])
def test_numbers_that_are_not_finite_fail_their_shard_or_are_skipped(run, monkeypatch, kind):
    (study,) = plan_linearity(run)
    id_ = study.facts.examples[0].id
    faulty_prompts(monkeypatch, {kind: id_}, spoil)
    failed = run_linearity(run, PlainSteps())
    assert failed.findings == []
    assert all(map(is_located, failed.problems))
    skipped = run_linearity(run.model_copy(update={"nonfinite": "skip"}), PlainSteps())
    assert skipped.problems == []
    assert all(map(is_located, skipped.set_aside))
    kept = run_linearity(run.model_copy(update={"nonfinite": "keep"}), PlainSteps())
    assert (kept.findings, kept.set_aside) == ([], [])
    (problem,) = kept.problems
    assert "is NaN or infinite, and no table can be made of that" in problem


def test_a_model_that_cannot_be_loaded_is_one_problem_and_the_others_go_on(run, models, tmp_path):
    torn = Path(shutil.copytree(models["bert"], tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    results = run_linearity(run.model_copy(update={"model": (str(torn), *run.model)}), PlainSteps())
    (problem,) = results.problems
    assert "is not safetensors" in problem
    assert [findings.model for findings in results.findings] == list(run.model)


def test_other_neurons_in_the_same_directory_are_refused_with_the_difference(run, undrawn):
    run_linearity(run, PlainSteps())
    results = run_linearity(run.model_copy(update={"seed": 1}), PlainSteps())
    assert len(results.problems) == 3
    assert all("ShardError" in problem and "here" in problem for problem in results.problems)


def test_bad_input_is_refused_before_any_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.measure.worker.load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(NegError, match="tiny-llama: 73 neurons cannot be drawn; the model has 1 to 72"):
        plan_linearity(run.model_copy(update={"neurons": 73}))
    with pytest.raises(DatasetError, match="absent.jsonl"):
        plan_linearity(run.model_copy(update={"facts": "absent.jsonl"}))
    with pytest.raises(DatasetError, match="none of the 250 answers is one token"):
        plan_linearity(run.model_copy(update={"facts": "mini/facts"}))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--neurons", "many", "neurons is 'many'"),
        ("--neurons", "0", "give a whole number from 1, or 'all'"),
        ("--range", "-1", "--range is '-1'"),
        ("--estimator", "guess", "estimator"),
        ("--facts", "facts.csv", "allowed: a .feather, .parquet or .jsonl file, or 'mini/facts'"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(models, tmp_path, option, value, says):
    refused = neg("linearity", "--model", models["llama"], "--out", tmp_path / "run", option, value)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert says in refused.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_under_prefect_shows_its_tables_within_80_columns(models, facts, tmp_path):
    options = ["--model", models["llama"], "--facts", facts, "--prompts", 4, "--neurons", 6, "--bootstrap", 20]
    ran = neg("linearity", *options, "--backend", "local", "--out", tmp_path / "run", COLUMNS="80")
    assert ran.returncode == 0, ran.stderr
    assert "1 of 25 facts left out: their answer is not one token" in ran.stdout
    assert "NeurGrad" in ran.stdout
    assert "…" not in ran.stdout
    wide = [line for line in ran.stdout.splitlines() if len(line) > 80 and "/" not in line]
    assert [line.partition(" on ")[0] for line in wide] == ["tiny-llama"]  # a sentence of what is measured, no table
    (database,) = (tmp_path / "run").rglob("prefect.db")
    with sqlite3.connect(database) as records:
        states = dict(records.execute("select name, state_type from task_run"))
        kinds = {kind for (kind,) in records.execute("select distinct type from artifact")}
        shown = " ".join(str(row) for row in records.execute("select data, description from artifact"))
    assert set(states.values()) == {"COMPLETED"}
    assert len(states) == 4  # interventions, estimates, sweeps and the analysis
    assert kinds >= {"table", "image", "markdown"} and "progress" not in kinds
    assert "script" not in shown


def test_studies_of_half_types_and_of_changed_formulas_are_told_from_earlier_ones(run):
    def studies(dtype):
        (study,) = plan_linearity(run.model_copy(update={"dtype": dtype, "estimator": get_args(EstimatorName)}))
        return {one.place.part: one.identity.study for one in study.shard_sets}

    single, half = studies("float32"), studies("bfloat16")
    assert half == {part: {**settings, "differences": "float32"} for part, settings in single.items()}
    changed = {part for part, settings in single.items() if "formula" in settings}
    assert changed == {"integrated_gradients", "log_probability_increase"}


def test_a_sweep_in_a_half_type_is_stored_as_the_same_weights_give_it_in_float32(run, tmp_path, undrawn):
    folder = Path(run.model[0])
    lm = load_model(str(folder), dtype="bfloat16")
    shutil.copytree(folder, tmp_path / "wide" / folder.name)
    lm.model.float().save_pretrained(tmp_path / "wide" / folder.name)
    wide = run.model_copy(update={"model": (str(tmp_path / "wide" / folder.name),), "out": tmp_path / "of-wide"})
    run_linearity(run.model_copy(update={"dtype": "bfloat16"}), PlainSteps())
    run_linearity(wide, PlainSteps())
    for name in ("ranges", "sizes"):
        in_half, in_float32 = ([row | {"model": ""} for row in table(one, name)] for one in (run, wide))
        assert in_half == in_float32


# Mixtures of experts


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures")
    return {family: str(save_tiny_model(family, folder / f"tiny-{family}")) for family in ("mixtral", "qwen2_moe")}


def on_experts(run, model, **changes):
    values = {"model": (model,), "neurons": 40, "estimator": LinearityRun.model_fields["estimator"].default}
    return run.model_copy(update=values | changes)


@pytest.mark.parametrize(("family", "router"), [("mixtral", "through"), ("qwen2_moe", "fixed")])
def test_a_study_of_experts_counts_the_neurons_that_prompts_have(run, mixtures, family, router, undrawn):
    run = on_experts(run, mixtures[family], router=router)
    results = run_linearity(run, PlainSteps())
    assert results.problems == []
    (findings,), (study,) = results.findings, plan_linearity(run)
    lm = load_model(mixtures[family], router=router)
    prompts, labels = zip(*((one.prompt, one.labels[0]) for one in study.facts.examples), strict=True)
    neurons = findings.sweep.neurons_K2
    assert np.ptp(np.bincount(neurons[:, 0])) <= 1 and len(neurons) == 40
    expected = sweep(lm, prompts, labels, neurons=neurons, shifts=findings.sweep.shifts_S)
    active = findings.sweep.active_PK
    assert (active == expected.active_PK).all() and 0 < active.mean() < 1
    scale = np.abs(expected.changes_PKS).max()
    np.testing.assert_allclose(findings.sweep.changes_PKS, expected.changes_PKS, atol=1e-4 * scale)
    for name, scores in findings.scores_PK.items():
        assert (scores.mask == ~active).all()
        target = "log-probability" if name == "log_probability_increase" else "probability"
        own = estimate(lm, prompts, [[one] for one in labels], estimator=name, neurons=neurons, target=target)
        np.testing.assert_allclose(scores[active].data, own[active].data, atol=1e-4 * np.abs(own).max())
    assert {row["n"] for row in table(run, "agreement") if row["layer"] is None} == {active.sum()}
    whole, *by_layer = table(run, "active")
    assert (whole["n"], whole["n_active"]) == (active.size, active.sum())
    assert [row["n_active"] for row in by_layer] == [active[:, neurons[:, 0] == layer].sum() for layer in range(3)]
    agreement = {row.estimator: row.pearson for row in findings.agreement if row.layer is None and row.range == 1}
    assert agreement["neurgrad"] == max(agreement.values()) > 0.7
    assert f"a prompt has {active.mean():.1%} of the neurons" in summary(findings)
    assert linearity_figures(findings)


def test_sets_of_experts_are_told_with_the_neurons_that_were_shifted(run, mixtures, undrawn):
    run = on_experts(run, mixtures["mixtral"], estimator=("neurgrad",))
    results = run_linearity(run, PlainSteps())
    assert results.problems == []
    sets = {row["set_size"]: row for row in table(run, "active_sets")}
    assert sets[1]["mean_shifted"] == 1 and sets[1]["n_active"] < sets[1]["n"] == 12
    assert sets[256]["n_active"] == 12 and sets[256]["mean_shifted"] == pytest.approx(128, abs=8)
    assert {row["n"] for row in table(run, "interventions") if row["set_size"] == 1} == {sets[1]["n_active"]}
    text = linearity_tables(results.findings[0])[-1].markdown
    assert "of these" in text and "Shifted: neurons of a set that a prompt has" in text


def test_a_study_of_experts_may_shift_by_their_own_spread(run, mixtures, undrawn):
    run = on_experts(run, mixtures["mixtral"], estimator=("neurgrad",), shift_unit="sd", neurons=60)
    results = run_linearity(run, PlainSteps())
    assert results.problems == []
    (findings,) = results.findings
    assert findings.n_without_spread > 0 and len(findings.sweep.neurons_K2) == 60 - findings.n_without_spread
    assert findings.sweep.active_PK.any(axis=0).all()
    assert next(row.pearson for row in findings.agreement if row.range == 1) > 0.7


def test_what_a_study_cannot_ask_of_experts_or_of_another_model_is_refused(run, mixtures, models):
    with pytest.raises(
        NegError, match=r"estimators that take activations from other prompts \(relp\) are not made for"
    ):
        plan_linearity(on_experts(run, mixtures["mixtral"], estimator=("neurgrad", "relp")))
    with pytest.raises(NegError, match="has no experts, and router 'fixed' is for mixtures of experts: leave it out"):
        plan_linearity(run.model_copy(update={"router": "fixed"}))


def test_a_study_of_two_choices_of_the_router_has_shards_of_two_identities(run, mixtures):
    through, fixed = (
        plan_linearity(on_experts(run, mixtures["mixtral"], router=one))[0].shard_sets[0].identity.comparable()
        for one in ("through", "fixed")
    )
    assert through["experts"]["router"] == "through" and fixed["experts"]["router"] == "fixed"
