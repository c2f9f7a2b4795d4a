"""NEGs of all neurons for all options: the measurement that probes and rankings are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch

from negcore.arrays import count_nonfinite
from negcore.errors import NegError
from negcore.measure.kept import keeping
from negcore.measure.neurgrad import measure_negs
from negcore.measure.votes import VOTES
from negcore.model.language_model import LanguageModel
from negcore.model.layer_shapes import LayerShapes, shapes_of
from negcore.store.identity import DEFAULT_STORAGE, RunIdentity, StorageName
from negcore.store.levels import STORAGE_LEVELS, Measured, Routed, StorageLevel
from negcore.store.schema import StoredExample
from negcore.targets import DEFAULT_TARGET, Target, checked_target
from tasks.measure.examples import EncodedExample, answers_of, encoded_prompts
from tasks.measure.measurement import Columns, ColumnType, Measurement, Nonfinite

_MOST_LAYERS = 8
"""Layers that a message names."""

_SUMS = frozenset(vote.column for vote in VOTES)


@dataclass(frozen=True)
class NegMeasurement(Measurement):
    """NeurGrad of every neuron for every option, stored at some level."""

    n_layers: int
    layer_width: int
    """Neurons a layer; of a mixture of experts, those that a prompt has, in the layer with the most."""
    storage: StorageName = DEFAULT_STORAGE
    batch_size: int | None = None
    """Prompts in a batch; None to choose by length. Changes at most the last digits."""
    n_chosen: int | None = None
    """Neurons whose numbers are stored, if not all are."""
    neurons: tuple[int, ...] | None = None
    """Which these are: flat indices, rising; None as long as they are not chosen."""
    n_shared: int | None = None
    """Tokens that all prompts of the shards begin with: a worker runs them once. None to look at each shard."""
    shapes: LayerShapes | None = None
    """Counts of each layer's neurons, of a mixture of experts."""
    target: Target = DEFAULT_TARGET
    """The number of each option whose slope is measured."""

    @classmethod
    def of(cls, identity: RunIdentity, **options: Any) -> Self:
        """Return the measurement of a run's model; options as the fields behind the first two."""
        shapes = shapes_of(identity.experts)
        width = identity.n_neurons if shapes is None else max(shape.n_active for shape in shapes)
        return cls(identity.n_layers, width, shapes=shapes, target=checked_target(identity.target), **options)

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    @property
    def axes(self) -> dict[str, Any]:
        axes = {**self._level.axes, **(self._level.expert_axes if self.shapes else {})}
        if self.target == DEFAULT_TARGET:
            return axes
        unit = f"{self.target} per activation"
        return {name: text.replace("probability per activation", unit) for name, text in axes.items()}

    def about(self, n_options: int) -> dict[str, Any]:
        return {"axes": self.axes, "n_options": n_options}

    def column_types(self, n_options: int) -> Mapping[str, ColumnType]:
        n_layers, width = self.n_layers, self.layer_width
        no_numbers = np.empty((0, n_options, n_layers, width), np.float32), np.empty((0, n_layers, width), np.float32)
        routed = Routed.of_none(self.shapes) if self.shapes else None
        kept = self._level.kept(Measured(*no_numbers, np.empty(0, np.int16), self.neurons, routed))
        types = {name: ColumnType(values.dtype, values.shape[1:]) for name, values in kept.items()} | {
            "probs_PO": ColumnType(np.float32, (n_options,)),
            "nonfinite_PL": ColumnType(np.int32, (n_layers,)),
            "label_ids_PO": ColumnType(np.int64, (n_options,)),
        }
        if self.shapes:
            shape = n_layers, max(one.top_k for one in self.shapes)
            types |= {"experts_PLK": ColumnType(np.int32, shape), "router_weights_PLK": ColumnType(np.float32, shape)}
        return types

    def measure(self, lm: LanguageModel, examples: Sequence[EncodedExample]) -> Columns:
        prompts = replace(encoded_prompts(examples), n_shared=self.n_shared)
        keep = keeping(lm, self.storage, answers_of(examples), self.neurons)
        measured = measure_negs(lm, prompts, keep, dtype=torch.float32, target=self.target, batch_size=self.batch_size)
        return {**measured, "label_ids_PO": prompts.label_ids_PO}

    def rows(self, columns: Columns, kept: Sequence[int]) -> Columns:
        """Return some rows; vote sums are of those with finite numbers alone."""
        return {name: values if name in _SUMS else values[kept] for name, values in columns.items()}

    def record_batch(self, examples: Sequence[StoredExample], columns: Columns) -> pa.RecordBatch:
        assert self.n_chosen is None or self.neurons is not None, "the neurons are not chosen yet"
        kept = dict(columns)
        label_ids_PO, probs_PO, _ = (kept.pop(name) for name in ("label_ids_PO", "probs_PO", "nonfinite_PL"))
        routed = None
        if self.shapes is not None:
            routed = Routed(self.shapes, kept.pop("experts_PLK"), kept.pop("router_weights_PLK"))
        if self.neurons is None and not self._level.has_nonfinite and self.nonfinite(columns):
            raise NegError(f"storage {self.storage!r} has no place for NaN and infinity: fail or skip such rows")
        return self._level.packed(
            examples, kept, label_ids_PO=label_ids_PO, probs_PO=probs_PO, neurons=self.neurons, routed=routed
        )

    def nonfinite(self, columns: Columns) -> list[Nonfinite]:
        by_layer_PL = columns["nonfinite_PL"]
        counts_P = by_layer_PL.sum(axis=1) + count_nonfinite(columns["probs_PO"])
        return [
            Nonfinite(row, int(counts_P[row]), _where(np.flatnonzero(by_layer_PL[row]).tolist()))
            for row in np.flatnonzero(counts_P).tolist()
        ]

    @property
    def _level(self) -> StorageLevel:
        return STORAGE_LEVELS[self.storage]


def _where(layers: Sequence[int]) -> str:
    named = ", ".join(map(str, layers[:_MOST_LAYERS])) + ", ..." * (len(layers) > _MOST_LAYERS)
    return f"layer{'s' * (len(layers) > 1)} {named}" if layers else "its probabilities"
