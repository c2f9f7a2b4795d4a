"""Random forests as plain arrays: they answer as scikit-learn's do, and can be stored without pickle.

Axes: P prompts, C classes, F features, T trees, V nodes of all trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from negcore.arrays import Ints


@dataclass(frozen=True, eq=False)
class Forest:
    """The trees of a random forest as plain arrays, one after another."""

    classes_C: Ints
    root_T: NDArray[np.int32]
    """First node of each tree."""
    feature_V: NDArray[np.int32]
    left_V: NDArray[np.int32]
    right_V: NDArray[np.int32]
    """Right child of each node; `left_V` is the left one, `feature_V` the compared feature; -1 at a leaf."""
    threshold_V: NDArray[np.float64]
    """A row goes left if its feature is at most this."""
    probs_VC: NDArray[np.float64]
    """Share of each class among the node's training rows."""

    @classmethod
    def of(cls, forest: RandomForestClassifier) -> Self:
        """Copy the trees of a fitted forest."""
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

    def predict_by_trees(self, features_PF: NDArray[np.uint8], counts: Sequence[int]) -> Ints:
        """Predict as scikit-learn's forest does, with the first trees alone, for each of the rising counts.

        Returns
        -------
        array of int64, shape (P, len(counts))
            Of equally probable classes the lower.
        """
        total_PC = np.zeros((len(features_PF), len(self.classes_C)))
        predicted_PJ = np.empty((len(features_PF), len(counts)), np.int64)
        for n_trees, root in enumerate(self.root_T[: counts[-1]], 1):
            total_PC += self.probs_VC[self._leaves(features_PF, root)]
            if n_trees in counts:
                predicted_PJ[:, counts.index(n_trees)] = self.classes_C[(total_PC / n_trees).argmax(axis=1)]
        return predicted_PJ

    def probabilities(self, features_PF: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return the mean of the trees' probabilities, as scikit-learn's forest does: (P, C)."""
        total_PC = np.zeros((len(features_PF), len(self.classes_C)))
        for root in self.root_T:
            total_PC += self.probs_VC[self._leaves(features_PF, root)]
        return total_PC / len(self.root_T)

    def _leaves(self, features_PF: NDArray[np.uint8], root: int) -> NDArray[np.int32]:
        node_P = np.full(len(features_PF), root, np.int32)
        walking = np.arange(len(features_PF))
        while (walking := walking[self.left_V[node_P[walking]] >= 0]).size:
            node = node_P[walking]
            is_left = features_PF[walking, self.feature_V[node]] <= self.threshold_V[node]
            node_P[walking] = np.where(is_left, self.left_V[node], self.right_V[node])
        return node_P
