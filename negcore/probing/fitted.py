"""Fitted probes that answer whole splits, and the functions that fit them; they read only the neurons a probe uses.

Axes: P prompts, O options, C classes, K kept neurons (best first), M all neurons of the model.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.measure.votes import Numbers, Ranking, Signs, Vote, argmax_features
from negcore.model.layer_shapes import LayerShapes, neuron_groups
from negcore.probing.act_probe import ActProbe
from negcore.probing.act_scores import ActScores
from negcore.probing.draws import random_neurons, random_of_experts
from negcore.probing.evaluation import Accuracy, accuracy, choose_n_kept
from negcore.probing.forest import Forest
from negcore.probing.probes import MagnProbe, PolarProbe, TreeProbe, kept_counts
from negcore.probing.rankings import chosen_activations, chosen_effects, chosen_signed_ranks, of_neurons
from negcore.store.reader import NegSplit

VOTE_PROBES = MappingProxyType({"polar": PolarProbe, "magn": MagnProbe})

FOREST_BYTES = 4 * 2**30
"""Most memory that a forest's features may take while it grows: one byte each, and four in scikit-learn's copy."""

LOGISTIC_VALUES = 2**26
"""Most training values (prompts x options x neurons) of a logistic regression: 256 MiB, and as much to work with."""

_LOGISTIC_STEPS = 200


class FittedProbe(ABC):
    """A probe that answers prompts with the index of an option."""

    @property
    @abstractmethod
    def kept_K(self) -> Ints:
        """Flat indices of the neurons that it reads, best first; an Act-Probe has several rankings, and rising ones."""

    @property
    def n_kept(self) -> int:
        """Number of neurons that it reads; an Act-Probe reads as many for each of its binary questions."""
        return len(self.kept_K)

    @abstractmethod
    def predict(self, split: NegSplit) -> Ints:
        """Return the index of the option chosen for every prompt: shape (P,).

        Raises
        ------
        NegError
            If the split's prompts have other options, or a neuron's number is missing, NaN or infinite.
        """

    def scores(self, split: NegSplit) -> Floats:
        """Return a score of every option of every prompt, of which `predict` answers the largest: float64 (P, O).

        Of equal ones it answers the lowest. By default the answer has 1 and the others 0. Errors as of `predict`.
        """
        return np.asarray(np.eye(split.n_options)[self.predict(split)])


@dataclass(frozen=True, eq=False)
class FittedVote(FittedProbe):
    """Neurons that vote: `PolarProbe` or `MagnProbe` on one of the signals."""

    vote: Vote
    ranking: Ranking
    n_options: int
    n_all: int
    """Neurons of the model."""

    @property
    def kept_K(self) -> Ints:
        return self.ranking.order_K

    @property
    def estimator(self) -> PolarProbe | MagnProbe:
        """The probe as a scikit-learn estimator."""
        return VOTE_PROBES[self.vote.rule].from_ranking(self.ranking, n_options=self.n_options, n_all=self.n_all)

    def predict(self, split: NegSplit) -> Ints:
        probe, predicted_P = self.estimator, np.empty(split.n_rows, np.int64)
        for shard in split.shards():
            predicted_P[shard.rows] = probe.predict_kept(chosen_signed_ranks(shard, self.vote.signal, probe.kept_))
        return predicted_P

    def scores(self, split: NegSplit) -> Floats:
        """Return the votes for every option: float64 (P, O)."""
        probe, votes_PO = self.estimator, np.empty((split.n_rows, self.n_options))
        for shard in split.shards():
            votes_PO[shard.rows] = probe.count_votes(chosen_signed_ranks(shard, self.vote.signal, probe.kept_))
        return votes_PO

    def accuracy_by_k(self, split: NegSplit) -> dict[int, Accuracy]:
        """Measure the accuracy with the best 1, 2, 4, ... of the neurons."""
        probe, ks = self.estimator, kept_counts(self.n_kept)
        predicted_PJ = np.empty((split.n_rows, len(ks)), np.int64)
        for shard in split.shards():
            predicted_PJ[shard.rows] = probe.predict_by_k(chosen_signed_ranks(shard, self.vote.signal, probe.kept_))
        return _accuracy_by_k(split, ks, predicted_PJ)

    def cut(self, n_kept: int) -> FittedVote:
        """Return the probe with its best neurons alone."""
        return FittedVote(self.vote, self.ranking.top(n_kept), self.n_options, self.n_all)


def _accuracy_by_k(split: NegSplit, ks: Sequence[int], predicted_PJ: Ints) -> dict[int, Accuracy]:
    columns = zip(ks, predicted_PJ.T, strict=True)
    return {k: accuracy(split.gold_P, predicted_P, split.answers.row_P) for k, predicted_P in columns}


def fit_vote(vote: Vote, scores_M: Ints, valid: NegSplit, *, max_neurons: int) -> FittedVote:
    """Keep the best neurons, in the number that answers `valid` best (of equally good numbers the smallest)."""
    ranking = Ranking.from_scores(scores_M).top(max_neurons)
    widest = FittedVote(vote, ranking, valid.n_options, len(scores_M))
    return widest.cut(choose_n_kept(widest.accuracy_by_k(valid)))


def random_vote(best: FittedVote, scores_M: Ints, *, seed: int, layer_shapes: LayerShapes | None = None) -> FittedVote:
    """Return a baseline: as many neurons drawn at random, each with the polarity of its own score.

    Of a mixture of experts, given by its `layer_shapes`, as many are drawn of each expert as the best neurons are of.
    Of all neurons, most would be absent from most prompts, and the best ones would be ahead by being heard alone.
    """
    if layer_shapes is None:
        order_K = random_neurons(len(scores_M), best.n_kept, seed=seed)
    else:
        order_K = random_of_experts(best.ranking.order_K, layer_shapes, seed=seed)
    polarity_K: Signs = np.sign(np.ma.getdata(scores_M)[order_K]).astype(np.int8)
    return FittedVote(best.vote, Ranking(order_K, polarity_K), best.n_options, best.n_all)


@dataclass(frozen=True, eq=False)
class FittedAct(FittedProbe):
    """Activations against thresholds: `ActProbe`. Of a mixture of experts, a prompt hears the neurons that it has."""

    estimator: ActProbe

    @property
    def kept_K(self) -> Ints:
        return np.unique(self.estimator.kept_)

    @property
    def n_kept(self) -> int:
        return int(self.estimator.kept_.shape[1])

    def predict(self, split: NegSplit) -> Ints:
        return self._by_k(split, [self.n_kept])[:, 0]

    def accuracy_by_k(self, split: NegSplit) -> dict[int, Accuracy]:
        """Measure the accuracy with the best 1, 2, 4, ... neurons of every binary question."""
        ks = kept_counts(self.n_kept)
        return _accuracy_by_k(split, ks, self._by_k(split, ks))

    def _by_k(self, split: NegSplit, ks: Sequence[int]) -> Ints:
        predicted_PJ = np.empty((split.n_rows, len(ks)), np.int64)
        for shard in split.shards():
            activations_of = partial(chosen_activations, shard)
            predicted_PJ[shard.rows] = self.estimator.predict_by_k(activations_of, shard.n_rows, ks)
        return predicted_PJ


def fit_act(act: ActScores, gold_train_P: Numbers, valid: NegSplit, *, max_neurons: int) -> FittedAct:
    """Keep the best neurons of every binary question, in the number that answers `valid` best."""
    act = ActScores(of_neurons(valid, act.scores_SM), act.thresholds_SM)
    classes = np.unique(gold_train_P)
    widest = FittedAct(ActProbe.from_scores(act, classes, n_kept=max_neurons))
    n_kept = choose_n_kept(widest.accuracy_by_k(valid))
    return FittedAct(ActProbe.from_scores(act, classes, n_kept=n_kept))


@dataclass(frozen=True, eq=False)
class FittedForest(FittedProbe):
    """A random forest whose features are, for each neuron, the option with the largest NEG: `TreeProbe`."""

    order_K: Ints
    forest: Forest

    @property
    def kept_K(self) -> Ints:
        return self.order_K

    def predict(self, split: NegSplit) -> Ints:
        return self.forest.predict_by_trees(forest_features(split, self.order_K), [len(self.forest.root_T)])[:, 0]

    def scores(self, split: NegSplit) -> Floats:
        """Return the mean probability by the trees; 0 for an option that is never gold in training: float64 (P, O)."""
        return _of_options(
            self.forest.probabilities(forest_features(split, self.order_K)), self.forest.classes_C, split.n_options
        )


def fit_forest(train: NegSplit, order_K: Ints, *, seed: int) -> FittedForest:
    """Grow a forest on the given neurons. Differs from the paper, where a forest reads all neurons of the model."""
    probe = TreeProbe(random_state=seed).fit(forest_features(train, order_K), train.gold_P.astype(np.int64))
    return FittedForest(order_K, Forest.of(probe.forest_))


def check_forest_size(n_rows: int, n_kept: int) -> None:
    """Raise `NegError` if the features of a forest would not fit in `FOREST_BYTES`."""
    needed = 5 * n_rows * n_kept
    if needed > FOREST_BYTES:
        raise NegError(
            f"a forest on {n_rows} training rows x {n_kept} neurons needs {needed / 2**30:.1f} GiB, "
            f"and {FOREST_BYTES / 2**30:g} are allowed: set --tree-neurons to at most "
            f"{FOREST_BYTES // (5 * n_rows)}, or --limit"
        )


def forest_features(split: NegSplit, order_K: Ints) -> NDArray[np.uint8]:
    """Return the option with the largest NEG for the given neurons of every prompt: (P, K); see `argmax_features`.

    Of a mixture of experts a neuron that a prompt does not have is 0, and the options count from 1.
    """
    features_PK = np.empty((split.n_rows, len(order_K)), np.uint8)
    for shard in split.shards():
        features_PK[shard.rows] = argmax_features(chosen_signed_ranks(shard, "neg", order_K))
        if split.layer_shapes is not None:
            features_PK[shard.rows] = np.where(shard.active(order_K), features_PK[shard.rows] + 1, 0)
    return features_PK


class ExpertWeights(NamedTuple):
    """What a logistic regression makes of the experts that a prompt was routed to."""

    first_E: Ints
    """Place, among the neurons that it reads, of the first one of each expert."""
    coef_CE: NDArray[np.float32]
    """Weight of each class for a prompt that has the expert; with two classes one row, as of the neurons."""


@dataclass(frozen=True, eq=False)
class FittedLogistic(FittedProbe):
    """Baseline: logistic regression on the standardised values of some neurons for all options.

    Of a mixture of experts, means and deviations are over the prompts that have a neuron, and a neuron that a prompt
    does not have adds nothing to its logits. As being routed to an expert is a fact of its own, each expert of these
    neurons that some and not all training prompts have is a feature too, 1 where a prompt has it and else 0.
    """

    vote: Vote
    """The vote that chose the neurons; its signal is what the regression reads."""
    order_K: Ints
    """Flat indices of the neurons."""
    classes_C: Ints
    mean_OK: NDArray[np.float32]
    scale_OK: NDArray[np.float32]
    """Standard deviation of the training prompts' values; `mean_OK` is their mean."""
    coef_COK: NDArray[np.float32]
    """Weights of each class; with two classes one row, the second class against the first."""
    intercept_C: NDArray[np.float32]
    experts: ExpertWeights | None = None
    """None if no expert is a feature."""

    @property
    def kept_K(self) -> Ints:
        return self.order_K

    def predict(self, split: NegSplit) -> Ints:
        logits_PC = self._logits(split)
        if len(self.classes_C) == 2:
            return np.asarray(self.classes_C[(logits_PC[:, 0] > 0).astype(int)])
        return np.asarray(self.classes_C[logits_PC.argmax(axis=1)])

    def scores(self, split: NegSplit) -> Floats:
        """Return the probability of every option; 0 for one that is never gold in training: float64 (P, O)."""
        logits_PC = self._logits(split)
        if len(self.classes_C) == 2:
            logits_PC = np.concatenate([np.zeros_like(logits_PC), logits_PC], axis=1)
        return _of_options(softmax(logits_PC, axis=1), self.classes_C, split.n_options)

    def _logits(self, split: NegSplit) -> Floats:
        """Return the logit of each class, or of the second of two: (P, C) or (P, 1)."""
        logits_PC = np.empty((split.n_rows, len(self.intercept_C)))
        for shard in split.shards():
            values_POK = (chosen_effects(shard, self.vote.signal, self.order_K) - self.mean_OK) / self.scale_OK
            if shard.layer_shapes is not None:
                values_POK *= shard.active(self.order_K)[:, None]
            products_PC = np.einsum("pok,cok->pc", values_POK, self.coef_COK, optimize=True)
            if self.experts is not None:
                products_PC += shard.active(self.order_K[self.experts.first_E]) @ self.experts.coef_CE.T
            logits_PC[shard.rows] = products_PC + self.intercept_C
        return logits_PC


