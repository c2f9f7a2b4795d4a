"""Controls of probes: the accuracy that is left where the right answers are permuted, or the weights are random.

Permuted answers tell what a probe's search among so many neurons finds by chance on so few rows. A model with random
weights tells what its neurons know without training: the words of a prompt, and not what they mean.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from negcore.probing.evaluation import Accuracy
from negcore.store.reader import NegSplit
from tasks.config.dataset_runs import SkillRun
from tasks.plan import PlannedDataset

Control = Literal["permuted answers", "random weights"]


@dataclass(frozen=True)
class ControlRow:
    """Accuracy on test of a probe under a control; the test rows keep their right answers."""

    model: str
    shots: int
    dataset: str
    probe: str
    control: Control
    draw: int
    """From 0, of the permutations; the same permutation for all probes of a dataset."""
    seed: int
    """Seed of the permutations, which the number of the draw stands beside, or of the random weights."""
    n_neurons: int | None
    accuracy: float
    low: float
    """Lower end of the 95 % interval (Wilson)."""
    high: float
    n_correct: int
    n_test: int


def with_permuted_gold(split: NegSplit, seed: int, draw: int) -> NegSplit:
    """Return a split whose gold options are permuted over its rows: each is as frequent as before.

    Where rows were asked in several orders of their options, it is their answers that are permuted, not letters.
    The order depends on the seed, the draw, and the names of dataset and split; not on workers or shards.
    """
    named = f"{split.place.dataset}/{split.place.part}".encode()
    random = np.random.default_rng([abs(seed), draw, *named])
    gold_R = random.permutation(split.answers.gold_R(split.gold_P))
    return split.with_gold(split.answers.letters_P(gold_R).astype(np.int16))


def permuted_row(
    run: SkillRun, planned: PlannedDataset, probe: str, draw: int, n_neurons: int | None, right: Accuracy
) -> ControlRow:
    """Return the row of a probe that was fitted on permuted answers."""
    return ControlRow(
        model=planned.model,
        shots=run.shots,
        dataset=planned.dataset.name,
        probe=probe,
        control="permuted answers",
        draw=draw,
        seed=run.seed,
        n_neurons=n_neurons,
        **right.columns,
    )
