import json
import shutil
from importlib.metadata import PackageNotFoundError
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import LABELS, PROMPTS, save_tiny_model
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from negcore.errors import ModelError
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import sweep
from negcore.model import quantised
from negcore.model.language_model import describe_model
from negcore.model.whole_weights import load_whole

BLOCK = 8


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("plain") / "tiny")


def marked(plain, directory, settings):
    """A copy of a model whose configuration says that its weights are quantised."""
    shutil.copytree(plain, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return directory


def in_fp8(plain, directory):
    """A copy of a model in 8-bit floats with a scale for each block; and the weights that these stand for."""
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    marked(plain, directory, settings)
    stored, meant = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if "proj" in name:
            rows, columns = weight.shape
            blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            narrow = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name] = narrow.view(rows, columns)
            stored[f"{name}_scale_inv"] = scale
            meant[name] = (narrow.float() * scale[:, None, :, None]).view(rows, columns)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return meant


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_weights_in_8_bit_floats_are_read_as_the_numbers_they_stand_for(plain, tmp_path, dtype):
    meant = in_fp8(plain, tmp_path / "fp8")
    lm = load_model(str(tmp_path / "fp8"), dtype=dtype)
    loaded = lm.model.state_dict()
    assert set(loaded) == set(meant) and {value.dtype for value in loaded.values()} == {lm.model.dtype}
    tolerance = 2**-8 if dtype == "bfloat16" else 1e-6
    for name, weight in meant.items():
        torch.testing.assert_close(loaded[name].float(), weight, rtol=tolerance, atol=0)
    assert np.isfinite(neurgrad(lm, PROMPTS[:2], LABELS[:2]).negs_POLN).all()


@pytest.mark.parametrize("method", [*AUTO_QUANTIZER_MAPPING, "exl2", None])
def test_a_quantised_model_is_read_or_refused_in_one_line_that_names_the_method(plain, tmp_path, method):
    settings = {"quant_method": method, "bits": 4}
    if method and method.startswith("bitsandbytes"):
        settings = {"quant_method": "bitsandbytes", f"load_in_{method[-4:]}": True}
    directory = marked(plain, tmp_path / "tiny", settings)
    try:
        lm = load_model(str(directory))
    except ModelError as error:
        assert "\n" not in str(error) and f"{method}" in str(error) and "quantised" in str(error)
    else:  # its files hold plain floats, whatever the configuration says
        expected = neurgrad(load_model(str(plain)), PROMPTS[:2], LABELS[:2])
        assert np.array_equal(neurgrad(lm, PROMPTS[:2], LABELS[:2]).probs_PO, expected.probs_PO)


@pytest.mark.parametrize(
    ("method", "packages"),
    [
        ("gptq", "optimum gptqmodel"),
        ("awq", "gptqmodel"),
        ("bitsandbytes", "bitsandbytes"),
        ("compressed-tensors", "compressed-tensors"),
        ("quanto", "optimum-quanto"),
    ],
)
def test_missing_packages_are_told_with_their_command_before_any_weight_is_read(
    plain, tmp_path, monkeypatch, method, packages
):
    monkeypatch.setattr(quantised, "version", Mock(side_effect=PackageNotFoundError))
    how = {"load_in_4bit": True} if method == "bitsandbytes" else {"bits": 4}
    directory = marked(plain, tmp_path / "tiny", {"quant_method": method} | how)
    with pytest.raises(ModelError, match=rf"quantised \({method}.*not installed: pip install {packages}; or give the"):
        describe_model(str(directory))


# Each method's numbers, worked out by hand


