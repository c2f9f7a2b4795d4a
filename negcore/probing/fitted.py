"""Fitted probes that answer whole splits, and how each is fitted: only the neurons a probe uses are ever read.

Axes: P prompts, O options, C classes, K kept neurons (best first), F features of a forest, V nodes of all its trees.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from negcore.errors import NegError
from negcore.measure.votes import Ints, Numbers, Ranking, Signs, Vote, argmax_features, halvings
from negcore.probing.evaluation import Accuracy, accuracy, choose_n_neurons
from negcore.probing.probes import ActProbe, ActSplit, MagnProbe, PolarProbe, TreeProbe, neuron_counts
from negcore.probing.rankings import ActScores, chosen_effects, chosen_signed_ranks
from negcore.store.reader import NegSplit

VOTE_PROBES = MappingProxyType({"polar": PolarProbe, "magn": MagnProbe})

FOREST_BYTES = 4 * 2**30
"""Most memory the features of a forest may take while it grows: one byte each, and four in scikit-learn's copy."""

LOGISTIC_VALUES = 2**26
"""Most training values (prompts x options x neurons) of a logistic regression: 256 MiB, and as much for its work."""

_LOGISTIC_STEPS = 200


class FittedProbe(ABC):
    """A probe that answers prompts with the index of an option."""

    @property
    @abstractmethod
    def n_neurons(self) -> int:
        """Neurons that it reads (of an Act-Probe: for each of its binary questions)."""

    @abstractmethod
    def predict(self, split: NegSplit) -> Ints:
        """Index of the option chosen for every prompt: shape (P,).

        Raises
        ------
        NegError
            If the split's prompts have other options or a neuron is missing or no number.
        """


@dataclass(frozen=True, eq=False)
class FittedVote(FittedProbe):
    """Neurons that vote: `PolarProbe` or `MagnProbe` on one of the signals."""

    vote: Vote
    ranking: Ranking
    n_options: int
    n_all: int
    """Neurons of the model."""

    @property
    def n_neurons(self) -> int:
        return len(self.ranking.order_K)

    @property
    def estimator(self) -> PolarProbe | MagnProbe:
        """The scikit-learn estimator."""
        return VOTE_PROBES[self.vote.rule].from_ranking(self.ranking, n_options=self.n_options, n_all=self.n_all)

    def predict(self, split: NegSplit) -> Ints:
        probe, predicted_P = self.estimator, np.empty(split.n_rows, np.int64)
        for block in split.row_blocks():
            predicted_P[block.rows] = probe.predict_kept(chosen_signed_ranks(block, self.vote.signal, probe.kept_))
        return predicted_P

    def accuracy_by_k(self, split: NegSplit) -> dict[int, Accuracy]:
        """Accuracy with the best 1, 2, 4, ... of the neurons."""
        probe, total = self.estimator, dict[int, Accuracy]()
        for block in split.row_blocks():
            effects_POK = chosen_signed_ranks(block, self.vote.signal, probe.kept_)
            for k, one in probe.accuracy_by_k(effects_POK, block.shard.numbers("gold")).items():
                total[k] = total[k] + one if k in total else one
        return total

    def cut(self, n_neurons: int) -> FittedVote:
        """The probe with its best neurons alone."""
        return FittedVote(self.vote, self.ranking.top(n_neurons), self.n_options, self.n_all)


def fit_vote(vote: Vote, scores_M: Ints, valid: NegSplit, *, max_neurons: int) -> FittedVote:
    """Keep the best neurons, as many as answer `valid` best (of equal numbers the smallest)."""
    ranking = Ranking.from_scores(scores_M).top(max_neurons)
    widest = FittedVote(vote, ranking, valid.n_options, len(scores_M))
    return widest.cut(choose_n_neurons(widest.accuracy_by_k(valid)))


def random_vote(best: FittedVote, scores_M: Ints, *, seed: int) -> FittedVote:
    """Baseline: as many neurons drawn at random, each with the polarity of its own score."""
    order_K = random_neurons(len(scores_M), best.n_neurons, seed=seed)
    polarity_K: Signs = np.sign(scores_M[order_K]).astype(np.int8)
    return FittedVote(best.vote, Ranking(order_K, polarity_K), best.n_options, best.n_all)


def random_neurons(n_all: int, n_neurons: int, *, seed: int) -> Ints:
    """The neurons that `random_vote` draws: flat indices, shape (K,)."""
    return np.random.default_rng(seed).choice(n_all, size=n_neurons, replace=False).astype(np.int64)


