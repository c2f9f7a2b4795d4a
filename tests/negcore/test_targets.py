"""Targets, each against what it says: a plain pass of one prompt, and plain autograd."""

import numpy as np
import pytest
import torch
from plain_passes import whole_pass
from support import LABELS, prompts_for, tiny_model

from negcore.errors import LabelError, NegError
from negcore.measure import neurgrad as gradients
from negcore.measure.estimators import estimate
from negcore.measure.forward import label_log_probabilities
from negcore.measure.interventions import intervene
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import fit_lines, sweep
from negcore.model.encoding import encode
from negcore.targets import checked_target, neg_unit, own_values, target_values

TARGETS = ["probability", "log-probability", "logit-difference"]
OTHERS = TARGETS[1:]
FAMILIES = ["llama", "gemma2", "gpt2", "bert"]
SHIFTS = [-1.0, -0.5, 0.5, 1.0]


def plain_value(target, logits_V, ids, option):
    """The target of one option, written out."""
    if target == "logit-difference":
        return logits_V[ids[option]] - max(logits_V[other] for at, other in enumerate(ids) if at != option)
    p = logits_V.exp()[ids[option]] / logits_V.exp().sum()
    return p if target == "probability" else p.log()


def plain_pass(lm, prompt, steps_LN):
    """Logits and activations of one prompt in one whole pass, its probed neurons shifted."""

    def shift(layer, values_N):
        return torch.cat([values_N[: len(values_N) - lm.layer_width], values_N[-lm.layer_width :] + steps_LN[layer]])

    logits_V, activations_LN = whole_pass(lm, prompt, shift)
    return logits_V, activations_LN[:, -lm.layer_width :]


def still(lm):
    """Shifts of no neuron."""
    return torch.zeros(lm.n_layers, lm.layer_width, dtype=torch.float64)


def plain_negs(lm, prompt, labels, target):
    """NEGs of one prompt: (O, L, N), one backward pass an option."""
    ids = encode(lm.card, [prompt], labels).label_ids_PO[0].tolist()
    steps = list(still(lm).requires_grad_().unbind())
    logits_V, activations_LN = plain_pass(lm, prompt, steps)
    negs = []
    for option in range(len(ids)):
        value = plain_value(target, logits_V, ids, option)
        negs.append(torch.stack(torch.autograd.grad(value, steps, retain_graph=True)))
    return (torch.stack(negs) * torch.where(activations_LN > 0, 1.0, -1.0)).numpy()


def assert_close(actual, expected, rtol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("n_options", [2, 4])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_negs_of_every_target_are_plain_autograd_of_its_formula(family, target, n_options):
    lm = tiny_model(family)
    prompts, labels = prompts_for(lm)[:4], LABELS[:n_options]
    batch = neurgrad(lm, prompts, labels, target=target)
    assert batch.target == target
    for row, prompt in enumerate(prompts):
        negs_OLN = plain_negs(lm, prompt, labels, target)
        assert np.abs(negs_OLN).max() > 1e-6
        assert_close(batch.negs_POLN[row], negs_OLN, rtol=1e-9)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_neither_batches_nor_padding_nor_rows_of_options_change_a_target(family, target, monkeypatch):
    lm = tiny_model(family)
    prompts = prompts_for(lm)
    together = neurgrad(lm, prompts, LABELS[:3], target=target)
    alone = neurgrad(lm, prompts, LABELS[:3], target=target, batch_size=1)
    assert_close(alone.negs_POLN, together.negs_POLN)
    monkeypatch.setattr(gradients, "computes_by_row", lambda device: False)  # as on a GPU: a row for each option
    by_rows = neurgrad(lm, prompts, LABELS[:3], target=target)
    assert_close(by_rows.negs_POLN, together.negs_POLN)
    assert_close(by_rows.probs_PO, together.probs_PO)


@pytest.mark.parametrize("target", TARGETS)
def test_models_whose_code_takes_no_batched_backward_give_the_same(target, monkeypatch):
    lm = tiny_model("llama")
    together = neurgrad(lm, prompts_for(lm), LABELS[:3], target=target)
    monkeypatch.setattr(type(lm), "batched_backward", property(lambda lm: False), raising=False)
    assert_close(neurgrad(lm, prompts_for(lm), LABELS[:3], target=target).negs_POLN, together.negs_POLN)


def test_a_log_odds_gradient_is_that_of_the_two_options_and_of_no_other_token():
    logits_V = torch.randn(1, 50, dtype=torch.float64, requires_grad=True)
    values_1O = target_values("logit-difference", label_log_probabilities(logits_V, torch.tensor([[3, 7, 9]])))
    (gradient_V,) = torch.autograd.grad(values_1O[0, 1], logits_V)
    best = max((3, 9), key=lambda token: logits_V[0, token].item())
    expected_V = torch.zeros(50, dtype=torch.float64)
    expected_V[7], expected_V[best] = 1, -1
    assert torch.equal(gradient_V[0], expected_V)


def test_of_two_options_one_has_the_others_log_odds_with_the_other_sign():
    lm = tiny_model("gpt2")
    negs_POLN = neurgrad(lm, prompts_for(lm), LABELS[:2], target="logit-difference").negs_POLN
    assert_close(negs_POLN[:, 0], -negs_POLN[:, 1])


def test_own_values_are_those_of_option_o_in_row_o_of_its_prompt():
    assert own_values(torch.arange(18).view(6, 3)).tolist() == [0, 4, 8, 9, 13, 17]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["virtual", "hooks"])
