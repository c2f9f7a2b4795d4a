"""Requirements of a run on disk, memory and GPU, beside what is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from negcore.errors import RunError
from tasks.config.dataset_runs import SkillRun
from tasks.forecast.needs import ModelForecast, missing_shards, on_gpu, splits_of
from tasks.forecast.shard_size import shard_bytes
from tasks.forecast.workers import is_here
from tasks.machine import cores, free_bytes, in_binary_units, memory_bytes
from tasks.plan import Planned


@dataclass(frozen=True)
class Requirement:
    """The bytes of one resource that runs need, and the bytes that are there."""

    resource: str
    needed_bytes: int
    there_bytes: int | None
    """None if it is not known here."""
    remedy: str

    @property
    def fits(self) -> bool:
        """True unless it is known that there is too little."""
        return self.there_bytes is None or self.needed_bytes <= self.there_bytes

    def check(self) -> None:
        """Refuse what does not fit.

        Raises
        ------
        RunError
            If it is known that there is too little.
        """
        if self.there_bytes is not None and not self.fits:
            needed, there = in_binary_units(self.needed_bytes), in_binary_units(self.there_bytes)
            raise RunError(
                f"the run does not fit: {needed} of {self.resource} are needed, {there} are there: {self.remedy}"
            )


def check_disk(planned: Planned) -> None:
    """Refuse runs whose shards do not fit on the disk they go to, before anything is computed.

    Raises
    ------
    RunError
        If they do not.
    """
    splits = [(run, split) for run, models in planned for model in models for split in splits_of(model)]
    needed = sum(sum(shard_bytes(split, missing_shards(run, split))) for run, split in splits)
    _disk(planned[0][0].directory, needed).check()


def requirements(run: SkillRun, models: Sequence[ModelForecast]) -> list[Requirement]:
    """Return all that a run needs, beside what this machine has; a cluster's memory is not known here."""
    needed = [_disk(run.directory, sum(model.n_bytes_left for model in models)), _memory(run, models)]
    return [*needed, _gpu(run, models)] if on_gpu(run) else needed


def _disk(directory: Path, needed_bytes: int) -> Requirement:
    remedy = "use another --out, a smaller --limit, or fewer datasets or models"
    return Requirement(f"disk space for shards in {str(directory)!r}", needed_bytes, free_bytes(directory), remedy)


def _memory(run: SkillRun, models: Sequence[ModelForecast]) -> Requirement:
    needed = [
        _workers(run, model) * (model.host_bytes + _weights_here(run, model)) + model.forest_bytes for model in models
    ]
    remedy = "use fewer --workers, or a smaller --shard-rows, --batch-size or --tree-neurons"
    return Requirement("main memory", max(needed), memory_bytes() if is_here(run) else None, remedy)


def _weights_here(run: SkillRun, model: ModelForecast) -> int:
    """Return the bytes in main memory of a worker's model, and of its batch if it computes there."""
    return model.place_bytes.get("cpu", 0) if on_gpu(run) else model.device_bytes


def _gpu(run: SkillRun, models: Sequence[ModelForecast]) -> Requirement:
    """Return the memory that all workers of one GPU need together."""
    sharing = int(1 / run.gpus) if run.gpus and run.gpus < 1 else 1
    there = torch.cuda.get_device_properties(0).total_memory if is_here(run) and torch.cuda.is_available() else None
    remedy = "use a smaller --batch-size, --dtype bfloat16, or more --gpus a worker"
    return Requirement("GPU memory", sharing * max(model.device_bytes for model in models), there, remedy)


def _workers(run: SkillRun, model: ModelForecast) -> int:
    """Return how many workers of one model run side by side."""
    if run.backend == "local":
        return 1
    return max(1, min(run.resources.workers, cores() // run.cpus, sum(one.n_shards for one in model.datasets)))