@dataclass(frozen=True, eq=False)
class FittedAct(FittedProbe):
    """Activations against thresholds: `ActProbe`."""

    estimator: ActProbe

    @property
    def n_neurons(self) -> int:
        return min(int(self.estimator.n_neurons), int(self.estimator.n_features_in_))

    def predict(self, split: NegSplit) -> Ints:
        return self._by_k(split, [self.n_neurons])[:, 0]

    def accuracy_by_k(self, split: NegSplit) -> dict[int, Accuracy]:
        """Accuracy with the best 1, 2, 4, ... neurons of every binary question."""
        ks = neuron_counts(self.n_neurons)
        predicted_PJ = self._by_k(split, ks)
        return {k: accuracy(split.gold_P, predicted_PJ[:, j]) for j, k in enumerate(ks)}

    def _by_k(self, split: NegSplit, ks: Sequence[int]) -> Ints:
        predicted_PJ = np.empty((split.n_rows, len(ks)), np.int64)
        for block in split.row_blocks():
            predicted_PJ[block.rows] = self.estimator.predict_by_k(block.activations, block.shard.n_rows, ks)
        return predicted_PJ


def fit_act(act: ActScores, gold_train_P: Numbers, valid: NegSplit, *, max_neurons: int) -> FittedAct:
    """Keep the best neurons of every binary question, as many as answer `valid` best."""
    classes, n_all = np.unique(gold_train_P), act.scores_SM.shape[1]
    splits = []
    for at, (start, middle, stop) in enumerate(halvings(0, len(classes))):
        kept = Ranking.from_scores(act.scores_SM[at]).top(max_neurons)
        splits.append(ActSplit(start, middle, stop, kept, act.thresholds_SM[at, kept.order_K]))
    widest = ActProbe.from_splits(splits, classes, n_neurons=min(max_neurons, n_all), n_all=n_all)
    k = choose_n_neurons(FittedAct(widest).accuracy_by_k(valid))
    return FittedAct(ActProbe.from_splits(splits, classes, n_neurons=k, n_all=n_all))


@dataclass(frozen=True, eq=False)
class Forest:
    """The trees of a random forest as plain arrays, one behind the other.

    Attributes
    ----------
    classes_C : array of int64
    root_T : array of int32
        First node of each tree.
    feature_V, left_V, right_V : array of int32
        Feature asked at a node, and the node that follows; -1 at a leaf.
    threshold_V : array of float64
        Left if the feature is at most this.
    probs_VC : array of float64
        Share of each class among the node's training rows.
    """

    classes_C: Ints
    root_T: NDArray[np.int32]
    feature_V: NDArray[np.int32]
    left_V: NDArray[np.int32]
    right_V: NDArray[np.int32]
    threshold_V: NDArray[np.float64]
    probs_VC: NDArray[np.float64]

    @classmethod
    def of(cls, forest: RandomForestClassifier) -> Self:
        """The trees of a fitted forest."""
        trees = [estimator.tree_ for estimator in forest.estimators_]
        root_T = np.cumsum([0, *(tree.node_count for tree in trees[:-1])]).astype(np.int32)

        def children(name: str) -> NDArray[np.int32]:
            found = [(getattr(tree, name), root) for tree, root in zip(trees, root_T, strict=True)]
            return np.concatenate([np.where(nodes < 0, -1, nodes + root) for nodes, root in found]).astype(np.int32)

        left_V = children("children_left")
        return cls(
            classes_C=np.asarray(forest.classes_, np.int64),
            root_T=root_T,
            feature_V=np.where(left_V < 0, -1, np.concatenate([tree.feature for tree in trees])).astype(np.int32),
            left_V=left_V,
            right_V=children("children_right"),
            threshold_V=np.concatenate([tree.threshold for tree in trees]),
            probs_VC=np.concatenate([tree.value[:, 0] for tree in trees]),
        )

    def predict(self, features_PF: NDArray[np.uint8]) -> Ints:
        """The class most trees hold likely, as scikit-learn's forest predicts it (ties: the lower class)."""
        return self.predict_by_trees(features_PF, [len(self.root_T)])[:, 0]

    def predict_by_trees(self, features_PF: NDArray[np.uint8], counts: Sequence[int]) -> Ints:
        """`predict` with the first trees alone, for each of the rising counts: shape (P, len(counts))."""
        total_PC = np.zeros((len(features_PF), len(self.classes_C)))
        predicted_PJ = np.empty((len(features_PF), len(counts)), np.int64)
        for n_trees, root in enumerate(self.root_T[: counts[-1]], 1):
            total_PC += self.probs_VC[self._leaves(features_PF, root)]
            if n_trees in counts:
                predicted_PJ[:, counts.index(n_trees)] = self.classes_C[(total_PC / n_trees).argmax(axis=1)]
        return predicted_PJ

    def _leaves(self, features_PF: NDArray[np.uint8], root: int) -> NDArray[np.int32]:
        node_P = np.full(len(features_PF), root, np.int32)
        walking = np.arange(len(features_PF))
        while (walking := walking[self.left_V[node_P[walking]] >= 0]).size:
            node = node_P[walking]
            is_left = features_PF[walking, self.feature_V[node]] <= self.threshold_V[node]
            node_P[walking] = np.where(is_left, self.left_V[node], self.right_V[node])
        return node_P


