import json

import pytest
from support import PROMPTS, save_tiny_model
from tokenizers import Tokenizer
from tokenizers_of import MISTRAL

from negcore.model.language_model import describe_model
from negcore.model.tokenizer_file import SAMPLE, tokenizer_warning


def with_number(directory):
    """Make "23" one token of a saved tokenizer."""
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["23"] = 399
    tokenizer["model"]["merges"].append(["2", "3"])
    file.write_text(json.dumps(tokenizer))


def test_a_tokenizer_that_is_built_anew_is_told_with_the_tokens_that_differ(tmp_path):
    with_number(save_tiny_model("qwen2", tmp_path))
    card = describe_model(str(tmp_path))
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert own.encode("x 23").ids != card.tokenizer("x 23")["input_ids"]
    assert f"of {SAMPLE} sampled" in tokenizer_warning(card, ["no number", "a 23"] * SAMPLE + ["a 23"] * SAMPLE)
    warning = tokenizer_warning(card, ["no number", "a 23"])
    assert "(Qwen2Tokenizer) reads 1 of 2 sampled prompts otherwise than the model's own tokenizer.json" in warning
    assert "['2', '3']" in warning and "['23'] (ids [399])" in warning


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tokenizer_that_reads_as_its_file_says_needs_no_warning(family, tmp_path):
    save_tiny_model(family, tmp_path)
    assert tokenizer_warning(describe_model(str(tmp_path)), PROMPTS) is None


def test_a_sentencepiece_model_without_its_first_space_is_told(tmp_path):
    if not MISTRAL.is_dir():
        pytest.skip(f"{MISTRAL} is absent: make test installs it")
    save_tiny_model("mistral", tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    (tmp_path / "tokenizer.model").write_bytes((MISTRAL / "tokenizer.model.v1").read_bytes())
    warning = tokenizer_warning(describe_model(str(tmp_path)), ["Question: which one?", "<s>x"])
    assert "reads 1 of 1 sampled prompts otherwise than the model's own tokenizer.model" in warning
    assert "'▁Question'" in warning


def test_models_without_a_file_are_not_compared(tmp_path):
    save_tiny_model("llama", tmp_path)
    card = describe_model(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    assert tokenizer_warning(card, PROMPTS) is None and tokenizer_warning(card, []) is None
