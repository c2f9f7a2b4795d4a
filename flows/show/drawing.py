"""The common look of all figures, drawn by Vega-Lite: on the page of a run, and as SVG, PNG and PDF beside it.

A figure is made once. The page draws it in the browser, with a tooltip on every mark; the files are of the same
specification.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import vl_convert

from flows.show.model_names import shown_model
from flows.show.text import printable
from negcore.store.files import output, shortened
from negcore.store.identity import content_digest
from tasks.steps import artifact_key

BLUE, ORANGE, GREY, GREEN, PURPLE = "#3a7fc1", "#d95f02", "#8a8a8a", "#2f9a58", "#a263c4"
"""Colours that can be read on white and on black."""
WIDTH, HEIGHT = 210, 120
"""Pixels of the inside of a panel; a telephone has space for one and its labels."""
KINDS = ("svg", "png", "pdf")
_MARGIN = 100
"""Pixels of a panel's labels, at most."""

Chart = dict[str, Any]
"""A view of Vega-Lite, of one layer or of several."""
Row = Mapping[str, Any]


class Look(NamedTuple):
    """The look of a line or point: its colour and the lengths of its dashes and gaps; none is a line without gaps."""

    colour: str
    dash: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part:
    """Panels beside each other, below one heading, with one legend."""

    panels: Sequence[Chart]
    heading: str = ""
    columns: int = 3
    """Most panels in a row; a narrow screen has fewer."""

    @property
    def chart(self) -> Chart:
        return {"concat": list(self.panels), "columns": self.columns}


@dataclass(frozen=True)
class Figure:
    """A figure, and what it shows."""

    model: str
    name: str
    """With the model's name the name of its files."""
    title: str
    says: str
    """A description in a sentence or two: for those who see the figure and for those who cannot."""
    parts: Sequence[Part]
    is_private: bool = False
    """It names rows by their ids, so it is left out in Prefect."""


def save_figures(figures: Iterable[Figure], folder: Path) -> list[Path]:
    """Write every figure as SVG, PNG and PDF, and return the files.

    Raises
    ------
    RunError
        If they cannot be written.
    """
    paths = []
    for figure in figures:
        svg = _svg_of(figure)
        pictures = (svg.encode(), vl_convert.svg_to_png(svg, scale=2), vl_convert.svg_to_pdf(svg))
        for kind, picture in zip(KINDS, pictures, strict=True):
            paths.append(folder / f"{file_name(figure.model)}-{figure.name}.{kind}")
            with output(paths[-1]) as file:
                file.write_bytes(picture)
    return paths


def png_of(figure: Figure) -> bytes:
    """Return a figure as a PNG of the size of a screen's pixels."""
    return vl_convert.svg_to_png(_svg_of(figure))


def _svg_of(figure: Figure) -> str:
    return _renumbered(vl_convert.vegalite_to_svg(_whole(figure), config=look("#333333") | {"background": "white"}))


def _renumbered(svg: str) -> str:
    """Return a picture that is the same whatever was drawn before it: Vega counts its clips and gradients on."""
    numbers: dict[str, int] = {}

    def renumbered(match: re.Match[str]) -> str:
        return f"{match[1]}{match[2]}{numbers.setdefault(match[3], len(numbers))}"

    return re.sub(r'(id="|url\(#)(clip|gradient_)(\d+)', renumbered, svg)


def _whole(figure: Figure) -> Chart:
    """Return a figure with all its parts, the title above and the headings between."""
    return {
        "title": _long(f"{shown_model(figure.model)}: {figure.title}", 13),
        "vconcat": [part.chart | ({"title": _long(part.heading, 12)} if part.heading else {}) for part in figure.parts],
        "resolve": {"scale": dict.fromkeys(("color", "strokeDash", "shape", "size"), "independent")},
    }


def _long(text: str, size: int) -> Chart:
    return {"text": printable(text).replace("\n", " "), "fontSize": size, "limit": 900}


def look(ink: str) -> dict[str, Any]:
    """Return Vega's configuration for lines and texts of a colour on a background that shines through."""
    return {
        "background": "transparent",
        "font": "system-ui, 'Liberation Sans', sans-serif",
        "view": {"stroke": ink, "strokeOpacity": 0.2},
        "axis": {
            "domainColor": ink,
            "tickColor": ink,
            "gridColor": ink,
            "gridOpacity": 0.12,
            "labelColor": ink,
            "titleColor": ink,
            "titleFontWeight": "normal",
            "labelLimit": 90,
        },
        "legend": {"labelColor": ink, "titleColor": ink, "orient": "bottom", "labelLimit": 180, "columns": 4},
        "title": {"color": ink, "fontSize": 11, "fontWeight": "normal", "anchor": "start", "limit": 280},
        "text": {"fontSize": 9},
    }


def file_name(model: str) -> str:
    """Return the beginning of a model's file names; a digest tells models apart whose names are alike but for signs."""
    key = shortened(artifact_key(model))
    return key if key == model else f"{key}-{content_digest(model)[:8]}"


# Charts

_TYPES = {"Q": "quantitative", "N": "nominal", "O": "ordinal"}


def field(shorthand: str, **options: Any) -> Chart:
    """Return the encoding of a field, written as ``name:Q`` (quantitative), ``name:N`` (nominal) or ``name:O``."""
    name, _, kind = shorthand.partition(":")
    return {"field": name, "type": _TYPES[kind], **options}


