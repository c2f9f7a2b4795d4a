"""Tables that compare the models of a campaign, at most 100 columns wide in a terminal."""

from collections.abc import Callable, Iterator, Sequence
from math import isnan
from statistics import fmean
from types import MappingProxyType

from flows.show.accuracy_tables import (
    BESIDE_CAPTION,
    FLOOR_TITLES,
    PROBE_TITLES,
    SHOTS,
    floor_cell,
    floor_mark,
    mass_cell,
    probe_cell,
    probe_title,
)
from flows.show.table import Block, Cell, Column, Number, Style, Table, Words, by, interval, numbers, texts
from flows.show.text import change, correlation, count, share
from tasks.campaign import N_DEPTHS, Comparison, GainRow, LinearityRow, ProfileRow, by_depth
from tasks.neg_profiles import NegProfileRow
from tasks.results import Average

_MEASURES = MappingProxyType(
    {
        "linear_share": "share of linear neurons",
        "median_size": "median |NEG|, in parts of the model's mean",
        "skill_share": "share of skill neurons",
    }
)
NEG_MEASURES = MappingProxyType(
    {
        "mean_size": "mean |NEG|",
        "same_as_previous": "sign as before",
        "same_as_last": "sign as last",
        "rank_correlation": "order as last",
    }
)
"""Measures of NEGs over training, and their titles."""
_WITHOUT_MODEL = ("random", "majority", "options_only")
"""Floors that are the same for every model that is asked the same rows."""
_OUTCOME_STYLES: MappingProxyType[str, Style] = MappingProxyType(
    {"whole": "green", "in part": "yellow", "failed": "red"}
)


def campaign_tables(comparison: Comparison) -> Iterator[Table]:
    """Return outcomes, then accuracy, best probes, linearity and layer profiles, as far as they were measured."""
    yield _outcomes(comparison)
    for shots in dict.fromkeys(mean.shots for mean in comparison.accuracy):
        yield _accuracy(comparison, shots)
    if comparison.gains:
        yield _gains(comparison)
    if comparison.linearity:
        yield _linearity(comparison)
    if comparison.profiles:
        yield _profiles(comparison)
    if comparison.neg_profiles:
        yield _neg_profiles(comparison)


def _outcomes(comparison: Comparison) -> Table:
    rows: list[list[Cell]] = []
    said = ""
    for row in comparison.outcomes:
        result, n_problems = Words(row.outcome, _OUTCOME_STYLES[row.outcome]), Number(row.n_problems)
        why = "the same" if row.reason and row.reason == said else row.reason
        rows.append([row.name, row.stage, result, n_problems if row.n_problems else "", why])
        said = row.reason
    columns = [*texts("model", "stage", "result"), *numbers("problems"), Column("first problem", is_private=True)]
    return Table("campaign-outcomes", "Models and stages", columns, [rows])


def _accuracy(comparison: Comparison, shots: int) -> Table:
    means = [mean for mean in comparison.accuracy if mean.shots == shots]
    genres = _genres(means)
    most = {genre: max(mean.n_datasets for mean in means if mean.genre == genre) for genre in genres}
    answers = [mean for mean in means if mean.probe == "lm"]
    blocks = [
        _floors(answers, genres),
        _of_models(comparison, "calibrated LM-Prob", answers, genres, lambda mean: floor_cell(mean, ["calibrated"])),
        _of_models(comparison, "label mass", answers, genres, mass_cell),
    ]
    for probe in PROBE_TITLES:
        if of_probe := [mean for mean in means if mean.probe == probe]:
            title = probe_title(probe)
            blocks.append(
                _of_models(comparison, title, of_probe, genres, lambda mean: _mean_cell(mean, most[mean.genre]))
            )
    return Table(
        key=f"campaign-accuracy-{SHOTS[shots]}",
        title=f"Mean accuracy on test, {SHOTS[shots]}",
        columns=_genre_columns(genres),
        blocks=blocks,
        caption="Every dataset counts the same. Below: 95 % interval (MOVER of Wilson's), for other rows of the same "
        "datasets. (n): mean of only n datasets, fewer than another model has. *: splits overlap. "
        f"{BESIDE_CAPTION}",
    )


