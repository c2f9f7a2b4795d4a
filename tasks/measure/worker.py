"""The worker that holds a model and measures shards with it."""

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from negcore.errors import ModelError
from negcore.measure.loading import load_model
from negcore.measure.random_weights import randomise_weights
from negcore.model.architectures import DeviceMap, Dtype, Router, SiteChoice
from negcore.model.language_model import ModelCard
from negcore.model.past import Prefixes
from negcore.store.publish import Receipt, SetAside
from negcore.store.study import write_seconds
from tasks.config.run_file import RunFile
from tasks.measure.examples import EncodedExample
from tasks.measure.measurement import Columns
from tasks.measure.shard_set import ShardJob
from tasks.pool.base import Pool
from tasks.pool.opening import open_pool
from tasks.rundir.checks import note_check


class ModelWorker:
    """Loads a model once and measures any shard with it; becomes an actor only in the pool.

    Two threads may give it jobs at the same time: one shard is measured while the one before it is written.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: Dtype,
        device: str | None,
        site: SiteChoice,
        router: Router = "through",
        threads: int,
        revision: str | None = None,
        device_map: DeviceMap | None = None,
        random_weights: int | None = None,
    ) -> None:
        # The number of threads decides how sums are split, so it is part of what makes results repeatable.
        torch.set_num_threads(threads)
        lm = load_model(model, dtype=dtype, device=device, site=site, router=router, device_map=device_map)
        if revision not in (None, lm.revision):
            raise ModelError(
                f"model {model!r} is {lm.revision} here, but {revision} where the run was planned: its files "
                "changed, or are others on this machine"
            )
        if random_weights is not None:
            lm = randomise_weights(lm, random_weights)
        self._lm = replace(lm, prefixes=Prefixes())
        self._noted_in: set[Path] = set()
        self._measuring, self._publishing = threading.Lock(), threading.Lock()

    def run(self, job: ShardJob) -> Receipt | int:
        """Measure one shard, publish it and return its receipt; of a trial, return the number of its rows.

        A shard that another worker published before it was lost is not measured again.

        Raises
        ------
        NegError
            If numbers are not finite and the job's policy is "fail".
        """
        if job.was_tried and not job.is_trial and (receipt := job.published()) is not None:
            return receipt
        set_aside = [*job.set_aside, *job.measurement.left_out(job.examples)]
        left_out = {row.id for row in set_aside}
        chosen = [example for example in job.examples if example.id not in left_out]
        with self._measuring:
            started = time.perf_counter()
            columns = self._measure(job, chosen) if chosen else job.measurement.empty(job.n_options)
            seconds = time.perf_counter() - started
        if job.is_trial:
            return len(chosen)
        with self._publishing:
            return self._publish(job, columns, set_aside, seconds)

    def _publish(self, job: ShardJob, columns: Columns, set_aside: Sequence[SetAside], seconds: float) -> Receipt:
        receipt = job.publish(columns, set_aside, self._lm.check)
        if job.root not in self._noted_in:
            note_check(job.root, job.identity.model, self._lm)
            self._noted_in.add(job.root)
        if job.measurement.notes_seconds:
            write_seconds(job.place.path(job.root), job.index, seconds)
        return receipt

    def _measure(self, job: ShardJob, examples: Sequence[EncodedExample]) -> Columns:
        return job.measurement.measure(self._lm, examples)


def model_pool(run: RunFile, card: ModelCard) -> AbstractContextManager[Pool]:
    """Open a pool of workers that hold a model, as the run file asks for."""
    recipe = run.loading | {
        "model": card.ref,
        "revision": card.revision,
        "threads": run.cpus,
        "random_weights": run.random_weights,
    }
    return open_pool(run.backend, ModelWorker, recipe, run.resources, label=card.name)
