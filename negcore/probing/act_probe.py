"""The Act-Probe as a scikit-learn estimator: prompts are answered from the activations of few neurons.

Shapes: P prompts, C classes, S splits of classes into two halves, M neurons of the model (flat index, layer-major),
K kept neurons in rank order, best first. Ties: of equal |scores| the lower flat index ranks first; of equally many
votes the lower half wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from negcore.arrays import Ints
from negcore.measure.votes import Numbers, Ranking, check_finite, row_blocks
from negcore.probing.act_scores import ActScores, above_scores, class_sums, halvings, mean_thresholds
from negcore.probing.probes import FLOATS


class ActProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Baseline on activations: neurons above or below their mean vote between two halves of the classes.

    For each split, a neuron's threshold is its mean activation, its score is \\|accuracy - 0.5\\| of "above threshold
    means the upper half", and its polarity is the sign of accuracy - 0.5. The best neurons vote; more than two classes
    are split recursively into two halves of the sorted classes (the lower one smaller, if their number is odd).
    A value equal to the threshold is not above it.

    Differs from the paper: the baseline's neurons come from soft prompts; here, from the task's own prompts.

    Parameters
    ----------
    n_kept : int
        Neurons to keep for each split; all, if there are fewer.

    Attributes
    ----------
    classes_ : array, shape (C,)
        Distinct training labels, sorted. An option never gold in training is never predicted.
    kept_ : array of int64, shape (S, K)
        Flat indices of the neurons kept for each split, best first; splits in the order of `halvings`.
    polarity_ : array of int8, shape (S, K)
        Their polarities: 1 says "above threshold means the upper half".
    threshold_ : array of float64, shape (S, K), activation
        Their mean activations over the training prompts of the split's classes.
    n_features_in_ : int
        M.

    References
    ----------
    Wang et al., "Finding Skill Neurons in Pre-trained Transformer-based Language Models", EMNLP 2022
    (arXiv 2211.07349), section 3.
    """

    def __init__(self, *, n_kept: int = 64) -> None:
        self.n_kept = n_kept

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
            If an activation is NaN or infinite, or ``n_kept`` is below 1.
        """
        activations_PM, labels = validate_data(self, X, y, dtype=FLOATS, ensure_all_finite=False)
        check_finite(activations_PM, "activation", ("row", "neuron"))
        check_classification_targets(labels)
        self.classes_, class_P = np.unique(labels, return_inverse=True)
        return self._keep(_scores(activations_PM, class_P))

    def predict(self, X: ArrayLike) -> Numbers:
        """Return the class that each prompt's votes lead to, array of shape (P,), from activations as in `fit`.

        Raises
        ------
        NegError
            If an activation is NaN or infinite.
        """
        check_is_fitted(self)
        activations_PM = validate_data(self, X, dtype=FLOATS, ensure_all_finite=False, reset=False)
        check_finite(activations_PM, "activation", ("row", "neuron"))
        every = [min(self.n_kept, activations_PM.shape[1])]
        return self.predict_by_k(lambda order_K: activations_PM[:, order_K], len(activations_PM), every)[:, 0]

    def predict_by_k(self, activations_of: Callable[[Ints], Numbers], n_rows: int, ks: Sequence[int]) -> NDArray[Any]:
        """Predict with the best k neurons of every split, for each of the rising ks: shape (P, len(ks)).

        Parameters
        ----------
        activations_of : callable
            Returns the activations of the neurons with the given flat indices (K,): array, shape (P, K), masked where a
            prompt does not have the neuron, which then does not vote. Called once for every split.
        n_rows : int
            P.
        ks : sequence of int
            At most the number of kept neurons.
        """
        start_PJ = np.zeros((n_rows, len(ks)), np.int64)
        stop_PJ = np.full((n_rows, len(ks)), len(self.classes_))
        for at, (start, middle, stop) in enumerate(halvings(0, len(self.classes_))):
            here_PJ = (start_PJ == start) & (stop_PJ == stop)
            upper_PJ = self._is_upper_by_k(at, activations_of(self.kept_[at]), ks)
            start_PJ[here_PJ & upper_PJ] = middle
            stop_PJ[here_PJ & ~upper_PJ] = middle
        return np.asarray(self.classes_[start_PJ])

    @classmethod
    def from_scores(cls, act: ActScores, classes: ArrayLike, *, n_kept: int) -> Self:
        """Return a fitted probe from the scores of all neurons; raise `NegError` if ``n_kept`` is below 1."""
        probe = cls(n_kept=n_kept)
        probe.classes_, probe.n_features_in_ = np.asarray(classes), act.scores_SM.shape[1]
        return probe._keep(act)

    def _keep(self, act: ActScores) -> Self:
        rankings = [Ranking.from_scores(scores_M).top(self.n_kept) for scores_M in act.scores_SM]
        n_kept = len(rankings[0].order_K) if rankings else min(self.n_kept, self.n_features_in_)
        shape = (len(rankings), n_kept)
        self.kept_ = np.array([ranking.order_K for ranking in rankings], np.int64).reshape(shape)
        self.polarity_ = np.array([ranking.polarity_K for ranking in rankings], np.int8).reshape(shape)
        self.threshold_ = np.take_along_axis(act.thresholds_SM, self.kept_, axis=1)
        return self

    def _is_upper_by_k(self, at: int, activations_PK: Numbers, ks: Sequence[int]) -> NDArray[np.bool_]:
        """Tell whether most of the best k neurons of a split vote for its upper half; a draw is the lower half."""
        values_PK, absent_PK = np.ma.getdata(activations_PK), np.ma.getmaskarray(activations_PK)
        check_finite(values_PK, "activation", ("row", "neuron"), self.kept_[at])
        polarity_K, threshold_K = self.polarity_[at, : ks[-1]], self.threshold_[at, : ks[-1]]
        votes_PK = np.where(values_PK[:, : ks[-1]] > threshold_K, polarity_K, -polarity_K)
        votes_PK[absent_PK[:, : ks[-1]]] = 0
        gained_PJ = np.add.reduceat(votes_PK, [0, *ks[:-1]], axis=1, dtype=np.int64)
        return np.asarray(gained_PJ.cumsum(axis=1) > 0)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # on tables of two columns: two neurons hardly make a vote
        return tags


def _scores(activations_PM: Numbers, class_P: Ints) -> ActScores:
    blocks = [(activations_PM[rows], class_P[rows]) for rows in row_blocks(activations_PM.shape)]
    every_P1 = np.ones((len(class_P), 1), np.bool_)
    n_classes = class_P.max() + 1
    sums_CM = np.sum([class_sums(*block, n_classes) for block in blocks], axis=0)
    thresholds_SM = mean_thresholds(sums_CM, class_sums(every_P1, class_P, n_classes))
    scored = [above_scores(values, every_P1[: len(classes)], classes, thresholds_SM) for values, classes in blocks]
    return ActScores(np.sum(scored, axis=0), thresholds_SM)
