"""The plan of a run on datasets, checked before any model is loaded."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from negcore.datasets import Change, Dataset, PromptSettings, dataset_name, load_dataset
from negcore.datasets.base import REMEDY, in_one_line
from negcore.datasets.splits import SPLIT_RULES
from negcore.errors import DatasetError, LabelError, ModelError, NegError, PromptError, RunError
from negcore.measure.forward import common_prefix_length
from negcore.measure.random_weights import random_revision
from negcore.model.language_model import ModelCard, describe_model, refuse_experts
from negcore.model.layer_shapes import shapes_json
from negcore.probing.fitted import check_forest_size
from negcore.store.identity import DEFAULT_STORAGE, RunIdentity, choice_digest
from negcore.store.publish import ShardPlace
from negcore.targets import DEFAULT_TARGET, Target, check_options
from tasks.certificates import plan_sweeps
from tasks.config.dataset_runs import SkillRun
from tasks.config.recipes import n_stored, reads_training_values
from tasks.config.run_file import RunFile
from tasks.config.wordings import wording_for
from tasks.measure.examples import EncodedExample, encode_examples, unreadable
from tasks.measure.measurement import study_settings
from tasks.measure.negs import NegMeasurement
from tasks.measure.shard_set import ShardSet
from tasks.model_plans import ModelPlans, plan_models
from tasks.names import check_distinct
from tasks.prompt_warnings import prompt_warnings

PACKAGES = ("neg-at-scale", "torch", "transformers", "numpy", "pyarrow")

RANDOM = " (random weights)"
"""Note behind the name of a model whose weights are random."""

SUMS = "train-sums"
"""The split that holds vote sums of the training prompts, with storage "stats": neurons are chosen by them."""


@dataclass(frozen=True)
class PlannedDataset:
    """One dataset as one model will read it."""

    model: str
    dataset: Dataset
    splits: tuple[ShardSet, ...]
    """In the order they are measured: what neurons are chosen by comes first."""
    warnings: tuple[str, ...] = ()
    """One line for everything that must be read with care."""
    random_weights: bool = False
    """True if the model's weights are random."""
    sweeps: tuple[ShardSet, ...] = ()
    """Sweeps of a few neurons, which certify the NEGs of the others."""

    @property
    def shard_sets(self) -> tuple[ShardSet, ...]:
        """All that is measured."""
        return self.splits + self.sweeps

    @property
    def name(self) -> str:
        """Model, dataset and how it is asked, for people."""
        return f"{self.model}{RANDOM * self.random_weights} {self.dataset.name}{_asked(self.dataset.settings)}"


@dataclass(frozen=True)
class PlannedModel:
    """One model and everything it is to be measured on."""

    card: ModelCard
    datasets: tuple[PlannedDataset, ...]
    problems: tuple[str, ...] = ()
    """Datasets that cannot be used, and why."""

    @property
    def n_shards(self) -> int:
        return sum(len(one.shards) for dataset in self.datasets for one in dataset.shard_sets)


def plan(run: SkillRun, *, tolerant: bool = False, refs: Sequence[str] = ()) -> ModelPlans[PlannedModel]:
    """Read every dataset with every model's tokenizer and check all prompts and labels.

    Parameters
    ----------
    run : SkillRun
    tolerant : bool
        True to go on without the datasets that cannot be used, as long as there are others.
    refs : sequence of str
        References of some of the run's models, of which alone a plan is made. By default all.

    Raises
    ------
    NegError
        If no model can be used: it or a dataset is unknown, a dataset empty or malformed, a prompt too long, or a
        label not one token.
    """
    known: _Known = {}
    check_distinct("datasets", run.dataset, dataset_name)
    check_distinct("models", run.model_refs, run.model_names.__getitem__)
    return plan_models(refs or run.model_refs, lambda ref: _plan_model(run, ref, tolerant, known))


def plan_usable(run: SkillRun) -> ModelPlans[PlannedModel]:
    """Plan a run without the datasets that cannot be used, as long as there are others; errors as of `plan`."""
    return plan(run, tolerant=True)


