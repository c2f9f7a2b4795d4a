"""Commands that look at single neurons of a run: which are the best, and what one of them does."""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.markup import escape
from rich.text import Text

from flows.cli.options import RunDirectory
from flows.cli.tables import deliver
from flows.cli.terminal import quiet_libraries
from flows.show.console import console, tell
from flows.show.model_names import shown_model
from negcore.errors import NegError, RunError
from negcore.store.files import location

if TYPE_CHECKING:
    from negcore.analysis.neurons import Moved, NeuronRows
    from negcore.datasets import Example
    from negcore.model.language_model import LanguageModel, ModelCard
    from negcore.store.reader import NegSplit
    from tasks.run_negs import StoredSplit

Datasets = Annotated[
    list[str] | None, typer.Option("--dataset", help="Dataset, as the run names it. By default all. Repeatable.")
]
Model = Annotated[str | None, typer.Option(help="Model, where the run has several.")]


def neurons(
    directory: RunDirectory,
    dataset: Datasets = None,
    model: Model = None,
    probe: Annotated[str, typer.Option(help="Vote probe whose ranking is listed.")] = "magn",
    top: Annotated[int, typer.Option(min=1, help="Neurons to list of every dataset.")] = 20,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write comma-separated values, a line a neuron.")] = False,
) -> None:
    """List the best neurons of a run by layer and number, and how sure their places are.

    Examples: `neg neurons runs/NAME`, `neg neurons runs/NAME --dataset mini/fact --probe polar --top 5 --csv`

    Of many neurons, some rank high on few rows by luck. So every place comes with the share of bootstrap samples of the
    training rows in which the neuron stays in the list, and with the places that the middle 90 % of the samples give
    it: do not believe one that half of them rank 300th. `random` is the mean size of the scores in its layer.

    The 20 best of the run's own probes are read from its table `neurons.arrow`; others are ranked anew from its shards.
    """
    quiet_libraries()
    from tasks.neurons import NeuronRow, best_neurons
    from tasks.rundir.tables import arrow_table

    with _waiting("ranking neurons"):
        found = best_neurons(location(directory).absolute(), probe, datasets=dataset or (), model=model, top=top)
    for warning in found.warnings:
        tell("warning", warning, "yellow")
    if as_csv:
        deliver(arrow_table(NeuronRow, [asdict(row) for row in found.rows]), "csv", None)
        return
    from flows.show.neuron_tables import neuron_tables

    for table in neuron_tables(found.rows):
        console.print(table)
    named = "LAYER.EXPERT.UNIT" if any(row.active is not None for row in found.rows) else "LAYER.NEURON"
    console.print(f"what one of them does: neg neuron DIR {named}", highlight=False, soft_wrap=True)


def _waiting(what: str) -> AbstractContextManager[object]:
    """Show that something is going on that may take minutes."""
    return console.status(what) if console.is_terminal else nullcontext()


def _checking(found: "Sequence[StoredSplit]", at: int) -> AbstractContextManager[object]:
    """Show which dataset's shards are being checked and read, and how many there are."""
    return _waiting(f"checking and reading the shards of {escape(found[at].title)} ({at + 1} of {len(found)})")


class _Looked(NamedTuple):
    """One dataset, and what it tells of a neuron."""

    split: "StoredSplit"
    negs: "NegSplit"
    numbers: "NeuronRows"
    moved: "list[Moved]"
    examples: "dict[str, Example]"


def neuron(
    directory: RunDirectory,
    name: Annotated[
        str, typer.Argument(metavar="LAYER.NEURON", help="The neuron, such as 10.901; with experts LAYER.EXPERT.UNIT.")
    ],
    dataset: Datasets = None,
    model: Model = None,
    split: Annotated[Literal["test", "valid", "train"], typer.Option(help="Rows to look at.")] = "test",
    rows: Annotated[int, typer.Option(min=0, help="Prompts of each dataset to show that it moves most.")] = 3,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Also measure the neuron's curve on these prompts, with the model.")
    ] = False,
) -> None:
    """Tell what one neuron does, on all datasets of a run.

    Examples: `neg neuron runs/NAME 10.901`, `neg neuron runs/NAME 10.901 --dataset mini/fact --sweep`

    Of every dataset: activation, mean NEG by option, over all rows and by their right option, the share of rows in
    which the NEG has the same sign, and the prompts that the neuron moves most. The shards hold no text: it is read
    from the run's data again, and shown here alone. Then the tokens that the neuron's output row promotes and
    suppresses (logit lens: final normalisation and unembedding on the row alone), for which the model is loaded. With
    --sweep, the neuron is shifted by -2 to 2 units of activation on these prompts, and the change is measured.

    The exit code is 1 if the texts or the model are no longer where the run had them; the rest is shown all the same.
    """
    check_name(name)
    if sweep and not rows:
        raise RunError("--sweep measures on the prompts that are shown, and --rows 0 shows none: give at least 1")
    quiet_libraries()
    from tasks.run_negs import card_of, only_model, stored_splits

    found = stored_splits(location(directory).absolute(), (split,), model=model, datasets=dataset or ())
    only_model(found)
    with _checking(found, 0):
        layer, number = _tell_neuron(location(directory).absolute(), found[0], name)
    missing: list[str] = []
    card = _or_told(missing, lambda: card_of(found[0]))
    looked = []
    for at, one in enumerate(found):
        with _checking(found, at):
            about = _or_told(missing, lambda one=one: _looked(one, layer, number, rows))
            if about is not None:
                examples = _or_told(missing, lambda about=about: _examples(about, card))
                about = about._replace(examples=examples or {})
        if about is not None:
            looked.append(about)
            _show_rows(about)
    if card is not None and looked:
        _or_told(missing, lambda: _show_with_model(card, looked, layer, number, missing, sweep=sweep))
    for line in dict.fromkeys(missing):
        tell("missing", line)
    if missing:
        raise typer.Exit(1)


