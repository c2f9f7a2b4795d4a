"""Floors: what can be answered without looking inside the model. A probe that is no better has found nothing.

`majority_floor` and `random_floor` are in `negcore.probing.evaluation`; the two here are fitted on training rows.

Shapes: P prompts, O options, F features, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from negcore.arrays import Floats, Ints
from negcore.datasets.base import Example
from negcore.errors import NegError
from negcore.measure.votes import Numbers, check_finite, check_gold

_N_TREES = 100
_LEAF_ROWS = 5
"""Fewest training rows in a leaf: the features are weak, and a tree of single rows learns their noise."""
_FOLDS = 5
_LOGISTIC_STEPS = 1000
_SMALLEST = np.finfo(np.float32).tiny
"""Probability that stands for anything smaller, so that it has a logarithm."""


class OptionsFloor(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Random forest that sees the options, lengths and the group of a prompt, and no word of its question.

    The features of a prompt:

    - of each option: its text (as a number in alphabetical order, -1 for a text not seen in training), its rank in the
      alphabet and in length among the prompt's options, its length in characters and in words, and how often its text
      is the answer where it is an option. That share comes from other training rows than the prompt itself;
    - of the prompt without its options: its length in characters and in words;
    - its group (as a number).

    Its accuracy is what the making of a dataset gives away. Nothing is tuned.

    Parameters
    ----------
    random_state : int
        Seed of the forest, and of the folds in which the shares of training rows are counted.

    Attributes
    ----------
    classes_ : array of int, shape (C,)
        Options that are gold in training, rising.
    n_options_ : int
        O.
    forest_ : RandomForestClassifier
        The fitted forest.
    """

    def __init__(self, *, random_state: int = 0) -> None:
        self.random_state = random_state

    def fit(self, X: Sequence[Example], y: ArrayLike, row_P: Ints | None = None) -> Self:
        """Grow the forest.

        Parameters
        ----------
        X : sequence of P Example
            Training prompts; of each only the lengths, the options and the group are read.
        y : array of int, shape (P,)
            Index of each prompt's gold option.
        row_P : array of int, shape (P,), optional
            Number of the row, from 0, that each prompt asks, if rows are asked several times. By default every prompt
            is a row.

        Raises
        ------
        NegError
            If there are no prompts, their numbers of options differ, or a gold option is not an option.
        """
        texts_PO = _texts(X)
        self.n_options_ = texts_PO.shape[1]
        gold_P = check_gold(y, self.n_options_)
        if len(gold_P) != len(X):
            raise NegError(f"{len(gold_P)} gold options for {len(X)} prompts: give one a prompt")
        self.text_numbers_ = {text: number for number, text in enumerate(sorted({*texts_PO.flat}))}
        self.group_numbers_ = {group: number for number, group in enumerate(sorted({one.group for one in X}))}
        self.shares_ = _gold_shares(texts_PO, gold_P)
        shares_PO = _held_out_shares(texts_PO, gold_P, self.random_state, row_P)
        forest = RandomForestClassifier(_N_TREES, min_samples_leaf=_LEAF_ROWS, random_state=self.random_state)
        self.forest_ = forest.fit(self._features(X, texts_PO, shares_PO), gold_P)
        self.classes_ = self.forest_.classes_
        return self

    def predict(self, X: Sequence[Example]) -> Ints:
        """Return the most probable option by the trees' mean (ties: the lowest), shape (P,).

        Raises
        ------
        NegError
            If there are no prompts, or they have another number of options than in training.
        """
        check_is_fitted(self)
        texts_PO = _texts(X)
        if texts_PO.shape[1] != self.n_options_:
            raise NegError(f"the prompts have {texts_PO.shape[1]} options: this floor was fitted on {self.n_options_}")
        features_PF = self._features(X, texts_PO, _lookup(self.shares_, texts_PO, 1 / self.n_options_))
        return np.asarray(self.forest_.predict(features_PF))

    def _features(self, X: Sequence[Example], texts_PO: NDArray[Any], shares_PO: Floats) -> Floats:
        characters_PO, words_PO = _lengths(texts_PO.tolist())
        all_characters_P, all_words_P = _lengths([one.prompt for one in X])
        return np.column_stack(
            [
                _lookup(self.text_numbers_, texts_PO, -1),
                _ranks(texts_PO),
                _ranks(characters_PO),
                characters_PO,
                words_PO,
                shares_PO,
                all_characters_P - characters_PO.sum(axis=1),
                all_words_P - words_PO.sum(axis=1),
                [self.group_numbers_.get(one.group, -1) for one in X],
            ]
        ).astype(np.float64)


class CalibratedLMProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Logistic regression on the logarithms of the probabilities that the language model gives the options' labels.

    It is LM-Prob without the model's preferences for a letter: it learns which probabilities go with which answer.
    C = 1 on standardised logarithms, not tuned.

    Attributes
    ----------
    classes_ : array, shape (C,)
        Distinct training labels, sorted. If there is only one, it is always predicted.
    n_features_in_ : int
        O.
    model_ : Pipeline or DummyClassifier
        The fitted regression; what always predicts the only class.

    References
    ----------
    Zhao et al., "Calibrate Before Use", ICML 2021 (arXiv 2102.09690), where the correction is made without training
    rows.
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the regression.

        Parameters
        ----------
        X : array, shape (P, O), probability
            Probability of each option's label.
        y : array, shape (P,)
            Gold options, any labels.

        Raises
        ------
        NegError
            If a probability is NaN or infinite.
        """
        probs_PO, labels = validate_data(self, X, y, dtype=np.float64, ensure_all_finite=False)
        check_classification_targets(labels)
        self.classes_ = np.unique(labels)
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_LOGISTIC_STEPS))
        model = regression if len(self.classes_) > 1 else DummyClassifier(strategy="most_frequent")
        self.model_ = model.fit(_logarithms(probs_PO), labels)
        return self

    def predict(self, X: ArrayLike) -> Numbers:
        """Return the most probable class of each row of X, array of shape (P,); errors as of `fit`."""
        check_is_fitted(self)
        probs_PO = validate_data(self, X, dtype=np.float64, ensure_all_finite=False, reset=False)
        return np.asarray(self.model_.predict(_logarithms(probs_PO)))

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Return the probability of each class for each row of X: (P, C); errors as of `fit`."""
        check_is_fitted(self)
        probs_PO = validate_data(self, X, dtype=np.float64, ensure_all_finite=False, reset=False)
        return np.asarray(self.model_.predict_proba(_logarithms(probs_PO)))


def _logarithms(probs_PO: Floats) -> Floats:
    check_finite(probs_PO, "probability", ("row", "option"))
    return np.log(np.maximum(probs_PO, _SMALLEST))


# Features of prompts


def _texts(examples: Sequence[Example]) -> NDArray[Any]:
    """Return the options' texts, or their labels where there are none: strings (P, O)."""
    texts = [one.options or one.labels for one in examples]
    counts = sorted({len(of_one) for of_one in texts})
    if len(counts) != 1:
        raise NegError(f"prompts with {counts} options: give at least one, all with as many options")
    return np.array(texts, dtype=object)


def _lengths(texts: Any) -> tuple[Ints, Ints]:
    """Return the characters and the words of texts, in their shape."""
    found = np.array(texts, dtype=object)
    counts = np.array([(len(text), len(text.split())) for text in found.flat], np.int64).reshape(*found.shape, 2)
    return counts[..., 0], counts[..., 1]


def _ranks(values_PO: NDArray[Any]) -> Ints:
    """Return how many options of the same prompt come before each option: 0 to O-1, equal for equal ones."""
    return np.asarray((values_PO[:, None, :] < values_PO[:, :, None]).sum(axis=2), np.int64)


def _gold_shares(texts_PO: NDArray[Any], gold_P: Ints) -> dict[str, float]:
    """Count how often each text is gold where it is an option, as if it had been so once in O rows before."""
    n_options = texts_PO.shape[1]
    n_shown = Counter(texts_PO.flat)
    n_gold = Counter(texts_PO[np.arange(len(gold_P)), gold_P])
    return {text: (n_gold[text] + 1) / (n + n_options) for text, n in n_shown.items()}


def _held_out_shares(texts_PO: NDArray[Any], gold_P: Ints, seed: int, row_P: Ints | None = None) -> Floats:
    """Return the shares of training rows' options, counted in the other folds: a row's own answer is not among them."""
    row_P = np.arange(len(gold_P)) if row_P is None else row_P
    n_rows = int(row_P.max(initial=-1)) + 1
    shares_PO = np.full(texts_PO.shape, 1 / texts_PO.shape[1])
    if n_rows < _FOLDS:
        return shares_PO
    for _, own_R in KFold(_FOLDS, shuffle=True, random_state=seed).split(np.arange(n_rows)):
        is_own_P = np.isin(row_P, own_R)
        others, own = np.flatnonzero(~is_own_P), np.flatnonzero(is_own_P)
        shares_PO[own] = _lookup(_gold_shares(texts_PO[others], gold_P[others]), texts_PO[own], 1 / texts_PO.shape[1])
    return shares_PO


def _lookup(values: Mapping[str, float], texts_PO: NDArray[Any], unseen: float) -> Floats:
    return np.array([values.get(text, unseen) for text in texts_PO.flat], np.float64).reshape(texts_PO.shape)