@dataclass(frozen=True, eq=False)
class FittedForest(FittedProbe):
    """A random forest on which option each neuron's NEG is largest for: `TreeProbe`."""

    order_K: Ints
    forest: Forest

    @property
    def n_neurons(self) -> int:
        return len(self.order_K)

    def predict(self, split: NegSplit) -> Ints:
        return self.forest.predict(forest_features(split, self.order_K))


def fit_forest(train: NegSplit, order_K: Ints, *, seed: int) -> FittedForest:
    """Grow a forest on the given neurons. Differs from the paper, where a forest reads all neurons of the model."""
    probe = TreeProbe(random_state=seed).fit(forest_features(train, order_K), train.gold_P.astype(np.int64))
    return FittedForest(order_K, Forest.of(probe.forest_))


def check_forest_size(n_rows: int, n_neurons: int) -> None:
    """Refuse a forest whose features would not fit in `FOREST_BYTES`.

    Raises
    ------
    NegError
    """
    needed = 5 * n_rows * n_neurons
    if needed > FOREST_BYTES:
        raise NegError(
            f"a forest on {n_rows} training rows x {n_neurons} neurons needs {needed / 2**30:.1f} GiB, "
            f"and {FOREST_BYTES / 2**30:g} are allowed: set tree_neurons to at most {FOREST_BYTES // (5 * n_rows)}, "
            "or set limit"
        )


def forest_features(split: NegSplit, order_K: Ints) -> NDArray[np.uint8]:
    """For the given neurons of every prompt, the option with the largest NEG: shape (P, K); see `argmax_features`."""
    features_PK = np.empty((split.n_rows, len(order_K)), np.uint8)
    for block in split.row_blocks():
        features_PK[block.rows] = argmax_features(block.signed_ranks(order_K))
    return features_PK


@dataclass(frozen=True, eq=False)
class FittedLogistic(FittedProbe):
    """Baseline: logistic regression on the standardised values of some neurons for all options.

    Attributes
    ----------
    vote : Vote
        Whose neurons, and which signal.
    order_K : array of int64
    classes_C : array of int64
    mean_OK, scale_OK : array of float32
        Of the training prompts.
    coef_COK : array of float32
        Weights; with two classes those of the second against the first, C is 1.
    intercept_C : array of float32
    """

    vote: Vote
    order_K: Ints
    classes_C: Ints
    mean_OK: NDArray[np.float32]
    scale_OK: NDArray[np.float32]
    coef_COK: NDArray[np.float32]
    intercept_C: NDArray[np.float32]

    @property
    def n_neurons(self) -> int:
        return len(self.order_K)

    def predict(self, split: NegSplit) -> Ints:
        predicted_P = np.empty(split.n_rows, np.int64)
        for block in split.row_blocks():
            effects_POK = chosen_effects(block, self.vote.signal, self.order_K)
            predicted_P[block.rows] = self._predict((effects_POK - self.mean_OK) / self.scale_OK)
        return predicted_P

    def _predict(self, values_POK: Numbers) -> Ints:
        logits_PC = np.einsum("pok,cok->pc", values_POK, self.coef_COK, optimize=True) + self.intercept_C
        if len(self.classes_C) == 2:
            return np.asarray(self.classes_C[(logits_PC[:, 0] > 0).astype(int)])
        return np.asarray(self.classes_C[logits_PC.argmax(axis=1)])


def fit_logistic(vote: Vote, order_K: Ints, train: NegSplit) -> FittedLogistic:
    """Fit on the given neurons, or the first of them that `LOGISTIC_VALUES` has room for; C = 1, not tuned.

    Raises
    ------
    NegError
        If all training prompts have the same gold option, or the shards hold codes.
    """
    order_K = order_K[: max(1, LOGISTIC_VALUES // (train.n_rows * train.n_options))]
    values_POK = np.empty((train.n_rows, train.n_options, len(order_K)), np.float32)
    for block in train.row_blocks():
        values_POK[block.rows] = chosen_effects(block, vote.signal, order_K)
    if len(np.unique(train.gold_P)) < 2:
        raise NegError(f"all {train.n_rows} training prompts have gold option {train.gold_P[0]}: add other rows")
    mean_OK, scale_OK = values_POK.mean(axis=0), values_POK.std(axis=0)
    scale_OK[scale_OK == 0] = 1
    values_POK -= mean_OK
    values_POK /= scale_OK
    model = _regress(values_POK.reshape(train.n_rows, -1), train.gold_P.astype(np.int64))
    return FittedLogistic(
        vote=vote,
        order_K=order_K,
        classes_C=model.classes_,
        mean_OK=mean_OK,
        scale_OK=scale_OK,
        coef_COK=model.coef_.astype(np.float32).reshape(-1, *mean_OK.shape),
        intercept_C=model.intercept_.astype(np.float32),
    )


def _regress(values_PX: Numbers, gold_P: Ints) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a baseline: a bounded number of steps is enough
        return LogisticRegression(max_iter=_LOGISTIC_STEPS).fit(values_PX, gold_P)
