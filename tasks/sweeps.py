"""Measure a linearity study: sweeps, estimators and interventions as jobs on workers, each a shard with a receipt."""

import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from negcore.analysis.linearity import draw_neurons, nested_grid
from negcore.datasets import Example, FactSet, load_facts
from negcore.errors import NegError
from negcore.measure.estimators import Target, estimate
from negcore.measure.interventions import SET_SIZES, intervene, random_sets
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import sweep
from negcore.model.architectures import Dtype, SiteChoice
from negcore.model.encoding import encode_labels, encode_prompts
from negcore.model.language_model import LanguageModel, ModelCard, describe_model, load_model
from negcore.store.identity import content_digest
from negcore.store.publish import Receipt
from negcore.store.study import (
    Columns,
    Kind,
    StudyIdentity,
    StudyPlace,
    intervention_columns,
    sweep_columns,
    write_seconds,
    write_study_shard,
)
from tasks.config.run_file import LinearityRun
from tasks.plan import PACKAGES

Neurons = NDArray[np.int64]


class Measured(NamedTuple):
    """What one measurement of some prompts gives."""

    columns: Columns
    axes: dict[str, Any]


class Measurement(ABC):
    """What is measured of each prompt of a part."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the numbers, as JSON."""

    @abstractmethod
    def measure(self, lm: LanguageModel, examples: Sequence[Example]) -> Measured:
        """Measure prompts."""


@dataclass(frozen=True, eq=False)
class Sweeps(Measurement):
    """Probabilities with each neuron shifted by itself."""

    neurons_K2: Neurons
    shifts_S: NDArray[np.float64]

    @property
    def settings(self) -> dict[str, Any]:
        return {"neurons": _digest(self.neurons_K2), "shifts": self.shifts_S.tolist()}

    def measure(self, lm: LanguageModel, examples: Sequence[Example]) -> Measured:
        labels = [example.labels[0] for example in examples]
        result = sweep(lm, _prompts(examples), labels, neurons=self.neurons_K2, shifts=self.shifts_S)
        return Measured(sweep_columns(result), {"neurons": self.neurons_K2.tolist(), "shifts": self.shifts_S.tolist()})


@dataclass(frozen=True, eq=False)
class Estimates(Measurement):
    """One estimator's scores of the neurons that are swept."""

    estimator: str
    neurons_K2: Neurons

    @property
    def settings(self) -> dict[str, Any]:
        return {"estimator": self.estimator, "target": self.target, "neurons": _digest(self.neurons_K2)}

    @property
    def target(self) -> Target:
        """The probability, as in the sweep; log-probability increase keeps what its source defines."""
        return "log_probability" if self.estimator == "log_probability_increase" else "probability"

    def measure(self, lm: LanguageModel, examples: Sequence[Example]) -> Measured:
        scores_PK = estimate(
            lm,
            _prompts(examples),
            [example.labels for example in examples],
            estimator=self.estimator,
            target=self.target,
            neurons=self.neurons_K2,
        )
        return Measured({"scores": scores_PK}, {"neurons": self.neurons_K2.tolist()})


@dataclass(frozen=True, eq=False)
class Interventions(Measurement):
    """True and predicted changes with sets of neurons shifted together."""

    sizes: tuple[int, ...]
    draws: int
    shifts: tuple[float, ...]
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        return {"sizes": self.sizes, "draws": self.draws, "shifts": self.shifts, "seed": self.seed}

    def measure(self, lm: LanguageModel, examples: Sequence[Example]) -> Measured:
        prompts, labels = _prompts(examples), [example.labels[0] for example in examples]
        negs_PLN = neurgrad(lm, prompts, [[label] for label in labels]).negs_POLN[:, 0]
        sets = [neurons for draw in range(self.draws) for neurons in random_sets(lm, self.sizes, seed=self.seed + draw)]
        results = [intervene(lm, prompts, labels, sets=sets, shift=d, negs_PLN=negs_PLN) for d in self.shifts]
        return Measured(intervention_columns(results), {"shifts": self.shifts, "sizes": list(self.sizes) * self.draws})


@dataclass(frozen=True)
class PlannedPart:
    """One directory of shards to be."""

    partition: StudyPlace
    identity: StudyIdentity
    examples: tuple[Example, ...]
    shard_prompts: int
    measurement: Measurement

    @property
    def shards(self) -> list[Sequence[Example]]:
        """The prompts of every shard, in order."""
        starts = range(0, len(self.examples), self.shard_prompts)
        return [self.examples[start : start + self.shard_prompts] for start in starts]


@dataclass(frozen=True)
class PlannedStudy:
    """One model and all that is measured of it."""

    card: ModelCard
    facts: FactSet
    parts: tuple[PlannedPart, ...]

    def of_kind(self, kind: Kind) -> list[PlannedPart]:
        """The parts of one kind."""
        return [part for part in self.parts if part.partition.kind == kind]

    @property
    def n_shards(self) -> int:
        return sum(len(part.shards) for part in self.parts)


@cache
def plan_linearity(run: LinearityRun) -> tuple[PlannedStudy, ...]:
    """Read the facts with every model's tokenizer, check all prompts, and draw neurons and sets.

    Raises
    ------
    NegError
        If a model or the facts are unknown or malformed, a prompt is too long, or a model has too few neurons.
    """
    return tuple(_plan_study(run, ref) for ref in dict.fromkeys(run.model))


