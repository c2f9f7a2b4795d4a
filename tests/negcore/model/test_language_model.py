import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import CORE, LABELS, PROMPTS, save_tiny_model, tiny_config, tiny_model, tiny_tokenizer
from torch import nn

from negcore.errors import ModelError
from negcore.measure.loading import as_language_model, load_model
from negcore.measure.neurgrad import neurgrad
from negcore.model.language_model import describe_model

UP_PROJECTION = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


def test_a_local_directory_loads_with_its_shape(llama):
    lm = load_model(str(llama))
    assert (lm.n_layers, lm.layer_width, lm.site, lm.dtype) == (3, 24, "up", "float32")
    assert lm.revision.startswith("xxh3:")
    assert torch.equal(lm.model.lm_head.weight, tiny_model("llama", dtype=torch.float32).model.lm_head.weight)


@pytest.mark.parametrize("family", CORE)
def test_a_card_knows_the_shape_of_every_family(family, tmp_path):
    save_tiny_model(family, tmp_path)
    card, lm = describe_model(str(tmp_path)), tiny_model(family)
    assert (card.n_layers, card.layer_width) == (lm.n_layers, lm.layer_width) == (3, 24)


def test_changing_one_weight_changes_the_revision(llama, tmp_path):
    save_tiny_model("llama", tmp_path)
    assert describe_model(str(tmp_path)).revision == describe_model(str(llama)).revision
    lm = load_model(str(tmp_path))
    lm.model.lm_head.weight[0, 0] += 1
    lm.model.save_pretrained(tmp_path)
    assert describe_model(str(tmp_path)).revision != describe_model(str(llama)).revision


@pytest.mark.parametrize(("family", "expected"), [("llama", "up"), ("phi3", "up"), ("gpt2", "act"), ("bert", "act")])
def test_the_paper_site_is_up_in_gated_models_and_act_in_others(family, expected):
    assert tiny_model(family).site == expected


def test_a_site_that_the_model_lacks_is_refused_with_those_it_has():
    with pytest.raises(ModelError, match=r"site 'gate' does not exist in this model; choose one of act, paper"):
        tiny_model("gpt2", site="gate")


@pytest.mark.parametrize("kind", ["LlamaModel", "BertModel", "LlamaForSequenceClassification"])
def test_a_model_without_a_language_head_is_refused_in_one_line(kind):
    config = tiny_config("bert" if "Bert" in kind else "llama")
    with pytest.raises(ModelError, match=f"model 'mine' is a {kind}; give a model .* with its language head"):
        as_language_model(getattr(transformers, kind)(config), tiny_tokenizer(), name="mine")


@pytest.mark.parametrize("what", ["gpt2", None, nn.Linear(2, 2)], ids=str)
def test_what_is_no_model_is_refused_in_one_line(what):
    with pytest.raises(ModelError, match=f"is a {type(what).__name__}; give a model of transformers"):
        as_language_model(what, tiny_tokenizer(), name="mine")


def test_a_causal_model_of_a_masked_type_is_refused():
    config = tiny_config("roberta", is_decoder=True)
    with pytest.raises(ModelError, match="is_decoder, so that it predicts next tokens, and .* 'roberta' are measured"):
        as_language_model(transformers.RobertaForCausalLM(config), tiny_tokenizer(), name="mine")


def test_a_model_in_memory_predicts_what_its_class_does():
    settings = tiny_config("roberta").to_dict() | {"model_type": "data2vec-text"}
    model = transformers.Data2VecTextForMaskedLM(transformers.Data2VecTextConfig(**settings))
    assert as_language_model(model, tiny_tokenizer(), name="mine").arch.masked


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_whose_down_projection_is_wrapped_is_not_left_out(layer):
    model = transformers.LlamaForCausalLM(tiny_config("llama"))
    mlp = model.model.layers[layer].mlp
    mlp.down_proj = nn.Sequential(mlp.down_proj)
    with pytest.raises(ModelError, match=r"down projection 'mlp.down_proj' of a layer is a Sequential; merge"):
        as_language_model(model, tiny_tokenizer(), name="mine")


