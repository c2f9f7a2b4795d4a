"""Every family: the check at load in both exact number types, its places without weights, and the search for them."""

import re
from functools import cache

import pytest
import torch
import transformers
from support import CONFIGS, LABELS, prompts_for, tiny_config, tiny_model, tiny_tokenizer

from negcore.errors import ModelError, NegError
from negcore.measure.estimators import estimate
from negcore.measure.loading import as_language_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import sweep
from negcore.model import discovery
from negcore.model.architectures import ARCHITECTURES
from negcore.model.skeleton import auto_class

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}
SEARCHED = {
    "modernbert-decoder": {"local_attention": 8},
    "granite_swa": {},
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
    },
    "jais2": {},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "head_dim": 4},
    "granitemoehybrid": {
        **MAMBA,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 4,
        "chunk_size": 8,
        "head_dim": 4,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_num_shared_experts": 1},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 4},
    "recurrent_gemma": {
        "lru_width": 16,
        "attention_window_size": 7,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
}
"""Types in no row, whose feed-forward layers are found."""

REFUSED = {
    "t5": ({}, "it is an encoder-decoder"),
    "jetmoe": ({}, "it holds experts, whose weights are not stacked"),
    "mamba": ({}, "it has no feed-forward layers"),
    "albert": ({}, "runs more than once in a pass"),
    "vit": ({}, "transformers knows no language model of this type"),
}


@cache
def searched(family):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZE | SEARCHED[family])
    model = auto_class(config, masked=False).from_config(config).to(torch.float64)
    return as_language_model(model, tiny_tokenizer(), name=f"tiny-{family}")


def test_every_row_has_a_tiny_model():
    assert set(CONFIGS) == set(ARCHITECTURES)
    assert len(ARCHITECTURES) >= 60


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_passes_the_check_in_both_exact_number_types(family):
    for dtype in (torch.float64, torch.float32):
        lm = tiny_model(family, dtype=dtype)
        check = lm.check
        assert check.failed == (), dtype
        assert check["virtual"].applies == (lm.arch.way == "virtual" and not lm.arch.masked)
        assert check["prefix"].applies == (not lm.arch.whole)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_shape_of_a_model_is_known_without_its_weights(family):
    lm = tiny_model(family)
    assert (lm.card.n_layers, lm.card.layer_width) == (lm.n_layers, lm.layer_width)
    assert (lm.card.layer_shapes, lm.card.active_width) == (lm.layer_shapes, lm.active_width)
    if not lm.has_experts:
        assert [len(lm.down_rows(layer)) for layer in range(lm.n_layers)] == [lm.layer_width] * lm.n_layers


# What the search does not find: a norm between the product and its projection, dense layers beside experts whose
# weights are not stacked, and projections that run several times.
UNSEARCHABLE = {"bitnet", "llama4_text", "gemma3n_text"}


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in UNSEARCHABLE])
def test_the_search_finds_what_the_row_says(family, monkeypatch):
    row = ARCHITECTURES[family]
    config = tiny_config(family)
    config.architectures = ["TinyForMaskedLM" if row.masked else "TinyForCausalLM"]
    monkeypatch.setattr(discovery, "ARCHITECTURES", {})
    found = discovery.find_architecture(config)
    assert found.discovered and found.masked == row.masked
    for name in ("layers", "down", "up", "gate", "fused", "post_norm", "experts", "shared"):
        assert getattr(found, name) == getattr(row, name), name


@pytest.mark.parametrize("family", SEARCHED)
def test_a_family_in_no_row_is_searched_and_passes_the_check(family):
    lm = searched(family)
    assert family not in ARCHITECTURES and lm.arch.discovered
    assert lm.check.failed == ()
    assert any("discovered" in note for note in lm.check.notes)
    negs_POLN = neurgrad(lm, prompts_for(lm)[:2], LABELS[:2]).negs_POLN
    assert (abs(negs_POLN).max(axis=(0, 1, 3)) > 0).all()


def test_layers_without_a_feed_forward_are_absent_and_the_others_keep_their_place():
    lm = searched("nemotron_h")
    assert lm.n_layers == 2 and lm.card.places == (1, 3)
    assert "its layers with neurons, numbered from 0, are layers 1, 3 of 4; the others have none" in lm.check.notes
    estimated_N = neurgrad(lm, prompts_for(lm)[:1], LABELS[:1]).negs_POLN[0, 0, 1]
    neuron = int(abs(estimated_N).argmax())
    result = sweep(lm, prompts_for(lm)[:1], LABELS[0], neurons=[(1, neuron)], shifts=[-1e-3, 1e-3])
    assert result.negs_PK[0, 0] == pytest.approx(estimated_N[neuron], rel=1e-2)


def test_experts_of_a_family_in_no_row_are_found_beside_dense_layers_and_shared_experts():
    places = {family: searched(family).arch for family in ("ernie4_5_moe", "granitemoe", "hunyuan_v1_moe")}
    assert {family: (row.experts, row.shared, row.down) for family, row in places.items()} == {
        "ernie4_5_moe": ("mlp.experts", "mlp.shared_experts", "mlp.down_proj"),
        "granitemoe": ("block_sparse_moe.experts", None, "block_sparse_moe.experts.down_proj"),
        "hunyuan_v1_moe": ("mlp.experts", None, "mlp.shared_mlp.down_proj"),
    }
    assert all(searched(family).way == "virtual" for family in places)


def test_a_family_in_no_row_is_given_the_fastest_way_that_is_right():
    assert {family: searched(family).way for family in ("jais2", "falcon_h1")} == {
        "jais2": "virtual",
        "falcon_h1": "whole",
    }


def test_layers_of_experts_that_are_not_stacked_are_absent_and_dense_ones_keep_their_place():
    assert tiny_model("llama4_text").card.places == (0, 2)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_measured_is_refused_in_one_line(family):
    settings, reason = REFUSED[family]
    config = transformers.AutoConfig.for_model(family, **SIZE | settings)
    with pytest.raises(ModelError, match=re.escape(f"architecture {family!r} is in no row of ")) as error:
        discovery.find_architecture(config)
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["gemma3n_text", "gpt_bigcode"])
def test_log_probability_increase_is_refused_where_there_is_no_single_stream(family):
    lm = tiny_model(family)
    with pytest.raises(NegError, match=f"log-probability increase does not exist for tiny-{family}"):
        estimate(lm, prompts_for(lm)[:1], LABELS[:1], estimator="log_probability_increase", neurons=[(0, 1)])


def test_layers_of_different_width_are_refused():
    config = tiny_config("gemma3n_text", intermediate_size=[24, 24, 32])
    model = transformers.AutoModelForCausalLM.from_config(config)
    lm = as_language_model(model, tiny_tokenizer(), name="uneven")
    with pytest.raises(ModelError, match="its layers have 24 to 32 neurons"):
        _ = lm.card.layer_width
