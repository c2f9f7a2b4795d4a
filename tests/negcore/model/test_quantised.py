import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import LABELS, PROMPTS, save_tiny_model
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from negcore.errors import ModelError
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import neurgrad
from negcore.model.language_model import describe_model

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


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_a_missing_package_is_told_before_any_weight_is_read(plain, tmp_path, method):
    how = {"load_in_4bit": True} if method == "bitsandbytes" else {"bits": 4}
    directory = marked(plain, tmp_path / "tiny", {"quant_method": method} | how)
    with pytest.raises(
        ModelError, match=rf"quantised \({method}.*not installed.*install it, or give the model as it was"
    ):
        describe_model(str(directory))