Planned = Sequence[tuple[SkillRun, ModelPlans[PlannedModel]]]
"""Runs that differ in their prompts alone, each with its plan."""


def of_each_model(planned: Planned) -> list[list[tuple[SkillRun, PlannedModel]]]:
    """Return the plans by model, one with random weights apart from it, each with the run that it is of.

    A run may have to do without a model.
    """
    by_model: dict[tuple[str, int | None], list[tuple[SkillRun, PlannedModel]]] = {}
    for run, models in planned:
        for model in models:
            by_model.setdefault((model.card.name, run.random_weights), []).append((run, model))
    return list(by_model.values())


_Known = dict[tuple[str, str], Dataset]
"""Datasets by name and fingerprint: models that are asked the same text share it in memory."""


def _plan_model(run: SkillRun, ref: str, tolerant: bool, known: _Known) -> PlannedModel:
    card = describe_model(ref, run.model_names[ref])
    _check_experts(run, card)
    card.arch.site(run.site)
    datasets: list[PlannedDataset] = []
    errors: list[NegError] = []
    for name in dict.fromkeys(run.dataset):
        try:
            datasets.append(_plan_dataset(run, card, name, known))
        except NegError as error:
            if not tolerant:
                raise
            errors.append(error)
    if errors and not datasets:
        raise errors[0]
    return PlannedModel(card, tuple(datasets), tuple(f"{error}" for error in errors))


def check_router(run: RunFile, card: ModelCard) -> None:
    """Refuse a choice of the router for a model that has none.

    Raises
    ------
    ModelError
    """
    if run.router != "through" and not card.has_experts:
        what = f"router {run.router!r} is for mixtures of experts"
        raise ModelError(f"model {card.name!r} has no experts, and {what}: leave it out")


def _check_experts(run: SkillRun, card: ModelCard) -> None:
    """Refuse what a run asks of a mixture of experts and is not made for it, or of another model and means nothing.

    Raises
    ------
    ModelError
    """
    check_router(run, card)
    if not card.has_experts:
        return
    if run.certify:
        refuse_experts(card, "certificates", "leave --certify out")


def _plan_dataset(run: SkillRun, card: ModelCard, name: str, known: _Known) -> PlannedDataset:
    dataset, encoded = read_dataset(card, name, run.prompts(name), run.mceval8k)
    dataset = known.setdefault((dataset.name, dataset.fingerprint), dataset)
    chosen = wording_for(run.wording, name)
    wording = chosen if isinstance(chosen, str) else chosen.model_dump()
    prompt = {
        "shots": run.shots,
        "wording": wording,
        "prompt_format": run.prompt_format,
        "system_prompt": run.system_prompt,
        "seed": run.seed,
        "split_policy": run.split_policy,
        "split_rules": SPLIT_RULES,
    }
    if run.permutations != 1:  # runs have the identities from before there was a choice
        prompt["permutations"] = run.permutations
    prompt |= _check_unusual(run, card, encoded)
    identity = run_identity(run, card, prompt, dataset.fingerprint, storage=run.storage, target=run.target)
    splits: list[ShardSet] = []
    for split, examples in encoded.items():
        _check(dataset.name, run.level.check_n_options, len(examples[0].labels))
        _check(dataset.name, check_options, run.target, len(examples[0].labels))
        splits += [_shard_set(run, identity, dataset, part, examples, k) for part, k in _passes(run, identity, split)]
    check_sample_rows(run, dataset.name, dataset.split_report.n_used["train"])
    if "tree" in run.probe:
        n_kept = min(run.tree_neurons, card.n_layers * card.layer_width)
        _check(dataset.name, check_forest_size, len(dataset.splits["train"]), n_kept)
    return PlannedDataset(
        card.name,
        dataset,
        tuple(splits),
        prompt_warnings(card, dataset),
        random_weights=run.random_weights is not None,
        sweeps=tuple(plan_sweeps(run, split) for split in splits if run.certify and split.place.part == "test"),
    )


