"""The steering of a finished run's model: neurons by hand or of its probes, rows of its datasets, and side effects."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from negcore.analysis.effects import Effect, effect_of
from negcore.datasets import dataset_name
from negcore.errors import DatasetError, ProbeError, RunError
from negcore.measure.interventions import shift_together
from negcore.measure.steering import Shift, joint_shift
from negcore.model.language_model import LanguageModel, ModelCard
from negcore.model.precision import in_float32
from negcore.model.references import with_adapter
from negcore.orders import split_id
from negcore.probing.rankings import rank
from negcore.probing.saved_probes import SavedProbe, check_polarities, load_probe
from negcore.store.files import location, n_bytes
from negcore.store.identity import difference
from tasks.config.dataset_runs import ProbeName, SkillRun
from tasks.config.reading import recorded_run
from tasks.config.recipes import RECIPES
from tasks.config.run_file import RUN_FILE
from tasks.measure.examples import encoded_prompts, refuse_unusual
from tasks.measure.planned_negs import planned_negs
from tasks.measure.shard_set import ShardSet
from tasks.plan import SUMS, PlannedDataset, PlannedModel, plan
from tasks.probe import probe_path

_BOOTSTRAP = 1000
_NEURON = re.compile(r"\s*(\d{1,9})\.((?:(?:\d{1,9}|shared)\.)?\d{1,9})\s*(?:=\s*(\S+?)\s*)?", re.ASCII)
_SAME = ("model", "model_revision", "site", "n_layers", "n_neurons")


@dataclass(frozen=True)
class SideEffect:
    """The effect of the shifts on the answers to one dataset's test rows."""

    dataset: str
    effect: Effect


class Asked(NamedTuple):
    """A prompt to answer."""

    prompt: str
    row: str = ""
    """Id of the row that it is; empty for a prompt by hand."""
    gold: str = ""
    """The row's right option."""


@dataclass(frozen=True)
class Steering:
    """The steering of a run's model."""

    run: SkillRun
    planned: PlannedModel
    asked: list[Asked]
    shifts: list[Shift]
    about: str
    """The shifts, in words."""
    chosen_on: str | None
    """Dataset whose probe chose the neurons; None for neurons by hand."""


class SteeredRun(NamedTuple):
    """A run whose model is to be steered."""

    run: SkillRun
    """With that model alone."""
    planned: PlannedModel

    def dataset(self, name: str | None) -> PlannedDataset:
        """Return the dataset of a name, or the only one.

        Raises
        ------
        RunError
            If the run has no such dataset, or several and none is named.
        """
        known = {one.dataset.name: one for one in self.planned.datasets}
        if name is None and len(known) == 1:
            return next(iter(known.values()))
        if name not in known:
            with suppress(DatasetError):
                name = name and dataset_name(name)
        if name is None or name not in known:
            reason = "several datasets" if name is None else f"no usable dataset {name!r}"
            raise RunError(f"{str(self.run.directory)!r} has {reason}: name one with --dataset: {', '.join(known)}")
        return known[name]


def plan_steering(
    directory: str,
    *,
    model: str | None = None,
    dataset: str | None = None,
    probe: ProbeName | None = None,
    k: int | None = None,
    neurons: str | None = None,
    size: float,
    prompts: Sequence[str] = (),
    n_rows: int,
) -> Steering:
    """Choose what is shifted and what is asked, before the model is loaded.

    Parameters
    ----------
    directory, model
        As for `read_steered_run`.
    dataset : str, optional
        The dataset whose probe and rows are taken; by default the run's only one.
    probe, k
        As for `probed_shifts`.
    neurons : str, optional
        As for `parsed_neurons`, in place of a probe.
    prompts : sequence of str
        In place of the dataset's first `n_rows` test rows.

    Raises
    ------
    NegError
        As for these functions; or if there is not exactly one of probe and neurons.
    """
    if (probe is None) == (neurons is None):
        raise RunError("give either a probe, whose neurons are shifted, or a list of neurons")
    if k is not None and probe is None:
        raise RunError("a number of neurons (k) is for a probe: leave it out beside a list of neurons")
    named = parsed_neurons(neurons, size) if neurons is not None else []
    steered = read_steered_run(directory, model)
    by_hand = [one.numbered(steered.planned.card) for one in named]
    of = steered.dataset(dataset) if probe or dataset or not prompts else None
    asked = [Asked(prompt) for prompt in prompts]
    if of is not None and not prompts:
        asked = [Asked(row.prompt, row.id, row.labels[row.answer]) for row in _test(of).examples[:n_rows]]
    if of is None or probe is None:
        return Steering(steered.run, steered.planned, asked, by_hand, _about(by_hand), None)
    shifts, name = probed_shifts(steered, of, probe, k, size), of.dataset.name
    about = f"{_about(shifts)}, the best of {probe} on {name}, by {size:g}"
    return Steering(steered.run, steered.planned, asked, shifts, about, name)


