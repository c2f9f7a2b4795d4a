"""The recipe of every probe, and the neurons whose numbers the probes of a run read."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import numpy as np

from negcore.arrays import Ints
from negcore.measure.votes import Ranking, Vote
from negcore.probing.draws import random_neurons
from negcore.probing.probes import kept_counts
from negcore.probing.rankings import rank_layers
from negcore.store.reader import NegSplit
from tasks.config.dataset_runs import ProbeName, SkillRun


class Recipe(NamedTuple):
    """The recipe of a probe: the score that chooses its neurons, if it ranks them, and the model that it fits."""

    kind: Literal["vote", "act", "tree", "random", "logistic"]
    vote: Vote | None = None
    """The score that its neurons are chosen by."""


RECIPES: Mapping[ProbeName, Recipe] = MappingProxyType(
    {
        "polar": Recipe("vote", Vote("polar", "neg")),
        "magn": Recipe("vote", Vote("magn", "neg")),
        "act": Recipe("act"),
        "tree": Recipe("tree", Vote("magn", "neg")),
        "polar-gradient": Recipe("vote", Vote("polar", "gradient")),
        "magn-gradient": Recipe("vote", Vote("magn", "gradient")),
        "polar-gxa": Recipe("vote", Vote("polar", "gxa")),
        "magn-gxa": Recipe("vote", Vote("magn", "gxa")),
        "polar-random": Recipe("random", Vote("polar", "neg")),
        "magn-random": Recipe("random", Vote("magn", "neg")),
        "polar-logistic": Recipe("logistic", Vote("polar", "neg")),
        "magn-logistic": Recipe("logistic", Vote("magn", "neg")),
    }
)
assert tuple(RECIPES) == get_args(ProbeName)


def reads_training_values(run: SkillRun) -> bool:
    """Tell whether a probe of the run reads NEGs of training prompts for more than the ranking."""
    return any(RECIPES[name].kind in ("tree", "logistic") for name in run.probe)


def votes_of(run: SkillRun) -> list[Vote]:
    """Return the scores that the run's probes choose neurons by."""
    return list(dict.fromkeys(vote for name in run.probe if (vote := RECIPES[name].vote)))


def n_stored(run: SkillRun, n_all: int) -> int:
    """Return the number of neurons that `choose_neurons` returns: it is known before anything is measured."""
    return min(n_all, sum(_depths(run, n_all).values()) + len(_draws(run, n_all)))


def choose_neurons(run: SkillRun, sums: NegSplit) -> tuple[int, ...]:
    """Return the flat indices, in rising order, of all neurons whose numbers the run's probes may ask for.

    These are the best neurons by each vote and those that random baselines may draw. Where they overlap, the next best
    are added, so that the number of neurons does not depend on the measured values.

    Parameters
    ----------
    sums : NegSplit
        Vote sums of the training prompts.

    Raises
    ------
    NegError
        If the split holds none.
    """
    votes_M = rank_layers(sums, range(sums.n_layers), votes_of(run), act=False).votes_M
    n_all = sums.n_layers * sums.n_neurons
    need_M = np.full(n_all, np.inf)  # below 1: needed
    for vote, depth in _depths(run, n_all).items():
        order = Ranking.from_scores(votes_M[vote]).order_K
        need_M[order] = np.minimum(need_M[order], np.arange(n_all) / depth)
    need_M[_draws(run, n_all)] = 0
    chosen = np.argsort(need_M, kind="stable")[: n_stored(run, n_all)]
    return tuple(np.sort(chosen).tolist())


def _depths(run: SkillRun, n_all: int) -> dict[Vote, int]:
    """Return, for each vote, the largest number of best neurons that a probe may read."""
    depths: dict[Vote, int] = {}
    for kind, vote in (RECIPES[name] for name in run.probe):
        if vote is not None:
            most = min(run.tree_neurons if kind == "tree" else run.max_neurons, n_all)
            depths[vote] = max(most, depths.get(vote, 0))
    return depths


def _draws(run: SkillRun, n_all: int) -> Ints:
    """Return the neurons that random baselines may draw, for every number that validation may choose."""
    if not any(RECIPES[name].kind == "random" for name in run.probe):
        return np.empty(0, np.int64)
    counts = kept_counts(min(run.max_neurons, n_all))
    return np.unique(np.concatenate([random_neurons(n_all, count, seed=run.seed) for count in counts]))
