"""Tiny random models of every known family and a tiny tokenizer, made from configurations: no network, no files."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from negcore.measure.loading import checked
from negcore.model.check import ModelCheck
from negcore.model.language_model import LanguageModel, wrap_model
from negcore.store.identity import RunIdentity
from negcore.store.publish import Receipt, ShardPlace, publish_shard
from tasks.measure.negs import NegMeasurement

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"

_SENTENCES = [
    "The capital of France is Paris. The capital of Germany is Berlin.",
    "Question: which answer fits? A. one B. two C. three D. four E. five",
    "Answer: A Answer: B Answer: C Answer: D Answer: E",
    "It was the best of times, it was the worst of times, and the answer is yes or no.",
]
LABELS = [" A", " B", " C", " D", " E"]
PROMPTS = [
    "Question: which answer fits? A. one B. two Answer:",
    "Question: which answer fits? A. three B. four C. five Answer:",
    "Question: which answer fits? Answer:",
    "Question: which answer fits? The capital of France is Paris, and it was the best of times. Answer:",
    "Question: which answer fits? yes or no Answer:",
    "Question: which answer fits? yes, no Answer:",
    "Question: which answer fits? A. one B. two Answer:",
]

_SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 400,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 128}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
# A window shorter than the prompts, so that a mask that counts wrongly shows.
_WINDOW = {"sliding_window": 7}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, **_WINDOW},
    "qwen2": {**_GROUPED, **_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {**_GROUPED, "head_dim": 4},
    "gemma2": {**_GROUPED, **_WINDOW, "head_dim": 4, "query_pre_attn_scalar": 4},
    "gemma3": {**_GROUPED, **_WINDOW, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window_pattern": 2},
    "gemma3_text": {
        **_GROUPED,
        **_WINDOW,
        "head_dim": 4,
        "query_pre_attn_scalar": 4,
        "sliding_window_pattern": 2,
    },
    "olmo2": _GROUPED,
    "phi3": {**_GROUPED, **_WINDOW},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_inner": 24, "n_positions": 128, "vocab_size": 400},
    "gpt_neox": {**_SIZE, "intermediate_size": 24, "max_position_embeddings": 128},
    "opt": {**_SIZE, "ffn_dim": 24, "max_position_embeddings": 128, "word_embed_proj_dim": 16},
    "bert": {**_SIZE, "intermediate_size": 24, "max_position_embeddings": 128},
    "roberta": {**_SIZE, "intermediate_size": 24, "max_position_embeddings": 130},
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24, "vocab_size": 400},
    "modernbert": {**_SIZE, "intermediate_size": 24, "max_position_embeddings": 128, "local_attention": 8},
}
_VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
MASKED = ["bert", "roberta", "distilbert", "modernbert"]
CAUSAL = [name for name in CONFIGS if name not in MASKED]


_CHECKS: dict[Any, ModelCheck | None] = {}


@cache
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer in which " A" to " E" are one token each."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_SENTENCES * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<end>",
        eos_token="<end>",
        mask_token="<mask>",
        model_max_length=128,
    )


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model, with some values changed."""
    settings = {
        **_SPECIAL,
        **CONFIGS[family],
        "initializer_range": 0.5,
        "init_std": 0.5,
        "tie_word_embeddings": False,
        **changes,
    }
    if family == "gemma3":  # the language part of a model that also sees
        settings = {"text_config": settings, "vision_config": _VISION, "initializer_range": 0.5}
    return transformers.AutoConfig.for_model(family, **settings)


def tiny_model(
    family: str, *, dtype: torch.dtype = torch.float64, site: Any = "paper", **changes: Any
) -> LanguageModel:
    """A tiny random model whose activations and gradients are far from zero, some of its configuration changed."""
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    kind = transformers.AutoModelForMaskedLM if family in MASKED else transformers.AutoModelForCausalLM
    model = kind.from_config(config).to(dtype)
    lm = wrap_model(model, tiny_tokenizer(), name=f"tiny-{family}", revision="memory", site=site)
    # The same weights every time: one check serves all tests.
    if (family, dtype, site) not in _CHECKS:
        _CHECKS[family, dtype, site] = checked(lm).check
    return replace(lm, check=_CHECKS[family, dtype, site])


