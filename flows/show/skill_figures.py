"""Figures of skill neurons.

Every figure that relies on a ranking has a causal check of that ranking in its lower part, so that nobody sees the one
without the other. The whole check is a figure of its own.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

from flows.show.accuracy_tables import PROBE_TITLES, short
from flows.show.drawing import (
    BLUE,
    GREEN,
    GREY,
    HEIGHT,
    ORANGE,
    PURPLE,
    Chart,
    Figure,
    Look,
    Part,
    cells,
    common_scale,
    curves,
    field,
    layer,
    line_scales,
    measured,
    panel,
    powers,
)
from flows.show.skill_tables import (
    DIRECTION_TITLES,
    NEURON_TITLES,
    band_width,
    check_causal,
    depth_title,
    fitted,
    has_forests,
    probes,
    tops,
)
from flows.show.text import share, times
from negcore.analysis.effects import CausalRow
from tasks.skills import DatasetFindings, SkillFindings

_SET_COLOURS = {"top": BLUE, "random": GREY, "bottom": ORANGE}
PROBE_COLOURS = MappingProxyType({"polar": GREEN, "magn": PURPLE})
_SAYS = {"gold": "as each neuron's NEG says", "polarity": "as the ranking says"}
"""Source of the direction towards the gold option."""
FLOOR_LOOKS = MappingProxyType(
    {
        "random": ("random answer", Look(GREY, (2, 3))),
        "majority": ("majority", Look(GREY, (7, 4))),
        "options_only": ("options and lengths", Look(GREY, (7, 3, 2, 3))),
        "calibrated": ("calibrated LM-Prob", Look(GREY, (12, 3, 2, 3))),
    }
)
"""Name and look of the lines for floors."""
_DEPTH_COLOURS = ("#c7d9ea", "#93bfe0", "#5a9fd2", "#2f78b5", "#174f80")
_LEAST_CHANGE = 0.02
"""Least span of an axis of changes: smaller ones are nothing to see."""
_MOST_NUMBERED = 8
"""Most datasets for which the cells of a map of pairs have space for a number."""
_LM = "LM-Prob"


class _Measure(NamedTuple):
    """A value that is drawn: its title, and the names of the fields that hold it and the ends of its interval."""

    title: str
    value: str
    low: str
    high: str


_ACCURACY = _Measure("accuracy", "accuracy", "low", "high")
_CHANGES = (
    _Measure("change of accuracy", "accuracy_change", "change_low", "change_high"),
    _Measure("change of p(gold)", "prob_change", "prob_low", "prob_high"),
)


def skill_figures(findings: SkillFindings) -> list[Figure]:
    """Return every figure of one model."""
    check_causal(findings)
    return list(_figures(findings))


def _figures(findings: SkillFindings) -> Iterator[Figure]:
    for probe, direction in product(probes(findings), DIRECTION_TITLES):
        yield causal(findings, probe, direction)
    yield efficiency(findings)
    if len(findings.conditions) > 1:
        yield transfer(findings)
    yield bands(findings)
    if has_forests(findings):
        yield forests(findings)
    if findings.overlaps:
        yield overlap(findings)
    yield layers(findings)


# The causal check


def causal(findings: SkillFindings, probe: str, direction: str) -> Figure:
    """Draw what shifting the best, random and last neurons of a ranking changes, by their number: a row a dataset."""
    shifts = sorted({abs(row.shift) for one in findings.datasets for row in one.causal})
    columns = list(product(_CHANGES, shifts))
    panels = [
        _changes(findings, one, (probe, direction), shift, measure)
        for one in findings.datasets
        for measure, shift in columns
    ]
    return Figure(
        model=findings.model,
        name=f"causal-{probe}-{DIRECTION_TITLES[direction].lower()}",
        title=f"causal check of {PROBE_TITLES[probe]}'s ranking, towards gold {_SAYS[direction]}",
        says="What changes when neurons are shifted together, by their number. If the ranking found what makes the "
        "answer, the best neurons move it more than random ones of the same layers, and opposite shifts move it "
        "opposite ways. All datasets have one scale; shaded: 95 % intervals.",
        parts=[Part(panels, columns=len(columns))],
    )


def _changes(
    findings: SkillFindings, one: DatasetFindings, check: tuple[str, str], distance: float, measure: _Measure
) -> Chart:
    rows = [
        {"line": _way(row), "neurons": row.size, **_measured(row, measure)}
        for row in one.causal
        if (row.probe, row.direction) == check and abs(row.shift) == distance
    ]
    looks = {
        f"{title}, {way}": Look(_SET_COLOURS[neurons], dash)
        for neurons, title in NEURON_TITLES.items()
        for way, dash in (("towards", ()), ("away", (4, 3)))
    }
    y = field("value:Q", title=measure.title, scale=_change_scale(findings, measure))
    x = powers("neurons", "neurons shifted", {row.size for row in one.causal})
    return curves(rows, looks, x, y, title=f"{short(one.dataset)}, ±{distance:g}")


def _way(row: CausalRow) -> str:
    return f"{NEURON_TITLES[row.neurons]}, {'towards' if row.shift > 0 else 'away'}"


def _change_scale(findings: SkillFindings, measure: _Measure) -> Chart:
    """Return one scale for a measure in all checks of a model."""
    rows = [row for one in findings.datasets for row in one.causal]
    ends = [getattr(row, name) for row in rows for name in (measure.low, measure.high, measure.value)]
    return common_scale(ends, least=_LEAST_CHANGE)


def _check(findings: SkillFindings) -> Part:
    """Return the part of every figure that shows the check of the rankings at one size and shift."""
    size, shift = tops(findings)[len(tops(findings)) // 2], max(row.shift for row in findings.datasets[0].causal)
    heading = f"Causal check: {size} neurons shifted together by {shift:g} towards gold (bars: 95 %)"
    return Part([_check_panel(findings, (size, way, shift)) for way in DIRECTION_TITLES], heading, columns=2)


def _check_panel(findings: SkillFindings, condition: tuple[int, str, float]) -> Chart:
    """Draw the change of accuracy under one size, direction and shift of every dataset's check."""
    looks = {
        f"{PROBE_TITLES[probe]}, {title}": Look(_SET_COLOURS[neurons], () if probe == "polar" else (1, 1))
        for probe in probes(findings)
        for neurons, title in NEURON_TITLES.items()
    }
    rows = [
        {
            "dataset": short(one.dataset),
            "line": f"{PROBE_TITLES[row.probe]}, {NEURON_TITLES[row.neurons]}",
            "probe": PROBE_TITLES[row.probe],
            **_measured(row, _CHANGES[0]),
        }
        for one in findings.datasets
        for row in one.causal
        if (row.size, row.direction, row.shift) == condition
    ]
    colour, _ = line_scales(looks)
    shape = field("probe:N", scale={"range": ["circle", "square"]}, legend=None)
    x = field("value:Q", title=_CHANGES[0].title, scale=_change_scale(findings, _CHANGES[0]))
    return panel(
        rows,
        layer("rule", x=x | {"field": "low"}, x2={"field": "high"}),
        layer("point", {"filled": True, "size": 28, "opacity": 1}, x=x, shape=shape),
        title=_SAYS[condition[1]],
        height=max(HEIGHT, len(findings.datasets) * 8 * len(looks)),
        y=field("dataset:N", title=None, sort=None),
        yOffset=field("line:N", sort=list(looks)),
        color=colour,
        tooltip=[field("dataset:N"), field("line:N"), *measured()],
    )


