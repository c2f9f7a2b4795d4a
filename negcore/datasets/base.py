"""What a dataset is: examples, the settings that made them, and the account of how its splits came about."""

from __future__ import annotations

import json
import string
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import xxhash

from negcore.errors import DatasetError

SPLITS = ("train", "valid", "test")
LETTERS = string.ascii_uppercase

SplitPolicy = Literal["clean", "released"]


class Tokenizer(Protocol):
    """The little of a Hugging Face tokenizer that prompts and labels need."""

    mask_token: str | None
    all_special_tokens: list[str]

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its options."""

    id: str
    """Stable and unique in the dataset; `agnews/test/412` is row 412 of the released test file."""
    prompt: str
    """Ends right where a label follows (causal) or with the mask token (masked)."""
    labels: tuple[str, ...]
    """The options' labels exactly as they are to be encoded: the leading space is already decided."""
    answer: int
    """Index into `labels` of the gold option."""
    group: str
    """Language in a multilingual set, template in a factual one, else empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """How a row becomes text. Blocks (instruction, demonstrations, question) are set apart by an empty line."""

    name: str
    """Shown in reports."""
    instruction: str
    """First block, the same in every prompt."""
    question: str
    """Template of the row's fields, such as `Premise: {premise}`; their order is the template's."""
    option: str = "{letter}. {text}"
    """Template of one option."""
    separator: str = "\n"
    """Between options."""
    cue: str = "Answer:"
    """Last line; the label follows it, so it may not end in a space."""

    def __post_init__(self) -> None:
        check_template(self.option, ("letter", "text"))
        if not self.cue or self.cue != self.cue.rstrip():
            raise DatasetError(
                f"wording {self.name!r}: cue {self.cue!r} must not be empty or end in a space; "
                "the label's leading space is decided by the tokenizer"
            )


def check_template(template: str, allowed: Collection[str]) -> None:
    """Refuse a template that asks for anything but the allowed names (attributes and indices included)."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DatasetError(f"wording template {template!r} is malformed: {error}") from None
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise DatasetError(f"wording template {template!r} asks for {unknown[0]!r}; allowed: {', '.join(allowed)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """The choices that turn a dataset's rows into prompts."""

    shots: Literal[0, 1] = 0
    """Demonstrations per class: 0 for none, 1 for one of each class, the same in every prompt."""
    demonstrations: int = 0
    """Which sample of demonstrations: 0, 1, ... are other training rows each."""
    wording: str | Wording = "default"
    """Name of one of the dataset's wordings, or a wording of your own."""
    seed: int = 0
    """Decides demonstrations, samples and the order of rows."""
    limit: int | None = None
    """Most rows of each split: a sample stratified by answer. None takes all."""
    eval_limit: int | None = None
    """Most rows of valid and of test, where they are to be fewer than those of train. None takes `limit`."""
    split_policy: SplitPolicy = "clean"
    """`clean` removes what the released splits share, `released` leaves the files as they are."""

    def most_rows(self, split: str) -> int | None:
        """Most rows of a split; None is all of them."""
        return self.limit if split == "train" or self.eval_limit is None else self.eval_limit

    def __post_init__(self) -> None:
        if self.shots not in (0, 1):
            raise DatasetError(f"shots is {self.shots!r}; allowed: 0, or 1 (one demonstration per class)")
        for name, limit in (("limit", self.limit), ("eval_limit", self.eval_limit)):
            if limit is not None and limit < 1:
                raise DatasetError(f"{name} is {limit!r}; allowed: a whole number from 1, or None for all rows")
        if self.split_policy not in ("clean", "released"):
            raise DatasetError(f"split_policy is {self.split_policy!r}; allowed: 'clean', 'released'")


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many rows of one released split are also in another."""

    split: str
    """The split whose rows are counted."""
    other: str
    """The split they are looked for in."""
    n_whole_rows: int
    """Rows that are there unchanged."""
    n_same_text: int
    """Rows whose content fields are there once case, width and spacing are evened out."""


@dataclass(frozen=True, slots=True)
class Change:
    """Rows that a split lost or gained, and why."""

    split: str
    n_rows: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """The account of a dataset's splits. Counts are rows by split."""

    policy: SplitPolicy
    """The policy asked for."""
    n_released: Mapping[str, int]
    """Rows in the source; 0 where a split's file is absent."""
    n_damaged: Mapping[str, int]
    """Rows left out by every policy because a field or an option that would be shown is empty."""
    n_available: Mapping[str, int]
    """Rows after the policy and after the demonstrations were taken out."""
    n_used: Mapping[str, int]
    """Rows after `limit`: the examples of the dataset."""
    n_defused: Mapping[str, int]
    """Examples, of those used, whose text held one of the tokenizer's special tokens, now broken by a space."""
    overlaps: tuple[Overlap, ...]
    """What the released splits share."""
    dropped: tuple[Change, ...]
    """Rows the policy removed."""
    drawn: tuple[Change, ...]
    """Rows the policy moved into a split."""

    @property
    def is_overlapping(self) -> bool:
        """Whether splits still share text: such scores must be marked wherever they are shown."""
        return self.policy == "released" and any(o.n_same_text for o in self.overlaps)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Where a solved question in the prompts came from."""

    id: str
    answer: int


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Prompts of one dataset, made for one tokenizer."""

    name: str
    """As `list_datasets` shows it, or the path of a local file."""
    genre: str
    """MCEval8K's genre; `local` for a file of your own."""
    splits: Mapping[str, tuple[Example, ...]]
    """Keys train, valid and test, always all three."""
    split_report: SplitReport
    """How the splits came about."""
    settings: PromptSettings
    """The choices that made the prompts."""
    label_rule: str
    """The leading-space decision in words."""
    demonstrations: tuple[Demonstration, ...]
    """The solved questions in every prompt, in their order; training rows that are in no split."""
    fingerprint: str = field(init=False)
    """xxh3-128 (hex) over the content of all examples."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", fingerprint(self.splits))


def fingerprint(splits: Mapping[str, Iterable[Example]]) -> str:
    """xxh3-128 (hex) over splits, ids, prompts, labels, answers and groups, in order."""
    digest = xxhash.xxh3_128()
    for split, examples in splits.items():
        for e in examples:
            digest.update(json.dumps([split, e.id, e.prompt, e.labels, e.answer, e.group]).encode())
            digest.update(b"\n")
    return digest.hexdigest()


def describe_label_prefix(prefix: str, labels: Iterable[str]) -> str:
    """The leading-space decision in words, with examples."""
    rule = "labels begin with a space" if prefix else "labels have no leading space"
    return f"{rule}: {' '.join(repr(prefix + label) for label in list(labels)[:5])}"
