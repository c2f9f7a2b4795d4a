"""NEGs over training: a campaign's models that are revisions of one, compared on the test rows that all measured."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from negcore.analysis.training import revision_profiles
from negcore.errors import NegError, RunError
from negcore.store.reader import NegSplit
from tasks.config.campaign_run import CampaignStep
from tasks.run_negs import StoredSplit, stored_splits


@dataclass(frozen=True)
class NegProfileRow:
    """The NEGs for the right option of one layer of a revision; see `RevisionLayer` for the numbers."""

    model: str
    revision: str
    """Commit, or checksum of local files."""
    stage: str
    dataset: str
    """With the part of the run that it is in, such as ``shots-0``."""
    n_rows: int
    layer: int | None
    """None for all layers together."""
    mean_size: float
    same_as_previous: float | None
    """None for the first of its series."""
    same_as_last: float
    rank_correlation: float


class _Measured(NamedTuple):
    """The test rows of one model."""

    model: str
    split: NegSplit


class NegProfiles(NamedTuple):
    """Profiles, and a line for every series that could not be compared."""

    rows: list[NegProfileRow]
    warnings: list[str]


def neg_profiles(steps: Iterable[CampaignStep]) -> NegProfiles:
    """Compare models of one shape and tokenizer, in the order of the campaign, on every dataset of every stage.

    Models of a campaign that fit no other are no revisions of anything, and have no rows.
    """
    found = NegProfiles([], [])
    for (stage, dataset), measured in _by_dataset(steps, found.warnings).items():
        for series in _series(measured):
            try:
                found.rows.extend(_rows(stage, dataset, series))
            except NegError as error:
                names = ", ".join(one.model for one in series)
                found.warnings.append(f"{stage}, {dataset}: no NEGs over training of {names}: {error}")
    return found


def _by_dataset(steps: Iterable[CampaignStep], warnings: list[str]) -> dict[tuple[str, str], list[_Measured]]:
    found: dict[tuple[str, str], list[_Measured]] = {}
    for step in steps:
        for stored in _test_splits(step.run.directory):
            try:
                found.setdefault((step.study, stored.title), []).append(_Measured(step.model, stored.open()))
            except NegError as error:
                about = f"{step.study}, {stored.title}: {step.model}"
                warnings.append(f"{about} is left out of NEGs over training: {error}")
    return found


def _test_splits(directory: Path) -> list[StoredSplit]:
    try:
        return stored_splits(directory, ("test",))
    except RunError:  # of a study without NEGs on datasets, or of one that failed, as its outcome says
        return []


def _series(measured: Sequence[_Measured]) -> Iterator[list[_Measured]]:
    """Yield the models whose neurons may be the same ones: of one shape, site and tokenizer; those alone are left."""
    by_shape: dict[tuple[object, ...], list[_Measured]] = {}
    for one in measured:
        about = one.split.identity
        key = about.n_layers, about.n_neurons, about.site, about.tokenizer_hash
        by_shape.setdefault(key, []).append(one)
    yield from (series for series in by_shape.values() if len(series) > 1)


def _rows(stage: str, dataset: str, series: Sequence[_Measured]) -> Iterator[NegProfileRow]:
    for row in revision_profiles([one.split for one in series]):
        model, split = series[row.revision]
        yield NegProfileRow(
            model=model,
            revision=split.identity.model_revision,
            stage=stage,
            dataset=dataset,
            n_rows=split.n_rows,
            layer=row.layer,
            mean_size=row.mean_size,
            same_as_previous=row.same_as_previous,
            same_as_last=row.same_as_last,
            rank_correlation=row.rank_correlation,
        )
