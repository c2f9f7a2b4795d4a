"""Runs on datasets that hold no text, for workers that sleep in simulated time."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from simulated_pool import SimulatedPool

from flows.extraction import WhenExtracted, extract_planned
from flows.pipeline import Results
from negcore.store.identity import RunIdentity
from negcore.store.publish import Receipt, ShardPlace
from tasks.measure.examples import EncodedExample
from tasks.measure.negs import NegMeasurement
from tasks.measure.shard_set import ShardJob, ShardSet
from tasks.model_plans import ModelPlans
from tasks.plan import PlannedDataset, PlannedModel
from tasks.steps import PlainSteps, Steps

TOKENS_A_ROW = (22, 18, 24, 52, 86, 90, 290, 300, 40, 16, 110, 30, 95, 60, 35, 20, 70, 75, 55, 48, 120, 33)
"""Typical tokens of a prompt in each of 22 datasets."""
MCEVAL8K_ROWS = {"train": 6000, "valid": 1000, "test": 1000}
SECONDS_A_TOKEN = 0.02


class Examples(Sequence[EncodedExample]):
    """Examples that are made when asked for."""

    def __init__(self, name: str, n_rows: int, n_tokens: int) -> None:
        self._name, self._rows, self._n_tokens = name, range(n_rows), n_tokens

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[row] for row in self._rows[index])
        row = self._rows[index]
        n_tokens = max(2, round(self._n_tokens * (0.7 + 0.6 * (row * 0x9E3779B1 % 2**32) / 2**32)))
        label_ids = np.zeros(2, np.int32)
        return EncodedExample(
            id=f"{self._name}/{row}", prompt="", labels=(" A", " B"), answer=0, group="",
            token_ids=np.zeros(n_tokens, np.int32), label_ids=label_ids,
        )  # fmt: skip


def identity(model: str, dataset: str) -> RunIdentity:
    """Return what shards of a simulated run say of it."""
    return RunIdentity(
        model=model, model_revision="0", tokenizer_hash="0", site="up", dtype="float32", n_layers=1, n_neurons=1,
        prompt={}, dataset_fingerprint=dataset, versions={},
    )  # fmt: skip


def shard_set(
    model: str, dataset: str, part: str, n_rows: int, n_tokens: int, shard_rows: int = 32, n_chosen: int | None = None
) -> ShardSet:
    """Return a split without text."""
    return ShardSet(
        place=ShardPlace("negs", model, dataset, part),
        identity=identity(model, dataset),
        examples=Examples(f"{dataset}/{part}", n_rows, n_tokens),  # type: ignore[arg-type]
        measurement=NegMeasurement(1, 1, n_chosen=n_chosen),
        shard_rows=shard_rows,
        nonfinite="fail",
        title=f"{model} {dataset} {part}",
    )


def planned_model(
    model: str = "simulated",
    *,
    tokens: Sequence[int] = TOKENS_A_ROW,
    rows: Mapping[str, int] = MCEVAL8K_ROWS,
    shard_rows: int = 32,
    chosen: Mapping[str, int] = {},  # noqa: B006
) -> PlannedModel:
    """Return a model with datasets; some parts may store chosen neurons only."""
    datasets = []
    for number, n_tokens in enumerate(tokens):
        name = f"dataset-{number:02d}"
        splits = tuple(
            shard_set(model, name, part, n_rows, n_tokens, shard_rows, chosen.get(part))
            for part, n_rows in rows.items()
        )
        datasets.append(PlannedDataset(model, SimpleNamespace(name=name, settings=None), splits))  # type: ignore[arg-type]
    return PlannedModel(SimpleNamespace(name=model), tuple(datasets))  # type: ignore[arg-type]


def seconds(job: ShardJob) -> float:
    """Return the simulated time that a shard takes."""
    return SECONDS_A_TOKEN * sum(len(example.token_ids) for example in job.examples)


def receipt(job: ShardJob) -> Receipt:
    """Return the receipt of a shard of which nothing is written."""
    examples = job.examples
    return Receipt(
        index=job.index, n_shards=job.n_shards, n_rows=len(examples), n_bytes=100, file_xxh3="", digest="",
        identity={}, versions={}, first_id=examples[0].id, last_id=examples[-1].id, ids_xxh3="",
    )  # fmt: skip


def extract(
    root: Path,
    models: Sequence[PlannedModel],
    open_pool: AbstractContextManager[SimulatedPool] | Any,
    *,
    when_extracted: WhenExtracted = lambda run, dataset: None,
    steps: Steps | None = None,
) -> Results:
    """Extract all shards of some models, as the flows do, with the workers of a simulated pool.

    Parameters
    ----------
    open_pool : callable
        Of the run and a card, in place of `tasks.measure.worker.model_pool`.
    """
    results, run = Results(root), SimpleNamespace(directory=root, random_weights=None)
    without_files = {name: lambda *_: None for name in ("check_disk", "write_run_file", "write_plan_file")}
    with patch.multiple("flows.extraction", model_pool=open_pool, **without_files):
        extract_planned(
            [(run, ModelPlans(tuple(models)))],  # type: ignore[list-item]
            steps or PlainSteps(),
            results,
            when_extracted=when_extracted,
        )
    return results
