"""Commands that look into finished runs."""

from typing import Annotated, Literal

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
    table: Annotated[
        Literal["accuracy", "beyond_lm"], typer.Option(help="With --format: the table whose rows are written.")
    ] = "accuracy",
    out: Out = None,
) -> None:
    """Show the accuracies of several runs side by side: other split policies, wordings, sites, seeds.

    Example: `neg compare runs/clean runs/released`

    Every dataset that two of the runs have is shown, with a line for each run, and then what each run's probes add to
    the model's own answer. With --format, the rows of accuracy.arrow behind that are written, with the name of the run
    in front; with --table beyond_lm, those of beyond_lm.arrow.
    """
    import pyarrow as pa

    from flows.show.accuracy_tables import compared_rows, comparison_table
    from flows.show.beyond_tables import beyond_compared, beyond_comparison
    from flows.show.model_names import told_apart
    from tasks.beyond_lm import compared_files, read_beyond
    from tasks.probe import AccuracyRow
    from tasks.rundir.manifest import check_results
    from tasks.rundir.tables import read_table

    if len(set(runs)) < 2:
        raise RunError("name at least two run directories: there is nothing to compare one with")
    places = [location(run) for run in runs]
    names = [place.name for place in places]
    named = {place.name if names.count(place.name) == 1 else str(place): place for place in places}
    for warning in filter(None, (check_results(place, compared_files(place)) for place in named.values())):
        tell("warning", warning)
    scores = {name: read_table(place / "accuracy.arrow", AccuracyRow) for name, place in named.items()}
    found = {name: read_beyond(place) for name, place in named.items()}
    with told_apart(row.model for rows in scores.values() for row in rows):
        tables = [comparison_table(scores), beyond_comparison(found)]
    if not tables[0].blocks:
        raise RunError(f"no dataset is in two of the runs {', '.join(runs)}, asked of the same model")
    if name := format_of(form, out):
        rows = compared_rows(scores) if table == "accuracy" else beyond_compared(found)
        if not rows:
            raise RunError(f"the runs {', '.join(runs)} hold no table beyond_lm: `neg probe RUN` makes it")
        deliver(pa.Table.from_pylist(rows), name, out)
    else:
        console.print(*(one for one in tables if one.blocks))
