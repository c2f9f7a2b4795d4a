"""The neurons at the top of a ranking: which they are, how sure their places are, and how they move the options.

Of many neurons, some rank high on few rows by luck. So each place comes with the places that the neuron takes in
bootstrap samples of the rows: one that half of the samples rank 300th is no finding.

Axes: P prompts, O options, C gold options, B bootstrap samples, N neurons a layer, M all neurons, K chosen neurons,
best first. Flat indices are layer-major.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from negcore.analysis.linearity import bootstrap_weights
from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.measure.votes import (
    Numbers,
    Ranking,
    Rule,
    Signal,
    Signs,
    Vote,
    neuron_pairs,
    row_scores,
    signed_rank_effect,
)
from negcore.probing.rankings import chosen_effects, chosen_signed_ranks, finite_numbers, of_neurons, rank_layers
from negcore.store.levels import FloatArray
from negcore.store.reader import NegSplit, Selection

N_TOP = 20
"""Neurons at the top of a ranking that are told apart by default."""
N_BOOTSTRAP = 200

_SCORE_BYTES = 2**28
"""Most bytes of the samples' scores of neurons that are held at once."""


@dataclass(frozen=True)
class TopNeuron:
    """One of the best neurons of a ranking; a field is None where the storage level does not keep what it needs."""

    place: int
    """Place in the ranking, from 1; of equal scores the lower layer and neuron is first."""
    layer: int
    neuron: int
    polarity: int
    """Sign of the score: 1 if the neuron favours the gold option, -1 if it disfavours it, 0 if neither."""
    score: int
    """Score over all rows: see `negcore.measure.votes.polar_scores` and `magn_scores`."""
    agreement: float | None
    """Share of bootstrap samples of the rows in which the neuron stays among as many as are listed."""
    place_low: int | None
    """5 % quantile of its place over the samples."""
    place_high: int | None
    """95 % quantile."""
    random_score: float
    """Mean absolute score of the neurons in its layer: what a random one of them has."""
    mean_negs: list[float] | None
    """Mean NEG over all rows that have the neuron by option, in target per unit of activation; NaN without any."""
    name: str = ""
    """``layer.neuron``, or ``layer.expert.unit`` of a mixture of experts."""
    active: float | None = None
    """Share of the rows that have the neuron, as they were routed to its expert; None for a model without experts."""


def top_neurons(
    split: NegSplit,
    rule: Rule = "magn",
    signal: Signal = "neg",
    *,
    top: int = N_TOP,
    n_bootstrap: int = N_BOOTSTRAP,
    seed: int = 0,
) -> list[TopNeuron]:
    """Rank all neurons on a split as `negcore.rank` does, and tell of the best ones how sure their places are.

    Parameters
    ----------
    split : NegSplit
        Training prompts.
    rule, signal : Rule, Signal
        As for `negcore.rank`.
    top : int
        Neurons to list.
    n_bootstrap : int
        Samples of the rows, each as large as all of them and drawn with replacement. Every sample ranks all neurons.
    seed : int
        Seed of the samples.

    Returns
    -------
    list of TopNeuron
        Best first.

    Raises
    ------
    NegError
        If ``top`` or ``n_bootstrap`` is below 1, or the split cannot be ranked.

    Examples
    --------
    >>> from negcore import open_negs, top_neurons
    >>> best = top_neurons(open_negs("RUN").select("smollm2-135m", "agnews", "train"))[0]  # doctest: +SKIP
    >>> best.layer, best.neuron, best.agreement, best.place_high  # doctest: +SKIP
    (20, 322, 1.0, 3)
    """
    if n_bootstrap < 1:
        raise NegError(f"{n_bootstrap} bootstrap samples tell nothing of a place; give at least 1")
    vote, layers = Vote(rule, signal), range(split.n_layers)
    scores_M = rank_layers(split, layers, [vote], act=False).votes_M[vote]
    order_K = Ranking.from_scores(of_neurons(split, scores_M)).top(top).order_K
    ahead = neurons_ahead(split, layers, {vote: order_K}, n_bootstrap=n_bootstrap, seed=seed)
    return described(scores_M, order_K, ahead.get(vote), split)


