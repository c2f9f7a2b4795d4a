import math

import numpy as np
import pytest
import torch
from plain_passes import ANSWERS, OPTIONS, gradient_at, target_of, whole_pass
from support import CORE, PROMPTS, prompts_for, tiny_model

from negcore.errors import LabelError, NegError
from negcore.measure.estimators import ESTIMATORS, PATH_STEPS, WITH_REFERENCES, estimate, unembed
from negcore.measure.forward import probed_batches
from negcore.measure.neurgrad import neurgrad
from negcore.measure.question import Question
from negcore.measure.streams import streams
from negcore.model.encoding import EncodedPrompts, encode_prompts

TARGETS = ["probability", "log-probability", "logit-difference"]
FAMILIES = ["llama", "gpt2", "bert"]
SOME = [(0, 2), (0, 11), (1, 23), (2, 0), (2, 7)]


def by_loop(lm, row, score_layer):
    prompt = prompts_for(lm)[row]
    with torch.no_grad():
        _, activations_LN = whole_pass(lm, prompt)
    scores = [score_layer(prompt, layer, activations_LN[layer]) for layer in range(lm.n_layers)]
    return torch.stack(scores).numpy()


def scores_of(lm, name, target, **settings):
    if name in WITH_REFERENCES:
        settings["references"] = prompts_for(lm)[2:4]
    return estimate(lm, prompts_for(lm)[:2], OPTIONS, answers=ANSWERS, estimator=name, target=target, **settings)


def assert_close(actual, expected):
    expected = np.asarray(expected)
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())


def test_targets_are_checked_with_a_pencil():
    log_probs_BO = torch.tensor([[0.5, 0.25, 0.125], [0.1, 0.2, 0.4]], dtype=torch.float64).log()
    expected = {
        "probability": [0.25, 0.4],
        "log-probability": [math.log(0.25), math.log(0.4)],
        "logit-difference": [math.log(0.25 / 0.5), math.log(0.4 / 0.2)],
    }
    for target, values in expected.items():
        question = Question(EncodedPrompts([[0], [0]], np.zeros((2, 3), np.int64)), np.array([1, 2]), target)
        assert question.values(log_probs_BO, [0, 1]).tolist() == pytest.approx(values)
        assert question.values(log_probs_BO[1:], [1]).tolist() == pytest.approx(values[1:])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_estimators_are_plain_autograd_in_a_loop(family, target):
    lm = tiny_model(family)
    plain, directed = scores_of(lm, "gradient", target), scores_of(lm, "neurgrad", target)
    times = scores_of(lm, "gradient_x_activation", target)
    for row in range(2):
        gradients = by_loop(lm, row, lambda prompt, layer, a, row=row: gradient_at(lm, prompt, row, target, layer))
        activations = by_loop(lm, row, lambda prompt, layer, a: a)
        assert_close(plain[row], gradients)
        assert_close(directed[row], gradients * np.where(activations > 0, 1, -1))
        assert_close(times[row], gradients * activations)


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_the_neurgrad_estimator_is_neurgrad(family):
    lm = tiny_model(family)
    batch = neurgrad(lm, prompts_for(lm), [" B"])
    assert_close(estimate(lm, prompts_for(lm), [" B"], estimator="neurgrad"), batch.negs_POLN[:, 0])


@pytest.mark.parametrize("target", ["probability", "logit-difference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_are_a_loop_along_the_scaled_activation(family, target):
    lm = tiny_model(family)
    scores = scores_of(lm, "integrated_gradients", target)

    def path(prompt, layer, a):
        steps = [
            gradient_at(lm, prompt, 0, target, layer, a * (k - 0.5) / PATH_STEPS) for k in range(1, PATH_STEPS + 1)
        ]
        return a * sum(steps) / PATH_STEPS

    assert_close(scores[0], by_loop(lm, 0, path))


@pytest.mark.parametrize(("n_steps", "error"), [(20, 2e-2), (100, 1e-3)])
@pytest.mark.parametrize("family", ["gpt2", "distilbert", "llama"])
def test_the_integrated_gradients_of_a_layer_add_up_to_its_contribution(family, n_steps, error, monkeypatch):
    monkeypatch.setattr("negcore.measure.estimators.PATH_STEPS", n_steps)
    lm = tiny_model(family)
    prompt = prompts_for(lm)[0]
    scores_LN = scores_of(lm, "integrated_gradients", "log-probability")[0]
    for layer in range(lm.n_layers):
        with torch.no_grad():
            whole = target_of(lm, whole_pass(lm, prompt)[0], 0, "log-probability")
            silent = whole_pass(lm, prompt, lambda at, values_N, layer=layer: values_N * (at != layer))[0]
        contributed = float(whole - target_of(lm, silent, 0, "log-probability"))
        assert scores_LN[layer].sum() == pytest.approx(contributed, rel=error)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "modernbert"])
