"""Load any dataset as prompts for one tokenizer."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from negcore.datasets.base import (
    REMEDY,
    SPLITS,
    Change,
    Dataset,
    Demonstration,
    Example,
    PromptSettings,
    SplitReport,
    Tokenizer,
    Wording,
    check_template,
    describe_label_prefix,
    in_file_order,
    in_one_line,
)
from negcore.datasets.chat import Chat
from negcore.datasets.local import read_local
from negcore.datasets.markup import Defuser, special_token_pattern
from negcore.datasets.mceval8k import PREFIX, SPECS, read_mceval8k
from negcore.datasets.mini import MINI_SPECS, read_mini
from negcore.datasets.orders import check_orders, permuted_rows
from negcore.datasets.render import (
    Renderer,
    common_label_prefix,
    mask_of,
    prompt_end,
)
from negcore.datasets.rows import Row, Source
from negcore.datasets.sheets import READERS
from negcore.datasets.specs import Spec
from negcore.datasets.splits import (
    Cut,
    Rows,
    contradictory,
    cut_splits,
    distinct,
    draw_demonstrations,
    stratified_sample,
    without,
)
from negcore.errors import DatasetError, LabelError, NegError, PromptError
from negcore.model.prompt_ids import AnswerKind, PromptReader


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """Entry in the list of datasets."""

    name: str
    genre: str
    n_options: int
    wordings: tuple[str, ...]


def list_datasets() -> tuple[DatasetInfo, ...]:
    """List the datasets that have a name: the 22 of MCEval8K and six that need no download."""
    return tuple(
        DatasetInfo(name, spec.genre, spec.n_options, tuple(wording.name for wording in spec.wordings))
        for name, spec in {**SPECS, **MINI_SPECS}.items()
    )


def load_dataset(
    name: str,
    tokenizer: Tokenizer,
    *,
    settings: PromptSettings,
    root: str | Path | None = None,
    masked: bool = False,
) -> Dataset:
    """Load a dataset as prompts for one tokenizer.

    Every prompt ends where its label must follow, without a trailing space. Spacing within a row's text is
    collapsed, and a space breaks the tokenizer's special tokens in it, so that text stays text. Ready-made prompts
    are taken as they are: what is a special token in them is one for the model.

    Parameters
    ----------
    name : str
        A name from `list_datasets`, or the path of a .jsonl file with the fields prompt, labels and answer.
    tokenizer : Tokenizer
        Tokenizer of the model that will be measured.
    settings : PromptSettings
    root : str or Path, optional
        Folder with MCEval8K as `<genre>/<dataset>/{train,valid,test}.json`; by default the one in the environment
        variable NEG_MCEVAL8K, else the Hugging Face hub.
    masked : bool
        True for a masked model: each prompt then ends in the mask token, unless a ready-made one has its own.

    Raises
    ------
    DatasetError
        If the name is unknown, a file is missing or malformed, or the split policy leaves nothing.
    LabelError
        If the labels are not single tokens of this tokenizer.
    PromptError
        If `masked` is set and the tokenizer has no mask token, or prompts are to be chats and its template does not
        make them.
    """
    mask = mask_of(tokenizer, masked=masked)
    if masked and settings.answers != "token":
        raise LabelError(f"answers {settings.answers!r} is for models that go on with a text; a mask holds one token")
    canonical, source = read_source(name, settings.seed, root)
    wording = _wording(canonical, source, settings.wording)
    cut = cut_splits(source.rows, settings.split_policy, settings.seed, canonical)
    shots = _demonstrations(cut, settings, canonical)
    for rows in cut.rows.values():
        check_orders(canonical, wording, rows, settings.permutations)
    available = {**cut.rows, "train": without(cut.rows["train"], shots)}
    raw = {split: _sample(available[split], settings, canonical, split) for split in SPLITS}
    defuser = Defuser(special_token_pattern(tokenizer) if wording else None)
    used = {split: [defuser.row(row) for row in raw[split]] for split in SPLITS}
    plain = Renderer(wording=wording, mask=mask, chat=_chat(settings, tokenizer, masked))
    reader = PromptReader(tokenizer, masked=masked)
    examples = in_file_order(plain.example(row) for split in SPLITS for row in used[split])
    odd = _unreadable(canonical, plain, examples, reader, settings)
    cut = replace(cut, dropped=(*cut.dropped, *_left_out(used, odd)))
    raw, used = _kept(raw, odd), _kept(used, odd)
    readable = [example for example in examples if example.id not in odd]
    prefix, labels = _label_prefix(plain, readable, reader, settings.answers)
    renderer = replace(plain, label_prefix=prefix).with_demonstrations(map(defuser.row, shots))
    orders = settings.permutations, settings.seed, canonical
    return Dataset(
        name=canonical,
        genre=source.genre,
        splits={split: tuple(map(renderer.example, permuted_rows(rows, *orders))) for split, rows in used.items()},
        split_report=_report(source, settings, cut, available, raw, used),
        settings=settings,
        label_rule=describe_label_prefix(prefix, labels),
        demonstrations=tuple(Demonstration(row.id, row.answer) for row in shots),
    )


def _sample(rows: Sequence[Row], settings: PromptSettings, name: str, split: str) -> list[Row]:
    most = settings.most_rows(split)
    return stratified_sample(rows, len(rows) if most is None else most, settings.seed, name, split)


def _demonstrations(cut: Cut, settings: PromptSettings, name: str) -> list[Row]:
    return draw_demonstrations(cut.rows, settings.seed, name, sample=settings.demonstrations) if settings.shots else []


def _report(source: Source, settings: PromptSettings, cut: Cut, available: Rows, raw: Rows, used: Rows) -> SplitReport:
    def sizes(rows: Rows) -> dict[str, int]:
        return {split: len(rows.get(split, ())) for split in SPLITS}

    released = {split: source.rows.get(split, []) for split in SPLITS}
    n_damaged = {split: source.n_damaged.get(split, 0) for split in SPLITS}
    return SplitReport(
        policy=settings.split_policy,
        n_released={split: n + n_damaged[split] for split, n in sizes(source.rows).items()},
        n_damaged=n_damaged,
        n_available=sizes(available),
        n_used=sizes(used),
        n_defused={split: sum(a != b for a, b in zip(raw[split], used[split], strict=True)) for split in SPLITS},
        n_doubles={split: len(rows) - len(distinct(rows)) for split, rows in released.items()},
        n_contradictory={split: len(contradictory(rows)) for split, rows in released.items()},
        overlaps=cut.overlaps,
        still_shared=cut.still_shared,
        dropped=cut.dropped,
        drawn=cut.drawn,
        group_is_answer=source.group_is_answer,
    )


def read_source(name: str, seed: int, root: str | Path | None = None) -> tuple[str, Source]:
    """Return a dataset's canonical name and its rows, before any policy; arguments and errors as of `load_dataset`."""
    canonical = dataset_name(name)
    if is_own_file(name):
        return canonical, read_local(Path(name), seed).with_telling_groups()
    if canonical in MINI_SPECS:
        return canonical, read_mini(canonical).with_telling_groups()
    return canonical, read_mceval8k(SPECS[canonical], Path(root) if root is not None else None).with_telling_groups()