def described(scores_M: Ints, order_K: Ints, ahead_BK: Ints | None, values: NegSplit) -> list[TopNeuron]:
    """Describe the best neurons.

    Parameters
    ----------
    scores_M : array of int, shape (M,)
        Scores of all neurons.
    order_K : array of int, shape (K,)
        Flat indices of the best ones, best first.
    ahead_BK : array of int, shape (B, K), optional
        From `neurons_ahead`, over all layers.
    values : NegSplit
        The rows whose NEGs are averaged, as far as it stores them.
    """
    pairs_K2 = neuron_pairs(order_K, values.n_neurons)
    places = [_Places(None, None, None)] * len(order_K) if ahead_BK is None else _places(ahead_BK + 1)
    random_L = _mean_sizes(scores_M, values)
    has_experts = values.layer_shapes is not None
    shares_K = values.active(pairs_K2).mean(axis=0).tolist() if has_experts else [None] * len(order_K)
    return [
        TopNeuron(
            place=place,
            layer=layer,
            neuron=neuron,
            polarity=int(np.sign(scores_M[flat])),
            score=int(scores_M[flat]),
            **sureness._asdict(),
            random_score=float(random_L[layer]),
            mean_negs=mean_negs,
            name=values.name_of(layer, neuron),
            active=active,
        )
        for place, (flat, (layer, neuron), sureness, mean_negs, active) in enumerate(
            zip(order_K, pairs_K2.tolist(), places, stored_means(values, pairs_K2), shares_K, strict=True), start=1
        )
    ]


def _mean_sizes(scores_M: Ints, split: NegSplit) -> Floats:
    """Return the mean size of the scores of each layer's neurons: shape (L,)."""
    sizes_LN = np.abs(scores_M).reshape(-1, split.n_neurons)
    if split.layer_shapes is None:
        return np.asarray(sizes_LN.mean(axis=1))
    return np.array(
        [sizes_N[: one.n_neurons].mean() for sizes_N, one in zip(sizes_LN, split.layer_shapes, strict=True)]
    )


class _Places(NamedTuple):
    agreement: float | None
    place_low: int | None
    place_high: int | None


def _places(places_BK: Ints) -> list[_Places]:
    agreement_K = (places_BK <= places_BK.shape[1]).mean(axis=0)
    low_K, high_K = np.quantile(places_BK, [0.05, 0.95], axis=0, method="inverted_cdf")
    return [_Places(*one) for one in zip(agreement_K.tolist(), low_K.tolist(), high_K.tolist(), strict=True)]


def stored_means(split: NegSplit, selection: Selection) -> list[list[float] | None]:
    """Return the mean NEG of each of K neurons by option; None for those whose values are not stored."""
    stored_K = split.stores_values(selection)
    if not stored_K.any():
        return [None] * len(stored_K)
    means_KO = iter(neuron_means(split, np.asarray(selection)[stored_K]).by_option_KO.tolist())
    return [next(means_KO) if is_stored else None for is_stored in stored_K]


class NeuronMeans(NamedTuple):
    """Mean NEGs of K neurons, in target per unit of activation."""

    by_option_KO: Floats
    """Over all rows that have the neuron; NaN where there are none."""
    by_class_KCO: Floats
    """Over the rows with each gold option; NaN where there are none."""


def neuron_means(split: NegSplit, selection: Selection) -> NeuronMeans:
    """Average the NEGs of chosen neurons over the rows of a split, and over those with each gold option.

    Raises
    ------
    NegError
        If a neuron does not exist, the shards do not hold its values, or one is NaN or infinite.
    """
    n_chosen, n_options = len(selection), split.n_options
    sums_CKO, counts_CK = np.zeros((n_options, n_chosen, n_options)), np.zeros((n_options, n_chosen))
    for shard in split.shards():
        negs_POK, gold_P = chosen_effects(shard, "neg", selection), shard.numbers("gold")
        active_PK = shard.active(selection)
        for option in range(n_options):
            sums_CKO[option] += negs_POK[gold_P == option].sum(axis=0, dtype=np.float64).T
            counts_CK[option] += active_PK[gold_P == option].sum(axis=0)
    with np.errstate(invalid="ignore"):  # neurons that no row has
        by_class_CKO = sums_CKO / counts_CK[:, :, None]
        by_option_KO = sums_CKO.sum(axis=0) / counts_CK.sum(axis=0)[:, None]
    return NeuronMeans(by_option_KO, by_class_CKO.transpose(1, 0, 2))


