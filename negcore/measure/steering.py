"""Steering: shift chosen neurons while a model writes an answer, and compare it with the answer it writes unshifted.

A shift of size d moves a neuron's activation a to a + d * s(a), with s(a) = +1 where a > 0 and -1 elsewhere, as in
every other measurement. It is made at the prompt's last token and at every written token that the model reads; the
tokens of the prompt before its last one are left alone. Activations, and so the directions away from zero, are those
of the unshifted model reading the same tokens: its first token is the one that interventions and causal checks
predict, and shifts of earlier layers turn no direction round.

Of a mixture of experts, those of the chosen neurons are shifted that a token has, unshifted: those of the experts that
it is routed to. Where shifts lead the router away from one of these, there is nothing of it to shift.

Shapes: L layers, N neurons a layer (with experts: those of a token), K shifted neurons, S steered tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from negcore.errors import ModelError, NegError, PromptError
from negcore.measure.active import experts_of
from negcore.measure.forward import CausalBatch, run_prefix, stacked_layers
from negcore.measure.hooks import Readings, tapped
from negcore.measure.interventions import JointShift
from negcore.measure.neurgrad import away_from_zero
from negcore.measure.sweeps import choose_neurons
from negcore.model.encoding import encode_prompts
from negcore.model.experts import Routing
from negcore.model.language_model import LanguageModel

Shift = tuple[int, int, float]
"""Layer, neuron, and size in units of activation; a positive size is away from zero."""


@dataclass(frozen=True)
class Answer:
    """The text that a model wrote behind a prompt."""

    text: str
    """Without the special tokens."""
    ids: list[int]
    """Token ids, without the one that ended it."""
    probs: list[float]
    """Probability of each token when it was written, softmax over the whole vocabulary."""
    is_ended: bool
    """True if the model ended it, False if it has the most tokens that were allowed."""


class SteeredAnswer(NamedTuple):
    """The answers to one prompt."""

    prompt: str
    before: Answer
    """Without a shift."""
    after: Answer
    """With the neurons shifted."""


def steer(
    lm: LanguageModel, prompts: Sequence[str], shifts: Sequence[Shift], *, max_tokens: int = 20
) -> list[SteeredAnswer]:
    """Let a model answer prompts with and without some of its neurons shifted; it always writes the likeliest token.

    A shift of size d moves a neuron's activation a to a + d * s(a), with s(a) = +1 where a > 0 and -1 elsewhere. It is
    made at the site of `lm`, at the prompt's last token and at every written token that the model reads. Directions
    are those of the unshifted model reading the same tokens. A size of zero changes nothing, exactly.

    Parameters
    ----------
    lm : LanguageModel
        A model of the next token. It writes in its own number type.
    prompts : sequence of str
    shifts : sequence of (layer, neuron, size)
        Sizes in units of activation, made together. A saved probe gives those of its neurons: see `SavedProbe.shifts`.
    max_tokens : int
        Most tokens of an answer; it ends earlier where the model ends it.

    Returns
    -------
    list of SteeredAnswer
        In the order of `prompts`, each computed by itself.

    Raises
    ------
    ModelError
        If the model predicts a masked token.
    PromptError
        If a prompt is empty, or with the answer longer than the model's context.
    NegError
        If there are no shifts, a neuron does not exist or is given twice, a size is not finite, or the shifts are so
        large that the model's logits are not finite.

    Examples
    --------
    >>> from negcore import load_model, load_probe, steer
    >>> probe = load_probe("RUN/probes/model=smollm2-135m/dataset=agnews/magn.safetensors")
    >>> steer(load_model("smollm2-135m"), ["The capital of France is"], probe.shifts(2.0))  # doctest: +SKIP
    """
    return list(steered_answers(lm, prompts, shifts, max_tokens=max_tokens))


def steered_answers(
    lm: LanguageModel, prompts: Sequence[str], shifts: Sequence[Shift], *, max_tokens: int
) -> Iterator[SteeredAnswer]:
    """Return the answers of `steer` one by one; everything is checked at once, before the first of them.

    Raises
    ------
    ModelError, PromptError, NegError
        As for `steer`.
    """
    if lm.arch.masked:
        raise ModelError(f"{lm.card.name} fills in masks and writes no answers: steer a model of the next token")
    if max_tokens < 1:
        raise NegError(f"max_tokens {max_tokens} leaves no answer; give at least 1")
    joint = joint_shift(lm, shifts)
    encoded = encode_prompts(lm.card, prompts)
    most = lm.card.context_tokens
    for number, tokens in enumerate(encoded):
        if len(tokens) + max_tokens - 1 > most:  # the last written token is not read
            raise PromptError(
                f"prompt {number} has {len(tokens)} tokens: with an answer of {max_tokens} it is longer than the "
                f"context of {lm.card.name} ({most}); shorten it, or ask for fewer tokens"
            )
    return (
        SteeredAnswer(prompt, *_answers(lm, tokens, joint, max_tokens))
        for prompt, tokens in zip(prompts, encoded, strict=True)
    )


def joint_shift(lm: LanguageModel, shifts: Sequence[Shift]) -> JointShift:
    """Return shifts as the row that `shift_together` makes, which tells what they do to the options of prompts.

    Raises
    ------
    NegError
        As for `steer`.
    """
    try:
        neurons = np.array([(layer, neuron) for layer, neuron, _ in shifts])
        sizes_K = np.array([size for _, _, size in shifts], np.float64)
    except (TypeError, ValueError):
        raise NegError(f"{shifts!r:.80} is no list of (layer, neuron, size)") from None
    if not len(sizes_K):
        raise NegError("no shifts were given; give a list of (layer, neuron, size)")
    for size in sizes_K[~np.isfinite(sizes_K)]:
        raise NegError(f"a shift of {size} cannot be made; give finite sizes")
    layers_K, neurons_K = choose_neurons(lm, neurons).T
    return JointShift(layers_K, neurons_K, sizes_K)


@torch.no_grad()
def _answers(lm: LanguageModel, tokens: Sequence[int], joint: JointShift, max_tokens: int) -> list[Answer]:
    """Return the answers to a prompt without and with the shift, which share what comes before its last token."""
    before = _WholeReading(lm, tokens[:-1]) if lm.way == "whole" else _CachedReading(lm, tokens[:-1])
    return [_answer(before, tokens, one, max_tokens) for one in (None, joint)]


def _answer(before: "_Reading", tokens: Sequence[int], joint: JointShift | None, max_tokens: int) -> Answer:
    lm, plain, shifted = before.lm, copy(before), copy(before)
    ends, newest = _end_tokens(lm), tokens[-1]
    ids: list[int] = []
    probs: list[float] = []
    while len(ids) < max_tokens:
        seen = plain.read(newest)
        if joint is not None:
            seen = shifted.read(newest, _Steps.of(lm, joint, seen))
        newest, prob = _likeliest(seen.logits_V)
        if newest in ends:
            break
        ids.append(newest)
        probs.append(prob)
    return Answer(_text(lm, tokens, ids), ids, probs, is_ended=len(ids) < max_tokens)


class _Seen(NamedTuple):
    """The newest token of a text that was read."""

    logits_V: Tensor
    activations_LN: Tensor
    """Before a shift."""
    probed: Mapping[int, Routing]
    """Its experts, (1, K), by layer of experts."""
    routings: Mapping[int, Routing]
    """Of all tokens that ran."""


class _Steps(NamedTuple):
    """What is added to the neurons that a token has, unshifted."""

    steps_LN: Tensor
    probed: Mapping[int, Routing]
    """Experts of these neurons, (1, K)."""
    held: Mapping[int, Routing] | None
    """Routing to go by, of all tokens that run; None if the router is to see the shifts."""

    @classmethod
    def of(cls, lm: LanguageModel, joint: JointShift, seen: _Seen) -> Self:
        """Return the steps of a shift, from the token as it was read unshifted."""
        own, steps_LN = joint.among_active(lm, experts_of(seen.probed)), torch.zeros_like(seen.activations_LN)
        layers_K, places_K = (torch.from_numpy(places).to(steps_LN.device) for places in own[:2])
        sizes_K = torch.from_numpy(own.sizes_K).to(steps_LN)
        steps_LN[layers_K, places_K] = sizes_K * away_from_zero(seen.activations_LN[layers_K, places_K])
        return cls(steps_LN, seen.probed, seen.routings if lm.router == "fixed" else None)


def _likeliest(logits_V: Tensor) -> tuple[int, float]:
    """Return the likeliest token, of equally likely ones the first, and its probability."""
    logits = logits_V if logits_V.dtype == torch.float64 else logits_V.float()
    if not logits.isfinite().all():
        raise NegError("the model's logits are not finite with these shifts: take smaller sizes")
    token = int(logits.argmax())
    return token, float((logits[token] - logits.logsumexp(0)).exp())


def _end_tokens(lm: LanguageModel) -> set[int]:
    """Return the tokens that end an answer, as the model and its tokenizer name them."""
    named = getattr(lm.model.generation_config, "eos_token_id", None)
    return {lm.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}


def _text(lm: LanguageModel, tokens: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of an answer: what its tokens add to the text of the prompt's, spaces in front of it included."""

    def decoded(of: Sequence[int]) -> str:
        text: str = lm.tokenizer.decode(of, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    prompt, whole = decoded(tokens), decoded([*tokens, *ids])
    return whole.removeprefix(prompt) if whole.startswith(prompt) else decoded(ids)


class _Reading(ABC):
    """A text that a model reads token by token; of a copy, each reads on by itself."""

    def __init__(self, lm: LanguageModel, tokens: Sequence[int]) -> None:
        self.lm, self._tokens = lm, list(tokens)

    @abstractmethod
    def read(self, token: int, steps: _Steps | None = None) -> _Seen:
        """Read one more token with its neurons shifted; it stays so for the tokens behind it."""

    def _seen(self, output: Any, readings: Readings) -> _Seen:
        newest = [readings[layer][-1] for layer in range(self.lm.n_layers)]
        probed = {layer: routing.rows(slice(-1, None)) for layer, routing in readings.probed.items()}
        return _Seen(output.logits[0, -1], stacked_layers(self.lm, newest, dim=0), probed, readings.routings)


class _CachedReading(_Reading):
    """Every token runs once, on the keys and values of those before it."""

    def __init__(self, lm: LanguageModel, tokens: Sequence[int]) -> None:
        super().__init__(lm, tokens)
        self._before = run_prefix(lm, self._tokens)

    def read(self, token: int, steps: _Steps | None = None) -> _Seen:
        self._tokens = [*self._tokens, token]
        batch = CausalBatch(self.lm, [0], [self._tokens], self._before)
        shifts = {} if steps is None else dict(enumerate(steps.steps_LN[:, None]))
        held, probed = (None, None) if steps is None else (steps.held, steps.probed)
        with tapped(self.lm, batch.positions_B, shifts, routings=held, shifted=probed) as readings:
            output = batch.run_last(self.lm.model)
        self._before = output.past_key_values.grown()
        return self._seen(output, readings)


class _WholeReading(_Reading):
    """The text so far runs anew for every token, with the shifts that its tokens had."""

    def __init__(self, lm: LanguageModel, tokens: Sequence[int]) -> None:
        super().__init__(lm, tokens)
        self._n_unshifted = len(self._tokens)
        self._steps: list[_Steps] = []

    def read(self, token: int, steps: _Steps | None = None) -> _Seen:
        self._tokens = [*self._tokens, token]
        self._steps = [*self._steps, *([] if steps is None else [steps])]
        shifts = dict(enumerate(torch.stack([one.steps_LN for one in self._steps], dim=1))) if self._steps else {}
        positions_S = torch.arange(self._n_unshifted, len(self._tokens), device=self.lm.device)
        held, rows_S = steps.held if steps else None, torch.zeros_like(positions_S)
        with tapped(self.lm, positions_S, shifts, rows_B=rows_S, routings=held, shifted=self._shifted()) as readings:
            ids_1T = torch.tensor([self._tokens], device=self.lm.device)
            output: Any = self.lm.model(input_ids=ids_1T, use_cache=False)
        return self._seen(output, readings)

    def _shifted(self) -> dict[int, Routing]:
        """Return the experts of all steered tokens whose neurons are shifted."""
        layers = self._steps[0].probed if self._steps else ()
        parts = {layer: [one.probed[layer] for one in self._steps] for layer in layers}
        return {layer: Routing(*map(torch.cat, zip(*of, strict=True))) for layer, of in parts.items()}
