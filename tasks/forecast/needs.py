"""The needs of a run, known before it starts: rows, bytes, memory and operations.

Rows, shards and bytes follow from the prompts and the shards' columns. Memory is an estimate, of what a worker holds
while it measures: while it reads weights their files are mapped besides, which the system takes back where memory is
short. Operations are 2 for each parameter and token that is run, and as many
for each option's gradient; divided by a rate they give the time. `tasks.forecast.capacity` knows what this machine has.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from negcore.errors import RunError
from negcore.measure.answers import AnswerRow, answer_rows
from negcore.measure.forward import common_prefix_length, largest_batch, own_tokens
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import computes_by_row, neurgrad
from negcore.model.architectures import Architecture, Dtype
from negcore.model.encoding import EncodedPrompts
from negcore.model.experts import stacked_experts
from negcore.model.language_model import DTYPES, LanguageModel, ModelCard
from negcore.model.layer_shapes import LayerShape
from negcore.model.past import Prefixes
from negcore.model.placement import even_map, map_bytes, named_map, passing_map, with_weights
from negcore.model.skeleton import feed_forwards, skeleton
from negcore.store.receipt_columns import read_columns
from tasks.config.dataset_runs import SkillRun
from tasks.config.run_file import RunFile
from tasks.forecast.shard_size import shard_bytes
from tasks.measure.examples import encoded_prompts
from tasks.measure.shard_set import ShardSet
from tasks.plan import Planned, PlannedDataset, PlannedModel, of_each_model

_PROCESS_BYTES = 600 * 2**20
"""A worker's process before it holds a model."""
_SCORE_BYTES = 4
"""Bytes of an attention score of a probed token, in whatever type the model is."""
_SHARD_COPIES = 3
"""Copies of a shard: as it was measured, as columns, and as bytes on their way to the disk."""
_NUMBER_BYTES = 4
"""Bytes of a number that is stored, while it is computed."""
_FOREST_BYTES_A_FEATURE = 5
"""Bytes of one feature: one, and four in scikit-learn's copy."""
_CALIBRATION_PROMPTS = 16


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, which decide its time and memory."""

    n_all: int
    n_in_layers: int
    """Parameters of the layers that a token runs through: of experts, those of as many as it is routed to."""
    n_in_head: int
    """Parameters of the head, which only the probed token runs through."""


@dataclass(frozen=True)
class WorkerNeeds:
    """The memory that a worker needs, in bytes."""

    device_bytes: int
    """For its model and the largest batch, on the model's device."""
    host_bytes: int
    """In main memory besides."""
    driver_bytes: int = 0
    """That the driver needs for itself at the same time: its forest."""

    @property
    def bytes_on_cpu(self) -> int:
        """Bytes of main memory that it needs if its model is there too."""
        return self.device_bytes + self.host_bytes


@dataclass(frozen=True)
class DatasetForecast:
    """The needs of one model for one dataset."""

    name: str
    condition: str
    """Folder of the condition, if a run asks under several; otherwise empty."""
    n_rows: int
    """Rows of all shards: with storage "stats", training prompts may be measured twice."""
    n_shards: int
    n_tokens: int
    n_bytes: int
    """Bytes of all shards."""
    n_bytes_left: int
    """Bytes of the shards that are not there yet."""
    operations: float
    """Operations for the shards that are not there yet."""
    n_batches: int
    """Batches of prompts for these shards."""
    batch_bytes: int
    """Bytes of the largest batch, on the model's device."""
    assembly_bytes: int
    """Bytes in main memory while the largest shard is put together, behind another where two are under way."""
    forest_bytes: int
    """Bytes in the driver's memory while the forest grows; 0 without a forest."""


