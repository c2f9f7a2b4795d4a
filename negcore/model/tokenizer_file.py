"""Compare the tokenizer that transformers builds with the one in the model's own tokenizer.json.

The classes of some families build parts of their tokenizers anew, whatever the file says; a model that was trained
with the file then reads other tokens than it knows.
"""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer

from negcore.model.language_model import ModelCard

SAMPLE = 100
"""Texts that are compared."""
_FILE = "tokenizer.json"
_SHOWN_TOKENS = 4


def tokenizer_warning(card: ModelCard, texts: Sequence[str]) -> str | None:
    """Return a line if a model's tokenizer reads some of the texts otherwise than its tokenizer.json does.

    Parameters
    ----------
    card : ModelCard
    texts : sequence of str
        Prompts; an even sample of `SAMPLE` is compared.
    """
    file = _file_of(card)
    sample = list(texts)[:: -(-len(texts) // SAMPLE)] if texts else []
    if file is None or not sample:
        return None
    ours = card.tokenizer(sample, add_special_tokens=False)["input_ids"]
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    theirs = [encoding.ids for encoding in own.encode_batch(sample, add_special_tokens=False)]
    other = [pair for pair in zip(ours, theirs, strict=True) if list(pair[0]) != pair[1]]
    if not other:
        return None
    here, there = _first_difference(*other[0])
    spelled = card.tokenizer.convert_ids_to_tokens
    return (
        f"{card.name}: transformers ({type(card.tokenizer).__name__}) reads {len(other)} of {len(sample)} sampled "
        f"prompts otherwise than the model's own {_FILE}, such as {spelled(here)} (ids {here}) for "
        f"{[own.id_to_token(token) for token in there]} (ids {there}); the model may not know these tokens"
    )


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return some ids of each from the first that differs."""
    first = next(n for n, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
    return list(ours[first : first + _SHOWN_TOKENS]), list(theirs[first : first + _SHOWN_TOKENS])


def _file_of(card: ModelCard) -> Path | None:
    """Return the model's tokenizer.json, or None if it has none here."""
    local = Path(card.source) / _FILE
    if local.is_file():
        return local
    if card.source != card.name or card.revision == "memory":
        return None
    cached = try_to_load_from_cache(card.source, _FILE, revision=card.revision)
    return Path(cached) if isinstance(cached, str) else None
