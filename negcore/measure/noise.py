"""The noise in a model's numbers: what its number type, batches and tokenizer do to NEGs, on a small example.

Shapes: P prompts, O options (labels), L layers, N neurons a layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from negcore.arrays import Floats
from negcore.datasets import PromptSettings, load_dataset
from negcore.errors import ModelError, NegError
from negcore.findings import Finding, Judgement
from negcore.measure.loading import accept, settled
from negcore.measure.memory import is_out_of_memory
from negcore.measure.neurgrad import NeurGradBatch, neurgrad
from negcore.model.architectures import Dtype, SiteChoice
from negcore.model.check import COMPARED
from negcore.model.encoding import EncodedPrompts, encode
from negcore.model.language_model import LanguageModel, ModelCard, read_model
from negcore.model.precision import HALF_TYPES
from negcore.model.prompt_ids import PromptReader
from negcore.model.tokenizer_file import tokenizer_warning

_DATASET = "mini/fact"
_EACH = 3
"""Prompts without demonstrations, and as many with them, which are several times as long: the others are padded."""
_OTHER_TEXT = "In 1923, 45 of 678 people didn't know it:\n  the share is 9.5 %, or \u4e5d\u5206\u306e\u4e00."
"""Numbers, contractions, spaces and another script: what tokenizers cut in their own ways."""
_GOOD = 0.999, 1e-3
_USABLE = 0.95, 0.25
"""Least share of equal signs and largest relative error, of what is good and of what can be worked with."""
_LEAST_MASS = 0.5
_GAIN_NATS = 0.5
"""Gain in log-probability a token at which a model evidently expects a token in front."""


class Example(NamedTuple):
    """A few prompts of very different lengths."""

    texts: list[str]
    labels: list[tuple[str, ...]]

    def encoded(self, card: ModelCard) -> EncodedPrompts:
        return encode(card, self.texts, self.labels)


@dataclass(frozen=True, slots=True)
class Distance:
    """The distance of some NEGs and probabilities from those that they should be."""

    signs: float
    """Share of NEGs with the right sign."""
    error: float
    """Norm of the NEGs' errors, relative to that of the right NEGs."""
    shift: float
    """Largest difference of a label's probability."""

    @property
    def judgement(self) -> Judgement:
        return "good" if self._is_within(*_GOOD) else "look" if self._is_within(*_USABLE) else "bad"

    def _is_within(self, signs: float, error: float) -> bool:
        return self.signs >= signs and self.error <= error

    def __str__(self) -> str:
        """Tell it in one line."""
        if not np.isfinite(self.error) or not np.isfinite(self.shift):
            return "numbers that are not finite"
        share = "all" if self.signs == 1 else f"{min(100 * self.signs, 99.99):.2f} % of"
        signs = f"{share} NEGs have the same sign"
        return f"{signs}, NEGs are off by {self.error:.1e} (relative), probabilities by at most {self.shift:.1e}"


def distance(measured: NeurGradBatch, right: NeurGradBatch) -> Distance:
    """Compare NEGs and probabilities of the same prompts and labels with right ones.

    A layer in which a prompt is routed to other experts has other neurons, and is left out.
    """
    one, other = (batch.negs_POLN.astype(np.float64) for batch in (measured, right))
    if measured.experts_PLK is not None and right.experts_PLK is not None:
        is_same_PL = (measured.experts_PLK == right.experts_PLK).all(-1)
        one, other = (negs_POLN.swapaxes(1, 2)[is_same_PL] for negs_POLN in (one, other))
    error = np.linalg.norm(one - other) / max(float(np.linalg.norm(other)), np.finfo(np.float64).tiny)
    return Distance(
        signs=float((np.sign(one) == np.sign(other)).mean()),
        error=float(error),
        shift=float(np.abs(measured.probs_PO.astype(np.float64) - right.probs_PO).max()),
    )


