"""The recipe of every probe, and the neurons whose numbers the probes of a run read."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import numpy as np

from negcore.arrays import Ints
from negcore.measure.votes import Ranking, Vote
from negcore.model.layer_shapes import LayerShapes
from negcore.probing.draws import random_neurons, random_of_experts
from negcore.probing.probes import kept_counts
from negcore.probing.rankings import of_neurons, rank_layers
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


def n_stored(run: SkillRun, n_all: int, *, has_experts: bool = False) -> int:
    """Return the number of neurons that `choose_neurons` returns: it is known before anything is measured."""
    most_drawn = sum(_drawn_counts(run, n_all)) * len(_drawing_votes(run)) if has_experts else len(_draws(run, n_all))
    return min(n_all, sum(_depths(run, n_all).values()) + most_drawn)


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
    orders = {vote: Ranking.from_scores(of_neurons(sums, scores_M)).order_K for vote, scores_M in votes_M.items()}
    need_M = np.full(n_all, np.inf)  # below 1: needed
    for vote, depth in _depths(run, n_all).items():
        order = orders[vote]
        need_M[order] = np.minimum(need_M[order], np.arange(len(order)) / depth)
    shapes = sums.layer_shapes
    need_M[_draws(run, n_all) if shapes is None else _draws_of_experts(run, orders, shapes)] = 0
    chosen = np.argsort(need_M, kind="stable")[: n_stored(run, n_all, has_experts=shapes is not None)]
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
    if not _drawing_votes(run):
        return np.empty(0, np.int64)
    drawn = [random_neurons(n_all, count, seed=run.seed) for count in _drawn_counts(run, n_all)]
    return np.unique(np.concatenate(drawn))


def _draws_of_experts(run: SkillRun, orders: Mapping[Vote, Ints], shapes: LayerShapes) -> Ints:
    """Return the same of a mixture of experts, where they depend on the experts of the best neurons."""
    drawn = [
        random_of_experts(orders[vote][:count], shapes, seed=run.seed)
        for vote in _drawing_votes(run)
        for count in _drawn_counts(run, len(orders[vote]))
    ]
    return np.unique(np.concatenate([np.empty(0, np.int64), *drawn]))


def _drawing_votes(run: SkillRun) -> list[Vote]:
    """Return the votes that have a random baseline."""
    recipes = [RECIPES[name] for name in run.probe]
    return [recipe.vote for recipe in recipes if recipe.kind == "random" and recipe.vote is not None]


def _drawn_counts(run: SkillRun, n_all: int) -> list[int]:
    """Return the numbers of neurons that validation may choose, and baselines draw."""
    return kept_counts(min(run.max_neurons, n_all))
