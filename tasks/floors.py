"""Floors and label mass, which stand beside every accuracy on a dataset.

The label mass is the probability of all options together. Where it is small, LM-Prob compares what the model hardly
considers, and NEGs are gradients of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from negcore.arrays import Floats, Ints
from negcore.datasets import Dataset, Example
from negcore.probing.evaluation import accuracy, majority_floor, random_floor
from negcore.probing.floors import CalibratedLMProbe, OptionsFloor
from negcore.store.identity import prompt_hash
from negcore.store.reader import NegSplit

FLOORS = ("random", "majority", "options_only", "calibrated")
"""Floors, by the names of their fields in rows of accuracies."""

SMALL_MASS = 0.5
"""A smaller label mass is warned about: the model then gives words that are no option more than all options."""


class Floored(Protocol):
    """A row of accuracies, with its floors; those of a table that an earlier version wrote may be None."""

    @property
    def random(self) -> float: ...
    @property
    def majority(self) -> float: ...
    @property
    def options_only(self) -> float | None: ...
    @property
    def calibrated(self) -> float | None: ...
    @property
    def label_mass(self) -> float | None: ...


class Floor(NamedTuple):
    """A floor's name, as in `FLOORS`, and its accuracy."""

    name: str
    accuracy: float


def best_floor(row: Floored, names: Sequence[str] = FLOORS) -> Floor | None:
    """Return the highest of some floors of a row, of equal ones the first; None if none of them is known."""
    known = ((name, getattr(row, name)) for name in names)
    floors = [Floor(name, value) for name, value in known if value is not None]
    return max(floors, key=lambda floor: floor.accuracy, default=None)


class FloorAnswers:
    """Answers of the floors to a dataset's test prompts, fitted on its training prompts.

    Parameters
    ----------
    dataset : Dataset
        The prompts of both splits.
    train, test : NegSplit
    seed : int

    Attributes
    ----------
    warning : str
        The reason why the floor of options and lengths is missing; empty if it is there.
    """

    def __init__(self, dataset: Dataset, train: NegSplit, test: NegSplit, *, seed: int) -> None:
        self._train, self._test = train, test
        gold_P = train.gold_P.astype(np.int64)
        self._calibrated = CalibratedLMProbe().fit(train.probs_PO, gold_P)
        self._predicted: dict[str, Ints | None] = {
            "options_only": None,
            "calibrated": self._calibrated.predict(test.probs_PO),
        }
        known = {example.id: example for examples in dataset.splits.values() for example in examples}
        asked, answered = _examples(known, train), _examples(known, test)
        self.warning = ""
        if asked is None or answered is None:
            self.warning = (
                f"{dataset.name}: the stored rows are not those of the run file, so the floor of options and lengths "
                "is left out; `neg extract` makes the rows of the run file"
            )
        else:
            floor = OptionsFloor(random_state=seed).fit(asked, gold_P, train.answers.row_P)
            self._predicted["options_only"] = floor.predict(answered)

    @property
    def calibrated_P(self) -> Ints:
        """Answers of calibrated LM-Prob to the test prompts: shape (P,)."""
        predicted_P = self._predicted["calibrated"]
        assert predicted_P is not None
        return predicted_P

    @property
    def calibrated_PO(self) -> Floats:
        """Probability that calibrated LM-Prob gives each option of the test prompts: (P, O)."""
        probs_PO = np.zeros(self._test.probs_PO.shape)
        probs_PO[:, self._calibrated.classes_] = self._calibrated.predict_proba(self._test.probs_PO)
        return probs_PO

    def beside(self, rows: Ints) -> dict[str, Any]:
        """Return the floors and the label mass on some of the test prompts, by the names of their fields."""
        gold_P = self._test.gold_P[rows]
        return {
            "random": random_floor(gold_P, self._test.n_options),
            "majority": majority_floor(self._train.gold_P, gold_P).value,
            **{
                name: None if predicted_P is None else accuracy(gold_P, predicted_P[rows]).value
                for name, predicted_P in self._predicted.items()
            },
            "label_mass": float(self._test.label_mass_P[rows].mean()),
        }


def _examples(known: Mapping[str, Example], split: NegSplit) -> list[Example] | None:
    """Return the prompts of a split's rows; None if one of them is not known, or reads otherwise."""
    rows = zip(split.ids, split.text_hashes, strict=True)
    found = [known[row] for row, stored in rows if row in known and prompt_hash(known[row]) == stored]
    return found if len(found) == split.n_rows else None


def mean_beside(rows: Sequence[Floored]) -> dict[str, Any]:
    """Return the floors and the label mass of the mean of several accuracies; None where one of them lacks it."""
    values = {name: [getattr(row, name) for row in rows] for name in (*FLOORS, "label_mass")}
    return {name: None if None in of_name else sum(of_name) / len(rows) for name, of_name in values.items()}


def mass_warnings(asked: Iterable[tuple[str, str, float | None]]) -> list[str]:
    """Return a line for each way of asking a model in which options of datasets hold little of its probability.

    Parameters
    ----------
    asked : iterable of (way of asking, dataset, label mass)
    """
    small: dict[str, dict[str, float]] = {}
    for way, dataset, mass in asked:
        if mass is not None and mass < SMALL_MASS:
            small.setdefault(way, {})[dataset] = mass
    return [
        f"{way}: less than half of the model's probability lies on the options "
        f"({', '.join(f'{dataset} {mass:.3f}' for dataset, mass in found.items())}; label mass, mean over test): its "
        "answers there are what is left beside likelier words; try more demonstrations (--shots), another --wording or "
        "--prompt-format chat"
        for way, found in small.items()
    ]
