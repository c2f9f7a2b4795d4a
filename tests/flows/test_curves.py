"""Curves of rankings in a skills run: measured, resumed, shown, and written as MIB reads them."""

import json

import numpy as np
import pyarrow as pa
import pytest
from support import save_tiny_model, write_questions

from flows.show.faithfulness_tables import faithfulness_tables
from flows.skills import count_skills_steps, run_skills
from negcore.analysis.faithfulness import sizes
from negcore.errors import NegError
from negcore.measure.ablation import silence_sets
from negcore.measure.loading import load_model
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillsRun
from tasks.config.reading import read_run_file
from tasks.measure.faithfulness import mean_sizes
from tasks.plan import plan
from tasks.skills import circuit_path, plan_skills
from tasks.steps import PlainSteps


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = str(save_tiny_model("llama", folder / "tiny-llama", n_positions=4096))
    values = {"model": [model], "dataset": [write_questions(folder)], "backend": "local", "shard_rows": 8}
    return values | {"variant": ["shots"], "top": [4], "draws": 2, "shift": [0.5], "band": 8, "tree_neurons": 16}


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    return read_run_file(SkillsRun, None, settings | {"curves": True, "out": tmp_path_factory.mktemp("run")})


@pytest.fixture(scope="module")
def results(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.show.report.save_figures", lambda figures, folder: [])
        results = run_skills(run, PlainSteps())
    assert results.problems == []
    return results


def table(run, name):
    return pa.ipc.open_file(run.directory / "skills" / f"{name}.arrow").read_all().to_pylist()


def test_every_ranking_has_curves_areas_and_circuits_in_tables(run, results):
    kinds = ("ranking", "same layers", "matched")
    assert [(row["probe"], row["neurons"]) for row in table(run, "circuits")] == [
        (probe, kind) for probe in ("polar", "magn") for kind in kinds
    ]
    metrics = ("probability", "accuracy", "logit difference", "KL")
    assert {(row["mode"], row["metric"], row["neurons"]) for row in table(run, "areas")} == {
        (mode, metric, kind) for mode in ("deletion", "insertion") for metric in metrics for kind in kinds
    }
    assert {row["size"] for row in table(run, "curves")} == {*sizes(72), 72}


def test_a_point_of_a_curve_is_that_of_neurons_silenced_by_hand(run, results):
    (findings,) = results.findings
    (one,) = findings.datasets
    lm, examples = load_model(run.model[0]), plan(run.conditions[0].run)[0].datasets[0].splits[2].examples
    (order,) = [
        row["nodes"] for row in [json.loads(circuit_path(run.directory, lm.card.name, one.dataset, "magn").read_text())]
    ]
    assert order.keys() == {"m0", "m1", "m2"}
    prompts, golds = [example.prompt for example in examples], np.array([example.answer for example in examples])
    result = silence_sets(lm, prompts, [example.labels for example in examples], silent_RM=np.ones((1, 72), bool))
    own = [row for row in one.faithfulness.curves if (row.probe, row.mode, row.size) == ("magn", "deletion", 72)]
    by_metric = {row.metric: row.value for row in own if row.neurons == "ranking"}
    gold_logs_P = result.log_probs_PRO[np.arange(len(golds)), 0, golds]
    assert by_metric["probability"] == pytest.approx(np.exp(gold_logs_P).mean(), rel=1e-5)
    assert by_metric["KL"] == pytest.approx(result.kl_PR.mean(), rel=1e-4)


def test_a_circuit_names_the_scores_of_every_layer(run, results):
    train = open_negs(run.conditions[0].run.directory).select(split="train")
    (findings,) = results.findings
    circuit = json.loads(circuit_path(run.directory, findings.model, findings.datasets[0].dataset, "magn").read_text())
    assert circuit["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 16}
    negs_POLN = np.stack([train.layer(layer) for layer in range(3)], axis=2)
    gold_POLN = negs_POLN[np.arange(train.n_rows), train.gold_P][:, None]
    scores_LN = np.sign(gold_POLN - negs_POLN).sum(axis=(0, 1))
    for layer in range(3):
        assert circuit["nodes"][f"m{layer}"]["score"] == pytest.approx(np.abs(scores_LN[layer]).sum())
    np.testing.assert_allclose(
        mean_sizes(train), np.abs(gold_POLN[:, 0]).mean(axis=0, dtype=np.float64).ravel(), rtol=1e-6
    )


def test_the_same_run_again_measures_nothing_and_without_curves_all_else_is_the_same(run, results, monkeypatch):
    monkeypatch.setattr("flows.show.report.save_figures", lambda figures, folder: [])
    stored = {path: path.stat().st_mtime_ns for path in run.directory.rglob("part-*.arrow")}
    again = run_skills(run, PlainSteps())
    assert again.findings[0].datasets[0].faithfulness == results.findings[0].datasets[0].faithfulness
    plain = run_skills(run.model_copy(update={"curves": False}), PlainSteps())
    assert plain.findings[0].datasets[0].faithfulness is None
    assert plain.findings[0].datasets[0].causal == results.findings[0].datasets[0].causal
    assert stored == {path: path.stat().st_mtime_ns for path in run.directory.rglob("part-*.arrow")}
    assert run.model_copy(update={"curves": False}).name == run.name


def test_shards_of_curves_are_counted_as_steps(run):
    planned = plan_skills(run)
    plain = run.model_copy(update={"curves": False})
    assert count_skills_steps(run, planned) == count_skills_steps(plain, planned) + 2 * 3 + 1


def test_tables_show_every_ranking_beside_random_and_matched_neurons(results):
    titles = [table.title.split(":")[0] for table in faithfulness_tables(results.findings[0])]
    assert titles == [
        "Causal check, best less random\nlocal/questions",
        "Deletion and insertion curves",
        "Neurons as circuits",
    ]
    shown = "\n".join(table.markdown for table in faithfulness_tables(results.findings[0]))
    assert "same layers" in shown and "matched" in shown and "CPR" in shown


def test_curves_need_values(settings, tmp_path):
    with pytest.raises(NegError, match="curves match neurons by their NEG's size"):
        read_run_file(SkillsRun, None, settings | {"curves": True, "storage": "codes", "out": tmp_path})
