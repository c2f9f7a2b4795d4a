"""Skill-neuron probes as scikit-learn estimators: they answer prompts from the NEGs of few neurons.

Shapes: P prompts, O options, M = L*N neurons (flat index, layer-major: neuron n of layer l is l*N + n),
K the kept neurons in rank order, best first.

Vote probes (Polar, Magn) never need a whole split in memory. Scores are sums over prompts, so they add up
over blocks of rows and concatenate over blocks of neurons; predictions read the kept neurons only::

    scores_M = sum(polar_scores(negs_POM, gold_P) for negs_POM, gold_P in training_blocks)
    ranking = Ranking.from_scores(scores_M)
    widest = PolarProbe.from_ranking(ranking.top(MAX_KEPT), n_options=4, n_all=len(scores_M))
    curve = widest.accuracy_by_k(validation_negs_POM[:, :, widest.kept_], validation_gold_P)
    probe = PolarProbe.from_ranking(ranking.top(choose_n_kept(curve)), n_options=4, n_all=len(scores_M))
    options_P = probe.predict_kept(test_negs_POM[:, :, probe.kept_])

Ties, everywhere: of equal |scores| the lower flat index ranks first; of equally many votes the lowest option
wins. A neuron of score 0 has polarity 0; it may be kept, and then favours no option.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from negcore.arrays import Ints
from negcore.errors import NegError
from negcore.measure.votes import (
    Numbers,
    Ranking,
    Signs,
    check_finite,
    check_gold,
    check_negs,
    magn_scores,
    magn_votes,
    polar_scores,
    polar_votes,
    row_blocks,
)
from negcore.probing.evaluation import Accuracy, accuracy

MAX_KEPT = 2**14
"""The largest number of neurons a probe is tried with."""

FLOATS = (np.float64, np.float32)
"""Number types of probe inputs: float32 stays as it is, anything else becomes float64."""


def kept_counts(most: int) -> list[int]:
    """Return the numbers of neurons to try: the powers of two up to ``most`` and `MAX_KEPT`."""
    return [2**i for i in range(min(most, MAX_KEPT).bit_length())]


class _VoteProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Base of Polar and Magn; each adds a way to score neurons and a way to vote."""

    def __init__(self, *, n_kept: int = 64) -> None:
        self.n_kept = n_kept

    @staticmethod
    @abstractmethod
    def _scores(negs_POM: Numbers, gold_P: ArrayLike) -> Ints: ...

    @staticmethod
    @abstractmethod
    def _votes(negs_POK: Numbers, polarity_K: Signs) -> Signs: ...

    @classmethod
    def from_ranking(cls, ranking: Ranking, *, n_options: int, n_all: int) -> Self:
        """Return a fitted probe that keeps these neurons of ``n_all``; raise `NegError` if there are no options."""
        if n_options < 1:
            raise NegError(f"n_options is {n_options}: a prompt has at least 1 option")
        probe = cls(n_kept=len(ranking.order_K))
        probe.classes_ = np.arange(n_options)
        probe.n_features_in_ = n_options * n_all
        probe.kept_, probe.polarity_ = ranking.order_K, ranking.polarity_K
        return probe

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Score all neurons on the training prompts and keep the best.

        Parameters
        ----------
        X : array, shape (P, O, M) or (P, O*M), target per unit of activation
            NEGs. A table must be option-major (the columns of option 0, then those of option 1, ...) and hold
            as many options as ``y`` has distinct labels; if some option is never gold, give three axes.
        y : array, shape (P,)
            Gold options: indices in 0..O-1 with three axes; any labels with a table, where the o-th label in
            sorted order is option o.

        Raises
        ------
        NegError
            If a NEG is NaN or infinite, a gold option is not an option, or the columns of a table do not divide
            into the options.
        """
        table, n_options = _flatten(X)
        table, labels = validate_data(self, table, y, dtype=FLOATS, ensure_all_finite=False)
        if n_options is None:
            check_classification_targets(labels)
            self.classes_, gold_P = np.unique(labels, return_inverse=True)
        else:
            self.classes_, gold_P = np.arange(n_options), labels
        return self._keep(self._scores(self._unflatten(table), gold_P))

    def predict(self, X: ArrayLike) -> Numbers:
        """Return the option with the most votes (ties: the lowest) from NEGs of all neurons as in `fit`: shape (P,).

        Raises
        ------
        NegError
            If a kept neuron's NEG is NaN or infinite, or the options are not those of the training prompts.
        """
        check_is_fitted(self)
        table, n_options = _flatten(X)
        if n_options not in (None, len(self.classes_)):
            raise NegError(f"X has {n_options} options: this probe was fitted on {len(self.classes_)}")
        table = validate_data(self, table, dtype=FLOATS, ensure_all_finite=False, reset=False)
        return self.predict_kept(self._unflatten(table)[:, :, self.kept_])

    def predict_kept(self, negs_POK: Numbers) -> Numbers:
        """Return what `predict` returns, from the columns of the kept neurons alone.

        Parameters
        ----------
        negs_POK : array, shape (P, O, K), target per unit of activation
            NEGs of the neurons ``kept_``, in that order.

        Raises
        ------
        NegError
            If a NEG is NaN or infinite, or the shape is not that of the kept neurons and the options.
        """
        return np.asarray(self.classes_[self._choices(negs_POK, [len(self.kept_)])[:, 0]])

    def accuracy_by_k(self, negs_POK: Numbers, gold_P: ArrayLike) -> dict[int, Accuracy]:
        """Measure the accuracy of this probe cut down to its best 1, 2, 4, ... neurons, in one pass.

        Accuracies of blocks of prompts add up. Give validation prompts, and the result to `choose_n_kept`.

        Parameters
        ----------
        negs_POK : array, shape (P, O, K), target per unit of activation
            NEGs of the neurons ``kept_``, in that order.
        gold_P : array of int, shape (P,)
            Index of each prompt's gold option.

        Returns
        -------
        dict of int to Accuracy
            For each power of two up to K and `MAX_KEPT`.

        Raises
        ------
        NegError
            As `predict_kept`; also if there are no prompts or a gold option is not an option.
        """
        choices_PJ, gold = self.predict_by_k(negs_POK), check_gold(gold_P, len(self.classes_))
        return {k: accuracy(gold, choices_PJ[:, j]) for j, k in enumerate(kept_counts(len(self.kept_)))}

    def predict_by_k(self, negs_POK: Numbers) -> Ints:
        """Return the index of the option that the best 1, 2, 4, ... neurons choose: (P, numbers of neurons).

        Parameters, Raises: as `predict_kept`.
        """
        return self._choices(negs_POK, kept_counts(len(self.kept_)))

    def count_votes(self, negs_POK: Numbers) -> Ints:
        """Return the votes for each option: (P, O). The most votes, of equal ones the lowest option, are `predict`'s.

        Parameters, Raises: as `predict_kept`.
        """
        self._check_kept(negs_POK)
        votes_PO = np.empty(negs_POK.shape[:2], np.int64)
        for rows in row_blocks(negs_POK.shape):
            votes_PO[rows] = self._votes(negs_POK[rows], self.polarity_).sum(axis=2, dtype=np.int64)
        return votes_PO

    def _keep(self, scores_M: ArrayLike) -> Self:
        kept = Ranking.from_scores(scores_M).top(self.n_kept)
        self.kept_, self.polarity_ = kept.order_K, kept.polarity_K
        return self

    def _choices(self, negs_POK: Numbers, ks: list[int]) -> Ints:
        """Return the index of the option that the best k neurons choose, for each of the rising ks: (P, len(ks))."""
        self._check_kept(negs_POK)
        choices_PJ = np.empty((len(negs_POK), len(ks)), np.int64)
        for rows in row_blocks(negs_POK.shape):
            votes_POK = self._votes(negs_POK[rows, :, : ks[-1]], self.polarity_[: ks[-1]])
            # Sums of the votes between one k and the next, then running totals, give all ks in one pass.
            gained_POJ = np.add.reduceat(votes_POK, [0, *ks[:-1]], axis=2, dtype=np.int32)
            choices_PJ[rows] = gained_POJ.cumsum(axis=2).argmax(axis=1)
        return choices_PJ

    def _check_kept(self, negs_POK: Numbers) -> None:
        wanted = (len(self.classes_), len(self.kept_))
        if negs_POK.shape[1:] != wanted:
            raise NegError(
                f"NEGs have shape {negs_POK.shape}: give {wanted[0]} options x {wanted[1]} kept neurons a prompt"
            )
        check_negs(negs_POK, neurons_M=self.kept_)

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
        tags.classifier_tags.poor_score = True  # on tables that do not hold NEGs
        return tags


class PolarProbe(_VoteProbe):
    """Vote by sign: the neurons whose signs of NEG tell the gold option best.

    A neuron's score is the sum over prompts of 2*sign(v_gold) - sum over options of sign(v); its polarity is the
    score's sign. The option with the largest sum of sign(v) * polarity over the kept neurons is predicted.

    Parameters
    ----------
    n_kept : int
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
    """Vote by order: the neurons whose order of the options' NEGs tells the gold option best.

    A neuron's score is the sum over prompts and options of sign(v_gold - v_option); its polarity is the score's
    sign. Each kept neuron votes for the option where v * polarity is largest (every one of them, if several
    are), and the option with the most votes is predicted.

    Parameters, Attributes, References: as `PolarProbe`.
    """

    _scores = staticmethod(magn_scores)
    _votes = staticmethod(magn_votes)


