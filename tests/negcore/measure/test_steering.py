"""Steering against a plain loop: whole texts, no cache, hooks of its own."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import CAUSAL, LABELS, PROMPTS, tiny_model

from negcore.errors import ModelError, NegError, PromptError
from negcore.measure.interventions import shift_together
from negcore.measure.steering import Answer, joint_shift, steer
from negcore.model.encoding import encode, encode_prompts
from negcore.model.language_model import LanguageModel

SHIFTS = [(0, 3, 1.5), (1, 7, -2.0), (1, 0, 0.75), (2, 23, 3.0)]
OTHERS = ["bloom", "gpt_neo", "falcon", "gpt_bigcode", "qwen3_5_text", "lfm2", "gemma3n_text", "biogpt"]
"""Families that run whole prompts, or whose layers are of other kinds."""
TOKENS = 6


def plain_answer(lm: LanguageModel, tokens: list[int], shifts: Any, n_tokens: int) -> tuple[list[int], list[float]]:
    """Write an answer with everything run anew for every token: a pass to look at the neurons, a pass to shift them."""
    first, ids, probs = len(tokens) - 1, [], []
    while len(ids) < n_tokens:
        text = torch.tensor([[*tokens, *ids]])
        seen = run_with_hooks(lm, text, lambda layer, values: None)[1]
        steps = {layer: torch.zeros_like(values) for layer, values in seen.items()}
        for layer, neuron, size in shifts:
            at = values_of(lm, seen[layer])[:, neuron]
            values_of(lm, steps[layer])[first:, neuron] = size * torch.where(at > 0, 1.0, -1.0)[first:].double()
        probs_V = run_with_hooks(lm, text, lambda layer, values, s=steps: values + s[layer])[0].softmax(0)
        if int(probs_V.argmax()) == lm.tokenizer.eos_token_id:
            break
        ids.append(int(probs_V.argmax()))
        probs.append(float(probs_V.max()))
    return ids, probs


def run_with_hooks(lm: LanguageModel, text: Any, change: Any) -> tuple[Any, dict[int, Any]]:
    seen, handles = {}, []
    for layer in range(lm.n_layers):

        def look(module: Any, args: Any, output: Any = None, layer: int = layer) -> Any:
            values = args[0] if output is None else output
            seen[layer] = values.clone()
            changed = change(layer, values)
            return None if changed is None else (changed,) if output is None else changed

        module = lm.site_module(layer)
        handles.append(
            module.register_forward_pre_hook(look) if lm.site == "act" else module.register_forward_hook(look)
        )
    logits_V = lm.model(input_ids=text, use_cache=False).logits[0, -1].detach()
    for handle in handles:
        handle.remove()
    return logits_V, seen


def values_of(lm: LanguageModel, values: Any) -> Any:
    """The neurons of every token of one row: behind the gate where a projection is fused."""
    return values.view(-1, values.shape[-1])[:, values.shape[-1] - lm.layer_width :]


@pytest.mark.parametrize("family", [*CAUSAL, *OTHERS])
def test_an_answer_is_that_of_a_plain_loop_without_a_cache(family: str) -> None:
    lm = tiny_model(family)
    for prompt, answer in zip(PROMPTS[:3], steer(lm, PROMPTS[:3], SHIFTS, max_tokens=TOKENS), strict=True):
        (tokens,) = encode_prompts(lm.card, [prompt])
        for found, shifts in ((answer.before, []), (answer.after, SHIFTS)):
            ids, probs = plain_answer(lm, tokens, shifts, TOKENS)
            assert found.ids == ids
            np.testing.assert_allclose(found.probs, probs, rtol=1e-6 if family in OTHERS else 1e-9)


def test_the_shifts_change_an_answer() -> None:
    assert any(one.before.ids != one.after.ids for one in steer(tiny_model("llama"), PROMPTS, SHIFTS))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "bloom"])
def test_a_shift_of_zero_changes_nothing_exactly(family: str) -> None:
    nothing = [(layer, neuron, 0.0) for layer, neuron, _ in SHIFTS]
    for _, before, after in steer(tiny_model(family), PROMPTS[:3], nothing, max_tokens=TOKENS):
        assert before == after  # ids, and probabilities to the last bit


@pytest.mark.parametrize("site", ["up", "act", "gate"])
def test_every_site_can_be_steered(site: str) -> None:
    lm = tiny_model("llama", site=site)
    (answer,) = steer(lm, PROMPTS[:1], SHIFTS, max_tokens=TOKENS)
    (tokens,) = encode_prompts(lm.card, PROMPTS[:1])
    assert answer.after.ids == plain_answer(lm, tokens, SHIFTS, TOKENS)[0]


def test_the_first_token_is_the_one_that_interventions_predict() -> None:
    lm = tiny_model("llama")
    (answer,) = steer(lm, PROMPTS[:1], SHIFTS, max_tokens=1)
    encoded = encode(lm.card, PROMPTS[:1], LABELS)
    encoded = replace(encoded, label_ids_PO=np.array([answer.after.ids]))
    (shifted,) = shift_together(lm, encoded, lambda prompt: [joint_shift(lm, SHIFTS)])
    np.testing.assert_allclose(shifted.values_RO[0], answer.after.probs, rtol=1e-9)


def test_a_prompt_is_answered_alike_alone_and_among_others() -> None:
    lm = tiny_model("gemma2")
    together = steer(lm, PROMPTS, SHIFTS, max_tokens=TOKENS)
    assert together == [one for prompt in PROMPTS for one in steer(lm, [prompt], SHIFTS, max_tokens=TOKENS)]


def test_a_model_ends_its_answer_and_is_not_asked_for_more() -> None:
    lm = tiny_model("llama")
    (long,) = steer(lm, PROMPTS[:1], SHIFTS, max_tokens=TOKENS)
    cut = next(n for n, token in enumerate(long.before.ids) if n and token != long.before.ids[0])
    lm.model.generation_config.eos_token_id = [399, long.before.ids[cut]]
    (answer,) = steer(lm, PROMPTS[:1], SHIFTS, max_tokens=TOKENS)
    assert answer.before == Answer(answer.before.text, long.before.ids[:cut], long.before.probs[:cut], is_ended=True)
    assert not long.before.is_ended


def test_no_hook_stays_behind_and_no_weight_changes() -> None:
    lm = tiny_model("gpt2")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    steer(lm, PROMPTS[:2], SHIFTS, max_tokens=3)
    with pytest.raises(NegError, match="not finite"):
        steer(lm, PROMPTS[:2], [(0, 1, 1e308)], max_tokens=3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


def test_the_text_of_an_answer_keeps_the_space_in_front_of_it() -> None:
    lm = tiny_model("llama")
    (answer,) = steer(lm, PROMPTS[:1], SHIFTS, max_tokens=TOKENS)
    assert answer.before.text == lm.tokenizer.decode(answer.before.ids)


@pytest.mark.parametrize(
    ("shifts", "options", "message"),
    [
        ([], {}, "no shifts were given"),
        ([(3, 0, 1.0)], {}, "neuron 0 of layer 3 does not exist"),
        ([(0, 24, 1.0)], {}, "neuron 24 of layer 0 does not exist"),
        ([(0, -1, 1.0)], {}, "neuron -1 of layer 0 does not exist"),
        ([(0, 1, 1.0), (0, 1, 2.0)], {}, "given twice"),
        ([(0, 1, float("nan"))], {}, "a shift of nan cannot be made"),
        ([(0, 1)], {}, r"no list of \(layer, neuron, size\)"),
        ([("a", 1, 1.0)], {}, "no list of"),
        ([(0.5, 1, 1.0)], {}, "no list of"),
        (SHIFTS, {"max_tokens": 0}, "leaves no answer"),
        (SHIFTS, {"max_tokens": 127}, r"longer than the context of tiny-llama \(128\)"),
    ],
)
def test_what_cannot_be_shifted_is_named(shifts: Any, options: Any, message: str) -> None:
    with pytest.raises(NegError, match=message):
        steer(tiny_model("llama"), PROMPTS[:1], shifts, **options)


def test_an_answer_may_fill_the_context_to_its_last_token() -> None:
    lm = tiny_model("gpt2")  # learned positions: one more would have none
    (tokens,) = encode_prompts(lm.card, PROMPTS[:1])
    room = lm.card.context_tokens - len(tokens) + 1
    lm.tokenizer.eos_token_id, ended = None, lm.tokenizer.eos_token_id
    try:
        lm.model.generation_config.eos_token_id = None
        (answer,) = steer(lm, PROMPTS[:1], SHIFTS, max_tokens=room)
    finally:
        lm.tokenizer.eos_token_id = ended
    assert len(answer.after.ids) == room
    with pytest.raises(PromptError, match="shorten it"):
        steer(lm, PROMPTS[:1], SHIFTS, max_tokens=room + 1)


def test_a_masked_model_writes_no_answers() -> None:
    with pytest.raises(ModelError, match="fills in masks"):
        steer(tiny_model("bert"), ["<mask>"], SHIFTS)
