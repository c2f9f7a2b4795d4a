"""The command that counts the neurons which datasets use."""

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from flows.cli.completion import complete_run
from flows.cli.neurons import Datasets
from flows.cli.tables import Format, Out, deliver, format_of, warn_of
from flows.cli.terminal import doing, quiet_libraries
from flows.show.console import console
from negcore.store.files import location


def mui(
    runs: Annotated[list[str], typer.Argument(help="Run directories.", autocompletion=complete_run)],
    dataset: Datasets = None,
    model: Annotated[str | None, typer.Option(help="Model, where a run has several. By default all.")] = None,
    score: Annotated[
        Literal["contribution", "neg"],
        typer.Option(help="contribution: NEG times |activation|, nearest to the paper's; neg: the NEG alone."),
    ] = "contribution",
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a layer's neurons that a row uses, at least one.")
    ] = 0.001,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows at which datasets are compared. By default those of the smallest.")
    ] = None,
    form: Format = None,
    out: Out = None,
) -> None:
    """Count the neurons that datasets use: the Model Utilization Index (arXiv 2504.07440), at equal numbers of rows.

    Examples: `neg mui runs/NAME`, `neg mui runs/one runs/other --score neg --format csv --out mui.csv`

    A row uses, in each layer, the neurons with the highest scores for the answer that the model gives; a dataset uses
    what any of its rows does. With --format, the shares at 1, 2, 4, ... rows are written. What the index means, and how
    it differs from the paper's, is told in docs/analyses.md.
    """
    quiet_libraries()
    from flows.show.model_names import told_apart
    from flows.show.utilisation_tables import utilisation_tables
    from tasks.rundir.tables import arrow_table
    from tasks.utilisation import UsedRow, utilisation

    name = format_of(form, out)
    roots = [location(run).absolute() for run in dict.fromkeys(runs)]
    for root in roots:
        warn_of(root)
    with doing("counting neurons"):
        found = utilisation(roots, datasets=dataset or (), model=model, score=score, share=share, n_rows=rows)
    if name is not None:
        deliver(arrow_table(UsedRow, [asdict(row) for row in found.used]), name, out)
        return
    with told_apart(row.model for row in found.used):
        for table in utilisation_tables(found):
            console.print(table)
