import numpy as np
import pytest
import torch
import transformers
from support import CAUSAL, CONFIGS, LABELS, PROMPTS, tiny_config, tiny_tokenizer
from transformers.masking_utils import chunked_causal_mask_function

from negcore.errors import ModelError
from negcore.measure.loading import as_language_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import sweep
from negcore.model.attention import attention
from negcore.model.encoding import encode
from negcore.model.masks import Layout, laid_out, mask_by_position

OPTIONS = LABELS[:3]
MIXED = [PROMPTS[0], PROMPTS[3], "B"]
STRAY = {"sliding_window": 5, "attention_chunk_size": 3, "use_sliding_window": False, "window_size": 4}
FULL = ["full_attention"] * 3
# Keys that a family does not use, says it does not use, or uses in some layers only.
VARIANTS = [
    *((family, {key: value for key, value in STRAY.items() if key not in CONFIGS[family]}) for family in CAUSAL),
    ("llama", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 5}),
    ("mistral", {"sliding_window": None}),
    ("phi3", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 5}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("gemma2", {"layer_types": FULL}),
    ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("gemma3", {"layer_types": FULL}),
    ("gpt2", {"scale_attn_weights": False}),
]


def untouched(family, change):
    """A tiny model as transformers makes it, its configuration changed."""
    torch.manual_seed(0)
    config = tiny_config(family, **change)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float64).eval()


def own_probabilities(model, prompts):
    """Probabilities of the options by the model's own forward pass, a prompt at a time."""
    encoded = encode(as_language_model(model, tiny_tokenizer(), name="m").card, prompts, OPTIONS)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in encoded.ids]
    assert min(map(len, encoded.ids)) == 1 and max(map(len, encoded.ids)) > 14  # beyond every window here
    return torch.stack(logits).double().softmax(1).numpy()[:, encoded.label_ids_PO[0]]


@pytest.mark.parametrize(("family", "change"), VARIANTS, ids=str)
def test_probabilities_are_those_of_the_untouched_model_whatever_keys_its_configuration_holds(family, change):
    model = untouched(family, change)
    expected_PO = own_probabilities(model, MIXED)
    lm = as_language_model(model, tiny_tokenizer(), name="variant")
    np.testing.assert_allclose(neurgrad(lm, MIXED, OPTIONS).probs_PO, expected_PO, rtol=1e-5)
    for method in ("virtual", "hooks"):
        swept = sweep(lm, MIXED, OPTIONS[0], neurons=1, shifts=[1.0], method=method)
        np.testing.assert_allclose(swept.base_probs_P, expected_PO[:, 0], rtol=1e-5)
    both = [sweep(lm, MIXED, " A", neurons=2, shifts=[-1.0, 2.0], method=how).probs_PKS for how in ("virtual", "hooks")]
    np.testing.assert_allclose(*both, rtol=1e-6)


@pytest.mark.parametrize("scaled", [True, False])
def test_gpt2_with_reordered_and_widened_attention_is_the_untouched_model(scaled):
    # In float64 the untouched model cannot do this: it ends in an error of its own.
    change = {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": scaled}
    model = untouched("gpt2", change).float()
    expected_PO = own_probabilities(model, MIXED)
    lm = as_language_model(model, tiny_tokenizer(), name="reordered")
    np.testing.assert_allclose(neurgrad(lm, MIXED, OPTIONS).probs_PO, expected_PO, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_with_a_graph_rounds_a_half_type_only_at_its_end(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 4, dtype=dtype) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.is_causal = True
    with torch.enable_grad():
        half, _ = attention(module, query, key, value, None)
        wide, _ = attention(module, query.float(), key.float(), value.float(), None)
    assert half.dtype == dtype and torch.equal(half, wide.to(dtype))


def test_a_window_that_a_model_uses_matters_here():
    with_window, without = (
        own_probabilities(untouched("mistral", {"sliding_window": size}), MIXED) for size in (5, None)
    )
    assert np.abs(with_window / without - 1).max() > 0.1


def test_a_rule_is_asked_about_positions_not_slots():
    # Two prompts of 3 and 5 tokens and their last tokens, which stand in slot 5 at positions 3 and 5; chunks of 2.
    queries_B1 = torch.tensor([[3], [5]])
    keys_BK = torch.tensor([[0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 4, 5]])
    used_BK = torch.tensor([[True, True, True, False, False, True], [True] * 6])
    rule = chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long))
    with laid_out(Layout(queries_B1, keys_BK, used_BK[:, None])):
        mask = mask_by_position(mask_function=rule, batch_size=2, q_length=1, kv_length=6)
    assert mask[:, 0, 0].int().tolist() == [[0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("llama", {"is_causal": False}),
    ],
    ids=str,
)
def test_attention_that_looks_ahead_is_refused_in_one_line(family, change):
    with pytest.raises(ModelError, match="attention looks at later tokens too") as caught:
        as_language_model(untouched(family, change), tiny_tokenizer(), name="both-ways")
    assert "\n" not in str(caught.value)
