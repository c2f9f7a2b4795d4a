"""The audit of a dataset: what its rows share and repeat, what its making gives away, and how much of a model's
probability lies on its options. No neuron is measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from negcore.datasets import SPLITS, Dataset, Example, PromptSettings, SplitReport, load_dataset
from negcore.measure.label_probs import label_probs
from negcore.model.encoding import encode
from negcore.model.language_model import LanguageModel, ModelCard
from negcore.probing.evaluation import Accuracy, accuracy, majority_floor, random_floor
from negcore.probing.floors import OptionsFloor


@dataclass(frozen=True, kw_only=True)
class DatasetAudit:
    """Facts about a dataset that are good to know before it is measured."""

    dataset: str
    genre: str
    n_options: int
    released_train: int
    """Rows in the files; 0 where a split has none."""
    released_valid: int
    released_test: int
    clean_train: int
    """Rows that the policy `clean` leaves."""
    clean_valid: int
    clean_test: int
    doubles_train: int
    """Released rows that ask what an earlier row of their split asks."""
    doubles_valid: int
    doubles_test: int
    contradictory_train: int
    """Texts that have two or more answers in their released split."""
    contradictory_valid: int
    contradictory_test: int
    test_in_train: int
    """Released rows of test whose text is in train."""
    valid_in_test: int
    valid_in_train: int
    units_in_train: int
    """Test rows of a unit (such as a sentence) that is in train too, where `clean-rows` cuts the splits."""
    random: float
    """Expected accuracy of guessing; as all that follows, on the rows that `clean` leaves."""
    majority: float
    """Accuracy on test of the commonest training answer."""
    options_only: float
    """Accuracy on test of a forest that sees options, lengths and the group alone (`OptionsFloor`)."""
    low: float
    """Lower end of its 95 % interval (Wilson)."""
    high: float
    model: str
    n_asked: int
    """Test prompts of which the model was asked the options' probabilities."""
    label_mass: float | None
    """Mean, over these prompts, of the sum of these probabilities; None if none was asked."""
    notes: str
    """Absent files, splits drawn from others, damaged rows, groups that say nothing."""


def audit_dataset(
    name: str,
    card: ModelCard,
    lm: LanguageModel | None = None,
    *,
    settings: PromptSettings,
    root: str | Path | None = None,
    n_asked: int = 100,
) -> DatasetAudit:
    """Audit a dataset.

    Parameters
    ----------
    name : str
        As for `load_dataset`.
    card : ModelCard
        Of the model whose tokenizer makes the prompts.
    lm : LanguageModel, optional
        The model itself, to ask it for the options' probabilities.
    settings : PromptSettings
        Wording and demonstrations of the prompts. The split policy is that of the audit.
    root : str or Path, optional
        Folder with MCEval8K.
    n_asked : int
        Most test prompts that the model is asked, sampled by the settings' seed.

    Raises
    ------
    NegError
        As for `load_dataset` and `label_probs`, or if rows differ in their number of options.
    """
    clean, by_row = (
        load_dataset(name, card.tokenizer, settings=one, root=root, masked=card.arch.masked)
        for one in (replace(settings, split_policy="clean"), replace(settings, split_policy="clean-rows", limit=1))
    )
    test = clean.splits["test"]
    options_only = _options_only(clean)
    asked = test[:n_asked] if lm else ()  # rows are in seeded order
    return DatasetAudit(
        dataset=clean.name,
        genre=clean.genre,
        n_options=len(test[0].labels),
        **_row_counts(clean.split_report),
        units_in_train=next(shared.n_same_unit for shared in by_row.split_report.still_shared),
        random=random_floor(_gold(test), len(test[0].labels)),
        majority=majority_floor(_gold(clean.splits["train"]), _gold(test)).value,
        options_only=options_only.value,
        low=options_only.interval.low,
        high=options_only.interval.high,
        model=card.name,
        n_asked=len(asked),
        label_mass=_label_mass(lm, asked, settings) if lm and asked else None,
        notes="; ".join(_notes(clean.split_report)),
    )


def _options_only(dataset: Dataset) -> Accuracy:
    train, test = dataset.splits["train"], dataset.splits["test"]
    floor = OptionsFloor(random_state=dataset.settings.seed).fit(train, _gold(train))
    return accuracy(np.array(_gold(test)), floor.predict(test))


def _gold(examples: Sequence[Example]) -> list[int]:
    return [example.answer for example in examples]


def _label_mass(lm: LanguageModel, asked: Sequence[Example], settings: PromptSettings) -> float:
    prompts, labels = [example.prompt for example in asked], [example.labels for example in asked]
    probs_PO = label_probs(lm, encode(lm.card, prompts, labels, answers=settings.answers))
    return float(probs_PO.sum(axis=1, dtype=np.float64).mean())


def _row_counts(report: SplitReport) -> dict[str, int]:
    by_split = {
        "released": report.n_released,
        "clean": report.n_available,
        "doubles": report.n_doubles,
        "contradictory": report.n_contradictory,
    }
    counts = {f"{what}_{split}": n_rows[split] for what, n_rows in by_split.items() for split in SPLITS}
    return counts | {f"{shared.split}_in_{shared.other}": shared.n_same_text for shared in report.overlaps}


def _notes(report: SplitReport) -> list[str]:
    absent = [split for split in SPLITS if not report.n_released[split]]
    notes = [f"no {split} file" for split in absent]
    notes += [f"{change.split} {change.reason}" for change in report.drawn]
    notes += [f"{n} of {split} damaged" for split, n in report.n_damaged.items() if n]
    return notes + ["each group has one answer"] * report.group_is_answer
