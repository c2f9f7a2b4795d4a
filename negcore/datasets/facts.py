"""Facts with a single answer each: the prompts of sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from negcore.datasets.base import Example, Tokenizer, describe_label_prefix, fingerprint
from negcore.datasets.files import Record, read_json_lines
from negcore.datasets.local import text_field
from negcore.datasets.markup import Defuser, special_token_pattern
from negcore.datasets.mini import MINI_ROWS
from negcore.datasets.render import label_prefixes, mask_of
from negcore.datasets.rows import Row
from negcore.datasets.sheets import local_file, read_arrow
from negcore.datasets.splits import seeded_order
from negcore.errors import DatasetError
from negcore.model.prompt_ids import PromptReader

COLUMNS = ("uuid", "prompt", "tpl", "answer")
COUNTERFACTUAL = "counterfactual"
"""A column that there may be: the prompt but for what it asks."""
MINI_FACTS = "mini/facts"


@dataclass(frozen=True, kw_only=True)
class FactSet:
    """Prompts with one label each: the fact's answer, a single token of the given tokenizer."""

    name: str
    """`mini/facts`, or the stem of the file."""
    examples: tuple[Example, ...]
    """Sample in seeded order; `group` is the fact's template."""
    n_rows: int
    """Facts in the source."""
    n_multi_token: int
    """Facts that are left out because their answer is not exactly one token after the prompt."""
    n_defused: int
    """Facts in `examples` whose text held a special token of the tokenizer, which a space now breaks."""
    label_rule: str
    """Statement whether labels begin with a space."""
    fingerprint: str = field(init=False)
    """xxh3-128 (hex) over the content of the examples."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", fingerprint({"facts": self.examples}))


def load_facts(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    seed: int = 0,
    masked: bool = False,
) -> FactSet:
    """Load factual prompts whose answer is one token.

    Labels begin with a space if that leaves at least as many single-token answers as no space does. A fact is data: a
    space breaks special tokens in its text, so that they stay text.

    Parameters
    ----------
    source : str or Path
        A .feather, .parquet or .jsonl file with the columns uuid, prompt, tpl and answer (MyriadLAMA's form) and,
        if there are counterfactuals, counterfactual; on disk or as `hf://datasets/ORGANISATION/DATASET/FILE` on the
        Hugging Face hub. Or `mini/facts` for a small set that needs no file.
    tokenizer : Tokenizer
    limit : int, optional
        Most facts of the seeded sample. None keeps all.
    seed : int
    masked : bool
        True for a masked model: each prompt then ends in the mask token.

    Raises
    ------
    DatasetError
        If the source is unknown, malformed or empty, or no answer is a single token.

    References
    ----------
    Zhao, Yoshinaga and Oba, "What Matters in Memorizing and Recalling Facts? Multifaceted Benchmarks for
    Knowledge Probing in Language Models" (MyriadLAMA), 2024.
    """
    if limit is not None and limit < 1:
        raise DatasetError(f"limit is {limit!r}; allowed: a whole number from 1, or None for all facts")
    mask = mask_of(tokenizer, masked=masked)
    name = MINI_FACTS if source == MINI_FACTS else Path(source).stem
    rows = _rows(source, name)
    defuser = Defuser(special_token_pattern(tokenizer))
    harmless = [defuser.row(row) for row in rows]
    prefix, kept = _single_token(harmless, PromptReader(tokenizer, masked=masked), mask)
    if not kept:
        raise DatasetError(f"{source}: none of the {len(rows)} answers is one token; use another set of facts")
    sample = seeded_order(kept, seed, name)[:limit]
    raw = {row.id: row for row in rows}
    return FactSet(
        name=name,
        examples=tuple(_example(row, prefix, mask) for row in sample),
        n_rows=len(rows),
        n_multi_token=len(rows) - len(kept),
        n_defused=sum(row.fields != raw[row.id].fields for row in sample),
        label_rule=describe_label_prefix(prefix, (row.options[0] for row in sample)),
    )


def _example(row: Row, prefix: str, mask: str | None) -> Example:
    counterfactual = _prompt(row, mask, COUNTERFACTUAL) if COUNTERFACTUAL in row.fields else ""
    label = prefix + row.options[0]
    return Example(row.id, _prompt(row, mask), (label,), 0, row.group, (), row.place, counterfactual)


def _prompt(row: Row, mask: str | None, field: str = "prompt") -> str:
    return f"{row.fields[field]} {mask}" if mask else row.fields[field]


def _single_token(rows: Sequence[Row], reader: PromptReader, mask: str | None) -> tuple[str, list[Row]]:
    """Return the prefix with which most answers are one token in their place, and the rows of these answers."""
    prompts = [_prompt(row, mask) for row in rows]
    ids = reader.read(prompts)
    by_prefix: dict[str, list[Row]] = {}
    for prefix in label_prefixes(reader, prompts, ids):
        found = reader.label_ids(prompts, ids, [[prefix + row.options[0]] for row in rows])
        by_prefix[prefix] = [row for row, (label_id,) in zip(rows, found, strict=True) if isinstance(label_id, int)]
    best = max(by_prefix, key=lambda prefix: len(by_prefix[prefix]))
    return best, by_prefix[best]


def _rows(source: str | Path, name: str) -> list[Row]:
    records = _read(_local(str(source)))
    if not records:
        raise DatasetError(f"{source}: there are no facts; each row needs {', '.join(COLUMNS)}")
    return [_row(record, f"{name}/{number}", place) for number, (place, record) in enumerate(records)]


def _local(source: str) -> Path:
    return MINI_ROWS / "facts.jsonl" if source == MINI_FACTS else local_file(source, "facts")


def _read(path: Path) -> Sequence[tuple[str, Record]]:
    suffix = path.suffix.lower()
    if suffix not in (".feather", ".parquet", ".jsonl"):
        raise DatasetError(f"facts {str(path)!r}: allowed: a .feather, .parquet or .jsonl file, or {MINI_FACTS!r}")
    if suffix == ".jsonl":
        return [(f"{path}:{number}", record) for number, record in read_json_lines(path)]
    sheet = read_arrow(path, (*COLUMNS, COUNTERFACTUAL))
    missing = [name for name in COLUMNS if name not in sheet.columns]
    if missing:
        raise DatasetError(f"{path}: no column {missing[0]!r}; needed: {', '.join(COLUMNS)}")
    return sheet.records


def _row(record: Record, row_id: str, place: str) -> Row:
    if record.get("probe_at") is not None:
        raise DatasetError(
            f"{place}: facts are asked at their prompt's last token, and probe_at names another; leave it out, or "
            "make a dataset of them for neg pipeline"
        )
    text = {name: text_field(record, name, place) for name in COLUMNS}
    prompts = {"prompt": text["prompt"].rstrip(" ")}
    if record.get(COUNTERFACTUAL) is not None:
        prompts[COUNTERFACTUAL] = text_field(record, COUNTERFACTUAL, place).rstrip(" ")
    answer = text["answer"].strip()
    return Row(f"{row_id}/{text['uuid']}", prompts, (answer,), 0, text["tpl"], content="", whole="", place=place)
