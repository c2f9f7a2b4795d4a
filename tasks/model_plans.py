"""The plans of a run's models, each made by itself: a model that cannot be used ends no run of several."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from negcore.errors import NegError
from negcore.texts import public

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class ModelPlans(Generic[T]):
    """The plans of the models that can be used, in the run's order."""

    plans: tuple[T, ...]
    problems: tuple[str, ...] = ()
    """Models that cannot be used, and why: the run goes on without them, and ends with exit code 1."""

    def __iter__(self) -> Iterator[T]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: int) -> T:
        return self.plans[index]


def plan_models(refs: Sequence[str], plan_one: Callable[[str], T]) -> ModelPlans[T]:
    """Plan every model of a run; one that cannot be used is left out as long as there are others, and said so.

    Raises
    ------
    NegError
        The first model's error, if none can be used.
    """
    plans: list[T] = []
    errors: dict[str, NegError] = {}
    for ref in dict.fromkeys(refs):
        try:
            plans.append(plan_one(ref))
        except NegError as error:
            errors[ref] = error
    if errors and not plans:
        raise next(iter(errors.values()))
    problems = tuple(f"{ref}: {error}" for ref, error in errors.items())
    for problem in problems:
        logger.warning("left out: %s", public(problem))
    return ModelPlans(tuple(plans), problems)


def all_problems(plans: Iterable[ModelPlans[Any]]) -> list[str]:
    """Return the problems of several plans, each once."""
    return list(dict.fromkeys(problem for one in plans for problem in one.problems))
