"""Model directories as people bring them: each is read, or refused in one line that names the place."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import save_tiny_model, tiny_tokenizer

from negcore.errors import ModelError
from negcore.measure.loading import load_model
from negcore.model.language_model import describe_model
from negcore.model.model_files import HARMLESS, reading, unused_gguf_weights

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


def settings(file, **changes):
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))


def content(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def cut(file, n_bytes):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:n_bytes])


def link(file, target):
    def change(folder):
        (folder / file).unlink()
        (folder / file).symlink_to(target)

    return change


def fifo(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def tokenizer_part(name, value):
    return settings(TOKENIZER, **{name: value})


def weights(change):
    def changed(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


def in_shards(folder):
    """Cut the weights in two files and an index, and lose the second."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / "model-00001-of-00002.safetensors")
    shards = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {"more": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


BROKEN = {
    "text for a number": (settings(CONFIG, hidden_size="16"), r"hidden_size.*expected int, got str"),
    "no layers": (settings(CONFIG, num_hidden_layers=0), r"num_hidden_layers is 0; a whole number from 1 is needed"),
    "fewer than no layers": (settings(CONFIG, num_hidden_layers=-1), r"num_hidden_layers is -1"),
    "no heads": (settings(CONFIG, num_attention_heads=0), r"ZeroDivisionError"),
    "no positions": (settings(CONFIG, max_position_embeddings=0), r"prompts of 0 tokens: too few"),
    "unknown activation": (settings(CONFIG, hidden_act="nix"), r"its configuration: KeyError: 'nix'"),
    "a list as type": (settings(CONFIG, model_type=["llama"]), r"could not be read: TypeError"),
    "unknown number type": (settings(CONFIG, dtype="float33"), r"float33"),
    "half a configuration": (content(CONFIG, b'{"model_type":'), rf"{CONFIG}' is not JSON .*: fetch or save it again"),
    "a list as configuration": (content(CONFIG, b"[]"), rf"{CONFIG}' holds a list; an object is needed"),
    "no Unicode": (content(CONFIG, b'{"a": "\xe9"}'), rf"{CONFIG}' is not JSON .*utf-8"),
    "deep nesting": (content(CONFIG, b"[" * 100_000), rf"{CONFIG}' is not JSON .*nested too deeply"),
    "tokenizer of a later version": (
        tokenizer_part("pre_tokenizer", {"type": "New"}),
        "its tokenizer: Exception: data",
    ),
    "version": (tokenizer_part("version", "2.0"), "its tokenizer: Exception: Unknown tokenizer version '2.0'"),
    "half a tokenizer": (cut(TOKENIZER, 500), "could not be read: its tokenizer: "),
    "an empty tokenizer": (content(TOKENIZER, b"{}"), "could not be read: its tokenizer: KeyError"),
    "text as limit": (settings("tokenizer_config.json", model_max_length="128"), "model_max_length is '128' in token"),
    "limit below 1": (settings("tokenizer_config.json", model_max_length=-1), "model_max_length is -1"),
    "a number as token": (settings("tokenizer_config.json", eos_token=3), "its tokenizer: TypeError: Special token"),
    "a list of settings": (content("tokenizer_config.json", b"[]"), "tokenizer_config.json' holds a list; an object"),
    "empty weights": (content(WEIGHTS, b""), rf"{WEIGHTS}' is not safetensors: .*header too small"),
    "half the weights": (cut(WEIGHTS, 30_000), rf"{WEIGHTS}' is not safetensors: .*not fully covered"),
    "wrong header": (content(WEIGHTS, b"PK\x03\x04" * 99), rf"{WEIGHTS}' is not safetensors: .*header too large"),
    "huge header": (content(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), rf"{WEIGHTS}' is not safetensors"),
    "a pointer": (
        content(WEIGHTS, LFS_POINTER),
        rf"{WEIGHTS}' is a Git LFS pointer, not the file .*: run git lfs pull",
    ),
    "a pointer as tokenizer": (content(TOKENIZER, LFS_POINTER), rf"{TOKENIZER}' is a Git LFS pointer"),
    "a dangling link": (link(WEIGHTS, "../blobs/0"), rf"{WEIGHTS}' is a link to '../blobs/0', where no file is: fetch"),
    "a link to itself": (link(CONFIG, CONFIG), rf"{CONFIG}' is a link to '{CONFIG}', where no file is"),
    "a pipe": (fifo, rf"{WEIGHTS}' is no file"),
    "a lost shard": (in_shards, r"index.json' names model-00002-of-00002.safetensors, which is not there"),
    "an adapter": (
        content("adapter_config.json", b"{}"),
        r"holds an adapter \(adapter_config.json\): name its model",
    ),
    "whole numbers": (
        weights(lambda tensors: tensors.update(x=torch.zeros(2, dtype=torch.int8))),
        r"holds x as I8, but config.json has no quantization_config",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_is_refused_in_one_line_before_its_weights_are_loaded(name, copy):
    breaking, message = BROKEN[name]
    breaking(copy)
    with pytest.raises(ModelError, match=message) as error:
        describe_model(str(copy))
    assert str(error.value).startswith(f"model {str(copy)!r}") and "\n" not in str(error.value)


MISFITS = {
    "a layer too many": (
        settings(CONFIG, num_hidden_layers=2),
        "no place in the model of its configuration: model.layers.2.input_layernorm.weight, "
        r"model.layers.2.mlp.down_proj.weight, model.layers.2.mlp.gate_proj.weight \(and 6 more\)",
    ),
    "a layer too few": (
        settings(CONFIG, num_hidden_layers=4),
        r"its files lack the weights model.layers.3.input_layernorm.weight \(and 8 more\)",
    ),
    "another head": (
        weights(lambda tensors: tensors.update({"score.weight": torch.zeros(2, 16)})),
        "no place in the model of its configuration: score.weight",
    ),
    "a lost weight": (
        weights(lambda tensors: tensors.pop("model.norm.weight")),
        "its files lack the weights model.norm.weight",
    ),
    "another width": (
        settings(CONFIG, intermediate_size=20),
        r"model.layers.0.mlp.down_proj.weight is 16 x 24 in its files, 16 x 20 by config.json \(and 8 more\)",
    ),
    "another name": (
        lambda folder: (folder / WEIGHTS).rename(folder / "weights.safetensors"),
        "no file named model.safetensors",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_are_not_those_of_the_configuration_are_told_by_the_preview_as_by_the_run(name, copy):
    misfit, message = MISFITS[name]
    misfit(copy)
    for read in (describe_model, load_model):
        with pytest.raises(ModelError, match=f"could not be loaded: .*{message}") as error:
            read(str(copy))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.bias",
        "transformer.h.0.attn.masked_bias",
        "gpt_neox.layers.0.attention.bias",
        "bert.embeddings.position_ids",
        "vision_tower.vision_model.embeddings.weight",
        "model.visual.blocks.0.weight",
        "multi_modal_projector.linear_1.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.weight",
        "mtp.layers.0.weight",
    ],
)
def test_leftovers_that_no_measured_number_depends_on_are_harmless(name):
    assert HARMLESS.search(name)


@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.q_proj.bias", "model.layers.0.lora_A.weight", "lm_head.bias", "score.weight"]
)
def test_other_weights_are_not(name):
    assert not HARMLESS.search(name)


def test_a_model_with_harmless_leftovers_is_loaded(copy):
    weights(lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))(copy)
    assert load_model(str(copy)).n_layers == 3


@pytest.mark.parametrize("suffix", [".gguf", ".GGUF"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "could not be converted"),
        (b"GGUX" + bytes(999), "could not be converted"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(9), "could not be converted"),
        (LFS_POINTER, "is a Git LFS pointer"),
    ],
)
def test_a_broken_gguf_file_is_refused_in_one_line(suffix, data, message, tmp_path, monkeypatch):
    monkeypatch.setenv("NEG_CACHE", str(tmp_path / "cache"))
    file = tmp_path / f"model{suffix}"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=message) as error:
        describe_model(str(file))
    assert str(error.value).startswith(f"GGUF file {str(file)!r}") and "\n" not in str(error.value)


