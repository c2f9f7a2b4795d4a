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

    The order depends on the seed, the draw, and the names of dataset and split; not on workers or shards.
    """
    named = f"{split.place.dataset}/{split.place.part}".encode()
    random = np.random.default_rng([abs(seed), draw, *named])
    return split.with_gold(random.permutation(split.gold_P))


def permuted_row(
    run: SkillRun, planned: PlannedDataset, probe: str, draw: int, n_neurons: int | None, right: Accuracy
) -> ControlRow:
    """Return the row of a probe that was fitted on permuted answers."""
    place = (planned.model, run.shots, planned.dataset.name, probe)
    return _row(place, "permuted answers", draw, run.seed, n_neurons, right)


def random_weights_row(
    place: tuple[str, int, str, str], seed: int, n_neurons: int | None, right: Accuracy
) -> ControlRow:
    """Return the row of a probe of a model with random weights, by its model, shots, dataset and name."""
    return _row(place, "random weights", 0, seed, n_neurons, right)


def _row(
    place: tuple[str, int, str, str], control: Control, draw: int, seed: int, n_neurons: int | None, right: Accuracy
) -> ControlRow:
    model, shots, dataset, probe = place
    low, high = right.interval
    return ControlRow(
        model=model,
        shots=shots,
        dataset=dataset,
        probe=probe,
        control=control,
        draw=draw,
        seed=seed,
        n_neurons=n_neurons,
        accuracy=right.value,
        low=low,
        high=high,
        n_correct=right.n_correct,
        n_test=right.n,
    )
