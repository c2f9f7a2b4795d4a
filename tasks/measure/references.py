"""The prompts from which neurons take another value in patching: the reference of each prompt of a study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np

from negcore.arrays import Floats, Ints
from negcore.errors import DatasetError, NegError
from negcore.measure.spread import activation_spreads
from negcore.model.encoding import encode_prompts
from negcore.model.language_model import LanguageModel, ModelCard
from negcore.store.identity import content_digest
from tasks.measure.examples import EncodedExample

ReferenceKind = Literal["counterfactual", "drawn", "all"]

_SPREADS: WeakKeyDictionary[LanguageModel, dict[str, Floats]] = WeakKeyDictionary()
"""Spreads that were read, of each model by what they are of."""


@dataclass(frozen=True)
class References:
    """Prompts whose activations take the place of others'."""

    kind: ReferenceKind
    """`counterfactual`: of the dataset; `drawn`: another prompt of the study, at random; `all`: the whole study."""
    ids: Mapping[str, list[int]]
    """Token ids by the id of the example that they are for; of all examples where the kind is `all`."""

    def of(self, examples: Sequence[EncodedExample]) -> list[list[int]]:
        """Return the references that these examples need."""
        return list(self.ids.values()) if self.kind == "all" else [self.ids[example.id] for example in examples]

    def spreads(self, lm: LanguageModel, neurons_K2: Ints) -> Floats:
        """Return the standard deviation of neurons' activations over these prompts: shape (K,).

        Every shard needs the same, so they are kept as long as the model is.
        """
        kept = _SPREADS.setdefault(lm, {})
        which = content_digest([list(self.ids.values()), neurons_K2.tolist()])
        if which not in kept:
            kept[which] = activation_spreads(lm, list(self.ids.values()), neurons_K2)
        return kept[which]


def all_prompts(examples: Sequence[EncodedExample]) -> References:
    """Return every prompt of a study, to take means over."""
    return References("all", {example.id: example.token_ids.tolist() for example in examples})


def partners(card: ModelCard, dataset: str, examples: Sequence[EncodedExample], seed: int) -> References:
    """Pair each prompt with its counterfactual or, in a dataset without, with another prompt, drawn at random.

    Raises
    ------
    DatasetError
        If only some rows have a counterfactual, or one is the prompt itself or has another number of tokens.
    NegError
        If there is one prompt without a counterfactual.
    """
    given = [example for example in examples if example.counterfactual]
    if not given:
        return _drawn(examples, seed)
    for example in examples:
        if not example.counterfactual:
            raise DatasetError(
                f"{dataset}: {example.named} has no counterfactual, and {len(given)} of {len(examples)} rows have one; "
                "give every row its own, or none"
            )
    return References("counterfactual", {example.id: _counterfactual(card, dataset, example) for example in examples})


def _counterfactual(card: ModelCard, dataset: str, example: EncodedExample) -> list[int]:
    """Return the token ids of one row's counterfactual."""
    try:
        (ids,) = encode_prompts(card, [example.counterfactual])
    except NegError as error:
        reason = str(error).removeprefix("prompt 0 ")
        raise DatasetError(f"{dataset}, model {card.name}: the counterfactual of {example.named} {reason}") from None
    if len(ids) != len(example.token_ids):
        raise DatasetError(
            f"{dataset}, model {card.name}: the counterfactual of {example.named} has {len(ids)} tokens and its prompt "
            f"{len(example.token_ids)}; a pair is compared token by token, so word both with as many tokens of every "
            "model, or leave the row out"
        )
    if ids == example.token_ids.tolist():
        raise DatasetError(
            f"{dataset}, model {card.name}: the counterfactual of {example.named} is its prompt itself; nothing would "
            "be replaced"
        )
    return ids


def _drawn(examples: Sequence[EncodedExample], seed: int) -> References:
    """Draw a circle of all prompts; each prompt's reference is the next one."""
    if len(examples) == 1:
        raise NegError(
            "one prompt has no other from which activations could be drawn; measure more prompts, or give facts with "
            "counterfactuals"
        )
    order = np.random.default_rng(seed).permutation(len(examples))
    pairs = zip(order.tolist(), np.roll(order, -1).tolist(), strict=True)
    following = {one: examples[other].token_ids.tolist() for one, other in pairs}
    return References("drawn", {example.id: following[index] for index, example in enumerate(examples)})
