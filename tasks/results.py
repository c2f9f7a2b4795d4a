"""Summaries of a run's results: averages over datasets, and an account of every dataset's rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from negcore.datasets import SPLITS, SplitReport
from negcore.probing.evaluation import Estimate, Interval, macro_average
from tasks.floors import mean_beside
from tasks.plan import PlannedDataset
from tasks.probe import AccuracyRow


@dataclass(frozen=True)
class Average:
    """A probe's mean accuracy over datasets, which all count the same (macro average)."""

    model: str
    shots: int
    genre: str
    """Genre of the datasets; empty for all of them."""
    probe: str
    accuracy: float
    low: float
    """Lower end of the 95 % interval of `negcore.probing.evaluation.macro_average`: for other rows, same datasets."""
    high: float
    n_datasets: int
    majority: float
    random: float
    overlapping: bool
    """True if splits of any of the datasets share rows."""
    options_only: float | None = None
    calibrated: float | None = None
    label_mass: float | None = None


def averages(scores: Sequence[AccuracyRow]) -> list[Average]:
    """Average scores by model, shots, genre and probe, and over all genres (genre "")."""
    members: dict[tuple[str, int, str, str], list[AccuracyRow]] = {}
    for score in scores:
        if not score.group:
            for genre in (score.genre, ""):
                members.setdefault((score.model, score.shots, genre, score.probe), []).append(score)
    return [_average(*key, of_key) for key, of_key in members.items()]


def _average(model: str, shots: int, genre: str, probe: str, scores: Sequence[AccuracyRow]) -> Average:
    mean = macro_average([Estimate(score.accuracy, Interval(score.low, score.high)) for score in scores])
    return Average(
        model=model,
        shots=shots,
        genre=genre,
        probe=probe,
        accuracy=mean.value,
        low=mean.interval.low,
        high=mean.interval.high,
        n_datasets=mean.n_datasets,
        overlapping=any(score.overlapping for score in scores),
        **mean_beside(scores),
    )


@dataclass(frozen=True)
class SplitAccount:
    """Number of rows of one split that were used, and the reasons why others were not."""

    genre: str
    dataset: str
    shots: int
    prompt_format: str
    split: str
    policy: str
    n_released: int
    n_available: int
    """Rows that remain after the policy, without damaged rows and demonstrations."""
    n_used: int
    """Rows that remain within the limit."""
    changes: str
    """Rows left out or drawn from elsewhere, with reasons."""
    overlapping: bool
    """True if the dataset's splits share rows."""


def split_accounts(planned: PlannedDataset, shots: int) -> list[SplitAccount]:
    """Account for the rows of every split of a dataset."""
    dataset, report = planned.dataset, planned.dataset.split_report
    return [
        SplitAccount(
            genre=dataset.genre,
            dataset=dataset.name,
            shots=shots,
            prompt_format=dataset.settings.prompt_format,
            split=split,
            policy=report.policy,
            n_released=report.n_released[split],
            n_available=report.n_available[split],
            n_used=report.n_used[split],
            changes="; ".join(_changes(report, split, len(dataset.demonstrations))),
            overlapping=report.is_overlapping,
        )
        for split in SPLITS
    ]


def _changes(report: SplitReport, split: str, n_demonstrations: int) -> list[str]:
    found = [f"{change.n_rows} dropped: {change.reason}" for change in report.dropped if change.split == split]
    found += [f"{change.n_rows} {change.reason}" for change in report.drawn if change.split == split]
    found += [
        f"{change.n_rows} moved to {change.split}"
        for change in report.drawn
        if change.reason.removeprefix("drawn from ") == split
    ]
    if report.n_damaged[split]:
        found.insert(0, f"{report.n_damaged[split]} damaged")
    if split == "train" and n_demonstrations:
        found.append(f"{n_demonstrations} shown as demonstrations")
    found += report.remarks(split)
    if split == "test" and report.group_is_answer:
        found.append("no groups: each has one answer only")
    return found
