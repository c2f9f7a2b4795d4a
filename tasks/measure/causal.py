"""The causal check of a ranking: the probabilities of a test split with the ranking's neurons shifted.

Sets and shifts are part of the directory's name, as a digest: a changed ranking, size or shift finds a directory of
its own and the finished ones stay usable. A NEG run is too dear to be refused for what a new check of it costs.
Everything else that decides the numbers (model, prompts, site, number type) is compared as everywhere: shards of
another run are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negcore.analysis.causal import CausalResult, Condition, SkillSet, chosen_neurons, conditions_of, shift_sets
from negcore.arrays import Ints
from negcore.datasets import Example
from negcore.errors import ShardError
from negcore.model.language_model import LanguageModel
from negcore.store.answers import AnswerView
from negcore.store.identity import RunIdentity, content_digest
from negcore.store.publish import SetAside, ShardPlace
from negcore.store.reader import NegSplit, open_negs
from negcore.store.study import read_study
from tasks.measure.examples import EncodedExample, encoded_prompts
from tasks.measure.measurement import Columns, ColumnType, Measurement, study_settings
from tasks.measure.planned_negs import check_run, where
from tasks.measure.shard_set import ShardSet


@dataclass(frozen=True, eq=False)
class CausalCheck(Measurement):
    """Probabilities of every option with sets of neurons shifted towards or away from the gold option."""

    probe: str
    """Whose ranking it is."""
    sets: tuple[SkillSet, ...]
    shifts: tuple[float, ...]
    root: Path
    """Run directory with the prompts' NEGs, whose signs say which way is towards the gold option."""
    negs: ShardPlace
    negs_identity: RunIdentity

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "probe": self.probe,
            "split": self.negs.part,
            "shifts": self.shifts,
            "sets": [[one.kind, one.size, one.draw, _digest(one)] for one in self.sets],
        }

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The sets of neurons, each with which way and how far it is shifted."""
        return conditions_of(self.sets, self.shifts)

    @property
    def axes(self) -> dict[str, Any]:
        return {"conditions": self.conditions}

    def column_types(self, n_options: int) -> Mapping[str, ColumnType]:
        return {
            "gold": ColumnType(np.int16),
            "base_probs": ColumnType(np.float32, (n_options,)),
            "probs": ColumnType(np.float32, (len(self.conditions), n_options)),
        }

    def left_out(self, examples: Sequence[Example]) -> list[SetAside]:
        """Return the rows that have no NEGs because they were set aside there."""
        set_aside = {row.id: row for row in self._negs_of(examples).set_aside}
        return [set_aside[example.id] for example in examples if example.id in set_aside]

    def measure(self, lm: LanguageModel, examples: Sequence[EncodedExample]) -> Columns:
        result = shift_sets(
            lm,
            encoded_prompts(examples),
            gold_P=[example.answer for example in examples],
            gold_negs_PK=_gold_negs(self._negs_of(examples), examples, chosen_neurons(self.sets)),
            sets=self.sets,
            shifts=self.shifts,
        )
        return {
            "gold": result.gold_P.astype(np.int16),
            "base_probs": result.base_probs_PO,
            "probs": result.probs_PMO,
        }

    def _negs_of(self, examples: Sequence[Example]) -> NegSplit:
        """Return the NEGs of the split, which hold the examples."""
        known = {*self._split.ids, *(row.id for row in self._split.set_aside)}
        for id_ in sorted({example.id for example in examples} - known):
            raise ShardError(f"{where(self.root, self.negs)} lack the row {id_!r}: extract the rows of this run first")
        return self._split

    @cached_property
    def _split(self) -> NegSplit:
        split = open_negs(self.root).at(self.negs)
        check_run(self.root, self.negs, self.negs_identity.comparable(), split.identity.comparable())
        return split


def plan_causal(root: Path, split: ShardSet, probe: str, sets: Sequence[SkillSet], shifts: Sequence[float]) -> ShardSet:
    """Plan the check of a ranking.

    Parameters
    ----------
    root : Path
        Run directory with the split's NEGs.
    split : ShardSet
        The test split: the check has its shards, row for row.
    probe : str
        Name of the probe whose ranking it is.
    sets : sequence of SkillSet
        From `negcore.analysis.causal.skill_sets`.
    shifts : sequence of float
        In units of activation; positive is towards the gold option.
    """
    sizes = tuple(dict.fromkeys(map(float, shifts)))
    check = CausalCheck(probe, tuple(sets), sizes, root, split.place, split.identity)
    identity = replace(split.identity, study=study_settings(check.settings, split.identity.dtype))
    name = f"{probe}-{content_digest(identity.study)[:16]}"
    place = ShardPlace("causal", split.place.model, split.place.dataset, name)
    return replace(
        split,
        place=place,
        identity=identity,
        measurement=check,
        title=f"{split.place.model} {split.place.dataset} causal check of {probe}",
    )


def read_causal(root: Path, checked: ShardSet) -> CausalResult:
    """Put the shards of a finished check together.

    Raises
    ------
    ShardError
        If it is incomplete or damaged.
    """
    shards = read_study(checked.place.path(root))
    conditions = tuple(Condition(*condition) for condition in shards.axes["conditions"])
    base_probs_PO = shards.columns["base_probs"]
    n_prompts, n_options = base_probs_PO.shape
    return CausalResult(
        conditions=conditions,
        gold_P=shards.columns["gold"].astype(np.int64),
        base_probs_PO=base_probs_PO,
        probs_PMO=shards.columns["probs"].reshape(n_prompts, len(conditions), n_options),
        answers=AnswerView.if_permuted(shards.ids, n_options, checked.identity),
    )


def _gold_negs(split: NegSplit, examples: Sequence[Example], neurons_K: Ints) -> NDArray[np.float32]:
    """Return numbers with the sign of each neuron's NEG for the gold option of each example: shape (P, K)."""
    rows = {example.id: row for row, example in enumerate(examples)}
    gold_P = np.array([example.answer for example in examples])
    gold_negs_PK = np.empty((len(examples), len(neurons_K)), np.float32)
    for shard in split.shards():
        stored_P = [at for at, id_ in enumerate(split.ids[shard.rows]) if id_ in rows]
        if stored_P:
            rows_P = [rows[split.ids[shard.rows][at]] for at in stored_P]
            gold_negs_PK[rows_P] = shard.signed_ranks(neurons_K)[stored_P, gold_P[rows_P]]
    return gold_negs_PK


def _digest(one: SkillSet) -> str:
    return content_digest(sorted(zip(one.neurons_K.tolist(), one.polarity_K.tolist(), strict=True)))