@dataclass(frozen=True)
class ModelForecast:
    """The needs of one model."""

    name: str
    n_layers: int
    layer_width: int
    parameters: ParameterCounts
    model_bytes: int
    datasets: tuple[DatasetForecast, ...]
    device_map: Mapping[str, str | int] = field(default_factory=dict)
    """Device of each part of the model; empty for one device."""
    place_bytes: Mapping[str | int, int] = field(default_factory=dict)
    """Bytes of weights on each device of the map."""

    @property
    def passing_bytes(self) -> int:
        """Bytes of weights that wait elsewhere and pass through the device."""
        waiting = {"disk"} if set(self.place_bytes) <= {"cpu", "disk"} else {"cpu", "disk"}
        return sum(count for place, count in self.place_bytes.items() if place in waiting)

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights on the fullest device."""
        waiting = {"disk"} if set(self.place_bytes) <= {"cpu", "disk"} else {"cpu", "disk"}
        resident = [count for place, count in self.place_bytes.items() if place not in waiting]
        return max(resident, default=0) if self.place_bytes else self.model_bytes

    @property
    def batch_bytes(self) -> int:
        """Bytes of the largest batch, with the weights of a block that passes."""
        n_blocks = sum(place in ("cpu", "disk") for place in self.device_map.values())
        block = 2 * self.passing_bytes // max(1, n_blocks)
        return block + max((one.batch_bytes for one in self.datasets), default=0)

    @property
    def device_bytes(self) -> int:
        """Bytes that a worker needs on its model's device, the fullest: weights and the largest batch."""
        return self.resident_bytes + self.batch_bytes

    def read_bytes(self, n_batches: int) -> int:
        """Return the bytes of weights that pass for some batches: twice each."""
        return 2 * self.passing_bytes * n_batches

    @property
    def host_bytes(self) -> int:
        """Bytes that a worker needs in main memory besides."""
        return _PROCESS_BYTES + max((one.assembly_bytes for one in self.datasets), default=0)

    @property
    def forest_bytes(self) -> int:
        """Bytes that the largest forest needs."""
        return max((one.forest_bytes for one in self.datasets), default=0)

    @property
    def n_bytes_left(self) -> int:
        return sum(one.n_bytes_left for one in self.datasets)

    @property
    def operations(self) -> float:
        """Operations for all that is left to do."""
        return sum(one.operations for one in self.datasets)


class Rate(NamedTuple):
    """Speed of one worker."""

    operations_s: float
    weight_bytes_s: float | None = None
    """Bytes a second of weights that pass through its device; None if that is not known."""

    def seconds(self, operations: float, read_bytes: int) -> float | None:
        """Return the time of some work; None where it is not known."""
        if read_bytes and self.weight_bytes_s is None:
            return None
        return operations / self.operations_s + (read_bytes / self.weight_bytes_s if self.weight_bytes_s else 0)


def on_gpu(run: SkillRun) -> bool:
    """Tell whether workers measure on a GPU; that is chosen in `tasks.forecast.workers`."""
    return (run.worker_device or ("cuda" if run.gpus or torch.cuda.is_available() else "cpu")).startswith("cuda")


def skill_runs(run: RunFile) -> tuple[SkillRun, ...]:
    """Return the runs on datasets that a run consists of.

    Raises
    ------
    RunError
        If it is of another kind.
    """
    if not run.dataset_runs:
        raise RunError(
            f"run directory {str(run.directory)!r}: only runs on datasets can be foreseen, no linearity studies"
        )
    return tuple(one for of_run in run.dataset_runs for one in of_run.with_control)


def forecast(planned: Planned) -> tuple[ModelForecast, ...]:
    """Return the needs of every model under several runs.

    Raises
    ------
    NegError
        If a model's configuration cannot be used.
    """
    return tuple(map(_model_forecast, of_each_model(planned)))


def worker_needs(planned: Planned, gpus: float) -> list[WorkerNeeds]:
    """Return the needs of a worker of every model, which has such a share of a GPU; nothing on disk is looked at."""
    return [
        _worker_needs([(run.model_copy(update={"gpus": gpus}), model) for run, model in of_model])
        for of_model in of_each_model(planned)
    ]


def least_needs(card: ModelCard, dtype: Dtype) -> WorkerNeeds:
    """Return what any worker of a model needs: its process, and the model."""
    return WorkerNeeds(count_parameters(card).n_all * DTYPES[dtype].itemsize, _PROCESS_BYTES)


