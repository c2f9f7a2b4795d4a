"""Shifts and estimators in mixtures of experts, against passes of the token-by-token twin."""

from functools import cache

import numpy as np
import pytest
import torch
from support import ARCHITECTURES, LABELS, PROMPTS, tiny_model
from token_by_token import run

from negcore.measure.estimators import PATH_STEPS, estimate
from negcore.measure.interventions import intervene, random_sets
from negcore.measure.neurgrad import neurgrad
from negcore.measure.spread import activation_spreads
from negcore.measure.steering import steer
from negcore.measure.sweeps import choose_neurons, draw_neurons, sweep
from negcore.model.encoding import encode, encode_prompts
from negcore.model.layer_shapes import LayerShape

FAMILIES = [family for family, row in ARCHITECTURES.items() if row.experts]
# One kind of layers alone, shared experts beside dense layers, a bias and sinks, and another attention.
SOME = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"]
ROUTERS = ["through", "fixed"]


@cache
def model(family, router="through", site="paper"):
    return tiny_model(family, router=router, site=site)


def tokens_of(lm, prompt):
    return encode_prompts(lm.card, [prompt])[0]


def label_id(lm, prompt, label):
    return int(encode(lm.card, [prompt], [label]).label_ids_PO[0, 0])


def away(activation):
    return 1.0 if activation > 0 else -1.0


def assert_close(actual, expected, lm, scale=0.0):
    """Compare numbers to rounding: of the largest, or of those that they are differences of."""
    coarse = 1e-6 if lm.card.config.model_type.startswith("deepseek") else 1e-9  # float32 in their own code
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=coarse, atol=coarse * max(scale, np.abs(expected).max()))


@torch.no_grad()
def probs_of(lm, tokens, shifts=None, held=None):
    ran = run(lm, tokens, shifts, held)
    return ran.logits_TV[-1].softmax(0), ran


def mixed_set(lm, count):
    """Neurons of all layers that the first prompts have, and others that they do not have."""
    every = choose_neurons(lm, "all")
    return every[np.random.default_rng(0).permutation(len(every))[:count]]


# Single neurons


