"""Figures of a linearity study, as SVG and PNG; titles hold names and ids, never a prompt's text."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.cm
import matplotlib.colors
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flows.show.drawing import BLUE, GREY, ORANGE, Axes, panel_grid, plain, save_figures
from flows.show.linearity_tables import ESTIMATOR_TITLES, whole_model
from flows.show.text import correlation
from tasks.linearity import Findings


def write_figures(findings: Findings, folder: Path) -> list[Path]:
    """Draw and write every figure of one model, and return the files, SVG before PNG."""
    return save_figures({name: partial(draw, findings) for name, draw in FIGURES.items()}, folder, findings.model)


def shift_curves(findings: Findings) -> Figure:
    """Draw the change of probability against shift for a few neurons, with the lines of the main range."""
    examples = _examples(findings)
    figure = Figure(figsize=(9, 2.7 * -(-len(examples) // 3)), layout="constrained")
    for axes, example in zip(panel_grid(figure, len(examples), 3), examples, strict=True):
        _shift_curve(findings, axes, example)
    figure.suptitle(_title(findings, "change of the answer's probability against shift"))
    return figure


def linear_share(findings: Findings) -> Figure:
    """Draw the share of linear neurons against range, for the model and each layer."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    layers = [row.layer for row in findings.ranges if row.layer is not None]
    colours = matplotlib.colormaps["viridis"]
    for layer in sorted(set(layers)):
        rows = [row for row in findings.ranges if row.layer == layer]
        axes.plot(*_points(rows, "linear_share"), color=colours(layer / max(1, *layers)), alpha=0.5, linewidth=0.8)
    whole = [row for row in findings.ranges if row.layer is None]
    axes.plot(*_points(whole, "linear_share"), color="black", linewidth=2, marker="o", label="model")
    scale = matplotlib.colors.Normalize(0, max(1, *layers))
    whole_layers = matplotlib.ticker.MaxNLocator(integer=True)
    figure.colorbar(matplotlib.cm.ScalarMappable(scale, colours), ax=axes, label="layer", ticks=whole_layers)
    axes.set(xscale="log", ylim=(0, 1.03), xlabel="range of shifts ± (activation)", ylabel="share of linear neurons")
    ranges = [row.range for row in whole]
    axes.set_xticks(ranges, [f"{range_:g}" for range_ in ranges])
    axes.minorticks_off()
    axes.legend()
    figure.suptitle(_title(findings, "linear neurons (|r| ≥ 0.95)"))
    return figure


