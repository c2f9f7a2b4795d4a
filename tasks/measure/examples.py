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

_BY_ITSELF = re.compile(r"^: prompt 0(?=[ :])")
"""Name of a prompt that is read by itself, which is known by its row's id here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedExample(Example):
    """An example with the token ids that one model reads."""

    token_ids: NDArray[np.int32] = field(compare=False, repr=False)
    """Ids of the prompt, shape (T,)."""
    label_ids: NDArray[np.int32] = field(compare=False, repr=False)
    """Id of every option's label, shape (O,)."""


def encode_examples(
    card: ModelCard, where: str, examples: Sequence[Example], remedy: str = ""
) -> tuple[EncodedExample, ...]:
    """Return examples with their token ids.

    Raises
    ------
    NegError
        If the model cannot read a prompt or a label; the message says `where`, names the first such row and its place,
        and ends in the remedy.
    """
    try:
        encoded = encode(card, [example.prompt for example in examples], [example.labels for example in examples])
    except NegError as error:
        reason = in_one_line(unreadable(card, examples) or {"": f"{error}"})
        raise type(error)(f"{where}, model {card.name}: {reason}{remedy}") from None
    return tuple(
        EncodedExample(**asdict(example), token_ids=np.array(ids, np.int32), label_ids=label_ids.astype(np.int32))
        for example, ids, label_ids in zip(examples, encoded.ids, encoded.label_ids_PO, strict=True)
    )


def unreadable(card: ModelCard, examples: Sequence[Example]) -> dict[str, str]:
    """Return why a model cannot read some examples, each by itself: reasons by id, which name the row and its place."""
    reasons: dict[str, str] = {}
    for example in in_file_order(examples):
        try:
            encode(card, [example.prompt], [example.labels])
        except NegError as error:
            reasons[example.id] = f"{example.named}{_BY_ITSELF.sub('', f': {error}')}"
    return reasons


def encoded_prompts(examples: Sequence[EncodedExample]) -> EncodedPrompts:
    """Return the token ids of examples as measurements take them."""
    label_ids_PO = np.array([example.label_ids for example in examples], np.int64)
    return EncodedPrompts([example.token_ids.tolist() for example in examples], label_ids_PO)


def answers_of(examples: Sequence[EncodedExample]) -> NDArray[np.int64]:
    """Return the index of every example's right option: shape (P,)."""
    return np.array([example.answer for example in examples], np.int64)


def without_labels(ids: Sequence[list[int]]) -> EncodedPrompts:
    """Return token ids of prompts that are only read, as measurements take them."""
    return EncodedPrompts(list(ids), np.empty((len(ids), 0), np.int64))
