"""Tables and lines of `neg plan`."""

from collections.abc import Iterator, Mapping, Sequence

from flows.show.accuracy_tables import short
from flows.show.model_names import shown_model
from flows.show.table import Cell, Number, Table, numbers, texts
from flows.show.text import duration, printable
from tasks.forecast.capacity import Requirement
from tasks.forecast.needs import ModelForecast, Rate
from tasks.machine import in_binary_units

Rates = Mapping[str, Rate]
"""Speed of one worker, by model."""


def forecast_tables(models: Sequence[ModelForecast], rates: Rates) -> Iterator[Table]:
    """Return a table for every model."""
    titles = ("prompts", "tokens\na prompt", "shards", "size", "still to\nwrite", "device\ntime")
    for model in models:
        rows: list[list[Cell]] = []
        for one in model.datasets:
            amounts = Number(one.n_rows), Number(one.n_tokens / one.n_rows, "{:.0f}".format), Number(one.n_shards)
            sizes = in_binary_units(one.n_bytes), in_binary_units(one.n_bytes_left)
            rate = rates.get(model.name)
            seconds = rate and rate.seconds(one.operations, model.read_bytes(one.n_batches))
            time = "unknown" if seconds is None else duration(seconds)
            rows.append([f"{short(one.name)} {one.condition}".rstrip(), *amounts, *sizes, time])
        yield Table(model.name, shown_model(model.name), [*texts("dataset"), *numbers(*titles)], [rows])


def forecast_lines(models: Sequence[ModelForecast], rates: Rates, requirements: Sequence[Requirement]) -> Iterator[str]:
    """Return what models and workers need, what is there, and the time."""
    for model in models:
        yield f"{printable(shown_model(model.name))}: {_model(model)}"
        yield f"{printable(shown_model(model.name))}: {_time(model, rates.get(model.name))}"
        yield from (f"{printable(shown_model(model.name))}: {line}" for line in _places(model))
    for one in requirements:
        there = "unknown here" if one.there_bytes is None else f"{in_binary_units(one.there_bytes)} there"
        yield f"{one.resource}: {in_binary_units(one.needed_bytes)} needed, {there}"


def _model(model: ModelForecast) -> str:
    size = f"{model.parameters.n_all / 1e6:.1f} M parameters, {model.n_layers} x {model.layer_width} neurons"
    batch = in_binary_units(model.batch_bytes)
    worker = f"{in_binary_units(model.model_bytes)} the model, {batch} a batch"
    forest = f"; a forest takes {in_binary_units(model.forest_bytes)}" if model.forest_bytes else ""
    return f"{size}; a worker takes {worker}, {in_binary_units(model.host_bytes)} itself{forest}"


def _time(model: ModelForecast, rate: Rate | None) -> str:
    if rate is None:
        return (
            f"{model.operations:.2g} operations; how long they take is unknown: measure it with --calibrate, or give "
            "the rate with --gflops"
        )
    read_bytes = model.read_bytes(sum(one.n_batches for one in model.datasets))
    seconds = rate.seconds(model.operations, read_bytes)
    if seconds is None:
        return (
            f"{in_binary_units(read_bytes)} of weights pass; how long they take is unknown: measure it with "
            "--calibrate, or give the rate with --weights-gbs"
        )
    read = f" and {rate.weight_bytes_s / 1e9:.3g} GB/s of weights" if read_bytes and rate.weight_bytes_s else ""
    return f"{duration(seconds)} of device time, at {rate.operations_s / 1e9:.3g} GFLOP/s{read} a worker"


def _places(model: ModelForecast) -> Iterator[str]:
    """Return the lines of a model on several devices: its map, and what passes."""
    for place, count in model.place_bytes.items():
        parts = [path for path, there in model.device_map.items() if there == place]
        name = f"GPU {place}" if isinstance(place, int) else place
        yield f"{in_binary_units(count)} of weights on {name}: {', '.join(_ranges(parts)) or 'all'}"
    if model.passing_bytes:
        n_batches = sum(one.n_batches for one in model.datasets)
        each, all_bytes = in_binary_units(2 * model.passing_bytes), in_binary_units(model.read_bytes(n_batches))
        yield f"{each} of weights pass a batch of prompts, each twice; {n_batches} batches: {all_bytes}"


def _ranges(paths: Sequence[str]) -> list[str]:
    """Return paths with runs of numbered ones as one: model.layers.0-19."""
    found: list[tuple[str, int, int]] = []
    for path in paths:
        parent, _, last = path.rpartition(".")
        number = int(last) if last.isdecimal() else -1
        if found and number >= 0 and found[-1][0] == parent and found[-1][2] == number - 1:
            found[-1] = (parent, found[-1][1], number)
        else:
            found.append((parent if number >= 0 else path, number, number))
    return [one if first < 0 else f"{one}.{first}" + f"-{last}" * (last > first) for one, first, last in found]
