"""Workers with deliberate faults: what a prompt says is what happens to the worker that computes it.

Actors cannot import the tests: call `by_value` before workers or jobs of this module are sent to a Ray pool.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

from negcore.errors import PromptError
from negcore.measure import neurgrad
from negcore.store.publish import SetAside
from tasks.measure.negs import NegMeasurement
from tasks.measure.worker import ModelWorker


def fail() -> None:
    raise RuntimeError("a deliberate fault")


def refuse() -> None:
    raise PromptError("a deliberate refusal")


def lose_disk() -> None:
    raise OSError(28, "No space left on device")


FAULTS = {
    "!die": lambda: os._exit(9),
    "!kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "!hang": lambda: time.sleep(3600),
    "!fail": fail,
    "!refuse": refuse,
    "!disk": lose_disk,
}
"""What a word in a prompt does to the worker. "!nan" is one more: `FaultyWorker` spoils that row's numbers."""


def commit(prompt: str) -> None:
    """Do what the prompt says."""
    for word, fault in FAULTS.items():
        if word in prompt:
            fault()


class FaultyWorker(ModelWorker):
    """Measures as `ModelWorker` does, unless a prompt names a fault."""

    def _measure(self, job, examples):
        for example in examples:
            commit(example.prompt)
        spoilt = [row for row, example in enumerate(examples) if "!nan" in example.prompt]
        with mock.patch.object(
            neurgrad, "label_gradients", partial(spoilt_gradients, neurgrad.label_gradients, spoilt)
        ):
            columns = super()._measure(job, examples)
        if not isinstance(job.measurement, NegMeasurement):
            first = next(values for values in columns.values() if values.dtype.kind == "f")
            first.reshape(len(first), -1)[spoilt, 0] = np.nan
        return columns


def spoilt_gradients(gradients, spoilt, batch, *asked):
    """Make three of the NEGs and activations of some rows NaN or infinite."""
    result = gradients(batch, *asked)
    for at, row in enumerate(batch.rows):
        if row in spoilt:
            result.grads_LOBN[1][0, at, :2] = np.nan
            result.activations_BLN[at, 2, 0] = np.inf
    return result


class Row(NamedTuple):
    """As much of an example as isolating needs."""

    id: str
    prompt: str
    labels: tuple[str, ...] = ()
    has_own_id: bool = False


@dataclass(frozen=True)
class RowsJob:
    """A job that can be divided, of rows without a model."""

    examples: Sequence[Row]
    set_aside: tuple[SetAside, ...] = ()
    is_trial: bool = False

    def trial(self, examples):
        return replace(self, examples=examples, is_trial=True)

    def without(self, rows):
        return replace(self, set_aside=tuple(rows))


class RowsWorker:
    """Answers with the ids of the rows it was given together, and keeps a ledger of them."""

    def __init__(self, ledger: str | None = None, most: int | None = None) -> None:
        self._ledger, self._most = ledger, most

    def run(self, job: RowsJob) -> list[str]:
        set_aside = {row.id for row in job.set_aside}
        rows = [row for row in job.examples if row.id not in set_aside]
        if self._ledger is not None:
            with Path(self._ledger).open("a") as file:
                file.write(" ".join(row.id for row in rows) + ("\n" if job.is_trial else " !\n"))
        for row in rows:
            commit(row.prompt)
        if self._most is not None and len(rows) > self._most:
            fail()
        return [row.id for row in rows]


def by_value() -> None:
    """Let Ray send what is defined here as it is, instead of its name."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
