"""Commands that look into finished runs."""

from typing import Annotated

import typer

from flows.cli.completion import complete_run
from flows.cli.tables import Format, Out, deliver, format_of
from flows.show.console import console, tell
from negcore.errors import RunError
from negcore.store.files import location


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Run directories: of pipeline, probe, mceval8k, skills.", autocompletion=complete_run),
    ],
    form: Format = None,
    out: Out = None,
) -> None:
    """Show the accuracies of several runs side by side: other split policies, wordings, sites, seeds.

    Example: `neg compare runs/clean runs/released`

    Every dataset that two of the runs have is shown, with a line for each run. With --format, the rows of
    accuracy.arrow behind that are written, with the name of the run in front.
    """
    import pyarrow as pa

    from flows.show.accuracy_tables import compared_rows, comparison_table
    from flows.show.model_names import told_apart
    from tasks.probe import AccuracyRow
    from tasks.rundir.manifest import check_results
    from tasks.rundir.tables import read_table

    if len(set(runs)) < 2:
        raise RunError("name at least two run directories: there is nothing to compare one with")
    places = [location(run) for run in runs]
    names = [place.name for place in places]
    for warning in filter(None, (check_results(place, [place / "accuracy.arrow"]) for place in places)):
        tell("warning", warning)
    scores = {
        place.name if names.count(place.name) == 1 else str(place): read_table(place / "accuracy.arrow", AccuracyRow)
        for place in places
    }
    with told_apart(row.model for rows in scores.values() for row in rows):
        table = comparison_table(scores)
    if not table.blocks:
        raise RunError(f"no dataset is in two of the runs {', '.join(runs)}, asked of the same model")
    if name := format_of(form, out):
        deliver(pa.Table.from_pylist(compared_rows(scores)), name, out)
    else:
        console.print(table)
