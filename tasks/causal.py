"""Check rankings causally on workers: shift their neurons on a test split, a shard with a receipt a job.

Sets and shifts are part of the directory's name, as a digest: a changed ranking, size or shift finds a directory of
its own and the finished ones stay usable. A NEG run is too dear to be refused for what a new check of it costs.
Everything else that decides the numbers (model, prompts, site, number type) is compared as everywhere: shards of
another run are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from negcore.analysis.causal import CausalResult, Condition, SkillSet, chosen_neurons, conditions_of, shift_sets
from negcore.datasets import Example
from negcore.errors import ShardError
from negcore.measure.votes import Ints
from negcore.model.architectures import Dtype, SiteChoice
from negcore.model.language_model import load_model
from negcore.store.identity import RunIdentity, content_digest
from negcore.store.publish import Partition, Receipt
from negcore.store.reader import NegSplit, open_negs
from negcore.store.study import Columns, StudyIdentity, StudyPlace, read_study, write_study_shard
from tasks.plan import PlannedSplit


@dataclass(frozen=True, eq=False)
class CausalPart:
    """The check of one ranking on one split: a directory of shards to be."""

    partition: StudyPlace
    identity: StudyIdentity
    split: PlannedSplit
    sets: tuple[SkillSet, ...]
    shifts: tuple[float, ...]

    @property
    def shards(self) -> list[Sequence[Example]]:
        """The prompts of every shard, in order: those of the split's NEG shards."""
        return self.split.shards


@dataclass(frozen=True, eq=False)
class CausalJob:
    """One shard to compute."""

    root: Path
    partition: StudyPlace
    identity: StudyIdentity
    index: int
    n_shards: int
    examples: Sequence[Example]
    negs: Partition
    """Where the prompts' NEGs are."""
    negs_identity: RunIdentity
    sets: tuple[SkillSet, ...]
    shifts: tuple[float, ...]


def plan_causal(split: PlannedSplit, probe: str, sets: Sequence[SkillSet], shifts: Sequence[float]) -> CausalPart:
    """Plan the check of a ranking.

    Parameters
    ----------
    split : PlannedSplit
        The test split, whose NEG shards are or will be in the same run directory.
    probe : str
        Name of the probe whose ranking it is.
    sets : sequence of SkillSet
        From `negcore.analysis.causal.skill_sets`.
    shifts : sequence of float
        In units of activation; positive is towards the gold option.
    """
    sizes = tuple(dict.fromkeys(map(float, shifts)))
    study = {
        "probe": probe,
        "split": split.partition.split,
        "shifts": sizes,
        "sets": [[one.kind, one.size, one.draw, _digest(one)] for one in sets],
    }
    identity = StudyIdentity(**split.identity.comparable(), versions=split.identity.versions, study=study)
    name = f"{probe}-{content_digest(identity.study)[:16]}"
    place = StudyPlace("causal", split.partition.model, split.partition.dataset, name)
    return CausalPart(place, identity, split, tuple(sets), sizes)


def causal_job(root: Path, part: CausalPart, index: int) -> CausalJob:
    """The job of one shard of a part."""
    shards = part.shards
    return CausalJob(
        root,
        part.partition,
        part.identity,
        index,
        len(shards),
        shards[index],
        part.split.partition,
        part.split.identity,
        part.sets,
        part.shifts,
    )