def measured_as(directory, plain, meant):
    """Check that a quantised model is measured as a plain one with the weights that it stands for."""
    shutil.copytree(plain, directory.with_name("meant"))
    save_file(meant, directory.with_name("meant") / "model.safetensors", metadata={"format": "pt"})
    lm, expected = (load_model(str(path)) for path in (directory, directory.with_name("meant")))
    ours, theirs = (neurgrad(one, PROMPTS[:2], LABELS[:2]) for one in (lm, expected))
    np.testing.assert_allclose(ours.negs_POLN, theirs.negs_POLN, rtol=1e-4, atol=1e-8)
    swept, expected_sweep = (sweep(one, PROMPTS[:1], [" A"], neurons=[(1, 3)]).negs_PK for one in (lm, expected))
    np.testing.assert_allclose(swept, expected_sweep, rtol=1e-3)
    torch.testing.assert_close(lm.down_rows(1), expected.down_rows(1), rtol=1e-6, atol=1e-8)
    assert lm.check.passed and any("stored otherwise (weights quantised by" in note for note in lm.check.notes)


def rewritten(plain, directory, settings, store):
    """A quantised copy of a model: `store` returns what is stored for a projection, and the weights that this means."""
    marked(plain, directory, settings)
    stored, meant = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        parts, meant[name] = store(weight) if "proj" in name else ({"weight": weight}, weight)
        stored |= {name.removesuffix("weight") + ending: part.contiguous() for ending, part in parts.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return meant


def compressed(form, weights, activations=None):
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def in_groups(weight, group, top):
    """Numbers from -top to top for groups of a row, and the scale of each group."""
    grouped = weight.view(len(weight), -1, group)
    scale = grouped.abs().amax(2, keepdim=True) / top
    return grouped / scale, scale


def nibbles_of(numbers):
    """Eight numbers of four bits in each whole number of 32, the first of them lowest."""
    wide = sum(numbers.long().view(len(numbers), -1, 8)[:, :, place] << (4 * place) for place in range(8))
    return torch.where(wide >= 2**31, wide - 2**32, wide).int()


def as_int4(weight):
    numbers, scale = in_groups(weight, BLOCK, 7)
    numbers = numbers.round()
    parts = {"weight_packed": nibbles_of(numbers.view_as(weight) + 8), "weight_shape": torch.tensor(weight.shape)}
    return parts | {"weight_scale": scale.squeeze(2)}, (numbers * scale).view_as(weight)


def as_int8(weight):
    numbers, scale = in_groups(weight, weight.shape[1], 127)
    numbers = numbers.round()
    return {"weight": numbers.to(torch.int8).squeeze(1), "weight_scale": scale.squeeze(2)}, (numbers * scale).squeeze(1)


def as_float8(weight):
    numbers, scale = in_groups(weight, weight.shape[1], 448)
    narrow = numbers.to(torch.float8_e4m3fn)
    return {"weight": narrow.squeeze(1), "weight_scale": scale.squeeze(2)}, (narrow.float() * scale).squeeze(1)


@pytest.mark.parametrize(
    ("form", "weights", "activations", "store"),
    [
        ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": BLOCK}, None, as_int4),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, "int", as_int8),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, "float", as_float8),
    ],
)
def test_compressed_tensors_are_measured_as_the_numbers_they_stand_for(
    plain, tmp_path, form, weights, activations, store
):
    pytest.importorskip("compressed_tensors")
    rounding = {"num_bits": 8, "type": activations, "symmetric": True, "strategy": "token", "dynamic": True}
    settings = compressed(form, weights, rounding if activations else None)
    meant = rewritten(plain, tmp_path / "packed", settings, store)
    measured_as(tmp_path / "packed", plain, meant)


def as_bitsandbytes_int8(weight):
    parts, meant = as_int8(weight)
    of_row = parts["weight_scale"].flatten() * 127
    return {"weight": parts["weight"], "SCB": of_row, "weight_format": torch.tensor(0, dtype=torch.uint8)}, meant


def test_weights_that_bitsandbytes_stores_in_8_bits_are_measured_as_the_numbers_they_stand_for(plain, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    meant = rewritten(plain, tmp_path / "packed", settings, as_bitsandbytes_int8)
    measured_as(tmp_path / "packed", plain, meant)


def in_4_bits(plain, directory):
    """A copy of a model as bitsandbytes stores it; and the weights that this means."""
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, dtype=torch.float32)
    shutil.copytree(plain, directory)
    model.save_pretrained(directory)
    stored, weights = load_file(directory / "model.safetensors"), load_file(plain / "model.safetensors")
    return {
        name: _from_nf4(stored, name, weight.shape) if stored[name].dtype == torch.uint8 else weight
        for name, weight in weights.items()
    }


def test_weights_that_bitsandbytes_stores_in_4_bits_are_measured_as_the_numbers_they_stand_for(plain, tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = shutil.copytree(plain, tmp_path / "wide")
    config = transformers.AutoConfig.from_pretrained(plain, hidden_size=64, intermediate_size=128, head_dim=16)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(wide)
    measured_as(tmp_path / "packed", wide, in_4_bits(wide, tmp_path / "packed"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU reads them")
def test_rows_that_bitsandbytes_reads_wrongly_on_a_cpu_are_refused(plain, tmp_path):
    pytest.importorskip("bitsandbytes")
    in_4_bits(plain, tmp_path / "packed")
    with pytest.raises(ModelError, match="rows of 16 numbers in blocks of 64, which bitsandbytes reads wrongly on a"):
        load_model(str(tmp_path / "packed"))


def _from_nf4(stored, name, shape):
    halves = torch.stack([stored[name] >> 4, stored[name] & 15], -1).flatten().long()
    blocks = stored[f"{name}.quant_map"][halves].split(64)
    scaled = [block * scale for block, scale in zip(blocks, stored[f"{name}.absmax"], strict=True)]
    return torch.cat(scaled).view(shape)


# What transformers cannot turn into numbers: stand-ins for the layers of gptqmodel, which takes a GPU or a compiler


class PackedLinear(nn.Module):
    """A layer as GPTQ and AWQ store it: four bits a number, offset and scale for each group, computed in halves."""

    def __init__(self, in_features, out_features, bias):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        n_groups = in_features // BLOCK
        for name, shape in self.shapes(n_groups).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(n_groups, out_features, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16) if bias else None)

    def forward(self, rows):
        if rows.dtype != torch.float16:
            raise NotImplementedError("this kernel computes in float16")
        result = rows @ self.numbers()
        return result if self.bias is None else result + self.bias


class GptqLinear(PackedLinear):
    def shapes(self, n_groups):
        return {"qweight": (self.in_features // 8, self.out_features), "qzeros": (n_groups, self.out_features // 8)}

    def numbers(self):
        places = 4 * torch.arange(8, dtype=torch.int32)
        numbers = (self.qweight[:, None] >> places[:, None]) & 15
        zeros = ((self.qzeros[:, :, None] >> places) & 15) + 1
        by_row = [one.reshape(-1, self.out_features).repeat_interleave(BLOCK, 0) for one in (zeros, self.scales)]
        return (numbers.reshape(-1, self.out_features) - by_row[0]) * by_row[1]


class AwqLinear(PackedLinear):
    def shapes(self, n_groups):
        return {"qweight": (self.in_features, self.out_features // 8), "qzeros": (n_groups, self.out_features // 8)}

    def numbers(self):
        places = 4 * torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], dtype=torch.int32)  # its own order
        numbers, zeros = ((one[:, :, None] >> places & 15).flatten(1) for one in (self.qweight, self.qzeros))
        return (numbers - zeros.repeat_interleave(BLOCK, 0)) * self.scales.repeat_interleave(BLOCK, 0)


class StandInQuantizer(HfQuantizer):
    """Puts packed layers in the places of a model's projections, as the quantizers of GPTQ and AWQ do."""

    layer: type

    def _process_model_before_weight_loading(self, model, **kwargs):
        for path, module in list(model.named_modules()):
            if "proj" in path:
                packed = self.layer(module.in_features, module.out_features, module.bias is not None)
                model.set_submodule(path, packed)

    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return False


def as_gptq(weight):
    numbers, scale = in_groups(weight, BLOCK, 7)
    numbers, scale = numbers.round() + 8, scale.half()
    meant = ((numbers - 8).half() * scale).float().view_as(weight)  # as its kernel rounds them
    parts = {"qweight": nibbles_of(numbers.view_as(weight)).T, "scales": scale.squeeze(2).T}
    return parts | {"qzeros": nibbles_of(torch.full((parts["scales"].shape), 7))}, meant


def as_awq(weight):
    numbers, scale = in_groups(weight, BLOCK, 7)
    numbers, scale = numbers.round() + 8, scale.half()
    meant = ((numbers - 8).half() * scale).float().view_as(weight)  # as its kernel rounds them
    columns = numbers.view_as(weight).T.reshape(weight.shape[1], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    parts = {"qweight": nibbles_of(columns.flatten(1)), "scales": scale.squeeze(2).T}
    return parts | {"qzeros": nibbles_of(torch.full(parts["scales"].shape, 8))}, meant


@pytest.mark.parametrize(("method", "layer", "store"), [("gptq", GptqLinear, as_gptq), ("awq", AwqLinear, as_awq)])
def test_packed_layers_without_a_way_back_are_asked_for_their_numbers(
    plain, tmp_path, monkeypatch, method, layer, store
):
    quantizer = type("Quantizer", (StandInQuantizer,), {"layer": layer})
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, method, quantizer)
    monkeypatch.setattr(quantised, "version", lambda package: "1")
    settings = {"quant_method": method, "bits": 4, "group_size": BLOCK}
    meant = rewritten(plain, tmp_path / "packed", settings, store)
    measured_as(tmp_path / "packed", plain, meant)


def test_the_bias_of_a_packed_layer_is_kept_and_does_not_round_its_numbers():
    packed = GptqLinear(16, 8, bias=True)
    parts, meant = as_gptq(torch.randn(8, 16))
    packed.load_state_dict(parts | {"bias": torch.full((8,), 1000.0)}, strict=True)
    linear = quantised.linear_of(packed, torch.float32)
    torch.testing.assert_close(linear.weight, meant, rtol=1e-3, atol=1e-3)
    assert torch.equal(linear.bias, torch.full((8,), 1000.0)) and torch.equal(packed.bias.float(), linear.bias)


def test_a_packed_layer_that_does_not_multiply_by_a_matrix_is_refused():
    class Bent(GptqLinear):
        def forward(self, rows):
            return super().forward(rows).relu()

    packed = Bent(16, 8, bias=False)
    packed.load_state_dict(as_gptq(torch.randn(8, 16))[0])
    with pytest.raises(ModelError, match="Bent does not multiply by a matrix; give the model as it was before"):
        quantised.linear_of(packed, torch.float32)


def test_mxfp4_experts_are_read_as_the_numbers_they_stand_for(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50}
    config = transformers.GptOssConfig(**sizes, **heads, num_experts_per_tok=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    stored, meant = {}, {}
    for name, weight in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            n_experts, n_in, n_out = weight.shape
            codes = torch.randint(16, (n_experts, n_out, n_in // 32, 32))
            exponents = torch.randint(120, 130, codes.shape[:3])
            stored[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
            stored[f"{name}_scales"] = exponents.to(torch.uint8)
            values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes]
            meant[name] = (values * 2.0 ** (exponents[..., None] - 127)).flatten(2).transpose(1, 2)
        else:
            stored[name] = meant[name] = weight.contiguous()
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    config.save_pretrained(tmp_path)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    loaded = load_whole(
        transformers.AutoModelForCausalLM, tmp_path, config=quantised.plain_config(read), dtype=torch.float32
    )
    loaded = quantised.plain_model(loaded, read, torch.float32).state_dict()
    for name, weight in meant.items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=0)
