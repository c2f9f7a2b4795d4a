"""Compare the tokenizer that transformers builds with the one in the model's own file.

The classes of some families build parts of their tokenizers anew, whatever tokenizer.json says, and leave out the space
that a SentencePiece model puts in front of a text; a model that was trained with the file then reads other tokens than
it knows.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from negcore.model.language_model import ModelCard
from negcore.texts import private

SAMPLE = 100
"""Texts that are compared."""
_JSON, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_SHOWN_TOKENS = 4


Reader = Callable[[list[str]], list[list[int]]]


def tokenizer_warning(card: ModelCard, texts: Sequence[str]) -> str | None:
    """Return a line if a model's tokenizer reads some of the texts otherwise than its own file does.

    The file is tokenizer.json or, where there is none, the SentencePiece model tokenizer.model; the latter knows no
    added tokens, so texts with such tokens are not compared with it.

    Parameters
    ----------
    card : ModelCard
    texts : sequence of str
        Prompts; an even sample of `SAMPLE` is compared.
    """
    sample = list(texts)[:: -(-len(texts) // SAMPLE)] if texts else []
    if (file := _file_of(card, _JSON)) is not None:
        read = _json_reader(file)
    elif (file := _file_of(card, _SENTENCEPIECE)) is not None:
        read = _sentencepiece_reader(file)
        added = [str(token) for token in getattr(card.tokenizer, "added_tokens_decoder", {}).values()]
        sample = [text for text in sample if not any(token in text for token in added)]
    if file is None or not sample:
        return None
    pairs = zip(card.tokenizer(sample, add_special_tokens=False)["input_ids"], read(sample), strict=True)
    other = [(list(here), there) for here, there in pairs if there and list(here) != there]
    if not other:
        return None
    here, there = _first_difference(*other[0])
    return (
        f"{card.name}: transformers ({type(card.tokenizer).__name__}) reads {len(other)} of {len(sample)} sampled "
        f"prompts otherwise than the model's own {file.name}, such as {_in_words(card, here)} for "
        f"{_in_words(card, there)}; the model may not know these "
        "tokens in these places"
    )


def _in_words(card: ModelCard, ids: list[int]) -> str:
    return private(f"{card.tokenizer.convert_ids_to_tokens(ids)} (ids {ids})")


def _json_reader(file: Path) -> Reader:
    status = file.stat()
    return _json_reader_of(file, (status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1)
def _json_reader_of(file: Path, stamp: tuple[int, int]) -> Reader:
    """Return a reader of a tokenizer.json, made once for all datasets of a model: large ones take a second."""
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    return lambda texts: [encoding.ids for encoding in own.encode_batch(texts, add_special_tokens=False)]


def _sentencepiece_reader(file: Path) -> Reader:
    """Return a reader of a SentencePiece model; it reads nothing if the file is of another kind of the same name."""
    own = SentencePieceProcessor()
    try:
        own.load(str(file))
    except (OSError, RuntimeError):
        return lambda texts: [[] for _ in texts]
    return lambda texts: [own.encode(text) for text in texts]


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return some ids of each from the first that differs."""
    first = next(n for n, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
    return list(ours[first : first + _SHOWN_TOKENS]), list(theirs[first : first + _SHOWN_TOKENS])


def _file_of(card: ModelCard, name: str) -> Path | None:
    """Return a file of the model, or None if it is not here."""
    folder = Path(card.source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        cached = try_to_load_from_cache(card.source, name, revision=card.base_revision)
    except HFValidationError:  # a model in memory has any name
        return None
    return Path(cached) if isinstance(cached, str) else None
