"""Tables of a linearity study, at most 80 columns wide in a terminal."""

import math
from collections.abc import Sequence
from statistics import median
from types import MappingProxyType

from flows.show.accuracy_tables import named_target
from flows.show.model_names import shown_model
from flows.show.table import Cell, Number, Style, Table, by, interval, numbers, texts
from flows.show.text import correlation, count, printable
from negcore.analysis.linearity import AgreementRow
from negcore.measure.benchmark import Timing, TypeRow
from negcore.targets import DEFAULT_SHIFT_UNIT, TARGET_UNITS, neg_unit
from tasks.linearity import MEASURED, Findings

ESTIMATOR_TITLES = MappingProxyType(
    {
        "neurgrad": "NeurGrad",
        "gradient": "gradient",
        "gradient_x_activation": "gradient x act.",
        "integrated_gradients": "integrated grad.",
        "log_probability_increase": "log-prob. incr.",
        "ablation": "ablation",
        "attribution_patching": "attrib. patching",
        "atp_star": "AtP*",
        "relp": "RelP",
        "mean_ablation": "mean ablation",
        "resample_ablation": "resample abl.",
        MEASURED: "(the sweep)",
    }
)


def summary(findings: Findings) -> str:
    """Return model, facts and how much was measured, in one line."""
    n_prompts, n_neurons, n_shifts = findings.sweep.values_PKS.shape
    left_out = f"{findings.n_multi_token} of {findings.n_facts} facts left out: their answer is not one token"
    names = f"{printable(shown_model(findings.model))} on {printable(findings.dataset)}"
    by_nodes_PK, active_PK = findings.sweep.by_nodes_PK, findings.sweep.active_PK
    if by_nodes_PK is not None and active_PK is not None:
        by_nodes_PK = by_nodes_PK[active_PK]
    nodes = "" if by_nodes_PK is None else f", {by_nodes_PK.mean():.1%} of the curves by nodes"
    if findings.n_without_spread:
        left_out += f"; {count(findings.n_without_spread, 'neuron')} left out: the same activation in all prompts"
    if findings.active_neurons:
        whole = findings.active_neurons.active[0]
        left_out += f"; a prompt has {whole.n_active / whole.n:.1%} of the neurons: those of its routed experts"
    names += named_target(findings.sweep.target, ", ")
    return f"{names}: {n_prompts} prompts x {n_neurons} neurons x {n_shifts} shifts{nodes} ({left_out})"


def unit_name(findings: Findings) -> str:
    """Return the unit of shifts behind a number; nothing if it is one of activation."""
    return "" if findings.shift_unit == DEFAULT_SHIFT_UNIT else f" {findings.shift_unit}"


def main_range(findings: Findings) -> str:
    """Return the main range of shifts, with its unit."""
    return f"±{findings.main_range:g}{unit_name(findings)}"


def _neg_unit(findings: Findings) -> str:
    return neg_unit(findings.sweep.target, findings.shift_unit)


def linearity_tables(findings: Findings) -> list[Table]:
    """Return the tables of one model: agreement, effects if there are any, ranges, stability, interventions."""
    effects = [_effects(findings)] if findings.effects else []
    return [_agreement(findings), *effects, _ranges(findings), _stability(findings), _interventions(findings)]


def benchmark_table(comparisons: Sequence[Timing], title: str) -> Table:
    """Return the medians of both ways and their ratio."""
    rows: list[list[Cell]] = []
    for one in comparisons:
        medians = [Number(median(seconds), "{:.3g}".format) for seconds in (one.fast_s, one.plain_s)]
        rows.append([one.what, *medians, Number(one.ratio, "{:.3g}".format, "bold")])
    return Table("benchmark", title, [*texts("medians"), *numbers("fast", "plain", "plain / fast")], [rows])


def types_table(rows: Sequence[TypeRow], title: str) -> Table:
    """Return the agreement of number types with float32."""
    cells: list[list[Cell]] = [
        [
            row.dtype,
            row.what,
            "" if row.linear_share is None else Number(row.linear_share, correlation),
            Number(row.signs, correlation),
            Number(row.pearson, correlation),
            Number(row.seconds, "{:.3g}".format),
        ]
        for row in rows
    ]
    columns = [*texts("type", "measured"), *numbers("linear", "same\nsign", "r", "s")]
    return Table("types", title, columns, [cells], "Same sign and r: beside the same NEGs in float32.")


def whole_model(findings: Findings, range_: float) -> list[AgreementRow]:
    """Return the agreement over all layers within one range, a row an estimator."""
    return [row for row in findings.agreement if row.layer is None and row.range == range_]


