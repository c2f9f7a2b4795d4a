import math

import numpy as np
import pytest
import torch
from plain_passes import ANSWERS, OPTIONS, gradient_at, target_of, whole_pass
from support import CORE, prompts_for, tiny_model
from torch import nn

from negcore.errors import NegError, PromptError
from negcore.measure.estimators import WITH_REFERENCES, estimate
from negcore.measure.forward import probed_batches
from negcore.measure.relevance import propagation_rules
from negcore.model.encoding import encode_prompts

SOME = [(0, 2), (0, 11), (1, 23), (2, 0), (2, 7)]
TARGETS = ["probability", "logit-difference"]


def scores_of(lm, name, target="log-probability", references=slice(2, 4), **settings):
    settings |= {"answers": ANSWERS, "references": prompts_for(lm)[references]}
    return estimate(lm, prompts_for(lm)[:2], OPTIONS, estimator=name, target=target, **settings)


def activations_of(lm, prompt):
    with torch.no_grad():
        return whole_pass(lm, prompt)[1][:, -lm.layer_width :]


def contributions(lm, row, target):
    """Gradient times what the activation is more than in the other prompt, by plain autograd: shape (L, N)."""
    prompt, other = prompts_for(lm)[row], prompts_for(lm)[row + 2]
    gradients = [gradient_at(lm, prompt, row, target, layer)[-lm.layer_width :] for layer in range(lm.n_layers)]
    return torch.stack(gradients) * (activations_of(lm, prompt) - activations_of(lm, other))


def assert_close(actual, expected, rtol=1e-8):
    expected = np.asarray(expected)
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "phi3"])
def test_attribution_patching_is_plain_autograd_in_a_loop(family, target):
    lm = tiny_model(family)
    scores = scores_of(lm, "attribution_patching", target)
    for row in range(2):
        assert_close(scores[row], contributions(lm, row, target))


# All that a layer writes to its residual stream, module by module.
WRITERS = {
    "llama": ["self_attn", "mlp"],
    "qwen3": ["self_attn", "mlp"],
    "gemma3": ["post_attention_layernorm", "post_feedforward_layernorm"],
    "olmo2": ["post_attention_layernorm", "post_feedforward_layernorm"],
    "gpt2": ["attn", "mlp"],
    "gpt_neox": ["attention", "mlp"],
    "opt": ["self_attn", "fc2"],
    "gemma4": ["post_attention_layernorm", "post_feedforward_layernorm", "post_per_layer_input_norm"],
    "bert": ["attention.output.dense", "output.dense"],
    "distilbert": ["attention.out_lin", "ffn.lin2"],
    "modernbert": ["attn", "mlp"],
}


@pytest.mark.parametrize("family", WRITERS)
def test_atp_star_lets_nothing_flow_back_through_one_layer_after_the_other(family):
    lm, target = tiny_model(family), "log-probability"
    blocks = list(lm.model.get_submodule(lm.arch.layers))
    for block in blocks:
        if hasattr(block, "layer_scalar"):  # of Gemma 4, one in a random model
            block.layer_scalar.fill_(0.7)
    scores = scores_of(lm, "atp_star", target)
    for row in range(2):
        sizes = 0
        for block in blocks:
            modules = [block.get_submodule(path) for path in WRITERS[family]]
            handles = [module.register_forward_hook(constant) for module in modules]
            sizes = sizes + contributions(lm, row, target).abs()
            for handle in handles:
                handle.remove()
        whole = contributions(lm, row, target)
        assert_close(scores[row], whole.sign() * sizes / (len(blocks) - 1), rtol=2e-6)
        assert not np.allclose(scores[row], whole, rtol=0.05, atol=0)


def constant(module, args, output):
    return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()


def test_atp_star_has_no_layer_to_drop_in_a_model_of_one():
    with pytest.raises(NegError, match="drops one layer after the other, and tiny-llama has one; leave this estimator"):
        scores_of(tiny_model("llama", num_hidden_layers=1), "atp_star")


def test_atp_star_refuses_layers_that_write_to_several_streams():
    with pytest.raises(NegError, match="tiny-gemma3n_text, whose layers write to no single stream; leave this est"):
        scores_of(tiny_model("gemma3n_text"), "atp_star")


def rms_norm(weights):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt().detach() * weights(self)

    return forward


