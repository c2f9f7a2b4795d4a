"""Figures of the probes' accuracies: forest plots with intervals and floors, and the numbers of neurons kept."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows.show.accuracy_tables import SHOTS, asked, probe_title, short
from flows.show.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    Chart,
    Figure,
    Part,
    field,
    layer,
    line_scales,
    measured,
    panel,
    powers,
)
from flows.show.skill_figures import FLOOR_LOOKS
from flows.show.table import by
from tasks.probe import AccuracyRow
from tasks.results import Average

_COLOURS = {"lm": BLUE, "polar": GREEN, "magn": PURPLE, "tree": ORANGE}
_FLOORS = (
    "Vertical lines are floors, which know nothing of the question: guessing, the commonest training answer, options "
    "and lengths alone, and calibrated probabilities. A probe whose bar reaches a floor has not shown that it reads "
    "anything."
)
_ROW = 17
"""Pixels of a probe's row."""


def accuracy_figures(scores: Sequence[AccuracyRow], averages: Sequence[Average]) -> Iterator[Figure]:
    """Return the figures of every model and number of demonstrations."""
    for of_model in by([score for score in scores if not score.group], "model").values():
        for shots, own in by(of_model, "shots").items():
            means = [one for one in averages if (one.model, one.shots, one.genre) == (own[0].model, shots, "")]
            yield forest(own, means)
            if any(score.n_neurons for score in own):
                yield kept_neurons(own)


def forest(scores: Sequence[AccuracyRow], means: Sequence[Average]) -> Figure:
    """Draw every accuracy with its interval and the floors beside it, a panel a dataset, their average last."""
    panels = [_forest(short(name), rows) for name, rows in by(scores, "dataset").items()]
    if means:
        panels.append(_forest(f"average of {means[0].n_datasets}", means))
    first = scores[0]
    return Figure(
        model=first.model,
        name=f"accuracy-{SHOTS[first.shots]}",
        title=f"accuracy on test, {asked(first.model, first.shots)}",
        says=f"Accuracy of every probe on test with its 95 % interval (Wilson). {_FLOORS}",
        parts=[Part(panels)],
    )


def model_forests(averages: Sequence[Average], names: Mapping[str, str]) -> Iterator[Figure]:
    """Draw the mean accuracies over all datasets of several models, a figure a number of demonstrations.

    Parameters
    ----------
    averages : sequence of Average
    names : mapping of model to the name that people read
    """
    for shots, means in by([one for one in averages if not one.genre], "shots").items():
        yield Figure(
            model="models",
            name=f"accuracy-{SHOTS[shots]}",
            title=f"mean accuracy on test by model, {SHOTS[shots]}",
            says="Accuracy of every probe of every model, mean over its datasets, with its 95 % interval (MOVER of "
            f"Wilson's), for other rows of the same datasets. {_FLOORS}",
            parts=[Part([_forest(names[model], rows) for model, rows in by(means, "model").items()])],
        )


def _forest(title: str, rows: Sequence[AccuracyRow | Average]) -> Chart:
    known: list[dict[str, Any]] = [
        {
            "probe": probe_title(row.probe),
            "value": row.accuracy,
            "low": row.low,
            "high": row.high,
            "neurons": getattr(row, "n_neurons", None),
            "colour": _COLOURS.get(row.probe, GREY),
        }
        for row in rows
    ]
    floors = [
        {"line": name, "value": value}
        for floor, (name, _) in FLOOR_LOOKS.items()
        if (value := getattr(rows[0], floor)) is not None
    ]
    x = field("value:Q", scale={"domain": [0, 1]}, title="accuracy (95 % interval)")
    _, dash = line_scales(dict(FLOOR_LOOKS.values()))
    own: dict[str, Any] = {"y": field("probe:N", sort=None, title=None), "color": field("colour:N", scale=None)}
    own["tooltip"] = [field("probe:N"), *measured(), *measured("neurons")]
    about = [field("line:N"), measured()[0]]
    return panel(
        known,
        layer("rule", {"color": GREY, "strokeWidth": 1.5}, floors, x=x, strokeDash=dash, tooltip=about),
        layer("rule", {"strokeWidth": 2}, x=x | {"field": "low"}, x2={"field": "high"}, **own),
        layer("circle", {"size": 50, "opacity": 1}, x=x, **own),
        title=title,
        height=_ROW * len(known),
    )


def kept_neurons(scores: Sequence[AccuracyRow]) -> Figure:
    """Draw the accuracy of every probe that keeps neurons against the number it kept, a point a dataset."""
    rows = [
        {
            "probe": probe_title(row.probe),
            "dataset": short(row.dataset),
            "neurons": row.n_neurons,
            "value": row.accuracy,
            "low": row.low,
            "high": row.high,
            "colour": _COLOURS.get(row.probe, GREY),
        }
        for row in scores
        if row.n_neurons
    ]
    panels = []
    for probe in dict.fromkeys(row["probe"] for row in rows):
        own = [row for row in rows if row["probe"] == probe]
        y = field("value:Q", title="accuracy", scale={"domain": [0, 1]})
        chart = panel(
            own,
            layer("rule", {"opacity": 0.5}, y=y | {"field": "low"}, y2={"field": "high"}),
            layer("circle", {"size": 50, "opacity": 1}, y=y),
            title=str(probe),
            x=powers("neurons", "neurons kept (k)", (row.n_neurons for row in scores if row.n_neurons)),
            color=field("colour:N", scale=None),
            tooltip=[field("dataset:N"), *measured("neurons"), *measured()],
        )
        panels.append(chart)
    first = scores[0]
    return Figure(
        model=first.model,
        name=f"neurons-kept-{SHOTS[first.shots]}",
        title=f"accuracy and neurons kept, {asked(first.model, first.shots)}",
        says="How many neurons (k) each probe kept, chosen on valid, and how right it is on test: a point is a "
        "dataset, its bar the 95 % interval. Few neurons and a high accuracy mean that the skill sits in few places. "
        "For the whole curve, run neg skills.",
        parts=[Part(panels)],
    )