def _about(shifts: Sequence[Shift]) -> str:
    n_shifted = sum(size != 0 for _, _, size in shifts)
    return f"{n_shifted} neuron{'s' * (n_shifted != 1)} shifted"


def read_steered_run(directory: str, model: str | None = None) -> SteeredRun:
    """Read the run of a directory and plan it for one of its models, so that its prompts and labels are known.

    Raises
    ------
    NegError
        If there is no run on datasets, it has several runs or models and none is named, or it cannot be planned.
    """
    run = _dataset_run(location(directory).absolute())
    names = {run.model_names[with_adapter(ref, run.adapter)]: ref for ref in run.model}
    if model is not None and model not in names and model not in run.model:
        raise RunError(f"{directory!r} has no model {model!r}: name one of {', '.join(names)}")
    if model is None and len(names) > 1:
        raise RunError(f"{directory!r} has {len(names)} models: name one with --model: {', '.join(names)}")
    if run.random_weights is not None:
        raise RunError(f"{directory!r} measured random weights, which are not steered: name a run of the model itself")
    chosen = names.get(model or "", model or run.model[0])
    planned = plan(run, tolerant=True, refs=[with_adapter(chosen, run.adapter)])[0]
    return SteeredRun(run.model_copy(update={"model": (chosen,)}), planned)


def _dataset_run(place: Path) -> SkillRun:
    """Return the run on datasets of a directory; those of MCEval8K and of skills hold several, in folders."""
    recorded = place if _has_run(place) or not _has_run(place.parent) else place.parent
    runs: tuple[SkillRun, ...] = recorded_run(recorded).dataset_runs
    if not runs:
        raise RunError(f"{str(place)!r} holds no run on datasets: name one of neg pipeline, mceval8k or skills")
    chosen = runs if recorded == place else [run for run in runs if run.directory == place]
    if len(chosen) != 1:
        raise RunError(f"{str(recorded)!r} holds several runs: name one of {', '.join(str(r.directory) for r in runs)}")
    return chosen[0]


def _has_run(place: Path) -> bool:
    return n_bytes(place / RUN_FILE) is not None


class NamedShift(NamedTuple):
    """A shift of a neuron by name."""

    layer: int
    name: str
    """Name of the neuron in its layer: its number, or EXPERT.UNIT or ``shared``.UNIT of a mixture of experts."""
    size: float

    def numbered(self, card: ModelCard) -> Shift:
        """Return the shift of the neuron by its number, which the model is asked for later.

        Raises
        ------
        RunError
            If the model has no such expert or unit.
        """
        layer, name, size = self
        if name.isdecimal():
            return layer, int(name), size
        number = card.layer_shapes[layer].number_of(*name.split(".")) if layer < card.n_layers else None
        if number is None:
            raise RunError(f"{layer}.{name} is no neuron of {card.name!r}: `neg models` shows its layers and experts")
        return layer, number, size


def parsed_neurons(text: str, size: float) -> list[NamedShift]:
    """Return the shifts that a text like ``10.901,3.17=-4`` lists: neurons by name, some with a size of their own.

    Raises
    ------
    RunError
        If it is no such list.
    """
    shifts = []
    for one in text.split(","):
        match = _NEURON.fullmatch(one)
        try:
            own = float(match[3]) if match and match[3] else size
        except ValueError:
            match = None
        if match is None:
            raise RunError(f"{one!r:.80} is no neuron: give LAYER.NEURON or LAYER.NEURON=SIZE, as in 10.901,3.17=-4")
        shifts.append(NamedShift(int(match[1]), match[2], own))
    return shifts


