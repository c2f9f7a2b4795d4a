"""`neg doctor`: a verdict on everything around a run, and on how noisy a model's numbers are."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from flows.cli.machine import machine_problems
from flows.cli.terminal import quiet_libraries
from flows.show.console import console
from flows.show.text import printable
from negcore.errors import NegError
from negcore.findings import MEANINGS, Finding, Judgement
from negcore.model.architectures import Dtype, SiteChoice

_STYLES: dict[Judgement, str] = {"good": "green", "look": "yellow", "bad": "red"}


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model whose numbers to examine, as for `neg pipeline`.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number type that you mean to run the model in.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Torch device. By default the first GPU, else the CPU.")] = None,
    site: Annotated[SiteChoice, typer.Option(help="Site of the neurons.")] = "paper",
    as_json: Annotated[bool, typer.Option("--json", help="Write the findings as JSON and nothing else.")] = False,
) -> None:
    """Look at this machine and the servers that runs use; with a model, at the noise in its numbers too.

    Examples: `neg doctor`, `neg doctor smollm2-135m`, `neg doctor org/name --dtype bfloat16`

    A line each: good, look or bad, what was found, and what to set. Packages, devices, memory, disk, the hub, models
    that are here, Prefect and Ray with their passwords, ports; nothing is started or changed, and no server is waited
    for longer than seconds. With a model: its tokenizer, BOS, the check at load, batches and padding, number types
    against float64, and how much of its probability lies on the labels of a small example. The exit code is 1 if
    anything is bad.
    """
    quiet_libraries()
    findings = []
    with console.status("looking") if console.is_terminal and not as_json else nullcontext():
        for finding in _findings(model, dtype, device, site):
            findings.append(finding)
            if not as_json:
                _show(finding)
    counts = Counter(finding.judgement for finding in findings)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        console.print(", ".join(f"{counts[judgement]} {judgement}" for judgement in MEANINGS), highlight=False)
    if counts["bad"]:
        raise typer.Exit(1)


def _findings(model: str | None, dtype: Dtype, device: str | None, site: SiteChoice) -> Iterator[Finding]:
    from tasks.doctor.examination import examine

    for problem in machine_problems():
        yield Finding("environment", "bad", problem)
    yield from examine()
    if model is not None:
        yield from _of_model(model, dtype, device, site)


def _of_model(model: str, dtype: Dtype, device: str | None, site: SiteChoice) -> Iterator[Finding]:
    """Examine a model; one that cannot be used is a finding, too."""
    from negcore.measure.memory import is_out_of_memory
    from negcore.measure.noise import examine_model
    from negcore.model.language_model import describe_model
    from tasks.doctor.model import exact_type

    try:
        card = describe_model(model)
        yield from examine_model(card, dtype=dtype, exact=exact_type(card, device), device=device, site=site)
    except NegError as error:
        yield Finding("model", "bad", str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        advice = "another --device, --dtype bfloat16, or a smaller model"
        yield Finding("model", "bad", f"there is too little memory for it in {dtype}", advice)


def _show(finding: Finding) -> None:
    line = Text.assemble(
        (finding.judgement, _STYLES[finding.judgement]), f"  {finding.what}: ", printable(finding.found)
    )
    console.print(line, soft_wrap=True)
    if finding.advice:
        console.print(Text(f"      {printable(finding.advice)}", "dim"), soft_wrap=True)
