"""Vote probes fitted again on samples of the training rows: how much accuracies depend on these rows.

Axes: B samples, P training rows, M neurons of all layers.
"""

from dataclasses import dataclass

import numpy as np

from negcore.analysis.neurons import sample_rows
from negcore.arrays import Ints
from negcore.datasets.splits import stratified_sample
from negcore.probing.evaluation import accuracy
from negcore.probing.fitted import fit_vote
from negcore.probing.rankings import of_neurons
from negcore.store.reader import NegSplit
from tasks.config.dataset_runs import ProbeName, SkillRun
from tasks.neurons import vote_probes
from tasks.plan import PlannedDataset, check_sample_rows
from tasks.pool.base import Pool
from tasks.rank import ranking_workers, sample_scores
from tasks.steps import Step


@dataclass(frozen=True)
class ResampleRow:
    """Accuracy on test of a probe that was fitted on one sample of the training rows.

    The rows of valid, which choose the number of neurons, and of test are the same in every sample.
    """

    model: str
    shots: int
    dataset: str
    probe: str
    sample: int
    """From 0; the samples of a dataset are the same for all its probes."""
    seed: int | None
    """Seed of a sample without replacement; None for a bootstrap sample, with replacement."""
    n_train: int
    """Prompts in the sample, of the `n_train_all` that were measured."""
    n_train_all: int
    n_neurons: int
    accuracy: float
    n_correct: int
    n_test: int


@dataclass(frozen=True)
class _StoredRow:
    """As much of a row as a sample is drawn by."""

    id: str
    answer: int
    group: str


def sample_counts(run: SkillRun, dataset: str, train: NegSplit) -> Ints:
    """Count how often each training row is in each sample: shape (B, P). All orders of a row are in it, or none.

    With `run.sample_rows`, a sample is what ``--limit`` draws of these rows under the run's seed and those after it, in
    proportion to answers and groups. Without, it is as large as the split and drawn from it with replacement.

    Raises
    ------
    RunError
        If a sample would hold all rows.
    """
    if run.sample_rows is None:
        return sample_rows(train, run.train_samples, run.seed).astype(np.int64)
    view = train.answers
    check_sample_rows(run, dataset, view.n_rows)
    groups = dict(zip(view.row_P.tolist(), train.groups, strict=True))
    answers = view.gold_R(train.gold_P).tolist()
    stored = [_StoredRow(row, answers[at], groups[at]) for at, row in enumerate(view.rows)]
    drawn = [
        {row.id for row in stratified_sample(stored, run.sample_rows, seed, dataset, "train")}
        for seed in range(run.seed, run.seed + run.train_samples)
    ]
    return np.array([[row.id in ids for row in stored] for ids in drawn], np.int64)[:, view.row_P]


def resample_rows(
    run: SkillRun,
    planned: PlannedDataset,
    probe: ProbeName,
    train: NegSplit,
    valid: NegSplit,
    test: NegSplit,
    pool: Pool,
    step: Step,
) -> list[ResampleRow]:
    """Fit a vote probe on `run.train_samples` samples of a dataset's training rows, see `sample_counts`.

    Parameters
    ----------
    probe : ProbeName
        One of `vote_probes`.
    train, valid, test : NegSplit
    pool : Pool
        Pool of `RankWorker`.

    Raises
    ------
    RunError
        If a sample would hold all rows, or a block of layers cannot be scored.
    Stopped
        If the step is to stop.
    """
    vote, counts_BP = vote_probes(run)[probe], sample_counts(run, planned.dataset.name, train)
    scores_BM = sample_scores(
        pool, run.directory, train, vote, step, counts_BP=counts_BP, n_blocks=ranking_workers(run)
    )
    rows = []
    for sample, scores_M in enumerate(of_neurons(train, scores_BM)):
        step.check_stop()
        fitted = fit_vote(vote, scores_M.astype(np.int64), valid, max_neurons=run.max_neurons)
        right = accuracy(test.gold_P, fitted.predict(test))
        rows.append(
            ResampleRow(
                model=planned.model,
                shots=run.shots,
                dataset=planned.dataset.name,
                probe=probe,
                sample=sample,
                seed=None if run.sample_rows is None else run.seed + sample,
                n_train=int(counts_BP[sample].sum()),
                n_train_all=train.n_rows,
                n_neurons=fitted.n_kept,
                accuracy=right.value,
                n_correct=right.n_correct,
                n_test=right.n,
            )
        )
    return rows
