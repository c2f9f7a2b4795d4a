"""Every model is checked before it measures anything: right ones pass, wrong ones are seen, only what is right runs."""

import copy
import logging

import numpy as np
import pytest
import torch
from support import CAUSAL, CORE, LABELS, MASKED, prompts_for, tiny_model, tiny_tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from negcore.errors import ModelError
from negcore.measure.estimators import estimate
from negcore.measure.loading import as_language_model, checked, settled
from negcore.measure.model_check import check_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import sweep
from negcore.model.check import COMPARED, Comparison, ModelCheck


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CORE)
def test_every_known_family_passes_in_every_number_type(family, dtype):
    check = tiny_model(family, dtype=dtype).check
    assert check.failed == ()
    compared = [one.name for one in check.comparisons if one.applies]
    assert compared == [name for name in COMPARED if family not in MASKED or name not in ("prefix", "virtual")]


@pytest.mark.parametrize("family", CAUSAL)
def test_every_gated_family_passes_at_the_other_sites(family):
    lm = tiny_model(family)
    for site in ("act", "gate") if lm.arch.gated else ():
        assert tiny_model(family, site=site).check.failed == ()


def scaled_logits(lm, monkeypatch):
    def scaled(_, args, output):
        output.logits = output.logits * 0.3
        return output

    lm.model.register_forward_hook(scaled)


