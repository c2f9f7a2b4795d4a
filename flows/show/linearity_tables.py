"""Tables of a linearity study, for the terminal and for Prefect."""

import math
from collections.abc import Sequence
from statistics import median
from types import MappingProxyType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from flows.show.display import printable
from negcore.analysis.linearity import AgreementRow, RangeRow
from negcore.measure.benchmark import Timing
from tasks.linearity import MEASURED, Findings

ESTIMATOR_TITLES = MappingProxyType(
    {
        "neurgrad": "NeurGrad",
        "gradient": "gradient",
        "gradient_x_activation": "gradient x act.",
        "integrated_gradients": "integrated grad.",
        "log_probability_increase": "log-prob. incr.",
        "ablation": "ablation",
        MEASURED: "(the sweep)",
    }
)


def summary(findings: Findings) -> str:
    """Model, facts and how much was measured, in one line."""
    n_prompts, n_neurons, n_shifts = findings.sweep.probs_PKS.shape
    left_out = f"{findings.n_multi_token} of {findings.n_facts} facts left out: their answer is not one token"
    names = f"{printable(findings.model)} on {printable(findings.dataset)}"
    return f"{names}: {n_prompts} prompts x {n_neurons} neurons x {n_shifts} shifts ({left_out})"


def linearity_tables(findings: Findings) -> list[Table]:
    """The tables of one model: agreement, ranges, stability, interventions."""
    tables = [_agreement(findings), _ranges(findings), _stability(findings), _interventions(findings)]
    for table in tables:
        table.box = SIMPLE_HEAD
    return tables


def artifact_tables(findings: Findings) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Title and rows by artifact key."""
    return {
        "agreement": (
            f"Estimators against NEG measured within ±{findings.main_range:g}",
            [
                {
                    "estimator": ESTIMATOR_TITLES[row.estimator],
                    "r": _round(row.pearson),
                    "r, 95 %": _interval(row.pearson_low, row.pearson_high),
                    "rank r": _round(row.spearman),
                    "same sign": _round(row.signs),
                    "MAE": None if row.mae is None else f"{row.mae:.2g}",
                    "top 1 %": _round(row.top),
                    "s a prompt": _seconds(findings, row.estimator),
                }
                for row in whole_model(findings, findings.main_range)
            ],
        ),
        "linearity": (
            "Linear neurons by range",
            [
                {"range": f"±{row.range:g}", "linear": _round(row.linear_share), "NEG > 0": _round(row.positive_share)}
                for row in _model_ranges(findings)
            ],
        ),
    }


def benchmark_table(comparisons: Sequence[Timing], title: str) -> Table:
    """Medians of both ways and their ratio."""
    table = Table(title=escape(title), box=SIMPLE_HEAD)
    table.add_column("medians")
    for name in ("fast", "plain", "plain / fast"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in comparisons:
        fast, plain = median(one.fast_s), median(one.plain_s)
        table.add_row(one.what, f"{fast:.3g}", f"{plain:.3g}", f"[bold]{one.ratio:.1f}[/bold]")
    return table


def whole_model(findings: Findings, range_: float) -> list[AgreementRow]:
    """Agreement over all layers, by estimator, within one range."""
    return [row for row in findings.agreement if row.layer is None and row.range == range_]


def _agreement(findings: Findings) -> Table:
    table = Table(title=f"Estimators against NEG measured within ±{findings.main_range:g}")
    table.caption = "Below r: 95 % bootstrap interval over prompts. MAE: probability per unit of activation."
    table.add_column("estimator")
    for name in ("r", "rank r", "same\nsign", "MAE", "top\n1 %", "s a\nprompt"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in whole_model(findings, findings.main_range):
        table.add_row(
            ESTIMATOR_TITLES[row.estimator],
            f"[bold]{number(row.pearson)}[/bold]\n{_interval(row.pearson_low, row.pearson_high)}",
            f"{number(row.spearman)}\n{_interval(row.spearman_low, row.spearman_high)}",
            number(row.signs),
            "" if row.mae is None else f"{row.mae:.1e}",
            number(row.top),
            _seconds(findings, row.estimator),
        )
    table.add_row(ESTIMATOR_TITLES[MEASURED], *[""] * 5, _seconds(findings, MEASURED))
    return table


def _ranges(findings: Findings) -> Table:
    table = Table(title="Linear neurons by range of shifts", caption="Linear: |r| between shift and change >= .95.")
    names = [name for name in ("neurgrad",) if name in findings.scores_PK]
    for name in ("range", "linear", "NEG > 0", "no change", *(f"r of {ESTIMATOR_TITLES[name]}" for name in names)):
        table.add_column(name, justify="right")
    for row in _model_ranges(findings):
        by_name = {other.estimator: other for other in whole_model(findings, row.range)}
        cells = [number(row.linear_share), number(row.positive_share), number(row.n_constant / row.n)]
        table.add_row(f"±{row.range:g}", *cells, *(number(by_name[name].pearson) for name in names))
    return table


def _stability(findings: Findings) -> Table:
    table = Table(title=f"How alike the NEGs of two prompts are (within ±{findings.main_range:g})")
    table.add_column("pairs of prompts")
    for name in ("pairs", "same sign", "r", "rank r of size"):
        table.add_column(name, justify="right")
    for row in findings.stability:
        cells = [number(value) for value in (row.sign_agreement, row.pearson, row.size_spearman)]
        table.add_row(row.pairs, str(row.n_pairs), *cells)
    return table


def _interventions(findings: Findings) -> Table:
    table = Table(title="Neurons shifted together: r between predicted and true change")
    table.add_column("neurons", justify="right")
    shifts = list(dict.fromkeys(row.shift for row in findings.interventions))
    for shift in shifts:
        table.add_column(f"shift {shift:g}", justify="right")
    for size in dict.fromkeys(row.set_size for row in findings.interventions):
        rows = {row.shift: row for row in findings.interventions if row.set_size == size}
        table.add_row(str(size), *(number(rows[shift].pearson) for shift in shifts))
    return table


def _model_ranges(findings: Findings) -> Sequence[RangeRow]:
    return [row for row in findings.ranges if row.layer is None]


def _seconds(findings: Findings, method: str) -> str:
    (seconds,) = [cost.seconds_per_prompt for cost in findings.costs if cost.method == method]
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{number(low)}, {number(high)}"


def number(value: float) -> str:
    """Three decimals without the leading zero; four where three would round up to one, and never one itself."""
    if math.isnan(value):
        return "-"
    if 0.99995 <= value < 1:
        return ">.9999"
    digits = 4 if 0.9995 <= abs(value) < 1 else 3
    text = f"{value:.{digits}f}"
    return "1.00" if abs(value) == 1 and value > 0 else text.replace("0.", ".", 1) if abs(value) < 1 else text


def _round(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