def examine_model(
    card: ModelCard,
    *,
    dtype: Dtype = "float32",
    exact: Dtype = "float64",
    device: str | None = None,
    site: SiteChoice = "paper",
) -> Iterator[Finding]:
    """Examine how far a model's numbers can be trusted, and what to set.

    Parameters
    ----------
    card : ModelCard
    dtype : {"float32", "bfloat16", "float16", "float64"}
        Number type that the model is to be run in: noise in it is bad, in others only worth a look.
    exact : {"float64", "float32"}
        Number type whose numbers are taken for right.
    device, site
        As for `load_model`.

    Yields
    ------
    Finding
        Of tokenizer, check at load, BOS, label mass, batches and number types, each as soon as it is known. After a
        finding that makes the rest meaningless there are no more.

    Raises
    ------
    ModelError
        If the model cannot be loaded.
    """
    try:
        example = _example(card)
        encoded = example.encoded(card)
    except NegError as error:
        yield Finding(
            "example", "bad", f"{_DATASET} cannot be asked: {error}", "see neg datasets mini/fact --model ..."
        )
        return
    yield _tokenizer(card, example.texts)
    lm = settled(read_model(card, dtype=dtype, device=device, site=site))
    yield from _checks(lm)
    if not _is_accepted(lm):
        return
    yield _front(lm, example)
    alone = neurgrad(lm, encoded, batch_size=1)
    yield _label_mass(alone.probs_PO)
    yield _batches(lm, alone, neurgrad(lm, encoded, batch_size=len(encoded.ids)))
    del lm
    known: dict[Dtype, NeurGradBatch] = {dtype: alone}
    yield from _types(card, encoded, known, dtype, exact, device, site)


def _example(card: ModelCard) -> Example:
    both = (PromptSettings(limit=_EACH), PromptSettings(limit=_EACH, shots=1))
    loaded = [load_dataset(_DATASET, card.tokenizer, settings=one, masked=card.arch.masked) for one in both]
    rows = [row for dataset in loaded for row in dataset.splits["test"]]
    return Example([row.prompt for row in rows], [tuple(row.labels) for row in rows])


# The tokenizer


def _tokenizer(card: ModelCard, texts: Sequence[str]) -> Finding:
    warning = tokenizer_warning(card, [_OTHER_TEXT, *texts])
    if warning:
        return Finding("tokenizer", "look", warning, "use the transformers version that the model was published with")
    return Finding("tokenizer", "good", f"{type(card.tokenizer).__name__} reads texts as the model's own file does")


def _front(lm: LanguageModel, example: Example) -> Finding:
    """Look for the token that begins every text: once, if the model knows it that way."""
    tokenizer = lm.tokenizer
    first = tokenizer.cls_token_id if lm.arch.masked else tokenizer.bos_token_id
    if first is None:
        return Finding("BOS", "good", "the tokenizer has none")
    word = repr(str(tokenizer.convert_ids_to_tokens(first)))
    counts = {_n_leading(ids, first) for ids in example.encoded(lm.card).ids}
    if max(counts) > 1:
        advice = "mend the tokenizer's template, which puts it there more than once"
        return Finding("BOS", "bad", f"prompts begin with {word} {max(counts)} times", advice)
    if counts == {1}:
        return Finding("BOS", "good", f"every prompt begins with {word}, once")
    gain = 0.0 if lm.arch.masked else _gain(lm, example.texts, first)
    effect = f"it would change the log-probability of a prompt's tokens by {gain:+.2f} each"
    found = f"the tokenizer puts no {word} in front; {effect}"
    if gain > _GAIN_NATS:
        return Finding("BOS", "look", found, f"the model seems to expect it: begin prompts with {word}")
    return Finding("BOS", "good", found)


def _n_leading(ids: Sequence[int], token: int) -> int:
    return next((n for n, one in enumerate(ids) if one != token), len(ids))


def _gain(lm: LanguageModel, texts: Sequence[str], first: int) -> float:
    """Return the mean gain of the texts' tokens behind the first, in nats, by a token in front of the text."""
    bodies = PromptReader(lm.tokenizer).read(texts)
    with_it, without = (np.concatenate([_log_probs(lm, ids, front) for ids in bodies]) for front in ([first], []))
    return float((with_it - without).mean())


