"""The curves of a ranking: predictions of a test split with growing parts of the ranking silent, or all but these.

As with the causal check, sets of neurons are part of the directory's name, as a digest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from negcore.analysis.faithfulness import Condition
from negcore.arrays import Floats, Ints
from negcore.measure.ablation import AblationResult, silence_sets
from negcore.model.language_model import LanguageModel
from negcore.store.answers import AnswerView
from negcore.store.identity import content_digest
from negcore.store.publish import ShardPlace
from negcore.store.reader import NegSplit
from negcore.store.study import read_study
from tasks.measure.examples import EncodedExample, encoded_prompts
from tasks.measure.measurement import Columns, ColumnType, Measurement, study_settings
from tasks.measure.shard_set import ShardSet


@dataclass(frozen=True, eq=False)
class OutputNorms(Measurement):
    """Length of what one unit of each neuron's `act` adds to its layer's output. It is the same for every example."""

    n_neurons: int
    """Number in the whole model."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"measured": "output norms"}

    @property
    def axes(self) -> dict[str, Any]:
        return {}

    def column_types(self, n_options: int) -> Mapping[str, ColumnType]:
        return {"norms": ColumnType(np.float32, (self.n_neurons,))}

    def measure(self, lm: LanguageModel, examples: Sequence[EncodedExample]) -> Columns:
        norms_LN = torch.stack([lm.down_rows(layer).detach().float().norm(dim=1).cpu() for layer in range(lm.n_layers)])
        return {"norms": np.tile(norms_LN.flatten().numpy(), (len(examples), 1))}


@dataclass(frozen=True, eq=False)
class Curves(Measurement):
    """Log-probabilities of every option, and divergence of the prediction, with sets of neurons silent."""

    probe: str
    """Whose ranking it is."""
    sets: Mapping[Condition, NDArray[np.bool_]]
    """Which neurons are silent, by condition."""

    @property
    def settings(self) -> dict[str, Any]:
        packed = {
            str(tuple(condition)): np.packbits(silent_M).tobytes().hex() for condition, silent_M in self.sets.items()
        }
        return {"probe": self.probe, "silent": content_digest(packed), "value": 0}

    @property
    def axes(self) -> dict[str, Any]:
        return {"conditions": list(self.sets)}

    def column_types(self, n_options: int) -> Mapping[str, ColumnType]:
        return {
            "gold": ColumnType(np.int16),
            "base_log_probs": ColumnType(np.float32, (n_options,)),
            "log_probs": ColumnType(np.float32, (len(self.sets), n_options)),
            "kl": ColumnType(np.float32, (len(self.sets),)),
        }

    def measure(self, lm: LanguageModel, examples: Sequence[EncodedExample]) -> Columns:
        result = silence_sets(lm, encoded_prompts(examples), silent_RM=np.stack(list(self.sets.values())))
        return {
            "gold": np.array([example.answer for example in examples], np.int16),
            "base_log_probs": result.base_log_probs_PO,
            "log_probs": result.log_probs_PRO,
            "kl": result.kl_PR,
        }


def plan_norms(split: ShardSet) -> ShardSet:
    """Plan the norms of a model's neurons: of one example of a split, as they are the same for all."""
    norms = OutputNorms(split.identity.n_layers * split.identity.n_neurons)
    return _study(replace(split, examples=split.examples[:1]), norms, "norms", "output", "output norms")


def plan_curves(split: ShardSet, probe: str, sets: Mapping[Condition, NDArray[np.bool_]]) -> ShardSet:
    """Plan the curves of a probe's ranking on a test split, whose shards they have, row for row."""
    curves = Curves(probe, sets)
    name = f"{probe}-{content_digest(curves.settings)[:16]}"
    return _study(split, curves, "curves", name, f"curves of {probe}")


def _study(split: ShardSet, measurement: Measurement, kind: str, part: str, what: str) -> ShardSet:
    return replace(
        split,
        place=ShardPlace(kind, split.place.model, split.place.dataset, part),
        identity=replace(split.identity, study=study_settings(measurement.settings, split.identity.dtype)),
        measurement=measurement,
        title=f"{split.place.model} {split.place.dataset} {what}",
    )


def read_norms(root: Path, measured: ShardSet) -> NDArray[np.float32]:
    """Return the norm of every neuron's output: (M,); errors as of `read_study`."""
    norms_M: NDArray[np.float32] = read_study(measured.place.path(root)).columns["norms"][0]
    return norms_M


def read_curves(root: Path, measured: ShardSet) -> tuple[list[Condition], Ints, AblationResult, AnswerView | None]:
    """Return conditions, gold options (P,), what was measured, and the orders of options if there are several.

    Errors as of `read_study`.
    """
    shards = read_study(measured.place.path(root))
    columns, conditions = shards.columns, [Condition(*one) for one in shards.axes["conditions"]]
    n_prompts, n_options = columns["base_log_probs"].shape
    log_probs_PRO = columns["log_probs"].reshape(n_prompts, len(conditions), n_options)
    result = AblationResult(columns["base_log_probs"], log_probs_PRO, columns["kl"].reshape(n_prompts, -1))
    answers = AnswerView.if_permuted(shards.ids, n_options, measured.identity)
    return conditions, columns["gold"].astype(np.int64), result, answers


def mean_sizes(train: NegSplit) -> Floats:
    """Return the mean |NEG| of every neuron for the gold option over a split's prompts: (M,), one layer at a time."""
    total_LN = np.zeros((train.n_layers, train.n_neurons))
    for shard in train.shards():
        rows, gold_P = np.arange(shard.n_rows), shard.numbers("gold")
        for layer in range(train.n_layers):
            total_LN[layer] += np.abs(shard.negs_PON(layer)[rows, gold_P]).sum(axis=0, dtype=np.float64)
    return total_LN.ravel() / train.n_rows