def _plan_study(run: LinearityRun, ref: str) -> PlannedStudy:
    card = describe_model(ref)
    site = card.arch.site(run.site)
    facts = _whole_facts(load_facts(run.facts, card.tokenizer, seed=run.seed, masked=card.arch.masked), run.prompts)
    _check(card, facts)

    def part(kind: Kind, name: str, measurement: Measurement) -> PlannedPart:
        identity = StudyIdentity(
            model=card.name,
            model_revision=card.revision,
            tokenizer_hash=card.tokenizer_digest,
            site=site,
            dtype=run.dtype,
            n_layers=card.n_layers,
            n_neurons=card.n_neurons,
            prompt={"seed": run.seed},
            dataset_fingerprint=facts.fingerprint,
            study=measurement.settings,
            versions={package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        )
        place = StudyPlace(kind, card.name, facts.name, name)
        return PlannedPart(place, identity, facts.examples, run.shard_prompts, measurement)

    neurons_K2 = _neurons(run, card)
    sizes = tuple(size for size in SET_SIZES if size <= min(run.largest_set, card.n_layers * card.n_neurons))
    return PlannedStudy(
        card,
        facts,
        (
            *(
                part("sweeps", name, Sweeps(block_K2, nested_grid(run.range, run.points)))
                for name, block_K2 in _blocks(neurons_K2, run.block_layers)
            ),
            *(part("estimates", name, Estimates(name, neurons_K2)) for name in dict.fromkeys(run.estimator)),
            part("interventions", "nested", Interventions(sizes, run.draws, run.set_shift, run.seed)),
        ),
    )


def _neurons(run: LinearityRun, card: ModelCard) -> Neurons:
    count = card.n_layers * card.n_neurons if run.neurons == "all" else run.neurons
    try:
        return draw_neurons(card.n_layers, card.n_neurons, count, seed=run.seed)
    except NegError as error:
        raise NegError(f"{card.name}: {error}") from None


def _blocks(neurons_K2: Neurons, block_layers: int) -> list[tuple[str, Neurons]]:
    """Neurons by blocks of layers, with the blocks' names; layers without a neuron are in none."""
    blocks_K = neurons_K2[:, 0] // block_layers
    named = []
    for block in np.unique(blocks_K).tolist():
        first = block * block_layers
        named.append((f"layers-{first:02d}-{first + block_layers - 1:02d}", neurons_K2[blocks_K == block]))
    return named


def fact_of(example: Example, dataset: str) -> str:
    """The fact that a prompt asks for: its `uuid` in the source, which an id holds behind set and row number."""
    return example.id.removeprefix(f"{dataset}/").split("/", 1)[1]


def _whole_facts(facts: FactSet, n_prompts: int) -> FactSet:
    """The first prompts, once those of one fact stand together, so that wordings can be compared."""
    first_seen: dict[str, int] = {}
    for index, example in enumerate(facts.examples):
        first_seen.setdefault(fact_of(example, facts.name), index)
    together = sorted(facts.examples, key=lambda example: first_seen[fact_of(example, facts.name)])
    return replace(facts, examples=tuple(together[:n_prompts]))


def _check(card: ModelCard, facts: FactSet) -> None:
    try:
        encode_prompts(card, [example.prompt for example in facts.examples])
        encode_labels(card.tokenizer, [example.labels for example in facts.examples], len(facts.examples))
    except NegError as error:
        raise type(error)(f"{facts.name}, model {card.name}: {error}") from None


@dataclass(frozen=True)
class StudyJob:
    """One shard to measure."""

    root: Path
    partition: StudyPlace
    identity: StudyIdentity
    index: int
    n_shards: int
    examples: Sequence[Example]
    measurement: Measurement


def study_job(root: Path, part: PlannedPart, index: int) -> StudyJob:
    """The job of one shard of a part."""
    shards = part.shards
    return StudyJob(root, part.partition, part.identity, index, len(shards), shards[index], part.measurement)


class SweepWorker:
    """Loads a model once and measures shards with it; becomes an actor only in the pool."""

    def __init__(self, model: str, *, dtype: Dtype, device: str | None, site: SiteChoice, threads: int) -> None:
        # The number of threads decides how sums are split, so it is part of what makes results repeatable.
        torch.set_num_threads(threads)
        self._lm = load_model(model, dtype=dtype, device=device, site=site)

    def run(self, job: StudyJob) -> Receipt:
        """Measure one shard, publish it and return its receipt."""
        started = time.perf_counter()
        columns, axes = job.measurement.measure(self._lm, job.examples)
        seconds = time.perf_counter() - started
        receipt = write_study_shard(
            job.root,
            job.partition,
            job.index,
            job.n_shards,
            identity=job.identity,
            examples=job.examples,
            columns=columns,
            axes=axes,
        )
        write_seconds(job.partition.path(job.root), job.index, seconds)
        return receipt


def _prompts(examples: Sequence[Example]) -> list[str]:
    return [example.prompt for example in examples]


def _digest(neurons_K2: Neurons) -> str:
    return content_digest(neurons_K2.tolist())
