"""Tables of `neg datasets --audit`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from flows.show.accuracy_tables import short
from flows.show.model_names import shown_model
from flows.show.table import Cell, Column, Number, Table, interval, numbers, texts
from flows.show.text import share
from negcore.datasets import SPLITS, Dataset, PromptSettings
from negcore.errors import RunError
from negcore.store.files import output
from tasks.audit import DatasetAudit
from tasks.measure.examples import EncodedExample
from tasks.rundir.tables import write_table

ROWS = """Released: rows in the files of train, valid, test; clean: what that split policy leaves of them. Doubles: \
rows that ask what an earlier row of their split asks. Two answers: texts that have several answers in their split."""
SHARED = """Released rows of one split whose text is in another. Same unit: test rows that ask something else of a \
sentence (or other unit) in train, where rows alone are compared (clean-rows); under clean there are none."""
BALANCE = """Rows whose right answer it is, of those that the split policy leaves."""
FLOORS = """On the rows that clean leaves. Options only: accuracy on test, with its 95 % interval (Wilson), of a \
forest that sees options, lengths and the group but no word of the question."""
ASKED = """ Label mass: mean sum of the options' \
probabilities at the prompt's end, of {model} on a seeded sample of at most {n} test prompts ({shots}, wording \
{wording})."""


def audit_tables(audits: Sequence[DatasetAudit], settings: PromptSettings) -> list[Table]:
    """Return the tables of an audit, of one dataset at least: rows, shared rows, floors."""
    return [_rows(audits), _shared(audits), _floors(audits, settings)]


def balance_table(dataset: Dataset, encoded: Mapping[str, Sequence[EncodedExample]]) -> Table:
    """Return how often each label is right in every split, with its token id; where rows have labels of their own,
    how often each place among them is."""
    splits = {split: [one.answer for one in examples] for split, examples in dataset.splits.items()}
    labelled = {
        (example.labels, tuple(example.label_ids.tolist())) for examples in encoded.values() for example in examples
    }
    rows: list[list[Cell]]
    if len(labelled) == 1:
        (labels, ids), title, token = next(iter(labelled)), "label", "token"
        names = [(repr(label), Number(number)) for label, number in zip(labels, ids, strict=True)]
    else:
        title, token = "option", "labels"
        n_options = max(len(labels) for labels, _ in labelled)
        several = [Number(len({labels[i] for labels, _ in labelled if i < len(labels)})) for i in range(n_options)]
        names = [(f"{i + 1} of {n_options}", several[i]) for i in range(n_options)]
    rows = [
        [name, number, *(Number(answers.count(i)) for answers in splits.values())]
        for i, (name, number) in enumerate(names)
    ]
    columns = [Column(title, is_private=True), *numbers(token, *splits)]
    return Table("balance", f"Right answers of {dataset.name}", columns, [rows], BALANCE)


def _rows(audits: Sequence[DatasetAudit]) -> Table:
    kinds = ("released", "clean", "doubles", "contradictory")
    rows = [[_name(one), *(_by_split(one, kind) for kind in kinds), one.notes] for one in audits]
    columns = [*texts("dataset"), *numbers("released", "clean", "doubles", "two answers"), *texts("notes")]
    return Table("audit-rows", "Rows of train, valid, test", columns, [rows], ROWS)


def _by_split(audit: DatasetAudit, kind: str) -> str:
    return " ".join(str(getattr(audit, f"{kind}_{split}")) for split in SPLITS)


def _shared(audits: Sequence[DatasetAudit]) -> Table:
    counted = ("test_in_train", "valid_in_test", "valid_in_train", "units_in_train")
    rows: list[list[Cell]] = [[_name(one), *(Number(getattr(one, name)) for name in counted)] for one in audits]
    columns = [*texts("dataset"), *numbers("test in train", "valid in test", "valid in train", "same unit in train")]
    return Table("audit-shared", "Rows that splits share", columns, [rows], SHARED)


def _floors(audits: Sequence[DatasetAudit], settings: PromptSettings) -> Table:
    rows: list[list[Cell]] = [
        [
            _name(one),
            Number(one.n_options),
            Number(one.random, share),
            Number(one.majority, share),
            Number(one.options_only, share),
            interval(one.low, one.high).strip(),
            Number(one.label_mass, share) if one.label_mass is not None else "-",
        ]
        for one in audits
    ]
    titles = ("options", "random", "majority", "options only", "95 %", "label mass")
    how = {
        "shots": ("zero-shot", "one-shot")[settings.shots],
        "wording": settings.wording,
        "model": shown_model(audits[0].model),
    }
    n_asked = max(one.n_asked for one in audits)
    caption = FLOORS + (ASKED.format(n=n_asked, **how) if n_asked else "")
    return Table("audit-floors", "Floors and label mass", [*texts("dataset"), *numbers(*titles)], [rows], caption)


def _name(audit: DatasetAudit) -> str:
    return short(audit.dataset)


def check_audit_file(file: Path) -> None:
    """Refuse a file that `write_audit` does not know how to write."""
    if file.suffix not in (".arrow", ".md"):
        raise RunError(f"--out is {str(file)!r}; allowed: a file that ends in .md (as shown) or .arrow (every number)")


def write_audit(file: Path, audits: Sequence[DatasetAudit], tables: Sequence[Table], command: str) -> None:
    """Write an audit as Markdown, with the command that made it, or as an Arrow file, a row for each dataset.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    if file.suffix == ".arrow":
        write_table(file, DatasetAudit, [asdict(one) for one in audits])
        return
    head = f"# Audit of the datasets\n\nWritten by this command; edit nothing here.\n\n```bash parsed\n{command}\n```"
    with output(file) as draft:
        draft.write_text("\n\n".join([head, *(table.markdown for table in tables)]) + "\n", encoding="utf-8")
