"""Prompts and labels as token ids, checked before anything is computed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from negcore.errors import LabelError, NegError, PromptError
from negcore.model.language_model import ModelCard
from negcore.model.prompt_ids import AnswerKind, PromptReader, end_of_piece
from negcore.texts import row_text

Labels = Sequence[str] | Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Prompts and their labels as token ids of one model; measurements take them in place of the texts."""

    ids: list[list[int]]
    """Token ids of every prompt."""
    label_ids_PO: NDArray[np.int64]
    """Token id of every label."""
    n_shared: int | None = None
    """Tokens that all prompts begin with, as they are run; None for as many as these prompts do."""
    probed_P: NDArray[np.int64] | None = None
    """Place of the token of each prompt whose neurons are read and shifted; None for the last one, or the mask."""
    label_tokens_PO: list[list[list[int]]] | None = None
    """Token ids of every label where labels may be several tokens: `label_ids_PO` then has the first of each."""

    @property
    def is_usual(self) -> bool:
        """True if neurons are read where the label follows (or at the mask), and every label is one token."""
        return self.probed_P is None and self.label_tokens_PO is None

    def refuse_unusual(self, what: str) -> None:
        """Refuse prompts with an answer of several tokens, or a probed token before their end.

        Parameters
        ----------
        what : str
            The name of what cannot measure them, in the plural.

        Raises
        ------
        NegError
        """
        if not self.is_usual:
            asked = "answers of several tokens" if self.label_tokens_PO is not None else "a token named by probe_at"
            raise NegError(
                f"{what} know no {asked}: NEGs, sweeps, interventions and causal checks do; leave out "
                f"{'answers: sequence' if self.label_tokens_PO is not None else 'probe_at'} for {what}"
            )


def encode(
    card: ModelCard,
    prompts: Sequence[str] | EncodedPrompts,
    labels: Labels | None = None,
    *,
    probe_at: Sequence[str | int | None] | None = None,
    answers: AnswerKind = "token",
) -> EncodedPrompts:
    """Return prompts and labels as checked token ids; encoded ones are returned as they are.

    A label's id is what the tokenizer makes of it in its place, see `negcore.model.prompt_ids`.

    Parameters
    ----------
    labels : sequence of str, or sequence of such sequences
        One list for all prompts, or one list of the same length for each. A leading space is part of a label.
    probe_at : sequence of str, int or None, length P, optional
        A piece of each prompt that stands in it once: neurons are read and shifted at the token that holds its last
        character. Or the number of characters up to there. None for the prompt's last token.
    answers : {"token", "sequence"}
        With "sequence", labels may be several tokens. The probability of a label is then that of its tokens one after
        the other.

    Raises
    ------
    PromptError
        As for `encode_prompts`; or if a piece stands in its prompt nowhere or twice, or no token holds its end.
    LabelError
        If a label is not exactly one known token in its place (or, with "sequence", some known tokens), two labels of
        a prompt share their tokens, the lists do not fit, or labels are given beside encoded prompts.
    """
    if isinstance(prompts, EncodedPrompts):
        if labels is None and probe_at is None and answers == "token":
            return prompts
        raise LabelError(
            f"labels {row_text(labels)} were given beside encoded prompts, which hold theirs; leave them out"
            if labels is not None
            else "probe_at or answers were given beside encoded prompts, which hold theirs; leave them out"
        )
    if answers not in get_args(AnswerKind):
        raise LabelError(f"answers {answers!r} is not known; choose one of {', '.join(get_args(AnswerKind))}")
    reader = PromptReader(card.tokenizer, masked=card.arch.masked)
    bodies = reader.read(prompts)
    ids = _checked_prompts(card, reader, prompts, bodies)
    per_prompt = _per_prompt(labels or [], len(prompts))
    probed_P = _probed(card, reader, prompts, bodies, ids, probe_at)
    if answers == "sequence":
        return _with_sequences(card, reader, prompts, bodies, ids, per_prompt, probed_P)
    found = reader.label_ids(prompts, bodies, per_prompt)
    checked = [
        _checked_labels(card, index, row, known)
        for index, (row, known) in enumerate(zip(per_prompt, found, strict=True))
    ]
    return EncodedPrompts(ids, np.array(checked, dtype=np.int64), probed_P=probed_P)


