"""The measurements of a linearity study: sweeps, estimates, interventions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from negcore.arrays import Floats, Ints
from negcore.measure.estimators import estimate
from negcore.measure.interventions import intervene, random_sets
from negcore.measure.sweeps import LARGEST_TAIL, sweep
from negcore.model.language_model import LanguageModel
from negcore.store.identity import content_digest
from negcore.store.study import intervention_columns, sweep_columns, value_names
from negcore.targets import DEFAULT_TARGET, Target
from tasks.measure.examples import EncodedExample, answers_of, encoded_prompts, without_labels
from tasks.measure.measurement import Columns, ColumnType, Measurement
from tasks.measure.references import References

_FORMULAS = {"integrated_gradients": "midpoints", "log_probability_increase": "with attention output"}
"""Changes of an estimator since its numbers were first stored: earlier ones are not mixed with these."""


@dataclass(frozen=True, eq=False)
class Sweeps(Measurement):
    """The target of each prompt's answer, with each neuron shifted by itself."""

    notes_seconds: ClassVar[bool] = True

    neurons_K2: Ints
    shifts_S: Floats
    nodes: int | None = None
    """Gauss nodes of each ring between ranges, in place of every shift."""
    ranges: tuple[float, ...] = ()
    """Ranges whose lines are asked for."""
    target: Target = DEFAULT_TARGET
    spread_over: References | None = None
    """Prompts whose activations' spread is the unit of shifts; None if that is one unit of activation."""
    has_experts: bool = False
    """True if a prompt has some of the neurons alone: which, a column tells."""

    @property
    def settings(self) -> dict[str, Any]:
        rule = {"largest_tail": LARGEST_TAIL} if self.nodes else {}
        settings = {"neurons": _digest(self.neurons_K2), "shifts": self.shifts_S.tolist()} | self._by_nodes | rule
        return settings | _spread_settings(self.spread_over)

    @property
    def axes(self) -> dict[str, Any]:
        return {
            "neurons": self.neurons_K2.tolist(),
            "shifts": self.shifts_S.tolist(),
            **self._by_nodes,
            **_of_target(self.target),
            **_of_unit(self.spread_over),
        }

    @property
    def _by_nodes(self) -> dict[str, Any]:
        return {"nodes": self.nodes, "ranges": sorted(self.ranges)} if self.nodes else {}

    def column_types(self, n_options: int) -> Mapping[str, ColumnType]:
        n_neurons, n_shifts, names = len(self.neurons_K2), len(self.shifts_S), value_names(self.target)
        types = {
            "label_id": ColumnType(np.int32),
            names.base: ColumnType(np.float32),
            "activations": ColumnType(np.float32, (n_neurons,)),
            names.shifted: ColumnType(np.float32, (n_neurons, n_shifts)),
        }
        types |= {"by_nodes": ColumnType(np.uint8, (n_neurons,))} if self.nodes else {}
        types |= {"spreads": ColumnType(np.float32, (n_neurons,))} if self.spread_over else {}
        return types | _active_type(self.has_experts, n_neurons)

    def measure(self, lm: LanguageModel, examples: Sequence[EncodedExample]) -> Columns:
        result = sweep(
            lm,
            encoded_prompts(examples),
            answers=answers_of(examples),
            target=self.target,
            neurons=self.neurons_K2,
            shifts=self.shifts_S,
            spreads=None if self.spread_over is None else self.spread_over.spreads(lm, self.neurons_K2),
            nodes=self.nodes,
            ranges=self.ranges,
        )
        return {**sweep_columns(result), **_active_column(self.has_experts, result.active_PK)}


