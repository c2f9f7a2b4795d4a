"""What a run will do, known and checked before any model is loaded."""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version

from negcore.datasets import Dataset, Example, PromptSettings, load_dataset
from negcore.errors import DatasetError, NegError
from negcore.model.encoding import encode_labels, encode_prompts
from negcore.model.language_model import ModelCard, describe_model
from negcore.probing.fitted import check_forest_size
from negcore.store.codes import check_n_options
from negcore.store.identity import RunIdentity, choice_digest
from negcore.store.publish import Partition
from tasks.config.recipes import n_stored, reads_training_values
from tasks.config.run_file import SkillRun
from tasks.config.wordings import wording_for

PACKAGES = ("neg-at-scale", "torch", "transformers", "numpy", "pyarrow")

SUMS = "train-sums"
"""The split that holds vote sums of the training prompts, with storage "stats": neurons are chosen by them."""


@dataclass(frozen=True)
class PlannedSplit:
    """The rows of one (model, dataset, split), and what makes their numbers."""

    partition: Partition
    examples: tuple[Example, ...]
    identity: RunIdentity
    shard_rows: int
    asked: str
    """How, as far as it is not the default: one-shot, another wording or other demonstrations."""
    n_chosen: int | None = None
    """Neurons whose numbers are stored, if these are chosen by the vote sums."""
    neurons: tuple[int, ...] | None = None
    """Which these are: flat indices, rising; None as long as they are not chosen."""

    def choosing(self, neurons: tuple[int, ...]) -> "PlannedSplit":
        """The split with its neurons chosen."""
        assert len(neurons) == self.n_chosen, (len(neurons), self.n_chosen)
        return replace(self, neurons=neurons, identity=replace(self.identity, neurons=choice_digest(neurons)))

    @property
    def name(self) -> str:
        """Model, dataset, split and how it is asked, for people."""
        return f"{self.partition.model} {self.partition.dataset} {self.partition.split}{self.asked}"

    @property
    def shards(self) -> list[Sequence[Example]]:
        """The examples of every shard, in order."""
        return [
            self.examples[start : start + self.shard_rows] for start in range(0, len(self.examples), self.shard_rows)
        ]


@dataclass(frozen=True)
class PlannedDataset:
    """One dataset as one model will read it."""

    model: str
    dataset: Dataset
    splits: tuple[PlannedSplit, ...]
    """In the order they are made: what neurons are chosen by comes first."""

    @property
    def name(self) -> str:
        """Model, dataset and how it is asked, for people."""
        return f"{self.model} {self.dataset.name}{_asked(self.dataset.settings)}"


@dataclass(frozen=True)
class PlannedModel:
    """One model and everything it is to be measured on."""

    card: ModelCard
    datasets: tuple[PlannedDataset, ...]
    problems: tuple[str, ...] = ()
    """Datasets that cannot be used, and why."""

    @property
    def n_shards(self) -> int:
        return sum(len(split.shards) for dataset in self.datasets for split in dataset.splits)


@cache
def plan(run: SkillRun, *, tolerant: bool = False) -> tuple[PlannedModel, ...]:
    """Read every dataset with every model's tokenizer and check all prompts and labels.

    Parameters
    ----------
    run : SkillRun
    tolerant : bool
        Whether to go on without the datasets that cannot be used, as long as there are others.

    Raises
    ------
    NegError
        If a model or dataset is unknown, a dataset empty or malformed, a prompt too long, or a label not one token.
    """
    known: _Known = {}
    return tuple(_plan_model(run, ref, tolerant, known) for ref in dict.fromkeys(run.model))


_Known = dict[tuple[str, str], Dataset]
"""Datasets by name and fingerprint: models that are asked the same text share it in memory."""


def _plan_model(run: SkillRun, ref: str, tolerant: bool, known: _Known) -> PlannedModel:
    card = describe_model(ref)
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
    return PlannedModel(card, tuple(datasets), tuple(map(str, errors)))


def _plan_dataset(run: SkillRun, card: ModelCard, name: str, known: _Known) -> PlannedDataset:
    dataset = load_dataset(name, card.tokenizer, settings=run.prompts(name), root=run.mceval8k, masked=card.arch.masked)
    dataset = known.setdefault((dataset.name, dataset.fingerprint), dataset)
    chosen = wording_for(run.wording, name)
    wording = chosen if isinstance(chosen, str) else chosen.model_dump()
    identity = RunIdentity(
        model=card.name,
        model_revision=card.revision,
        tokenizer_hash=card.tokenizer_digest,
        site=card.arch.site(run.site),
        dtype=run.dtype,
        n_layers=card.n_layers,
        n_neurons=card.n_neurons,
        prompt={"shots": run.shots, "wording": wording, "seed": run.seed, "split_policy": run.split_policy},
        dataset_fingerprint=dataset.fingerprint,
        storage=run.storage,
        versions={package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
    )
    splits: list[PlannedSplit] = []
    for split, examples in dataset.splits.items():
        _check(card, dataset.name, split, examples)
        if run.storage == "codes":
            _check_codes(dataset.name, examples)
        partition = Partition(card.name, dataset.name, split)
        whole = PlannedSplit(partition, examples, identity, run.shard_rows, _asked(dataset.settings))
        splits += _two_passes(run, whole) if run.storage == "stats" else [whole]
    if "tree" in run.probe:
        _check_forest(run, card, dataset)
    return PlannedDataset(card.name, dataset, tuple(splits))


def _two_passes(run: SkillRun, split: PlannedSplit) -> Iterator[PlannedSplit]:
    """What is made of a split with storage "stats": sums to choose neurons by, and the numbers of these."""
    partition, identity, is_train = split.partition, split.identity, split.partition.split == "train"
    if is_train:
        yield replace(split, partition=partition._replace(split=SUMS))
    if not is_train or reads_training_values(run):
        n_chosen = n_stored(run, identity.n_layers * identity.n_neurons)
        yield replace(split, identity=replace(identity, neurons=""), n_chosen=n_chosen)


def _asked(settings: PromptSettings) -> str:
    wording = settings.wording if isinstance(settings.wording, str) else settings.wording.name
    parts = ["one-shot"] * settings.shots
    parts += [f"demonstrations {settings.demonstrations}"] if settings.demonstrations else []
    parts += [wording] if wording != "default" else []
    return "".join(f" {part}" for part in parts)


def _check_codes(dataset: str, examples: Sequence[Example]) -> None:
    try:
        check_n_options(len(examples[0].labels))
    except NegError as error:
        raise DatasetError(f"{dataset}: {error}") from None


def _check_forest(run: SkillRun, card: ModelCard, dataset: Dataset) -> None:
    try:
        check_forest_size(len(dataset.splits["train"]), min(run.tree_neurons, card.n_layers * card.n_neurons))
    except NegError as error:
        raise DatasetError(f"{dataset.name}: {error}") from None


def _check(card: ModelCard, dataset: str, split: str, examples: Sequence[Example]) -> None:
    if not examples:
        raise DatasetError(
            f"{dataset}: split {split!r} has no rows; use a larger limit, split policy 'clean' or another dataset"
        )
    try:
        encode_prompts(card, [example.prompt for example in examples])
        encode_labels(card.tokenizer, [example.labels for example in examples], len(examples))
    except NegError as error:
        raise type(error)(f"{dataset}, split {split!r}, model {card.name}: {error}") from None