def test_sweeps_measure_every_target_as_plain_passes_do(target, method):
    lm = tiny_model("llama")
    prompts, labels, answers, neurons = prompts_for(lm)[:2], LABELS[:3], [2, 0], [(0, 3), (2, 11)]
    swept = sweep(lm, prompts, labels, answers=answers, target=target, neurons=neurons, shifts=SHIFTS, method=method)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = encode(lm.card, [prompt], labels).label_ids_PO[0].tolist()
        assert swept.label_ids_P[row] == ids[answer]
        with torch.no_grad():
            logits_V, activations_LN = plain_pass(lm, prompt, still(lm))
            base = plain_value(target, logits_V, ids, answer).item()
            assert swept.base_P[row] == pytest.approx(base, rel=1e-10)
            for column, (layer, neuron) in enumerate(neurons):
                changes = []
                for size in SHIFTS:
                    steps = still(lm)
                    steps[layer, neuron] = size if activations_LN[layer, neuron] > 0 else -size
                    changes.append(plain_value(target, plain_pass(lm, prompt, steps)[0], ids, answer).item() - base)
                np.testing.assert_allclose(swept.changes_PKS[row, column], changes, rtol=1e-6, atol=1e-12)
                assert swept.negs_PK[row, column] == pytest.approx(float(fit_lines(SHIFTS, changes).slopes), rel=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_small_shifts_have_the_slope_that_neurgrad_estimates(target):
    lm = tiny_model("gpt2")
    prompts, answers = prompts_for(lm)[:3], [1, 0, 2]
    swept = sweep(lm, prompts, LABELS[:3], answers=answers, target=target, neurons=4, shifts=[-1e-4, 1e-4])
    negs_POLN = neurgrad(lm, prompts, LABELS[:3], target=target).negs_POLN
    estimated_PK = negs_POLN[np.arange(3), answers][:, *swept.neurons_K2.T]
    assert_close(swept.negs_PK, estimated_PK, rtol=1e-5)
    scores_PK = estimate(
        lm, prompts, LABELS[:3], answers=answers, estimator="neurgrad", target=target, neurons=swept.neurons_K2
    )
    assert_close(scores_PK, estimated_PK)


@pytest.mark.parametrize("target", TARGETS)
def test_sets_of_neurons_change_every_target_as_a_plain_pass_does(target):
    lm = tiny_model("llama")
    prompts, labels, answers, together = prompts_for(lm)[:2], LABELS[:3], [2, 1], [(0, 1), (1, 5), (2, 20)]
    shifted = intervene(lm, prompts, labels, answers=answers, target=target, sets=[together], shifts=[-0.5, 1.0])
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = encode(lm.card, [prompt], labels).label_ids_PO[0].tolist()
        negs_LN = plain_negs(lm, prompt, labels, target)[answer]
        with torch.no_grad():
            logits_V, activations_LN = plain_pass(lm, prompt, still(lm))
            for column, size in enumerate([-0.5, 1.0]):
                steps = still(lm)
                for place in together:
                    steps[place] = size * np.sign(negs_LN[place]) * (1 if activations_LN[place] > 0 else -1)
                after = plain_value(target, plain_pass(lm, prompt, steps)[0], ids, answer)
                change = (after - plain_value(target, logits_V, ids, answer)).item()
                assert shifted.changes_PDM[row, column, 0] == pytest.approx(change, rel=1e-8)
                predicted = size * sum(abs(negs_LN[place]) for place in together)
                assert shifted.predicted_PDM[row, column, 0] == pytest.approx(predicted, rel=1e-9)


@pytest.mark.parametrize("target", OTHERS)
def test_values_of_another_target_are_not_called_probabilities(target):
    lm = tiny_model("gpt2")
    swept = sweep(lm, prompts_for(lm)[:1], LABELS[:2], answers=[0], target=target, neurons=1, shifts=SHIFTS)
    shifted = intervene(lm, prompts_for(lm)[:1], LABELS[:2], answers=[0], target=target, sets=[[(0, 0)]], shifts=[1])
    for read in (lambda: swept.probs_PKS, lambda: swept.base_probs_P, lambda: shifted.probs_PDM):
        with pytest.raises(NegError, match=f"{target}.*no probabilities"):
            read()


def test_a_target_that_compares_options_needs_them():
    lm = tiny_model("gpt2")
    prompts = prompts_for(lm)[:1]
    for measure in (
        lambda: neurgrad(lm, prompts, [" A"], target="logit-difference"),
        lambda: sweep(lm, prompts, " A", target="logit-difference"),
        lambda: intervene(lm, prompts, " A", target="logit-difference", sets=[[(0, 0)]], shifts=[1]),
        lambda: estimate(lm, prompts, [" A"], estimator="neurgrad", target="logit-difference"),
    ):
        with pytest.raises(LabelError, match="needs another label"):
            measure()


@pytest.mark.parametrize("name", ["prob", "", "logits", "Probability"])
def test_an_unknown_target_is_refused_with_those_that_are_known(name):
    with pytest.raises(NegError, match="choose one of probability, log-probability, logit-difference"):
        checked_target(name)
    with pytest.raises(NegError, match="choose one of probability"):
        neurgrad(tiny_model("gpt2"), prompts_for(tiny_model("gpt2"))[:1], LABELS[:2], target=name)


def test_former_spellings_are_read():
    assert checked_target("log_probability") == "log-probability"
    assert neg_unit("logit_difference") == "logit difference per unit of activation"


def test_labels_beside_answers_are_lists():
    lm = tiny_model("gpt2")
    with pytest.raises(LabelError, match="beside answers, give a list of labels"):
        sweep(lm, prompts_for(lm)[:1], " A", answers=[0])