def layer_norm(self, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt().detach()
    return scaled * self.weight + self.bias


def gated(self, x):
    product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(product / 2 + product.detach() / 2)


# Class of a module, and its forward pass with LRP's rule written out.
RULES = {
    "LlamaRMSNorm": rms_norm(lambda norm: norm.weight),
    "Qwen3RMSNorm": rms_norm(lambda norm: norm.weight),
    "Gemma2RMSNorm": rms_norm(lambda norm: 1 + norm.weight),
    "LayerNorm": layer_norm,
    "LlamaMLP": gated,
    "Qwen3MLP": gated,
    "Gemma2MLP": gated,
}


def with_rules(lm):
    """Rewrite the forward passes of a model that is thrown away afterwards."""
    for module in list(lm.model.modules()):
        name = type(module).__name__
        if name in RULES:
            module.epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            module.forward = RULES[name].__get__(module)
        elif "activation" in type(module).__module__.lower():
            module.forward = lambda x, plain=module.forward: x * (plain(x) / x).detach()


@pytest.mark.parametrize("site", ["paper", "act"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "opt", "bert"])
def test_relp_is_attribution_patching_in_a_model_whose_steps_follow_its_rules(family, site):
    lm, target = tiny_model(family, site=site), "logit-difference"
    scores, plain = scores_of(lm, "relp", target), scores_of(lm, "attribution_patching", target)
    with_rules(lm)
    for row in range(2):
        expected = contributions(lm, row, target).detach()
        assert_close(scores[row], expected, rtol=1e-5)  # RMSNorm rounds to float32
        assert not np.allclose(plain[row], expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("family", CORE)
def test_propagation_rules_change_no_prediction_and_leave_no_hook(family):
    lm = tiny_model(family)
    (batch,) = probed_batches(lm, encode_prompts(lm.card, prompts_for(lm)[:1]))
    with torch.no_grad():
        before = batch.predict().logits_BV
        with propagation_rules(lm):
            torch.testing.assert_close(batch.predict().logits_BV, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_propagation_rules_are_checked_with_a_pencil():
    lm = tiny_model("llama")
    x = torch.tensor([3.0, -4.0], dtype=torch.float64, requires_grad=True)
    lm.model.extra = nn.ModuleDict({"act": nn.SiLU(), "norm": nn.LayerNorm(2, dtype=torch.float64)})
    lm.model.extra.norm.weight.data, lm.model.extra.norm.bias.data = torch.tensor([[2.0, 5.0], [7.0, 1.0]]).double()
    with propagation_rules(lm):
        (of_act,) = torch.autograd.grad(lm.model.extra.act(x).sum(), x)
        (of_norm,) = torch.autograd.grad(lm.model.extra.norm(x)[0], x)
    assert of_act.tolist() == pytest.approx([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(4))])  # silu(x) / x
    assert of_norm.tolist() == pytest.approx([2 / 3.5 / 2, -2 / 3.5 / 2], rel=1e-5)  # weight / sd, less its mean


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "modernbert"])
@pytest.mark.parametrize("name", ["mean_ablation", "resample_ablation"])
def test_an_ablation_by_another_value_sets_each_neuron_to_it_in_a_pass_of_its_own(name, family, target):
    lm = tiny_model(family)
    scores = scores_of(lm, name, target, neurons=SOME)
    others = torch.stack([activations_of(lm, prompt) for prompt in prompts_for(lm)[2:4]])
    for row, prompt in enumerate(prompts_for(lm)[:2]):
        replaced = others[row] if name == "resample_ablation" else others.mean(0)
        with torch.no_grad():
            whole = target_of(lm, whole_pass(lm, prompt)[0], row, target)
            for column, (layer, neuron) in enumerate(SOME):

                def replace(where, values_N, layer=layer, neuron=neuron, replaced=replaced):
                    values_N = values_N.clone()
                    if where == layer:
                        values_N[len(values_N) - lm.layer_width + neuron] = replaced[layer, neuron]
                    return values_N

                without = target_of(lm, whole_pass(lm, prompt, replace)[0], row, target)
                assert scores[row, column] == pytest.approx(float(whole - without), rel=1e-6, abs=1e-12)
                assert whole != without


def test_a_prompt_that_is_its_own_reference_has_no_effect():
    lm = tiny_model("gpt2")
    for name in sorted({*WITH_REFERENCES} - {"mean_ablation"}):
        assert np.abs(scores_of(lm, name, references=slice(2), neurons=SOME)).max() < 1e-12


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"estimator": "relp"}, NegError, "references: estimator 'relp' needs references"),
        ({"estimator": "gradient", "references": ["the"]}, NegError, "estimator 'gradient' takes none; attribution_pa"),
        ({"estimator": "atp_star", "references": ["the"]}, PromptError, "1 references were given for 2 prompts; give"),
        ({"estimator": "mean_ablation", "references": []}, PromptError, "references: no prompts were given"),
        ({"estimator": "relp", "references": ["the", ""]}, PromptError, "references: prompt 1 is empty"),
    ],
)
def test_references_that_do_not_fit_are_refused_in_one_line(settings, error, message):
    lm = tiny_model("llama")
    with pytest.raises(error, match=message) as caught:
        estimate(lm, prompts_for(lm)[:2], OPTIONS, answers=ANSWERS, **settings)
    assert "\n" not in str(caught.value)
