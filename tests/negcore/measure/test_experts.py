"""Mixtures of experts: NEGs of the experts that a prompt is routed to, against plain autograd token by token."""

import re
from functools import cache

import numpy as np
import pytest
import torch
from support import ARCHITECTURES, LABELS, PROMPTS, tiny_config, tiny_model, tiny_tokenizer
from token_by_token import run
from transformers import AutoModelForCausalLM

from negcore.analysis.causal import SkillSet, shift_sets
from negcore.analysis.logit_lens import logit_lens, written_row
from negcore.errors import ModelError, NegError
from negcore.measure import neurgrad as gradients
from negcore.measure.estimators import estimate
from negcore.measure.interventions import intervene
from negcore.measure.loading import as_language_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import sweep
from negcore.model.encoding import encode, encode_prompts
from negcore.model.layer_shapes import LayerShape

FAMILIES = [family for family, row in ARCHITECTURES.items() if row.experts]
OPTIONS = LABELS[:3]


@cache
def model(family, router="through", site="paper"):
    return tiny_model(family, router=router, site=site)


def plain(lm, prompt, labels):
    """NEG, activations and experts of one prompt, with a graph through all of its tokens: lists by layer."""
    tokens = encode_prompts(lm.card, [prompt])[0]
    last = len(tokens) - 1
    lm.model.requires_grad_(True)
    try:
        logits_TV, twin, dense = run(lm, tokens)
    finally:
        lm.model.requires_grad_(False)
    probs = logits_TV[last].softmax(-1)
    ids = encode(lm.card, [prompt], labels).label_ids_PO[0]
    negs, activations, experts = [], [], []
    for layer in range(lm.n_layers):
        module = lm.experts(layer)
        chosen = sorted(twin.experts[module, last]) if module is not None else []
        keys = [(module, last, expert) for expert in chosen]
        inputs = [twin.leaves[key] for key in keys] + ([dense[layer]] if layer in dense else [])
        values = [twin.values[key] for key in keys]
        if layer in dense:
            values.append(dense[layer].detach()[last])
        acts = torch.cat(values)
        grads = [torch.autograd.grad(probs[int(label)], inputs, retain_graph=True) for label in ids]
        rows = torch.stack([torch.cat([grad.reshape(-1, grad.shape[-1])[-1] for grad in one]) for one in grads])
        negs.append((rows * torch.where(acts > 0, 1.0, -1.0)).numpy())
        activations.append(acts.numpy())
        experts.append(chosen)
    return negs, activations, experts, probs[ids].detach().numpy()


ROUNDING = {"deepseek_v2", "deepseek_v3"}
"""Families that turn positions, or compute their router, in float32 whatever the model's type."""


def assert_close(actual, expected, lm=None):
    coarse = 1e4 if lm is not None and lm.card.config.model_type in ROUNDING else 1
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=coarse * 1e-10 * max(np.abs(expected).max(), 1e-30))


def assert_measured(lm, batch, row, prompt):
    negs, activations, experts, probs = plain(lm, prompt, OPTIONS)
    assert_close(batch.probs_PO[row], probs, lm)
    for layer, shape in enumerate(lm.layer_shapes):
        assert batch.experts_PLK[row, layer, : shape.top_k].tolist() == experts[layer]
        assert (batch.experts_PLK[row, layer, shape.top_k :] == -1).all()
        assert np.abs(negs[layer]).max() > 1e-9
        assert_close(batch.negs_POLN[row, :, layer, : shape.n_active], negs[layer], lm)
        assert_close(batch.activations_PLN[row, layer, : shape.n_active], activations[layer], lm)
        assert not batch.negs_POLN[row, :, layer, shape.n_active :].any()


