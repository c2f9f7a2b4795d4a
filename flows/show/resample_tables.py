"""Tables of how much accuracies depend on the training rows that were drawn."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flows.show.accuracy_tables import SHOTS, asked, probe_title, short
from flows.show.table import Block, Cell, Number, Table, by, numbers, texts
from flows.show.text import count, share
from negcore.arrays import Floats
from tasks.probe import AccuracyRow
from tasks.resamples import ResampleRow

_BOOTSTRAP = (
    "Every probe was fitted again on {} of the training rows, each as large as all of them and drawn with "
    "replacement; valid and test stayed as they are. A sample lacks about a third of the rows, so the mean tends to "
    "lie below the accuracy with all of them."
)
_BY_SEED = (
    "Every probe was fitted again on {} of the training rows, drawn without replacement under the seeds {} to {}, as "
    "--limit draws them; valid and test stayed as they are. The more of the rows a sample has, the more do samples "
    "share, and the less says the spread: it is that of fresh samples only if they are few of the rows."
)
_SPREAD = "The standard deviation says how much an accuracy depends on which rows were drawn."


class _Found(NamedTuple):
    """Accuracies of one probe on one dataset, or their means over datasets."""

    rows: str
    """Rows in a sample, and all; empty for means over datasets."""
    whole: float
    """With all training rows."""
    accuracy_B: Floats
    """By sample."""

    @property
    def cells(self) -> list[Cell]:
        values = self.accuracy_B
        found = (self.whole, values.mean(), values.std(ddof=1), values.min(), values.max())
        return [self.rows, *(Number(float(value), share) for value in found)]


def resample_tables(resamples: Sequence[ResampleRow], scores: Sequence[AccuracyRow]) -> Iterator[Table]:
    """Return a table for every model and number of demonstrations, with averages if there are several datasets.

    Parameters
    ----------
    scores : sequence of AccuracyRow
        Accuracies with all training rows, those of other probes too.
    """
    whole = {(one.model, one.shots, one.dataset, one.probe): one.accuracy for one in scores if not one.group}
    for of_model in by(resamples, "model").values():
        for of_shots in by(of_model, "shots").values():
            found = {
                dataset: {
                    probe: _Found(
                        f"{samples[0].n_train} of {samples[0].n_train_all}",
                        whole[samples[0].model, samples[0].shots, dataset, probe],
                        np.array([one.accuracy for one in samples]),
                    )
                    for probe, samples in by(of_dataset, "probe").items()
                }
                for dataset, of_dataset in by(of_shots, "dataset").items()
            }
            yield _table(of_shots, found)


def _table(rows: Sequence[ResampleRow], found: dict[str, dict[str, _Found]]) -> Table:
    first = rows[0]
    blocks = [_block(short(dataset), by_probe) for dataset, by_probe in found.items()]
    if len(found) > 1:
        means = {probe: _mean([by_probe[probe] for by_probe in found.values()]) for probe in next(iter(found.values()))}
        blocks.append(_block(f"average of {len(found)}", means))
    return Table(
        key=f"resamples-{first.model}-{SHOTS[first.shots]}",
        title=f"Accuracy on test by sample of the training rows: {asked(first.model, first.shots)}",
        columns=[
            *texts("dataset", "probe"),
            *numbers("rows of\na sample", "all rows", "mean", "std. dev.", "lowest", "highest"),
        ],
        blocks=blocks,
        caption=f"{_caption(rows)} {_SPREAD}",
    )


def _caption(rows: Sequence[ResampleRow]) -> str:
    """Say how the samples were drawn."""
    n_samples = max(row.sample for row in rows) + 1
    seeds = [row.seed for row in rows if row.seed is not None]
    if seeds:
        return _BY_SEED.format(count(n_samples, "sample"), min(seeds), max(seeds))
    return _BOOTSTRAP.format(count(n_samples, "bootstrap sample"))


def _block(name: str, by_probe: dict[str, _Found]) -> Block:
    return [
        ["" if at else name, probe_title(probe), *of_probe.cells]
        for at, (probe, of_probe) in enumerate(by_probe.items())
    ]


def _mean(found: Sequence[_Found]) -> _Found:
    """Average over datasets, sample by sample."""
    return _Found("", float(np.mean([one.whole for one in found])), np.mean([one.accuracy_B for one in found], axis=0))
