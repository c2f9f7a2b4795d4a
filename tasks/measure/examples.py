"""Examples as one model reads them: the plan makes their token ids, and the jobs take them along."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from negcore.datasets import Example
from negcore.errors import NegError
from negcore.model.encoding import EncodedPrompts, encode
from negcore.model.language_model import ModelCard


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedExample(Example):
    """An example with the token ids that one model reads."""

    token_ids: NDArray[np.int32] = field(compare=False, repr=False)
    """Ids of the prompt, shape (T,)."""
    label_ids: NDArray[np.int32] = field(compare=False, repr=False)
    """Id of every option's label, shape (O,)."""


def encode_examples(card: ModelCard, where: str, examples: Sequence[Example]) -> tuple[EncodedExample, ...]:
    """Return examples with their token ids.

    Raises
    ------
    NegError
        If the model cannot read a prompt or a label; the message says `where`.
    """
    try:
        encoded = encode(card, [example.prompt for example in examples], [example.labels for example in examples])
    except NegError as error:
        raise type(error)(f"{where}, model {card.name}: {error}") from None
    return tuple(
        EncodedExample(**asdict(example), token_ids=np.array(ids, np.int32), label_ids=label_ids.astype(np.int32))
        for example, ids, label_ids in zip(examples, encoded.ids, encoded.label_ids_PO, strict=True)
    )


def encoded_prompts(examples: Sequence[EncodedExample]) -> EncodedPrompts:
    """Return the token ids of examples as measurements take them."""
    label_ids_PO = np.array([example.label_ids for example in examples], np.int64)
    return EncodedPrompts([example.token_ids.tolist() for example in examples], label_ids_PO)
