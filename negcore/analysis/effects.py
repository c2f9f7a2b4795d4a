"""Effects of a causal check: how far a shift moves the answers, and how much more the best neurons do than random ones.

Shapes: P prompts, O options, M conditions, B bootstrap samples, D draws of random neurons.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from negcore.analysis.causal import CausalResult, checked_gold
from negcore.analysis.linearity import bootstrap_weights
from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.measure.votes import Numbers, check_finite


@dataclass(frozen=True)
class CausalRow:
    """The effect of shifting neurons of one kind and number; intervals hold the middle 95 % of bootstrap samples."""

    probe: str
    """Name of the probe that made the ranking."""
    neurons: str
    """top: the best of the ranking; random: drawn from the same layers, averaged over the draws; bottom: its last."""
    size: int
    """Neurons that were shifted together."""
    direction: str
    """Source of the direction towards gold. gold: each neuron's NEG for the prompt's gold option; polarity: the
    ranking, so that the direction is the same in every prompt."""
    shift: float
    """In units of activation; positive is towards the gold option, negative away from it."""
    n_prompts: int
    """Rows, where these were asked in several orders of their options."""
    base_accuracy: float
    """Share of prompts whose most probable option is the gold one, without a shift."""
    accuracy: float
    """Accuracy with the shift."""
    accuracy_change: float
    change_low: float
    change_high: float
    prob_change: float
    """Mean change of the gold option's probability."""
    prob_low: float
    prob_high: float
    share_change: float
    """Mean change of the gold option's share of the probability of all options."""


@dataclass(frozen=True)
class CausalDifferenceRow:
    """The effect of a ranking's best neurons less that of random ones of the same layers, paired by prompt."""

    probe: str
    size: int
    direction: str
    """As in `CausalRow`."""
    shift: float
    n_prompts: int
    n_draws: int
    """Random sets; with one, intervals know nothing of how draws differ."""
    accuracy_difference: float
    """Accuracy with the best shifted, less the mean with random ones shifted."""
    accuracy_low: float
    accuracy_high: float
    prob_difference: float
    """The same of the gold option's probability."""
    prob_low: float
    prob_high: float


class Effect(NamedTuple):
    """The effect of a shift on prompts' answers; fields and intervals as in `CausalRow`."""

    n_prompts: int
    base_accuracy: float
    accuracy: float
    accuracy_change: float
    change_low: float
    change_high: float
    prob_change: float
    prob_low: float
    prob_high: float
    share_change: float


def causal_rows(probe: str, result: CausalResult, *, n_bootstrap: int, seed: int = 0) -> list[CausalRow]:
    """Summarise the effect of each kind and number of neurons under each shift, over all prompts.

    The model answers with its most probable option (ties: the lowest, as for LM-Prob). Each prompt is compared with
    itself, and random draws are averaged within a prompt before anything else. The percentile bootstrap draws prompts,
    so its intervals say how the change would vary with other prompts, not with other draws. Where rows were asked in
    several orders of their options, each row counts as one prompt, with the mean over its orders.

    Parameters
    ----------
    probe : str
        Name of the probe that made the ranking.
    n_bootstrap : int
        Number of samples of prompts behind the intervals.

    Raises
    ------
    NegError
        If there are no prompts, or a probability is NaN or infinite.
    """
    if not len(result.gold_P):
        raise NegError(f"no prompts were shifted for the ranking of {probe!r}; a mean needs at least one")
    base, shifted = _of_rows(result)
    weights_BP = bootstrap_weights(len(base.right_PM), n_bootstrap, seed)
    rows = []
    kinds = [one._replace(draw=0) for one in result.conditions]
    for kind in dict.fromkeys(kinds):
        drawn_M = [one == kind for one in kinds]
        effect = _effect(base, _Answers(*(values_PM[:, drawn_M] for values_PM in shifted)), weights_BP)
        rows.append(
            CausalRow(
                probe=probe,
                neurons=kind.neurons,
                size=kind.size,
                direction=kind.direction,
                shift=kind.shift,
                **effect._asdict(),
            )
        )
    return rows