def test_ablation_sets_each_neuron_to_zero_in_a_pass_of_its_own(family, target):
    lm = tiny_model(family)
    scores = scores_of(lm, "ablation", target, neurons=SOME)
    for row, prompt in enumerate(prompts_for(lm)[:2]):
        with torch.no_grad():
            whole = target_of(lm, whole_pass(lm, prompt)[0], row, target)
            for column, (layer, neuron) in enumerate(SOME):

                def silence(where, values_N, layer=layer, neuron=neuron):
                    keep_N = torch.ones_like(values_N)
                    keep_N[len(keep_N) - lm.layer_width + neuron] = 1.0 if where != layer else 0.0
                    return values_N * keep_N

                without = target_of(lm, whole_pass(lm, prompt, silence)[0], row, target)
                assert scores[row, column] == pytest.approx(float(whole - without), rel=1e-7, abs=1e-12)
                assert whole != without


HEADS = {
    "llama": lambda lm, h: lm.model.lm_head(lm.model.model.norm(h)),
    "gemma2": lambda lm, h: torch.tanh(lm.model.lm_head(lm.model.model.norm(h)) / 30) * 30,
    "gpt2": lambda lm, h: lm.model.lm_head(lm.model.transformer.ln_f(h)),
    "bert": lambda lm, h: lm.model.cls(h),
}


@pytest.mark.parametrize("family", HEADS)
def test_unembedding_is_the_final_norm_and_the_head(family):
    lm = tiny_model(family)
    hidden_RH = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(unembed(lm, hidden_RH), HEADS[family](lm, hidden_RH))
    assert not any(module._forward_hooks for module in lm.model.modules())


def input_of(path):
    return lambda layer, seen: seen[layer.get_submodule(path)][0]


def input_plus(path):
    return lambda layer, seen: seen[layer][0] + seen[layer.get_submodule(path)][1]


# What the feed-forward's output is added to, written out for each family: layer input plus attention output.
JOINED = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3"], input_of("post_attention_layernorm")),
    **dict.fromkeys(["gemma2", "gemma3", "gemma3_text"], input_of("pre_feedforward_layernorm")),
    "olmo2": input_plus("post_attention_layernorm"),
    "gpt2": input_of("ln_2"),
    "gpt_neox": input_plus("attention.dense"),  # attention and feed-forward side by side
    "opt": input_of("final_layer_norm"),
    **dict.fromkeys(["bert", "roberta"], input_of("intermediate")),
    "distilbert": input_of("ffn"),
    "modernbert": input_of("mlp_norm"),
}
SUM_NORMS = {"bert": "output.LayerNorm", "roberta": "output.LayerNorm", "distilbert": "output_layer_norm"}