@dataclass(frozen=True, eq=False)
class NeuronRows:
    """The numbers of one neuron on the rows of a split."""

    activations_P: FloatArray
    negs_PO: FloatArray | None
    """In target per unit of activation; None where values are not stored."""
    signs_PO: Signs
    """Signs of the NEGs."""
    gold_P: Ints
    active_P: NDArray[np.bool_]
    """False for rows that do not have the neuron, as they were not routed to its expert: their numbers mean nothing."""

    @property
    def active(self) -> NeuronRows:
        """The numbers of the rows that have the neuron."""
        return self.chosen(self.active_P)

    def chosen(self, rows: NDArray[Any]) -> NeuronRows:
        """Return the numbers of some of the rows, by a mask or by indices."""
        negs_PO = None if self.negs_PO is None else self.negs_PO[rows]
        return NeuronRows(
            self.activations_P[rows], negs_PO, self.signs_PO[rows], self.gold_P[rows], self.active_P[rows]
        )

    def same_sign(self, option: int | None = None) -> SameSign:
        """Return the more frequent sign of the NEG for an option, by default the right one, and the rows' share.

        Only rows that have the neuron count; without any the share is NaN.
        """
        if not self.active_P.all():
            return self.active.same_sign(option)
        if not len(self.gold_P):
            return SameSign(0, float("nan"))
        option_P = self.gold_P if option is None else np.full(len(self.gold_P), option)
        signs_P = self.signs_PO[np.arange(len(option_P)), option_P]
        share, sign = max((float((signs_P == sign).mean()), sign) for sign in (1, 0, -1))
        return SameSign(sign, share)

    def most_moved(self, n_rows: int) -> list[Moved]:
        """Return the rows and options with the largest absolute NEGs, one option a row; none without values."""
        if self.negs_PO is None:
            return []
        option_P = np.abs(self.negs_PO).argmax(axis=1)
        negs_P = self.negs_PO[np.arange(len(option_P)), option_P]
        order_P = np.argsort(-np.abs(negs_P), kind="stable")
        order_P = order_P[self.active_P[order_P]][:n_rows]
        return [Moved(int(row), int(option_P[row]), float(negs_P[row])) for row in order_P]


class SameSign(NamedTuple):
    """A sign, and the share of rows that have it."""

    sign: int
    share: float


class Moved(NamedTuple):
    """A row, and the option whose probability the neuron moves most there."""

    row: int
    option: int
    neg: float


def read_neuron(split: NegSplit, layer: int, neuron: int) -> NeuronRows:
    """Read what a split holds of one neuron.

    Raises
    ------
    NegError
        If the neuron does not exist, the shards hold nothing of it, or a number is NaN or infinite.
    """
    chosen = [(layer, neuron)]
    activations_PK, ranks_POK, active_PK = [], [], []
    for shard in split.shards():
        active_PK.append(shard.active(chosen))
        activations_PK.append(finite_numbers(shard, shard.activations(chosen), "activation", chosen))
        ranks_POK.append(chosen_signed_ranks(shard, "neg", chosen))
    ranks_PO = np.concatenate(ranks_POK)[:, :, 0]
    return NeuronRows(
        activations_P=np.concatenate(activations_PK)[:, 0],
        negs_PO=ranks_PO if split.stores_values(chosen).all() else None,
        signs_PO=np.sign(ranks_PO).astype(np.int8),
        gold_P=split.gold_P.astype(np.int64),
        active_P=np.concatenate(active_PK)[:, 0],
    )


# Places in samples of the rows


def neurons_ahead(
    split: NegSplit, layers: range, tops: Mapping[Vote, Ints], *, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0
) -> dict[Vote, Ints]:
    """Count the neurons of some layers that bootstrap samples of the rows rank before each chosen neuron.

    A sample's scores are the rows' own scores times how often it drew each row, so that all samples are ranked in one
    pass over the shards.

    Parameters
    ----------
    split : NegSplit
    layers : range
        Consecutive layers.
    tops : mapping of Vote to array of int, shape (K,)
        Flat indices of chosen neurons, of any layers.

    Returns
    -------
    dict of Vote to array of int64, shape (B, K)
        Counts of blocks of layers add up: over all layers, one more is the neuron's place. Empty for splits that hold
        vote sums, which do not tell rows apart.

    Raises
    ------
    NegError
        As `rank_layers`.
    """
    if split.level.has_vote_sums:
        return {}
    weights_BP = sample_rows(split, n_bootstrap, seed).astype(np.float32)
    n_all = split.n_layers * split.n_neurons
    keys = {vote: _keys(_chosen_scores(split, vote, top_K, weights_BP), top_K, n_all) for vote, top_K in tops.items()}
    ahead = {vote: np.zeros(keys_BK.shape, np.int64) for vote, keys_BK in keys.items()}
    for block in _layer_blocks(layers, 4 * n_bootstrap * split.n_neurons * len(tops)):
        for vote, scores_LBN in _sampled_scores(split, block, list(tops), weights_BP).items():
            for layer, scores_BN in zip(block, scores_LBN, strict=True):
                n_own = split.n_neurons if split.layer_shapes is None else split.layer_shapes[layer].n_neurons
                flat_N = layer * split.n_neurons + np.arange(n_own)
                ahead[vote] += _count_above(_keys(scores_BN[:, :n_own], flat_N, n_all), keys[vote])
    return ahead


