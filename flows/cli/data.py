"""Commands about what is measured: models and datasets."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from flows.cli.completion import complete_dataset, complete_model
from flows.cli.terminal import quiet_libraries
from flows.show.console import console, tell
from negcore.errors import RunError
from negcore.model.architectures import Dtype, SiteChoice


def models(
    ref: Annotated[
        str | None, typer.Argument(help="A model to load, describe and check.", autocompletion=complete_model)
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number type to check it in.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Torch device. By default the first GPU, else the CPU.")] = None,
    site: Annotated[SiteChoice, typer.Option(help="Site of the neurons to check.")] = "paper",
) -> None:
    """List the models that ship as packages and the families that can be measured, or load one model and check it.

    Examples: `neg models`, `neg models smollm2-135m`, `neg models org/name --dtype bfloat16`

    A model that cannot be measured rightly is refused in its last line.
    """
    quiet_libraries()
    if ref is not None:
        from flows.cli.model_check import show_model

        show_model(ref, dtype=dtype, device=device, site=site)
        return
    from negcore.model.architectures import ARCHITECTURES
    from negcore.model.embedded import EMBEDDED

    for alias, embedded in EMBEDDED.items():
        console.print(f"[bold]{alias}[/bold]  embedded: {embedded.command}", highlight=False)
    table = Table(
        "family", "prediction", "sites (paper = first)", "way", title="Families: any safetensors model of these types"
    )
    for name, arch in sorted(ARCHITECTURES.items()):
        way = "whole" if arch.whole else arch.way
        table.add_row(name, "masked token" if arch.masked else "next token", ", ".join(arch.sites), way)
    console.print(table)
    console.print("A type that is not listed is searched for its feed-forward layers when a model of it is described.")


def datasets(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME...",
            help="Datasets to look at more closely, by name or file.",
            autocompletion=complete_dataset,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Model whose tokenizer makes the prompts.", autocompletion=complete_model)
    ] = "smollm2-135m",
    shots: Annotated[Literal["0", "1"], typer.Option(help="Demonstrations of each class.")] = "0",
    wording: Annotated[str, typer.Option(help="Name of one of the dataset's wordings.")] = "default",
    prompt_format: Annotated[Literal["plain", "chat"], typer.Option(help="chat: by the model's template.")] = "plain",
    system_prompt: Annotated[str | None, typer.Option(help="System text in front of a chat.")] = None,
    answers: Annotated[
        Literal["token", "sequence"], typer.Option(help="sequence: labels may be several tokens.")
    ] = "token",
    mceval8k: Annotated[Path | None, typer.Option(help="Folder with MCEval8K.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Audit the named datasets, or all: shared rows, floors, label mass.")
    ] = False,
    rows: Annotated[
        int, typer.Option(min=0, help="For --audit: test prompts of each dataset that the model is asked; 0 for none.")
    ] = 100,
    out: Annotated[Path | None, typer.Option(help="For --audit: file to write, .md or .arrow.")] = None,
) -> None:
    """List the datasets, or show some as a model will read them: rows of their splits, label rule, a prompt.

    Examples: `neg datasets`, `neg datasets mini/fact --shots 1`, `neg datasets --audit --out audit.md`

    All prompts and labels of a dataset go through the checks of a run.

    An audit needs no run: it counts what splits share and repeat, fits floors that see no question, and asks the model
    how much of its probability lies on the options at all. A dataset that cannot be read is named at the end; the
    others go on, and the exit code is 1.
    """
    quiet_libraries()
    from flows.show.display import dataset_table, describe_dataset
    from negcore.datasets import PromptSettings, list_datasets

    settings = PromptSettings(
        shots=1 if shots == "1" else 0,
        wording=wording,
        prompt_format=prompt_format,
        system_prompt=system_prompt,
        answers=answers,
    )
    if audit:
        from flows.cli.audit import show_audit

        show_audit(names or [info.name for info in list_datasets()], model, settings, mceval8k, rows, out)
        return
    if out is not None:
        raise RunError("--out is for --audit: add it")
    if not names:
        console.print(dataset_table(list_datasets()))
        return
    from negcore.model.language_model import describe_model
    from tasks.plan import read_dataset
    from tasks.prompt_warnings import prompt_warnings

    card = describe_model(model)
    for name in names:
        dataset, _ = read_dataset(card, name, settings, mceval8k)
        describe_dataset(console, dataset, card.tokenizer)
        for warning in prompt_warnings(card, dataset):
            tell("warning", warning, "yellow")
