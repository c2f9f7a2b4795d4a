"""Tables of a ranking's faithfulness: best neurons less random ones, curves and their areas, and circuits."""

from collections.abc import Iterator

from flows.show.accuracy_tables import PROBE_TITLES, short
from flows.show.skill_tables import DIRECTION_TITLES, change_cell
from flows.show.table import Cell, Number, Table, Words, by, interval, numbers, texts
from flows.show.text import bare, change, count
from negcore.analysis.faithfulness import AreaRow, CircuitRow
from tasks.skills import DatasetFindings, SkillFindings

_DIFFERENCES = (
    "What the best k neurons do when they are shifted together, less what random neurons of the same layers do, in the "
    "same rows. Below: 95 % interval for other rows and other draws (Student, from these rows and {}); bold: without 0."
)
_AREAS = (
    "Mean height over the logarithm of the share of neurons, .1 % to all. Deletion: these neurons silent; insertion: "
    "all others silent. In brackets: the ranking's less this one, paired by row; bold where the 95 % interval "
    "(for other rows and draws) has no 0. A good ranking is below the others in deletion and above them in "
    "insertion, in KL the other way round. matched: of the same layers, size of NEG and norm of output."
)
_CIRCUITS = (
    "MIB's measures (arXiv 2504.13151) with zero ablation at the probed token: CPR, area under the faithfulness of the "
    "best .1 % to all neurons, larger is better; CMD, area between it and 1, smaller is better. Below: 95 % interval "
    "(bootstrap over rows and draws). full, empty: mean logit difference with all neurons, and with none."
)


def faithfulness_tables(findings: SkillFindings) -> Iterator[Table]:
    """Return the differences of every causal check, and where curves were measured their areas and circuits."""
    for one in findings.datasets:
        if one.causal_differences:
            yield _differences(findings.model, one)
    for one in findings.datasets:
        if one.faithfulness:
            yield _areas(findings.model, one.dataset, one.faithfulness.areas)
            yield _circuits(findings.model, one.dataset, one.faithfulness.circuits)


def _differences(model: str, one: DatasetFindings) -> Table:
    rows = one.causal_differences
    furthest = max(row.shift for row in rows)
    blocks: list[list[list[Cell]]] = [
        [
            [Words(PROBE_TITLES[probe], "italic")],
            *(
                [
                    Number(row.size),
                    DIRECTION_TITLES[row.direction],
                    f"{row.shift:+g}",
                    change_cell(row.accuracy_difference, row.accuracy_low, row.accuracy_high),
                    change_cell(row.prob_difference, row.prob_low, row.prob_high),
                ]
                for row in of_probe
                if abs(row.shift) == furthest
            ),
        ]
        for probe, of_probe in by(rows, "probe").items()
    ]
    return Table(
        key=f"causal-differences-{model}-{one.dataset}",
        title=f"Causal check, best less random\n{short(one.dataset)}: {rows[0].n_prompts} test rows",
        columns=numbers("k", "by", "shift", "accuracy", "probability"),
        blocks=blocks,
        caption=_DIFFERENCES.format(count(rows[0].n_draws, "draw")),
    )


def _areas(model: str, dataset: str, areas: list[AreaRow]) -> Table:
    metrics = list(by(areas, "metric"))
    blocks: list[list[list[Cell]]] = []
    for probe, of_probe in by(areas, "probe").items():
        for mode, of_mode in by(of_probe, "mode").items():
            rows: list[list[Cell]] = [[(Words(PROBE_TITLES[probe], "italic"), f" {mode}")]]
            for kind, of_kind in by(of_mode, "neurons").items():
                found = {row.metric: row for row in of_kind}
                rows.append([f"  {kind}", *(_area_cell(found[metric]) for metric in metrics)])
            blocks.append(rows)
    return Table(
        key=f"areas-{model}-{dataset}",
        title=f"Deletion and insertion curves: {short(dataset)}",
        columns=[*texts("neurons"), *numbers(*metrics)],
        blocks=blocks,
        caption=_AREAS,
    )


def _area_cell(row: AreaRow) -> Cell:
    area = Number(row.area, lambda value: bare(f"{value:.3f}"))
    if row.neurons == "ranking":
        return area
    is_clear = row.difference_low > 0 or row.difference_high < 0
    return (area, " (", Number(row.difference, change, "bold" if is_clear else ""), ")")


def _circuits(model: str, dataset: str, circuits: list[CircuitRow]) -> Table:
    blocks: list[list[list[Cell]]] = [
        [
            [
                PROBE_TITLES[probe] if not at else "",
                row.neurons,
                (_three(row.cpr), interval(row.cpr_low, row.cpr_high, _end, " ")),
                (_three(row.cmd), interval(row.cmd_low, row.cmd_high, _end, " ")),
                _three(row.full),
                _three(row.empty),
            ]
            for at, row in enumerate(of_probe)
        ]
        for probe, of_probe in by(circuits, "probe").items()
    ]
    return Table(
        key=f"circuits-{model}-{dataset}",
        title=f"Neurons as circuits: {short(dataset)}",
        columns=[*texts("ranking", "neurons"), *numbers("CPR", "CMD", "full", "empty")],
        blocks=blocks,
        caption=_CIRCUITS,
    )


def _three(value: float) -> Number:
    return Number(value, _end)


def _end(value: float) -> str:
    return bare(f"{value:.3f}")