def _agreement(findings: Findings) -> Table:
    rows: list[list[Cell]] = [
        [
            ESTIMATOR_TITLES[row.estimator],
            _correlation(row.pearson, row.pearson_low, row.pearson_high, "bold"),
            _correlation(row.spearman, row.spearman_low, row.spearman_high),
            Number(row.signs, correlation),
            "" if row.mae is None else Number(row.mae, "{:.1e}".format),
            Number(row.top, correlation),
            _seconds(findings, row.estimator),
        ]
        for row in whole_model(findings, findings.main_range)
    ]
    rows.append([ESTIMATOR_TITLES[MEASURED], *[""] * 5, _seconds(findings, MEASURED)])
    return Table(
        key=f"agreement-{findings.model}",
        title=f"Estimators against NEG measured within {main_range(findings)}",
        columns=[*texts("estimator"), *numbers("r", "rank r", "same\nsign", "MAE", "top\n1 %", "s a\nprompt")],
        blocks=[rows],
        caption=f"Below r: 95 % bootstrap interval over prompts. MAE: {_neg_unit(findings)}.",
    )


_PATCHED_FROM = MappingProxyType({"counterfactual": "its counterfactual", "drawn": "another prompt, drawn at random"})


def _effects(findings: Findings) -> Table:
    rows: list[list[Cell]] = [
        [
            ESTIMATOR_TITLES[row.estimator],
            _correlation(row.pearson, row.pearson_low, row.pearson_high, "bold"),
            Number(row.spearman, correlation),
            Number(row.signs, correlation),
            Number(row.mae, "{:.1e}".format),
            Number(row.top, correlation),
            _seconds(findings, row.estimator),
        ]
        for row in findings.effects
    ]
    measured = dict.fromkeys(row.measured for row in findings.effects)
    source = _PATCHED_FROM[findings.references or "drawn"]
    rows += [[ESTIMATOR_TITLES[name], *[""] * 5, _seconds(findings, name)] for name in measured]
    return Table(
        key=f"effects-{findings.model}",
        title="Estimators of patching against patching measured neuron by neuron",
        columns=[*texts("estimator"), *numbers("r", "rank r", "same\nsign", "MAE", "top\n1 %", "s a\nprompt")],
        blocks=[rows],
        caption=f"Each prompt takes activations from {source}. MAE: {TARGET_UNITS[findings.sweep.target]}.",
    )


def _ranges(findings: Findings) -> Table:
    has_neurgrad = "neurgrad" in findings.scores_PK
    rows: list[list[Cell]] = []
    for row in findings.ranges:
        if row.layer is None:
            shares = row.linear_share, row.positive_share, row.n_constant / row.n
            agreed = [one.pearson for one in whole_model(findings, row.range) if one.estimator == "neurgrad"]
            rows.append(
                [f"±{row.range:g}{unit_name(findings)}", *(Number(value, correlation) for value in (*shares, *agreed))]
            )
    titles = ["range", "linear", "NEG > 0", "no change", *(["r of NeurGrad"] if has_neurgrad else [])]
    return Table(
        key=f"ranges-{findings.model}",
        title="Linear neurons by range of shifts",
        columns=numbers(*titles),
        blocks=[rows],
        caption="Linear: |r| between shift and change >= .95.",
    )


def _stability(findings: Findings) -> Table:
    rows: list[list[Cell]] = []
    for row in findings.stability:
        alike = row.sign_agreement, row.pearson, row.size_spearman
        rows.append([row.pairs, Number(row.n_pairs), *(Number(value, correlation) for value in alike)])
    return Table(
        key=f"stability-{findings.model}",
        title=f"How alike the NEGs of two prompts are, within {main_range(findings)}",
        columns=[*texts("pairs of prompts"), *numbers("pairs", "same sign", "r", "rank r of size")],
        blocks=[rows],
    )


def _interventions(findings: Findings) -> Table:
    found = {(row.set_size, row.shift): Number(row.pearson, correlation) for row in findings.interventions}
    sizes, shifts = (list(by(findings.interventions, name)) for name in ("set_size", "shift"))
    there: dict[int, list[Cell]] = {}
    if findings.active_neurons:
        there = {
            row.set_size: [Number(row.mean_shifted, "{:.1f}".format)] for row in findings.active_neurons.active_sets
        }
    shown = ["of these\nshifted"] * bool(there)
    return Table(
        key=f"interventions-{findings.model}",
        title="Neurons shifted together: r between predicted and true change",
        columns=numbers("neurons", *shown, *(f"shift {shift:g}{unit_name(findings)}" for shift in shifts)),
        blocks=[[[Number(size), *there.get(size, []), *(found[size, shift] for shift in shifts)] for size in sizes]],
        caption="Shifted: neurons of a set that a prompt has, mean over the prompts with one or more." * bool(shown),
    )


def _correlation(value: float, low: float, high: float, style: Style = "") -> Cell:
    """Return a correlation with its interval, if it has one."""
    return Number(value, correlation, style), "" if math.isnan(low) else interval(low, high, correlation, ", ")


def _seconds(findings: Findings, method: str) -> Cell:
    (seconds,) = [cost.seconds_per_prompt for cost in findings.costs if cost.method == method]
    return Number(seconds, "{:.2f}".format if seconds < 10 else "{:.0f}".format)
