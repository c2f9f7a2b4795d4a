"""The common look of all figures, and how they are written as SVG and PNG."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from flows.show.text import printable
from negcore.store.files import output, shortened
from negcore.store.identity import content_digest
from tasks.steps import artifact_key

Axes = Any

BLUE, ORANGE, GREY = "#1f5f99", "#d95f02", "#8a8a8a"
_STYLE = {
    "svg.hashsalt": "neg",  # the same figure is the same file
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def save_figures(drawings: Mapping[str, Callable[[], Figure]], folder: Path, model: str) -> list[Path]:
    """Draw and write every figure of one model, and return the files, SVG before PNG.

    Raises
    ------
    RunError
        If they cannot be written.
    """
    paths = []
    with matplotlib.rc_context(_STYLE):
        for name, draw in drawings.items():
            figure = draw()
            for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                paths.append(folder / f"{_file_name(model)}-{name}.{kind}")
                with output(paths[-1]) as file:
                    figure.savefig(file, format=kind, metadata=metadata, dpi=150)
    return paths


def _file_name(model: str) -> str:
    """Return the beginning of a model's file names; a digest tells models apart whose names are alike but for signs."""
    key = shortened(artifact_key(model))
    return key if key == model else f"{key}-{content_digest(model)[:8]}"


def panel_grid(body: Any, n: int, columns: int) -> list[Axes]:
    """Return `n` panels of a figure, row by row; the rest of the last row stays empty."""
    grid = list(body.subplots(-(-n // columns), columns, squeeze=False).flat)
    for axes in grid[n:]:
        axes.set_visible(False)
    return grid[:n]


def plain(text: str) -> str:
    """Return a text that matplotlib shows as it is, without control characters or a formula between dollar signs."""
    return printable(text).replace("\n", " ").replace("$", r"\$")