def _worker_needs(of_model: Sequence[tuple[SkillRun, PlannedModel]]) -> WorkerNeeds:
    run, model = of_model[0]
    least = least_needs(model.card, run.dtype)
    datasets = [(run, dataset) for run, model in of_model for dataset in model.datasets]
    splits = [(run, split) for run, dataset in datasets for split in dataset.splits]
    return WorkerNeeds(
        least.device_bytes + max((_batch_of(run, model.card, split) for run, split in splits), default=0),
        least.host_bytes + max((_assembly_bytes(run, split) for run, split in splits), default=0),
        max((_forest_bytes(run, model.card, dataset) for run, dataset in datasets), default=0),
    )


def measured_rate(run: SkillRun, model: PlannedModel) -> Rate:
    """Load the model and measure on a few prompts how fast one worker computes, and gets weights that pass.

    Raises
    ------
    ModelError
        If the model cannot be loaded.
    """
    lm = replace(load_model(model.card, **run.loading), prefixes=Prefixes())
    split = max(splits_of(model), key=lambda split: len(split.examples))
    examples = split.examples[: min(_CALIBRATION_PROMPTS, split.shard_rows)]
    encoded = encoded_prompts(examples)
    prompts = replace(encoded, n_shared=common_prefix_length(encoded.ids))
    with _threads(run.cpus):
        # The first call costs more, and runs the tokens that all prompts begin with.
        neurgrad(lm, replace(encoded_prompts(examples[:1]), n_shared=prompts.n_shared))
        started = time.perf_counter()
        neurgrad(lm, prompts, batch_size=run.batch_size)
        seconds = time.perf_counter() - started
    parameters, n_shared = count_parameters(model.card), 0 if model.card.arch.whole else prompts.n_shared or 0
    operations = _operations(model.card, parameters, prompts, range(len(prompts.ids)), n_shared)
    passing = _model_forecast([(run, model)]).passing_bytes
    if not passing:
        return Rate(operations / seconds)
    weight_bytes_s = _weight_rate(lm)
    computing = max(seconds - 2 * passing / weight_bytes_s, seconds / 10)
    return Rate(operations / computing, weight_bytes_s)


