"""Shifts in units of each neuron's own spread, against plain shifts of that size."""

import numpy as np
import pytest
import torch
from plain_passes import whole_pass
from support import LABELS, prompts_for, tiny_model

from negcore.errors import NegError
from negcore.measure import spread as spreads_of
from negcore.measure.interventions import intervene
from negcore.measure.spread import activation_spreads
from negcore.measure.sweeps import sweep
from negcore.model.encoding import encode_prompts

NEURONS = np.array([[0, 3], [1, 7], [2, 11]])
SHIFTS = [-1.0, 0.5, 2.0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_spreads_are_standard_deviations_over_plain_passes(family):
    lm = tiny_model(family)
    prompts = prompts_for(lm)
    with torch.no_grad():
        acts_PLN = torch.stack([whole_pass(lm, prompt)[1][:, -lm.layer_width :] for prompt in prompts]).numpy()
    expected_K = acts_PLN[:, NEURONS[:, 0], NEURONS[:, 1]].std(axis=0)
    found_K = activation_spreads(lm, encode_prompts(lm.card, prompts), NEURONS)
    np.testing.assert_allclose(found_K, expected_K, rtol=1e-9)
    assert found_K.min() > 0


def test_the_spread_of_equal_activations_is_exactly_zero(monkeypatch):
    values_PK = np.array([[0.1, 1.0], [0.1, 1.5], [0.1, 2.0]])
    assert values_PK[:, 0].std() > 0  # as the mean of three tenths is rounded
    monkeypatch.setattr(spreads_of, "read_activations", lambda lm, ids, neurons_K2: values_PK)
    found_K = activation_spreads(tiny_model("gpt2"), [[1], [2], [3]], NEURONS[:2])
    assert found_K[0] == 0 and found_K[1] == pytest.approx(np.sqrt(1 / 6))


def test_one_prompt_has_no_spread():
    lm = tiny_model("gpt2")
    with pytest.raises(NegError, match="one prompt has no spread"):
        activation_spreads(lm, [[1, 2]], NEURONS)


@pytest.mark.parametrize("method", ["virtual", "hooks"])
def test_a_shift_of_one_spread_is_a_shift_of_so_many_units_of_activation(method):
    lm, spreads_K = tiny_model("llama"), np.array([0.5, 2.0, 0.25])
    prompts = prompts_for(lm)[:2]
    own = sweep(lm, prompts, " A", neurons=NEURONS, shifts=SHIFTS, spreads=spreads_K, method=method)
    for column, spread in enumerate(spreads_K):
        plain = sweep(lm, prompts, " A", neurons=NEURONS, shifts=np.array(SHIFTS) * spread, method=method)
        np.testing.assert_allclose(own.probs_PKS[:, column], plain.probs_PKS[:, column], rtol=1e-10)
        np.testing.assert_allclose(own.negs_PK[:, column], plain.negs_PK[:, column] * spread, rtol=1e-6)
        np.testing.assert_allclose(own.pearson_PK[:, column], plain.pearson_PK[:, column], rtol=1e-6)


@pytest.mark.parametrize("method", ["virtual", "hooks"])
@pytest.mark.parametrize("nodes", [None, 5])
def test_a_neuron_without_spread_is_absent_and_changes_no_other(method, nodes):
    lm, prompts = tiny_model("llama"), prompts_for(tiny_model("llama"))[:2]
    asked = {"shifts": [-2.0, -1.0, -0.5, 0.5, 1.0, 2.0], "nodes": nodes, "method": method}
    found = sweep(lm, prompts, " A", neurons=NEURONS, spreads=[0.5, 0.0, 0.25], **asked)
    assert np.ma.getmaskarray(found.negs_PK).tolist() == [[False, True, False]] * 2
    assert (found.changes_PKS[:, 1] == 0).all()
    rest = found.with_spread()
    others = sweep(lm, prompts, " A", neurons=NEURONS[[0, 2]], spreads=[0.5, 0.25], **asked)
    assert rest.neurons_K2.tolist() == [[0, 3], [2, 11]] and rest.spreads_K.tolist() == [0.5, 0.25]
    np.testing.assert_allclose(rest.negs_PK, others.negs_PK, rtol=1e-9)
    with pytest.raises(NegError, match="none could be shifted"):
        sweep(lm, prompts, " A", neurons=NEURONS[:1], spreads=[0.0], **asked).with_spread()


def test_sets_move_each_neuron_by_its_own_spread():
    lm, prompts, spreads_K = tiny_model("gpt2"), prompts_for(tiny_model("gpt2"))[:2], np.array([0.5, 0.0, 0.25])
    found = intervene(lm, prompts, LABELS[:2], answers=[0, 1], sets=[NEURONS], spreads=[spreads_K], shifts=SHIFTS)
    ones = intervene(lm, prompts, LABELS[:2], answers=[0, 1], sets=[NEURONS[[k]] for k in range(3)], shifts=SHIFTS)
    np.testing.assert_allclose(found.predicted_PDM[:, :, 0], ones.predicted_PDM @ spreads_K, rtol=1e-9)
    single = intervene(lm, prompts, LABELS[:2], answers=[0, 1], sets=[NEURONS[[2]]], spreads=[[0.25]], shifts=SHIFTS)
    quarter = intervene(lm, prompts, LABELS[:2], answers=[0, 1], sets=[NEURONS[[2]]], shifts=np.array(SHIFTS) / 4)
    np.testing.assert_allclose(single.probs_PDM, quarter.probs_PDM, rtol=1e-10)
    with_two = intervene(
        lm, prompts, LABELS[:2], answers=[0, 1], sets=[NEURONS[[0, 2]]], spreads=[[0.5, 0.25]], shifts=SHIFTS
    )
    np.testing.assert_allclose(found.probs_PDM, with_two.probs_PDM, rtol=1e-10)  # the one without spread stays


@pytest.mark.parametrize("spreads", [[1.0], [1.0, -1.0, 1.0], [1.0, np.nan, 1.0], [[1.0, 1.0, 1.0]]])
def test_spreads_that_do_not_fit_are_refused(spreads):
    lm = tiny_model("gpt2")
    with pytest.raises(NegError, match="spread"):
        sweep(lm, prompts_for(lm)[:1], " A", neurons=NEURONS, spreads=spreads, shifts=SHIFTS)
    with pytest.raises(NegError, match="spread"):
        intervene(lm, prompts_for(lm)[:1], " A", sets=[NEURONS], spreads=[spreads, spreads], shifts=SHIFTS)
