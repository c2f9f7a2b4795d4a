"""Vote probes fitted again on bootstrap samples of the training rows: how much accuracies depend on these rows."""

from dataclasses import dataclass

import numpy as np

from negcore.probing.evaluation import accuracy
from negcore.probing.fitted import fit_vote
from negcore.store.reader import NegSplit
from tasks.config.dataset_runs import ProbeName, SkillRun
from tasks.neurons import vote_probes
from tasks.plan import PlannedDataset
from tasks.pool.base import Pool
from tasks.rank import sample_scores
from tasks.steps import Step


@dataclass(frozen=True)
class ResampleRow:
    """Accuracy on test of a probe that was fitted on one bootstrap sample of the training rows.

    A sample is as large as the training split and drawn from it with replacement. The rows of valid, which choose the
    number of neurons, and of test are the same in every sample.
    """

    model: str
    shots: int
    dataset: str
    probe: str
    sample: int
    """From 0; the samples of a dataset are the same for all its probes."""
    n_neurons: int
    accuracy: float
    n_correct: int
    n_test: int


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
    """Fit a vote probe on `run.train_samples` bootstrap samples of a dataset's training rows.

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
        If a block of layers cannot be scored.
    Stopped
        If the step is to stop.
    """
    vote = vote_probes(run)[probe]
    scores_BM = sample_scores(
        pool, run.directory, train, vote, step, n_samples=run.train_samples, seed=run.seed, n_blocks=run.workers
    )
    rows = []
    for sample, scores_M in enumerate(scores_BM):
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
                n_neurons=fitted.n_kept,
                accuracy=right.value,
                n_correct=right.n_correct,
                n_test=right.n,
            )
        )
    return rows