# Accuracies


def efficiency(findings: SkillFindings) -> Figure:
    """Draw accuracy against the number of neurons and of training rows."""
    looks = {
        f"{PROBE_TITLES[probe]}, {order}": Look(PROBE_COLOURS[probe], dash)
        for probe in probes(findings)
        for order, dash in (("best", ()), ("random", (2, 2)))
    } | _reference_looks(findings)
    panels = [
        chart
        for one in findings.datasets
        for chart in (
            _accuracies(one, looks, _by_neurons(one), "n", "neurons"),
            _accuracies(one, looks, _by_rows(one), "n", "training rows"),
        )
    ]
    return Figure(
        model=findings.model,
        name="efficiency",
        title="accuracy by neurons and by training rows",
        says="Accuracy of the probes on test against the number of neurons that vote and the number of rows that "
        "ranked them. Where the best neurons are no better than random ones, the ranking says nothing. Shaded: 95 %.",
        parts=[Part(panels, columns=4), _check(findings)],
    )


def _by_neurons(one: DatasetFindings) -> list[dict[str, Any]]:
    return [
        {"line": f"{PROBE_TITLES[row.probe]}, {row.order}", "n": row.n_neurons, **_measured(row, _ACCURACY)}
        for row in one.neuron_counts
    ]


def _by_rows(one: DatasetFindings) -> list[dict[str, Any]]:
    return [
        {"line": f"{PROBE_TITLES[row.probe]}, best", "n": row.n_train, **_measured(row, _ACCURACY)}
        for row in one.training_rows
    ]