def _floors(means: Sequence[Average], genres: Sequence[str]) -> Block:
    """Return the heading and one row of the floors without a model, or several where models were asked other rows."""
    rows: dict[tuple[Cell, ...], None] = {}
    for of_model in by(means, "model").values():
        cells = {mean.genre: floor_cell(mean, _WITHOUT_MODEL) for mean in of_model}
        rows[tuple(cells.get(genre, "") for genre in genres)] = None
    titles = "\n".join(FLOOR_TITLES[name] for name in _WITHOUT_MODEL)
    return [[Words("floors", "bold")], *([titles, *row] for row in rows)]


def _of_models(
    comparison: Comparison, title: str, means: Sequence[Average], genres: Sequence[str], cell: Callable[[Average], Cell]
) -> Block:
    """Return the heading and a row for every model."""
    rows: list[list[Cell]] = [[Words(title, "bold")]]
    for model, of_model in by(means, "model").items():
        by_genre = {mean.genre: mean for mean in of_model}
        cells = (cell(by_genre[genre]) if genre in by_genre else "" for genre in genres)
        rows.append([comparison.names[model], *cells])
    return rows


def _mean_cell(mean: Average, most: int) -> Cell:
    mark = Words("*" if mean.overlapping else "", "red")
    return probe_cell(mean, mark, Words(f" ({mean.n_datasets})" if mean.n_datasets < most else "", "dim"))


def _gains(comparison: Comparison) -> Table:
    genres = _genres(comparison.gains)
    blocks: list[Block] = []
    for shots, of_shots in by(comparison.gains, "shots").items():
        rows: list[list[Cell]] = [[Words(SHOTS[shots], "bold")]]
        for model, of_model in by(of_shots, "model").items():
            cells = {row.genre: _gain_cell(row) for row in of_model}
            label = f"{comparison.names[model]}\n{probe_title(of_model[0].probe)}"
            rows.append([label, *(cells.get(genre, "") for genre in genres)])
        blocks.append(rows)
    return Table(
        key="campaign-gains",
        title="Best probe beside LM-Prob",
        columns=_genre_columns(genres),
        blocks=blocks,
        caption="Accuracy of the probe that is best over all genres, chosen on these very test rows; below, LM-Prob's, "
        "and the difference. <= floor: see above.",
    )


def _gain_cell(row: GainRow) -> Cell:
    return Number(row.accuracy, share, "bold"), f"\n{share(row.lm)}\n{change(row.gain)}", floor_mark(row, row)


def _genres(rows: Sequence[Average | GainRow]) -> list[str]:
    """Return the genres, and last the empty name of all genres if there are several."""
    genres = [genre for genre in by(rows, "genre") if genre]
    return [*genres, ""] if len(genres) > 1 else genres


def _genre_columns(genres: Sequence[str]) -> list[Column]:
    return [*texts("model"), *numbers(*(genre or "all\ngenres" for genre in genres))]


def _linearity(comparison: Comparison) -> Table:
    first = comparison.linearity[0]
    return Table(
        key="campaign-linearity",
        title=f"Linearity within ±{first.range:g} on {first.dataset}",
        columns=[*texts("model"), *numbers("prompts x\nneurons", "linear", "NEG > 0", "r of\nNeurGrad")],
        blocks=[
            [
                [
                    comparison.names[row.model],
                    f"{row.n_prompts} x {row.n_neurons}",
                    Number(row.linear_share, correlation),
                    Number(row.positive_share, correlation),
                    _pearson(row),
                ]
                for row in comparison.linearity
            ]
        ],
        caption="Below r: 95 % bootstrap interval over prompts.",
    )


def _pearson(row: LinearityRow) -> Cell:
    if row.pearson is None or row.pearson_low is None or row.pearson_high is None:
        return ""
    return Number(row.pearson, correlation, "bold"), interval(row.pearson_low, row.pearson_high, correlation, ", ")