def dropped_attention_bias(lm, monkeypatch):
    """The untouched model's attention prefers near tokens; ours is never told."""
    from transformers.models.llama import modeling_llama

    untouched = modeling_llama.eager_attention_forward

    def biased(module, query, key, value, attention_mask, **kwargs):
        places = torch.arange(key.shape[2], dtype=query.dtype)
        return untouched(module, query, key, value, attention_mask + places, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", biased)


def reads_across_tokens(lm, monkeypatch):
    """A feed-forward that mixes a token with the one before."""

    def mixed(_, args):
        return (args[0] + nn.functional.pad(args[0][:, :-1], (0, 0, 1, 0)),)

    lm.layers[1].mlp.register_forward_pre_hook(mixed)


def rows_change_each_other(lm, monkeypatch):
    def centred(_, args, output):
        return output + 0.3 * (output - output.mean(0, keepdim=True))

    lm.layers[1].mlp.register_forward_hook(centred)


def dropout_is_left_on(lm, monkeypatch):
    lm.layers[1].mlp.register_forward_hook(lambda _, args, output: nn.functional.dropout(output, 0.1, training=True))


def first_tokens_of_a_pass_are_special(lm, monkeypatch):
    def marked(_, args, output):
        return torch.cat([output[:, :2] + 0.5, output[:, 2:]], 1) if output.shape[1] > 2 else output

    lm.layers[0].mlp.register_forward_hook(marked)


def later_layer_reads_an_earlier_one(lm, monkeypatch):
    """State that goes around the residual stream: rows that join between the two layers are not in it."""
    kept = {}
    lm.layers[0].register_forward_hook(lambda _, args, output: kept.update(stream=output))
    lm.layers[2].mlp.register_forward_pre_hook(lambda _, args: (args[0] + kept["stream"],))


class NoBatchedBackward(torch.autograd.Function):
    """An operation whose backward pass cannot run for several labels at once."""

    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float(gradient.abs().max() > 0)


def backward_cannot_be_batched(lm, monkeypatch):
    lm.layers[1].mlp.register_forward_hook(lambda _, args, output: NoBatchedBackward.apply(output))


def wrong_gradient_of_a_single_token(lm, monkeypatch):
    def detached(_, args, output):
        return output.detach() if output.shape[1] == 1 else output

    lm.layers[1].mlp.register_forward_hook(detached)


def wrong_gradient_with_our_attention(lm, monkeypatch):
    def detached(_, args, output):
        return output.detach() if lm.takes_attention else output

    lm.layers[1].mlp.register_forward_hook(detached)


FAULTS = {
    scaled_logits: set(),  # no fault: every way asks the model's own head
    dropped_attention_bias: {"logits", "neurgrad"},
    reads_across_tokens: {"logits", "neurgrad", "prefix", "virtual"},
    rows_change_each_other: {"batch", "prefix", "virtual"},
    dropout_is_left_on: {"logits", "neurgrad", "batch", "prefix", "virtual"},
    first_tokens_of_a_pass_are_special: {"prefix", "virtual"},
    later_layer_reads_an_earlier_one: {"virtual"},
    backward_cannot_be_batched: {"neurgrad"},
    wrong_gradient_of_a_single_token: {"neurgrad"},
    wrong_gradient_with_our_attention: {"neurgrad"},
}


def faulty(fault, monkeypatch, dtype=torch.float32):
    lm = tiny_model("llama", dtype=dtype)
    fault(lm, monkeypatch)
    return lm


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_the_comparisons_that_it_touches(fault, monkeypatch):
    assert {one.name for one in check_model(faulty(fault, monkeypatch)).failed} == FAULTS[fault]


@pytest.mark.parametrize("fault", [rows_change_each_other, dropout_is_left_on])
def test_a_model_without_a_right_way_is_refused_in_one_line(fault, monkeypatch):
    with pytest.raises(ModelError, match="model 'tiny-llama' would be measured wrongly.*failed") as caught:
        checked(faulty(fault, monkeypatch))
    assert "\n" not in str(caught.value)


def test_one_number_of_the_head_that_is_none_refuses_the_model():
    """The token, an end of text, is none of those that are compared, but its logit is in every probability."""
    lm = tiny_model("llama", dtype=torch.float32)
    lm.model.lm_head.weight[lm.tokenizer.eos_token_id, 0] = torch.nan
    with pytest.raises(ModelError, match="against the untouched model: failed .numbers that are not finite"):
        checked(lm)


def test_a_models_own_attention_takes_the_place_of_ours_where_that_is_wrong(monkeypatch, caplog):
    lm = checked(faulty(dropped_attention_bias, monkeypatch, torch.float64))
    assert lm.way == "whole" and not lm.takes_attention and lm.check["logits"].passed
    assert all(word.endswith("the model's own attention runs, which is slower") for word in caplog.messages)
    result, tokens = neurgrad(lm, prompts_for(lm)[:1], LABELS), lm.tokenizer(prompts_for(lm)[0])["input_ids"]
    with torch.no_grad():
        probs_V = lm.model(input_ids=torch.tensor([tokens])).logits[0, -1].softmax(0)
    np.testing.assert_allclose(result.probs_PO[0], probs_V[result.label_ids_PO[0]], rtol=1e-6)


def test_wrong_gradients_are_refused_and_the_rest_is_measured(monkeypatch):
    lm = checked(faulty(wrong_gradient_with_our_attention, monkeypatch))
    assert lm.way == "virtual"
    for measure in (
        lambda: neurgrad(lm, prompts_for(lm), LABELS),
        lambda: estimate(lm, prompts_for(lm), LABELS[:1], estimator="gradient"),
        lambda: estimate(lm, prompts_for(lm)[:1], LABELS[:1], estimator="integrated_gradients"),
    ):
        with pytest.raises(ModelError, match="NeurGrad against plain autograd: failed"):
            measure()
    assert sweep(lm, prompts_for(lm)[:1], " A", neurons=1, method="hooks").negs_PK.any()


def test_a_wrong_virtual_sweep_falls_back_to_hooks_with_a_word(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        lm = checked(faulty(later_layer_reads_an_earlier_one, monkeypatch, torch.float64))
    (word,) = caplog.messages
    assert "virtual sweep against hooks: failed" in word
    assert word.endswith("single neurons are shifted by hooks, which is slower")
    assert (lm.way, lm.check["virtual"].verdict) == ("cached", "failed")
    prompts = prompts_for(lm)[:3]
    by_hooks = sweep(lm, prompts, " A", neurons=2, shifts=[-1, 1], method="hooks")
    np.testing.assert_array_equal(sweep(lm, prompts, " A", neurons=2, shifts=[-1, 1]).probs_PKS, by_hooks.probs_PKS)
    with pytest.raises(ModelError, match="virtual sweep against hooks: failed"):
        sweep(lm, prompts, " A", neurons=2, method="virtual")


@pytest.mark.parametrize(
    "fault",
    [
        reads_across_tokens,
        first_tokens_of_a_pass_are_special,
        backward_cannot_be_batched,
        wrong_gradient_of_a_single_token,
    ],
)
def test_whole_prompts_take_the_place_of_wrong_shortcuts_with_a_word(fault, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        lm = checked(faulty(fault, monkeypatch, torch.float64))
    assert len(caplog.messages) == len(FAULTS[fault])
    assert all(word.endswith("every prompt runs whole, which is slower") for word in caplog.messages)
    assert lm.way == "whole"
    assert lm.check["logits"].passed and lm.check["neurgrad"].passed and lm.check["batch"].passed
    together = neurgrad(lm, prompts_for(lm), LABELS)
    for row, prompt in enumerate(prompts_for(lm)):
        with torch.no_grad():
            whole_V = lm.model(input_ids=torch.tensor([lm.tokenizer(prompt)["input_ids"]])).logits[0, -1]
        np.testing.assert_allclose(together.probs_PO[row], whole_V.softmax(0)[together.label_ids_PO[row]], rtol=1e-5)
    slopes = sweep(lm, prompts_for(lm)[:1], " A", neurons=[(0, 3), (2, 5)], shifts=[-0.02, 0.02]).negs_PK[0]
    np.testing.assert_allclose(together.negs_POLN[0, 0][[0, 2], [3, 5]], slopes, rtol=0.02)


def test_a_wrong_prefix_is_never_used_even_where_whole_prompts_have_a_fault_of_their_own(monkeypatch):
    lm = tiny_model("llama")

    def marked(_, args, output):
        return torch.cat([output[:, :2] + 0.5, output[:, 2:]], 1) if output.shape[1] >= 7 else output

    def detached(_, args, output):
        return output.detach() if lm.takes_attention and output.shape[1] > 7 else output

    lm.model.model.layers[0].mlp.register_forward_hook(marked)
    lm.model.model.layers[1].mlp.register_forward_hook(detached)
    assert [one.name for one in check_model(lm).failed] == ["prefix"]
    whole = checked(lm)
    assert (whole.way, [one.name for one in whole.check.failed]) == ("whole", ["neurgrad", "prefix"])
    with pytest.raises(ModelError, match="NeurGrad against plain autograd: failed"):
        neurgrad(whole, prompts_for(whole), LABELS)


def without(*names):
    """The tiny tokenizer, which does not know some of its tokens as what they are."""
    kept = {name: token for name, token in tiny_tokenizer().special_tokens_map.items() if name not in names}
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, **kept)


@pytest.mark.parametrize("family", MASKED)
def test_a_masked_model_needs_no_padding_token_and_a_mask_token(family):
    lm = tiny_model(family)
    bare = as_language_model(copy.deepcopy(lm.model), without("pad_token"), name="bare")
    np.testing.assert_array_equal(*(neurgrad(one, prompts_for(lm), LABELS).probs_PO for one in (bare, lm)))
    with pytest.raises(ModelError, match="model 'bare': it predicts masks, and its tokenizer has no mask token"):
        as_language_model(copy.deepcopy(lm.model), without("mask_token"), name="bare")


def test_a_refused_model_is_not_said_to_run_another_way(monkeypatch):
    assert settled(faulty(dropout_is_left_on, monkeypatch)).check.replaced == ()


def test_a_check_tells_its_outcome_in_a_line_a_comparison():
    lines = [
        Comparison("logits", 1e-4, 2e-6),
        Comparison("batch", 1e-4, 0.5),
        Comparison("prefix", 1e-4, note="a masked model sees both sides of its mask", applies=False),
        Comparison("virtual", 1e-3, note="TypeError: no"),
    ]
    assert [str(line) for line in lines] == [
        "last-token logits against the untouched model: passed (difference 2.0e-06, tolerance 1e-04)",
        "a batch of two prompts against one prompt: failed (difference 5.0e-01, tolerance 1e-04)",
        "a shared prefix against none: absent (a masked model sees both sides of its mask)",
        "virtual sweep against hooks: failed (TypeError: no)",
    ]


def test_a_half_type_is_told_to_try_float32():
    failed = ModelCheck((Comparison("logits", 0.2, 0.7),))
    with pytest.raises(ModelError, match="rounding alone can do that: load it as float32"):
        failed.require("m", ["logits"])


def test_an_error_in_a_half_type_is_not_blamed_on_rounding():
    failed = ModelCheck((Comparison("logits", 0.2, note="TypeError: no"),))
    with pytest.raises(ModelError, match="TypeError: no.$"):
        failed.require("m", ["logits"])


def test_float64_models_that_round_to_float32_say_so():
    assert any("round to float32" in note for note in tiny_model("llama").check.notes)
    assert tiny_model("gpt2").check.notes == ()
    assert tiny_model("llama", dtype=torch.float32).check.notes == ()


def test_a_check_is_the_same_after_json():
    check = tiny_model("bert").check
    assert ModelCheck.of_json(check.as_json()) == check
