"""Probed tokens before a prompt's end, and answers of several tokens, against one whole pass a prompt and option."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_passes import hooked_pass
from support import CAUSAL, PROMPTS, tiny_model

from negcore import estimate, intervene, neurgrad, sweep
from negcore.analysis.causal import SkillSet, shift_sets
from negcore.errors import LabelError, ModelError, NegError, PromptError
from negcore.measure.ablation import silence_sets
from negcore.measure.forward import run_prefix
from negcore.measure.label_probs import label_probs
from negcore.model.encoding import encode
from negcore.model.past import Prefixes

PIECES = ["fits", "which", " answer fits", "France", None, "yes", "Question"]
OPTIONS = [" A", " Paris", " B. two", " yes or no"]
FAMILIES = [*CAUSAL, "mpt", "falcon", "gemma3n_text", "qwen3_5_text", "gpt_neo"]
TOLERANCE = 1e-5
"""Parts of some models round to float32."""


def plain_answer(lm, encoded, prompt, option):
    """The probability of an option, its gradient by the neurons of the probed token, and their activations."""
    tokens = encoded.ids[prompt]
    answer = (
        encoded.label_tokens_PO[prompt][option]
        if encoded.label_tokens_PO is not None
        else [int(encoded.label_ids_PO[prompt, option])]
    )
    probed = len(tokens) - 1 if encoded.probed_P is None else int(encoded.probed_P[prompt])
    leaves = {}

    def change(layer, values_N):
        leaves[layer] = torch.zeros_like(values_N, requires_grad=True)
        return values_N + leaves[layer]

    logits_TV, activations_LN = hooked_pass(lm, [*tokens, *answer[:-1]], probed, change)
    prob = torch.tensor(1.0, dtype=logits_TV.dtype)
    for step, token in enumerate(answer):
        prob = prob * logits_TV[len(tokens) - 1 + step].softmax(0)[token]
    grads_LN = torch.autograd.grad(prob + sum(0 * leaf.sum() for leaf in leaves.values()), list(leaves.values()))
    return prob.item(), torch.stack(grads_LN), activations_LN


def difference(found, expected):
    """Norm of the difference, relative to the norm."""
    return np.linalg.norm(np.asarray(found) - np.asarray(expected)) / max(np.linalg.norm(expected), 1e-12)


def assert_like_plain(lm, encoded, result):
    width = lm.layer_width
    for prompt in range(len(encoded.ids)):
        for option in range(encoded.label_ids_PO.shape[1]):
            prob, grads_LN, activations_LN = plain_answer(lm, encoded, prompt, option)
            grads_LN, activations_LN = grads_LN[:, -width:], activations_LN[:, -width:]  # fused projections: `up` last
            negs_LN = grads_LN * torch.where(activations_LN > 0, 1.0, -1.0)
            assert difference(result.probs_PO[prompt, option], prob) < TOLERANCE
            assert difference(result.activations_PLN[prompt], activations_LN) < TOLERANCE
            assert difference(result.negs_POLN[prompt, option], negs_LN) < TOLERANCE


WAYS = {
    "position": {"labels": [" A", " B"], "probe_at": PIECES},
    "sequence": {"labels": OPTIONS, "answers": "sequence"},
    "both": {"labels": OPTIONS, "answers": "sequence", "probe_at": PIECES},
}
FEW = ["llama", "gpt2", "mpt"]


@pytest.mark.parametrize(
    ("family", "way"), [*((family, "both") for family in FAMILIES), *itertools.product(FEW, ["position", "sequence"])]
)
def test_negs_are_those_of_plain_autograd_over_the_whole_sequence(family, way):
    lm = tiny_model(family)
    encoded = encode(lm.card, PROMPTS, **WAYS[way])
    result = neurgrad(lm, encoded)
    assert_like_plain(lm, encoded, result)
    np.testing.assert_allclose(label_probs(lm, encoded), result.probs_PO, rtol=1e-6)


def both(lm, prompts=PROMPTS, labels=OPTIONS, probe_at=PIECES):
    return encode(lm.card, prompts, labels, probe_at=probe_at[: len(prompts)], answers="sequence")


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "mpt"])
def test_neither_batches_nor_their_padding_change_a_result(family):
    lm = tiny_model(family)
    together, alone = neurgrad(lm, both(lm)), neurgrad(lm, both(lm), batch_size=1)
    reordered = neurgrad(lm, both(lm, PROMPTS[::-1], probe_at=PIECES[::-1]))
    assert difference(together.negs_POLN, alone.negs_POLN) < TOLERANCE
    assert difference(together.negs_POLN, reordered.negs_POLN[::-1]) < TOLERANCE


def test_tokens_that_all_prompts_begin_with_run_once_and_change_nothing(monkeypatch):
    lm, start = tiny_model("llama"), "It was the worst of times: one. two. three. four. five. "
    encoded = both(lm, [start + prompt for prompt in PROMPTS])
    runs = []
    monkeypatch.setattr(
        "negcore.measure.forward.run_prefix", lambda lm, tokens: runs.append(len(tokens)) or run_prefix(lm, tokens)
    )
    lm = replace(lm, prefixes=Prefixes())
    shared = neurgrad(lm, encoded)
    np.testing.assert_array_equal(neurgrad(lm, encoded).negs_POLN, shared.negs_POLN)
    assert len(runs) == 1 and runs[0] > 8
    apart = neurgrad(lm, replace(encoded, n_shared=0))
    assert difference(shared.negs_POLN, apart.negs_POLN) < TOLERANCE
    assert_like_plain(lm, encoded, shared)


def test_an_answer_of_one_token_behind_the_last_is_what_it_always_was():
    lm = tiny_model("llama")
    usual, labels = neurgrad(lm, PROMPTS, [" A", " B"]), [" A", " B"]
    for way in ({"answers": "sequence"}, {"probe_at": ["Answer:"] * len(PROMPTS)}):
        result = neurgrad(lm, encode(lm.card, PROMPTS, labels, **way))
        assert difference(result.negs_POLN, usual.negs_POLN) < TOLERANCE
        assert difference(result.probs_PO, usual.probs_PO) < TOLERANCE


def test_neurons_of_the_last_layer_at_an_earlier_token_have_no_gradient_at_all():
    lm = tiny_model("llama")
    negs_POLN = neurgrad(lm, both(lm, PROMPTS[:3])).negs_POLN
    assert (negs_POLN[:, :, -1] == 0).all() and (negs_POLN[:, :, 0] != 0).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3", "opt", "mpt"])
def test_a_sweep_measures_what_whole_passes_say_and_its_slope_at_zero_is_the_estimate(family):
    lm = tiny_model(family)
    encoded = both(lm, PROMPTS[:4], [[" yes or no"]] * 4)
    tokens, answer, probed = encoded.ids[0], encoded.label_tokens_PO[0][0], int(encoded.probed_P[0])
    swept = sweep(lm, encoded, neurons=3, shifts=[-0.01, 0.01])
    large = sweep(lm, encoded, neurons=3, shifts=[0.7])
    layers_K, neurons_K = swept.neurons_K2.T
    estimated_PK = neurgrad(lm, encoded).negs_POLN[:, 0, layers_K, neurons_K]
    assert difference(swept.negs_PK, estimated_PK) < 0.01
    for k, (layer, neuron) in enumerate(swept.neurons_K2.tolist()):
        sign = 1 if large.activations_PK[0, k] > 0 else -1

        def change(where, values_N, layer=layer, neuron=neuron, sign=sign):
            step_N = torch.zeros_like(values_N)
            step_N[len(values_N) - lm.layer_width + neuron] = 0.7 * sign * (where == layer)
            return values_N + step_N

        logits_TV, _ = hooked_pass(lm, [*tokens, *answer[:-1]], probed, change)
        log_probs_TV = logits_TV.log_softmax(-1)
        expected = sum(log_probs_TV[len(tokens) - 1 + step, token] for step, token in enumerate(answer)).exp()
        np.testing.assert_allclose(large.values_PKS[0, k, 0], expected.item(), rtol=1e-5)


def test_sets_of_one_neuron_shift_as_sweeps_do_and_causal_checks_read_every_option():
    lm = tiny_model("llama")
    encoded = both(lm, PROMPTS[:3])
    gold = encode(lm.card, PROMPTS[:3], [[OPTIONS[1]]] * 3, probe_at=PIECES[:3], answers="sequence")
    swept = sweep(lm, gold, neurons=[(0, 5), (1, 7)], shifts=[0.5])
    toward_PK = np.sign(swept.values_PKS[:, :, 0] - swept.base_P[:, None])
    joint = intervene(lm, gold, sets=[[(0, 5)], [(1, 7)]], shifts=[0.5], negs_PLN=np.ones((3, lm.n_layers, 24)))
    np.testing.assert_allclose(joint.values_PDM[:, 0], swept.values_PKS[:, :, 0], rtol=1e-9)
    one = SkillSet("top", 1, 0, np.array([5]), np.array([1], np.int8))
    causal = shift_sets(lm, encoded, gold_P=[1, 1, 1], gold_negs_PK=toward_PK[:, :1], sets=[one], shifts=[0.5])
    np.testing.assert_allclose(causal.base_probs_PO, label_probs(lm, encoded), rtol=1e-9)
    np.testing.assert_allclose(causal.probs_PMO[:, 1, 1], swept.values_PKS[:, 0, 0], rtol=1e-9)


def test_half_types_follow_float64():
    exact, half = tiny_model("llama"), tiny_model("llama", dtype=torch.bfloat16)
    assert difference(neurgrad(half, both(half)).negs_POLN, neurgrad(exact, both(exact)).negs_POLN) < 0.3
    assert sweep(half, both(half, labels=[" Paris"]), neurons=1, shifts=[0.5]).values_PKS.dtype == np.float32


def test_what_cannot_follow_says_what_can():
    lm = tiny_model("llama")
    encoded = both(lm)
    for measure in (
        lambda: estimate(lm, encoded, estimator="ablation", answers=[0] * len(PROMPTS)),
        lambda: silence_sets(lm, encoded, silent_RM=np.zeros((1, lm.n_layers * lm.layer_width), bool)),
    ):
        with pytest.raises(NegError, match="know no answers of several tokens: NEGs, sweeps, .* leave out answers"):
            measure()
    with pytest.raises(ModelError, match="virtual.*auto or hooks"):
        sweep(lm, both(lm, labels=[" Paris"]), neurons=1, method="virtual")
    with pytest.raises(ModelError, match="mixtures of experts"):
        neurgrad(moe := tiny_model("mixtral"), both(moe))
    bert = tiny_model("bert")
    prompts = [prompt + "<mask>" for prompt in PROMPTS]
    with pytest.raises(LabelError, match="'sequence' needs a causal model .*'token'"):
        encode(bert.card, prompts, OPTIONS, answers="sequence")
    with pytest.raises(PromptError, match="probe_at needs a causal model"):
        encode(bert.card, prompts, [" A"], probe_at=PIECES)


@pytest.mark.parametrize("target", ["log-probability", "logit-difference"])
def test_other_targets_of_answers_are_those_of_plain_autograd_and_of_sweeps(target):
    lm = tiny_model("llama")
    encoded = both(lm, PROMPTS[:3])
    negs_POLN = neurgrad(lm, encoded, target=target).negs_POLN
    for prompt, option in itertools.product(range(3), range(len(OPTIONS))):
        found = [plain_answer(lm, encoded, prompt, other) for other in range(len(OPTIONS))]
        slopes = [grads_LN / prob * torch.where(a_LN > 0, 1.0, -1.0) for prob, grads_LN, a_LN in found]
        expected_LN = slopes[option]
        if target == "logit-difference":
            expected_LN = expected_LN - slopes[max(set(range(4)) - {option}, key=lambda one: found[one][0])]
        assert difference(negs_POLN[prompt, option], expected_LN) < TOLERANCE
    swept = sweep(lm, encoded, answers=[1, 1, 1], target=target, neurons=2, shifts=[-0.01, 0.01])
    layers_K, neurons_K = swept.neurons_K2.T
    assert difference(swept.negs_PK, negs_POLN[:, 1, layers_K, neurons_K]) < 0.01