def causal_differences(probe: str, result: CausalResult) -> list[CausalDifferenceRow]:
    """Compare the effect of the best neurons with that of random ones, for each number of neurons, rule and shift.

    In every prompt the best are compared with each draw; see `paired_difference`.

    Parameters
    ----------
    probe : str
        Name of the probe that made the ranking.

    Raises
    ------
    NegError
        As `causal_rows`.
    """
    if not len(result.gold_P):
        raise NegError(f"no prompts were shifted for the ranking of {probe!r}; a mean needs at least one")
    _, shifted = _of_rows(result)
    n_prompts = len(shifted.right_PM)
    rows = []
    for at, best in enumerate(result.conditions):
        if best.neurons != "top":
            continue
        random = best._replace(neurons="random")
        drawn = [m for m, one in enumerate(result.conditions) if one._replace(draw=0) == random]
        accuracy, prob = (
            paired_difference(values_PM[:, [at]] - values_PM[:, drawn])
            for values_PM in (shifted.right_PM, shifted.prob_PM)
        )
        rows.append(
            CausalDifferenceRow(probe, best.size, best.direction, best.shift, n_prompts, len(drawn), *accuracy, *prob)
        )
    return rows


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_difference(differences_PD: Floats) -> Interval:
    """Return the mean difference over prompts and draws, for other prompts and other draws.

    Its variance is that of the means of prompts over P, plus that of the means of draws over D; the interval is
    Student's with Satterthwaite's degrees of freedom, as there are few draws. In simulations it holds in 95 % of
    cases from three draws on, with two in 88 %. With one draw, or one prompt, nothing is known of how others differ,
    and the interval says nothing of it.

    Parameters
    ----------
    differences_PD : float array of shape (P, D)

    References
    ----------
    Satterthwaite (1946), "An approximate distribution of estimates of variance components", Biometrics Bulletin 2.
    """
    mean = float(differences_PD.mean())
    parts = [
        (means.var(ddof=1) / len(means), len(means) - 1)
        for means in (differences_PD.mean(axis=1), differences_PD.mean(axis=0))
        if len(means) > 1
    ]
    variance = sum(part for part, _ in parts)
    if not variance > 0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    half = float(student.ppf(0.975, freedom)) * variance**0.5
    return Interval(mean, mean - half, mean + half)


def effect_of(
    gold_P: ArrayLike, base_probs_PO: Numbers, probs_PO: Numbers, *, n_bootstrap: int, seed: int = 0
) -> Effect:
    """Summarise the effect of one shift on prompts' answers, as `causal_rows` does.

    Parameters
    ----------
    gold_P : int array of shape (P,)
        Index of each prompt's gold option.
    base_probs_PO, probs_PO : float arrays of shape (P, O)
        Probability of every option without and with the shift.
    n_bootstrap : int
        Number of samples of prompts behind the intervals.

    Raises
    ------
    NegError
        If there are no prompts, a gold option is not one of the options, or a probability is NaN or infinite.
    """
    n_prompts, n_options = base_probs_PO.shape
    if not n_prompts:
        raise NegError("no prompts were shifted; a mean needs at least one")
    gold = checked_gold(gold_P, n_prompts, n_options)
    base, shifted = (_answers(probs[:, None], gold) for probs in (base_probs_PO, probs_PO))
    return _effect(base, shifted, bootstrap_weights(n_prompts, n_bootstrap, seed))


class _Answers(NamedTuple):
    right_PM: Floats
    prob_PM: Floats
    share_PM: Floats


def _of_rows(result: CausalResult) -> tuple[_Answers, _Answers]:
    """Return the answers without and with shifts, of rows if there are orders: then the mean over those of each."""
    found = (_answers(probs, result.gold_P) for probs in (result.base_probs_PO[:, None], result.probs_PMO))
    if (view := result.answers) is None:
        base, shifted = found
    else:
        base, shifted = (_Answers(*map(view.means, one)) for one in found)
    return base, shifted


def _answers(probs_PMO: Numbers, gold_P: Ints) -> _Answers:
    check_finite(probs_PMO, "probability", ("row", "condition", "option"))
    probs = probs_PMO.astype(np.float64)
    gold_PM = np.take_along_axis(probs, gold_P[:, None, None], axis=2)[:, :, 0]
    total_PM = probs.sum(axis=2)
    # A large shift can make all options too improbable for a float32: then no option is ahead.
    share_PM = np.divide(gold_PM, total_PM, out=np.full_like(total_PM, 1 / probs.shape[2]), where=total_PM > 0)
    return _Answers((probs.argmax(axis=2) == gold_P[:, None]).astype(np.float64), gold_PM, share_PM)


def _effect(base: _Answers, shifted: _Answers, weights_BP: Floats) -> Effect:
    """Compare the answers under one condition (M: its draws) with those without a shift (M: one)."""
    base_right_P, base_prob_P, base_share_P = (values_PM.mean(axis=1) for values_PM in base)
    right_P, prob_P, share_P = (values_PM.mean(axis=1) for values_PM in shifted)
    accuracy, prob = (_interval(change_P, weights_BP) for change_P in (right_P - base_right_P, prob_P - base_prob_P))
    return Effect(
        n_prompts=len(right_P),
        base_accuracy=float(base_right_P.mean()),
        accuracy=float(right_P.mean()),
        accuracy_change=accuracy.mean,
        change_low=accuracy.low,
        change_high=accuracy.high,
        prob_change=prob.mean,
        prob_low=prob.low,
        prob_high=prob.high,
        share_change=float((share_P - base_share_P).mean()),
    )


def _interval(changes_P: Floats, weights_BP: Floats) -> Interval:
    samples_B = weights_BP[1:] @ changes_P / len(changes_P)  # row 0 is the sample itself
    low, high = np.quantile(samples_B, (0.025, 0.975))
    return Interval(float(changes_P.mean()), float(low), float(high))