class CausalWorker:
    """Loads a model once and shifts its neurons; becomes an actor only in the pool."""

    def __init__(self, model: str, *, dtype: Dtype, device: str | None, site: SiteChoice, threads: int) -> None:
        # The number of threads decides how sums are split, so it is part of what makes results repeatable.
        torch.set_num_threads(threads)
        self._lm = load_model(model, dtype=dtype, device=device, site=site)

    def run(self, job: CausalJob) -> Receipt:
        """Compute one shard, publish it and return its receipt; rows without NEGs, set aside there, are so here."""
        split = _negs_of(job)
        set_aside = {row.id: row for row in split.set_aside}
        chosen = [example for example in job.examples if example.id not in set_aside]
        return write_study_shard(
            job.root,
            job.partition,
            job.index,
            job.n_shards,
            identity=job.identity,
            examples=chosen,
            columns=_columns(self._shift(job, split, chosen) if chosen else _no_rows(job)),
            axes={"conditions": conditions_of(job.sets, job.shifts)},
            set_aside=[set_aside[example.id] for example in job.examples if example.id in set_aside],
        )

    def _shift(self, job: CausalJob, split: NegSplit, examples: Sequence[Example]) -> CausalResult:
        return shift_sets(
            self._lm,
            [example.prompt for example in examples],
            [example.labels for example in examples],
            gold_P=[example.answer for example in examples],
            gold_negs_PK=_gold_negs(split, examples, chosen_neurons(job.sets)),
            sets=job.sets,
            shifts=job.shifts,
        )


def read_causal(root: Path, part: CausalPart) -> CausalResult:
    """Put the shards of a finished part together.

    Raises
    ------
    ShardError
        If it is incomplete or damaged.
    """
    shards = read_study(part.partition.path(root))
    conditions = tuple(Condition(*condition) for condition in shards.axes["conditions"])
    base_probs_PO = shards.columns["base_probs"]
    n_prompts, n_options = base_probs_PO.shape
    return CausalResult(
        conditions=conditions,
        gold_P=shards.columns["gold"].astype(np.int64),
        base_probs_PO=base_probs_PO,
        probs_PMO=shards.columns["probs"].reshape(n_prompts, len(conditions), n_options),
    )


def _columns(result: CausalResult) -> Columns:
    return {
        "gold": result.gold_P.astype(np.int16),
        "base_probs": result.base_probs_PO,
        "probs": result.probs_PMO,
    }


def _no_rows(job: CausalJob) -> CausalResult:
    """What is published if every row is set aside."""
    conditions, n_options = conditions_of(job.sets, job.shifts), len(job.examples[0].labels)
    return CausalResult(
        conditions=conditions,
        gold_P=np.empty(0, np.int64),
        base_probs_PO=np.empty((0, n_options), np.float32),
        probs_PMO=np.empty((0, len(conditions), n_options), np.float32),
    )


def _negs_of(job: CausalJob) -> NegSplit:
    """The NEGs of the split, which hold the job's prompts."""
    split = open_negs(job.root).select(*job.negs)
    where = f"the NEGs of {job.negs.dataset!r} in {str(job.root)!r}"
    difference = job.negs_identity.difference(split.identity)
    if difference:
        raise ShardError(
            f"{where} are another run's (this run here, that one there: {difference}): write to another directory"
        )
    known = {*split.ids, *(row.id for row in split.set_aside)}
    for id_ in sorted({example.id for example in job.examples} - known):
        raise ShardError(f"{where} lack the row {id_!r}: extract the rows of this run first")
    return split


def _gold_negs(split: NegSplit, examples: Sequence[Example], neurons_K: Ints) -> NDArray[np.float32]:
    """NEG of the neurons for the gold option of each example, or what has its sign: shape (P, K)."""
    rows = {example.id: row for row, example in enumerate(examples)}
    gold_P = np.array([example.answer for example in examples])
    gold_negs_PK = np.empty((len(examples), len(neurons_K)), np.float32)
    for block in split.row_blocks():
        stored_P = [at for at, id_ in enumerate(split.ids[block.rows]) if id_ in rows]
        if stored_P:
            rows_P = [rows[split.ids[block.rows][at]] for at in stored_P]
            gold_negs_PK[rows_P] = block.ordinals(neurons_K)[stored_P, gold_P[rows_P]]
    return gold_negs_PK


def _digest(one: SkillSet) -> str:
    return content_digest(sorted(zip(one.neurons_K.tolist(), one.polarity_K.tolist(), strict=True)))