def _check_unusual(run: SkillRun, card: ModelCard, encoded: Mapping[str, Sequence[EncodedExample]]) -> dict[str, str]:
    """Return what is unusual in how prompts are read, which identities name; refuse what cannot be read so.

    Raises
    ------
    ModelError
        If the model has experts, or its weights are to pass through its device.
    """
    probes = any(example.probed is not None for examples in encoded.values() for example in examples)
    unusual: dict[str, str] = {"answers": run.answers} if run.answers != "token" else {}
    unusual |= {"probed": "probe_at"} if probes else {}
    if unusual:
        refuse_experts(card, "probe_at and answers of several tokens", "ask for labels of one token at a prompt's end")
        if isinstance(run.placement, str) and run.placement != "auto":
            raise ModelError(
                f"model {card.name!r}: weights that wait on {run.placement} pass for one token at a prompt's end; "
                "for probe_at and answers of several tokens leave device_map out, or spread the model with gpus"
            )
    return unusual


def check_sample_rows(run: SkillRun, dataset: str, n_rows: int) -> None:
    """Refuse samples that would hold all training rows of a dataset, as their accuracies would not differ.

    Raises
    ------
    RunError
    """
    if run.sample_rows is not None and run.sample_rows >= n_rows:
        raise RunError(
            f"{dataset}: samples are to have {run.sample_rows} rows, and there are {n_rows} training rows: make them "
            "smaller, best half as large or less"
        )


def read_dataset(
    card: ModelCard, name: str, settings: PromptSettings, root: Path | None = None
) -> tuple[Dataset, dict[str, tuple[EncodedExample, ...]]]:
    """Read a dataset as a model will: its prompts and labels, checked, and their token ids by split.

    Raises
    ------
    NegError
        If the dataset cannot be used by this model; the first row at fault is named, with its place.
    """
    with _naming(f"{name}, model {card.name}"):
        dataset = load_dataset(name, card.tokenizer, settings=settings, root=root, masked=card.arch.masked)
    ShardPlace("negs", card.name, dataset.name, "train").check()
    if settings.unreadable == "skip":
        dataset = _readable(card, dataset)
    return dataset, {split: _encoded_rows(card, dataset, split) for split in dataset.splits}


def _readable(card: ModelCard, dataset: Dataset) -> Dataset:
    """Return the dataset without the rows that the model cannot read, and with their number in its report."""
    answers = dataset.settings.answers
    odd = {split: unreadable(card, examples, answers) for split, examples in dataset.splits.items()}
    if not any(odd.values()):
        return dataset
    row_of = dataset.settings.row_of
    reasons = {split: {row_of(id_): reason for id_, reason in of_split.items()} for split, of_split in odd.items()}
    splits = {
        split: tuple(example for example in examples if row_of(example.id) not in reasons[split])
        for split, examples in dataset.splits.items()
    }
    left_out = [Change(split, len(rows), in_one_line(rows)) for split, rows in reasons.items() if rows]
    report = dataset.split_report
    used = {split: n_used - len(reasons[split]) for split, n_used in report.n_used.items()}
    report = replace(report, n_used=used, dropped=(*report.dropped, *left_out))
    return replace(dataset, splits=splits, split_report=report)


def _passes(run: SkillRun, identity: RunIdentity, split: str) -> Iterator[tuple[str, int | None]]:
    """Yield what is made of a split: the name of the part, and the number of neurons it stores if not of all.

    With storage "stats" these are vote sums to choose neurons by, and the numbers of these neurons.
    """
    if not run.level.has_vote_sums:
        yield split, None
        return
    if split == "train":
        yield SUMS, None
    if split != "train" or reads_training_values(run):
        yield split, n_stored(run, identity.n_layers * identity.n_neurons, has_experts=identity.experts is not None)


