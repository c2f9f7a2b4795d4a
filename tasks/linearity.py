"""Analyse a measured study: read its shards, make its tables, and write them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negcore.analysis.linearity import (
    AgreementRow,
    Facts,
    InterventionRow,
    RangeRow,
    SizeRow,
    StabilityRow,
    agreement_table,
    interventions_table,
    ranges_table,
    sizes_table,
    stability_table,
)
from negcore.measure.sweeps import SweepResult
from negcore.store.study import read_study, read_sweep
from tasks.config.run_file import LinearityRun
from tasks.rundir.tables import write_table
from tasks.sweeps import PlannedPart, PlannedStudy, fact_of

MEASURED = "sweep"


@dataclass(frozen=True)
class CostRow:
    """What a method costs: wall-clock seconds of one worker, for the neurons that are swept."""

    method: str
    seconds_per_prompt: float


@dataclass(frozen=True)
class Findings:
    """What a study says about one model; the rows are those of `negcore.analysis.linearity`."""

    model: str
    dataset: str
    ids: list[str]
    main_range: float
    """Range of the NEGs in `sizes` and `stability`."""
    n_facts: int
    """Facts in the source."""
    n_multi_token: int
    """Of these, how many were left out because their answer is not one token of the model."""
    sweep: SweepResult
    scores_PK: Mapping[str, NDArray[np.float32]]
    """Scores by estimator."""
    ranges: list[RangeRow]
    sizes: list[SizeRow]
    stability: list[StabilityRow]
    agreement: list[AgreementRow]
    interventions: list[InterventionRow]
    costs: list[CostRow]

    @property
    def tables(self) -> dict[str, tuple[type, Sequence[Any]]]:
        """Kind of row and rows, by the table's name."""
        return {
            "ranges": (RangeRow, self.ranges),
            "sizes": (SizeRow, self.sizes),
            "stability": (StabilityRow, self.stability),
            "agreement": (AgreementRow, self.agreement),
            "interventions": (InterventionRow, self.interventions),
            "costs": (CostRow, self.costs),
        }


def analyse(run: LinearityRun, study: PlannedStudy) -> Findings:
    """Make a study's tables from its shards.

    Raises
    ------
    ShardError
        If shards are missing or damaged.
    """
    root = run.directory
    blocks = study.of_kind("sweeps")
    sweep = read_sweep([part.partition.path(root) for part in blocks])
    estimates = {part.partition.part: read_study(part.partition.path(root)) for part in study.of_kind("estimates")}
    scores_PK = {name: shards.columns["scores"] for name, shards in estimates.items()}
    main_negs_PK = sweep.within(run.main_range).negs_PK
    return Findings(
        model=study.card.name,
        dataset=study.facts.name,
        ids=[example.id for example in study.facts.examples],
        main_range=run.main_range,
        n_facts=study.facts.n_rows,
        n_multi_token=study.facts.n_multi_token,
        sweep=sweep,
        scores_PK=scores_PK,
        ranges=ranges_table(sweep, run.range),
        sizes=sizes_table(main_negs_PK, sweep.neurons_K2),
        stability=stability_table(main_negs_PK, _facts(study)),
        agreement=_agreement(run, sweep, scores_PK),
        interventions=_interventions(run, study),
        costs=[
            CostRow(MEASURED, sum(_seconds(root, part) for part in blocks)),
            *(CostRow(name, shards.seconds_per_prompt) for name, shards in estimates.items()),
        ],
    )


def write_findings(run: LinearityRun, findings: Sequence[Findings]) -> Path:
    """Write the tables of all models as Arrow files; the folder they are in.

    Raises
    ------
    RunError
        If they cannot be written.
    """
    folder = run.directory / "linearity"
    for name, (kind, _) in findings[0].tables.items():
        rows = [{"model": f.model, "dataset": f.dataset, **asdict(row)} for f in findings for row in f.tables[name][1]]
        write_table(folder / f"{name}.arrow", kind, rows, names=("model", "dataset"))
    return folder


def _agreement(
    run: LinearityRun, sweep: SweepResult, scores_PK: Mapping[str, NDArray[np.float32]]
) -> list[AgreementRow]:
    rows = []
    for range_ in run.range:
        negs_PK = sweep.within(range_).negs_PK
        for name, scores in scores_PK.items():
            rows += agreement_table(
                name, range_, negs_PK, scores, sweep.neurons_K2, n_bootstrap=run.bootstrap, seed=run.seed
            )
    return rows


def _interventions(run: LinearityRun, study: PlannedStudy) -> list[InterventionRow]:
    (part,) = study.of_kind("interventions")
    shards = read_study(part.partition.path(run.directory))
    shape = (len(shards.ids), len(shards.axes["shifts"]), len(shards.axes["sizes"]))
    probs_PDM = shards.columns["probs"].reshape(shape).astype(np.float64)
    return interventions_table(
        shards.axes["shifts"],
        np.array(shards.axes["sizes"]),
        shards.columns["predicted"].reshape(shape),
        probs_PDM - shards.columns["base_prob"][:, None, None],
        n_bootstrap=run.bootstrap,
        seed=run.seed,
    )


def _facts(study: PlannedStudy) -> Facts:
    examples = study.facts.examples
    return Facts(
        facts=[fact_of(example, study.facts.name) for example in examples],
        wordings=[example.group for example in examples],
        answers=[example.labels[0] for example in examples],
    )


def _seconds(root: Path, part: PlannedPart) -> float:
    return read_study(part.partition.path(root)).seconds_per_prompt