@dataclass(frozen=True, eq=False)
class Estimates(Measurement):
    """One estimator's scores of the neurons that are swept."""

    notes_seconds: ClassVar[bool] = True

    estimator: str
    neurons_K2: Ints
    references: References | None = None
    """Prompts from which activations are taken, for estimators that do that."""
    run_target: Target = DEFAULT_TARGET
    """Target of the run."""
    has_experts: bool = False
    """As of `Sweeps`."""

    @property
    def settings(self) -> dict[str, Any]:
        further: dict[str, Any] = {"formula": _FORMULAS[self.estimator]} if self.estimator in _FORMULAS else {}
        if self.references is not None:
            further["references"] = {"kind": self.references.kind, "prompts": content_digest(dict(self.references.ids))}
        target = self.target.replace("-", "_")  # as its first shards spell it
        return {"estimator": self.estimator, "target": target, "neurons": _digest(self.neurons_K2)} | further

    @property
    def axes(self) -> dict[str, Any]:
        return {"neurons": self.neurons_K2.tolist()}

    @property
    def target(self) -> Target:
        """The target of the sweep; beside probabilities, log-probability increase keeps what its source defines."""
        is_named = self.estimator == "log_probability_increase" and self.run_target == "probability"
        return "log-probability" if is_named else self.run_target

    def column_types(self, n_options: int) -> Mapping[str, ColumnType]:
        n_neurons = len(self.neurons_K2)
        return {"scores": ColumnType(np.float32, (n_neurons,))} | _active_type(self.has_experts, n_neurons)

    def measure(self, lm: LanguageModel, examples: Sequence[EncodedExample]) -> Columns:
        scores_PK = estimate(
            lm,
            encoded_prompts(examples),
            estimator=self.estimator,
            answers=answers_of(examples),
            target=self.target,
            neurons=self.neurons_K2,
            references=None if self.references is None else without_labels(self.references.of(examples)),
        )
        return {"scores": np.ma.filled(scores_PK, 0)} | _active_column(self.has_experts, ~np.ma.getmaskarray(scores_PK))


@dataclass(frozen=True, eq=False)
class Interventions(Measurement):
    """True and predicted changes with sets of neurons shifted together."""

    notes_seconds: ClassVar[bool] = True

    sizes: tuple[int, ...]
    draws: int
    shifts: tuple[float, ...]
    seed: int
    target: Target = DEFAULT_TARGET
    spread_over: References | None = None
    """As of `Sweeps`."""
    has_experts: bool = False
    """True if a prompt has some neurons of a set alone: how many, a column tells."""

    @property
    def settings(self) -> dict[str, Any]:
        settings = {"sizes": self.sizes, "draws": self.draws, "shifts": self.shifts, "seed": self.seed}
        return settings | _spread_settings(self.spread_over)

    @property
    def axes(self) -> dict[str, Any]:
        axes = {"shifts": self.shifts, "sizes": list(self.sizes) * self.draws}
        return axes | _of_target(self.target) | _of_unit(self.spread_over)

    def column_types(self, n_options: int) -> Mapping[str, ColumnType]:
        of_sets = ColumnType(np.float32, (len(self.shifts), len(self.sizes) * self.draws))
        names = value_names(self.target)
        types = {names.base: ColumnType(np.float32), "predicted": of_sets, names.shifted: of_sets}
        n_sets = len(self.sizes) * self.draws
        return types | ({"n_shifted": ColumnType(np.int32, (n_sets,))} if self.has_experts else {})

    def measure(self, lm: LanguageModel, examples: Sequence[EncodedExample]) -> Columns:
        sets = [neurons for draw in range(self.draws) for neurons in random_sets(lm, self.sizes, seed=self.seed + draw)]
        result = intervene(
            lm,
            encoded_prompts(examples),
            answers=answers_of(examples),
            target=self.target,
            sets=sets,
            spreads=None if self.spread_over is None else _spreads_of_sets(lm, self.spread_over, sets),
            shifts=self.shifts,
        )
        return intervention_columns(result)


def _active_type(has_experts: bool, n_neurons: int) -> dict[str, ColumnType]:
    return {"active": ColumnType(np.uint8, (n_neurons,))} if has_experts else {}


def _active_column(has_experts: bool, active_PK: NDArray[np.bool_] | None) -> dict[str, NDArray[np.uint8]]:
    """Return the column that says which neurons a prompt has, of a mixture of experts."""
    return {"active": active_PK.astype(np.uint8)} if has_experts and active_PK is not None else {}


def _spreads_of_sets(lm: LanguageModel, over: References, sets: Sequence[Ints]) -> list[Floats]:
    """Return the spreads of each set's neurons, which are read once for all sets."""
    neurons_K2, places_K = np.unique(np.concatenate(sets), axis=0, return_inverse=True)
    spreads_K = over.spreads(lm, neurons_K2)[places_K.ravel()]
    return np.split(spreads_K, np.cumsum([len(one) for one in sets])[:-1])


def _spread_settings(over: References | None) -> dict[str, Any]:
    return {} if over is None else {"spread": {"kind": "sd", "prompts": content_digest(dict(over.ids))}}


def _of_unit(over: References | None) -> dict[str, str]:
    return {} if over is None else {"shift_unit": "sd"}


def _of_target(target: Target) -> dict[str, str]:
    return {} if target == DEFAULT_TARGET else {"target": target}


def _digest(neurons_K2: Ints) -> str:
    return content_digest(neurons_K2.tolist())