def _with_sequences(
    card: ModelCard,
    reader: PromptReader,
    prompts: Sequence[str],
    bodies: list[list[int]],
    ids: list[list[int]],
    per_prompt: list[tuple[str, ...]],
    probed_P: NDArray[np.int64] | None,
) -> EncodedPrompts:
    """Return prompts with labels of one or several tokens each."""
    if card.arch.masked:
        raise LabelError(
            f"answers 'sequence' needs a causal model and {card.name} is masked: one mask holds one token; choose "
            "answers 'token'"
        )
    found = reader.label_tokens(prompts, bodies, per_prompt)
    tokens_PO = [
        _checked_sequences(card, index, row, known, len(tokens))
        for index, (row, known, tokens) in enumerate(zip(per_prompt, found, ids, strict=True))
    ]
    first_PO = np.array([[tokens[0] for tokens in row] for row in tokens_PO], dtype=np.int64)
    return EncodedPrompts(ids, first_PO, probed_P=probed_P, label_tokens_PO=tokens_PO)


def _probed(
    card: ModelCard,
    reader: PromptReader,
    prompts: Sequence[str],
    bodies: list[list[int]],
    ids: list[list[int]],
    probe_at: Sequence[str | int | None] | None,
) -> NDArray[np.int64] | None:
    """Return the place of each prompt's probed token among its ids; None if none is named."""
    if probe_at is None or all(one is None for one in probe_at):
        return None
    if card.arch.masked:
        raise PromptError(
            f"probe_at needs a causal model and {card.name} is masked, whose neurons are read at its mask; leave "
            "probe_at out"
        )
    if isinstance(probe_at, str) or len(probe_at) != len(prompts):
        raise PromptError(f"probe_at {row_text(probe_at)}: give a list with a piece of each prompt, or None")
    probed_P = np.array([len(tokens) - 1 for tokens in ids], np.int64)
    named = [(index, _end(index, prompts[index], one)) for index, one in enumerate(probe_at) if one is not None]
    at, ends = [index for index, _ in named], [end for _, end in named]
    places = reader.probed_tokens([prompts[index] for index in at], [bodies[index] for index in at], ends)
    for index, found in zip(at, places, strict=True):
        if isinstance(found, PromptError):
            raise PromptError(f"prompt {index}: {found}")
        # Special tokens stand in front of a causal model's prompt, and none behind it.
        probed_P[index] = len(ids[index]) - len(bodies[index]) + found.place
    return probed_P


def _end(index: int, prompt: str, probe_at: str | int) -> int:
    if isinstance(probe_at, int):
        if not 1 <= probe_at <= len(prompt):
            raise PromptError(f"prompt {index}: probe_at {probe_at} is none of its {len(prompt)} characters")
        return probe_at
    try:
        return end_of_piece(prompt, probe_at)
    except PromptError as error:
        raise PromptError(f"prompt {index}: {error}") from None


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
    if isinstance(prompts, str):
        raise PromptError(f"{row_text(prompts)} was given for prompts; give a list of strings")
    if not isinstance(prompts, EncodedPrompts):
        return encode(card, prompts, _one_label_each(labels, len(prompts)))
    encoded = encode(card, prompts, labels)
    if encoded.label_ids_PO.shape[1] != 1:
        raise LabelError(f"encoded prompts have {encoded.label_ids_PO.shape[1]} labels each; give one target a prompt")
    return encoded