def _log_probs(lm: LanguageModel, ids: Sequence[int], front: Sequence[int]) -> Floats:
    """Return the log-probabilities of a text's tokens but the first."""
    tokens = torch.tensor([[*front, *ids]], device=lm.device)
    with torch.no_grad():
        logits_TV = lm.model(input_ids=tokens).logits[0].double()
    of_next_T = logits_TV.log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    log_probs: Floats = of_next_T[len(front) :].cpu().numpy()
    return log_probs


# The check at load


def _checks(lm: LanguageModel) -> Iterator[Finding]:
    """Return a finding for every comparison of the check: attention, gradients, batches, prefixes, sweeps."""
    assert lm.check is not None
    advice = "--dtype float32: in a half type rounding alone can do that" if lm.dtype in HALF_TYPES else ""
    for one in lm.check.comparisons:
        judgement: Judgement = "good" if one.passed else "look" if _is_accepted(lm) else "bad"
        told = str(one).removeprefix(f"{COMPARED[one.name]}: ")
        yield Finding(f"check: {COMPARED[one.name]}", judgement, told, "" if one.passed else advice)
    for line in lm.check.replaced:
        yield Finding("check: a slower way", "look", line)


def _is_accepted(lm: LanguageModel) -> bool:
    try:
        accept(lm)
        lm.require("neurgrad")
    except ModelError:
        return False
    return True


# The numbers


def _label_mass(probs_PO: Floats) -> Finding:
    mass_P = probs_PO.sum(axis=1, dtype=np.float64)
    without, with_shot = (float(part.mean()) for part in (mass_P[:_EACH], mass_P[_EACH:]))
    found = f"{without:.2f} of the probability lies on the labels, {with_shot:.2f} with a demonstration of each"
    if without >= _LEAST_MASS:
        return Finding("label mass", "good", found)
    helps = with_shot >= _LEAST_MASS
    return Finding(
        "label mass", "look", found, f"{'' if helps else 'another --wording, --prompt-format chat or '}--shots 1"
    )


def _batches(lm: LanguageModel, alone: NeurGradBatch, together: NeurGradBatch) -> Finding:
    apart = distance(together, alone)
    found = f"{len(alone.probs_PO)} prompts of other lengths in one batch against one by one: {apart}"
    advice = "" if apart.judgement == "good" else "--dtype float32, or --batch-size 1 where numbers must be repeated"
    return Finding("batch and padding", apart.judgement, found, advice)


def _types(
    card: ModelCard,
    encoded: EncodedPrompts,
    known: dict[Dtype, NeurGradBatch],
    dtype: Dtype,
    exact: Dtype,
    device: str | None,
    site: SiteChoice,
) -> Iterator[Finding]:
    """Compare number types with the exact one; what is not asked for can at most be worth a look."""

    def measured(one: Dtype) -> NeurGradBatch:
        if one not in known:
            lm = settled(read_model(card, dtype=one, device=device, site=site))
            known[one] = neurgrad(lm, encoded, batch_size=1)
        return known[one]

    compared: list[Dtype] = [one for one in ("float32", "bfloat16", "float16") if one != exact]
    for one in dict.fromkeys([dtype, *compared]) if dtype != exact else compared:
        try:
            apart = distance(measured(one), measured(exact))
        except Exception as error:  # of whichever kind: a type that a device does not know is asked about here
            if not isinstance(error, NegError) and not is_out_of_memory(error) and one == dtype:
                raise
            advice = "--dtype float32" if one in HALF_TYPES else ""
            yield Finding(f"{one} against {exact}", "look", f"they could not be compared: {error}", advice)
            continue
        yield Finding(f"{one} against {exact}", *_judged(one, dtype, apart))


def _judged(one: Dtype, dtype: Dtype, apart: Distance) -> tuple[Judgement, str, str]:
    is_good = apart.judgement == "good"
    advice = "" if is_good or one not in HALF_TYPES else "--dtype float32"
    return apart.judgement if is_good or one == dtype else "look", f"{apart}", advice
