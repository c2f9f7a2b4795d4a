"""Analyse a measured study: read its shards, make its tables, and write them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negcore.analysis.linearity import (
    PER_ACTIVATION,
    ActiveRow,
    ActiveSetRow,
    AgreementRow,
    EffectRow,
    Facts,
    InterventionRow,
    RangeRow,
    SizeRow,
    StabilityRow,
    active_sets_table,
    active_table,
    agreement_table,
    effects_table,
    interventions_table,
    ranges_table,
    sizes_table,
    stability_table,
)
from negcore.arrays import Ints, count_nonfinite
from negcore.errors import NegError
from negcore.measure.sweeps import SweepResult
from negcore.store.study import StudyShards, joined_sweep, read_studies, read_study, value_names
from negcore.targets import ShiftUnit
from tasks.config.linearity_run import LinearityRun
from tasks.measure.references import ReferenceKind
from tasks.measure.shard_set import ShardSet
from tasks.plan_linearity import PlannedStudy, fact_of
from tasks.rundir.tables import write_tables

MEASURED = "sweep"


@dataclass(frozen=True)
class CostRow:
    """The cost of a method: wall-clock seconds of one worker, for the neurons that are swept."""

    method: str
    seconds_per_prompt: float


@dataclass(frozen=True)
class ActiveNeurons:
    """Tables of how many of the drawn neurons prompts have, of a mixture of experts."""

    active: list[ActiveRow]
    active_sets: list[ActiveSetRow]


@dataclass(frozen=True)
class Findings:
    """The tables of a study of one model; their rows are those of `negcore.analysis.linearity`."""

    model: str
    dataset: str
    n_layers: int
    """Layers of the model."""
    ids: list[str]
    main_range: float
    """Range of the NEGs in `sizes` and `stability`."""
    n_facts: int
    """Facts in the source."""
    n_multi_token: int
    """Facts that were left out because their answer is not one token of the model."""
    sweep: SweepResult
    scores_PK: Mapping[str, NDArray[np.float32]]
    """Scores by estimator; of a mixture of experts masked where a prompt does not have the neuron."""
    ranges: list[RangeRow]
    sizes: list[SizeRow]
    stability: list[StabilityRow]
    agreement: list[AgreementRow]
    effects: list[EffectRow]
    references: ReferenceKind | None
    """Prompts that each prompt is patched from, in `effects`."""
    interventions: list[InterventionRow]
    shift_unit: ShiftUnit
    n_without_spread: int
    """Neurons that were drawn and left out, as their activation is the same in all prompts: with the unit "sd"."""
    costs: list[CostRow]
    active_neurons: ActiveNeurons | None = None
    """None for a model without experts."""


def analyse(run: LinearityRun, study: PlannedStudy) -> Findings:
    """Make a study's tables from its shards, leaving out prompts that were set aside in any of them.

    Raises
    ------
    ShardError
        If shards are missing or damaged.
    NegError
        If they hold NaN or infinite values, or no prompt has any of the neurons.
    """
    sets = [*study.of_kind("sweeps"), *study.of_kind("estimates")]
    shards = dict(zip(sets, read_studies([one.place.path(run.directory) for one in sets]), strict=True))
    for one, of_set in shards.items():
        _check_finite(one, of_set)
    blocks = [of_set for one, of_set in shards.items() if one.place.kind == "sweeps"]
    estimates = {one.place.part: of_set for one, of_set in shards.items() if one.place.kind == "estimates"}
    whole = joined_sweep(blocks)
    sweep = whole.with_spread()
    if sweep.active_PK is not None and not sweep.active_PK.any():
        raise NegError(f"{study.card.name}: no swept neuron is one of an expert that a prompt is routed to; sweep more")
    scores_PK = {name: _in_unit(name, _scores(of_set), whole) for name, of_set in estimates.items()}
    interventions = _interventions(run, study)
    main_negs_PK = sweep.within(run.main_range).negs_PK
    ids = blocks[0].ids
    return Findings(
        model=study.card.name,
        dataset=study.facts.name,
        n_layers=study.card.n_layers,
        ids=ids,
        main_range=run.main_range,
        n_facts=study.facts.n_rows,
        n_multi_token=study.facts.n_multi_token,
        sweep=sweep,
        scores_PK=scores_PK,
        ranges=ranges_table(sweep, run.ranges),
        sizes=sizes_table(main_negs_PK, sweep.neurons_K2),
        stability=stability_table(main_negs_PK, _facts(study, ids)),
        agreement=_agreement(run, sweep, scores_PK),
        effects=effects_table(scores_PK, n_bootstrap=run.bootstrap, seed=run.seed),
        references=None if study.partners is None else study.partners.kind,
        interventions=interventions.rows,
        shift_unit=run.shift_unit,
        n_without_spread=len(whole.neurons_K2) - len(sweep.neurons_K2),
        costs=[
            CostRow(MEASURED, sum(block.seconds_per_prompt for block in blocks)),
            *(CostRow(name, of_set.seconds_per_prompt) for name, of_set in estimates.items()),
        ],
        active_neurons=_active_neurons(sweep, interventions) if study.card.has_experts else None,
    )


def _scores(of_set: StudyShards) -> NDArray[np.float32]:
    scores_PK = of_set.columns["scores"]
    if "active" not in of_set.columns:
        return scores_PK
    return np.ma.masked_array(scores_PK, of_set.columns["active"] == 0)


def _active_neurons(sweep: SweepResult, measured: "_Interventions") -> ActiveNeurons:
    active_PK = np.ones(sweep.values_PKS.shape[:2], bool) if sweep.active_PK is None else sweep.active_PK
    assert measured.n_shifted_PM is not None
    return ActiveNeurons(
        active_table(active_PK, sweep.neurons_K2), active_sets_table(measured.n_shifted_PM, measured.sizes_M)
    )


def _in_unit(estimator: str, scores_PK: NDArray[np.float32], sweep: SweepResult) -> NDArray[np.float32]:
    """Return the scores of the neurons that have a spread; of those in target per activation, per unit of shifts."""
    if sweep.spreads_K is None:
        return scores_PK
    units_K = sweep.spreads_K if estimator in PER_ACTIVATION else np.ones_like(sweep.spreads_K)
    return (scores_PK * units_K)[:, sweep.spreads_K > 0].astype(np.float32)


def _check_finite(shard_set: ShardSet, shards: StudyShards) -> None:
    for name, values in shards.columns.items():
        rows = np.flatnonzero(count_nonfinite(values))
        if rows.size:
            raise NegError(
                f"{shard_set.title}: {name} of {shards.ids[rows[0]]} is NaN or infinite, and no table can be made of "
                "that: run again with nonfinite set to skip or fail"
            )


def write_findings(run: LinearityRun, findings: Sequence[Findings]) -> Path:
    """Write the tables of all models as Arrow files, and return their folder.

    Raises
    ------
    RunError
        If they cannot be written.
    """
    folder = run.directory / "linearity"
    write_tables(folder, Findings, [((one.model, one.dataset), one) for one in findings], names=("model", "dataset"))
    of_experts = [((one.model, one.dataset), one.active_neurons) for one in findings if one.active_neurons]
    if of_experts:
        write_tables(folder, ActiveNeurons, of_experts, names=("model", "dataset"))
    return folder


def _agreement(
    run: LinearityRun, sweep: SweepResult, scores_PK: Mapping[str, NDArray[np.float32]]
) -> list[AgreementRow]:
    rows = []
    for range_ in run.ranges:
        negs_PK = sweep.within(range_).negs_PK
        for name, scores in scores_PK.items():
            rows += agreement_table(
                name, range_, negs_PK, scores, sweep.neurons_K2, n_bootstrap=run.bootstrap, seed=run.seed
            )
    return rows


class _Interventions(NamedTuple):
    rows: list[InterventionRow]
    sizes_M: Ints
    n_shifted_PM: Ints | None
    """Neurons of each set that a prompt has; None for a model without experts."""


def _interventions(run: LinearityRun, study: PlannedStudy) -> _Interventions:
    (shard_set,) = study.of_kind("interventions")
    shards = read_study(shard_set.place.path(run.directory))
    _check_finite(shard_set, shards)
    shape = (len(shards.ids), len(shards.axes["shifts"]), len(shards.axes["sizes"]))
    names = value_names(run.target)
    values_PDM = shards.columns[names.shifted].reshape(shape).astype(np.float64)
    changes_PDM = values_PDM - shards.columns[names.base][:, None, None]
    predicted_PDM, sizes_M = shards.columns["predicted"].reshape(shape), np.array(shards.axes["sizes"])
    n_shifted_PM = None
    if "n_shifted" in shards.columns:
        n_shifted_PM = shards.columns["n_shifted"].astype(np.int64)
        nothing_PDM = np.broadcast_to(n_shifted_PM[:, None] == 0, shape)
        predicted_PDM, changes_PDM = (np.ma.masked_array(one, nothing_PDM) for one in (predicted_PDM, changes_PDM))
    rows = interventions_table(
        shards.axes["shifts"], sizes_M, predicted_PDM, changes_PDM, n_bootstrap=run.bootstrap, seed=run.seed
    )
    return _Interventions(rows, sizes_M, n_shifted_PM)


def _facts(study: PlannedStudy, ids: Sequence[str]) -> Facts:
    by_id = {example.id: example for example in study.facts.examples}
    examples = [by_id[id_] for id_ in ids]
    return Facts(
        facts=[fact_of(example, study.facts.name) for example in examples],
        wordings=[example.group for example in examples],
        answers=[example.labels[0] for example in examples],
    )
