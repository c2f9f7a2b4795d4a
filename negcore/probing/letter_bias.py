"""Letter bias: how much of an accuracy goes with the letters of the options, and how much with what they say.

Every row was asked in several orders of its options. A probe that goes by content chooses the same answer in each; one
that goes by letters chooses the same letter.

Shapes: P prompts, R rows, O options.

References
----------
Zheng et al., "Large Language Models Are Not Robust Multiple Choice Selectors", ICLR 2024 (arXiv 2309.03882): options
are chosen by their letters, and averages over orders take that away. Choi et al., "Mitigating Selection Bias with Node
Pruning and Auxiliary Options" (arXiv 2409.18857): the distribution of the letters that are chosen, against that of the
gold ones; there by the Kullback-Leibler divergence, which is infinite where a letter is never chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.probing.evaluation import Accuracy, Estimate, Interval, accuracy
from negcore.store.answers import AnswerView


@dataclass(frozen=True, eq=False)
class LetterBias:
    """Accuracies by letter and by answer, and how the choice of a probe depends on the order of the options."""

    n_orders: int
    """Orders of each row."""
    n_incomplete: int
    """Rows that are left out here, as an order of theirs was set aside."""
    given: Accuracy
    """In the given order alone: a prompt a row."""
    by_letter: Accuracy
    """Over all orders: every prompt counts, and the interval is that of rows."""
    by_answer: Accuracy
    """One decision a row: the answer with the largest mean score over the orders (ties: the lowest)."""
    always: Accuracy
    """Rows that are right in every order."""
    inconsistent: Accuracy
    """Rows whose chosen answer is not the same in every order, counted as if they were right ones."""
    gain: Estimate
    """Accuracy in the given order less the mean over orders, with Student's interval over rows."""
    chosen_O: Floats
    """Share of the prompts in which each letter is chosen."""
    gold_O: Floats
    """Share of the prompts in which each letter is gold; with all orders 1/O each."""
    right_R: NDArray[np.bool_]
    """True where the one decision of a row that has all its orders is right."""

    @property
    def from_gold(self) -> float:
        """Total variation distance of the letters chosen from the gold ones: share of prompts to be moved, 0 to 1."""
        return float(np.abs(self.chosen_O - self.gold_O).sum() / 2)

    @property
    def from_uniform(self) -> float:
        """Total variation distance of the letters chosen from equal shares."""
        return float(np.abs(self.chosen_O - 1 / len(self.chosen_O)).sum() / 2)


def letter_bias(view: AnswerView, gold_P: NDArray[np.integer], predicted_P: Ints, scores_PO: Floats) -> LetterBias:
    """Compare a probe's answers to the orders of each row.

    Parameters
    ----------
    view : AnswerView
        Rows and orders of the prompts.
    gold_P, predicted_P : int array of shape (P,)
        Gold letter of each prompt, and the one that was chosen.
    scores_PO : float array of shape (P, O)
        Score of every letter, for the decision by answer.

    Raises
    ------
    NegError
        If no row has all its orders.
    """
    n_orders = view.most_orders
    is_whole_R = view.n_orders_R == n_orders
    is_whole_R &= np.isin(np.arange(view.n_rows), view.row_P[view.is_given_P])
    n_incomplete = int(np.count_nonzero(~is_whole_R))
    if not is_whole_R.any():
        raise NegError("no row has all orders of its options, for some were set aside: there is nothing to compare")
    view, at = view.select(is_whole_R)
    gold, predicted = gold_P[at].astype(np.int64), predicted_P[at]
    right_R = view.means((gold == predicted).astype(np.float64))
    is_given, gold_R, decisions_R = view.is_given_P, view.gold_R(gold), view.decisions(scores_PO[at])
    given_R = np.zeros(view.n_rows)
    given_R[view.row_P[is_given]] = (gold == predicted)[is_given]
    n_options = scores_PO.shape[1]
    return LetterBias(
        n_orders=n_orders,
        n_incomplete=n_incomplete,
        given=accuracy(gold[is_given], predicted[is_given]),
        by_letter=accuracy(gold, predicted, view.row_P),
        by_answer=accuracy(gold_R, decisions_R),
        always=_counted(right_R == 1),
        inconsistent=_counted(_is_inconsistent(view, predicted)),
        gain=_mean(given_R - right_R),
        chosen_O=np.bincount(predicted, minlength=n_options) / len(predicted),
        gold_O=np.bincount(gold, minlength=n_options) / len(gold),
        right_R=decisions_R == gold_R,
    )


def _counted(is_so_R: NDArray[np.bool_]) -> Accuracy:
    return Accuracy(int(np.count_nonzero(is_so_R)), len(is_so_R))


def _is_inconsistent(view: AnswerView, predicted_P: Ints) -> NDArray[np.bool_]:
    """Tell of each row whether its prompts chose several answers."""
    answers_P = view.answers_P(predicted_P)
    first_R = np.empty(view.n_rows, np.int64)
    first_R[view.row_P[::-1]] = answers_P[::-1]
    is_other_R: NDArray[np.bool_] = view.means((answers_P != first_R[view.row_P]).astype(np.float64)) > 0
    return is_other_R


def _mean(values_R: Floats) -> Estimate:
    """Return the mean of rows' values with Student's 95 % interval; of one row, nothing is known of others."""
    mean, n_rows = float(values_R.mean()), len(values_R)
    if n_rows < 2:
        return Estimate(mean, Interval(-1.0, 1.0))
    half = float(student.ppf(0.975, n_rows - 1) * values_R.std(ddof=1) / n_rows**0.5)
    return Estimate(mean, Interval(mean - half, mean + half))
