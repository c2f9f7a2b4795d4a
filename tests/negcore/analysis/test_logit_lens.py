"""The logit lens, beside a model whose last hidden state is replaced by the neuron's row."""

import numpy as np
import pytest
import torch
from support import CAUSAL, MASKED, tiny_model

from negcore.analysis.logit_lens import final_norm, logit_lens, written_row
from negcore.errors import ModelError, NegError

LAYER, NEURON = 1, 5


def logits_of_state(lm, state_H):
    """Run the model with one vector in place of what its last layer makes of every token."""

    def replaced(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        state = state_H.expand_as(hidden).clone()
        return (state, *output[1:]) if isinstance(output, tuple) else state

    hook = lm.last_block.register_forward_hook(replaced)
    try:
        return lm.model(input_ids=torch.tensor([[5]]), use_cache=False).logits[0, -1]
    finally:
        hook.remove()


def post_normed(lm):
    """What reaches the residual stream of a neuron whose output is the layer's only one."""
    row_H = lm.down_rows(LAYER)[NEURON]
    if lm.arch.post_norm is None:
        return row_H
    norm = lm.layers[LAYER].get_submodule(lm.arch.post_norm)
    return norm(row_H[None, None])[0, 0]  # these normalisations have no bias


@pytest.mark.parametrize("family", CAUSAL)
def test_tokens_are_ranked_as_by_a_model_whose_last_state_is_the_row(family):
    lm = tiny_model(family)
    change_V = logits_of_state(lm, post_normed(lm)) - logits_of_state(lm, torch.zeros_like(lm.down_rows(0)[0]))
    n = len(lm.tokenizer)
    found = logit_lens(lm, LAYER, NEURON, n_tokens=n)
    order = change_V[:n].argsort(descending=True, stable=True).tolist()
    for written, ids in ((found.promoted, order), (found.suppressed, order[::-1])):
        assert [one.token for one in written[:20]] == [lm.tokenizer.decode([at]) for at in ids[:20]]
        assert len(written) == n


def test_logits_are_those_of_the_normalised_row():
    lm = tiny_model("llama")
    row_H = lm.down_rows(LAYER)[NEURON].double()
    norm, head = lm.model.model.norm, lm.model.lm_head.weight
    logits_V = (head @ (norm.weight * row_H / (row_H.pow(2).mean() + norm.variance_epsilon).sqrt())).detach().numpy()
    found = logit_lens(lm, LAYER, NEURON, n_tokens=3)
    best = np.argsort(-logits_V[: len(lm.tokenizer)])[:3]
    np.testing.assert_allclose([one.logit for one in found.promoted], logits_V[best], rtol=1e-5)


def test_the_bias_of_a_layer_norm_is_left_out_and_its_centring_is_not():
    lm = tiny_model("gpt2")
    norm = lm.model.transformer.ln_f
    before = logit_lens(lm, LAYER, NEURON, n_tokens=9)
    torch.nn.init.normal_(norm.bias)
    assert logit_lens(lm, LAYER, NEURON, n_tokens=9).promoted[0].token == before.promoted[0].token
    lm.down_rows(LAYER)[NEURON] += 100.0  # a constant over the hidden axis is what centring takes away
    after = logit_lens(lm, LAYER, NEURON, n_tokens=9)
    assert [one.token for one in after.promoted] == [one.token for one in before.promoted]


def test_the_row_passes_the_normalisation_behind_its_feed_forward():
    lm = tiny_model("gemma2")
    norm = lm.layers[LAYER].get_submodule(lm.arch.post_norm)
    torch.nn.init.normal_(norm.weight)
    row_H = lm.down_rows(LAYER)[NEURON]
    expected_H = row_H / row_H.pow(2).mean().sqrt() * (1 + norm.weight)
    cosine = torch.nn.functional.cosine_similarity(written_row(lm, LAYER, NEURON), expected_H, dim=0)
    assert cosine == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("family", MASKED)
def test_models_with_more_than_a_normalisation_at_their_end_are_refused_in_one_line(family):
    with pytest.raises(ModelError, match="more than a normalisation") as caught:
        logit_lens(tiny_model(family), LAYER, NEURON)
    assert "\n" not in str(caught.value)


def test_no_hook_remains_and_a_neuron_that_does_not_exist_is_refused():
    lm = tiny_model("llama")
    final_norm(lm)
    assert not any(module._forward_hooks for module in lm.model.modules())
    with pytest.raises(
        NegError, match=r"neuron 3\.0 does not exist; tiny-llama has layers 0\.\.2 with neurons 0\.\.23"
    ):
        logit_lens(lm, 3, 0)
