"""Tokenizers for the tests: real ones from packages, and tiny ones of every kind, trained here."""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import transformers
from support import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from negcore.errors import ModelError
from negcore.model.language_model import describe_model

MISTRAL = Path(sys.prefix) / "share" / "mistral-common" / "mistral_common" / "data"
"""`make test` puts the files of the package mistral-common here."""

_TEXT = [
    "The capital of France is Paris. The capital of Germany is Berlin, and Rome is the capital of Italy.",
    "Question: which answer fits?\nA. one\nB. two\nC. three\nAnswer: A\n\nAnswer: B\n\nAnswer: C\n\nAnswer: D",
    "Premise: a cat sat on the mat. Hypothesis: a cat sat. Is it true? yes, no, maybe. 1 2 3 4 5 6 7 8 9 0",
    "質問：どれが正しいですか？ A B C D 答え：A 答え：B",
]


def _sentencepiece(file: str) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        (folder / "tokenizer.model").write_bytes((MISTRAL / file).read_bytes())
        return transformers.LlamaTokenizer.from_pretrained(folder)

    return load


def _tekken(folder: Path) -> Any:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    tekken = json.loads((MISTRAL / "tekken_240911.json").read_text())
    size = tekken["config"]["default_vocab_size"] - tekken["config"]["default_num_special_tokens"]
    ranks = folder / "tekken.tiktoken"
    ranks.write_text("".join(f"{token['token_bytes']} {token['rank']}\n" for token in tekken["vocab"][:size]))
    converter = TikTokenConverter(str(ranks), pattern=tekken["config"]["pattern"], add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=converter.converted())


REAL: dict[str, Callable[[Path], Any]] = {
    "Mistral v1": _sentencepiece("tokenizer.model.v1"),
    "Mistral v2": _sentencepiece("mistral_instruct_tokenizer_240216.model.v2"),
    "Mistral v3": _sentencepiece("mistral_instruct_tokenizer_240323.model.v3"),
    "Mistral v7": _sentencepiece("mistral_instruct_tokenizer_241114.model.v7"),
    "Mistral tekken": _tekken,
    "Gemma 3": lambda folder: describe_model("gemma3-270m").tokenizer,
    "SmolLM2": lambda folder: describe_model("smollm2-135m").tokenizer,
    "GPT-2's kind": lambda folder: tiny_tokenizer(),
}


def real_tokenizer(name: str) -> Any:
    """Return a tokenizer of `REAL`, or skip the test where its package is not installed."""
    if "Mistral" in name and not MISTRAL.is_dir():
        pytest.skip(f"{MISTRAL} is absent: make test installs it")
    try:
        return _loaded(name)
    except ModelError as error:
        pytest.skip(f"{error} (or: make gemma)")


@cache
def _loaded(name: str) -> Any:
    with TemporaryDirectory() as folder:
        return REAL[name](Path(folder))


def _trained(model: Any, trainer: Any, normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(_TEXT * 8, trainer)
    return backend


def _bpe(pre_tokenizer: Any) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    return _trained(models.BPE(unk_token="<unk>"), trainer, None, pre_tokenizer)


def _of_llamas_kind(backend: Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _metaspace(scheme: str, *, split: bool) -> Any:
    """Tokens hold a space at their beginning alone, as in real models, so training splits at spaces."""
    backend = _bpe(pre_tokenizers.Metaspace())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return _of_llamas_kind(backend)


def _old_llama() -> Any:
    """The form of older Llama files: normalizers write the spaces, and there is no pre-tokenizer."""
    backend = _bpe(pre_tokenizers.Metaspace())
    described = json.loads(backend.to_str()) | {"pre_tokenizer": None}
    backend = Tokenizer.from_str(json.dumps(described))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _of_llamas_kind(backend)


def _byte_level(*, add_prefix_space: bool) -> Any:
    return _of_llamas_kind(_bpe(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)))


def _unigram() -> Any:
    mask = AddedToken("<mask>", lstrip=True, special=True)
    special = ["<unk>", "<s>", "</s>", mask]
    trainer = trainers.UnigramTrainer(vocab_size=220, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend = _trained(models.Unigram(), trainer, normalizers.NFKC(), pre_tokenizers.Metaspace())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", mask_token=mask)


def word_piece() -> Any:
    """A tokenizer of BERT's kind, with its special tokens around every text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    lower, words = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    backend = _trained(models.WordPiece(unk_token="[UNK]"), trainer, lower, words)
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return with_template(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named), "[CLS] $A [SEP]")


def _byte_fallback() -> Any:
    letters = dict.fromkeys("▁" + "".join(_TEXT[:3]).replace(" ", ""))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁A", "▁B"]
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[("▁", "A"), ("▁", "B")],
        byte_fallback=True,
        unk_token="<unk>",
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.ByteFallback()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def _swallowing() -> Any:
    """A special token that swallows the spaces behind it, like those of Phi-3, and one that does so in front."""
    tokenizer = _byte_level(add_prefix_space=False)
    tokenizer.add_tokens(
        [AddedToken("<|turn|>", rstrip=True, special=True), AddedToken("<|end|>", lstrip=True, special=True)],
        special_tokens=True,
    )
    return tokenizer


TINY: dict[str, Callable[[], Any]] = {
    "Metaspace first": lambda: _metaspace("first", split=False),
    "Metaspace first, split": lambda: _metaspace("first", split=True),
    "Metaspace always": lambda: _metaspace("always", split=True),
    "Metaspace never": lambda: _metaspace("never", split=False),
    "older Llama": _old_llama,
    "Unigram": _unigram,
    "byte fallback": _byte_fallback,
    "tokens that swallow spaces": _swallowing,
    "byte level with a space in front": lambda: _byte_level(add_prefix_space=True),
}


@cache
def tiny(name: str) -> Any:
    """Return a tokenizer of `TINY`."""
    return TINY[name]()


def with_template(tokenizer: Any, template: str) -> Any:
    """Return a copy of a tokenizer that puts the special tokens of a template around every text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    special = [(piece, backend.token_to_id(piece)) for piece in template.split() if piece != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return type(tokenizer)(tokenizer_object=backend, **tokenizer.special_tokens_map)