def _shard_set(
    run: SkillRun,
    identity: RunIdentity,
    dataset: Dataset,
    part: str,
    examples: tuple[EncodedExample, ...],
    n_chosen: int | None,
) -> ShardSet:
    n_shared = common_prefix_length([example.token_ids for example in examples])
    return ShardSet(
        place=ShardPlace("negs", identity.model, dataset.name, part),
        identity=identity if n_chosen is None else replace(identity, neurons=""),
        examples=examples,
        measurement=NegMeasurement.of(
            identity, storage=run.storage, batch_size=run.batch_size, n_chosen=n_chosen, n_shared=n_shared
        ),
        shard_rows=run.shard_rows,
        nonfinite=run.nonfinite,
        title=f"{identity.model}{_weights(run)} {dataset.name} {part}{_asked(dataset.settings)}",
    )


def run_identity(
    run: RunFile,
    card: ModelCard,
    prompt: Mapping[str, Any],
    fingerprint: str,
    *,
    storage: str = DEFAULT_STORAGE,
    target: Target = DEFAULT_TARGET,
    study: Mapping[str, Any] | None = None,
) -> RunIdentity:
    """Return the identity of what a run measures of a model on some prompts.

    Parameters
    ----------
    prompt : mapping
        Prompt settings, as JSON.
    fingerprint : str
        Of the dataset.
    storage, target, study
        As in `RunIdentity`.
    """
    return RunIdentity(
        model=card.name,
        model_revision=_revision(run, card),
        tokenizer_hash=card.tokenizer_digest,
        site=card.arch.site(run.site),
        dtype=run.dtype,
        n_layers=card.n_layers,
        n_neurons=card.layer_width,
        prompt=prompt,
        dataset_fingerprint=fingerprint,
        storage=storage,
        target=target,
        study=None if study is None else study_settings(study, run.dtype),
        experts={"router": run.router, "layers": shapes_json(card.layer_shapes)} if card.has_experts else None,
        versions={package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
    )


def _weights(run: RunFile) -> str:
    return "" if run.random_weights is None else RANDOM


def _revision(run: RunFile, card: ModelCard) -> str:
    return card.revision if run.random_weights is None else random_revision(card.revision, run.random_weights)


def choosing(split: ShardSet, neurons: tuple[int, ...]) -> ShardSet:
    """Return a split of storage "stats" with the neurons whose numbers it is to store: flat indices, rising."""
    measurement = split.measurement
    assert isinstance(measurement, NegMeasurement) and len(neurons) == measurement.n_chosen, measurement
    return replace(
        split,
        measurement=replace(measurement, neurons=neurons),
        identity=replace(split.identity, neurons=choice_digest(neurons)),
    )


def n_chosen(split: ShardSet) -> int | None:
    """Return the number of neurons whose numbers a split stores; None if it stores those of all, or vote sums."""
    return split.measurement.n_chosen if isinstance(split.measurement, NegMeasurement) else None


def _asked(settings: PromptSettings) -> str:
    wording = settings.wording if isinstance(settings.wording, str) else settings.wording.name
    parts = ["one-shot"] * settings.shots
    parts += ["chat"] * (settings.prompt_format == "chat")
    parts += [f"demonstrations {settings.demonstrations}"] if settings.demonstrations else []
    parts += [wording] if wording != "default" else []
    parts += ["answers of several tokens"] * (settings.answers != "token")
    parts += [f"{settings.permutations} orders"] if settings.permutations != 1 else []
    return "".join(f" {part}" for part in parts)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Name in an error about prompts or labels what they are of."""
    try:
        yield
    except (LabelError, PromptError) as error:
        raise type(error)(f"{what}: {error}") from None


def _check(dataset: str, check: Callable[..., None], *args: Any) -> None:
    """Make a check whose error is to name the dataset."""
    try:
        check(*args)
    except NegError as error:
        raise DatasetError(f"{dataset}: {error}") from None


def _encoded_rows(card: ModelCard, dataset: Dataset, split: str) -> tuple[EncodedExample, ...]:
    if not dataset.splits[split]:
        raise DatasetError(
            f"{dataset.name}: split {split!r} has no rows; use a larger limit, split policy 'clean' or another dataset"
        )
    where, answers = f"{dataset.name}, split {split!r}", dataset.settings.answers
    return encode_examples(card, where, dataset.splits[split], f"; {REMEDY}", answers=answers)