def check_name(name: str) -> None:
    """Refuse a neuron that is given neither as LAYER.NEURON nor as LAYER.EXPERT.UNIT.

    Raises
    ------
    RunError
    """
    if not re.fullmatch(r"[0-9]{1,9}\.(([0-9]{1,9}|shared)\.)?[0-9]{1,9}", name):
        raise RunError(
            f"{name!r:.80} is no neuron: give layer and number in it, both from 0, as in 10.901 (of a mixture of "
            "experts layer, expert and unit, as in 10.3.7)"
        )


def _tell_neuron(directory: Path, first: "StoredSplit", name: str) -> tuple[int, int]:
    """Tell which neuron it is, and in which of the run's lists of best neurons; return its layer and number.

    Raises
    ------
    ShardError
        If there is no such neuron.
    """
    from flows.show.neuron_tables import of_unit, places_line
    from tasks.neurons import listed_neurons

    negs = first.open()
    layer, number = negs.number_of(name)
    where = f"site {negs.identity.site}, {negs.n_layers} layers x {negs.n_neurons} neurons{of_unit(negs.target)}"
    console.print(
        Text(f"neuron {negs.name_of(layer, number)} of {shown_model(negs.identity.model)} ({where})"), soft_wrap=True
    )
    listed = listed_neurons(directory)
    own = [row for row in listed.rows if (row.model, row.layer, row.neuron) == (first.place.model, layer, number)]
    for warning in listed.warnings:
        tell("warning", warning, "yellow")
    if listed.rows:
        console.print(Text(places_line(own)), soft_wrap=True)
    return layer, number


def _looked(one: "StoredSplit", layer: int, number: int, n_rows: int) -> _Looked:
    from negcore.analysis.neurons import read_neuron

    negs = one.open()
    numbers = read_neuron(negs, layer, number)
    return _Looked(one, negs, numbers, numbers.most_moved(n_rows), {})


def _examples(about: _Looked, card: "ModelCard | None") -> "dict[str, Example]":
    from tasks.run_negs import examples_of

    return {} if card is None else examples_of(about.split, card, about.negs)


def _show_rows(about: _Looked) -> None:
    from flows.show.neuron_tables import moved_table, neuron_table

    title, labels = about.split.title, _labels(about)
    console.print(neuron_table(f"{title}, {about.split.place.part}", about.numbers, labels))
    if about.moved:
        console.print(moved_table(title, about.moved, about.negs.ids, about.numbers, labels, about.examples))


def _labels(about: _Looked) -> list[str] | None:
    """Return the labels of the options, if those of all rows are known to be the same."""
    labels = {example.labels for example in about.examples.values()}
    return list(labels.pop()) if len(labels) == 1 else None


def _or_told(missing: list[str], get: Any) -> Any:
    """Return what a function gives; what it refuses is told at the end, and the command goes on."""
    try:
        return get()
    except NegError as error:
        missing.append(f"{error}")
        return None


def _show_with_model(
    card: "ModelCard", looked: Sequence[_Looked], layer: int, number: int, missing: list[str], *, sweep: bool
) -> None:
    """Show what needs the model: the tokens that the neuron writes, and its measured curve.

    Raises
    ------
    NegError
        If the model cannot be loaded or is not the one that was measured, or a step cannot be made with it.
    """
    from flows.show.neuron_tables import lens_table
    from negcore.analysis.logit_lens import logit_lens
    from negcore.errors import ModelError
    from negcore.measure.loading import load_model
    from negcore.model.language_model import read_model
    from tasks.run_negs import run_of

    run, measured = run_of(looked[0].split), looked[0].negs.identity
    if card.revision != measured.model_revision:
        raise ModelError(
            f"{card.name} is revision {card.revision} now, and the run measured {measured.model_revision}: its tokens "
            "and curves would be those of other weights"
        )
    load = load_model if sweep else read_model
    with _waiting("loading the model"):
        lm = load(card, **run.loading)
    if sweep:
        for about in looked:
            _or_told(missing, lambda about=about: _show_sweep(lm, about, layer, number))
    console.print(lens_table(looked[0].negs.name_of(layer, number), logit_lens(lm, layer, number)))


def _show_sweep(lm: "LanguageModel", about: _Looked, layer: int, number: int) -> None:
    from flows.show.neuron_tables import sweep_table
    from negcore.measure.sweeps import sweep
    from negcore.model.encoding import encode

    known = [(one, about.examples[id_]) for one in about.moved if (id_ := about.negs.ids[one.row]) in about.examples]
    if not known:
        raise RunError(f"{about.split.title}: no curve, as neither values of NEGs nor texts tell on which prompts")
    labels = [example.labels[one.option] for one, example in known]
    encoded = encode(
        lm.card,
        [example.prompt for _, example in known],
        [example.labels for _, example in known],
        probe_at=[example.probe_end for _, example in known],
        answers=about.negs.identity.prompt.get("answers", "token"),
    )
    result = sweep(
        lm,
        encoded,
        answers=[one.option for one, _ in known],
        target=about.negs.target,
        neurons=[(layer, number)],
    )
    stored = [one.neg for one, _ in known]
    console.print(sweep_table(about.split.title, [example.id for _, example in known], labels, stored, result))