def is_own_file(name: str) -> bool:
    """Tell whether a dataset's name is that of a file of the user's own, whose prompts are ready-made."""
    return name.lower().endswith(".jsonl")


def dataset_name(name: str) -> str:
    """Return the name that a dataset has in every output.

    Raises
    ------
    DatasetError
        If there is no dataset of this name.
    """
    if is_own_file(name):
        return f"local/{Path(name).stem}"
    specs: Mapping[str, Spec] = {**SPECS, **MINI_SPECS}
    spellings = {canonical: canonical for canonical in specs}
    for canonical, spec in SPECS.items():
        spellings |= {PREFIX + alias: canonical for alias in spec.aliases}
    if name.lower() in spellings:
        return spellings[name.lower()]
    if name.lower().endswith((".feather", ".parquet")):
        raise DatasetError(f"{name!r} is a file of facts with one answer each; load it with load_facts")
    by_end = {known.split("/")[1]: known for known in spellings}
    like = [*difflib.get_close_matches(name.lower(), spellings), *difflib.get_close_matches(name.lower(), by_end)]
    close = list(dict.fromkeys(by_end.get(one, one) for one in like))[:3]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`neg datasets` lists all."
    raise DatasetError(f"unknown dataset {name!r}; {hint} A file of your own {_own_file(name)}")


def _own_file(name: str) -> str:
    """Return what a name must be to be a file of the user's own, for one that is none."""
    if Path(name).suffix.lower() in READERS:
        return f"must end in .jsonl: neg import {name} makes one"
    if os.path.isfile(f"{name}.jsonl"):  # noqa: PTH113 - whatever the name is, this raises nothing
        return f"must end in .jsonl, as {name + '.jsonl'!r} does"
    return "must end in .jsonl"