def sample_rows(split: NegSplit, n_samples: int, seed: int) -> Floats:
    """Draw bootstrap samples of a split's rows: how often each prompt is in each, all orders of a row alike: (B, P)."""
    weights_BR = bootstrap_weights(split.answers.n_rows, n_samples, seed)[1:]
    return weights_BR[:, split.answers.row_P]


def scores_in_samples(split: NegSplit, layers: range, vote: Vote, counts_BP: Ints) -> Ints:
    """Score the neurons of some layers on samples of the rows, in one pass over the shards.

    Parameters
    ----------
    layers : range
        Consecutive layers.
    counts_BP : array of int, shape (B, P)
        Number of times that each row is in each sample.

    Returns
    -------
    array of int32, shape (B, M)
        The scores that `rank_layers` would give if the split had the rows of the sample.

    Raises
    ------
    NegError
        As `rank_layers`; also if the split holds vote sums, which do not tell rows apart.
    """
    if split.level.has_vote_sums:
        raise NegError(f"storage {split.storage!r} keeps no rows to draw samples of: set it to values or codes")
    scores_LBN = _sampled_scores(split, layers, [vote], counts_BP.astype(np.float32))[vote]
    return np.asarray(scores_LBN.transpose(1, 0, 2).reshape(len(counts_BP), -1))


def _keys(scores_BK: Numbers, flat_K: Ints, n_all: int) -> Ints:
    """Return numbers that are larger the better a neuron ranks, all different: as `Ranking.from_scores` orders them."""
    return np.asarray(np.abs(scores_BK.astype(np.int64)) * n_all + (n_all - 1 - flat_K))


def _count_above(keys_BN: Ints, keys_BK: Ints) -> Ints:
    """Count the neurons of each sample with larger keys than each chosen neuron: shape (B, K)."""
    keys_BN.sort(axis=1)
    below = [np.searchsorted(keys_N, keys_K, side="right") for keys_N, keys_K in zip(keys_BN, keys_BK, strict=True)]
    return np.asarray(keys_BN.shape[1] - np.array(below))


def _layer_blocks(layers: range, layer_bytes: int) -> Iterator[range]:
    step = max(1, _SCORE_BYTES // layer_bytes)
    for start in range(layers.start, layers.stop, step):
        yield range(start, min(start + step, layers.stop))


def _chosen_scores(split: NegSplit, vote: Vote, order_K: Ints, weights_BP: Numbers) -> Numbers:
    scores_BK = np.zeros((len(weights_BP), len(order_K)), np.int32)
    for shard in split.shards():
        effect_POK = chosen_signed_ranks(shard, vote.signal, order_K)
        scores_BK += _weighted(row_scores(vote.rule, effect_POK, shard.numbers("gold")), weights_BP[:, shard.rows])
    return scores_BK


def _sampled_scores(split: NegSplit, layers: range, votes: Sequence[Vote], weights_BP: Numbers) -> dict[Vote, Numbers]:
    """Return the scores of every neuron of some layers in every sample: arrays of shape (L, B, N)."""
    shape = (len(layers), len(weights_BP), split.n_neurons)
    scores = {vote: np.zeros(shape, np.int32) for vote in votes}
    for shard in split.shards():
        gold_P, weights = shard.numbers("gold"), weights_BP[:, shard.rows]
        for at, layer in enumerate(layers):
            signed_ranks_PON, activations_PN = shard.signed_ranks_PON(layer), partial(shard.activations_PN, layer)
            for vote, scores_LBN in scores.items():
                effect_PON = signed_rank_effect(vote.signal, signed_ranks_PON, activations_PN)
                scores_LBN[at] += _weighted(row_scores(vote.rule, effect_PON, gold_P), weights)
    return scores


def _weighted(scores_PN: Numbers, weights_BP: Numbers) -> Numbers:
    """Return the sums of the rows' scores in each sample; float32 holds the whole numbers of a shard exactly."""
    return np.asarray(weights_BP @ scores_PN.astype(np.float32)).astype(np.int32)