@pytest.mark.parametrize("site", ["up", "act"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_virtual_tokens_are_the_plain_passes_of_shifted_prompts(family, router, site):
    lm, shifts = model(family, router, site), [-40.0, 0.5]
    neurons = mixed_set(lm, 24)
    virtual, hooked = (
        sweep(lm, PROMPTS[:2], LABELS[0], neurons=neurons, shifts=shifts, method=method)
        for method in ("virtual", "hooks")
    )
    assert (virtual.active_PK == hooked.active_PK).all() and virtual.active_PK.any() and not virtual.active_PK.all()
    assert_close(virtual.activations_PK, hooked.activations_PK, lm)
    assert_close(virtual.changes_PKS, hooked.changes_PKS, lm)
    tokens, answer = tokens_of(lm, PROMPTS[0]), label_id(lm, PROMPTS[0], LABELS[0])
    base_V, unshifted = probs_of(lm, tokens)
    held = unshifted.twin.routings if router == "fixed" else None
    for number in np.flatnonzero(virtual.active_PK[0])[::4]:
        layer, neuron = neurons[number].tolist()
        step = away(unshifted.activation(layer, len(tokens) - 1, neuron))
        for at, shift in enumerate(shifts):
            shifted_V, _ = probs_of(lm, tokens, {(layer, len(tokens) - 1, neuron): shift * step}, held)
            scale = np.abs(virtual.changes_PKS).max()
            assert virtual.changes_PKS[0, number, at] == pytest.approx(
                float(shifted_V[answer] - base_V[answer]), rel=1e-6, abs=1e-6 * scale
            )


def test_rows_of_virtual_tokens_do_not_see_each_other_at_their_experts():
    lm = model("qwen2_moe")
    neurons = mixed_set(lm, 40)
    together = sweep(lm, PROMPTS[:1], LABELS[0], neurons=neurons, shifts=[-40.0, 3.0], method="virtual")
    few = sweep(lm, PROMPTS[:1], LABELS[0], neurons=neurons, shifts=[-40.0, 3.0], method="virtual", max_rows=3)
    assert_close(few.changes_PKS, together.changes_PKS, lm)


# Sets of neurons


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_set_is_shifted_where_a_prompt_has_its_neurons(family, router):
    lm, sizes = model(family, router), [0.5, -40.0]
    sets = [mixed_set(lm, 60), [(2, 0)]]
    result = intervene(lm, PROMPTS[:2], LABELS[0], sets=sets, shifts=sizes)
    negs = neurgrad(lm, PROMPTS[:2], LABELS[:1])
    n_rerouted = 0
    for row, prompt in enumerate(PROMPTS[:2]):
        tokens, answer = tokens_of(lm, prompt), label_id(lm, prompt, LABELS[0])
        last = len(tokens) - 1
        base_V, unshifted = probs_of(lm, tokens)
        for number, neurons in enumerate(sets):
            there = [(*pair, unshifted.activation(pair[0], last, pair[1])) for pair in map(tuple, neurons)]
            there = [(int(layer), int(neuron), a) for layer, neuron, a in there if a is not None]
            assert result.n_shifted_PM[row, number] == len(there)
            slopes = [neg_of(lm, negs, row, layer, neuron) for layer, neuron, _ in there]
            for at, size in enumerate(sizes):
                shifts = {
                    (layer, last, neuron): size * np.sign(neg) * away(a)
                    for (layer, neuron, a), neg in zip(there, slopes, strict=True)
                }
                held = unshifted.twin.routings if router == "fixed" else None
                shifted_V, ran = probs_of(lm, tokens, shifts, held)
                n_rerouted += any(
                    ran.twin.experts[module, last] != unshifted.twin.experts[module, last]
                    for module in ran.twin.routings
                )
                assert_close(
                    result.changes_PDM[row, at, number], shifted_V[answer] - base_V[answer], lm, float(base_V[answer])
                )
                assert_close(result.predicted_PDM[row, at, number], size * np.abs(slopes).sum(), lm)
    assert (n_rerouted > 0) == (router == "through")


def neg_of(lm, batch, row, layer, neuron):
    """The NEG of a neuron for the first label, looked up by its number."""
    shape = lm.layer_shapes[layer]
    numbers = [
        e * shape.n_units + u for e in batch.experts_PLK[row, layer, : shape.top_k] for u in range(shape.n_units)
    ]
    numbers += range(shape.n_experts * shape.n_units, shape.n_neurons)
    return batch.negs_POLN[row, 0, layer, numbers.index(neuron)]


def test_a_set_of_which_a_prompt_has_nothing_changes_nothing():
    lm = model("mixtral")
    batch = neurgrad(lm, PROMPTS[:1], LABELS[:1])
    absent = sorted(set(range(4)) - set(batch.experts_PLK[0, 1].tolist()))
    result = intervene(lm, PROMPTS[:1], LABELS[0], sets=[[(1, absent[0] * 24), (1, absent[1] * 24 + 3)]], shifts=[2.0])
    assert result.n_shifted_PM.tolist() == [[0]]
    assert not result.changes_PDM.any() and not result.predicted_PDM.any()


def test_random_sets_hold_neurons_that_layers_have_alone():
    lm = model("qwen2_moe")
    (everything,) = random_sets(lm, [44 + 24 + 44])
    assert sorted(map(tuple, everything.tolist())) == [tuple(one) for one in choose_neurons(lm, "all").tolist()]


def test_neurons_are_drawn_evenly_up_to_the_width_of_narrow_layers():
    shapes = (LayerShape(4), LayerShape(0, 4, 2, 5), LayerShape(30))
    drawn = draw_neurons(shapes, 26, seed=1)
    assert sorted(np.bincount(drawn[:, 0])) == [4, 11, 11]
    assert len(np.unique(drawn, axis=0)) == 26
    assert (drawn[:, 1] < np.array([4, 20, 30])[drawn[:, 0]]).all()
    assert np.bincount(draw_neurons(shapes, 50)[:, 0]).tolist() == [4, 20, 26]
    assert len(draw_neurons(shapes, 54)) == 54


# Steering


@pytest.mark.parametrize("way", ["cached", "whole"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", SOME)
def test_a_steered_answer_is_that_of_a_plain_loop(family, router, way):
    lm = model(family, router).along(way)
    chosen = [(*pair, size) for pair, size in zip(mixed_set(lm, 40).tolist(), np.linspace(-20, 20, 40), strict=True)]
    (answer,) = steer(lm, PROMPTS[:1], chosen, max_tokens=4)
    ids, probs = plain_answer(lm, tokens_of(lm, PROMPTS[0]), chosen, 4)
    assert answer.after.ids == ids
    np.testing.assert_allclose(answer.after.probs, probs, rtol=1e-5)
    assert answer.after.ids != answer.before.ids or not np.allclose(answer.after.probs, answer.before.probs)


@torch.no_grad()
def plain_answer(lm, tokens, chosen, n_tokens):
    """Write an answer with everything run anew for every token: a pass to look, and one with shifts."""
    first, ids, probs = len(tokens) - 1, [], []
    while len(ids) < n_tokens:
        text = [*tokens, *ids]
        seen = run(lm, text)
        shifts = {
            (layer, token, neuron): size * away(a)
            for layer, neuron, size in chosen
            for token in range(first, len(text))
            if (a := seen.activation(layer, token, neuron)) is not None
        }
        probs_V, _ = probs_of(lm, text, shifts, seen.twin.routings if lm.router == "fixed" else None)
        if int(probs_V.argmax()) == lm.tokenizer.eos_token_id:
            break
        ids.append(int(probs_V.argmax()))
        probs.append(float(probs_V.max()))
    return ids, probs


@pytest.mark.parametrize("way", ["cached", "whole"])
def test_a_shift_of_zero_changes_no_answer_exactly(way):
    lm = model("qwen2_moe").along(way)
    nothing = [(layer, neuron, 0.0) for layer, neuron in mixed_set(lm, 40).tolist()]
    for _, before, after in steer(lm, PROMPTS[:2], nothing, max_tokens=4):
        assert before == after


# Estimators


def scored(lm, name, router="through", **options):
    scores = estimate(lm, PROMPTS[:2], LABELS[:1], estimator=name, **options)
    assert isinstance(scores, np.ma.MaskedArray)
    return scores


def by_number(lm, row, score):
    """Scores (L, N) of the neurons that a prompt has, one by one; NaN for the others."""
    tokens = tokens_of(lm, PROMPTS[row])
    last, expected = len(tokens) - 1, np.full((lm.n_layers, lm.layer_width), np.nan)
    with torch.no_grad():
        seen = run(lm, tokens)
    for layer, neuron in choose_neurons(lm, "all").tolist():
        if (a := seen.activation(layer, last, neuron)) is not None:
            expected[layer, neuron] = score(tokens, seen, layer, neuron, a)
    return expected


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_estimators_have_the_negs_of_the_neurons_that_a_prompt_has(family, router):
    lm = model(family, router)
    negs = neurgrad(lm, PROMPTS[:2], LABELS[:1])  # itself plain autograd: see test_experts
    directed, plain = scored(lm, "neurgrad"), scored(lm, "gradient")
    times = scored(lm, "gradient_x_activation")
    assert plain.mask.any()
    for row in range(2):
        expected = by_number(
            lm, row, lambda tokens, seen, layer, neuron, a, row=row: neg_of(lm, negs, row, layer, neuron)
        )
        acts = by_number(lm, row, lambda tokens, seen, layer, neuron, a: a)
        assert_scores(lm, directed[row], expected)
        assert_scores(lm, plain[row], expected * np.where(acts > 0, 1, -1))
        assert_scores(lm, times[row], expected * np.where(acts > 0, 1, -1) * acts)


def assert_scores(lm, actual, expected):
    assert (actual.mask == np.isnan(expected)).all()
    there = ~actual.mask
    assert_close(actual.data[there], expected[there], lm)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", SOME)
def test_an_ablation_sets_each_neuron_that_a_prompt_has_to_zero(family, router):
    lm = model(family, router)
    neurons = mixed_set(lm, 12)
    scores = scored(lm, "ablation", neurons=neurons)
    for row in range(2):
        answer = label_id(lm, PROMPTS[row], LABELS[0])

        def loss(tokens, seen, layer, neuron, a, answer=answer):
            held = seen.twin.routings if router == "fixed" else None
            without_V, _ = probs_of(lm, tokens, {(layer, len(tokens) - 1, neuron): -a}, held)
            return float(seen.logits_TV[-1].softmax(0)[answer] - without_V[answer])

        expected = by_number(lm, row, lambda *of, loss=loss: loss(*of) if list(of[2:4]) in neurons.tolist() else 0.0)
        assert_scores(lm, scores[row], expected[*neurons.T])


@pytest.mark.parametrize(
    ("family", "router"), [("mixtral", "through"), ("qwen2_moe", "fixed"), ("deepseek_v3", "through")]
)
def test_integrated_gradients_scale_the_neurons_that_a_prompt_has(family, router):
    lm = model(family, router)
    scores = scored(lm, "integrated_gradients")[0]
    tokens, answer = tokens_of(lm, PROMPTS[0]), label_id(lm, PROMPTS[0], LABELS[0])
    last = len(tokens) - 1
    with torch.no_grad():
        seen = run(lm, tokens)
    there = [
        (layer, neuron, a)
        for layer, neuron in choose_neurons(lm, "all").tolist()
        if (a := seen.activation(layer, last, neuron)) is not None
    ]
    expected = np.full(scores.shape, np.nan)
    for layer in range(lm.n_layers):
        of_layer = [(neuron, a) for one, neuron, a in there if one == layer]
        sums = np.zeros(len(of_layer))
        for step in range(PATH_STEPS):
            scale = (step + 0.5) / PATH_STEPS - 1
            shifts = {(layer, last, neuron): scale * a for neuron, a in of_layer}
            held = seen.twin.routings if router == "fixed" else None
            sums += slopes_at(lm, tokens, answer, shifts, held, [(layer, neuron) for neuron, _ in of_layer])
        for (neuron, a), total in zip(of_layer, sums, strict=True):
            expected[layer, neuron] = total * a / PATH_STEPS
    assert_scores(lm, scores, expected)


def slopes_at(lm, tokens, answer, shifts, held, pairs):
    """Slopes of the answer's probability by neurons of one layer of the last token, where others are shifted."""
    lm.model.requires_grad_(True)
    try:
        ran = run(lm, tokens, shifts, held)
        places = []
        for layer, neuron in pairs:
            shape, module = lm.layer_shapes[layer], lm.experts(layer)
            first_dense = shape.n_experts * shape.n_units
            if neuron >= first_dense:
                places.append((ran.dense[layer], (len(tokens) - 1, neuron - first_dense)))
            else:
                leaf = ran.twin.leaves[module, len(tokens) - 1, neuron // shape.n_units]
                places.append((leaf, (neuron % shape.n_units,)))
        slopes = torch.autograd.grad(ran.logits_TV[-1].softmax(0)[answer], [leaf for leaf, _ in places])
    finally:
        lm.model.requires_grad_(False)
    return np.array([float(slope[at]) for slope, (_, at) in zip(slopes, places, strict=True)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_log_probability_increase_writes_what_the_router_lets_a_neuron_write(family):
    lm = model(family, "fixed" if family == "olmoe" else "through", "act" if family == "mixtral" else "paper")
    neurons = mixed_set(lm, 20)
    scores = scored(lm, "log_probability_increase", target="log-probability", neurons=neurons)[0]
    at_act, tokens = model(family, "through", "act"), tokens_of(lm, PROMPTS[0])
    last, answer, expected = len(tokens) - 1, label_id(lm, PROMPTS[0], LABELS[0]), []
    with torch.no_grad():
        seen = run(at_act, tokens)
        whole_LH = [left(at_act, tokens, layer, {}) for layer in range(lm.n_layers)]
        stream_LH = [without_neurons(at_act, tokens, seen, layer) for layer in range(lm.n_layers)]
        for layer, neuron in neurons.tolist():
            if (a := seen.activation(layer, last, neuron)) is None:
                expected.append(np.nan)
                continue
            # The feed-forward is linear behind its neurons: one unit more of a neuron is what its unit writes.
            written_H = a * (left(at_act, tokens, layer, {(layer, last, neuron): 1.0}) - whole_LH[layer])
            stream_H = stream_LH[layer]
            expected.append(float(head(lm, stream_H + written_H)[answer] - head(lm, stream_H)[answer]))
    assert np.nanmax(np.abs(expected)) > 1e-4
    assert (scores.mask == np.isnan(expected)).all()
    there = ~scores.mask
    scale = 1e-5 * np.nanmax(np.abs(expected))
    np.testing.assert_allclose(scores.data[there], np.array(expected)[there], atol=scale)


def without_neurons(lm, tokens, seen, layer):
    """What leaves a layer at the last token if its feed-forward writes nothing: no neuron, and no bias either."""
    last, there = len(tokens) - 1, {}
    for neuron in range(lm.layer_shapes[layer].n_neurons):
        if (a := seen.activation(layer, last, neuron)) is not None:
            there[layer, last, neuron] = -a
    return left(lm, tokens, layer, there) - bias_of(lm, seen, layer, last)


def left(lm, tokens, layer, shifts):
    """What leaves a layer at the last token, with neurons shifted."""
    kept = []
    handle = lm.layers[layer].register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        run(lm, tokens, shifts)
    finally:
        handle.remove()
    hidden = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return hidden.reshape(-1, hidden.shape[-1])[-1]


def bias_of(lm, seen, layer, token):
    """What the biases of the routed experts' down projections add at a token."""
    module = lm.experts(layer)
    if module is None or not module.has_bias:
        return 0
    experts_TK, weights_TK = seen.twin.routings[module]
    of = zip(experts_TK[token].tolist(), weights_TK[token], strict=True)
    return sum(weight * module.down_proj_bias[expert] for expert, weight in of)


def head(lm, hidden_H):
    """Log-probabilities by the model's own norm and head."""
    return lm.model.lm_head(lm.model.model.norm(hidden_H)).log_softmax(-1)


# Spreads


def test_a_spread_is_that_of_the_prompts_that_have_a_neuron():
    lm = model("mixtral")
    neurons = mixed_set(lm, 50)
    ids = encode_prompts(lm.card, PROMPTS)
    spreads = activation_spreads(lm, ids, neurons)
    with torch.no_grad():
        passes = [(run(lm, tokens), len(tokens) - 1) for tokens in ids]
    for (layer, neuron), spread in zip(neurons.tolist(), spreads, strict=True):
        acts = [a for ran, last in passes if (a := ran.activation(layer, last, neuron)) is not None]
        assert spread == pytest.approx(np.std(acts) if len(acts) > 1 else 0.0, abs=1e-12)
    swept = sweep(lm, PROMPTS, LABELS[0], neurons=neurons, shifts=[0.5, 1.0], spreads=spreads)
    kept = swept.with_spread()
    assert kept.neurons_K2.tolist() == neurons[spreads > 0].tolist()
    assert not kept.active_PK.all() and kept.active_PK.any(axis=0).all()