def _weight_rate(lm: LanguageModel) -> float:
    """Return the bytes a second at which the weights of the middle block reach the device."""
    block, n_bytes, started = lm.layers[lm.n_layers // 2], 0, time.perf_counter()
    for module in block.modules():
        with with_weights(module):
            n_bytes += sum(one.nbytes for one in module.parameters(recurse=False))
    return n_bytes / (time.perf_counter() - started)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with as many threads as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_parameters(card: ModelCard) -> ParameterCounts:
    """Count a model's parameters without loading its weights."""
    model = skeleton(card.config, masked=card.arch.masked)
    layers = feed_forwards(model, card.arch).values()
    n_idle = sum(_idle(layer, card.arch, shape) for layer, shape in zip(layers, card.layer_shapes, strict=True))
    return ParameterCounts(
        n_all=_count(model),
        n_in_layers=_count(model.get_submodule(card.arch.layers)) - n_idle,
        n_in_head=card.text_config.vocab_size * model.get_output_embeddings().in_features,
    )


def missing_shards(run: SkillRun, split: ShardSet) -> list[int]:
    """Return the indices of the shards that are not there yet."""
    columns = read_columns(split.place.path(run.directory))
    of_this_run = [number for number, (digest, _) in enumerate(columns.runs) if digest == split.identity.digest]
    is_there = columns.rows["is_listed"] & np.isin(columns.rows["run"], of_this_run)
    missing: list[int] = np.setdiff1d(np.arange(len(split.shards)), columns.rows["index"][is_there]).tolist()
    return missing


def splits_of(model: PlannedModel) -> list[ShardSet]:
    """Return every split of every dataset of a model."""
    return [split for dataset in model.datasets for split in dataset.splits]


# Models and datasets


def _model_forecast(of_model: Sequence[tuple[SkillRun, PlannedModel]]) -> ModelForecast:
    run, model = of_model[0]
    parameters = count_parameters(model.card)
    shapes = skeleton(model.card.config, masked=model.card.arch.masked)
    device_map = planned_map(run, model.card, shapes)
    return ModelForecast(
        name=model.card.name,
        n_layers=model.card.n_layers,
        layer_width=model.card.layer_width,
        parameters=parameters,
        model_bytes=parameters.n_all * DTYPES[run.dtype].itemsize,
        device_map=device_map,
        place_bytes=map_bytes(shapes, device_map, DTYPES[run.dtype]),
        datasets=tuple(
            _dataset_forecast(run, model.card, parameters, dataset, several=len(of_model) > 1)
            for run, model in of_model
            for dataset in model.datasets
        ),
    )


def planned_map(run: SkillRun, card: ModelCard, shapes: Any) -> dict[str, str | int]:
    """Return the device map that workers will use; empty for one device."""
    wanted = run.placement
    if wanted is None:
        return {}
    if wanted == "auto":
        return even_map(shapes, card.arch.layers, DTYPES[run.dtype], int(run.gpus or 1))
    if isinstance(wanted, str):
        return passing_map(shapes, card.arch.layers, "cuda:0" if on_gpu(run) else "cpu", wanted)
    return named_map(wanted)


def _dataset_forecast(
    run: SkillRun, card: ModelCard, parameters: ParameterCounts, dataset: PlannedDataset, *, several: bool
) -> DatasetForecast:
    needs = [_split_needs(run, card, parameters, split) for split in dataset.splits]
    return DatasetForecast(
        name=dataset.dataset.name,
        condition=run.directory.name if several else "",
        n_rows=sum(len(split.examples) for split in dataset.splits),
        n_shards=sum(len(split.shards) for split in dataset.splits),
        n_tokens=sum(one.n_tokens for one in needs),
        n_bytes=sum(one.n_bytes for one in needs),
        n_bytes_left=sum(one.n_bytes_left for one in needs),
        operations=sum(one.operations for one in needs),
        n_batches=sum(one.n_batches for one in needs),
        batch_bytes=max(one.batch_bytes for one in needs),
        assembly_bytes=max(one.assembly_bytes for one in needs),
        forest_bytes=_forest_bytes(run, card, dataset),
    )


def _forest_bytes(run: SkillRun, card: ModelCard, dataset: PlannedDataset) -> int:
    n_features = min(run.tree_neurons, card.n_layers * card.layer_width) if "tree" in run.probe else 0
    return _FOREST_BYTES_A_FEATURE * len(dataset.dataset.splits["train"]) * n_features


class _Needs(NamedTuple):
    n_tokens: int
    n_bytes: int
    n_bytes_left: int
    operations: float
    n_batches: int
    batch_bytes: int
    assembly_bytes: int


def _split_needs(run: SkillRun, card: ModelCard, parameters: ParameterCounts, split: ShardSet) -> _Needs:
    encoded = encoded_prompts(split.examples)
    ids, sizes, missing = encoded.ids, shard_bytes(split), missing_shards(run, split)
    n_shared = 0 if card.arch.whole else common_prefix_length(ids)
    shards = [range(start, min(start + split.shard_rows, len(ids))) for start in range(0, len(ids), split.shard_rows)]
    rows = _batch_rows(run, card, max(map(len, ids)) - n_shared)
    return _Needs(
        n_tokens=sum(map(len, ids)),
        n_bytes=sum(sizes),
        n_bytes_left=sum(sizes[index] for index in missing),
        operations=sum(_operations(card, parameters, encoded, shards[index], n_shared) for index in missing),
        n_batches=sum(-(-len(shards[index]) // rows) for index in missing),
        batch_bytes=_batch_of(run, card, split),
        assembly_bytes=_assembly_bytes(run, split),
    )


def _batch_of(run: SkillRun, card: ModelCard, split: ShardSet) -> int:
    ids = encoded_prompts(split.examples).ids
    n_shared = 0 if card.arch.whole else common_prefix_length(ids)
    return _batch_bytes(run, card, max(map(len, ids)), n_shared, len(split.examples[0].labels))


def _assembly_bytes(run: SkillRun, split: ShardSet) -> int:
    """Return the bytes in main memory while the largest shard of a split is put together, behind others under way."""
    return run.resources.jobs_a_worker * _SHARD_COPIES * max(shard_bytes(split))


def _operations(
    card: ModelCard, parameters: ParameterCounts, encoded: EncodedPrompts, prompts: Sequence[int], n_shared: int
) -> float:
    """Count the operations of one shard; the tokens that all prompts begin with run once a worker, and are left out."""
    if not encoded.is_usual:
        return sum(_answer_operations(card, parameters, answer_rows(encoded, prompt), n_shared) for prompt in prompts)
    n_rows, n_tokens = len(prompts), sum(len(encoded.ids[prompt]) for prompt in prompts)
    passes: int = 1 + encoded.label_ids_PO.shape[1]
    if card.arch.whole:
        return 2.0 * passes * (parameters.n_in_layers * n_tokens + parameters.n_in_head * n_rows)
    n_before = n_tokens - n_rows * (n_shared + 1)
    return 2.0 * (parameters.n_in_layers * (n_before + n_rows * passes) + parameters.n_in_head * n_rows * passes)


def _answer_operations(card: ModelCard, parameters: ParameterCounts, rows: Sequence[AnswerRow], n_shared: int) -> float:
    """Count the operations of one prompt with its options: both ways through the tokens from the probed one on."""
    n_before = 0 if card.arch.whole else rows[0].probed
    n_with_graph = sum(len(row.tokens) - n_before for row in rows)
    n_predicted = sum(len(row.answer) for row in rows)
    before = max(n_before - n_shared, 0)
    return 2.0 * (parameters.n_in_layers * (before + 2 * n_with_graph) + parameters.n_in_head * 2 * n_predicted)


def _batch_rows(run: SkillRun, card: ModelCard, n_own_tokens: int) -> int:
    """Return the most prompts of a batch."""
    device, width = "cuda" if on_gpu(run) else "cpu", DTYPES[run.dtype].itemsize
    largest = largest_batch(card, width, device, n_own_tokens, whole=card.arch.whole)
    return min(run.batch_size or largest, run.shard_rows)


def _batch_bytes(run: SkillRun, card: ModelCard, n_tokens: int, n_shared: int, n_options: int) -> int:
    """Return the bytes of a batch of the longest prompts: the values of its layers, and its gradients."""
    config, width, device = card.text_config, DTYPES[run.dtype].itemsize, torch.device("cuda" if on_gpu(run) else "cpu")
    n_rows = _batch_rows(run, card, n_tokens - n_shared)
    # Gradients as they come, side by side, as wide as they are stored, and in the order in which they are stored.
    a_neuron = 2 * (width + _NUMBER_BYTES)
    gradients = n_options * n_rows * (card.n_layers * card.active_width * a_neuron + 3 * config.vocab_size * width)
    a_token, heads = 3 * card.active_width + 6 * config.hidden_size, config.num_attention_heads * n_tokens
    if card.arch.whole:
        return int(n_rows * n_tokens * card.n_layers * (2 * a_token + 3 * heads) * width + gradients)
    n_last = n_rows if computes_by_row(device) else n_rows * n_options
    graph = n_last * card.n_layers * (a_token * width + 3 * heads * _SCORE_BYTES)
    own = max(n_tokens - n_shared, own_tokens(device.type))
    cache = card.cached_numbers * width * (n_shared + n_rows * (n_tokens - n_shared))
    return int(cache + own * a_token * width + graph + gradients)


def _idle(layer: Any, arch: Architecture, shape: LayerShape) -> int:
    """Return the parameters of the experts that a token is not routed to."""
    experts = stacked_experts(layer, arch)
    return 0 if experts is None else _count(experts) * (shape.n_experts - shape.top_k) // shape.n_experts


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
