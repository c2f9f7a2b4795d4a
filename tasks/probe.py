"""Fit skill-neuron probes to a dataset's NEG shards and score them on its test split."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negcore.evaluation import Accuracy, accuracy, choose_n_neurons, majority_floor, random_floor
from negcore.probes import LMProbe, MagnProbe, PolarProbe
from negcore.reader import NegSplit, open_negs
from negcore.votes import magn_scores, polar_scores
from tasks.runfile import ProbeName

_PROBES = MappingProxyType({"polar": (PolarProbe, polar_scores), "magn": (MagnProbe, magn_scores)})


@dataclass(frozen=True)
class Score:
    """One probe's accuracy on one dataset's test split."""

    model: str
    dataset: str
    probe: str
    n_neurons: int | None
    """Neurons kept, chosen on validation; `None` where a probe keeps none."""
    accuracy: float
    low: float
    """Lower end of the 95 % interval (Wilson)."""
    high: float
    n_test: int
    n_train: int
    majority: float
    """Accuracy of always giving the commonest training answer."""
    random: float
    """Expected accuracy of guessing."""
    overlapping: bool
    """Whether the splits share rows (policy `released`)."""


def probe_dataset(
    root: Path, model: str, dataset: str, probes: Sequence[ProbeName], *, max_neurons: int, overlapping: bool
) -> list[Score]:
    """Fit on train, choose the number of neurons on valid, score on test. LM-Prob comes first.

    Raises
    ------
    ShardError
        If a split is missing, incomplete or damaged.
    """
    negs = open_negs(root)
    train, valid, test = (negs.select(model, dataset, split) for split in ("train", "valid", "test"))
    common = {
        "model": model,
        "dataset": dataset,
        "n_test": test.n_rows,
        "n_train": train.n_rows,
        "majority": majority_floor(train.gold_P, test.gold_P).value,
        "random": random_floor(test.gold_P, test.n_options),
        "overlapping": overlapping,
    }
    predicted = LMProbe().fit(train.probs_PO, train.gold_P).predict(test.probs_PO)
    scores = [_score(common, "lm", None, accuracy(test.gold_P, predicted))]
    for name in probes:
        n_neurons, result = fit_vote_probe(name, train, valid, test, max_neurons)
        scores.append(_score(common, name, n_neurons, result))
    return scores


def fit_vote_probe(
    name: ProbeName, train: NegSplit, valid: NegSplit, test: NegSplit, max_neurons: int
) -> tuple[int, Accuracy]:
    """Number of neurons chosen on `valid`, and the accuracy on `test`."""
    probe_class, score_block = _PROBES[name]
    scores_M = _summed_scores(train, score_block)
    widest = probe_class.from_scores(scores_M, n_neurons=max_neurons, n_options=train.n_options)
    by_k = widest.accuracy_by_k(valid.neurons(widest.kept_), valid.gold_P)
    chosen = choose_n_neurons(by_k)
    probe = probe_class.from_scores(scores_M, n_neurons=chosen, n_options=train.n_options)
    return chosen, accuracy(test.gold_P, probe.predict_kept(test.neurons(probe.kept_)))


def _summed_scores(split: NegSplit, score_block: Any) -> NDArray[np.int64]:
    """Scores of all neurons, summed over shards: no more than one layer of one shard is held at a time."""
    scores_LN = np.zeros((split.n_layers, split.n_neurons), dtype=np.int64)
    for shard in split.shards():
        gold_P = shard.numbers("gold")
        for layer in range(split.n_layers):
            scores_LN[layer] += score_block(shard.negs_PON(layer), gold_P)
    return scores_LN.ravel()


def _score(common: dict[str, Any], probe: str, n_neurons: int | None, result: Accuracy) -> Score:
    low, high = result.interval
    return Score(**common, probe=probe, n_neurons=n_neurons, accuracy=result.value, low=low, high=high)