@pytest.mark.parametrize("site", ["up", "act"])
@pytest.mark.parametrize("router", ["through", "fixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_negs_of_routed_experts_are_plain_autograd_for_both_choices_of_the_router(family, router, site):
    lm = model(family, router, site)
    batch = neurgrad(lm, PROMPTS, OPTIONS, batch_size=3)
    for row in (0, 3):
        assert_measured(lm, batch, row, PROMPTS[row])


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_padding_and_shared_beginnings_change_nothing(family):
    lm = model(family)
    alone = neurgrad(lm, PROMPTS, OPTIONS, batch_size=1)
    for other, rows in (
        (neurgrad(lm, PROMPTS, OPTIONS, batch_size=7), range(7)),
        (neurgrad(lm, ["B", *PROMPTS], OPTIONS), range(1, 8)),  # no token is shared
        (neurgrad(lm.along("whole"), PROMPTS, OPTIONS, batch_size=2), range(7)),
    ):
        for name in ("negs_POLN", "activations_PLN", "probs_PO", "experts_PLK", "router_weights_PLK"):
            assert_close(getattr(other, name)[list(rows)], getattr(alone, name), lm)


@pytest.mark.parametrize("router", ["through", "fixed"])
def test_options_in_rows_as_on_a_gpu_are_the_same(router, monkeypatch):
    lm = model("qwen2_moe", router)
    batched = neurgrad(lm, PROMPTS, OPTIONS)
    monkeypatch.setattr(gradients, "computes_by_row", lambda device: False)
    in_rows = neurgrad(lm, PROMPTS, OPTIONS)
    for name in ("negs_POLN", "activations_PLN", "probs_PO", "experts_PLK", "router_weights_PLK"):
        assert_close(getattr(in_rows, name), getattr(batched, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_choice_of_the_router_matters_before_the_last_layer_alone(family):
    through, fixed = (neurgrad(model(family, router), PROMPTS[:3], OPTIONS) for router in ("through", "fixed"))
    assert_close(fixed.activations_PLN, through.activations_PLN)
    assert_close(fixed.negs_POLN[:, :, -1], through.negs_POLN[:, :, -1])
    first = through.negs_POLN[:, :, 0]
    assert np.abs(fixed.negs_POLN[:, :, 0] - first).max() > 1e-3 * np.abs(first).max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["through", "fixed"])
def test_the_check_at_load_passes(family, router):
    check = model(family, router).check
    assert check.failed == () and model(family, router).way == "virtual"
    assert check["neurgrad"].difference < 1e-5 and check["virtual"].difference < 1e-5


def test_a_model_whose_experts_are_computed_wrongly_fails_its_check(monkeypatch):
    from negcore.model import experts

    right = experts._Slots.project
    monkeypatch.setattr(experts._Slots, "project", lambda *args, **options: 1.01 * right(*args, **options))
    with pytest.raises(ModelError, match="logits against the untouched model: failed"):
        as_language_model(AutoModelForCausalLM.from_config(tiny_config("mixtral")), tiny_tokenizer(), name="wrong")


def test_neurons_are_numbered_expert_by_expert_and_dense_ones_last():
    shape = LayerShape(2, n_experts=4, top_k=2, n_units=3)
    assert (shape.n_neurons, shape.n_active) == (14, 8)
    assert shape.active_neurons(np.array([[0, 2], [1, 3]])).tolist() == [
        [0, 1, 2, 6, 7, 8, 12, 13],
        [3, 4, 5, 9, 10, 11, 12, 13],
    ]
    assert LayerShape(3).active_neurons(np.empty((1, 0), int)).tolist() == [[0, 1, 2]]


def test_layers_of_one_model_may_be_dense_or_of_experts_beside_shared_ones():
    assert tiny_model("qwen2_moe").layer_shapes == (
        LayerShape(12, 4, 2, 8),
        LayerShape(24),
        LayerShape(12, 4, 2, 8),
    )
    assert tiny_model("mixtral").layer_shapes == (LayerShape(0, 4, 2, 24),) * 3


def test_sinks_take_their_share_of_the_attention():
    lm = tiny_model("gpt_oss")
    before = neurgrad(lm, PROMPTS[:2], OPTIONS).probs_PO
    for layer in lm.layers:
        layer.self_attn.sinks.data += 3.0
    assert np.abs(neurgrad(lm, PROMPTS[:2], OPTIONS).probs_PO - before).max() > 1e-4
    assert_measured(lm, neurgrad(lm, PROMPTS[:2], OPTIONS), 0, PROMPTS[0])


def test_an_unknown_choice_of_the_router_is_refused():
    with pytest.raises(ModelError, match=re.escape("router 'open' is not known; choose one of through, fixed")):
        tiny_model("mixtral", router="open")


@pytest.mark.parametrize(
    "measure",
    [
        lambda lm: intervene(lm, PROMPTS[:1], " A", sets=[[(0, 1)]], shifts=[1.0], negs_PLN=np.zeros((1, 3, 96))),
        lambda lm: estimate(lm, PROMPTS[:1], [" A"], estimator="relp", references=PROMPTS[1:2]),
        lambda lm: estimate(lm, PROMPTS[:1], [" A"], estimator="mean_ablation", references=PROMPTS),
    ],
)
def test_what_knows_dense_neurons_alone_refuses_experts_by_name(measure):
    with pytest.raises(NegError, match="tiny-mixtral.*not made for mixtures of experts.*docs/experts.md"):
        measure(model("mixtral"))


# Finite shifts


def some_neurons(lm, row=0):
    """The strongest neurons that a prompt has in every layer, and one of an expert that it is not routed to."""
    batch = neurgrad(lm, PROMPTS[row : row + 1], OPTIONS[:1])
    there, absent = [], []
    for layer, shape in enumerate(lm.layer_shapes):
        experts_1K = batch.experts_PLK[:, layer, : shape.top_k]
        strongest = int(np.abs(batch.negs_POLN[0, 0, layer, : shape.n_active]).argmax())
        there.append((layer, int(shape.active_neurons(experts_1K)[0, strongest])))
        others = sorted(set(range(shape.n_experts)) - set(experts_1K[0].tolist()))
        absent += [(layer, expert * shape.n_units) for expert in others[:1]]
    negs = [float(np.abs(batch.negs_POLN[0, 0, layer]).max()) for layer, _ in there]
    signed = [float(batch.negs_POLN[0, 0, layer, np.abs(batch.negs_POLN[0, 0, layer]).argmax()]) for layer, _ in there]
    assert negs == [abs(one) for one in signed]
    return there, absent, signed


@pytest.mark.parametrize("router", ["through", "fixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_slope_of_a_sweep_is_the_neg_under_the_same_choice_of_the_router(family, router):
    lm = model(family, router)
    there, absent, negs = some_neurons(lm)
    result = sweep(lm, PROMPTS[:1], OPTIONS[0], neurons=[*there, *absent], shifts=[-1e-3, 1e-3])
    assert result.active_PK.tolist() == [[True] * len(there) + [False] * len(absent)]
    assert result.negs_PK.mask.tolist() == (~result.active_PK).tolist()
    assert not result.changes_PKS[:, len(there) :].any()
    np.testing.assert_allclose(result.negs_PK.data[0, : len(there)], negs, rtol=2e-2)


def test_a_fixed_router_is_that_of_the_unshifted_pass_however_far_a_neuron_moves():
    through, fixed = model("gpt_oss"), model("gpt_oss", "fixed")
    there, _, _ = some_neurons(through)
    shifts = [-30.0, 8.0]
    as_it_is = sweep(through, PROMPTS[:1], OPTIONS[0], neurons=there[:1], shifts=shifts)
    held = sweep(fixed, PROMPTS[:1], OPTIONS[0], neurons=there[:1], shifts=shifts)
    assert np.abs(held.probs_PKS / as_it_is.probs_PKS - 1).max() > 0.1

    tokens, kept, handles = encode_prompts(through.card, PROMPTS[:1])[0], {}, []
    routers = [layer.mlp.router for layer in through.layers]
    for router in routers:
        handles.append(router.register_forward_hook(lambda module, _, output: kept.update({module: output})))
    through.model(input_ids=torch.tensor([tokens]))
    for handle in handles:
        handle.remove()

    def replay(module, args, output):
        n_rows = len(output[0]) // len(tokens)
        return tuple(one.repeat(n_rows, 1) for one in kept[module])

    handles = [router.register_forward_hook(replay) for router in routers]
    twin = sweep(through, PROMPTS[:1], OPTIONS[0], neurons=there[:1], shifts=shifts, method="hooks")
    for handle in handles:
        handle.remove()
    assert_close(held.probs_PKS, twin.probs_PKS)


@pytest.mark.parametrize("router", ["through", "fixed"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_a_causal_check_shifts_the_neurons_that_a_prompt_has(family, router):
    lm = model(family, router)
    there, absent, _ = some_neurons(lm)

    def flat(pairs):
        return np.array([layer * lm.layer_width + neuron for layer, neuron in pairs])

    def skill_set(pairs):
        return SkillSet("top", len(pairs), 0, flat(pairs), np.ones(len(pairs), np.int8))

    sets = [skill_set(there[:1]), skill_set(absent[:1]), skill_set([*there[:1], *absent[:1]])]
    chosen = np.unique(np.concatenate([one.neurons_K for one in sets]))
    result = shift_sets(
        lm,
        PROMPTS[:1],
        OPTIONS,
        gold_P=[0],
        gold_negs_PK=np.ones((1, len(chosen))),
        sets=sets,
        shifts=[0.5],
    )
    alone = sweep(lm, PROMPTS[:1], OPTIONS[0], neurons=there[:1], shifts=[0.5]).probs_PKS[0, 0, 0]
    by_set = result.probs_PMO[0].reshape(3, 2, -1)  # by the sign of the row's NEG, and by the set's polarity
    np.testing.assert_allclose(by_set[0, :, 0], alone, rtol=1e-6)
    assert (by_set[1] == result.base_probs_PO[0]).all()
    np.testing.assert_allclose(by_set[2], by_set[0], rtol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_row_that_a_neuron_writes_is_that_of_its_expert(family):
    lm = model(family)
    for layer, shape in enumerate(lm.layer_shapes):
        for neuron in {0, shape.n_neurons - 1}:
            module = lm.experts(layer)
            if neuron < shape.n_experts * shape.n_units:
                stack = module.down_proj if module.is_transposed else module.down_proj.mT
                expected = stack[neuron // shape.n_units, neuron % shape.n_units]
            else:
                expected = lm.down_row(layer, neuron)
                assert len(expected) == lm.model.config.hidden_size
            assert torch.equal(written_row(lm, layer, neuron), expected)
    assert len(logit_lens(lm, 0, 1, n_tokens=3).promoted) == 3


def test_a_sweep_of_all_neurons_names_those_that_there_are():
    lm = model("qwen2_moe")
    result = sweep(lm, PROMPTS[:1], OPTIONS[0], neurons="all", shifts=[1.0])
    assert len(result.neurons_K2) == sum(shape.n_neurons for shape in lm.layer_shapes)
    assert result.active_PK.sum() == sum(shape.n_active for shape in lm.layer_shapes)
    with pytest.raises(NegError, match="neuron 30 of layer 1 does not exist"):
        sweep(lm, PROMPTS[:1], OPTIONS[0], neurons=[(1, 30)], shifts=[1.0])