def estimators(findings: Findings) -> Figure:
    """Draw measured NEG against each estimator, for all prompts and neurons."""
    negs_PK = findings.sweep.within(findings.main_range).negs_PK
    rows = whole_model(findings, findings.main_range)
    figure = Figure(figsize=(9, 2.9 * -(-len(rows) // 3)), layout="constrained")
    for axes, row in zip(panel_grid(figure, len(rows), 3), rows, strict=True):
        scores_PK = findings.scores_PK[row.estimator]
        axes.scatter(scores_PK, negs_PK, s=2, alpha=0.15, color=BLUE, linewidths=0, rasterized=True)
        _symlog(axes.set_xscale, axes.xaxis, scores_PK)
        _symlog(axes.set_yscale, axes.yaxis, negs_PK)
        axes.set(title=f"{ESTIMATOR_TITLES[row.estimator]}, r = {correlation(row.pearson)}", xlabel="estimate")
        axes.set_ylabel("measured NEG")
    figure.suptitle(_title(findings, f"NEG measured within ±{findings.main_range:g} against estimates"))
    return figure


def layer_profile(findings: Findings) -> Figure:
    """Draw the linear share, the size of NEG and the agreement of each estimator by layer."""
    figure = Figure(figsize=(7, 7.2), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    for range_ in dict.fromkeys(row.range for row in findings.ranges):
        rows = [row for row in findings.ranges if row.range == range_ and row.layer is not None]
        top.plot([row.layer for row in rows], [row.linear_share for row in rows], label=f"±{range_:g}", linewidth=1.2)
    top.set(ylabel="share of linear neurons", ylim=(0, 1.03))
    sizes = [row for row in findings.sizes if row.layer is not None]
    layers = [row.layer for row in sizes]
    middle.fill_between(layers, [r.q05 for r in sizes], [r.q95 for r in sizes], color=BLUE, alpha=0.15, label="5-95 %")
    middle.fill_between(layers, [r.q25 for r in sizes], [r.q75 for r in sizes], color=BLUE, alpha=0.3, label="25-75 %")
    middle.plot(layers, [row.q50 for row in sizes], color=BLUE, label="median")
    middle.set(yscale="log", ylabel="|NEG|\n(probability per activation)")
    for name in findings.scores_PK:
        wanted = [row for row in findings.agreement if row.estimator == name and row.range == findings.main_range]
        by_layer = [row for row in wanted if row.layer is not None]
        bottom.plot(
            [row.layer for row in by_layer],
            [row.pearson for row in by_layer],
            label=ESTIMATOR_TITLES[name],
            linewidth=2 if name == "neurgrad" else 1,
        )
    bottom.set(xlabel="layer", ylabel=f"r with NEG (±{findings.main_range:g})", ylim=(None, 1.03))
    bottom.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    for axes in (top, middle, bottom):
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(_title(findings, "by layer"))
    return figure


def interventions(findings: Findings) -> Figure:
    """Draw the correlation of predicted and true change against the number of neurons shifted together."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for shift in dict.fromkeys(row.shift for row in findings.interventions):
        rows = [row for row in findings.interventions if row.shift == shift]
        sizes = [row.set_size for row in rows]
        (line,) = axes.plot(sizes, [row.pearson for row in rows], marker="o", markersize=3, label=f"shift {shift:g}")
        low, high = [row.pearson_low for row in rows], [row.pearson_high for row in rows]
        axes.fill_between(sizes, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="neurons shifted together", ylabel="r of predicted and true change", ylim=(None, 1.03))
    axes.legend()
    figure.suptitle(_title(findings, "neurons together"))
    return figure


FIGURES: dict[str, Callable[[Findings], Figure]] = {
    "shift-curves": shift_curves,
    "linear-share": linear_share,
    "estimators": estimators,
    "layer-profile": layer_profile,
    "interventions": interventions,
}


class _Example(NamedTuple):
    what: str
    prompt: int
    neuron: int


def _examples(findings: Findings) -> list[_Example]:
    """Return the largest linear NEG of either sign, the median one, and the largest changes that are not linear."""
    main, whole = findings.sweep.within(findings.main_range), findings.sweep
    linear_PK = np.where(main.linear_PK & whole.linear_PK, main.negs_PK, np.nan)
    bent_PK = np.where(whole.linear_PK, 0, np.abs(whole.changes_PKS).max(-1))
    chosen = []
    if not np.isnan(linear_PK).all():
        middle = np.nanmedian(np.abs(linear_PK))
        chosen += [
            _Example("largest positive", *_place(np.nanargmax(linear_PK), linear_PK)),
            _Example("largest negative", *_place(np.nanargmin(linear_PK), linear_PK)),
            _Example("median", *_place(np.nanargmin(np.abs(np.abs(linear_PK) - middle)), linear_PK)),
        ]
    most_bent = np.argsort(-bent_PK.max(1), kind="stable")[:3]  # one a prompt
    chosen += [_Example("not linear", p, int(bent_PK[p].argmax())) for p in most_bent.tolist() if bent_PK[p].any()]
    return chosen


def _place(index: Any, array_PK: NDArray[Any]) -> tuple[int, int]:
    prompt, neuron = np.unravel_index(index, array_PK.shape)
    return int(prompt), int(neuron)


def _shift_curve(findings: Findings, axes: Axes, example: _Example) -> None:
    sweep, main = findings.sweep, findings.sweep.within(findings.main_range)
    layer, neuron = sweep.neurons_K2[example.neuron]
    ends = np.array([-1, 1]) * np.abs(sweep.shifts_S).max()
    axes.plot(sweep.shifts_S, sweep.changes_PKS[example.prompt, example.neuron], "o", markersize=2.5, color=BLUE)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # the points decide what is shown, not the line
    axes.axvspan(-findings.main_range, findings.main_range, color=GREY, alpha=0.12, linewidth=0)
    axes.plot(ends, main.negs_PK[example.prompt, example.neuron] * ends, color=ORANGE, linewidth=1)
    r = sweep.pearson_PK[example.prompt, example.neuron]
    id_ = plain(findings.ids[example.prompt])
    axes.set_title(f"{example.what}: layer {layer}, neuron {neuron}, r = {r:.3f}\n{_shortened(id_)}", fontsize=7.5)
    axes.set(xlabel="shift (activation)", ylabel="Δp")
    axes.ticklabel_format(axis="y", scilimits=(-2, 2))


def _points(rows: list[Any], name: str) -> tuple[list[float], list[float]]:
    return [row.range for row in rows], [getattr(row, name) for row in rows]


def _symlog(set_scale: Callable[..., None], axis: Any, values: NDArray[Any]) -> None:
    """Set a scale for both signs over many powers of ten, linear below the median size; at most two ticks a side."""
    sizes = np.abs(values[values != 0])
    if not sizes.size:
        return
    threshold, largest = float(np.median(sizes)), float(sizes.max())
    set_scale("symlog", linthresh=threshold, linscale=1.5)
    powers = np.unique(np.linspace(np.ceil(np.log10(threshold)), np.floor(np.log10(largest)), 2).round())
    axis.set_ticks([*(-(10**powers))[::-1], 0, *10**powers])


def _title(findings: Findings, what: str) -> str:
    return f"{plain(findings.model)} on {plain(findings.dataset)}: {what}"


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:28]}...{text[-9:]}"