def prompts_for(lm: LanguageModel) -> list[str]:
    """The test prompts, with a mask behind them where the model needs one."""
    return [prompt + "<mask>" if lm.arch.masked else prompt for prompt in PROMPTS]


def save_tiny_model(family: str, directory: Path, *, n_positions: int | None = None) -> Path:
    """Write a tiny random model as a user would have it: a directory of safetensors.

    The tiny tokenizer needs about a token a byte, so that real prompts need more positions than the models have.
    """
    lm = tiny_model(family, dtype=torch.float32)
    lm.model.save_pretrained(directory)
    lm.tokenizer.save_pretrained(directory)
    if n_positions is not None:
        for name, field in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
            settings = json.loads((directory / name).read_text())
            (directory / name).write_text(json.dumps(settings | {field: n_positions}))
    return directory


class Row(NamedTuple):
    """As much of an example as a shard keeps."""

    id: str
    prompt: str = "?"
    answer: int = 0
    group: str = ""


def identity_of(n_layers: int, n_neurons: int, **changes: Any) -> RunIdentity:
    """The identity of a run on a model of some shape that exists nowhere."""
    settings = {"model": "m", "model_revision": "r", "tokenizer_hash": "t", "site": "up", "dtype": "float32"}
    settings |= {"n_layers": n_layers, "n_neurons": n_neurons, "prompt": {}, "dataset_fingerprint": "f"}
    return RunIdentity(**settings | changes)


def named_numbers(first: int, count: int, n_options: int, n_layers: int, n_neurons: int) -> dict[str, np.ndarray]:
    """The numbers of some prompts, each of which names its own place: prompt . option layer neuron."""
    p, o, la, n = np.ix_(range(first, first + count), range(n_options), range(n_layers), range(n_neurons))
    return {
        "label_ids_PO": (10 * p + o).reshape(count, n_options),
        "negs_POLN": (p + o / 10 + la / 100 + n / 1000).astype(np.float32),
        "activations_PLN": (-(p + la / 100 + n / 1000)).astype(np.float32).reshape(count, n_layers, n_neurons),
        "probs_PO": ((p + o) / 100).astype(np.float32).reshape(count, n_options),
    }


def negs_place(model: str, dataset: str, split: str) -> ShardPlace:
    """The place of the NEGs of a split."""
    return ShardPlace("negs", model, dataset, split)


def write_negs(
    root: Any, place: ShardPlace, index: int, n_shards: int, *, identity: Any, examples: Any, **columns: Any
) -> Receipt:
    """Publish one shard of NEGs that were not measured: any numbers, as the identity's storage level holds them."""
    about = {name: columns.pop(name) for name in ("set_aside", "n_nonfinite") if name in columns}
    neurons = columns.pop("neurons", None)
    chosen = {} if neurons is None else {"n_chosen": len(neurons), "neurons": tuple(neurons)}
    measurement = NegMeasurement(identity.n_layers, identity.n_neurons, identity.storage, **chosen)
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    batch = measurement.record_batch(examples, arrays)
    n_options = arrays["probs_PO"].shape[1]
    return publish_shard(
        root, place, index, n_shards, identity=identity, batch=batch, about=measurement.about(n_options), **about
    )


def write_questions(folder: Path) -> str:
    """Write a file of 60 prompts of different lengths, split into train, valid and test, and return its path."""
    rng = random.Random(0)
    words = "the best of times it was capital France Germany Paris Berlin one two three".split()  # noqa: SIM905
    lines = []
    for index in range(60):
        prompt = "Question: " + " ".join(rng.choices(words, k=rng.randint(2, 9))) + " Answer:"
        row = {"prompt": prompt, "labels": [" A", " B", " C"], "answer": index % 3}
        lines.append(json.dumps(row | {"split": ("train", "valid", "test")[index // 20]}))
    file = folder / "questions.jsonl"
    file.write_text("\n".join(lines))
    return str(file)


NEG = Path(sys.executable).parent / "neg"


def neg(*arguments: Any, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a process of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    return subprocess.run(
        [NEG, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"} | environment,
    )
