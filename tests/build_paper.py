"""Write docs/paper.md: what the paper reports, beside what campaigns measured here.

`make paper RUNS="runs/paper-llama2-7b ..."` takes the figures of finished campaigns into docs/paper/measured.json and
writes the page; without RUNS it writes the page anew.
"""

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.show.linearity_tables import ESTIMATOR_TITLES
from flows.show.model_names import shown_model
from flows.show.text import correlation
from tasks.rundir.tables import read_arrow

DOCS = Path(__file__).parents[1] / "docs"
PAGE, REPORTED, MEASURED = DOCS / "paper.md", DOCS / "paper" / "reported.toml", DOCS / "paper" / "measured.json"
BEGIN, END = "<!-- tables: written by `make paper` -->", "<!-- end of tables -->"
PROBES = {"lm": "LM-Prob", "act": "Act", "magn": "Magn", "tree": "Tree"}

Figures = Mapping[str, Any]
"""Figures of a model: `estimators`, `linearity` and `accuracy` by dataset, texts by name."""


def measured_figures(campaign: Path) -> dict[str, Figures]:
    """Return the figures of a finished campaign, by model."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(campaign.glob("*/linearity/linearity/agreement.arrow")):
        for model, figures in _linearity_figures(path.parent).items():
            found.setdefault(model, {}).update(figures)
    for path in sorted(campaign.glob("*/mceval8k/accuracy.arrow")):
        for row in read_arrow(path).to_pylist():
            if not row["group"]:
                of_model = found.setdefault(_named(row, "shots"), {}).setdefault("accuracy", {})
                cells = of_model.setdefault(row["dataset"].split("/")[-1], {})
                cells[row["probe"]] = f"{_short(row['accuracy'])} ({_short(row['low'])}-{_short(row['high'])})"
    if not found:
        raise SystemExit(f"{campaign}: no tables of a finished campaign; give the directory of `neg campaign`")
    return {model: dict(figures) for model, figures in found.items()}


def _linearity_figures(folder: Path) -> dict[str, dict[str, Any]]:
    agreement, ranges, together = (_whole(folder, name) for name in ("agreement", "ranges", "interventions"))
    largest = max(row["set_size"] for row in together)
    found: dict[str, dict[str, Any]] = {}
    for model in dict.fromkeys(row["model"] for row in agreement):
        ours = [[row for row in rows if row["model"] == model] for rows in (agreement, ranges, together)]
        by_range = [(row["estimator"], f"±{row['range']:g}: {correlation(row['pearson'])}") for row in ours[0]]
        linear = {f"linear neurons within ±{row['range']:g}": correlation(row["linear_share"]) for row in ours[1]}
        positive = {"NEG above 0": correlation(ours[1][0]["positive_share"])}
        sums = [f"{correlation(r['pearson'])} by {r['shift']:g}" for r in ours[2] if r["set_size"] == largest]
        found[shown_model(model)] = {
            "estimators": {name: "; ".join(text for one, text in by_range if one == name) for name, _ in by_range},
            "linearity": linear | positive | {f"r of {largest} neurons together": "; ".join(sums)},
        }
    return found


def _whole(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of a table that are about whole models."""
    return [row for row in read_arrow(folder / f"{name}.arrow").to_pylist() if row.get("layer") is None]


def _named(row: Mapping[str, Any], shots: str) -> str:
    return shown_model(row["model"]) + f", {row[shots]}-shot" * bool(row[shots])


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def page(text: str, reported: Mapping[str, Any], measured: Mapping[str, Figures]) -> str:
    """Return the page with the tables of these figures."""
    before, _, rest = text.partition(BEGIN)
    tables = "\n".join(_tables(reported, measured))
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}"


def _tables(reported: Mapping[str, Any], measured: Mapping[str, Figures]) -> Iterator[str]:
    columns = {f"paper: {model}": of for model, of in reported.items() if isinstance(of, dict)}
    columns |= {f"here: {model}": of for model, of in measured.items()}
    for kind, title in (("estimators", "r with the measured NEG"), ("linearity", "linearity")):
        chosen = {name: of[kind] for name, of in columns.items() if kind in of}
        rows = dict.fromkeys(row for of in chosen.values() for row in of)
        lines = [[ESTIMATOR_TITLES.get(row, row), *(of.get(row, "") for of in chosen.values())] for row in rows]
        yield from _table([title, *chosen], lines)
    of_models = {name: of["accuracy"] for name, of in columns.items() if "accuracy" in of}
    names = dict.fromkeys(dataset for of in of_models.values() for dataset in of)
    lines = [
        [dataset, model, *(of[dataset].get(probe, "") for probe in PROBES)]
        for dataset in names
        for model, of in of_models.items()
        if dataset in of
    ]
    yield from _table(["accuracy on test", "", *PROBES.values()], lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


def current_page() -> str:
    """Return the page as the figures on the disk make it."""
    reported = tomllib.loads(REPORTED.read_text(encoding="utf-8"))
    return page(PAGE.read_text(encoding="utf-8"), reported, json.loads(MEASURED.read_text(encoding="utf-8")))


if __name__ == "__main__":
    figures = json.loads(MEASURED.read_text(encoding="utf-8"))
    for directory in sys.argv[1:]:
        figures |= measured_figures(Path(directory))
    MEASURED.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(current_page(), encoding="utf-8")
