"""Prompts and labels as token ids, checked before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negcore.errors import LabelError, PromptError
from negcore.model.language_model import ModelCard

Labels = Sequence[str] | Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Prompts and their labels as token ids of one model; measurements take them in place of the texts."""

    ids: list[list[int]]
    """Token ids of every prompt."""
    label_ids_PO: NDArray[np.int64]
    """Token id of every label."""


def encode(card: ModelCard, prompts: Sequence[str] | EncodedPrompts, labels: Labels | None = None) -> EncodedPrompts:
    """Return prompts and labels as checked token ids; encoded ones are returned as they are.

    Raises
    ------
    PromptError, LabelError
        As for `encode_prompts` and `encode_labels`; LabelError too if labels are given beside encoded prompts.
    """
    if not isinstance(prompts, EncodedPrompts):
        return EncodedPrompts(encode_prompts(card, prompts), encode_labels(card.tokenizer, labels or [], len(prompts)))
    if labels is not None:
        raise LabelError(f"labels {labels!r:.80} were given beside encoded prompts, which hold theirs; leave them out")
    return prompts


def encode_targets(
    card: ModelCard, prompts: Sequence[str] | EncodedPrompts, labels: str | Sequence[str] | None = None
) -> EncodedPrompts:
    """Return prompts with one target label each as checked token ids: shape (P, 1).

    Parameters
    ----------
    labels : str, or sequence of str, length P
        The target of all prompts or of each.

    Raises
    ------
    PromptError, LabelError
        As for `encode`; LabelError too if there is not one label for each prompt.
    """
    if not isinstance(prompts, EncodedPrompts):
        return encode(card, prompts, _one_label_each(labels, len(prompts)))
    encoded = encode(card, prompts, labels)
    if encoded.label_ids_PO.shape[1] != 1:
        raise LabelError(f"encoded prompts have {encoded.label_ids_PO.shape[1]} labels each; give one target a prompt")
    return encoded


def encode_prompts(card: ModelCard, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of prompts, with the special tokens that the tokenizer adds by itself.

    Raises
    ------
    PromptError
        If there is no prompt, or a prompt is empty, is longer than the model's context, or (masked models) does not
        hold exactly one mask. Nothing is ever truncated.
    """
    if not prompts:
        raise PromptError("no prompts were given; at least one is needed")
    ids = card.tokenizer(list(prompts), truncation=False)["input_ids"]
    for index, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True)):
        _check_prompt(card, index, prompt, tokens)
    return [list(tokens) for tokens in ids]


def encode_labels(tokenizer: Any, labels: Labels, n_prompts: int) -> NDArray[np.int64]:
    """Return the token id of every label, encoded exactly as given, without special tokens.

    Parameters
    ----------
    labels : sequence of str, or sequence of such sequences
        One list for all prompts, or one list of the same length for each.

    Returns
    -------
    int array of shape (P, O)

    Raises
    ------
    LabelError
        If a label is not exactly one known token, two labels of a prompt share a token, or the lists do not fit.
    """
    per_prompt = _per_prompt(labels, n_prompts)
    known: dict[str, int] = {}
    for label in dict.fromkeys(label for row in per_prompt for label in row):
        known[label] = label_id(tokenizer, label)
    for row in dict.fromkeys(per_prompt):
        _check_distinct({label: known[label] for label in row}, row)
    return np.array([[known[label] for label in row] for row in per_prompt], dtype=np.int64)


def label_id(tokenizer: Any, label: str) -> int:
    """Return the id of a label, which must be exactly one known token.

    Raises
    ------
    LabelError
        If it is not; the message names the label and the ids it became.
    """
    ids = tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise LabelError(
            f"label {label!r} is {len(ids)} tokens of this model (ids {list(ids)}); a label must be exactly one, "
            "and a leading space is part of it"
        )
    if ids[0] == getattr(tokenizer, "unk_token_id", None):
        raise LabelError(f"label {label!r} is unknown to this model's tokenizer (id {ids[0]})")
    return int(ids[0])


def _check_prompt(card: ModelCard, index: int, prompt: str, tokens: Sequence[int]) -> None:
    where = f"prompt {index}"  # without its text, because messages end up in logs and on pages
    if not tokens or not prompt:
        raise PromptError(f"{where} is empty; a prompt needs at least one token")
    if len(tokens) > card.context_tokens:
        raise PromptError(
            f"{where} has {len(tokens)} tokens, but {card.name} reads at most {card.context_tokens}; "
            "shorten it or use fewer demonstrations"
        )
    if card.arch.masked and list(tokens).count(card.tokenizer.mask_token_id) != 1:
        found = list(tokens).count(card.tokenizer.mask_token_id)
        raise PromptError(f"{where} has {found} masks; {card.name} needs exactly one {card.tokenizer.mask_token}")


def _per_prompt(labels: Labels, n_prompts: int) -> list[tuple[str, ...]]:
    if isinstance(labels, str) or not labels:
        raise LabelError(f"labels {labels!r}: give a list of strings, or one such list for each prompt")
    if all(isinstance(label, str) for label in labels):
        return [tuple(str(label) for label in labels)] * n_prompts
    rows = [tuple(row) for row in labels]
    if len(rows) != n_prompts:
        raise LabelError(f"{len(rows)} label lists were given for {n_prompts} prompts; give one for each")
    sizes = sorted({len(row) for row in rows})
    if len(sizes) != 1 or sizes[0] == 0 or any(isinstance(row, str) for row in labels):
        raise LabelError(f"label lists have {sizes} entries; every prompt needs the same number of labels")
    return rows


def _check_distinct(known: dict[str, int], labels: tuple[str, ...]) -> None:
    first: dict[int, str] = {}
    for label in labels:
        token = known[label]
        if token in first:
            raise LabelError(f"labels {first[token]!r} and {label!r} are the same token (id {token}) of this model")
        first[token] = label


def _one_label_each(labels: str | Sequence[str] | None, n_prompts: int) -> list[list[str]]:
    each = [labels] * n_prompts if isinstance(labels, str) else list(labels or [])
    if len(each) != n_prompts:
        raise LabelError(f"{len(each)} labels were given for {n_prompts} prompts; give one string, or one for each")
    for index, label in enumerate(each):
        if not isinstance(label, str):
            raise LabelError(f"label {label!r} of prompt {index} is not a string; give one target a prompt")
    return [[label] for label in each]
