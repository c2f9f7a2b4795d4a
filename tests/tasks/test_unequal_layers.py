"""Skill neurons of mixtures of experts whose layers have different numbers of neurons: each layer counts its own."""

from pathlib import Path

import numpy as np
import pytest
from support import save_tiny_model, write_questions

from flows.skills import run_skills
from negcore.analysis.causal import ExpertNeurons, skill_sets
from negcore.analysis.shared_neurons import common_neurons, jaccard_chance, layer_shares, rank_with_random_ties
from negcore.measure.votes import Ranking
from negcore.probing.rankings import rank
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillsRun
from tasks.config.reading import read_run_file
from tasks.steps import PlainSteps

WIDTHS = [44, 24, 44]
"""Of the tiny Qwen2 MoE: 4 experts of 8 units and 12 shared neurons, a dense layer of 24, and experts again."""


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unequal")
    model, questions = save_tiny_model("qwen2_moe", folder / "qwen2_moe"), Path(write_questions(folder))
    others = folder / "others.jsonl"
    others.write_text(questions.read_text().replace('"answer": 1', '"answer": 2'))
    values = {"model": [str(model)], "dataset": [str(questions), str(others)], "backend": "local", "shard_rows": 8}
    values |= {"out": folder / "skills", "variant": ["shots"], "top": [4, 16], "shift": [0.5], "draws": 2, "band": 8}
    run = read_run_file(SkillsRun, None, values | {"probe": ["magn"]})
    results = run_skills(run, PlainSteps())
    assert results.problems == []
    return run, results.findings[0]


def test_a_layer_is_as_likely_as_its_share_of_the_neurons(analysed):
    _, findings = analysed
    for found in findings.datasets:
        assert {(row.layer, row.uniform) for row in found.layers} == {
            (layer, width / 112) for layer, width in enumerate(WIDTHS)
        }
        for top in {row.top for row in found.layers}:
            assert sum(row.share for row in found.layers if row.top == top) == pytest.approx(1)


def test_the_best_of_all_neurons_are_as_many_as_there_are(analysed):
    _, findings = analysed
    counts = {row.n_neurons for found in findings.datasets for row in found.neuron_counts if row.order == "best"}
    assert max(counts) == sum(WIDTHS)
    assert max(row.end_rank for found in findings.datasets for row in found.bands) == sum(WIDTHS)


def test_chance_is_that_of_the_neurons_that_there_are(analysed):
    _, findings = analysed
    assert {(row.top, row.chance) for row in findings.overlaps} == {
        (top, jaccard_chance(top, sum(WIDTHS)).mean) for top in (4, 16)
    }


def test_checked_sets_hold_neurons_that_training_prompts_have(analysed):
    run, _ = analysed
    train = open_negs(run.conditions[0].run.directory).select(dataset="local/questions", split="train")
    experts = ExpertNeurons.of(train)
    n_there = int(experts.in_training_M.sum())
    sets = skill_sets(rank(train), [8, n_there // 2], 3, train.n_neurons, draws=3, seed=0, experts=experts)
    for one in sets:
        assert (one.neurons_K % 44 < np.array(WIDTHS)[one.neurons_K // 44]).all()
        assert one.kind == "random" or train.active(one.neurons_K).any(axis=0).all()
    top, *_, bottom = [one for one in sets if one.size == n_there // 2]
    assert not set(top.neurons_K) & set(bottom.neurons_K)


# Rankings of some numbers alone


def test_masked_scores_are_not_ranked():
    scores = np.ma.masked_array([3, -5, 9, 0, 1, 0], [False, False, True, False, False, True])
    ranking = Ranking.from_scores(scores)
    assert (ranking.order_K.tolist(), ranking.polarity_K.tolist()) == ([1, 0, 4, 3], [-1, 1, 1, 0])
    (drawn,) = rank_with_random_ties({"a": scores}, seed=0).values()
    assert drawn.order_K.tolist() == ranking.order_K.tolist()


def test_shares_and_common_neurons_of_layers_of_two_widths_by_pencil():
    # A layer of three neurons and one of a single neuron, whose two other places are none.
    absent = [False, False, False, False, True, True]
    scores = {
        "a": np.ma.masked_array([1, 5, 0, -7, 0, 0], absent),
        "b": np.ma.masked_array([2, 6, 0, -8, 0, 0], absent),
    }
    ranked = {name: Ranking.from_scores(scores_M) for name, scores_M in scores.items()}
    rows = layer_shares("magn", ranked["a"], [2, 50], [3, 1])
    assert [(row.top, row.layer, row.share, row.uniform) for row in rows] == [
        (2, 0, 0.5, 0.75),
        (2, 1, 0.5, 0.25),
        (4, 0, 0.75, 0.75),
        (4, 1, 0.25, 0.25),
    ]
    common = common_neurons("magn", ranked, [2, 50], layer_width=3)
    assert [(row.top, row.layer, row.neuron, row.worst_rank) for row in common] == [
        (2, 1, 0, 0),
        (2, 0, 1, 1),
        (4, 1, 0, 0),
        (4, 0, 1, 1),
        (4, 0, 0, 2),
        (4, 0, 2, 3),
    ]