@pytest.mark.parametrize(
    "asked",
    [{"attn_implementation": "flash_attention_2"}, {"return_dict": False}, {"output_attentions": True}],
    ids=str,
)
def test_how_a_configuration_wants_a_model_to_run_changes_no_number(asked, llama, tmp_path):
    directory = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | asked))
    plain, other = (neurgrad(load_model(str(one)), PROMPTS, LABELS) for one in (llama, directory))
    np.testing.assert_array_equal(other.negs_POLN, plain.negs_POLN)


def test_an_unknown_architecture_that_the_search_refuses_is_refused_in_one_line(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    tiny_tokenizer().save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"architecture 't5' is in no row of .* it is an encoder-decoder") as error:
        describe_model(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ref", ["./nowhere", "/nowhere/model", "nowhere.gguf", ""])
def test_a_missing_local_model_is_refused_in_one_line(ref):
    with pytest.raises(ModelError, match="no such") as error:
        describe_model(ref)
    assert "\n" not in str(error.value)


def test_a_model_without_network_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set, and model 'some-org/some-model' is not") as error:
        describe_model("some-org/some-model")
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(llama, tmp_path):
    save_tiny_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_model("llama").model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"its weights in pytorch_model.bin, a format that can hold code and is never"):
        describe_model(str(tmp_path))


def resaved(directory, change):
    """A model directory whose weights were changed behind its configuration's back."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return str(directory)


def test_missing_weights_are_never_made_up(tmp_path):
    lacking = resaved(save_tiny_model("llama", tmp_path), lambda weights: weights.pop(UP_PROJECTION))
    with pytest.raises(ModelError, match=rf"its files lack the weights {UP_PROJECTION}: fetch or save it again"):
        load_model(lacking)


def test_weights_of_another_shape_are_refused_with_both_shapes(tmp_path):
    def cut(weights):
        weights[UP_PROJECTION] = weights[UP_PROJECTION][:12].clone()

    message = f"do not fit its configuration: {UP_PROJECTION} is 12 x 16 in its files, 24 x 16 by config.json$"
    with pytest.raises(ModelError, match=message):
        load_model(resaved(save_tiny_model("llama", tmp_path), cut))


@pytest.mark.parametrize("family", CORE)
def test_every_family_finds_all_its_weights_in_what_it_saved(family, tmp_path):
    saved, loaded = tiny_model(family, dtype=torch.float32), load_model(str(save_tiny_model(family, tmp_path)))
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in saved.model.state_dict().items())


def test_an_unknown_dtype_is_refused_with_the_known_ones(llama):
    with pytest.raises(ModelError, match="dtype 'int4' is not known; choose one of float32"):
        load_model(str(llama), dtype="int4")


def test_the_context_of_a_model_is_the_smaller_of_two_limits():
    assert tiny_model("llama").card.context_tokens == 128
    assert tiny_model("roberta").card.context_tokens == 128


def test_a_model_loads_in_a_process_that_has_done_nothing_else(llama):
    code = f"import negcore; print(negcore.load_model({str(llama)!r}).layer_width)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "24\n"


def test_a_loaded_model_and_its_card_are_described_in_one_line(llama):
    lm = load_model(str(llama))
    assert repr(lm) == (
        f"LanguageModel({llama}@{lm.revision[:13]}, llama, 3 layers x 24 neurons, site up, float32 on cpu)"
    )
    assert len(lm.revision) > 30 and "\n" not in repr(lm.card) and len(repr(lm.card)) < 600
    assert repr(tiny_model("bert")) == (
        "LanguageModel(tiny-bert@memory, bert, 3 layers x 24 neurons, site act, float64 on cpu)"
    )


def test_results_have_the_number_type_of_a_float64_model_and_float32_otherwise():
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    assert [tiny_model("llama", dtype=dtype).result_type for dtype in dtypes] == [np.float64, np.float32, np.float32]
