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

from negcore.measure.kept import keeping
from negcore.measure.loading import checked
from negcore.measure.neurgrad import Negs, Results
from negcore.model.architectures import ARCHITECTURES
from negcore.model.check import ModelCheck
from negcore.model.language_model import LanguageModel, describe_model, wrap_model
from negcore.model.placement import passing_map
from negcore.model.skeleton import auto_class, skeleton
from negcore.store.identity import RunIdentity
from negcore.store.levels import STORAGE_LEVELS
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
_HEADS = {"head_dim": 4}
_WINDOWED_HEADS = {**_GROUPED, **_WINDOW, **_HEADS}
_GEMMA = {**_WINDOWED_HEADS, "query_pre_attn_scalar": 4, "sliding_window_pattern": 2}
_GPT = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_inner": 24, "n_positions": 128, "vocab_size": 400}
_WIDE = {**_SIZE, "intermediate_size": 24, "max_position_embeddings": 128}
_WIDE_ROBERTA = {**_WIDE, "max_position_embeddings": 130}
_LATENT = {
    **_GROUPED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
# Two dense layers before one of experts.
_DEEPSEEK = {
    **_LATENT,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_group": 1,
    "topk_group": 1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_LINEAR = {
    **_GROUPED,
    **_HEADS,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
# Multiples of logits, of embeddings, of what a layer adds and of scores.
_GRANITE = {
    **_GROUPED,
    "logits_scaling": 8.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
_GEMMA4 = {
    **_WINDOWED_HEADS,
    "global_head_dim": 4,
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 400,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
_SIGHT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
_QWEN_SIGHT = {"depth": 1, "embed_dim": 8, "intermediate_size": 8, "num_heads": 2}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}}


def _seeing(text: dict[str, Any], sight: dict[str, Any] = _SIGHT) -> dict[str, Any]:
    """A model that also sees, whose language part is measured."""
    return {"text_config": text, "vision_config": sight}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, **_WINDOW},
    "qwen2": {**_GROUPED, **_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {**_GROUPED, **_HEADS},
    "gemma2": {**_WINDOWED_HEADS, "query_pre_attn_scalar": 4},
    "gemma3": _seeing(_GEMMA),
    "gemma3_text": _GEMMA,
    "olmo2": _GROUPED,
    "phi3": {**_GROUPED, **_WINDOW},
    "gpt2": _GPT,
    "gpt_neox": _WIDE,
    "opt": {**_SIZE, "ffn_dim": 24, "max_position_embeddings": 128, "word_embed_proj_dim": 16},
    "bert": _WIDE,
    "roberta": _WIDE_ROBERTA,
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24, "vocab_size": 400},
    "modernbert": {**_WIDE, "local_attention": 8},
    "apertus": _GROUPED,
    "arcee": _GROUPED,
    "biogpt": _WIDE,
    "bitnet": _GROUPED,
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 4, "vocab_size": 400},
    "codegen": {**_GPT, "rotary_dim": 4},
    "cohere": {**_GROUPED, "logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {**_GROUPED, **_WINDOW, "logit_scale": 0.5},
    "cwm": _WINDOWED_HEADS,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "diffllama": _GROUPED,
    "ernie4_5": {**_GROUPED, **_HEADS},
    "exaone4": {**_GROUPED, **_WINDOW, "sliding_window_pattern": 3},
    "falcon": {**_SIZE, "ffn_hidden_size": 24, "alibi": True, "new_decoder_architecture": False},
    "gemma": {**_GROUPED, **_HEADS},
    "gemma3n_text": {
        **_GEMMA4,
        "intermediate_size": [24, 24, 24],
        "laurel_rank": 4,
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        "altup_num_inputs": 2,
    },
    "gemma4": _seeing(_GEMMA4),
    "gemma4_text": _GEMMA4,
    "glm": {**_GROUPED, **_HEADS},
    "glm4": {**_GROUPED, **_HEADS},
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 4,
        "intermediate_size": 24,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 7,
        "vocab_size": 400,
        "max_position_embeddings": 128,
    },
    "gptj": {**_GPT, "rotary_dim": 4},
    "granite": _GRANITE,
    "helium": {**_GROUPED, **_HEADS},
    "hunyuan_v1_dense": {**_GROUPED, **_HEADS},
    "hyperclovax": _GRANITE,
    "idefics3": _seeing({**_GROUPED, "model_type": "llama"}),
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "llama4_text": {
        **_GROUPED,
        **_HEADS,
        "moe_layers": [1],
        "intermediate_size_mlp": 24,
        "num_local_experts": 2,
        "attention_chunk_size": 7,
    },
    "llava": _seeing({**_GROUPED, "model_type": "llama"}, {**_SIGHT, "model_type": "clip_vision_model"}),
    "minicpm3": _LATENT,
    "ministral": _WINDOWED_HEADS,
    "ministral3": {**_GROUPED, **_HEADS},
    "mistral3": _seeing({**_WINDOWED_HEADS, "model_type": "mistral"}, {**_SIGHT, "model_type": "pixtral"}),
    "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2, "max_seq_len": 128, "vocab_size": 400},
    "nanochat": _GROUPED,
    "nemotron": _GROUPED,
    "olmo": _GROUPED,
    "olmo3": {**_GROUPED, **_WINDOW},
    "phi": _GROUPED,
    "qwen2_5_vl": _seeing({**_GROUPED, **_MROPE}, {**_QWEN_SIGHT, "hidden_size": 8, "out_hidden_size": 16}),
    "qwen2_vl": _seeing({**_GROUPED, **_MROPE}, {**_QWEN_SIGHT, "hidden_size": 16}),
    "qwen3_5_text": _LINEAR,
    "qwen3_vl": _seeing(
        {**_GROUPED, **_HEADS, **_MROPE},
        {**_QWEN_SIGHT, "hidden_size": 8, "out_hidden_size": 16, "deepstack_visual_indexes": [0]},
    ),
    "mixtral": {**_GROUPED, **_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 12, "mlp_only_layers": [1]},
    "qwen3_moe": {**_GROUPED, **_HEADS, **_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "gpt_oss": {**_WINDOWED_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "seed_oss": {**_GROUPED, **_HEADS},
    "smollm3": _GROUPED,
    "smolvlm": _seeing({**_GROUPED, "model_type": "llama"}),
    "stablelm": {**_GROUPED, "qk_layernorm": True},
    "starcoder2": {**_GROUPED, **_WINDOW},
    "vaultgemma": {**_WINDOWED_HEADS, "query_pre_attn_scalar": 4},
    "youtu": _LATENT,
    "camembert": _WIDE_ROBERTA,
    "deberta": {**_WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {**_WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "electra": {**_WIDE, "embedding_size": 12},
    "ernie": _WIDE,
    "eurobert": _GROUPED,
    "megatron-bert": _WIDE,
    "rembert": {**_WIDE, "input_embedding_size": 12, "output_embedding_size": 12},
    "roformer": {**_WIDE, "embedding_size": 12},
    "xlm-roberta": _WIDE_ROBERTA,
    "xlm-roberta-xl": _WIDE_ROBERTA,
}
CORE = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "olmo2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "bert",
    "roberta",
    "distilbert",
    "modernbert",
]
"""Families that every measurement is tested on; tests/negcore/measure/test_families.py has them all."""
MASKED = [name for name in CORE if ARCHITECTURES[name].masked]
CAUSAL = [name for name in CORE if name not in MASKED]


_CHECKS: dict[Any, tuple[ModelCheck | None, bool]] = {}


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
    """The configuration of a tiny model, with some values of its language part changed."""
    settings, loud = dict(CONFIGS[family]), {"initializer_range": 0.5, "init_std": 0.5}
    language = {**_SPECIAL, **settings.get("text_config", settings), **loud, "tie_word_embeddings": False, **changes}
    if "text_config" in settings:
        return transformers.AutoConfig.for_model(family, **settings | {"text_config": language} | loud)
    return transformers.AutoConfig.for_model(family, **language)


def tiny_model(
    family: str,
    *,
    dtype: torch.dtype = torch.float64,
    site: Any = "paper",
    router: Any = "through",
    **changes: Any,
) -> LanguageModel:
    """A tiny random model whose activations and gradients are far from zero, some of its configuration changed."""
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    model = auto_class(config, masked=ARCHITECTURES[family].masked).from_config(config).to(dtype)
    lm = wrap_model(model, tiny_tokenizer(), name=f"tiny-{family}", revision="memory", site=site, router=router)
    # The same weights every time: one check serves all tests.
    key = (family, dtype, site, router)
    if key not in _CHECKS:
        found = checked(lm)
        _CHECKS[key] = found.check, found.joined
    check, joined = _CHECKS[key]
    return replace(lm, check=check, joined=joined)


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


def by_turns(ref: str, first: str, second: str) -> dict[str, str]:
    """Return a map that puts a model's blocks on two devices by turns, so that every pass crosses between them."""
    card = describe_model(ref)
    model, layers = skeleton(card.config, masked=card.arch.masked), card.arch.layers
    blocks = [f"{layers}.{name}" for name, _ in model.get_submodule(layers).named_children()]
    beside = passing_map(model, layers, "cpu", "disk").keys() - set(blocks)
    return dict.fromkeys(beside, first) | {path: (first, second)[index % 2] for index, path in enumerate(blocks)}


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
    batch = STORAGE_LEVELS[identity.storage].batch(examples, **columns)
    measurement = NegMeasurement(identity.n_layers, identity.n_neurons, identity.storage)
    about |= {"about": measurement.about(np.shape(columns["probs_PO"])[1])}
    return publish_shard(root, place, index, n_shards, identity=identity, batch=batch, **about)


def kept_columns(
    measurement: NegMeasurement, gold_P: Any, negs_POLN: Any, activations_PLN: Any, probs_PO: Any, label_ids_PO: Any
) -> dict[str, np.ndarray]:
    """What a measurement would return had a model had these numbers: P prompts in two batches, the later ones first."""
    lm, n_rows = tiny_model("llama"), len(gold_P)
    results = Results(lm.device, n_rows)
    keep = keeping(lm, measurement.storage, np.asarray(gold_P), measurement.neurons)
    for rows in (list(range(n_rows // 2, n_rows)), list(range(n_rows // 2))):
        if rows:
            negs_BOLN, activations_BLN, probs_BO = (
                torch.from_numpy(np.array(values)[rows]).float() for values in (negs_POLN, activations_PLN, probs_PO)
            )
            negs = Negs(negs_BOLN.permute(2, 1, 0, 3), activations_BLN.transpose(0, 1), probs_BO)
            results.take(keep(negs, rows), rows)
    measured = results.arrays() if n_rows else measurement.empty(np.shape(negs_POLN)[1])
    return {**measured, "label_ids_PO": np.asarray(label_ids_PO)}


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
