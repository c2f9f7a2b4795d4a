"""Skill-neuron probes as scikit-learn estimators: prompts answered from NEGs or activations of few neurons.

Shapes: P prompts, O options, M = L*N neurons (flat index, layer-major: neuron n of layer l is l*N + n),
K the kept neurons in rank order, best first.

Vote probes (Polar, Magn) never need a whole split in memory. Scores are sums over prompts, so they add up
over blocks of rows and concatenate over blocks of neurons; predictions read the kept neurons only::

    scores_M = sum(polar_scores(negs_POM, gold_P) for negs_POM, gold_P in training_blocks)
    widest = PolarProbe.from_scores(scores_M, n_neurons=MAX_NEURONS, n_options=4)
    curve = widest.accuracy_by_k(validation_negs_POM[:, :, widest.kept_], validation_gold_P)
    probe = PolarProbe.from_scores(scores_M, n_neurons=choose_n_neurons(curve), n_options=4)
    options_P = probe.predict_kept(test_negs_POM[:, :, probe.kept_])

Ties, everywhere: of equal |scores| the lower flat index ranks first; of equally many votes the lowest option
wins. A neuron of score 0 has polarity 0; it may be kept, and then favours no option.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from negcore.errors import NegError
from negcore.measure.votes import (
    Ints,
    Numbers,
    Ranking,
    Signs,
    check_finite,
    check_gold,
    check_negs,
    halvings,
    magn_scores,
    magn_votes,
    polar_scores,
    polar_votes,
    row_blocks,
)
from negcore.probing.evaluation import Accuracy, accuracy

MAX_NEURONS = 2**14
"""The largest number of neurons a probe is tried with."""


def neuron_counts(most: int) -> list[int]:
    """The numbers of neurons that are tried: the powers of two up to ``most`` and `MAX_NEURONS`."""
    return [2**i for i in range(min(most, MAX_NEURONS).bit_length())]


_FLOATS = (np.float64, np.float32)  # float32 stays as it is, anything else becomes float64


class _VoteProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """What Polar and Magn share; each adds how neurons are scored and how they vote."""

    def __init__(self, *, n_neurons: int = 64) -> None:
        self.n_neurons = n_neurons

    @staticmethod
    @abstractmethod
    def _scores(negs_POM: Numbers, gold_P: ArrayLike) -> Ints: ...

    @staticmethod
    @abstractmethod
    def _votes(negs_POK: Numbers, polarity_K: Signs) -> Signs: ...

    @classmethod
    def from_scores(cls, scores_M: ArrayLike, *, n_neurons: int, n_options: int) -> Self:
        """A fitted probe from summed scores, as `fit` would make it from all the rows they sum over.

        Parameters
        ----------
        scores_M : array of int, shape (M,)
            Scores of all neurons.
        n_neurons : int
            Neurons to keep.
        n_options : int
            Options of every prompt; the classes are 0..n_options-1.

        Raises
        ------
        NegError
            If the scores are not a vector of integers, or ``n_neurons`` or ``n_options`` is below 1.
        """
        ranking = Ranking.from_scores(scores_M).top(n_neurons)
        return cls.from_ranking(ranking, n_options=n_options, n_all=np.size(scores_M))

    @classmethod
    def from_ranking(cls, ranking: Ranking, *, n_options: int, n_all: int) -> Self:
        """A fitted probe that keeps these very neurons, of a model with ``n_all``; `NegError` without options."""
        if n_options < 1:
            raise NegError(f"n_options is {n_options}: a prompt has at least 1 option")
        probe = cls(n_neurons=len(ranking.order_K))
        probe.classes_ = np.arange(n_options)
        probe.n_features_in_ = n_options * n_all
        probe.kept_, probe.polarity_ = ranking.order_K, ranking.polarity_K
        return probe

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Score all neurons on the training prompts and keep the best.

        Parameters
        ----------
        X : array, shape (P, O, M) or (P, O*M), probability per unit of activation
            NEGs. A table must be option-major (the columns of option 0, then those of option 1, ...) and hold
            as many options as ``y`` has distinct labels: where some option is never gold, give three axes.
        y : array, shape (P,)
            Gold options: indices in 0..O-1 with three axes; with a table any labels, of which the o-th in
            sorted order is option o.

        Raises
        ------
        NegError
            If a NEG is NaN or infinite, a gold option is not an option, or a table is no multiple of options.
        """
        table, n_options = _flatten(X)
        table, labels = validate_data(self, table, y, dtype=_FLOATS, ensure_all_finite=False)
        if n_options is None:
            check_classification_targets(labels)
            self.classes_, gold_P = np.unique(labels, return_inverse=True)
        else:
            self.classes_, gold_P = np.arange(n_options), labels
        return self._keep(self._scores(self._unflatten(table), gold_P))

    def predict(self, X: ArrayLike) -> Numbers:
        """The option most neurons vote for (ties: the lowest), for NEGs of all neurons as in `fit`.

        Returns
        -------
        array, shape (P,)
            Elements of ``classes_``.

        Raises
        ------
        NegError
            If a kept neuron's NEG is NaN or infinite, or the options are not those of the training prompts.
        """
        check_is_fitted(self)
        table, n_options = _flatten(X)
        if n_options not in (None, len(self.classes_)):
            raise NegError(f"X has {n_options} options: this probe was fitted on {len(self.classes_)}")
        table = validate_data(self, table, dtype=_FLOATS, ensure_all_finite=False, reset=False)
        return self.predict_kept(self._unflatten(table)[:, :, self.kept_])

    def predict_kept(self, negs_POK: Numbers) -> Numbers:
        """`predict` from the columns of the kept neurons alone.

        Parameters
        ----------
        negs_POK : array, shape (P, O, K), probability per unit of activation
            NEGs of the neurons ``kept_``, in that order.

        Returns
        -------
        array, shape (P,)
            Elements of ``classes_``.

        Raises
        ------
        NegError
            If a NEG is NaN or infinite, or the shape is not that of the kept neurons and the options.
        """
        return np.asarray(self.classes_[self._choices(negs_POK, [len(self.kept_)])[:, 0]])

    def accuracy_by_k(self, negs_POK: Numbers, gold_P: ArrayLike) -> dict[int, Accuracy]:
        """Accuracy of this probe cut down to its best 1, 2, 4, ... neurons, in one pass.

        Accuracies of blocks of prompts add up. Meant for validation prompts and `choose_n_neurons`.

        Parameters
        ----------
        negs_POK : array, shape (P, O, K), probability per unit of activation
            NEGs of the neurons ``kept_``, in that order.
        gold_P : array of int, shape (P,)
            Index of each prompt's gold option.

        Returns
        -------
        dict of int to Accuracy
            For each power of two up to K and `MAX_NEURONS`.

        Raises
        ------
        NegError
            As `predict_kept`; also if there are no prompts or a gold option is not an option.
        """
        ks = neuron_counts(len(self.kept_))
        choices_PJ = self._choices(negs_POK, ks)
        gold = check_gold(gold_P, len(self.classes_))
        return {k: accuracy(gold, choices_PJ[:, j]) for j, k in enumerate(ks)}

    def _keep(self, scores_M: ArrayLike) -> Self:
        kept = Ranking.from_scores(scores_M).top(self.n_neurons)
        self.kept_, self.polarity_ = kept.order_K, kept.polarity_K
        return self

    def _choices(self, negs_POK: Numbers, ks: list[int]) -> Ints:
        """Index of the option chosen by the best k neurons, for each of the rising ks: shape (P, len(ks))."""
        wanted = (len(self.classes_), len(self.kept_))
        if negs_POK.shape[1:] != wanted:
            raise NegError(
                f"NEGs have shape {negs_POK.shape}: give {wanted[0]} options x {wanted[1]} kept neurons a prompt"
            )
        check_negs(negs_POK, neurons_M=self.kept_)
        choices_PJ = np.empty((len(negs_POK), len(ks)), np.int64)
        for rows in row_blocks(negs_POK.shape):
            votes_POK = self._votes(negs_POK[rows, :, : ks[-1]], self.polarity_[: ks[-1]])
            # Votes of the neurons between one k and the next, then running totals: all ks in one pass.
            gained_POJ = np.add.reduceat(votes_POK, [0, *ks[:-1]], axis=2, dtype=np.int32)
            choices_PJ[rows] = gained_POJ.cumsum(axis=2).argmax(axis=1)
        return choices_PJ

    def _unflatten(self, table: Numbers) -> Numbers:
        n_options = len(self.classes_)
        if table.shape[1] % n_options:
            raise NegError(
                f"X has {table.shape[1]} columns, no multiple of the {n_options} options: "
                "give X as (prompts, options, neurons)"
            )
        return table.reshape(len(table), n_options, -1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.classifier_tags.poor_score = True  # on tables that are no NEGs
        return tags


class PolarProbe(_VoteProbe):
    """Vote of the signs of the NEGs of the neurons whose sign tells the gold option best.

    A neuron's score is the sum over prompts of 2*sign(v_gold) - sum over options of sign(v), its polarity the
    score's sign. The option with the largest sum of sign(v) * polarity over the kept neurons is predicted.

    Parameters
    ----------
    n_neurons : int
        Neurons to keep; all, if there are fewer.

    Attributes
    ----------
    classes_ : array, shape (O,)
        The options.
    kept_ : array of int64, shape (K,)
        Flat indices of the kept neurons, best first.
    polarity_ : array of int8, shape (K,)
        Their polarities: -1, 0 or 1.
    n_features_in_ : int
        O * M.

    References
    ----------
    Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053), skill neuron probing.
    """

    _scores = staticmethod(polar_scores)
    _votes = staticmethod(polar_votes)


class MagnProbe(_VoteProbe):
    """Vote of the neurons whose order of the options' NEGs tells the gold option best.

    A neuron's score is the sum over prompts and options of sign(v_gold - v_option), its polarity the score's
    sign. Each kept neuron votes for the option where v * polarity is largest (every one of them, if several
    are), and the option with the most votes is predicted.

    Parameters, Attributes, References: as `PolarProbe`.
    """

    _scores = staticmethod(magn_scores)
    _votes = staticmethod(magn_votes)


class LMProbe(BaseEstimator):  # type: ignore[misc]
    """The language model's own answer: the option whose label is most probable (ties: the lowest).

    No `ClassifierMixin`, as it learns nothing from gold options: it answers with the index of a column.

    Attributes
    ----------
    classes_ : array of int, shape (O,)
        The options, 0..O-1.
    n_features_in_ : int
        O.
    """

    def fit(self, X: ArrayLike, y: object = None) -> Self:
        """Take the number of options from X, array, shape (P, O), probability; ``y`` is ignored."""
        self._read(X, reset=True)
        self.classes_ = np.arange(self.n_features_in_)
        return self

    def predict(self, X: ArrayLike) -> Numbers:
        """Index of the most probable option, array of int, shape (P,).

        Parameters
        ----------
        X : array, shape (P, O), probability
            Probability of each option's label.

        Raises
        ------
        NegError
            If a probability is NaN or infinite.
        """
        check_is_fitted(self)
        return np.asarray(self.classes_[self._read(X, reset=False).argmax(axis=1)])

    def _read(self, X: ArrayLike, *, reset: bool) -> Numbers:
        probs_PO = validate_data(self, X, dtype=_FLOATS, ensure_all_finite=False, reset=reset)
        return check_finite(probs_PO, "probability", ("row", "option"))


@dataclass(frozen=True, slots=True, eq=False)
class ActSplit:
    """One binary question of an `ActProbe`: is the class among [start, middle) or [middle, stop)?

    Attributes
    ----------
    start, middle, stop : int
        Positions in ``classes_``.
    kept : Ranking
        The neurons that vote; polarity 1 says "above threshold means the upper half".
    threshold_K : array of float64, shape (K,), activation
        Mean activation over the training prompts of these classes.
    """

    start: int
    middle: int
    stop: int
    kept: Ranking
    threshold_K: NDArray[np.float64]

    def is_upper(self, activations_PM: Numbers) -> NDArray[np.bool_]:
        """Whether the majority votes for the upper half, shape (P,); a draw is the lower half."""
        return self.is_upper_by_k(activations_PM[:, self.kept.order_K], [len(self.kept.order_K)])[:, 0]

    def is_upper_by_k(self, activations_PK: Numbers, ks: Sequence[int]) -> NDArray[np.bool_]:
        """`is_upper` with the best k neurons alone, for each of the rising ks: shape (P, len(ks))."""
        check_finite(activations_PK, "activation", ("row", "neuron"), self.kept.order_K)
        polarity_K = self.kept.polarity_K[: ks[-1]]
        votes_PK = np.where(activations_PK[:, : ks[-1]] > self.threshold_K[: ks[-1]], polarity_K, -polarity_K)
        gained_PJ = np.add.reduceat(votes_PK, [0, *ks[:-1]], axis=1, dtype=np.int64)
        return np.asarray(gained_PJ.cumsum(axis=1) > 0)


class ActProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Baseline on activations: neurons above or below their mean vote between two halves of the classes.

    Per split: a neuron's threshold is its mean activation, its score \\|accuracy - 0.5\\| of "above threshold
    means the upper half", its polarity the sign of accuracy - 0.5. The best vote; more than two classes are
    split recursively into two halves of the sorted classes (the lower one smaller, if their number is odd).
    A value equal to the threshold is not above it.

    Differs from the paper: the baseline's neurons come from soft prompts; here, from the task's own prompts.

    Parameters
    ----------
    n_neurons : int
        Neurons to keep for each split; all, if there are fewer.

    Attributes
    ----------
    classes_ : array, shape (C,)
        Distinct training labels, sorted. An option never gold in training is never predicted.
    splits_ : list of ActSplit
        Each before those of its halves; empty for a single class.
    n_features_in_ : int
        M.

    References
    ----------
    Wang et al., "Finding Skill Neurons in Pre-trained Transformer-based Language Models", EMNLP 2022
    (arXiv 2211.07349), section 3.
    """

    def __init__(self, *, n_neurons: int = 64) -> None:
        self.n_neurons = n_neurons

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Find thresholds and neurons of each split.

        Parameters
        ----------
        X : array, shape (P, M), activation
            Activations at the probed position.
        y : array, shape (P,)
            Gold options, any labels.

        Raises
        ------
        NegError
            If an activation is NaN or infinite, or ``n_neurons`` is below 1.
        """
        activations_PM, labels = validate_data(self, X, y, dtype=_FLOATS, ensure_all_finite=False)
        check_finite(activations_PM, "activation", ("row", "neuron"))
        check_classification_targets(labels)
        self.classes_, class_P = np.unique(labels, return_inverse=True)
        self.splits_ = [
            _fit_split(activations_PM, class_P, halves, self.n_neurons) for halves in halvings(0, len(self.classes_))
        ]
        return self

    def predict(self, X: ArrayLike) -> Numbers:
        """The class each prompt's votes lead to, array, shape (P,), from activations as in `fit`.

        Raises
        ------
        NegError
            If an activation is NaN or infinite.
        """
        check_is_fitted(self)
        activations_PM = validate_data(self, X, dtype=_FLOATS, ensure_all_finite=False, reset=False)
        check_finite(activations_PM, "activation", ("row", "neuron"))
        every = [min(self.n_neurons, activations_PM.shape[1])]
        return self.predict_by_k(lambda order_K: activations_PM[:, order_K], len(activations_PM), every)[:, 0]

    def predict_by_k(self, activations_of: Callable[[Ints], Numbers], n_rows: int, ks: Sequence[int]) -> NDArray[Any]:
        """Predictions with the best k neurons of every split, for each of the rising ks: shape (P, len(ks)).

        Parameters
        ----------
        activations_of : callable
            Given flat indices (K,), the activations of those neurons: array, shape (P, K). Asked split by split.
        n_rows : int
            P.
        ks : sequence of int
            At most the number of kept neurons.
        """
        start_PJ = np.zeros((n_rows, len(ks)), np.int64)
        stop_PJ = np.full((n_rows, len(ks)), len(self.classes_))
        for split in self.splits_:
            here_PJ = (start_PJ == split.start) & (stop_PJ == split.stop)
            upper_PJ = split.is_upper_by_k(activations_of(split.kept.order_K), ks)
            start_PJ[here_PJ & upper_PJ] = split.middle
            stop_PJ[here_PJ & ~upper_PJ] = split.middle
        return np.asarray(self.classes_[start_PJ])

    @classmethod
    def from_splits(cls, splits: Sequence[ActSplit], classes: ArrayLike, *, n_neurons: int, n_all: int) -> Self:
        """A fitted probe from its binary questions, in `fit`'s order, cut down to ``n_neurons`` neurons each."""
        probe = cls(n_neurons=n_neurons)
        probe.classes_, probe.n_features_in_ = np.asarray(classes), n_all
        probe.splits_ = [
            ActSplit(s.start, s.middle, s.stop, s.kept.top(n_neurons), s.threshold_K[:n_neurons]) for s in splits
        ]
        return probe

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # on tables of two columns: two neurons hardly make a vote
        return tags


def _fit_split(activations_PM: Numbers, class_P: Ints, halves: tuple[int, int, int], n_neurons: int) -> ActSplit:
    start, middle, stop = halves
    rows = np.flatnonzero((class_P >= start) & (class_P < stop))
    blocks = [rows[block] for block in row_blocks((len(rows), activations_PM.shape[1]))]
    # float64: the mean of equal float32 values is then exactly that value, and none of them is above it.
    threshold_M = sum(activations_PM[block].sum(axis=0, dtype=np.float64) for block in blocks) / len(rows)
    scores_M = np.zeros(activations_PM.shape[1], np.int64)
    for block in blocks:
        above_PM = (activations_PM[block] > threshold_M).astype(np.float32)
        side_P = np.where(class_P[block] >= middle, 1, -1).astype(np.float32)
        # Right minus wrong answers, that is 2n * (accuracy - 0.5): an integer, so ties are exact.
        scores_M += (2 * (side_P @ above_PM) - side_P.sum()).astype(np.int64)
    kept = Ranking.from_scores(scores_M).top(n_neurons)
    return ActSplit(start, middle, stop, kept, threshold_M[kept.order_K])


class TreeProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Random forest on which option each neuron's NEG is largest for.

    X is made by `argmax_features`, one byte a prompt and neuron, block by block. scikit-learn copies it to
    float32: count 5 bytes x P x M while fitting and predicting (1.3 GiB for 6000 prompts x 46 080 neurons),
    plus the trees. Equal class probabilities go to the lower class.

    Parameters
    ----------
    n_trees : int
        Trees of the forest. With one seed, the first trees of a larger forest are those of a smaller one.
    max_depth : int, optional
        Most questions from the root of a tree to a leaf; by default as many as it takes, as in the paper.
    random_state : int
        Seed of the samples and features each tree sees.

    Attributes
    ----------
    classes_ : array, shape (C,)
        Distinct training labels, sorted. An option never gold in training is never predicted.
    forest_ : RandomForestClassifier
        The fitted forest.
    n_features_in_ : int
        M.

    References
    ----------
    Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053), skill neuron probing.
    """

    def __init__(self, *, n_trees: int = 100, max_depth: int | None = None, random_state: int = 0) -> None:
        self.n_trees = n_trees
        self.max_depth = max_depth
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Grow the forest.

        Parameters
        ----------
        X : array of uint8, shape (P, M), option index
            Features from `argmax_features`.
        y : array, shape (P,)
            Gold options, any labels.
        """
        features_PM, labels = validate_data(self, X, y)
        forest = RandomForestClassifier(
            n_estimators=self.n_trees, max_depth=self.max_depth, random_state=self.random_state
        )
        self.forest_ = forest.fit(features_PM, labels)
        self.classes_ = self.forest_.classes_
        return self

    def predict(self, X: ArrayLike) -> Numbers:
        """The class most trees hold likely, array, shape (P,), from features as in `fit`."""
        check_is_fitted(self)
        return np.asarray(self.forest_.predict(validate_data(self, X, reset=False)))


def _flatten(X: Any) -> tuple[Any, int | None]:
    """X as a table, and its number of options where its shape tells it."""
    if getattr(X, "ndim", 2) != 3:
        return X, None
    return X.reshape(len(X), -1), X.shape[1]