def _wording(name: str, source: Source, wanted: str | Wording) -> Wording | None:
    if not source.wordings:
        if wanted != "default":
            raise DatasetError(f"{name}: its prompts are ready-made; the only wording allowed is 'default'")
        return None
    wordings = {wording.name: wording for wording in source.wordings}
    if isinstance(wanted, str) and wanted not in wordings:
        raise DatasetError(f"{name}: unknown wording {wanted!r}; allowed: {', '.join(map(repr, wordings))}")
    wording = wordings[wanted] if isinstance(wanted, str) else wanted
    for row in source.rows["test"][:1]:
        check_template(wording.question, tuple(row.fields))
    return wording


def _chat(settings: PromptSettings, tokenizer: Tokenizer, masked: bool) -> Chat | None:
    if settings.prompt_format == "plain":
        return None
    if masked:
        raise PromptError("prompt_format 'chat' is for models that go on with a text, and this one fills masks")
    chat = Chat(tokenizer, settings.system_prompt)
    _ = chat.label_prefix  # a template that gives none is at fault as a whole, not in a row
    return chat


def _unreadable(
    name: str, plain: Renderer, examples: Sequence[Example], reader: PromptReader, settings: PromptSettings
) -> dict[str, str]:
    """Return the rows that are to be left out because no model, or not this one, can read them: reasons by id.

    Raises
    ------
    DatasetError
        If there are some and they are not to be left out, or none is left.
    """
    usual = Counter(len(example.labels) for example in examples).most_common(1)[0][0]
    odd = {
        example.id: f"{example.named} has {len(example.labels)} labels, but most rows have {usual}"
        for example in examples
        if len(example.labels) != usual
    }
    if odd and settings.unreadable == "fail":
        raise DatasetError(f"{name}: {in_one_line(odd)}; {REMEDY}")
    if settings.unreadable == "skip":
        left = [example for example in examples if example.id not in odd]
        odd |= _misread(plain, left, reader, settings.answers)
    if len(odd) == len(examples):
        raise DatasetError(f"{name}: no row can be read: {in_one_line(odd)}")
    return odd


def _misread(plain: Renderer, examples: Sequence[Example], reader: PromptReader, answers: AnswerKind) -> dict[str, str]:
    """Return the rows whose labels fit neither with a space before them nor without, and why."""
    wrong: dict[tuple[str, tuple[str, ...]], str] = {}
    for ending, example in {_ending(example): example for example in examples}.items():
        try:
            _label_prefix(plain, [example], reader, answers)
        except NegError as error:
            wrong[ending] = f"{error}"
    return {example.id: wrong[_ending(example)] for example in examples if _ending(example) in wrong}


def _left_out(rows: Rows, odd: Mapping[str, str]) -> list[Change]:
    """Return how many rows each split loses, with the first one's reason."""
    by_split = {split: {row.id: odd[row.id] for row in rows[split] if row.id in odd} for split in SPLITS}
    return [Change(split, len(reasons), in_one_line(reasons)) for split, reasons in by_split.items() if reasons]


def _kept(rows: Rows, odd: Mapping[str, str]) -> dict[str, list[Row]]:
    return {split: [row for row in of_split if row.id not in odd] for split, of_split in rows.items()}


def _label_prefix(
    plain: Renderer, examples: Sequence[Example], reader: PromptReader, answers: AnswerKind
) -> tuple[str, tuple[str, ...]]:
    """Return the prefix that fits every prompt, and one row's labels as an example.

    Prompts that end alike stand for each other: the encoding checks all of them.
    """
    first = {_ending(example): example for example in reversed(examples)}
    asked = {example.named: (example.prompt, example.labels) for example in reversed(first.values())}
    try:
        prefix = common_label_prefix(reader, asked, plain.chat.label_prefix if plain.chat else None, answers)
    except NegError as error:
        for example in first.values() if len(asked) > 1 else ():
            _label_prefix(plain, [example], reader, answers)  # the row at fault is named
        name = next(iter(asked)) if len(asked) == 1 else ""
        raise type(error)(f"{error}; {REMEDY}" if name in f"{error}" else f"{name}: {error}; {REMEDY}") from None
    return prefix, next(iter(asked.values()))[1]


def _ending(example: Example) -> tuple[str, tuple[str, ...]]:
    return prompt_end(example.prompt), example.labels
