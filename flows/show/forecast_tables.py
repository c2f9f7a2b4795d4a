"""Tables and lines of `neg plan`."""

from collections.abc import Iterator, Mapping, Sequence

from flows.show.accuracy_tables import short
from flows.show.model_names import shown_model
from flows.show.table import Cell, Number, Table, numbers, texts
from flows.show.text import duration, printable
from tasks.forecast.capacity import Requirement
from tasks.forecast.needs import ModelForecast
from tasks.machine import in_binary_units

Rates = Mapping[str, float]
"""Operations a second of one worker, by model."""


def forecast_tables(models: Sequence[ModelForecast], rates: Rates) -> Iterator[Table]:
    """Return a table for every model."""
    titles = ("prompts", "tokens\na prompt", "shards", "size", "still to\nwrite", "device\ntime")
    for model in models:
        rows: list[list[Cell]] = []
        for one in model.datasets:
            amounts = Number(one.n_rows), Number(one.n_tokens / one.n_rows, "{:.0f}".format), Number(one.n_shards)
            sizes = in_binary_units(one.n_bytes), in_binary_units(one.n_bytes_left)
            time = duration(one.operations / rates[model.name]) if model.name in rates else "unknown"
            rows.append([f"{short(one.name)} {one.condition}".rstrip(), *amounts, *sizes, time])
        yield Table(model.name, shown_model(model.name), [*texts("dataset"), *numbers(*titles)], [rows])


def forecast_lines(models: Sequence[ModelForecast], rates: Rates, requirements: Sequence[Requirement]) -> Iterator[str]:
    """Return what models and workers need, what is there, and the time."""
    for model in models:
        yield f"{printable(shown_model(model.name))}: {_model(model)}"
        yield f"{printable(shown_model(model.name))}: {_time(model, rates.get(model.name))}"
    for one in requirements:
        there = "unknown here" if one.there_bytes is None else f"{in_binary_units(one.there_bytes)} there"
        yield f"{one.resource}: {in_binary_units(one.needed_bytes)} needed, {there}"


def _model(model: ModelForecast) -> str:
    size = f"{model.parameters.n_all / 1e6:.1f} M parameters, {model.n_layers} x {model.layer_width} neurons"
    batch = model.device_bytes - model.model_bytes
    worker = f"{in_binary_units(model.model_bytes)} the model, {in_binary_units(batch)} a batch"
    forest = f"; a forest takes {in_binary_units(model.forest_bytes)}" if model.forest_bytes else ""
    return f"{size}; a worker takes {worker}, {in_binary_units(model.host_bytes)} itself{forest}"


def _time(model: ModelForecast, rate: float | None) -> str:
    if rate is None:
        return (
            f"{model.operations:.2g} operations; how long they take is unknown: measure it with --calibrate, or give "
            "the rate with --gflops"
        )
    return f"{duration(model.operations / rate)} of device time, at {rate / 1e9:.3g} GFLOP/s a worker"
