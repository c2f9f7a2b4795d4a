import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import LABELS, PROMPTS, save_tiny_model

from negcore.errors import ModelError
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import neurgrad
from negcore.model.language_model import describe_model, model_name

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("base") / "tiny")


def trained(base, directory, **settings):
    """A folder with an adapter whose weights are random, as training leaves them."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, **settings))
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.3)
    wrapped.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return trained(base, tmp_path_factory.mktemp("adapter") / "lora", target_modules=["q_proj", "down_proj"])


def test_an_adapter_is_merged_as_by_hand(base, adapter, tmp_path):
    weights, changes = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in list(weights):
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in changes:
            weights[name] += 6 / 2 * changes[f"{path}.lora_B.weight"] @ changes[f"{path}.lora_A.weight"]
    by_hand = shutil.copytree(base, tmp_path / "by-hand")
    save_file(weights, by_hand / "model.safetensors", metadata={"format": "pt"})
    lm, expected, plain = (load_model(str(ref)) for ref in (f"{base}+{adapter}", by_hand, base))
    ours, theirs, other = (neurgrad(one, PROMPTS, LABELS) for one in (lm, expected, plain))
    np.testing.assert_allclose(ours.negs_POLN, theirs.negs_POLN, rtol=1e-4, atol=1e-8)
    assert np.abs(ours.probs_PO - other.probs_PO).max() > 1e-4
    torch.testing.assert_close(lm.down_rows(0), expected.down_rows(0))
    assert set(lm.model.state_dict()) == set(weights)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj", "embed_tokens"], "use_rslora": True},
    ],
    ids=["dora", "own head", "embeddings"],
)
def test_adapters_of_other_kinds_are_merged_as_peft_runs_them(base, tmp_path, settings):
    folder = trained(base, tmp_path / "adapter", **settings)
    lm = load_model(f"{base}+{folder}")
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_identity_names_the_adapter_by_its_content(base, adapter, tmp_path):
    plain, card = describe_model(str(base)), describe_model(f"{base}+{adapter}")
    assert card.revision.startswith(f"{plain.revision}+xxh3:") and card.name == f"{base}+{adapter}" == card.ref
    copied = shutil.copytree(adapter, tmp_path / "copy")
    (copied / "README.md").write_text("not read")
    assert describe_model(f"{base}+{copied}").revision == card.revision
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    assert describe_model(f"{base}+{copied}").revision != card.revision
    with pytest.raises(ModelError, match="its adapter's files changed"):
        shutil.rmtree(copied / "..", ignore_errors=True) or shutil.copytree(adapter, copied)
        card = describe_model(f"{base}+{copied}")
        (copied / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
        load_model(card)


def test_names_of_models_keep_their_adapter_and_lose_the_revision(base, adapter):
    assert model_name(f"some/model@main+{adapter}") == f"some/model+{adapter}"
    assert model_name(f"{base}+{adapter}") == f"{base}+{adapter}"


def of_another_width(base, tmp_path):
    config = transformers.AutoConfig.from_pretrained(base, intermediate_size=32)
    wide = shutil.copytree(base, tmp_path / "wide")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(wide)
    return trained(wide, tmp_path / "adapter", target_modules=["down_proj"])


def of_more_layers(base, tmp_path):
    config = transformers.AutoConfig.from_pretrained(base, num_hidden_layers=4)
    deep = shutil.copytree(base, tmp_path / "deep")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(deep)
    return trained(deep, tmp_path / "adapter", target_modules=["down_proj"])


def of_another_family(base, tmp_path):
    gpt2 = save_tiny_model("gpt2", tmp_path / "gpt2")
    return trained(gpt2, tmp_path / "adapter", target_modules=["c_proj"])


def cut_short(base, tmp_path):
    folder = trained(base, tmp_path / "adapter", target_modules=["down_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[min(weights)]
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def pickled(base, tmp_path):
    folder = trained(base, tmp_path / "adapter", target_modules=["down_proj"])
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder


def without_weights(base, tmp_path):
    folder = trained(base, tmp_path / "adapter", target_modules=["down_proj"])
    (folder / "adapter_model.safetensors").unlink()
    return folder


def of_prompts(base, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (of_another_width, r"does not fit: its weight .*down_proj.lora_A.weight is 2 x 32, and 2 x 24 in this model"),
        (of_more_layers, r"does not fit: the model has no place for its weight .*layers.3.mlp.down_proj"),
        (of_another_family, "c_proj"),
        (cut_short, r"does not fit, or is not whole: it lacks the weight .*lora_A"),
        (pickled, "a format that can hold code and is never read"),
        (without_weights, "adapter_model.safetensors.*is no such file"),
        (of_prompts, "PROMPT_TUNING have no weights that can be merged"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_any_weight_is_read(base, tmp_path, make, says):
    with pytest.raises(ModelError, match=f"(?s)its adapter: .*{says}"):
        describe_model(f"{base}+{make(base, tmp_path)}")


def test_without_peft_one_line_names_it_with_its_command(base, adapter, monkeypatch):
    monkeypatch.setattr("negcore.model.adapters.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"peft, which is not installed: pip install peft$"):
        describe_model(f"{base}+{adapter}")


def test_a_folder_that_is_not_there_is_named(base):
    with pytest.raises(ModelError, match="'nowhere' is no folder of an adapter"):
        describe_model(f"{base}+nowhere")
