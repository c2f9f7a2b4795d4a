"""A dataset: its examples, the settings that made them, and a report on its splits."""

from __future__ import annotations

import json
import string
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import xxhash

from negcore.errors import DatasetError
from negcore.model.prompt_ids import AnswerKind
from negcore.orders import Permutations, split_id
from negcore.texts import private, row_text

SPLITS = ("train", "valid", "test")

SplitPolicy = Literal["clean", "clean-rows", "released"]
PromptFormat = Literal["plain", "chat"]


class Tokenizer(Protocol):
    """Part of a Hugging Face tokenizer that prompts and labels need."""

    mask_token: str | None
    all_special_tokens: list[str]

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its options."""

    id: str
    """Stable and unique in the dataset; `agnews/test/412` is row 412 of the released test file, and
    `agnews/test/412@BADC` that row in another order of its options, see `negcore.orders`."""
    prompt: str
    """Text that ends where a label follows (causal models) or with the mask token (masked models)."""
    labels: tuple[str, ...]
    """Labels of the options exactly as they are encoded, with or without a leading space."""
    answer: int
    """Index of the gold option in `labels`."""
    group: str
    """Language in a multilingual set, template in a factual one; empty if there is none or it gives the answer away."""
    options: tuple[str, ...] = ()
    """Texts that the labels stand for, as the prompt shows them; empty where the labels are all there is."""
    place: str = field(default="", compare=False)
    """File and line of the row, for messages; empty for a released dataset, whose ids say it."""
    counterfactual: str = ""
    """The same prompt but for what it asks, for patching; empty if the dataset gives none."""
    probe_end: int | None = None
    """Characters of the prompt up to where neurons are read: the end of the row's `probe_at`; None for the prompt's."""
    unit: str = field(default="", compare=False)
    """Normalised text of the sentence, premise or other unit that rows may share; empty if there is none."""

    @property
    def located(self) -> str:
        """The row's id and where it stands; an id of a file's own may be a text of it."""
        return f"{private(self.id)} ({self.place})" if self.has_own_id else self.id

    @property
    def named(self) -> str:
        """Name of the row in a message: its id, and where it stands."""
        shown = row_text(self.id) if self.has_own_id else repr(self.id)
        return f"row {shown}" + f" ({self.place})" * bool(self.place)

    @property
    def has_own_id(self) -> bool:
        """True if the id was not made of the names of file and line, or of dataset and split."""
        file, _, line = self.place.rpartition(":")
        return bool(self.place) and self.id != f"{Path(file).stem}/{line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """Templates that turn a row into text. An empty line separates instruction, demonstrations and question."""

    name: str
    """Name in reports."""
    instruction: str
    """First block, the same in every prompt."""
    question: str
    """Template of the row's fields, such as `Premise: {premise}`."""
    option: str = "{letter}. {text}"
    """Template of one option."""
    separator: str = "\n"
    """Text between options."""
    cue: str = "Answer:"
    """Last line; the label follows it, so it must not end in a space."""

    def __post_init__(self) -> None:
        check_template(self.option, ("letter", "text"))
        if not self.cue or self.cue != self.cue.rstrip():
            raise DatasetError(
                f"wording {self.name!r}: cue {self.cue!r} must not be empty or end in a space; "
                "the label's leading space is decided by the tokenizer"
            )


