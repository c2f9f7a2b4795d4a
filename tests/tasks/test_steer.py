"""The choice of neurons and rows to steer by, and the side effects, on a finished run."""

import math
import shutil

import numpy as np
import pytest
from support import save_tiny_model, write_questions

from flows.pipeline import run_pipeline
from negcore.analysis.causal import SkillSet, chosen_neurons, shift_sets
from negcore.analysis.effects import causal_rows
from negcore.errors import NegError
from negcore.measure.loading import load_model
from negcore.probing.rankings import rank
from negcore.probing.saved_probes import load_probe
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.measure.examples import encoded_prompts
from tasks.probe import probe_path
from tasks.steer import n_side_rows, parsed_neurons, plan_steering, side_effect
from tasks.steps import PlainSteps

ASK = {"size": 1.5, "n_rows": 4}
PROBES = ["magn", "magn-random", "magn-gradient", "tree"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose Magn-Probe keeps few neurons."""
    folder = tmp_path_factory.mktemp("steer")
    model = save_tiny_model("llama", folder / "tiny-llama", n_positions=512)
    values = {"model": [str(model)], "dataset": [write_questions(folder)], "backend": "local", "max_neurons": 8}
    run = read_run_file(SkillRun, None, values | {"out": folder / "run", "probe": PROBES, "tree_neurons": 8})
    assert run_pipeline(run, PlainSteps()).problems == []
    return run


def ranking(run):
    return rank(open_negs(run.directory).select(split="train"))


def pairs(shifts):
    return [(layer, neuron, math.copysign(1, size)) for layer, neuron, size in shifts]


def ranked_pairs(run, k):
    order_K, polarity_K = ranking(run).order_K[:k], ranking(run).polarity_K[:k]
    return [(*divmod(flat, 24), float(sign)) for flat, sign in zip(order_K.tolist(), polarity_K.tolist(), strict=True)]


def test_the_neurons_are_those_that_the_probe_keeps_each_in_the_direction_of_its_polarity(run):
    steering = plan_steering(str(run.directory), probe="magn", **ASK)
    kept = load_probe(probe_path(run.directory, run.model[0], "local/questions", "magn")).probe.n_kept
    assert pairs(steering.shifts) == ranked_pairs(run, kept)
    assert {abs(size) for _, _, size in steering.shifts} == {1.5}
    assert steering.chosen_on == "local/questions"


@pytest.mark.parametrize("k", [1, 40])
def test_any_number_of_neurons_can_be_asked_for_whatever_the_probe_keeps(run, k):
    shifts = plan_steering(str(run.directory), probe="magn", k=k, **ASK).shifts
    assert len(shifts) == k and pairs(shifts) == ranked_pairs(run, k)


def test_random_neurons_are_a_baseline_that_can_be_steered(run):
    saved = load_probe(probe_path(run.directory, run.model[0], "local/questions", "magn-random"))
    assert plan_steering(str(run.directory), probe="magn-random", **ASK).shifts == saved.shifts(1.5)


def test_rows_are_the_first_of_the_test_split_with_their_right_options(run):
    asked = plan_steering(str(run.directory), neurons="0.1", **ASK).asked
    test = open_negs(run.directory).select(split="test")
    assert [one.row for one in asked] == test.ids[:4]
    assert [one.gold for one in asked] == [(" A", " B", " C")[gold] for gold in test.gold_P[:4]]
    by_hand = plan_steering(str(run.directory), neurons="0.1", prompts=["Who?"], **ASK).asked
    assert [(one.prompt, one.row) for one in by_hand] == [("Who?", "")]


def test_neurons_are_listed_by_layer_and_number_with_sizes_of_their_own():
    assert parsed_neurons("10.901, 3.17=-4,0.0=1e-1", 2.0) == [(10, "901", 2.0), (3, "17", -4.0), (0, "0", 0.1)]


@pytest.mark.parametrize("text", ["", "10", "10.", "10.1.2.3", "-1.2", "1.2=", "1.2=x", "1.2 3.4", "1.2,", "\u0661.2"])
def test_another_list_of_neurons_is_refused_with_the_form(text):
    with pytest.raises(NegError, match="give LAYER.NEURON"):
        parsed_neurons(text, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either a probe"),
        ({"probe": "magn", "neurons": "0.1"}, "give either a probe"),
        ({"neurons": "0.1", "k": 3}, "is for a probe"),
        ({"probe": "tree"}, "has no polarities"),
        ({"probe": "act"}, "no probe at"),
        ({"probe": "magn-gradient"}, "plain gradient"),
        ({"probe": "magn-gradient", "k": 60}, "plain gradient"),
        ({"probe": "polar", "k": 1000}, "has 1 to 72"),
        ({"probe": "magn-random", "k": 60}, "best 60 are not known"),
        ({"neurons": "0.1", "dataset": "mini/fact"}, "no usable dataset 'mini/fact'"),
        ({"neurons": "0.1", "dataset": "nonsense"}, "local/questions"),
        ({"neurons": "0.1", "model": "gpt2"}, "no model 'gpt2'"),
    ],
)
def test_what_cannot_be_steered_by_is_refused(run, options, message):
    with pytest.raises(NegError, match=message):
        plan_steering(str(run.directory), **ASK, **options)


def test_a_probe_of_another_model_is_refused(run, tmp_path):
    moved = shutil.copytree(run.directory, tmp_path / "run")
    other = read_run_file(SkillRun, str(moved), {"site": "act", "out": tmp_path / "other"})
    assert run_pipeline(other, PlainSteps()).problems == []
    place = (run.model[0], "local/questions", "magn")
    shutil.copy(probe_path(other.directory, *place), probe_path(moved, *place))
    with pytest.raises(NegError, match="site: 'up' here, 'act' there"):
        plan_steering(str(moved), probe="magn", **ASK)


def test_side_effects_are_those_of_the_causal_check_in_the_direction_of_the_polarities(run):
    steering = plan_steering(str(run.directory), probe="magn", k=12, **ASK)
    (dataset,) = steering.planned.datasets
    lm, done = load_model(run.model[0]), []
    found = side_effect(lm, dataset, steering.shifts, 15, done.append).effect
    assert done == list(range(1, 16)) and n_side_rows(dataset, 15) == 15
    rows = dataset.splits[2].examples[:15]
    best = ranking(run).top(12)
    sets = [SkillSet("top", 12, 0, best.order_K, best.polarity_K)]
    result = shift_sets(
        lm,
        encoded_prompts(rows),
        gold_P=[row.answer for row in rows],
        gold_negs_PK=np.ones((15, len(chosen_neurons(sets)))),
        sets=sets,
        shifts=[1.5],
    )
    (checked,) = [one for one in causal_rows("magn", result, n_bootstrap=1000) if one.direction == "polarity"]
    assert found._asdict() == pytest.approx({name: getattr(checked, name) for name in found._fields}, abs=1e-7)
    assert found.prob_change != 0