def _profiles(comparison: Comparison) -> Table:
    ends = [f"{100 * depth // N_DEPTHS}%" for depth in range(1, N_DEPTHS + 1)]
    blocks: list[Block] = []
    for (measure, probe), rows in _shown(comparison.profiles).items():
        heading = Words(_MEASURES[measure] + (f" ({probe_title(probe)})" if probe else ""), "bold")
        by_model = by(rows, "model").items()
        blocks.append([[heading], *([comparison.names[model], *_profile_cells(own)] for model, own in by_model)])
    return Table(
        key="campaign-profiles",
        title="Layer profiles",
        columns=[*texts("model"), *numbers("mean", *ends)],
        blocks=blocks,
        caption="Columns: tenths of a model's depth, by where they end; layers that lie in two count in both.",
    )


def _neg_profiles(comparison: Comparison) -> Table:
    ends = [f"{100 * depth // N_DEPTHS}%" for depth in range(1, N_DEPTHS + 1)]
    blocks: list[Block] = []
    for measure, heading in NEG_MEASURES.items():
        by_model = by(comparison.neg_profiles, "model").items()
        cells = ([comparison.names[model], *_neg_cells(rows, measure)] for model, rows in by_model)
        blocks.append([[Words(heading, "bold")], *cells])
    datasets = count(len({(row.stage, row.dataset) for row in comparison.neg_profiles}), "dataset")
    return Table(
        key="campaign-neg-profiles",
        title="NEGs over training",
        columns=[*texts("model"), *numbers("all", *ends)],
        blocks=blocks,
        caption=f"NEGs for the right option in the test rows that all revisions measured, mean over {datasets}. "
        "Columns: all layers, and tenths of a model's depth by where they end; sizes there in parts of that of all. "
        "Sign: share of rows and neurons with the sign of the revision before, or of the last. Order: Spearman's "
        "correlation over neurons of their mean NEG with that of the last revision.",
    )


def _neg_cells(rows: Sequence[NegProfileRow], measure: str) -> list[Cell]:
    """Return the value of all layers, and of every tenth of depth; sizes of tenths in parts of the first."""
    means = {layer: mean_of(own, measure) for layer, own in by(rows, "layer").items()}
    whole = means.pop(None)
    values = by_depth({layer: value for layer, value in means.items() if value is not None}, len(means))
    if measure == "mean_size":
        first = "-" if whole is None else Number(whole, "{:.1e}".format)
        parts = [None if value is None or not whole else value / whole for value in values]
        return [first, *("-" if part is None else Number(part, "{:.2f}".format) for part in parts)]
    return ["-" if value is None else Number(value, correlation) for value in (whole, *values)]


def mean_of(rows: Sequence[NegProfileRow], measure: str) -> float | None:
    """Return the mean of a measure over datasets, without those that have no value; None if none has."""
    known = [value for row in rows if (value := getattr(row, measure)) is not None and not isnan(value)]
    return fmean(known) if known else None


def _shown(profiles: Sequence[ProfileRow]) -> dict[tuple[str, str], list[ProfileRow]]:
    """Return profiles by measure and probe; of several numbers of skill neurons, those of each model's middle one."""
    groups: dict[tuple[str, str], list[ProfileRow]] = {}
    for row in profiles:
        tops = sorted({other.top for other in profiles if other.model == row.model and other.top is not None})
        if row.top is None or row.top == tops[len(tops) // 2]:
            groups.setdefault((row.measure, row.probe), []).append(row)
    return groups


def _profile_cells(rows: Sequence[ProfileRow]) -> list[Cell]:
    """Return the mean over all tenths (or the number of skill neurons), and the value of every tenth."""
    values = [row.value for row in rows]
    mean = fmean(value for value in values if value is not None)
    if rows[0].measure == "median_size":
        parts = [None if value is None or not mean else value / mean for value in values]
        return [
            Number(mean, "{:.1e}".format),
            *("-" if part is None else Number(part, "{:.2f}".format) for part in parts),
        ]
    first = Number(mean, share) if rows[0].top is None else f"{rows[0].top} best"
    return [first, *("-" if value is None else Number(value, share) for value in values)]
