"""Examples as one model reads them: the plan makes their token ids, and the jobs take them along."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from negcore.datasets import Example
from negcore.datasets.base import in_file_order, in_one_line
from negcore.errors import NegError
from negcore.model.encoding import EncodedPrompts, encode
from negcore.model.language_model import ModelCard
from negcore.model.prompt_ids import AnswerKind

_BY_ITSELF = re.compile(r"^: prompt 0(?=[ :])")
"""Name of a prompt that is read by itself, which is known by its row's id here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedExample(Example):
    """An example with the token ids that one model reads."""

    token_ids: NDArray[np.int32] = field(compare=False, repr=False)
    """Ids of the prompt, shape (T,)."""
    label_ids: NDArray[np.int32] = field(compare=False, repr=False)
    """Id of every option's label, shape (O,); the first, where labels may be several tokens."""
    label_tokens: tuple[tuple[int, ...], ...] | None = field(default=None, compare=False, repr=False)
    """Ids of every option's label, where labels may be several tokens."""
    probed: int | None = field(default=None, compare=False, repr=False)
    """Place of the probed token, if the row names one."""


def encode_examples(
    card: ModelCard, where: str, examples: Sequence[Example], remedy: str = "", *, answers: AnswerKind = "token"
) -> tuple[EncodedExample, ...]:
    """Return examples with their token ids.

    Raises
    ------
    NegError
        If the model cannot read a prompt or a label; the message says `where`, names the first such row and its place,
        and ends in the remedy.
    """
    try:
        encoded = _encode(card, examples, answers)
    except NegError as error:
        reason = in_one_line(unreadable(card, examples, answers) or {"": f"{error}"})
        raise type(error)(f"{where}, model {card.name}: {reason}{remedy}") from None
    tokens_PO = encoded.label_tokens_PO
    return tuple(
        EncodedExample(
            **asdict(example),
            token_ids=np.array(encoded.ids[index], np.int32),
            label_ids=encoded.label_ids_PO[index].astype(np.int32),
            label_tokens=None if tokens_PO is None else tuple(map(tuple, tokens_PO[index])),
            probed=None if encoded.probed_P is None or example.probe_end is None else int(encoded.probed_P[index]),
        )
        for index, example in enumerate(examples)
    )


def _encode(card: ModelCard, examples: Sequence[Example], answers: AnswerKind) -> EncodedPrompts:
    prompts, labels = [example.prompt for example in examples], [example.labels for example in examples]
    return encode(card, prompts, labels, probe_at=[example.probe_end for example in examples], answers=answers)


def unreadable(card: ModelCard, examples: Sequence[Example], answers: AnswerKind = "token") -> dict[str, str]:
    """Return why a model cannot read some examples, each by itself: reasons by id, which name the row and its place."""
    reasons: dict[str, str] = {}
    for example in in_file_order(examples):
        try:
            _encode(card, [example], answers)
        except NegError as error:
            reasons[example.id] = f"{example.named}{_BY_ITSELF.sub('', f': {error}')}"
    return reasons


def encoded_prompts(examples: Sequence[EncodedExample]) -> EncodedPrompts:
    """Return the token ids of examples as measurements take them."""
    label_ids_PO = np.array([example.label_ids for example in examples], np.int64)
    ids = [example.token_ids.tolist() for example in examples]
    tokens_PO = [[list(tokens) for tokens in example.label_tokens or ()] for example in examples]
    probed = [len(example.token_ids) - 1 if example.probed is None else example.probed for example in examples]
    return EncodedPrompts(
        ids,
        label_ids_PO,
        probed_P=np.array(probed, np.int64) if any(example.probed is not None for example in examples) else None,
        label_tokens_PO=tokens_PO if any(tokens_PO) else None,
    )


def refuse_unusual(examples: Sequence[EncodedExample], what: str) -> None:
    """Refuse examples that name a probed token, or have answers of several tokens; see `EncodedPrompts`."""
    encoded_prompts(examples).refuse_unusual(what)


def answers_of(examples: Sequence[EncodedExample]) -> NDArray[np.int64]:
    """Return the index of every example's right option: shape (P,)."""
    return np.array([example.answer for example in examples], np.int64)


def without_labels(ids: Sequence[list[int]]) -> EncodedPrompts:
    """Return token ids of prompts that are only read, as measurements take them."""
    return EncodedPrompts(list(ids), np.empty((len(ids), 0), np.int64))