def whole_pass_values(lm, prompt):
    """Input and output of every module at the probed token, in a plain pass of one prompt."""
    tokens = encode_prompts(lm.card, [prompt])[0]
    position = tokens.index(lm.tokenizer.mask_token_id) if lm.arch.masked else len(tokens) - 1
    seen = {}

    def record(module, args, output):
        values = [one[0] if isinstance(one, tuple) else one for one in (args or (None,), output)]
        if all(isinstance(one, torch.Tensor) and one.is_floating_point() for one in values):
            seen[module] = [one.reshape(-1, one.shape[-1])[position] for one in values if one.numel() >= len(tokens)]

    handles = [module.register_forward_hook(record) for layer in lm.layers for module in layer.modules()]
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", JOINED)
def test_log_probability_increase_adds_one_neurons_vector_to_what_its_layers_output_joins(family):
    lm, target = tiny_model(family), "log-probability"
    scores = scores_of(lm, "log_probability_increase", target)
    assert np.abs(scores[0]).max() > 1e-4
    seen = whole_pass_values(lm, prompts_for(lm)[0])
    for layer, neuron in SOME:
        module = lm.layers[layer]
        act_N, output_H = seen[lm.down(layer)]
        weight = lm.down(layer).weight
        added_H = act_N[neuron] * (weight[neuron] if family == "gpt2" else weight[:, neuron])
        if lm.arch.post_norm:
            added_H = added_H * seen[module.get_submodule(lm.arch.post_norm)][1] / output_H
        h_H = JOINED[family](module, seen)
        norm = module.get_submodule(SUM_NORMS[family]) if family in SUM_NORMS else lambda x: x
        with torch.no_grad():
            after, before = (target_of(lm, unembed(lm, norm(x)[None])[0], 0, target) for x in (h_H + added_H, h_H))
        # RMSNorm rounds to float32, so a rounding of the sum may move one of its steps.
        assert scores[0, layer, neuron] == pytest.approx(float(after - before), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("target", TARGETS)
def test_log_probability_increase_takes_every_target(target):
    lm = tiny_model("gpt2")
    scores = scores_of(lm, "log_probability_increase", target)
    seen = whole_pass_values(lm, prompts_for(lm)[0])
    h_H, act_N = seen[lm.layers[1].ln_2][0], seen[lm.down(1)][0]
    with torch.no_grad():
        x_2H = torch.stack([h_H, h_H + act_N[5] * lm.down(1).weight[5]])
        before, after = (target_of(lm, logits_V, 0, target) for logits_V in unembed(lm, x_2H))
    assert scores[0, 1, 5] == pytest.approx(float(after - before), rel=1e-8)


@pytest.mark.parametrize("family", CORE)
def test_a_stream_joined_by_all_its_layer_writes_is_what_leaves_the_layer(family):
    lm = tiny_model(family)
    tokens = encode_prompts(lm.card, prompts_for(lm)[:1])[0]
    (batch,) = probed_batches(lm, [tokens], batch_size=1)
    seen = whole_pass_values(lm, prompts_for(lm)[0])
    with torch.no_grad():
        of_layers = streams(batch, tokens)
        for layer, stream in enumerate(of_layers):
            act_N, output_H = seen[lm.down(layer)]
            torch.testing.assert_close(stream.acts_N, act_N, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(stream.join(output_H[None])[0], seen[lm.layers[layer]][1], rtol=1e-5, atol=1e-7)
            assert not torch.allclose(stream.joined_H, seen[lm.layers[layer]][0])  # attention has written too
    assert not any(module._forward_hooks for module in lm.model.modules())


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"add_cross_attention": True}),
    ],
)
def test_variants_of_a_family_have_their_own_streams(family, change):
    lm = tiny_model(family, **change)
    tokens = encode_prompts(lm.card, prompts_for(lm)[:1])[0]
    (batch,) = probed_batches(lm, [tokens], batch_size=1)
    seen = whole_pass_values(lm, prompts_for(lm)[0])
    with torch.no_grad():
        for layer, stream in enumerate(streams(batch, tokens)):
            output_H = seen[lm.down(layer)][1]
            torch.testing.assert_close(stream.join(output_H[None])[0], seen[lm.layers[layer]][1])
            assert (stream.norm is not None) == (family == "opt")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_chosen_neurons_are_scored_as_among_all(name):
    lm = tiny_model("gpt2")
    everything = scores_of(lm, name, "log-probability")
    chosen = scores_of(lm, name, "log-probability", neurons=[(2, 5), (0, 1), (2, 4)])
    assert everything.shape == (2, 3, 24) and chosen.shape == (2, 3)
    assert_close(chosen, everything[:, [2, 0, 2], [5, 1, 4]])


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("family", CORE)
def test_every_estimator_runs_on_every_family(family, name):
    lm = tiny_model(family, dtype=torch.float32)
    scores = scores_of(lm, name, "probability", neurons=2)
    assert scores.shape == (2, 6) and scores.dtype == np.float32
    assert np.isfinite(scores).all() and np.abs(scores).max() > 0


def test_every_estimator_says_its_formula_its_source_and_its_cost():
    for estimator in ESTIMATORS.values():
        formula, _, rest = estimator.__doc__.partition("\n")
        assert "f(" in formula or "f'(" in formula
        assert "Source:" in rest and "Cost:" in rest


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"estimator": "magic"}, NegError, "estimator 'magic' is not known; choose one of neurgrad, gradient,"),
        ({"target": "luck"}, NegError, "target 'luck' is not known"),
        ({"labels": [" A"], "target": "logit-difference"}, LabelError, "needs another label to differ from"),
        ({"answers": None}, LabelError, "3 labels were given without answers"),
        ({"answers": [0]}, LabelError, r"answers of shape \(1,\) do not fit 2 prompts"),
        ({"answers": [0, 3]}, LabelError, "answer 3 of prompt 1 is no label; give 0 to 2"),
        ({"neurons": [(0, 24)]}, NegError, "neuron 24 of layer 0 does not exist"),
    ],
)
def test_bad_questions_are_refused_in_one_line(settings, error, message):
    given = {"labels": OPTIONS, "estimator": "gradient", "answers": [0, 1], **settings}
    with pytest.raises(error, match=message) as caught:
        estimate(tiny_model("llama"), PROMPTS[:2], given.pop("labels"), **given)
    assert "\n" not in str(caught.value)
