"""Figures of skill neurons, as SVG and PNG.

Every figure that relies on a ranking has a causal check of that ranking in its lower part, so that nobody sees the one
without the other. The whole check is a figure of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.colors
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flows.show.accuracy_tables import PROBE_TITLES, short
from flows.show.drawing import BLUE, GREY, ORANGE, Axes, panel_grid, plain, save_figures
from flows.show.skill_tables import (
    DIRECTION_TITLES,
    NEURON_TITLES,
    band_width,
    check_causal,
    depth_title,
    few,
    fitted,
    has_forests,
    probes,
    tops,
)
from flows.show.text import share, times
from tasks.skills import DatasetFindings, SkillFindings

Floats = NDArray[np.float64]
Texts = Sequence[Sequence[str]]

_WIDTH = 9.3  # inches: 1395 pixels
_SET_COLOURS = {"top": BLUE, "random": GREY, "bottom": ORANGE}
_PROBE_COLOURS = {"polar": "#1b7837", "magn": "#762a83"}
_PROBE_MARKERS = {"polar": "o", "magn": "s"}
_SAYS = {"gold": "as each neuron's NEG says", "polarity": "as the ranking says"}
"""Source of the direction towards the gold option."""
_FLOOR_LINES: Mapping[str, tuple[Any, str]] = {
    "majority": ("--", "majority"),
    "random": (":", "random answer"),
    "options_only": ("-.", "options and lengths"),
    "calibrated": ((0, (6, 2, 1, 2, 1, 2)), "calibrated LM-Prob"),
}
"""Look and name of the lines for floors."""
_MOST_NUMBERED = 8
"""Most datasets for which the cells of a heat map of pairs have space for a number."""


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


def write_figures(findings: SkillFindings, folder: Path) -> list[Path]:
    """Draw and write every figure of one model, and return the files, SVG before PNG."""
    check_causal(findings)
    return save_figures(dict(_drawings(findings)), folder, findings.model)


def _drawings(findings: SkillFindings) -> Iterator[tuple[str, Callable[[], Figure]]]:
    for probe, direction in product(probes(findings), DIRECTION_TITLES):
        yield f"causal-{probe}-{DIRECTION_TITLES[direction].lower()}", partial(causal, findings, probe, direction)
    yield "efficiency", partial(efficiency, findings)
    if len(findings.conditions) > 1:
        yield "transfer", partial(transfer, findings)
    yield "bands", partial(bands, findings)
    if has_forests(findings):
        yield "forests", partial(forests, findings)
    if findings.overlaps:
        yield "overlap", partial(overlap, findings)
    yield "layers", partial(layers, findings)


# The causal check


def causal(findings: SkillFindings, probe: str, direction: str) -> Figure:
    """Draw what shifting the best, random and last neurons of a ranking changes, by their number: a row a dataset."""
    shifts = sorted({abs(row.shift) for one in findings.datasets for row in one.causal})
    columns = [(measure, shift) for measure in _CHANGES for shift in shifts]
    n = len(findings.datasets)
    figure = Figure(figsize=(_WIDTH, 0.9 + 1.6 * n), layout="constrained")
    grid = figure.subplots(n, len(columns), squeeze=False, sharey="col")
    for one, row_of_axes in zip(findings.datasets, grid, strict=True):
        for axes, (measure, shift) in zip(row_of_axes, columns, strict=True):
            _changes(axes, one, (probe, direction), shift, measure)
            axes.set_title(f"{_name(one.dataset)}, ±{shift:g}", fontsize=8)
            axes.set_ylabel(measure.title if shift == shifts[0] else "")
    for axes in grid[-1]:
        axes.set_xlabel("neurons")
    _legend(figure, grid[0, 0])
    what = f"causal check of {PROBE_TITLES[probe]}'s ranking, towards gold {_SAYS[direction]} (shaded: 95 %)"
    figure.suptitle(_title(findings, what))
    return figure


def _changes(axes: Axes, one: DatasetFindings, check: tuple[str, str], distance: float, measure: _Measure) -> None:
    axes.axhline(0, color="black", linewidth=0.6)
    for neurons, title in NEURON_TITLES.items():
        for shift, style, way in ((distance, "-", "towards"), (-distance, "--", "away")):
            wanted = (*check, neurons, shift)
            rows = [row for row in one.causal if (row.probe, row.direction, row.neurons, row.shift) == wanted]
            sizes, label, colour = [row.size for row in rows], f"{title}, {way}", _SET_COLOURS[neurons]
            _curve(axes, sizes, rows, measure, label=label, color=colour, linestyle=style, marker="o")
    _powers(axes, {row.size for row in one.causal})


def _with_check(findings: SkillFindings, what: str, height: float) -> tuple[Figure, Any]:
    """Return a figure with a causal check below, and its upper part of that height in inches to draw in."""
    check_height = 2.2 if len(findings.datasets) <= _MOST_NUMBERED else 2.8
    figure = Figure(figsize=(_WIDTH, height + check_height), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(height, check_height))
    body, check = parts
    body.suptitle(_title(findings, what))
    size, shift = tops(findings)[len(tops(findings)) // 2], max(row.shift for row in findings.datasets[0].causal)
    check.suptitle(f"Causal check: {size} neurons shifted together by {shift:g} towards gold (bars: 95 %)", fontsize=9)
    panels = check.subplots(1, 2, sharey=True)
    for axes, direction in zip(panels, DIRECTION_TITLES, strict=True):
        _check(axes, findings, (size, direction, shift))
        axes.set_title(_SAYS[direction], fontsize=8)
    _legend(check, panels[0])
    return figure, body


def _check(axes: Axes, findings: SkillFindings, condition: tuple[int, str, float]) -> None:
    """Draw the change of accuracy under one size, direction and shift of every dataset's check."""
    shown = [(probe, neurons) for probe in probes(findings) for neurons in NEURON_TITLES]
    found = {
        (one.dataset, row.probe, row.neurons): row
        for one in findings.datasets
        for row in one.causal
        if (row.size, row.direction, row.shift) == condition
    }
    axes.axhline(0, color="black", linewidth=0.6)
    for (probe, neurons), offset in zip(shown, np.linspace(-0.3, 0.3, len(shown)), strict=True):
        rows = [found[one.dataset, probe, neurons] for one in findings.datasets]
        places, colour = np.arange(len(rows)) + offset, _SET_COLOURS[neurons]
        title = f"{PROBE_TITLES[probe]}, {NEURON_TITLES[neurons]}"
        axes.vlines(places, *_ends(rows, _CHANGES[0]), color=colour, linewidth=1)
        changes = [row.accuracy_change for row in rows]
        axes.plot(places, changes, _PROBE_MARKERS[probe], color=colour, markersize=3, label=title)
    axes.set_xlim(-0.5, len(findings.datasets) - 0.5)
    axes.set_ylabel(_first(axes, _CHANGES[0].title))
    axes.grid(axis="x", visible=False)
    _dataset_ticks(axes, findings.datasets)


