"""The command that makes a dataset out of a table of yours: `neg import`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from flows.cli.completion import complete_model, complete_table
from flows.cli.terminal import quiet_libraries, reading
from flows.show.console import console, tell
from negcore.errors import LabelError, NegError, RunError


def import_table(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A .csv, .tsv, .json, .jsonl, .parquet or .feather file, or hf://datasets/ORG/NAME/FILE.",
            autocompletion=complete_table,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to write, ending in .jsonl. By default FILE's name, here.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help=r"Column of the prompt; or a text with columns in braces, as in 'Review: {text}\nMood:', where "
            "{options} lists the options with letters, which the model then answers."
        ),
    ] = None,
    answer: Annotated[str | None, typer.Option(help="Column of the right answer.")] = None,
    options: Annotated[
        list[str] | None, typer.Option(help="Column with a list of a row's options, or one for each. Repeatable.")
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(help="Label that every row has, first to last; with {options}, in place of letters. Repeatable."),
    ] = None,
    answers: Annotated[
        Literal["text", "letter", "0", "1"] | None,
        typer.Option(
            help="What answers are: an option's text or letter, or its number from 0 or 1. By default what fits."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Column with train, valid or test.")] = None,
    group: Annotated[str | None, typer.Option(help="Column whose values get accuracies of their own.")] = None,
    unit: Annotated[str | None, typer.Option(help="Column with what rows share that belong into one split.")] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Column with a name for each row.")] = None,
    probe_at: Annotated[
        str | None, typer.Option(help="Column with a piece of the prompt, at whose last token neurons are read.")
    ] = None,
    unreadable: Annotated[
        Literal["fail", "skip"], typer.Option(help="Rows without prompt, answer or options: refuse, or leave out.")
    ] = "fail",
    model: Annotated[
        str, typer.Option(help="Model whose tokenizer checks the prompts and labels.", autocompletion=complete_model)
    ] = "smollm2-135m",
) -> None:
    r"""Make a dataset out of a table of yours, and show it as a model will read it, with an audit.

    Examples: `neg import reviews.csv --prompt 'Review: {text}\nMood:'`, `neg import hf://datasets/ORG/NAME/FILE`

    Columns with usual names (prompt, question, text; answer, label; options, choices, A, B, C; split, group, unit, id,
    probe_at) are taken without being named, if only one can be meant. Every line of the answer says where a field came
    from, what is read otherwise than it is written, and which columns were not used. A FILE that exists is kept.
    """
    quiet_libraries()
    from negcore.datasets.importing import Columns, import_sheet
    from negcore.datasets.sheets import local_file, read_sheet

    file = local_file(source, "file")
    target = out or Path(file.stem + ".jsonl")
    columns = Columns(
        prompt=prompt,
        answer=answer,
        options=tuple(options or ()),
        labels=tuple(labels or ()),
        answers=answers,
        split=split,
        group=group,
        unit=unit,
        id=id_,
        probe_at=probe_at,
    )
    sheet = read_sheet(file)
    _check_target(target)
    imported = import_sheet(sheet, columns, target, unreadable=unreadable)
    _write(target, imported.rows)
    console.print(f"{len(imported.rows)} of {len(sheet.records)} rows are in {escape(str(target))}", highlight=False)
    for line in imported.told:
        console.print(escape(line), highlight=False, soft_wrap=True)
    try:
        _show(target, model)
    except NegError as error:
        if isinstance(error, LabelError) and not imported.has_letters:
            by_letter = f"remove {target} and ask for a letter: --prompt '{{COLUMN}}\\n{{options}}\\nAnswer:'"
            error = type(error)(f"{error}; or {by_letter}")
        tell("error", f"{error}")
        raise typer.Exit(1) from None


def _check_target(target: Path) -> None:
    if target.suffix.lower() != ".jsonl":
        raise RunError(f"--out is {str(target)!r}; allowed: a file that ends in .jsonl")
    if target.exists():
        raise RunError(f"{str(target)!r} is there already, and is not replaced: remove it, or give another --out")


def _write(target: Path, rows: list[dict[str, object]]) -> None:
    from negcore.store.files import output

    with output(target) as file:
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _show(target: Path, model: str) -> None:
    """Show the dataset that a file holds now, with its audit, and the next command."""
    from flows.show.audit_tables import audit_tables, balance_table
    from flows.show.display import describe_dataset
    from negcore.datasets import PromptSettings
    from negcore.model.language_model import describe_model
    from tasks.audit import audit_dataset
    from tasks.plan import read_dataset
    from tasks.prompt_warnings import prompt_warnings

    settings = PromptSettings()
    with reading():
        card = describe_model(model)
        dataset, encoded = read_dataset(card, str(target), settings)
        audit = audit_dataset(str(target), card, settings=settings)
    describe_dataset(console, dataset, card.tokenizer)
    for table in (balance_table(dataset, encoded), *audit_tables([audit], settings)):
        console.print(table)
    for warning in prompt_warnings(card, dataset):
        tell("warning", warning, "yellow")
    line = f"next: neg pipeline --model {model} --dataset {target}"
    console.print(escape(line), highlight=False, soft_wrap=True)
