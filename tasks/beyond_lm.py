"""Gains of probes over the model's own answer, as it is and calibrated, on the test rows that all of them answered."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from negcore.arrays import Ints
from negcore.probing.paired import paired
from negcore.store.files import n_bytes
from negcore.targets import DEFAULT_TARGET
from tasks.predictions import Predictions
from tasks.rundir.tables import read_table

BEYOND_FILE = "beyond_lm.arrow"


@dataclass(frozen=True)
class BeyondRow:
    """A probe on one dataset's test rows, beside LM-Prob and calibrated LM-Prob."""

    model: str
    shots: int
    dataset: str
    probe: str
    n_test: int
    accuracy: float
    lm: float
    """Accuracy of LM-Prob."""
    only_probe: float
    """Share of the test rows that the probe answered right and LM-Prob wrong."""
    only_lm: float
    """Share of the test rows that LM-Prob answered right and the probe wrong."""
    p: float
    """Two-sided p of the exact McNemar test of the two, not corrected for the number of tests."""
    calibrated: float
    """Accuracy of LM-Prob calibrated on the training rows: see `negcore.probing.floors.CalibratedLMProbe`."""
    only_probe_not_calibrated: float
    """Share of the test rows that the probe answered right and calibrated LM-Prob wrong."""
    only_calibrated: float
    """Share of the test rows that calibrated LM-Prob answered right and the probe wrong."""
    p_calibrated: float
    """The p of these two."""
    target: str = DEFAULT_TARGET
    """The number of an option whose slope the probe's NEGs are."""


def beyond_lm(predictions: Predictions, calibrated_P: Ints, target: str) -> Iterator[BeyondRow]:
    """Compare every probe of a dataset with the model's own answers.

    Where rows were asked in several orders of their options, they are compared on their one decision a row.

    Parameters
    ----------
    predictions : Predictions
        With those of LM-Prob.
    calibrated_P : int array (P,)
        Answers of calibrated LM-Prob to the same rows.
    """
    right_lm = predictions.right("lm")
    is_of_rows = predictions.view is not None
    right_calibrated = predictions.right("calibrated") if is_of_rows else calibrated_P == predictions.gold_P
    for probe in predictions.predicted_P:
        if probe == "lm":
            continue
        right = predictions.right(probe)
        of_lm, of_calibrated = paired(right, right_lm), paired(right, right_calibrated)
        yield BeyondRow(
            model=predictions.model,
            shots=predictions.shots,
            dataset=predictions.dataset,
            probe=probe,
            n_test=of_lm.n,
            accuracy=float(right.mean()),
            lm=float(right_lm.mean()),
            only_probe=of_lm.n_first / of_lm.n,
            only_lm=of_lm.n_second / of_lm.n,
            p=of_lm.p,
            calibrated=float(right_calibrated.mean()),
            only_probe_not_calibrated=of_calibrated.n_first / of_lm.n,
            only_calibrated=of_calibrated.n_second / of_lm.n,
            p_calibrated=of_calibrated.p,
            target=target,
        )


def compared_files(run: Path) -> list[Path]:
    """Return the tables of a run that runs are compared by; earlier versions, and runs of skills, have the first."""
    beyond = run / BEYOND_FILE
    return [run / "accuracy.arrow", *([] if n_bytes(beyond) is None else [beyond])]


def read_beyond(run: Path) -> list[BeyondRow]:
    """Return what a run's probes add, as its table says; nothing if it has none."""
    return [row for path in compared_files(run)[1:] for row in read_table(path, BeyondRow)]
