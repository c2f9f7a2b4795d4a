"""The best neurons of a run's vote probes, as a table: which they are, how sure their places are, what they do."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from negcore.analysis.neurons import N_TOP, described
from negcore.datasets import Dataset
from negcore.measure.votes import Ranking, Vote
from negcore.probing.rankings import Rankings
from negcore.store.reader import NegSplit
from tasks.config.dataset_runs import ProbeName, SkillRun
from tasks.config.recipes import RECIPES
from tasks.plan import PlannedDataset
from tasks.pool.base import Pool
from tasks.rank import count_ahead
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
    tops = {vote: Ranking.from_scores(rankings.votes_M[vote]).top(N_TOP).order_K for vote in vote_probes(run).values()}
    if not tops:
        return []
    ahead = count_ahead(pool, run.directory, ranked, tops, step, seed=run.seed, n_blocks=run.workers)
    place: dict[str, Any] = {"model": planned.model, "shots": run.shots, "dataset": planned.dataset.name, "group": ""}
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