def check_template(template: str, allowed: Collection[str]) -> None:
    """Refuse a template that uses other names than the allowed ones, or attributes or indices of them."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DatasetError(f"wording template {template!r} is malformed: {error}") from None
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise DatasetError(f"wording template {template!r} asks for {unknown[0]!r}; allowed: {', '.join(allowed)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """Choices that turn a dataset's rows into prompts."""

    shots: Literal[0, 1] = 0
    """Demonstrations of each class: 0 for none, 1 for one of each class, the same in every prompt."""
    demonstrations: int = 0
    """Number of the sample of demonstrations; each number stands for other training rows."""
    wording: str | Wording = "default"
    """Name of one of the dataset's wordings, or a wording of your own."""
    prompt_format: PromptFormat = "plain"
    """`plain` for the text alone, `chat` for the model's chat template: see `negcore.datasets.chat`."""
    system_prompt: str | None = None
    """System text in front of a chat. None for none."""
    seed: int = 0
    """Seed of demonstrations, samples and the order of rows."""
    limit: int | None = None
    """Most rows of each split, sampled in proportion to the answers. None takes all."""
    eval_limit: int | None = None
    """Most rows of valid and of test, if other than `limit`. None takes `limit`."""
    split_policy: SplitPolicy = "clean"
    """`clean` removes doubles and what splits share, and keeps units (sentences) whole; `clean-rows` lets splits share
    units; `released` leaves the files as they are."""

    unreadable: Literal["fail", "skip"] = "fail"
    """`skip` leaves out rows that the model cannot read, and counts them; `fail` refuses the dataset."""
    permutations: Permutations = 1
    """Orders of its options that each row is asked in, or "all" for up to 4 options: see `negcore.datasets.orders`."""
    answers: AnswerKind = "token"
    """`token`: every label is one token; `sequence`: labels may be several, whose probability is that of all of them,
    one after the other."""

    def most_rows(self, split: str) -> int | None:
        """Return the most rows of a split; None means all."""
        return self.limit if split == "train" or self.eval_limit is None else self.eval_limit

    def row_of(self, prompt_id: str) -> str:
        """Return the id of the row that a prompt asks, in whatever order."""
        return prompt_id if self.permutations == 1 else split_id(prompt_id).row

    def __post_init__(self) -> None:
        if self.shots not in (0, 1):
            raise DatasetError(f"shots is {self.shots!r}; allowed: 0, or 1 (one demonstration per class)")
        for name, limit in (("limit", self.limit), ("eval_limit", self.eval_limit)):
            if limit is not None and limit < 1:
                raise DatasetError(f"{name} is {limit!r}; allowed: a whole number from 1, or None for all rows")
        if self.permutations != "all" and (not isinstance(self.permutations, int) or self.permutations < 1):
            raise DatasetError(f"permutations is {self.permutations!r}; allowed: a whole number from 1, or 'all'")
        if self.answers not in get_args(AnswerKind):
            raise DatasetError(f"answers is {self.answers!r}; allowed: 'token', 'sequence'")
        if self.prompt_format not in get_args(PromptFormat):
            raise DatasetError(f"prompt_format is {self.prompt_format!r}; allowed: 'plain', 'chat'")
        if self.system_prompt is not None and self.prompt_format != "chat":
            raise DatasetError("system_prompt is given, but prompt_format is 'plain': only a chat has one")
        if self.split_policy not in get_args(SplitPolicy):
            allowed = ", ".join(map(repr, get_args(SplitPolicy)))
            raise DatasetError(f"split_policy is {self.split_policy!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Number of rows of one split that are also in another."""

    split: str
    """Split whose rows are counted."""
    other: str
    """Split in which they are looked for."""
    n_whole_rows: int
    """Rows that are found unchanged."""
    n_same_text: int
    """Rows whose content fields are found when case, character width and spacing are ignored."""
    n_same_unit: int
    """Rows whose unit, such as the sentence, is found: those above, and others that ask something else of it."""


@dataclass(frozen=True, slots=True)
class Change:
    """Rows that a split lost or gained, with the reason."""

    split: str
    n_rows: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """Report on how a dataset's splits were made. Counts are rows by split."""

    policy: SplitPolicy
    """Chosen policy."""
    n_released: Mapping[str, int]
    """Rows in the source; 0 where a split's file is absent."""
    n_damaged: Mapping[str, int]
    """Rows that every policy leaves out because a field or option in the prompt would be empty."""
    n_available: Mapping[str, int]
    """Rows left by the policy, without the demonstrations."""
    n_used: Mapping[str, int]
    """Rows left by `limit`: the examples of the dataset, each once however often it is asked."""
    n_defused: Mapping[str, int]
    """Used rows whose text held a special token of the tokenizer, which a space now breaks."""
    n_doubles: Mapping[str, int]
    """Released rows that ask what an earlier row of their split asks."""
    n_contradictory: Mapping[str, int]
    """Texts of released rows that have two or more answers in their split."""
    overlaps: tuple[Overlap, ...]
    """Rows that the released splits share."""
    still_shared: tuple[Overlap, ...]
    """Rows that the splits share under the policy."""
    dropped: tuple[Change, ...]
    """Rows the policy removed."""
    drawn: tuple[Change, ...]
    """Rows the policy moved into a split."""
    group_is_answer: bool
    """True if each group of the source has one answer only; examples then have no group, for it would say nothing."""

    @property
    def is_overlapping(self) -> bool:
        """True if splits still share text; scores on them must be marked wherever they are shown."""
        return any(overlap.n_same_text for overlap in self.still_shared)

    def remarks(self, split: str) -> list[str]:
        """Tell what the policy left in a split: doubles, texts with two answers, and what is shared with others."""
        found = []
        if self.policy == "released":
            found += [f"{n} asked before in the split" for n in [self.n_doubles[split]] if n]
            found += [f"{n} texts with two answers" for n in [self.n_contradictory[split]] if n]
        for shared in self.still_shared:
            if shared.split == split:
                found += [f"{n} also in {shared.other}" for n in [shared.n_same_text] if n]
                found += [f"{n} of a unit in {shared.other}" for n in [shared.n_same_unit] if n > shared.n_same_text]
        return found


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Training row behind a solved question in the prompts."""

    id: str
    answer: int


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Prompts of one dataset, made for one tokenizer."""

    name: str
    """Name in `list_datasets`, or `local/` and the name of a local file."""
    genre: str
    """MCEval8K's genre; `local` for a file of your own."""
    splits: Mapping[str, tuple[Example, ...]]
    """Examples by split: always train, valid and test."""
    split_report: SplitReport
    """Report on how the splits were made."""
    settings: PromptSettings
    """Choices that made the prompts."""
    label_rule: str
    """Statement whether labels begin with a space."""
    demonstrations: tuple[Demonstration, ...]
    """Solved questions in every prompt, in their order; these training rows are in no split."""
    fingerprint: str = field(init=False)
    """xxh3-128 (hex) over the content of all examples."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", fingerprint(self.splits))


REMEDY = "mend such rows, or leave them out with --unreadable skip"


def in_file_order(examples: Iterable[Example]) -> list[Example]:
    """Return examples of one file by line; those of a released dataset stay in their order."""
    return sorted(examples, key=lambda example: (len(example.place), example.place))


def in_one_line(reasons: Mapping[str, str]) -> str:
    """Return the first of some rows' reasons, and the number of the others."""
    more = len(reasons) - 1
    return f"{next(iter(reasons.values()))}{f' (and {more} rows more)' if more else ''}"


def fingerprint(splits: Mapping[str, Iterable[Example]]) -> str:
    """Return the xxh3-128 (hex) over splits, ids, prompts, labels, answers, groups and probed places, in order.

    The options' texts are in the prompts. Where no row names a place, the digest is what it always was.
    """
    digest = xxhash.xxh3_128()
    for split, examples in splits.items():
        for e in examples:
            place = [] if e.probe_end is None else [e.probe_end]
            digest.update(json.dumps([split, e.id, e.prompt, e.labels, e.answer, e.group, *place]).encode())
            digest.update(b"\n")
    return digest.hexdigest()


def describe_label_prefix(prefix: str, labels: Iterable[str]) -> str:
    """State whether labels begin with a space, with examples."""
    rule = "labels begin with a space" if prefix else "labels have no leading space"
    return f"{rule}: {' '.join(repr(prefix + label) for label in list(labels)[:5])}"
