"""Read prompts and labels with a tokenizer: the one rule of previews, plans and measurements.

A causal model reads a prompt behind the tokens that its tokenizer puts in front of every text (BOS), which are not
put there twice, and without those that it puts at the end (EOS): the prompt's last token is the probed one. A masked
model reads both.

A label is what the tokenizer makes of it in its place. For a causal model

    ids(prompt + label) == ids(prompt) + [id of the label]

and for a masked model, whose label takes the place of the mask, the prompt is what stands in front of the mask. Tokens
of a label that is read alone are others with many tokenizers, and depend on the prompt's end. Where labels may be
several tokens, the rule is the same: the tokens of the prompt stay, and what comes behind them is the label.

The probed token is the prompt's last one, or the one that holds the last character of a piece of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from negcore.errors import LabelError, PromptError, typed_line
from negcore.texts import private, row_text

AnswerKind = Literal["token", "sequence"]
"""`token`: every label is one token; `sequence`: one or several, read one after the other."""

_TAIL_CHARACTERS = 48
"""Least length of a prompt's end that stands for the prompt."""
_LONGEST_TAIL = 512
_CUT = re.compile(r"(?<=\S) (?=\S)")
_PLAIN = "A"
"""Text that shows which tokens are put around every text, where prompts are nothing but such tokens."""
_LOCAL_MODELS = ("BPE", "WordPiece", "WordLevel")


class _Place(NamedTuple):
    """Text in front of a label, and its ids when the label is not there."""

    before: str
    ids_before: list[int]

    def ids_of_label(self, ids: Sequence[int], most: int | None) -> list[int] | None:
        """Return the ids that a label adds to those in front of it, or None if it does more, or adds too many."""
        start = len(self.ids_before)
        added = list(ids[start:])
        is_right = bool(added) and (most is None or len(added) <= most) and list(ids[:start]) == self.ids_before
        return added if is_right else None


class ProbedToken(NamedTuple):
    """The token that holds the last character of a piece of a text."""

    place: int
    """Its place among the text's own tokens, special ones in front not counted."""
    start: int
    stop: int
    """Characters of the text that it holds: from `start` up to `stop`."""


def end_of_piece(text: str, piece: str) -> int:
    """Return where a piece of a text ends: the number of characters up to there; spaces at its end do not count.

    Raises
    ------
    PromptError
        If the piece is empty, or stands in the text nowhere or at several places.
    """
    wanted = piece.rstrip()
    if not wanted:
        raise PromptError(f"probe_at is {row_text(piece)}; give a piece of the prompt")
    first = text.find(wanted)
    if first < 0:
        raise PromptError(f"probe_at {row_text(piece)} stands nowhere in the prompt; give a piece of it as it is")
    if text.find(wanted, first + 1) >= 0:
        raise PromptError(
            f"probe_at {row_text(piece)} stands at several places of the prompt; give a longer piece that ends where "
            "neurons are to be read"
        )
    return first + len(wanted)