def test_gguf_weights_that_transformers_drops_are_found(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for name in ("token_embd.weight", "blk.1.attn_q.weight", "blk.2.attn_q.weight", "rope_freqs.weight"):
        writer.add_tensor(name, torch.zeros(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert unused_gguf_weights(tmp_path / "m.gguf", 2) == ["blk.2.attn_q.weight", "rope_freqs.weight"]


@pytest.mark.parametrize("ref", ["m" * 300, "org/" + "n" * 300, "x\0y", "org//name", "http://host/name", "a b"])
def test_what_cannot_be_a_reference_is_refused_in_one_line(ref, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no such directory as") as error:
        describe_model(ref)
    assert "\n" not in str(error.value)


def test_a_panic_in_a_library_is_a_model_error_but_an_interrupt_is_not():
    class Panic(BaseException):
        """What Rust code raises."""

    with pytest.raises(ModelError, match="model 'm': Panic: unwrapped"), reading("model 'm'"):
        raise Panic("unwrapped")
    with pytest.raises(KeyboardInterrupt), reading("model 'm'"):
        raise KeyboardInterrupt


def test_a_tokenizer_that_pads_or_cuts_by_itself_does_neither_here(copy):
    tokenizer = tiny_tokenizer().backend_tokenizer.to_str()
    changed = json.loads(tokenizer) | {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    }
    (copy / TOKENIZER).write_text(json.dumps(changed))
    text = "Question: which answer fits?"
    found = describe_model(str(copy)).tokenizer(text)["input_ids"]
    assert found == tiny_tokenizer()(text)["input_ids"] and len(found) > 2
