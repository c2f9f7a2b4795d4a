"""Share of a model's neurons that a dataset uses: the Model Utilization Index, from stored NEGs.

In every row and layer the neurons with the highest scores for the model's own answer are used; a dataset uses all that
any of its rows does. The share grows with the number of rows, so that datasets are compared at equal numbers: the mean
over all choices of r rows is exact, from the number of rows that use each neuron.

Source: Cao et al., "Model Utility Law: Evaluating LLMs beyond Performance through Mechanism Interpretable Metric"
(arXiv 2504.07440), where a neuron's score is its own contribution to the logit of each token of the response (its
activation times its output row times the token's unembedding), and the best .1 % of every layer are used.

Differs from the paper: scores are taken at one token, for the option that the model finds likeliest, and of stored
NEGs: gradient times activation, which includes what later layers make of the neuron, or the NEG itself.

Axes: P rows, L layers, N neurons a layer, M all neurons (flat index, layer-major).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import gammaln

from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.probing.rankings import finite_numbers
from negcore.store.reader import NegSplit, Shard

Score = Literal["contribution", "neg"]
"""contribution: NEG * |a|, gradient times activation. neg: the NEG."""
SHARE = 1e-3
"""Share of a layer's neurons that a row uses, as in the paper: at least one."""


@dataclass(frozen=True, eq=False)
class Used:
    """The number of rows of a dataset that use each neuron."""

    counts_M: Ints
    n_rows: int
    n_layers: int
    per_layer: int
    """Neurons of a layer that a row uses, at most: scores that are not above 0 are none."""

    @property
    def n_neurons(self) -> int:
        """M."""
        return len(self.counts_M)

    def chances_M(self, n_rows: int) -> Floats:
        """Return, for each neuron, the share of all choices of so many rows in which a row uses it.

        With c of P rows that use it, 1 - C(P - c, r) / C(P, r).

        Raises
        ------
        NegError
            If the dataset has fewer rows, or ``n_rows`` is below 1.
        """
        if not 1 <= n_rows <= self.n_rows:
            raise NegError(f"{n_rows} rows cannot be chosen of {self.n_rows}")
        left_M = self.n_rows - self.counts_M
        is_sure_M = left_M < n_rows
        safe_M = np.where(is_sure_M, n_rows, left_M)
        missed_M = np.exp(_log_choices(safe_M, n_rows) - _log_choices(np.array(self.n_rows), n_rows))
        return np.asarray(np.where(is_sure_M, 1.0, np.where(self.counts_M == 0, 0.0, 1 - missed_M)))

    def share(self, n_rows: int) -> float:
        """Return the share of all neurons that so many rows use, mean over all choices of rows."""
        return float(self.chances_M(n_rows).mean())

    def unrelated(self, n_rows: int) -> float:
        """Return the share that so many rows would use if each chose as many neurons of every layer at random."""
        width = self.n_neurons // self.n_layers
        return 1 - (1 - self.per_layer / width) ** n_rows


def _log_choices(n: Ints, r: int) -> Floats:
    return np.asarray(gammaln(n + 1) - gammaln(r + 1) - gammaln(n - r + 1))


@dataclass(frozen=True)
class Shared:
    """Neurons that two datasets both use, at equal numbers of rows, means over all choices of rows of each."""

    shared: float
    """Share of all neurons that both use."""
    jaccard: float
    """The same over the share that either uses."""
    chance: float
    """That index if each used as many neurons of every layer as it does, but other ones, drawn at random."""


def used_neurons(splits: Sequence[NegSplit], score: Score = "contribution", *, share: float = SHARE) -> Used:
    """Count the rows of a dataset that use each neuron.

    Parameters
    ----------
    splits : sequence of NegSplit
        Splits of one dataset and model; their rows count together.
    score : Score
        Score of a neuron in a row, for the option with the highest probability.
    share : float
        Share of a layer's neurons that a row uses, rounded down, but at least one; only scores above 0 count.

    Raises
    ------
    NegError
        If ``share`` is not above 0 and at most 1, the model is a mixture of experts, the shards hold no values, or a
        number is NaN or infinite.
    """
    first = splits[0]
    if not 0 < share <= 1:
        raise NegError(f"a share of {share} of a layer cannot be used: give one above 0 and at most 1")
    if first.layer_shapes is not None:
        raise NegError(
            f"{first.identity.model!r} is a mixture of experts: a row has the neurons of few of them, and the share "
            "that it uses of a layer is not defined here"
        )
    per_layer = max(1, int(share * first.n_neurons + 1e-9))
    counts_LN = np.zeros((first.n_layers, first.n_neurons), np.int64)
    for split in splits:
        for shard in split.shards():
            for layer in range(first.n_layers):
                scores_PN = _scores(shard, layer, score)
                top_PK = np.argpartition(-scores_PN, per_layer - 1, axis=1)[:, :per_layer]
                is_used_PK = np.take_along_axis(scores_PN, top_PK, axis=1) > 0
                counts_LN[layer] += np.bincount(top_PK[is_used_PK], minlength=first.n_neurons)
    n_rows = sum(split.n_rows for split in splits)
    return Used(counts_LN.ravel(), n_rows, first.n_layers, per_layer)


def _scores(shard: Shard, layer: int, score: Score) -> Floats:
    """Return the scores of a layer's neurons for the likeliest option of each row: shape (P, N)."""
    answer_P = shard.split.probs_PO[shard.rows].argmax(axis=1)
    flat_N = layer * shard.split.n_neurons + np.arange(shard.split.n_neurons)
    negs_PN = finite_numbers(shard, shard.negs_PON(layer)[np.arange(len(answer_P)), answer_P], "NEG", flat_N)
    if score == "neg":
        return np.asarray(negs_PN)
    activations_PN = finite_numbers(shard, shard.activations_PN(layer), "activation", flat_N)
    return np.asarray(negs_PN * np.abs(activations_PN))


def shared_neurons(one: Used, other: Used, n_rows: int) -> Shared:
    """Compare the neurons that two datasets use, of as many rows each.

    Raises
    ------
    NegError
        If they are of models with other numbers of neurons, or a dataset has fewer rows.
    """
    if (one.n_layers, one.n_neurons) != (other.n_layers, other.n_neurons):
        raise NegError("neurons of models of other shapes are not the same ones, and cannot be shared")
    first_M, second_M = one.chances_M(n_rows), other.chances_M(n_rows)
    both, either = float((first_M * second_M).mean()), float((first_M + second_M - first_M * second_M).mean())
    first_L, second_L = (used_M.reshape(one.n_layers, -1).mean(axis=1) for used_M in (first_M, second_M))
    chance_both = float((first_L * second_L).mean())
    chance_either = float((first_L + second_L).mean()) - chance_both
    return Shared(both, both / either if either else 0.0, chance_both / chance_either if chance_either else 0.0)
