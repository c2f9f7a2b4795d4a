"""Whether what a run will need is there: disk, memory, GPU."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from negcore.errors import RunError
from negcore.store.files import is_remote
from tasks.config.dataset_runs import SkillRun
from tasks.forecast.needs import ModelForecast, Planned, missing_shards, splits_of
from tasks.forecast.shard_size import shard_bytes


@dataclass(frozen=True)
class Room:
    """What runs need of one thing, and what there is."""

    what: str
    needed_bytes: int
    there_bytes: int | None
    """None if that is not known here."""
    remedy: str

    @property
    def fits(self) -> bool:
        """Whether nothing is known to the contrary."""
        return self.there_bytes is None or self.needed_bytes <= self.there_bytes

    def check(self) -> None:
        """Refuse what does not fit.

        Raises
        ------
        RunError
        """
        if self.there_bytes is not None and not self.fits:
            needed, there = in_binary_units(self.needed_bytes), in_binary_units(self.there_bytes)
            raise RunError(
                f"the run does not fit: {needed} of {self.what} are needed, {there} are there: {self.remedy}"
            )


def check_room(planned: Planned) -> None:
    """Refuse runs whose shards do not fit where they are to be written, before anything is computed.

    Raises
    ------
    RunError
        If they do not.
    """
    splits = [(run, split) for run, models in planned for model in models for split in splits_of(model)]
    needed = sum(shard_bytes(split)[index] for run, split in splits for index in missing_shards(run, split))
    _disk(planned[0][0].directory, needed).check()


def rooms(run: SkillRun, models: Sequence[ModelForecast]) -> list[Room]:
    """What a run needs in all, beside what this machine has; a cluster's memory is not known here."""
    is_here = run.backend == "local" or (run.ray_address or os.environ.get("RAY_ADDRESS", "local")) == "local"
    needed = [_disk(run.directory, sum(model.n_bytes_left for model in models)), _memory(run, models, is_here)]
    return [*needed, _gpu(run, models, is_here)] if _on_gpu(run) else needed


def _disk(directory: Path, needed_bytes: int) -> Room:
    remedy = "use another --out, a smaller --limit, or fewer datasets or models"
    return Room(f"disk space for shards in {str(directory)!r}", needed_bytes, free_bytes(directory), remedy)


def _memory(run: SkillRun, models: Sequence[ModelForecast], is_here: bool) -> Room:
    needed = [
        _workers(run, model) * (model.host_bytes + (0 if _on_gpu(run) else model.device_bytes)) + model.forest_bytes
        for model in models
    ]
    remedy = "use fewer --workers, or a smaller --shard-rows, --batch-size or --tree-neurons"
    return Room("main memory", max(needed), memory_bytes() if is_here else None, remedy)


def _gpu(run: SkillRun, models: Sequence[ModelForecast], is_here: bool) -> Room:
    """The memory of one GPU, and of all workers that share it."""
    sharing = int(1 / run.gpus) if 0 < run.gpus < 1 else 1
    there = torch.cuda.get_device_properties(0).total_memory if is_here and torch.cuda.is_available() else None
    remedy = "use a smaller --batch-size, --dtype bfloat16, or more --gpus a worker"
    return Room("GPU memory", sharing * max(model.device_bytes for model in models), there, remedy)


def _on_gpu(run: SkillRun) -> bool:
    """Whether workers measure on a GPU."""
    return (run.worker_device or ("cuda" if run.gpus or torch.cuda.is_available() else "cpu")).startswith("cuda")


def _workers(run: SkillRun, model: ModelForecast) -> int:
    """Workers of one model that run side by side."""
    if run.backend == "local":
        return 1
    return max(1, min(run.workers, (os.cpu_count() or 1) // run.cpus, sum(one.n_shards for one in model.datasets)))


def in_binary_units(n_bytes: int) -> str:
    """Bytes for people."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def free_bytes(directory: Path) -> int | None:
    """Free bytes of the disk that a directory, perhaps one to be, is on; None in a bucket."""
    if is_remote(directory):
        return None
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    return shutil.disk_usage(there).free


def memory_bytes() -> int:
    """Main memory that this process and its workers may use: the machine's, or a container's limit."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(installed, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit
        return installed
