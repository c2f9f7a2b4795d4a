"""The command that matches the neurons of two models."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from flows.cli.completion import complete_run
from flows.cli.neurons import Datasets
from flows.cli.tables import Format, Out, deliver, format_of, warn_of
from flows.cli.terminal import doing, quiet_libraries
from flows.show.console import console, tell
from negcore.errors import RunError
from negcore.store.files import location


def match(
    first: Annotated[
        str, typer.Argument(metavar="RUN", help="Run directory of the one model.", autocompletion=complete_run)
    ],
    second: Annotated[
        str,
        typer.Argument(
            metavar="OTHER", help="Run directory of the other, on the same rows.", autocompletion=complete_run
        ),
    ],
    dataset: Datasets = None,
    model: Annotated[str | None, typer.Option(help="Model of RUN, where it has several.")] = None,
    other_model: Annotated[str | None, typer.Option(help="Model of OTHER, where it has several.")] = None,
    neurons: Annotated[
        str | None,
        typer.Option(help="Neurons of RUN to match: so many, drawn evenly from all layers, or all. By default 1024."),
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option(min=0, help="Match all neurons of this layer instead. Repeatable.")
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Match the best neurons of a ranking instead.")] = None,
    probe: Annotated[str, typer.Option(help="Vote probe whose ranking --top takes.")] = "magn",
    shuffles: Annotated[int, typer.Option(min=1, max=9999, help="Shuffles of the rows.")] = 99,
    seed: Annotated[int, typer.Option(min=0, help="Draws neurons and shuffles.")] = 0,
    form: Format = None,
    out: Out = None,
) -> None:
    """Match neurons of two models by their NEGs over the same rows, beside what shuffled rows match.

    Examples: `neg match runs/one runs/other`, `neg match runs/one runs/other --layer 20 --format csv --out m.csv`

    Of every chosen neuron of RUN, the neuron of OTHER is found, among all, whose NEGs over all rows and options have
    the highest correlation with its own. Models may differ in architecture and tokenizer; rows, options and their order
    may not. The table has, by layer, the share of neurons whose match few shuffles of the rows reach, and the layer in
    which matches lie. Rows of one unit, such as a sentence, stay together in a shuffle. With --format, the single
    matches are written. What a match means is told in docs/analyses.md.
    """
    quiet_libraries()
    import pyarrow as pa

    from flows.show.match_tables import match_table
    from flows.show.model_names import told_apart
    from tasks.matches import Choice, MatchRow, match_runs
    from tasks.rundir.tables import arrow_table

    name = format_of(form, out)
    choice = Choice(tuple(layer or ()), top, _count(neurons))
    if sum(given is not None for given in (layer, top, neurons)) > 1:
        raise RunError("--neurons, --layer and --top each say which neurons to match: give one of them")
    roots = [location(run).absolute() for run in (first, second)]
    for root in roots:
        warn_of(root)
    options: dict[str, Any] = {"models": (model, other_model), "datasets": dataset or (), "probe": probe}
    tables: list[pa.Table] = []
    with doing("matching neurons"):
        found = list(match_runs(roots[0], roots[1], choice, **options, n_shuffles=shuffles, seed=seed))
    for one in found:
        if one.units_missing:
            tell("warning", f"{one.title}: rows were shuffled one by one: {one.units_missing}", "yellow")
        tables.append(arrow_table(MatchRow, [asdict(row) for row in one.rows]))
        if name is None:
            with told_apart([one.identity.model, one.other_identity.model]):
                console.print(match_table(one))
    if name is not None:
        deliver(pa.concat_tables(tables), name, out)


def _count(neurons: str | None) -> int | None:
    """Return the number of neurons to draw, 0 for all."""
    if neurons is None:
        return None
    if neurons != "all" and (not neurons.isdecimal() or not 1 <= int(neurons) < 10**9):
        raise RunError(f"--neurons is {neurons!r:.80}: give a whole number from 1, or all")
    return 0 if neurons == "all" else int(neurons)
