"""`neg publish`: a folder that is ready for the hub, and its upload if that is asked for."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from flows.cli.options import RunDirectory
from flows.cli.terminal import quiet_libraries
from flows.show.console import console, tell
from negcore.errors import RunError
from negcore.store.files import location


def publish(
    directory: RunDirectory,
    to: Annotated[str | None, typer.Option(help="Folder to make.")] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", help="Licence, as the hub names it: cc-by-4.0, mit, other. Without one the card says so."
        ),
    ] = None,
    show_wording: Annotated[
        bool, typer.Option("--show-wording", help="Publish the run's own wording or system text: files name them.")
    ] = False,
    upload: Annotated[
        str | None, typer.Option(help="ORGANISATION/NAME of a dataset on the hub to upload the folder to.")
    ] = None,
) -> None:
    """Make a folder of a finished run that can be published: shards with receipts, tables, probes, a dataset card.

    Examples: `neg publish runs/NAME --to folder --license cc-by-4.0`, `neg publish folder --upload org/name`

    The run is checked first, as by `neg verify`. No text of a prompt is in the folder; of prompts there are hashes, and
    ids and groups as in the dataset. README.md may be changed before the folder is uploaded, by giving it in place of
    the run. A dataset that is not on the hub yet is made there as a private one. `negcore.open_negs` and `neg verify`
    read the folder, and every download of it.
    """
    quiet_libraries()
    from negcore.hub import upload_folder
    from tasks.publish import check_publication, is_publication

    place = location(directory).absolute()
    if to is not None:
        folder = _made(place, location(to).absolute(), licence, show_wording)
    elif upload is not None and is_publication(place):
        check_publication(place)
        folder = place
    else:
        raise RunError("name the folder to make with --to; without it only a folder that was made so can be uploaded")
    if upload is not None:
        page = upload_folder(folder, upload)
        console.print(f"uploaded to {escape(page)}", highlight=False, soft_wrap=True)


def _made(root: Path, target: Path, licence: str | None, show_wording: bool) -> Path:
    from flows.show.dataset_card import check_licence, dataset_card
    from tasks.publish import check_target, read_publication, write_folder
    from tasks.rundir.layout import shard_folders
    from tasks.rundir.verify import total_bytes

    if licence is not None:
        check_licence(licence)
    check_target(target)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        n_bytes = total_bytes(shard_folders(root))
        checking, copying = (progress.add_task(what, total=n_bytes) for what in ("checking", "copying"))
        publication = read_publication(root, lambda size: progress.advance(checking, size))
        if publication.texts and not show_wording:
            raise RunError(
                f"the run's own {' and '.join(publication.texts)} would be published, as every file names the settings "
                "of its prompts: add --show-wording if that is right"
            )
        card = dataset_card(publication, licence)
        write_folder(publication, target, card, lambda size: progress.advance(copying, size))
    n_rows = sum(one.n_rows for one in publication.shards.values())
    told = (
        f"{n_rows} rows in {sum(one.n_shards for one in publication.shards.values())} files, {n_bytes / 2**20:.0f} MiB"
    )
    console.print(f"written to {escape(str(target))}: {told}", highlight=False, soft_wrap=True)
    for warning in publication.warnings:
        tell("warning", warning, "yellow")
    if licence is None:
        tell(
            "warning",
            f"no licence: {target / 'README.md'} says so at its top; change it there, or give --license",
            "yellow",
        )
    return target