@dataclass(frozen=True)
class PromptReader:
    """One tokenizer's reading of prompts and labels."""

    tokenizer: Any
    masked: bool = False
    """True if a label takes the place of a mask instead of following the prompt."""

    def read(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, without the special tokens that the tokenizer adds by itself.

        Raises
        ------
        PromptError
            If a text is no string, or the tokenizer fails.
        """
        odd = [texts] if isinstance(texts, str) else [text for text in texts if not isinstance(text, str)]
        if odd:
            raise PromptError(f"{row_text(odd[0])} was given for prompts; give a list of strings")
        unique = list(dict.fromkeys(texts))
        if not unique:
            return []
        try:
            ids = self.tokenizer(unique, add_special_tokens=False)["input_ids"]
        except Exception as error:  # half of a surrogate pair, or a tokenizer that lacks a part of itself
            raise PromptError(f"the tokenizer fails on a text: {typed_line(error):.200}") from error
        found = dict(zip(unique, ids, strict=True))
        return [list(found[text]) for text in texts]

    def with_special_tokens(self, texts: Sequence[str], ids: Sequence[list[int]]) -> list[list[int]]:
        """Return the ids that the model reads: special tokens that a text begins (or ends) with are not repeated."""
        if not any(ids):
            return list(ids)
        telling = (pair for pair in zip(texts, ids, strict=True) if not self._special_ids.issuperset(pair[1]))
        front, back = self._added(*next(telling, (_PLAIN, self.read([_PLAIN])[0])))
        return [
            [*(front if of_text[: len(front)] != front else ()), *of_text, *_missing_at_end(of_text, back)]
            for of_text in ids
        ]

    def label_ids(
        self, texts: Sequence[str], ids: Sequence[list[int]], labels: Sequence[Sequence[str]]
    ) -> list[list[int | LabelError]]:
        """Return the id of every label in its place, or why it has none.

        The ends of long prompts stand for the prompts where that provably gives the same (see `_tails`).

        Parameters
        ----------
        texts : sequence of str, length P
            Prompts; those of a masked model hold its mask once.
        ids : sequence of lists of int, length P
            Result of `read`.
        labels : sequence of P sequences of str
        """
        return [
            [one if isinstance(one, LabelError) else one[0] for one in of_text]
            for of_text in self._labels(texts, ids, labels, most=1)
        ]

    def label_tokens(
        self, texts: Sequence[str], ids: Sequence[list[int]], labels: Sequence[Sequence[str]]
    ) -> list[list[list[int] | LabelError]]:
        """Return the ids, one or several, of every label in its place, or why it has none; arguments as of `label_ids`.

        The end of a long prompt stands for it here as well: see `_tails`.
        """
        return self._labels(texts, ids, labels, most=None)

    def probed_tokens(
        self, texts: Sequence[str], ids: Sequence[list[int]], ends: Sequence[int]
    ) -> list[ProbedToken | PromptError]:
        """Return the token that holds the last character of each text up to some end, or why there is none.

        Parameters
        ----------
        texts : sequence of str, length P
        ids : sequence of lists of int, length P
            Result of `read`.
        ends : sequence of int, length P
            Characters up to the end of the piece, at least one.

        Raises
        ------
        PromptError
            If the tokenizer cannot tell which characters a token holds.
        """
        if not texts:
            return []
        if not getattr(self.tokenizer, "is_fast", False):
            raise PromptError(
                "probe_at: this model's tokenizer does not tell which characters a token holds; leave probe_at out, "
                "or use a model with a tokenizer.json"
            )
        read = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        return [
            _holding(offsets, end) if list(again) == of_text else PromptError("probe_at: no token can be told")
            for of_text, end, again, offsets in zip(ids, ends, read["input_ids"], read["offset_mapping"], strict=True)
        ]

    def _labels(
        self, texts: Sequence[str], ids: Sequence[list[int]], labels: Sequence[Sequence[str]], most: int | None
    ) -> list[list[list[int] | LabelError]]:
        """Return the ids of every label in its place, at most so many each, or why it has none."""
        wholes = [self._place(text, of_text) for text, of_text in zip(texts, ids, strict=True)]
        found: list[list[list[int] | None]] = [[None] * len(of_text) for of_text in labels]
        for places in (self._tails(texts, ids), wholes):
            open_PO = [
                (p, o)
                for p, place in enumerate(places)
                for o, known in enumerate(found[p])
                if known is None and place is not None
            ]
            read = self._read_in_place([(places[p], labels[p][o]) for p, o in open_PO])
            for (p, o), in_place in zip(open_PO, read, strict=True):
                place = places[p]
                assert place is not None
                found[p][o] = place.ids_of_label(in_place, most)
        return [
            [self._checked(place, label, of_label) for label, of_label in zip(of_text, known, strict=True)]
            for place, of_text, known in zip(wholes, labels, found, strict=True)
        ]

    def begins_new(self, texts: Sequence[str], ids: Sequence[list[int]]) -> bool:
        """Return True if every label begins anew: behind a line break, a space or a special token."""
        places = [self._place(text, of_text) for text, of_text in zip(texts, ids, strict=True)]
        return all(
            place.before[-1:].isspace() or not place.ids_before or place.ids_before[-1] in self._special_ids
            for place in places
        )

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).items()
        known = getattr(self.tokenizer, "all_special_ids", ())
        return frozenset([*known, *(token_id for token_id, token in added if token.special)])

    @property
    def _mask_id(self) -> int:
        return int(self.tokenizer.mask_token_id)

    @cached_property
    def _unknown_id(self) -> int | None:
        return getattr(self.tokenizer, "unk_token_id", None)

    def _added(self, text: str, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return the tokens that the tokenizer adds in front of a text, and those at its end that the model reads."""
        (whole,) = self.tokenizer([text], add_special_tokens=True)["input_ids"]
        for start in range(len(whole) - len(ids) + 1):
            stop = start + len(ids)
            if list(whole[start:stop]) == ids:
                return list(whole[:start]), list(whole[stop:]) if self.masked else []
        raise PromptError("the tokenizer reads a text otherwise where it adds special tokens; no prompt can be probed")

    def _place(self, text: str, ids: list[int]) -> _Place:
        """Return the text and ids in front of the label of a prompt."""
        if not self.masked:
            return _Place(text, ids)
        mask = self.tokenizer.mask_token
        before = text.partition(mask)[0]
        if ids.count(self._mask_id) != 1:
            raise PromptError(f"a prompt has {ids.count(self._mask_id)} masks; it needs exactly one {mask}")
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).get(self._mask_id)
        swallows = added is not None and added.lstrip  # the spaces in front of it
        return _Place(before.rstrip() if swallows else before, ids[: ids.index(self._mask_id)])

    def _tails(self, texts: Sequence[str], ids: Sequence[list[int]]) -> list[_Place | None]:
        """Return the end of each prompt where what follows it is read as behind the whole prompt, else None.

        The end begins at a space within the prompt, and its ids are the last ids of the prompt, so there is a token
        boundary in front of it. If a label adds ids to those of the end, it adds the same to those of the prompt:

        - A tokenizer of these kinds cuts a text into words and reads each by itself. Its patterns look one character
          ahead at most and never back, so a label changes no cut in front of an end of some length.
        - Without words, BPE joins neighbours only. Where the first token of the end stays as it is, what lies in front
          of it meets the same neighbours in the same order as without the label, and stays as it is as well.

        Whether the tokenizer writes a space in front of every text does not matter: with it, the end is taken without
        its own.
        """
        tails: list[_Place | None] = [None] * len(texts)
        cuts = {p: cut for p, text in enumerate(texts) if (cut := self._cut(text)) is not None}
        for skipped in (0, 1):
            left = [p for p in cuts if tails[p] is None]
            ends = [texts[p][cuts[p] + skipped :] for p in left]
            for p, end, of_end in zip(left, ends, self.read(ends), strict=True):
                if of_end and ids[p][-len(of_end) :] == of_end:
                    tails[p] = self._place(end, of_end)
        return tails

    def _cut(self, text: str) -> int | None:
        """Return where the end of a prompt begins that may stand for it."""
        if not self._is_local:
            return None
        stop = len(text) if not self.masked else max(text.find(self.tokenizer.mask_token), 0)
        first = max(stop - _LONGEST_TAIL, 0)
        cuts = [match.start() for match in _CUT.finditer(text, first, max(stop - self._tail_characters, first))]
        return cuts[-1] if cuts else None

    @cached_property
    def _is_local(self) -> bool:
        model = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        return type(model).__name__ in _LOCAL_MODELS and not getattr(model, "dropout", None)

    @cached_property
    def _tail_characters(self) -> int:
        """Least length of an end: no added token is as long."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        return max([_TAIL_CHARACTERS, *(len(str(token)) + 1 for token in added)])

    def _read_in_place(self, labels: Sequence[tuple[_Place | None, str]]) -> list[list[int]]:
        return self.read([f"{place.before}{label}" for place, label in labels if place is not None])

    def _checked(self, place: _Place, label: str, found: list[int] | None) -> list[int] | LabelError:
        if found is not None and self._unknown_id not in found:
            return found
        if found is not None:
            part = "part of " * (len(found) > 1)
            unknown = f"is unknown to this model's tokenizer (id {self._unknown_id})"
            return LabelError(f"{part}label {row_text(label)} {unknown}")
        (ids,) = self._read_in_place([(place, label)])
        start = len(place.ids_before)
        if ids[:start] == place.ids_before:
            return LabelError(
                f"label {row_text(label)} is {len(ids) - start} tokens of this model (ids {row_text(ids[start:])}); "
                "a label must be exactly one, and a leading space is part of it"
                + " (answers: sequence allows several)"
                * (not self.masked and len(ids) > start)
            )
        alone, joined = self._differing(place.ids_before, ids)
        return LabelError(
            f"label {row_text(label)} joins what stands in front of it: the tokens before it end in {alone} without it "
            f"and in {joined} with it; use another label, or let the prompt end otherwise"
        )

    def _differing(self, before: list[int], joined: list[int]) -> tuple[str, str]:
        """Return both encodings from the token before their first difference, in words."""
        same = next((n for n, pair in enumerate(zip(before, joined, strict=False)) if pair[0] != pair[1]), len(before))
        first = max(min(same, len(before) - 1), 0)
        return self._in_words(before[first:]), self._in_words(joined[first:])

    def _in_words(self, ids: list[int]) -> str:
        spelled = getattr(self.tokenizer, "convert_ids_to_tokens", None)
        return private(f"{spelled(ids)} (ids {ids})" if spelled else f"ids {ids}")


def _holding(offsets: Sequence[tuple[int, int]], end: int) -> ProbedToken | PromptError:
    """Return the last token that holds the character in front of an end: several hold one of many bytes."""
    for index in range(len(offsets) - 1, -1, -1):
        start, stop = offsets[index]
        if start < end <= stop:
            return ProbedToken(index, start, stop)
    return PromptError("probe_at: no token of this model's tokenizer holds its last character; end it elsewhere")


def _missing_at_end(ids: list[int], back: list[int]) -> Iterator[int]:
    return iter(back if back and ids[-len(back) :] != back else ())