def bands(findings: SkillFindings) -> Figure:
    """Draw the accuracy of equally many neurons further and further down the ranking."""
    looks = {PROBE_TITLES[probe]: Look(PROBE_COLOURS[probe]) for probe in probes(findings)}
    looks |= _reference_looks(findings)
    panels = []
    for one in findings.datasets:
        rows = [
            {"line": PROBE_TITLES[row.probe], "first": row.first_rank + 1, **_measured(row, _ACCURACY)}
            for row in one.bands
        ]
        panels.append(_accuracies(one, looks, rows, "first", "rank of the band's first neuron, from 1"))
    return Figure(
        model=findings.model,
        name="bands",
        title=f"accuracy of {band_width(findings)} neurons further down the ranking",
        says="Accuracy of equally many neurons, taken further and further down the ranking. A ranking that means "
        "something falls from left to right. Shaded: 95 %.",
        parts=[Part(panels, columns=4), _check(findings)],
    )


def forests(findings: SkillFindings) -> Figure:
    """Draw the accuracy of forests against their trees, a line for each depth, beside the probes that vote."""
    depths = list(dict.fromkeys(row.depth for one in findings.datasets for row in one.forests))
    shades = [_DEPTH_COLOURS[i * (len(_DEPTH_COLOURS) - 1) // max(1, len(depths) - 1)] for i in range(len(depths))]
    looks = {f"depth: {depth_title(depth)}": Look(shade) for depth, shade in zip(depths, shades, strict=True)}
    looks |= {PROBE_TITLES[probe]: Look(PROBE_COLOURS[probe], (7, 2)) for probe in probes(findings)}
    looks |= _reference_looks(findings)
    panels = []
    for one in findings.datasets:
        rows = [
            {"line": f"depth: {depth_title(row.depth)}", "trees": row.n_trees, **_measured(row, _ACCURACY)}
            for row in one.forests
        ]
        rows += [
            {"line": PROBE_TITLES[probe], **_measured(fitted(one, probe), _ACCURACY)} for probe in probes(findings)
        ]
        panels.append(_accuracies(one, looks, rows, "trees", "trees"))
    return Figure(
        model=findings.model,
        name="forests",
        title="accuracy of forests by trees and depth",
        says="Accuracy of forests on the best neurons, beside the probes that only count votes. Where forests are "
        "clearly above, neurons say more together than one by one. Shaded: 95 %.",
        parts=[Part(panels, columns=4), _check(findings)],
    )


def transfer(findings: SkillFindings) -> Figure:
    """Draw the accuracy of each condition's probe under each condition, coloured by the loss against its own."""
    panels, shown = [], [(one, probe) for one in findings.datasets for probe in probes(findings)]
    of_all = [_transfers(one, probe) for one, probe in shown]
    most = max(0.1, *(abs(row["value"]) for rows in of_all for row in rows))
    scale = {"scheme": "redblue", "domain": [-most, most], "domainMid": 0}
    for (one, probe), rows in zip(shown, of_all, strict=True):
        title = f"{short(one.dataset)}, {PROBE_TITLES[probe]}"
        x = field("tested:N", sort=None, title="tested on", axis={"labelAngle": -30})
        y = field("trained:N", sort=None, title="trained on")
        panels.append(cells(rows, scale, "difference from the diagonal", x=x, y=y, title=title))
    return Figure(
        model=findings.model,
        name="transfer",
        title="accuracy of probes under other conditions",
        says="Accuracy of a probe that was trained under one way of asking and tested under another. Red cells lose "
        "against the probe of the tested way: their neurons belong to the wording, not to the skill.",
        parts=[Part(panels, columns=4), _check(findings)],
    )


def _transfers(one: DatasetFindings, probe: str) -> list[dict[str, Any]]:
    found = {(row.trained_on, row.tested_on): row.accuracy for row in one.transfers if row.probe == probe}
    return [
        {"trained": on, "tested": to, "value": accuracy - found[to, to], "text": share(accuracy)}
        for (on, to), accuracy in found.items()
    ]


# Which neurons


def overlap(findings: SkillFindings) -> Figure:
    """Draw how many times more skill neurons two datasets share than random sets, datasets of a genre side by side."""
    names = [one.dataset for one in _by_genre(findings)]
    shown = list(product(probes(findings), tops(findings)))
    of_all = [_pairs(findings, names, probe, top) for probe, top in shown]
    most = max(2, *(row["value"] for rows in of_all for row in rows if row["value"] is not None), 2)
    scale = {"type": "log", "domain": [1, most], "scheme": "yelloworangered"}
    panels = [
        cells(
            rows,
            scale,
            "Jaccard index over chance",
            x=field("a:N", sort=None, title=None, axis={"labelAngle": -40}),
            y=field("b:N", sort=None, title=None),
            title=f"{PROBE_TITLES[probe]}, best {top}",
            has_texts=len(names) <= _MOST_NUMBERED,
        )
        for (probe, top), rows in zip(shown, of_all, strict=True)
    ]
    return Figure(
        model=findings.model,
        name="overlap",
        title="skill neurons that two datasets share",
        says="How many times more skill neurons two datasets share than two random sets of the same size do. A cell "
        "without colour shares no more than random sets do in 39 of 40 cases. Datasets of a genre stand together.",
        parts=[Part(panels, columns=len(tops(findings))), _check(findings)],
    )


def _pairs(findings: SkillFindings, names: Sequence[str], probe: str, top: int) -> list[dict[str, Any]]:
    """Return both directions of every pair; no value where random sets share as much, and none on the diagonal."""
    order = {name: i for i, name in enumerate(names)}
    rows: list[dict[str, Any]] = [
        {"a": short(name), "b": short(name), "shared": None, "value": None, "text": ""} for name in names
    ]
    for row in findings.overlaps:
        if (row.probe, row.top) == (probe, top):
            ratio = row.jaccard / row.chance
            known = {
                "shared": row.n_shared,
                "value": ratio if row.jaccard > row.chance_high else None,
                "text": times(ratio),
            }
            pair = sorted((row.dataset_a, row.dataset_b), key=order.__getitem__)
            rows += [{"a": short(a), "b": short(b), **known} for a, b in (pair, pair[::-1])]
    return rows


def layers(findings: SkillFindings) -> Figure:
    """Draw the share of the skill neurons in every layer, over an even share."""
    parts = []
    for top in tops(findings):
        panels = []
        most = max(2, *(row.share / row.uniform for one in findings.datasets for row in one.layers if row.top == top))
        for probe in probes(findings):
            rows = [
                {
                    "dataset": short(one.dataset),
                    "layer": row.layer,
                    "value": row.share / row.uniform,
                    "share": row.share,
                }
                for one in _by_genre(findings)
                for row in one.layers
                if (row.probe, row.top) == (probe, top)
            ]
            x = field("layer:O", title="layer", axis={"labelOverlap": True, "labelAngle": 0})
            y = field("dataset:N", sort=None, title=None)
            scale = {"scheme": "redblue", "reverse": True, "domain": [0, most], "domainMid": 1}
            title, height = f"{PROBE_TITLES[probe]}, best {top}", max(40, 14 * len(findings.datasets))
            chart = cells(rows, scale, "over an even share", x=x, y=y, title=title, height=height, has_texts=False)
            panels.append(chart)
        parts.append(Part(panels, columns=len(panels)))
    return Figure(
        model=findings.model,
        name="layers",
        title="layers of the skill neurons",
        says="Share of the skill neurons in every layer, over an even share: red layers hold more of them than their "
        "part, blue ones fewer.",
        parts=[*parts, _check(findings)],
    )


# Parts of figures


def _by_genre(findings: SkillFindings) -> list[DatasetFindings]:
    return sorted(findings.datasets, key=lambda one: one.reference.genre)


def _measured(row: Any, measure: _Measure) -> dict[str, Any]:
    return {name: getattr(row, source) for name, source in zip(("value", "low", "high"), measure[1:], strict=True)}


def _reference_looks(findings: SkillFindings) -> dict[str, Look]:
    """Return the lines to compare with that any dataset has."""
    known = [one.reference for one in findings.datasets]
    floors = [look for name, look in FLOOR_LOOKS.items() if any(getattr(row, name) is not None for row in known)]
    return {_LM: Look(BLUE, (9, 3)), **dict(floors)}


def _accuracies(
    one: DatasetFindings, looks: Mapping[str, Look], rows: Iterable[dict[str, Any]], count: str, title: str
) -> Chart:
    """Draw a panel of accuracies with the lines to compare them with."""
    known = one.reference
    references = [{"line": _LM, "value": known.lm, "low": known.low, "high": known.high}]
    references += [
        {"line": name, "value": floor, "low": math.nan, "high": math.nan}
        for floor_name, (name, _) in FLOOR_LOOKS.items()
        if (floor := getattr(known, floor_name)) is not None
    ]
    shown = list(rows)
    x = powers(count, title, (row[count] for row in shown if count in row))
    y = field("value:Q", title="accuracy", scale={"domain": [0, 1]})
    return curves([*shown, *references], looks, x, y, title=short(one.dataset))