def encode_prompts(card: ModelCard, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of prompts, with the special tokens that the tokenizer puts around a text by itself.

    Those that a prompt begins with are not put there twice, and a causal model gets none at the end, where its
    prediction is read.

    Raises
    ------
    PromptError
        If there is no prompt, or a prompt is empty, is longer than the model's context, has a token that the model
        does not know, or (masked models) does not hold exactly one mask. Nothing is ever truncated.
    """
    reader = PromptReader(card.tokenizer, masked=card.arch.masked)
    return _checked_prompts(card, reader, prompts, reader.read(prompts))


def _checked_prompts(
    card: ModelCard, reader: PromptReader, prompts: Sequence[str], bodies: list[list[int]]
) -> list[list[int]]:
    if not prompts:
        raise PromptError("no prompts were given; at least one is needed")
    ids = reader.with_special_tokens(prompts, bodies)
    for index, (body, tokens) in enumerate(zip(bodies, ids, strict=True)):
        _check_prompt(card, index, body, tokens)
    return ids


def _checked_labels(card: ModelCard, index: int, labels: tuple[str, ...], found: list[int | LabelError]) -> list[int]:
    """Return the ids of one prompt's labels, none of which may be an error, strange to the model or a double."""
    known: dict[int, str] = {}
    for label, label_id in zip(labels, found, strict=True):
        if isinstance(label_id, LabelError):
            raise LabelError(f"prompt {index}: {label_id}")
        if label_id >= card.vocab_size:
            raise LabelError(f"prompt {index}: label {row_text(label)}: {_strange(card, label_id)}")
        if label_id in known:
            raise LabelError(
                f"labels {row_text(known[label_id])} and {row_text(label)} are the same token (id {label_id}) of this "
                "model"
            )
        known[label_id] = label
    return list(known)


def _checked_sequences(
    card: ModelCard, index: int, labels: tuple[str, ...], found: list[list[int] | LabelError], n_tokens: int
) -> list[list[int]]:
    """Return the token ids of one prompt's labels: none may be an error, strange to the model, too long or a double."""
    known: dict[tuple[int, ...], str] = {}
    for label, tokens in zip(labels, found, strict=True):
        if isinstance(tokens, LabelError):
            raise LabelError(f"prompt {index}: {tokens}")
        if max(tokens) >= card.vocab_size:
            raise LabelError(f"prompt {index}: label {row_text(label)}: {_strange(card, max(tokens))}")
        if n_tokens + len(tokens) - 1 > card.context_tokens:
            raise LabelError(
                f"prompt {index}: its {n_tokens} tokens and the {len(tokens)} of label {row_text(label)} are more than "
                f"{card.name} reads, {card.context_tokens}; shorten them or use fewer demonstrations"
            )
        if tuple(tokens) in known:
            raise LabelError(
                f"prompt {index}: labels {row_text(known[tuple(tokens)])} and {row_text(label)} are the same tokens "
                f"(ids {row_text(tokens)}) of this model"
            )
        known[tuple(tokens)] = label
    return [list(tokens) for tokens in known]


def _strange(card: ModelCard, token: int) -> str:
    return (
        f"the tokenizer makes token {row_text(card.tokenizer.convert_ids_to_tokens(token))} (id {token}), but "
        f"{card.name} has {card.vocab_size} tokens (ids to {card.vocab_size - 1}); use the tokenizer that the "
        "model was trained with"
    )


def _check_prompt(card: ModelCard, index: int, body: Sequence[int], tokens: Sequence[int]) -> None:
    where = f"prompt {index}"  # without its text, because messages end up in logs and on pages
    if not body:
        raise PromptError(f"{where} is empty; a prompt needs at least one token")
    if len(tokens) > card.context_tokens:
        raise PromptError(
            f"{where} has {len(tokens)} tokens, but {card.name} reads at most {card.context_tokens}; "
            "shorten it or use fewer demonstrations"
        )
    if max(tokens) >= card.vocab_size:
        raise PromptError(f"{where}: {_strange(card, max(tokens))}")
    if card.arch.masked and list(tokens).count(card.tokenizer.mask_token_id) != 1:
        found = list(tokens).count(card.tokenizer.mask_token_id)
        raise PromptError(f"{where} has {found} masks; {card.name} needs exactly one {card.tokenizer.mask_token}")


def _per_prompt(labels: Labels, n_prompts: int) -> list[tuple[str, ...]]:
    if isinstance(labels, str) or not labels:
        raise LabelError(f"labels {row_text(labels)}: give a list of strings, or one such list for each prompt")
    if all(isinstance(label, str) for label in labels):
        return [tuple(str(label) for label in labels)] * n_prompts
    odd = [row for row in labels if not isinstance(row, Iterable) or not all(isinstance(one, str) for one in row)]
    if odd:
        raise LabelError(f"{row_text(odd[0])} was given for labels; labels are strings, and digits need quotes")
    rows = [tuple(row) for row in labels]
    if len(rows) != n_prompts:
        raise LabelError(f"{len(rows)} label lists were given for {n_prompts} prompts; give one for each")
    sizes = sorted({len(row) for row in rows})
    if len(sizes) != 1 or sizes[0] == 0 or any(isinstance(row, str) for row in labels):
        raise LabelError(f"label lists have {sizes} entries; every prompt needs the same number of labels")
    return rows


def _one_label_each(labels: str | Sequence[str] | None, n_prompts: int) -> list[list[str]]:
    each = [labels] * n_prompts if isinstance(labels, str) else list(labels or [])
    if len(each) != n_prompts:
        raise LabelError(f"{len(each)} labels were given for {n_prompts} prompts; give one string, or one for each")
    for index, label in enumerate(each):
        if not isinstance(label, str):
            raise LabelError(f"label {row_text(label)} of prompt {index} is not a string; give one target a prompt")
    return [[label] for label in each]
