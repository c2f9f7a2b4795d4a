"""Special tokens of a tokenizer that stand in a text."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from negcore.datasets.base import Tokenizer
from negcore.datasets.rows import Row


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