def _dataset_ticks(axes: Axes, datasets: Sequence[DatasetFindings]) -> None:
    n = len(datasets)
    look = {"rotation": 90} if n > _MOST_NUMBERED else {"rotation": 20, "ha": "right"} if n > 3 else {}
    axes.set_xticks(range(n), [_name(one.dataset) for one in datasets], fontsize=7, **look)


# Accuracies


def efficiency(findings: SkillFindings) -> Figure:
    """Draw accuracy against the number of neurons and of training rows."""
    n, columns = len(findings.datasets), min(4, 2 * len(findings.datasets))
    height = 0.8 + 1.9 * -(-2 * n // columns)
    figure, body = _with_check(findings, "accuracy by neurons and by training rows (shaded: 95 %)", height)
    panels = panel_grid(body, 2 * n, columns)
    for one, by_neurons, by_rows in zip(findings.datasets, panels[::2], panels[1::2], strict=True):
        for probe in probes(findings):
            colour = _PROBE_COLOURS[probe]
            for order, style in (("best", "-"), ("random", ":")):
                counts = [row for row in one.neuron_counts if (row.probe, row.order) == (probe, order)]
                sizes, title = [row.n_neurons for row in counts], f"{PROBE_TITLES[probe]}, {order}"
                _curve(by_neurons, sizes, counts, _ACCURACY, label=title, color=colour, linestyle=style)
            rows = [row for row in one.training_rows if row.probe == probe]
            _curve(by_rows, [row.n_train for row in rows], rows, _ACCURACY, color=colour, marker="o")
        for axes, label in ((by_neurons, "neurons"), (by_rows, "training rows")):
            _accuracy_axes(axes, one, label)
        _powers(by_neurons, {row.n_neurons for row in one.neuron_counts})
        _powers(by_rows, {row.n_train for row in one.training_rows})
    _legend(body, panels[0])
    return figure


def bands(findings: SkillFindings) -> Figure:
    """Draw the accuracy of equally many neurons further and further down the ranking."""
    what = f"accuracy of {band_width(findings)} neurons further down the ranking (shaded: 95 %)"
    figure, body, panels = _a_panel_each(findings, what)
    for axes, one in zip(panels, findings.datasets, strict=True):
        for probe in probes(findings):
            rows = [row for row in one.bands if row.probe == probe]
            colour, title = _PROBE_COLOURS[probe], PROBE_TITLES[probe]
            _curve(axes, range(len(rows)), rows, _ACCURACY, label=title, color=colour, marker="o")
        _accuracy_axes(axes, one, "rank of the band's first neuron")
        starts = list(dict.fromkeys(row.first_rank for row in one.bands))
        axes.set_xticks(range(len(starts)), [str(start) for start in starts], rotation=45, ha="right", fontsize=7)
    _legend(body, panels[0])
    return figure


def forests(findings: SkillFindings) -> Figure:
    """Draw the accuracy of forests against their trees, a line for each depth, beside the probes that vote."""
    figure, body, panels = _a_panel_each(
        findings, "accuracy of forests by trees and depth (shaded: 95 % of the deepest)"
    )
    colours = matplotlib.colormaps["viridis_r"]
    for axes, one in zip(panels, findings.datasets, strict=True):
        depths = list(dict.fromkeys(row.depth for row in one.forests))
        for i, depth in enumerate(depths):
            rows = [row for row in one.forests if row.depth == depth]
            colour, shade = colours(0.1 + 0.9 * i / len(depths)), 0.15 if i == len(depths) - 1 else 0
            trees, label = [row.n_trees for row in rows], f"depth: {depth_title(depth)}"
            _curve(axes, trees, rows, _ACCURACY, shade=shade, label=label, color=colour, marker="o")
        for probe in probes(findings):
            voted = fitted(one, probe).accuracy
            axes.axhline(voted, color=_PROBE_COLOURS[probe], linestyle="-.", label=PROBE_TITLES[probe])
        _accuracy_axes(axes, one, "trees")
        _powers(axes, {row.n_trees for row in one.forests})
    _legend(body, panels[0])
    return figure


def transfer(findings: SkillFindings) -> Figure:
    """Draw the accuracy of each condition's probe under each condition, coloured by the loss against its own."""
    shown = [(one, probe) for one in findings.datasets for probe in probes(findings)]
    columns = min(4, len(shown))
    height = 1.2 + 1.75 * -(-len(shown) // columns)
    figure, body = _with_check(findings, "accuracy of probes under other conditions", height)
    panels = panel_grid(body, len(shown), columns)
    names = {i: plain(name) for i, name in enumerate(findings.conditions)}
    matrices = [_matrix(findings, one, probe) for one, probe in shown]
    lost = [accuracies - accuracies.diagonal() for accuracies in matrices]
    norm = matplotlib.colors.CenteredNorm(0, max(0.1, *(np.abs(change).max() for change in lost)))
    for i, (axes, (one, probe), accuracies) in enumerate(zip(panels, shown, matrices, strict=True)):
        image = _heat_map(axes, lost[i], norm, "RdBu", _texts(accuracies, share))
        axes.set_title(f"{_name(one.dataset)}, {PROBE_TITLES[probe]}", fontsize=8)
        _outer_ticks(axes, i, columns, len(shown), x=names, y=names)
    body.supxlabel("tested on", fontsize=9)
    body.supylabel("trained on", fontsize=9)
    body.colorbar(image, ax=panels, label="difference from the diagonal", shrink=0.8, pad=0.01)
    return figure


def _matrix(findings: SkillFindings, one: DatasetFindings, probe: str) -> Floats:
    """Return accuracies: a row for each condition of training, a column for each condition of testing."""
    found = {(row.trained_on, row.tested_on): row.accuracy for row in one.transfers if row.probe == probe}
    return np.array([[found[on, to] for to in findings.conditions] for on in findings.conditions])


# Which neurons


def overlap(findings: SkillFindings) -> Figure:
    """Draw how many times more skill neurons two datasets share than random sets, datasets of a genre side by side."""
    ordered = sorted(findings.datasets, key=lambda one: one.reference.genre)
    shown = [(probe, top) for probe in probes(findings) for top in tops(findings)]
    columns, names = len(tops(findings)), {i: _name(one.dataset) for i, one in enumerate(ordered)}
    height = 1.5 + len(probes(findings)) * max(1.6, 0.11 * len(ordered) + 0.5)
    figure, body = _with_check(
        findings, "skill neurons that two datasets share (white: no more than by chance)", height
    )
    panels = panel_grid(body, len(shown), columns)
    grids = [_pairs(findings, [one.dataset for one in ordered], probe, top) for probe, top in shown]
    norm = matplotlib.colors.LogNorm(1, max(2, *(np.nanmax(pairs.beyond_DD, initial=2) for pairs in grids)))
    for i, (axes, (probe, top), pairs) in enumerate(zip(panels, shown, grids, strict=True)):
        texts = _texts(pairs.ratio_DD, times) if len(ordered) <= _MOST_NUMBERED else ()
        image = _heat_map(axes, pairs.beyond_DD, norm, "YlOrRd", texts)
        axes.set_title(f"{PROBE_TITLES[probe]}, best {top}", fontsize=8)
        _outer_ticks(axes, i, columns, len(shown), x=names, y=names)
        for border in _borders([one.reference.genre for one in ordered]):
            axes.axhline(border, color="black", linewidth=0.6)
            axes.axvline(border, color="black", linewidth=0.6)
    ticks = matplotlib.ticker.LogLocator(subs=(1, 2, 5))
    body.colorbar(image, ax=panels, label="Jaccard index over chance", ticks=ticks, format="%g").minorticks_off()
    return figure


class _Pairs(NamedTuple):
    ratio_DD: Floats
    """Jaccard index over that of random sets; NaN for a dataset with itself."""
    beyond_DD: Floats
    """The same, and NaN where random sets share as much."""


def _pairs(findings: SkillFindings, names: Sequence[str], probe: str, top: int) -> _Pairs:
    ratio_DD = np.full((len(names), len(names)), np.nan)
    beyond_DD = ratio_DD.copy()
    for row in findings.overlaps:
        if (row.probe, row.top) == (probe, top):
            a, b = names.index(row.dataset_a), names.index(row.dataset_b)
            ratio_DD[[a, b], [b, a]] = row.jaccard / row.chance
            beyond_DD[[a, b], [b, a]] = row.jaccard / row.chance if row.jaccard > row.chance_high else np.nan
    return _Pairs(ratio_DD, beyond_DD)


def _borders(genres: Sequence[str]) -> list[float]:
    """Return the places in a heat map where one genre ends and the next begins."""
    return [i - 0.5 for i in range(1, len(genres)) if genres[i] != genres[i - 1]]


def layers(findings: SkillFindings) -> Figure:
    """Draw the share of the skill neurons in every layer, over an even share."""
    ordered = sorted(findings.datasets, key=lambda one: one.reference.genre)
    columns, n = len(probes(findings)), len(tops(findings)) * len(probes(findings))
    height = 1.0 + len(tops(findings)) * (0.5 + 0.14 * max(3, len(ordered)))
    figure, body = _with_check(findings, "layers of the skill neurons", height)
    panels, names = panel_grid(body, n, columns), {i: _name(one.dataset) for i, one in enumerate(ordered)}
    for row, top in enumerate(tops(findings)):
        ratios = [np.array([_layer_ratios(one, probe, top) for one in ordered]) for probe in probes(findings)]
        most = max(2, *(of_probe.max() for of_probe in ratios))
        norm = matplotlib.colors.CenteredNorm(1, most - 1)
        own = panels[row * columns : (row + 1) * columns]
        for i, (axes, probe, ratios_DL) in enumerate(zip(own, probes(findings), ratios, strict=True)):
            image = _heat_map(axes, ratios_DL, norm, "RdBu_r")
            axes.set_title(f"{PROBE_TITLES[probe]}, best {top}", fontsize=8)
            ticks = {layer: str(layer) for layer in few(range(ratios_DL.shape[1]), 7)}
            _outer_ticks(axes, row * columns + i, columns, n, x=ticks, y=names)
        body.colorbar(image, ax=own, pad=0.01).ax.set_ylim(0, most)
    body.supxlabel("layer; colour: share of the neurons over an even share", fontsize=9)
    return figure


def _layer_ratios(one: DatasetFindings, probe: str, top: int) -> list[float]:
    return [row.share / row.uniform for row in one.layers if (row.probe, row.top) == (probe, top)]


# Parts of figures


def _title(findings: SkillFindings, what: str) -> str:
    return f"{plain(findings.model)}: {what}"


def _name(dataset: str) -> str:
    name = short(dataset)
    return plain(name if len(name) <= 20 else f"{name[:17]}...")


def _a_panel_each(findings: SkillFindings, what: str) -> tuple[Figure, Any, list[Axes]]:
    """Return a figure with a causal check, its upper part, and a panel there for every dataset."""
    n = len(findings.datasets)
    columns = n if n < 4 else 2 if n == 4 else 4
    figure, body = _with_check(findings, what, 0.8 + 2.0 * -(-n // columns))
    return figure, body, panel_grid(body, n, columns)


def _legend(body: Any, axes: Axes) -> None:
    """Draw one legend for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= 8 else -(-len(labels) // 2)
    body.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7.5, columnspacing=1.2)


def _curve(
    axes: Axes, x: Iterable[float], rows: Sequence[Any], measure: _Measure, *, shade: float = 0.15, **look: Any
) -> None:
    """Draw a line with its shaded interval."""
    places, values = list(x), [getattr(row, measure.value) for row in rows]
    axes.plot(places, values, markersize=2.5, linewidth=1.2, **look)
    axes.fill_between(places, *_ends(rows, measure), color=look["color"], alpha=shade, linewidth=0)


def _ends(rows: Sequence[Any], measure: _Measure) -> tuple[list[float], list[float]]:
    """Return the lower and the upper ends of the rows' intervals."""
    return [getattr(row, measure.low) for row in rows], [getattr(row, measure.high) for row in rows]


def _accuracy_axes(axes: Axes, one: DatasetFindings, label: str) -> None:
    """Draw a panel's name and scale, and the references for its probes."""
    known = one.reference
    axes.axhspan(known.low, known.high, color="black", alpha=0.08, linewidth=0)
    axes.axhline(known.lm, color="black", linewidth=1, label="LM-Prob")
    for name, (line, title) in _FLOOR_LINES.items():
        if (floor := getattr(known, name)) is not None:
            axes.axhline(floor, color=GREY, linewidth=1, linestyle=line, label=title)
    axes.set(xlabel=label, ylim=(0, 1))
    axes.set_title(_name(one.dataset), fontsize=8)
    axes.set_ylabel(_first(axes, "accuracy"))


def _first(axes: Axes, label: str) -> str:
    """Return a label for panels of the first column, and an empty one for the others."""
    return label if axes.get_subplotspec().is_first_col() else ""


def _powers(axes: Axes, values: Iterable[int]) -> None:
    """Set a logarithmic scale with at most four of the values as its ticks."""
    ticks = sorted(values)
    ticks = ticks[:: -(-len(ticks) // 4)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _heat_map(axes: Axes, values_YX: Floats, norm: Any, colours: str, texts: Texts = ()) -> Any:
    """Draw coloured cells, white where there is no value, with a text in each."""
    image = axes.imshow(values_YX, norm=norm, cmap=colours, aspect="auto")
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    rgba_YX4 = image.to_rgba(values_YX)
    lightness_YX = 1 - rgba_YX4[..., 3] * (1 - rgba_YX4[..., :3] @ (0.3, 0.59, 0.11))
    for (y, x), text in np.ndenumerate(np.array(texts)):
        colour = "white" if lightness_YX[y, x] < 0.5 else "black"
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
    return image


def _texts(values_YX: Floats, shown: Callable[[float], str]) -> Texts:
    return [["" if np.isnan(value) else shown(value) for value in row] for row in values_YX.tolist()]


def _outer_ticks(axes: Axes, i: int, columns: int, n: int, *, x: Mapping[int, str], y: Mapping[int, str]) -> None:
    """Write names beside the panels of the first column and below the last panel of every column."""
    size = 7 if len(y) <= _MOST_NUMBERED else 6
    below, beside = i + columns >= n, i % columns == 0
    turned = 90 if max(map(len, x.values())) > 2 else 0
    axes.set_xticks(list(x), list(x.values()) if below else [""] * len(x), rotation=turned, fontsize=size)
    axes.set_yticks(list(y), list(y.values()) if beside else [""] * len(y), fontsize=size)
