"""The best neurons of a run's vote probes, as a table: which they are, how sure their places are, what they do."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from negcore.analysis.neurons import N_TOP, described, top_neurons
from negcore.datasets import Dataset
from negcore.errors import RunError
from negcore.measure.votes import Ranking, Vote
from negcore.probing.rankings import Rankings, of_neurons
from negcore.store.files import n_bytes
from negcore.store.reader import NegSplit
from negcore.targets import DEFAULT_TARGET
from tasks.config.dataset_runs import ProbeName, SkillRun
from tasks.config.recipes import RECIPES
from tasks.plan import SUMS, PlannedDataset
from tasks.pool.base import Pool
from tasks.rank import count_ahead, ranking_workers
from tasks.run_negs import StoredSplit, stored_splits
from tasks.rundir.manifest import check_results
from tasks.rundir.tables import read_table
from tasks.steps import Step

NEURONS_FILE = "neurons.arrow"


@dataclass(frozen=True)
class NeuronRow:
    """One of the best neurons of a probe's ranking on one dataset's training rows; see `TopNeuron` for the numbers."""

    model: str
    shots: int
    dataset: str
    group: str
    """Empty: neurons are ranked on all training rows together, as the probes are."""
    probe: str
    place: int
    """Place in the ranking, from 1."""
    layer: int
    neuron: int
    polarity: int
    score: int
    agreement: float | None
    """Share of bootstrap samples of the training rows in which the neuron stays among the 20 best; with the two
    places, None where the storage level keeps no rows."""
    place_low: int | None
    """5 % quantile of its place over these samples."""
    place_high: int | None
    """95 % quantile."""
    random_score: float
    """Mean absolute score of the neurons in its layer."""
    mean_negs: list[float] | None
    """Mean NEG over the training rows by option; None where their values are not stored."""
    labels: list[str] | None
    """Labels of the options; None where they differ from row to row."""
    name: str = ""
    """Name of the neuron; empty in tables of earlier versions, where it is ``layer.neuron``."""
    active: float | None = None
    """Share of the training rows that have the neuron, in a mixture of experts; else None."""
    target: str = DEFAULT_TARGET
    """The number of an option whose slope NEGs are."""


def neuron_rows(
    run: SkillRun,
    planned: PlannedDataset,
    ranked: NegSplit,
    values: NegSplit,
    rankings: Rankings,
    pool: Pool,
    step: Step,
) -> list[NeuronRow]:
    """List the best neurons of every vote probe of a run on one dataset.

    Parameters
    ----------
    ranked : NegSplit
        What the neurons were ranked on: training rows, or their vote sums.
    values : NegSplit
        Training rows with values, if any are stored.
    rankings : Rankings
    pool : Pool
        Pool of `RankWorker`.

    Raises
    ------
    RunError
        If a block of layers cannot be ranked.
    Stopped
        If the step is to stop.
    """
    scores = {vote: of_neurons(ranked, rankings.votes_M[vote]) for vote in vote_probes(run).values()}
    tops = {vote: Ranking.from_scores(scores_M).top(N_TOP).order_K for vote, scores_M in scores.items()}
    if not tops:
        return []
    ahead = count_ahead(pool, run.directory, ranked, tops, step, seed=run.seed, n_blocks=ranking_workers(run))
    place: dict[str, Any] = {"model": planned.model, "shots": run.shots, "dataset": planned.dataset.name, "group": ""}
    place["target"] = ranked.target
    labels = common_labels(planned.dataset)
    return [
        NeuronRow(**place, probe=probe, **asdict(one), labels=labels)
        for probe, vote in vote_probes(run).items()
        for one in described(rankings.votes_M[vote], tops[vote], ahead.get(vote), values)
    ]


def vote_probes(run: SkillRun) -> Mapping[ProbeName, Vote]:
    """Return the probes of a run that are votes of the neurons that they rank, each with its vote."""
    return {name: vote for name in run.probe if (vote := RECIPES[name].vote) and RECIPES[name].kind == "vote"}


def common_labels(dataset: Dataset) -> list[str] | None:
    """Return the labels of the options, if those of all training rows are the same."""
    first, *others = {example.labels for example in dataset.splits["train"]}
    return None if others else list(first)


# Those of a run directory


class BestNeurons(NamedTuple):
    """Best neurons as a run directory tells them, and what must be read with care."""

    rows: list[NeuronRow]
    warnings: list[str]


def best_neurons(
    directory: Path, probe: str, *, datasets: Sequence[str] = (), model: str | None = None, top: int = N_TOP
) -> BestNeurons:
    """List the best neurons of a probe on the datasets of a run: from its table, or ranked anew from its shards.

    Parameters
    ----------
    probe : str
        Name of a vote probe, of the run or not.
    datasets : sequence of str
        Names of datasets. By default all.
    model : str, optional
        Name of a model. By default all.

    Raises
    ------
    NegError
        If the probe, a dataset or the model is unknown, the table is not of the shards beside it, or shards are missing
        or damaged.
    """
    votes = {name: recipe.vote for name, recipe in RECIPES.items() if recipe.kind == "vote"}
    if probe not in votes:
        raise RunError(f"probe {probe!r} ranks no neurons by votes: give one of {', '.join(votes)}")
    found = stored_splits(directory, ("train", SUMS), model=model, datasets=datasets)
    # Vote sums rank all neurons, and the training rows beside them are stored for chosen ones only.
    ranked = {(one.root, one.place.model, one.place.dataset): one for one in sorted(found, key=_has_sums)}
    wanted = {key[1:] for key in ranked}
    rows, warnings = listed_neurons(directory)
    told = [row for row in rows if row.probe == probe and (row.model, row.dataset) in wanted]
    if top == N_TOP and len({(row.model, row.shots, row.dataset) for row in told}) == len(ranked):
        return BestNeurons(told, warnings)
    vote = votes[probe]
    assert vote is not None
    labels = {(row.model, row.dataset): row.labels for row in rows}
    return BestNeurons([row for one in ranked.values() for row in _ranked_anew(one, probe, vote, top, labels)], [])


def _has_sums(stored: StoredSplit) -> bool:
    return stored.place.part == SUMS


def listed_neurons(directory: Path) -> BestNeurons:
    """Return the rows of a run's table of best neurons; none if it has no such table.

    Raises
    ------
    RunError
        If the table is not of the shards beside it.
    """
    table = directory / NEURONS_FILE
    if n_bytes(table) is None:
        return BestNeurons([], [])
    warning = check_results(directory, [table])
    return BestNeurons(read_table(table, NeuronRow), [warning] if warning else [])


def _ranked_anew(
    stored: StoredSplit, probe: str, vote: Vote, top: int, labels: Mapping[tuple[str, str], list[str] | None]
) -> list[NeuronRow]:
    split = stored.open()
    seed, shots = (int(split.identity.prompt.get(name, 0)) for name in ("seed", "shots"))
    return [
        NeuronRow(
            model=stored.place.model,
            shots=shots,
            dataset=stored.title,
            group="",
            probe=probe,
            **asdict(one),
            labels=labels.get(stored.place[1:3]),
            target=split.target,
        )
        for one in top_neurons(split, *vote, top=top, seed=seed)
    ]
