"""Turn rows into prompts, and decide whether labels begin with a space."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from negcore.datasets.base import LETTERS, Example, Tokenizer, Wording
from negcore.datasets.rows import Row
from negcore.errors import LabelError, PromptError


def label_token(tokenizer: Tokenizer, prompt_end: str, label: str, *, masked: bool = False) -> int | None:
    """Return the token id of a label after a prompt, or None if it is not exactly one known token.

    Causal models: the encoding of prompt and label together must be the prompt's encoding and one more token.
    Masked models: the label takes the mask's place, so it is encoded alone.
    """
    head = [] if masked else _ids(tokenizer, prompt_end)
    ids = _ids(tokenizer, label if masked else prompt_end + label)
    if len(ids) != len(head) + 1 or ids[:-1] != head or ids[-1] == getattr(tokenizer, "unk_token_id", None):
        return None
    return ids[-1]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def label_prefixes(tokenizer: Tokenizer, *, masked: bool) -> tuple[str, ...]:
    """Return the prefixes to try, best first: a space, then nothing.

    A masked model needs no space if its tokenizer encodes a word alike with and without it (WordPiece, SentencePiece);
    with a byte-level tokenizer (RoBERTa) it does.
    """
    if masked and _ids(tokenizer, " A") == _ids(tokenizer, "A"):
        return ("",)
    return (" ", "")


def choose_label_prefix(tokenizer: Tokenizer, prompt_end: str, labels: Sequence[str], *, masked: bool = False) -> str:
    """Decide whether labels begin with a space, by how the tokenizer continues the end of the prompt.

    Parameters
    ----------
    tokenizer : Tokenizer
    prompt_end : str
        Last characters of a prompt from the beginning of a word, such as `Answer:`.
    labels : sequence of str
        Without leading space.
    masked : bool
        True if the label takes the place of a mask instead of following the prompt.

    Returns
    -------
    str
        A space if with it every label is one token of its own; else the empty string, if that holds without it.

    Raises
    ------
    LabelError
        If neither holds.
    """
    for prefix in label_prefixes(tokenizer, masked=masked):
        tokens = [label_token(tokenizer, prompt_end, prefix + label, masked=masked) for label in labels]
        if None not in tokens and len(set(tokens)) == len(tokens):
            return prefix
    raise _no_prefix(tokenizer, prompt_end, labels, masked)


def _no_prefix(tokenizer: Tokenizer, prompt_end: str, labels: Sequence[str], masked: bool) -> LabelError:
    end = "" if masked else prompt_end
    prefix = label_prefixes(tokenizer, masked=masked)[0]
    seen: dict[int, str] = {}
    for label in labels:
        token = label_token(tokenizer, end, prefix + label, masked=masked)
        if token is None:
            break
        if token in seen:
            return LabelError(f"labels {seen[token]!r} and {label!r} share token {token}; each needs its own")
        seen[token] = label
    return LabelError(
        f"label {label!r} is not one token after {prompt_end!r}: {end!r} is {_ids(tokenizer, end)}, "
        f"{end + ' ' + label!r} is {_ids(tokenizer, end + ' ' + label)}, "
        f"{end + label!r} is {_ids(tokenizer, end + label)}; choose labels of one token each"
    )


def prompt_end(prompt: str) -> str:
    """Return the last word of a prompt and the spaces after it, which decide how a tokenizer continues."""
    words = prompt.rsplit(maxsplit=1)
    trailing = prompt[len(prompt.rstrip()) :]
    return words[-1].rstrip() + trailing if words else prompt


def special_token_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern that matches every string that this tokenizer reads as a special token."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    known = sorted((token for token in tokens if len(token) > 1), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, known))) if known else None


@dataclass(frozen=True)
class Defuser:
    """Filter that breaks special tokens in a dataset's text with a space after their first character."""

    pattern: re.Pattern[str] | None

    def text(self, text: str) -> str:
        """Return the text with its special tokens broken: `[MASK]` becomes `[ MASK]`."""
        if self.pattern is None:
            return text
        return self.pattern.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", text)

    def row(self, row: Row) -> Row:
        """Return the row with the special tokens of all its fields and options broken."""
        return replace(
            row,
            fields={name: self.text(value) for name, value in row.fields.items()},
            options=tuple(self.text(option) for option in row.options),
        )


@dataclass(frozen=True)
class Renderer:
    """Wording, label prefix and demonstrations that turn rows into examples."""

    wording: Wording | None
    """None for ready-made prompts: the field `prompt` is the question, and the options are the labels."""
    label_prefix: str
    """Space or empty string."""
    mask: str | None
    """Mask token of a masked model."""
    demonstrations: str = ""
    """Text of the solved questions, if any."""

    def example(self, row: Row) -> Example:
        """Return the row as a prompt with its labels."""
        parts = [self.demonstrations, self._question(row)]
        if self.wording:
            parts.insert(0, self.wording.instruction)
        prompt = "\n\n".join(part for part in parts if part)
        labels = tuple(self.label_prefix + label for label in self.labels(row))
        shown = row.options if self.wording else ()
        return Example(row.id, f"{prompt} {self.mask}" if self.mask else prompt, labels, row.answer, row.group, shown)

    def with_demonstrations(self, rows: Iterable[Row]) -> Renderer:
        """Return a renderer that puts these rows, solved, into every prompt."""
        return replace(self, demonstrations="\n\n".join(map(self._solved, rows)))

    def labels(self, row: Row) -> tuple[str, ...]:
        """Return the row's labels without prefix: one letter for each option, or the options themselves."""
        return tuple(LETTERS[: len(row.options)]) if self.wording else row.options

    def _solved(self, row: Row) -> str:
        prefix = " " if self.mask else self.label_prefix
        return self._question(row) + prefix + self.labels(row)[row.answer]

    def _question(self, row: Row) -> str:
        if self.wording is None:
            return row.fields["prompt"]
        wording = self.wording
        options = (wording.option.format(letter=a, text=b) for a, b in zip(LETTERS, row.options, strict=False))
        return f"{wording.question.format_map(row.fields)}\n{wording.separator.join(options)}\n{wording.cue}"


def mask_of(tokenizer: Tokenizer, *, masked: bool) -> str | None:
    """Return the mask token that ends a prompt, or None for a causal model.

    Raises
    ------
    PromptError
        If a masked model's tokenizer has no mask token.
    """
    if masked and not tokenizer.mask_token:
        raise PromptError("the tokenizer has no mask token; prompts for a masked model need one")
    return tokenizer.mask_token if masked else None
