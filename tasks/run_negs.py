"""NEGs in a run directory for those who look into it, whatever kind of run made them, and the prompts behind them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from negcore.datasets import Example, dataset_name, load_dataset
from negcore.errors import RunError
from negcore.model.language_model import ModelCard, describe_model
from negcore.store.identity import prompt_hash
from negcore.store.publish import ShardPlace
from negcore.store.reader import NegSplit, open_negs
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import recorded_run
from tasks.rundir.layout import shard_folders


@dataclass(frozen=True)
class StoredSplit:
    """A split whose NEGs are in a run directory."""

    root: Path
    """The directory that holds its run file: the run's, or one of its parts'."""
    part: str
    """That directory below the run's, such as ``shots-1``; empty for the run's own."""
    place: ShardPlace

    @property
    def title(self) -> str:
        """Name of its dataset for people, with the part of the run that it is in."""
        return f"{self.place.dataset} ({self.part})" if self.part else self.place.dataset

    def open(self) -> NegSplit:
        """Open its shards, checked; errors as of `open_negs`."""
        return open_negs(self.root).at(self.place)


def stored_splits(
    directory: Path, splits: Collection[str], *, model: str | None = None, datasets: Sequence[str] = ()
) -> list[StoredSplit]:
    """List the splits of these names in a run directory.

    Parameters
    ----------
    splits : collection of str
        Names of splits, such as ``test``.
    model : str, optional
        Name of a model. By default any.
    datasets : sequence of str
        Names of datasets. By default all.

    Raises
    ------
    RunError
        If there is no such directory, or it holds no NEGs, or none of such a model or dataset.
    """
    found = [
        StoredSplit(folder.root, "" if folder.root == directory else str(folder.root.relative_to(directory)), place)
        for folder in shard_folders(directory)
        if folder.kind == "negs" and (place := ShardPlace("negs", *folder.names)).part in splits
    ]
    if not found:
        raise RunError(f"{str(directory)!r} holds no NEGs of split {' or '.join(splits)}: give a run on datasets")
    _check_known("dataset", datasets, [one.place.dataset for one in found])
    _check_known("model", [model] if model else [], [one.place.model for one in found])
    return [
        one for one in found if model in (None, one.place.model) and (not datasets or one.place.dataset in datasets)
    ]


def _check_known(what: str, wanted: Sequence[str], known: Sequence[str]) -> None:
    for name in wanted:
        if name not in known:
            raise RunError(f"{what} {name!r} is not in this run; it has {', '.join(dict.fromkeys(known))}")


def only_model(splits: Sequence[StoredSplit]) -> str:
    """Return the model of all of them; refuse several, since their neurons have nothing to do with each other."""
    first, *others = dict.fromkeys(one.place.model for one in splits)
    if others:
        raise RunError(f"this run has several models, so name one with --model: {', '.join((first, *others))}")
    return first


def run_of(split: StoredSplit) -> SkillRun:
    """Return the run that made a split.

    Raises
    ------
    RunError
        If its run file cannot be read, or is not that of a run on datasets.
    """
    run = recorded_run(split.root)
    if not isinstance(run, SkillRun):
        raise RunError(f"{str(split.root)!r} holds the run file of a {run.kind} run, not of one on datasets")
    return run


def card_of(split: StoredSplit) -> ModelCard:
    """Describe the model of a split anew, from where its run file says it is.

    Raises
    ------
    RunError
        If the run file names no such model, or the run gave it random weights.
    ModelError
        If it cannot be found or read.
    """
    if run_of(split).random_weights is not None:
        raise RunError(f"{str(split.root)!r}: its numbers are of random weights, not of {split.place.model!r} itself")
    return _described(split)


def _described(split: StoredSplit) -> ModelCard:
    """Describe the model of a split, or the one whose configuration and tokenizer it has with random weights."""
    for ref, name in run_of(split).model_names.items():
        if name == split.place.model:
            return describe_model(ref, name)
    raise RunError(f"{str(split.root)!r}: its run file names no model {split.place.model!r}")


def examples_of(split: StoredSplit, card: ModelCard, negs: NegSplit) -> dict[str, Example]:
    """Make the prompts of a split again from the run's data, by row id; only those whose text was measured.

    Shards hold hashes of prompts, so the texts come from the data, where they are now.

    Raises
    ------
    NegError
        If the run file or the dataset cannot be read, or the run file names no such dataset.
    """
    run, dataset = run_of(split), split.place.dataset
    for name in run.dataset:
        if dataset_name(name) == dataset:
            settings = run.prompts(name)
            loaded = load_dataset(name, card.tokenizer, settings=settings, root=run.mceval8k, masked=card.arch.masked)
            hashes = dict(zip(negs.ids, negs.text_hashes, strict=True))
            rows = loaded.splits[split.place.part]
            return {row.id: row for row in rows if hashes.get(row.id) == prompt_hash(row)}
    raise RunError(f"{str(split.root)!r}: its run file names no dataset {dataset!r}")


def units_of(splits: Sequence[StoredSplit]) -> list[str]:
    """Return the unit of every row of a run's splits, in their order; empty for a row of none.

    Raises
    ------
    NegError
        As of `describe_model` and `examples_of`; `RunError` also if the data no longer has a row as it was measured.
    """
    card = _described(splits[0])
    found: list[str] = []
    for split in splits:
        negs = split.open()
        examples = examples_of(split, card, negs)
        if missing := [id_ for id_ in negs.ids if id_ not in examples]:
            raise RunError(f"{split.title}: the data has no row {missing[0]!r} as it was measured")
        found.extend(examples[id_].unit for id_ in negs.ids)
    return found