def probed_shifts(
    steered: SteeredRun, dataset: PlannedDataset, probe: ProbeName, k: int | None, size: float
) -> list[Shift]:
    """Return shifts of a probe's best neurons, each in the direction of its polarity.

    They are read from the saved probe. Where it keeps fewer than k, or was not saved, all neurons are ranked again.
    Of a mixture of experts, a flat index that is no neuron's (see `NegSplit.locate`) has no polarity, and is left out.

    Raises
    ------
    NegError
        If the probe has no polarities, is another model's, or has no k neurons.
    """
    kind, vote = RECIPES[probe]
    path = probe_path(steered.run.directory, dataset.model, dataset.dataset.name, probe)
    parts = {split.place.part: split for split in dataset.splits}
    if k is None or kind != "vote" or n_bytes(path) is not None:
        saved = load_probe(path)
        _check_origin(saved, parts["test"])
        if k is None or kind != "vote" or k <= saved.probe.n_kept:
            return _of_neurons(steered, saved.shifts(size, k))
    assert vote is not None
    check_polarities(path, probe, vote)
    train = planned_negs(steered.run.directory, parts.get(SUMS) or parts["train"])
    n_total = train.n_layers * train.n_neurons
    if not 1 <= k <= n_total:
        raise RunError(f"the best {k} neurons cannot be shifted; {dataset.model} has 1 to {n_total}")
    return _of_neurons(steered, rank(train, vote.rule, vote.signal).top(k).shifts(size, train.n_neurons))


def _of_neurons(steered: SteeredRun, shifts: Sequence[Shift]) -> list[Shift]:
    shapes = steered.planned.card.layer_shapes
    return [one for one in shifts if one[1] < shapes[one[0]].n_neurons]


def _check_origin(saved: SavedProbe, split: ShardSet) -> None:
    """Refuse a probe whose neurons are not those that the run measures."""
    here, there = ({name: of[name] for name in _SAME} for of in (split.identity.comparable(), saved.origin.identity))
    if found := difference(here, there):
        raise ProbeError(
            f"{str(saved.path)!r} is of other neurons than this run's (this run here, the probe there: {found}): fit "
            "it again"
        )


def side_effect(
    lm: LanguageModel, dataset: PlannedDataset, shifts: Sequence[Shift], n_rows: int, on_row: Callable[[int], None]
) -> SideEffect:
    """Measure what shifts at the last token of prompts do to the answers to a dataset's first test rows.

    An answer is the most probable option.

    Parameters
    ----------
    n_rows : int
        Most rows; they are in an order that the run's seed drew.
    on_row : callable
        Told the number of rows that are done, after each.
    """
    joint = joint_shift(lm, shifts)
    rows = _test(dataset).examples[:n_rows]
    probs_P2O = np.empty((len(rows), 2, len(rows[0].labels)))
    with in_float32(lm):
        for done, one in enumerate(shift_together(lm, encoded_prompts(rows), lambda _: [joint]), 1):
            probs_P2O[one.prompt] = one.base_O, one.values_RO[0]
            on_row(done)
    gold_P = [row.answer for row in rows]
    effect = effect_of(gold_P, probs_P2O[:, 0], probs_P2O[:, 1], n_bootstrap=_BOOTSTRAP)
    return SideEffect(dataset.dataset.name, effect)


def n_side_rows(dataset: PlannedDataset, n_rows: int) -> int:
    """Return the number of rows that `side_effect` takes of a dataset."""
    return min(n_rows, len(_test(dataset).examples))


def _test(dataset: PlannedDataset) -> ShardSet:
    """Return the test split; of rows that were asked in several orders of their options, the given order alone."""
    (test,) = [split for split in dataset.splits if split.place.part == "test"]
    refuse_unusual(test.examples, "steered answers")
    if not test.identity.is_permuted:
        return test
    return replace(test, examples=tuple(one for one in test.examples if split_id(one.id).is_given))