def layer(
    mark: str, look: Mapping[str, Any] | None = None, rows: Iterable[Row] | None = None, **encoding: Any
) -> Chart:
    """Return a layer of marks.

    Parameters
    ----------
    look : mapping, optional
        Properties of the marks.
    rows : iterable of mapping, optional
        By default those of the whole panel.
    """
    view: Chart = {"mark": {"type": mark, **(look or {})}, "encoding": encoding}
    return view if rows is None else view | {"data": values(rows)}


def panel(
    rows: Iterable[Row], *layers: Chart, title: str = "", width: int = WIDTH, height: int = HEIGHT, **encoding: Any
) -> Chart:
    """Return a panel of layers, with the encoding that they share."""
    return {
        "title": printable(title).replace("\n", " "),
        "width": width,
        "height": height,
        "data": values(rows),
        "encoding": encoding,
        "layer": list(layers),
    }


def values(rows: Iterable[Row]) -> Chart:
    """Return rows as the data of a view, with names that can be printed; NaN and infinity are missing there."""
    return {"values": [{name: _value(value) for name, value in row.items()} for row in rows]}


def _value(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value).replace("\n", " ")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def curves(rows: Sequence[Row], looks: Mapping[str, Look], x: Chart, y: Chart, *, title: str = "") -> Chart:
    """Draw lines with their intervals.

    Parameters
    ----------
    rows : sequence of mapping
        ``line``, a name among `looks`; ``value``, and ``low`` and ``high`` of its interval; the field of `x`. A row
        without that field is a line across the panel.
    """
    name, (colour, dash) = x["field"], line_scales(looks)
    known = [row for row in rows if name in row]
    across = [row for row in rows if name not in row]
    about = [field("line:N"), field(f"{name}:Q"), *measured()]
    rules = layer("rule", {"strokeWidth": 1.2}, across, y=y, strokeDash=dash, tooltip=[field("line:N"), measured()[0]])
    bands = layer("area", {"opacity": 0.15}, x=x, y=y | {"field": "low"}, y2={"field": "high"})
    lines = layer("line", {"strokeWidth": 1.5}, x=x, y=y, strokeDash=dash)
    points = layer("circle", {"size": 22, "opacity": 1}, x=x, y=y, tooltip=about)
    has_bands = any("low" in row for row in known)
    return panel(
        known, *([rules] if across else []), *([bands] if has_bands else []), lines, points, title=title, color=colour
    )


def line_scales(looks: Mapping[str, Look]) -> tuple[Chart, Chart]:
    """Return the colours and dashes of lines by their names, in one legend."""
    names, legend = list(looks), {"title": None, "symbolType": "stroke", "symbolStrokeWidth": 2, "symbolOpacity": 1}
    colours = {"domain": names, "range": [one.colour for one in looks.values()]}
    dashes = {"domain": names, "range": [list(one.dash) or [1, 0] for one in looks.values()]}
    return field("line:N", scale=colours, legend=legend), field("line:N", scale=dashes, legend=legend)


def measured(*names: str, form: str = ".4~g") -> list[Chart]:
    """Return what a tooltip says of numbers: by default of a value and its interval."""
    return [field(f"{name}:Q", format=form) for name in names or ("value", "low", "high")]


def cells(
    rows: Sequence[Row],
    scale: Mapping[str, Any],
    legend: str,
    *,
    x: Chart,
    y: Chart,
    title: str = "",
    height: int = HEIGHT,
    has_texts: bool = True,
) -> Chart:
    """Draw a map of coloured cells: ``value`` decides the colour, ``text`` stands in it; no value leaves it empty."""
    colour = field("value:Q", scale=scale, legend={"title": legend, "gradientLength": 160})
    about = [field(f"{name}:N") for name in rows[0] if name not in ("value", "text")]
    is_known = "isValid(datum.value)"
    squares = layer("rect", color=colour) | {"transform": [{"filter": is_known}]}
    readable = {"condition": {"test": is_known, "value": "black"}, "value": GREY}
    texts = [layer("text", {"fontSize": 9}, text=field("text:N"), color=readable)] if has_texts else []
    about += measured("value") if not has_texts else [field("text:N")]
    return panel(rows, squares, *texts, title=title, height=height, x=x, y=y, tooltip=about)


def common_scale(ends: Iterable[float], *, least: float) -> Chart:
    """Return a scale that holds all values and zero, and spans at least so much: noise is not blown up to a panel."""
    known = [0.0, *(end for end in ends if math.isfinite(end))]
    low, high = min(known), max(known)
    spare = max(0.0, least - (high - low)) / 2
    return {"domain": [low - spare, high + spare], "nice": True}


def powers(name: str, title: str, counts: Iterable[int]) -> Chart:
    """Return a logarithmic axis of counts, with at most four of them as ticks."""
    ordered = sorted(set(counts))
    ticks = ordered[:: -(-len(ordered) // 4)]
    ends = [ordered[0], ordered[-1]] if len(ordered) > 1 else [ordered[0] / 2, ordered[0] * 2]
    scale = {"type": "log", "base": 2, "domain": ends}
    return field(f"{name}:Q", title=title, scale=scale, axis={"values": ticks, "format": "d"})
