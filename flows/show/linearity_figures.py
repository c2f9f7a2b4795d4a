"""Figures of a linearity study; titles hold names and ids, never a prompt's text."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flows.show.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    Chart,
    Figure,
    Look,
    Part,
    common_scale,
    curves,
    field,
    layer,
    measured,
    panel,
    powers,
)
from flows.show.linearity_tables import ESTIMATOR_TITLES, main_range, unit_name, whole_model
from flows.show.text import correlation
from negcore.analysis.linearity import AgreementRow
from tasks.linearity import Findings

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY, "#b08d2f", "#c1447e")
_CHANGE = {
    "probability": "change of p",
    "log-probability": "change of log p (nats)",
    "logit-difference": "change of the logit difference",
}
_MOST_POINTS = 500
"""Points of a panel: more are a blot, and make the page heavy."""
_LEAST_CHANGE = 1e-6
"""Least span of an axis of probabilities: rounding in float32 is smaller."""


def linearity_figures(findings: Findings) -> list[Figure]:
    """Return every figure of one model."""
    return [
        shift_curves(findings),
        linear_share(findings),
        estimators(findings),
        layer_profile(findings),
        interventions(findings),
    ]


def shift_curves(findings: Findings) -> Figure:
    """Draw the change of probability against shift for a few neurons, with the lines of the main range."""
    return Figure(
        model=findings.model,
        name="shift-curves",
        title=f"{findings.dataset}: change of the answer's {findings.sweep.target} against shift",
        says=f"How the {findings.sweep.target} of the answer changes when one neuron is shifted, for some neurons; the "
        f"line is the NEG measured within {main_range(findings)} (shaded). A straight row of points means that a "
        "gradient says all.",
        parts=[Part([_shift_curve(findings, example) for example in _examples(findings)])],
        is_private=True,
    )


def linear_share(findings: Findings) -> Figure:
    """Draw the share of linear neurons against range, for the model and each layer."""
    rows = [{"layer": row.layer, "range": row.range, "share": row.linear_share, "n": row.n} for row in findings.ranges]
    x = field("range:Q", title=f"range of shifts ± ({findings.shift_unit})", scale={"type": "log"})
    y = field("share:Q", title="share of linear neurons", scale={"domain": [0, 1]})
    about = [field("layer:N"), field("range:Q"), *measured("share", "n")]
    of_layers = [row for row in rows if row["layer"] is not None]
    whole = [row for row in rows if row["layer"] is None]
    colour = field("layer:Q", scale={"scheme": "viridis"}, legend={"title": "layer"})
    thin, thick = {"strokeWidth": 1, "opacity": 0.7}, {"strokeWidth": 3, "color": ORANGE, "point": {"color": ORANGE}}
    layers = layer("line", thin, of_layers, color=colour, detail=field("layer:N")), layer("line", thick, whole)
    return Figure(
        model=findings.model,
        name="linear-share",
        title=f"{findings.dataset}: linear neurons (|r| ≥ 0.95)",
        says=f"Share of neurons whose change of {findings.sweep.target} is a straight line, within smaller and larger "
        "shifts: each layer, and the model (thick). Where the share is high, one gradient describes a neuron.",
        parts=[Part([panel(rows, *layers, x=x, y=y, tooltip=about)])],
    )


def estimators(findings: Findings) -> Figure:
    """Draw measured NEG against each estimator, for prompts and neurons."""
    negs_PK = findings.sweep.within(findings.main_range).negs_PK
    there = np.flatnonzero(~np.ma.getmaskarray(negs_PK))  # of experts, what a prompt has
    chosen = there[np.linspace(0, there.size - 1, min(there.size, _MOST_POINTS)).astype(int)]
    sampled = f" Points: {chosen.size} of {there.size}, evenly taken." if chosen.size < there.size else ""
    return Figure(
        model=findings.model,
        name="estimators",
        title=f"{findings.dataset}: NEG measured within {main_range(findings)} against estimates",
        says="Measured NEG against what cheaper methods estimate: the nearer the points are to a rising line, the "
        f"better the estimate. Scales are linear near zero and logarithmic beyond.{sampled}",
        parts=[Part([_scatter(findings, row, negs_PK, chosen) for row in whole_model(findings, findings.main_range)])],
    )


def _scatter(findings: Findings, row: AgreementRow, negs_PK: NDArray[Any], chosen: NDArray[Any]) -> Chart:
    scores = np.ma.getdata(findings.scores_PK[row.estimator]).ravel()[chosen].astype(float)
    negs = np.ma.getdata(negs_PK).ravel()[chosen].astype(float)
    rows = [{"estimate": x, "measured": y} for x, y in zip(scores.tolist(), negs.tolist(), strict=True)]
    x = field("estimate:Q", title="estimate", scale=_both_signs(scores), axis=_SCIENTIFIC)
    y = field("measured:Q", title="measured NEG", scale=_both_signs(negs), axis=_SCIENTIFIC)
    about = measured("estimate", "measured", form=".3~e")
    title = f"{ESTIMATOR_TITLES[row.estimator]}, r = {correlation(row.pearson)}"
    points = layer("circle", {"size": 12, "opacity": 0.35, "color": BLUE})
    return panel(rows, points, title=title, x=x, y=y, tooltip=about)


def layer_profile(findings: Findings) -> Figure:
    """Draw the linear share, the size of NEG and the agreement of each estimator by layer."""
    return Figure(
        model=findings.model,
        name="layer-profile",
        title=f"{findings.dataset}: by layer",
        says="By layer: the share of linear neurons within each range, the size of NEG (median, and the middle half "
        "and nine tenths), and the correlation of each estimator with the measured NEG.",
        parts=[
            Part([_shares(findings)], "share of linear neurons"),
            Part([_sizes(findings)], "size of NEG"),
            Part([_agreements(findings)], f"correlation with NEG ({main_range(findings)})"),
        ],
    )


def _shares(findings: Findings) -> Chart:
    names = list(dict.fromkeys(f"±{row.range:g}{unit_name(findings)}" for row in findings.ranges))
    rows = [
        {"line": f"±{row.range:g}{unit_name(findings)}", "layer": row.layer, "value": row.linear_share}
        for row in findings.ranges
        if row.layer is not None
    ]
    y = field("value:Q", title="share of linear neurons", scale={"domain": [0, 1]})
    return curves(rows, _looks(names), _LAYER, y)


def _sizes(findings: Findings) -> Chart:
    rows = [
        {name: getattr(row, name) for name in ("layer", "q05", "q25", "q50", "q75", "q95")}
        for row in findings.sizes
        if row.layer is not None
    ]
    y = field(
        "q50:Q",
        title=f"|NEG| ({findings.sweep.target} per {findings.shift_unit})",
        scale={"type": "log"},
        axis={"format": "~e"},
    )
    about = [field("layer:Q"), *measured("q05", "q25", "q50", "q75", "q95", form=".3~e")]
    return panel(
        rows,
        layer("area", {"opacity": 0.15, "color": BLUE}, y=y | {"field": "q05"}, y2={"field": "q95"}),
        layer("area", {"opacity": 0.3, "color": BLUE}, y=y | {"field": "q25"}, y2={"field": "q75"}),
        layer("line", {"color": BLUE, "point": True}, y=y, tooltip=about),
        x=_LAYER,
    )


def _agreements(findings: Findings) -> Chart:
    looks = _looks([ESTIMATOR_TITLES[name] for name in findings.scores_PK])
    rows = [
        {"line": ESTIMATOR_TITLES[row.estimator], "layer": row.layer, "value": row.pearson}
        for row in findings.agreement
        if row.range == findings.main_range and row.layer is not None
    ]
    y = field("value:Q", title="r with NEG", scale={"domainMax": 1, "zero": False})
    return curves(rows, looks, _LAYER, y)


def interventions(findings: Findings) -> Figure:
    """Draw the correlation of predicted and true change against the number of neurons shifted together."""
    names = list(dict.fromkeys(f"shift {row.shift:g}{unit_name(findings)}" for row in findings.interventions))
    rows = [
        {
            "line": f"shift {row.shift:g}{unit_name(findings)}",
            "neurons": row.set_size,
            "value": row.pearson,
            "low": row.pearson_low,
            "high": row.pearson_high,
        }
        for row in findings.interventions
    ]
    x = powers("neurons", "neurons shifted together", {row.set_size for row in findings.interventions})
    y = field("value:Q", title="r of predicted and true change", scale={"domainMax": 1, "zero": False})
    return Figure(
        model=findings.model,
        name="interventions",
        title=f"{findings.dataset}: neurons together",
        says="Whether NEGs of single neurons add up: the correlation of the predicted with the true change when "
        "several neurons are shifted together. Near 1, they do. Shaded: 95 % intervals.",
        parts=[Part([curves(rows, _looks(names), x, y)])],
    )


# Parts of figures

_LAYER = field("layer:Q", title="layer", axis={"tickMinStep": 1, "format": "d"})
_SCIENTIFIC = {"format": "~e", "tickCount": 5, "labelAngle": -30}


def _looks(names: list[str]) -> dict[str, Look]:
    """Return a look for every name, with a colour that comes back only with other dashes."""
    dashes: list[tuple[int, ...]] = [(), (6, 3), (2, 2)]
    n = len(_COLOURS)
    return {name: Look(_COLOURS[i % n], dashes[i // n % len(dashes)]) for i, name in enumerate(names)}


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


def _shift_curve(findings: Findings, example: _Example) -> Chart:
    sweep, main = findings.sweep, findings.sweep.within(findings.main_range)
    place = example.prompt, example.neuron
    where = sweep.neurons_K2[example.neuron].tolist()
    changes_S, slope = sweep.changes_PKS[place].astype(float), float(main.negs_PK[place])
    points = [{"shift": float(d), "change": c} for d, c in zip(sweep.shifts_S, changes_S.tolist(), strict=True)]
    end = float(np.abs(sweep.shifts_S).max())
    scale = common_scale(changes_S.tolist(), least=_LEAST_CHANGE)
    x = field("shift:Q", title=f"shift ({findings.shift_unit})")
    y = field("change:Q", title=_CHANGE[sweep.target], scale=scale, axis={"format": "~e"})
    range_ = [{"low": -findings.main_range, "high": findings.main_range}]
    line = [{"shift": shift, "change": slope * shift} for shift in (-end, end)]
    r = correlation(float(sweep.pearson_PK[place]))
    return panel(
        points,
        layer("rect", {"color": GREY, "opacity": 0.15}, range_, x=x | {"field": "low"}, x2={"field": "high"}),
        layer("line", {"color": ORANGE, "strokeWidth": 1.5, "clip": True}, line, x=x, y=y),
        layer("circle", {"size": 14, "color": BLUE}, x=x, y=y, tooltip=measured("shift", "change", form=".3~g")),
        title=f"{example.what}: {where[0]}.{where[1]}, r {r}, {_shortened(findings.ids[example.prompt])}",
    )


def _both_signs(numbers: NDArray[Any]) -> Chart:
    """Return a scale for both signs over many powers of ten, linear below the median size."""
    sizes = np.abs(numbers[np.isfinite(numbers) & (numbers != 0)])
    return {"type": "symlog", "constant": float(np.median(sizes))} if sizes.size else {}


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:28]}...{text[-9:]}"