def _of_options(scores_PC: Floats, classes_C: Ints, n_options: int) -> Floats:
    """Return scores of classes as scores of options, of which those that are no class have 0."""
    scores_PO = np.zeros((len(scores_PC), n_options))
    scores_PO[:, classes_C] = scores_PC
    return scores_PO


def fit_logistic(vote: Vote, order_K: Ints, train: NegSplit) -> FittedLogistic:
    """Fit on the given neurons, or on as many of the first as `LOGISTIC_VALUES` has room for; C = 1, not tuned.

    Raises
    ------
    NegError
        If all training prompts have the same gold option, or the shards hold codes.
    """
    order_K = order_K[: max(1, LOGISTIC_VALUES // (train.n_rows * train.n_options))]
    values_POK = np.empty((train.n_rows, train.n_options, len(order_K)), np.float32)
    for shard in train.shards():
        values_POK[shard.rows] = chosen_effects(shard, vote.signal, order_K)
    if len(np.unique(train.gold_P)) < 2:
        raise NegError(f"all {train.n_rows} training prompts have gold option {train.gold_P[0]}: add other rows")
    there_PK = None if train.layer_shapes is None else train.active(order_K)
    mean_OK, scale_OK = _standardise(values_POK, there_PK)
    features_PX, first_E = values_POK.reshape(train.n_rows, -1), np.empty(0, np.int64)
    if train.layer_shapes is not None:
        assert there_PK is not None
        first_E = _telling_experts(neuron_groups(train.layer_shapes)[order_K], there_PK)
        features_PX = np.hstack([features_PX, there_PK[:, first_E]])
    model = _regress(features_PX, train.gold_P.astype(np.int64))
    coef_CX, expert_coef_CE = np.split(model.coef_.astype(np.float32), [mean_OK.size], axis=1)
    return FittedLogistic(
        vote=vote,
        order_K=order_K,
        classes_C=model.classes_,
        mean_OK=mean_OK,
        scale_OK=scale_OK,
        coef_COK=np.ascontiguousarray(coef_CX).reshape(-1, *mean_OK.shape),
        intercept_C=model.intercept_.astype(np.float32),
        experts=ExpertWeights(first_E, np.ascontiguousarray(expert_coef_CE)) if len(first_E) else None,
    )


def _standardise(values_POK: Numbers, there_PK: NDArray[np.bool_] | None) -> tuple[Numbers, Numbers]:
    """Standardise values in place and return their means and deviations, each of shape (O, K).

    Parameters
    ----------
    there_PK : bool array (P, K), optional
        Of a mixture of experts, True where a prompt has the neuron: only these count, and all others become 0.
    """
    counted: Any = True
    if there_PK is not None:
        counted = (there_PK | ~there_PK.any(axis=0))[:, None]  # one that no prompt has is zero for all
    mean_OK, scale_OK = values_POK.mean(axis=0, where=counted), values_POK.std(axis=0, where=counted)
    scale_OK[scale_OK == 0] = 1
    values_POK -= mean_OK
    values_POK /= scale_OK
    if there_PK is not None:
        values_POK *= there_PK[:, None]
    return mean_OK, scale_OK


def _telling_experts(groups_K: Ints, there_PK: NDArray[np.bool_]) -> Ints:
    """Return the place of the first neuron of each expert that some and not all prompts have: shape (E,)."""
    _, first_E = np.unique(groups_K, return_index=True)
    share_E = there_PK[:, first_E].mean(axis=0)
    return np.asarray(first_E[(share_E > 0) & (share_E < 1)])


def _regress(values_PX: Numbers, gold_P: Ints) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a baseline: a bounded number of steps is enough
        return LogisticRegression(max_iter=_LOGISTIC_STEPS).fit(values_PX, gold_P)
