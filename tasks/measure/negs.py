"""NEGs of all neurons for all options: the measurement that probes and rankings are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from negcore.measure.neurgrad import NeurGradBatch, neurgrad
from negcore.model.language_model import LanguageModel
from negcore.store.identity import DEFAULT_STORAGE
from negcore.store.levels import STORAGE_LEVELS
from negcore.store.schema import StoredExample
from tasks.measure.examples import EncodedExample, encoded_prompts
from tasks.measure.measurement import Columns, ColumnType, Measurement, Nonfinite

_MOST_LAYERS = 8
"""Layers that a message names."""


@dataclass(frozen=True)
class NegMeasurement(Measurement):
    """NeurGrad of every neuron for every option, stored at some level."""

    n_layers: int
    layer_width: int
    """Neurons a layer."""
    storage: str = DEFAULT_STORAGE
    batch_size: int | None = None
    """Prompts in a batch; None to choose by length. Changes at most the last digits."""
    n_chosen: int | None = None
    """Neurons whose numbers are stored, if not all are."""
    neurons: tuple[int, ...] | None = None
    """Which these are: flat indices, rising; None as long as they are not chosen."""
    n_shared: int | None = None
    """Tokens that all prompts of the shards begin with: a worker runs them once. None to look at each shard."""

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    @property
    def axes(self) -> dict[str, Any]:
        return dict(STORAGE_LEVELS[self.storage].axes)

    def about(self, n_options: int) -> dict[str, Any]:
        return {"axes": self.axes, "n_options": n_options}

    def column_types(self, n_options: int) -> Mapping[str, ColumnType]:
        shape = (self.n_layers, self.layer_width)
        return {
            "negs_POLN": ColumnType(np.float32, (n_options, *shape)),
            "activations_PLN": ColumnType(np.float32, shape),
            "probs_PO": ColumnType(np.float32, (n_options,)),
            "label_ids_PO": ColumnType(np.int64, (n_options,)),
        }

    def measure(self, lm: LanguageModel, examples: Sequence[EncodedExample]) -> Columns:
        prompts = replace(encoded_prompts(examples), n_shared=self.n_shared)
        batch = neurgrad(lm, prompts, batch_size=self.batch_size)
        return {name: getattr(batch, name) for name in self.column_types(0)}

    def record_batch(self, examples: Sequence[StoredExample], columns: Columns) -> pa.RecordBatch:
        assert self.n_chosen is None or self.neurons is not None, "the neurons are not chosen yet"
        return STORAGE_LEVELS[self.storage].batch(examples, **columns, neurons=self.neurons)

    def nonfinite(self, columns: Columns) -> list[Nonfinite]:
        return [Nonfinite(one.row, one.n_values, _where(one.layers)) for one in NeurGradBatch(**columns).nonfinite()]


def _where(layers: Sequence[int]) -> str:
    named = ", ".join(map(str, layers[:_MOST_LAYERS])) + ", ..." * (len(layers) > _MOST_LAYERS)
    return f"layer{'s' * (len(layers) > 1)} {named}" if layers else "its probabilities"