class LMProbe(BaseEstimator):  # type: ignore[misc]
    """The language model's own answer: the option whose label is most probable (ties: the lowest).

    It is no `ClassifierMixin`, as it learns nothing from gold options and answers with the index of a column.

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
        """Return the index of the most probable option, array of int, shape (P,).

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
        probs_PO = validate_data(self, X, dtype=FLOATS, ensure_all_finite=False, reset=reset)
        return check_finite(probs_PO, "probability", ("row", "option"))


class TreeProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Random forest whose features are, for each neuron, the option with the largest NEG.

    `argmax_features` makes X block by block, one byte for each prompt and neuron. scikit-learn copies it to
    float32, so fitting and predicting take 5 bytes x P x M (1.3 GiB for 6000 prompts x 46 080 neurons) plus the
    trees. Of equally probable classes the lower one is predicted.

    Parameters
    ----------
    n_trees : int
        Trees of the forest. With one seed, the first trees of a larger forest are those of a smaller one.
    max_depth : int, optional
        Most questions from the root of a tree to a leaf; by default there is no limit, as in the paper.
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
        """Return the most probable class by the trees' mean, array of shape (P,), from features as in `fit`."""
        check_is_fitted(self)
        return np.asarray(self.forest_.predict(validate_data(self, X, reset=False)))


def _flatten(X: Any) -> tuple[Any, int | None]:
    """Return X as a table, and its number of options if X has three axes."""
    if getattr(X, "ndim", 2) != 3:
        return X, None
    return X.reshape(len(X), -1), X.shape[1]
