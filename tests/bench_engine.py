"""Rows of the engine: NEGs beside autograd and forward passes, sweeps beside hooks, and how both grow."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from bench_rows import Item, Setting, Work, compared
from support import tiny_tokenizer
from transformers import DynamicCache

from negcore.measure.benchmark import plain_gradients
from negcore.measure.forward import common_prefix_length
from negcore.measure.loading import checked
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import draw_neurons, shift_grid, sweep
from negcore.measure.virtual_tokens import Method
from negcore.model.attention import ATTENTION_NAME
from negcore.model.encoding import EncodedPrompts
from negcore.model.language_model import LanguageModel, wrap_model
from negcore.model.past import Prefixes

SHAPES = {"zero-shot": (24, 16, 86), "one-shot": (24, 321, 86), "long": (8, 15, 290)}
"""Prompts, tokens that all of them share, and own tokens: AG News without and with an example, and IMDb."""
TINY_SHAPES = {"zero-shot": (4, 2, 10), "one-shot": (4, 20, 10), "long": (2, 2, 40)}
GOALS = {"zero-shot": 0.85, "one-shot": 1.00, "long": 1.10}
OWN, WHOLE, EACH = "forward pass of own tokens", "forward pass of whole prompts", "autograd an option"


def prompts(lm: LanguageModel, n_prompts: int, n_shared: int, n_own: int, n_options: int = 4) -> EncodedPrompts:
    """Draw random tokens: some that all prompts share, and own ones, a fifth more or fewer from prompt to prompt."""
    random, n_words = np.random.default_rng(0), lm.card.vocab_size
    shared = random.integers(n_words, size=n_shared).tolist()
    lengths = n_own + random.integers(-n_own // 5, n_own // 5 + 1, n_prompts)
    ids = [
        [*shared, index % n_words, *random.integers(n_words, size=length - 1).tolist()]
        for index, length in enumerate(lengths)
    ]
    return EncodedPrompts(ids, np.tile(random.choice(n_words, n_options, replace=False), (n_prompts, 1)))


class Forward:
    """A forward pass (SDPA, no gradient) of each prompt's own tokens after a copy of the shared prefix's cache."""

    def __init__(self, lm: LanguageModel, encoded: EncodedPrompts, *, whole: bool = False) -> None:
        self._lm, self._ids = lm, encoded.ids
        self._n_shared = 0 if whole else common_prefix_length(encoded.ids)
        self._prefix = DynamicCache()
        if self._n_shared:
            self._sdpa(lambda: self._run(self._ids[0][: self._n_shared], self._prefix))

    def __call__(self) -> None:
        self._sdpa(self._all)

    def _all(self) -> None:
        for tokens in self._ids:
            cache = DynamicCache()
            for layer, one in enumerate(self._prefix.layers):
                cache.update(one.keys.clone(), one.values.clone(), layer)
            self._run(tokens[self._n_shared :], cache)

    def _run(self, tokens: Sequence[int], cache: Any) -> None:
        with torch.no_grad():
            self._lm.model(input_ids=torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)

    def _sdpa(self, work: Work) -> None:
        self._lm.model.set_attn_implementation("sdpa")
        try:
            work()
        finally:
            self._lm.model.set_attn_implementation(ATTENTION_NAME)


def first(encoded: EncodedPrompts, count: int, n_options: int | None = None) -> EncodedPrompts:
    """Return the first prompts, with their first options."""
    return EncodedPrompts(encoded.ids[:count], encoded.label_ids_PO[:count, :n_options])


def negs(setting: Setting) -> Iterator[Item]:
    """Compare NEGs of all neurons for four options with forward passes and with autograd."""
    for name, shape in (TINY_SHAPES if setting.tiny else SHAPES).items():
        for n_prompts, goal in ((shape[0], GOALS[name]), *([(8, 1.15)] if name == "one-shot" else [])):
            title = f"{name}, {n_prompts} prompts"
            works = partial(_beside_forward, setting, (n_prompts, *shape[1:]))
            yield compared(setting, title, OWN, "s a prompt", works, units=(n_prompts, n_prompts), goal=goal)
        works = partial(_beside_forward, setting, (4, *shape[1:]), whole=True)
        yield compared(setting, f"{name}, 4 prompts", WHOLE, "s a prompt", works, units=(4, 4))
        works = partial(_beside_autograd, setting, (4, *shape[1:]))
        yield compared(setting, f"{name}, 4 prompts", EACH, "s a prompt", works, units=(4, 1))


def _beside_forward(setting: Setting, shape: tuple[int, int, int], *, whole: bool = False) -> tuple[Work, Work]:
    encoded = prompts(setting.lm, *shape)
    return partial(neurgrad, setting.lm, encoded), Forward(setting.lm, encoded, whole=whole)


def _beside_autograd(setting: Setting, shape: tuple[int, int, int]) -> tuple[Work, Work]:
    encoded = prompts(setting.lm, *shape)
    return partial(neurgrad, setting.lm, encoded), partial(plain_gradients, setting.lm, first(encoded, 1))


def sweeps(setting: Setting) -> Iterator[Item]:
    """Compare sweeps of single neurons with passes of whole prompts with hooks."""
    n_fast, n_plain, n_tokens = (4, 2, 20) if setting.tiny else (16, 4, 40)

    def works() -> tuple[Work, Work]:
        one = first(prompts(setting.lm, 1, 1, n_tokens), 1, 1)
        chosen = draw_neurons(setting.lm.layer_shapes, n_fast)

        def swept(method: Method, n_neurons: int) -> object:
            return sweep(setting.lm, one, neurons=chosen[:n_neurons], shifts=shift_grid(2), method=method)

        return partial(swept, "auto", n_fast), partial(swept, "hooks", n_plain)

    yield compared(setting, "20 shifts", "hooks", "s a neuron", works, units=(n_fast, n_plain))


# Growth


def growth(setting: Setting) -> Iterator[Item]:
    """Let one thing at a time grow; layers and neurons are those of random models."""
    tiny = setting.tiny
    n_prompts, n_shared, n_own = shape = (2, 2, 10) if tiny else (8, 16, 86)
    for count in (2, 4) if tiny else (4, 8, 16, 32, 64):
        yield _grown(setting, f"{count} prompts", (count, n_shared, n_own))
    for count in (2, 4) if tiny else (2, 4, 8, 16, 32):
        yield _grown(setting, f"{count} options", shape, n_options=count)
    for count in (2, 20) if tiny else (16, 64, 256, 1024):
        yield _grown(setting, f"{count} shared tokens", (n_prompts, count, n_own))
    for count in (2, 4) if tiny else (4, 8, 16, 32):
        yield _grown(setting, f"{count} layers", shape, random_shape=(count, 64 if tiny else 1024))
    for count in (64, 128) if tiny else (512, 1024, 2048, 4096):
        yield _grown(setting, f"{count} neurons a layer", shape, random_shape=(2 if tiny else 8, count))


def _grown(
    setting: Setting,
    name: str,
    shape: tuple[int, int, int],
    *,
    n_options: int = 4,
    random_shape: tuple[int, int] | None = None,
) -> Item:
    def works() -> tuple[Work, Work]:
        lm = setting.lm if random_shape is None else random_model(*random_shape)
        encoded = prompts(lm, *shape, n_options)
        return partial(neurgrad, lm, encoded), Forward(lm, encoded)

    return compared(setting, name, OWN, "s a prompt", works, units=(shape[0], shape[0]))


def random_model(n_layers: int, n_neurons: int) -> LanguageModel:
    """Make a model with random weights."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=n_neurons, num_hidden_layers=n_layers, num_attention_heads=4,
        vocab_size=2000, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    lm = checked(wrap_model(model, tiny_tokenizer(), name="random", revision="random", site="paper"))
    return replace(lm, prefixes=Prefixes())
