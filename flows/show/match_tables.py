"""The table of a match of two models' neurons, at most 100 columns wide in a terminal."""

from flows.show.model_names import shown_model
from flows.show.table import Cell, Number, Table, numbers, texts
from flows.show.text import bare, correlation, share
from negcore.store.identity import RunIdentity
from tasks.matches import CHANCES, LayerMatches, Matches
from tasks.plan import RANDOM


def match_table(found: Matches) -> Table:
    """Return a row for every layer of the first model, and last all of them."""
    *layers, whole = found.layers
    p = [f"p <= {bare(f'{chance:g}')}" for chance in CHANCES]
    one, other = found.identity, found.other_identity
    names = f"{_model(one, other)} among those of {_model(other, one)}"
    depth = correlation(found.depth_correlation)
    return Table(
        key="matches",
        title=f"{found.title}: neurons of {names}",
        columns=[*texts("layer"), *numbers("neurons", "r", "chance", *p, "mutual", "layer of\nmatch", "middle\nhalf")],
        blocks=[[_row(one, found.n_shuffles) for one in layers], [_row(whole, found.n_shuffles)]],
        caption=f"r: highest correlation of NEGs over {found.n_rows} rows and their options, median; chance: its 95 % "
        f"quantile in {found.n_shuffles} shuffles of {_shuffled(found)}, median. p <= .05: share of neurons whose r "
        "so few shuffles reach; by chance .05 (.01). mutual: share that is so, and the best match of its match. Layer "
        f"of match: of 0..{other.n_layers - 1}, median of the neurons with p <= .05; Spearman's correlation of the "
        f"layers is {depth}.",
    )


def _shuffled(found: Matches) -> str:
    return "the rows" if found.n_units is None else f"the {found.n_units} units of rows, and of the rows of each"


def _model(own: RunIdentity, other: RunIdentity) -> str:
    """Return the name of a model, with its revision where the other has the same name."""
    is_random = "+random-" in own.model_revision
    is_alike = own.model == other.model and own.model_revision != other.model_revision and not is_random
    return f"{shown_model(own.model)}{f'@{own.model_revision[:13]}' * is_alike}{RANDOM * is_random}"


def _row(one: LayerMatches, n_shuffles: int) -> list[Cell]:
    shares: list[Cell] = [
        Number(value, share, "bold" if chance == CHANCES[0] else "") if chance * (n_shuffles + 1) >= 1 else "-"
        for chance, value in zip(CHANCES, one.shares, strict=True)
    ]
    low, middle, high = one.other_layers or (None, None, None)
    return [
        "all" if one.layer is None else f"{one.layer}",
        Number(one.n_neurons),
        Number(one.r, correlation),
        Number(one.chance, correlation),
        *shares,
        Number(one.mutual, share),
        "-" if middle is None else Number(middle, "{:g}".format),
        "-" if low is None or high is None else f"{low:g}-{high:g}",
    ]
