"""What a person sees of `neg plan`."""

from collections.abc import Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from flows.show.accuracy_tables import short
from flows.show.display import printable
from flows.show.inspect_tables import duration
from tasks.forecast.capacity import Room, in_binary_units
from tasks.forecast.needs import ModelForecast

Rates = Mapping[str, float]
"""Operations a second of one worker, by model."""


def forecast_tables(models: Sequence[ModelForecast], rates: Rates) -> Iterator[Table]:
    """A table for every model."""
    for model in models:
        table = Table(title=escape(printable(model.name)), box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("dataset", overflow="fold")
        for name in ("prompts", "tokens\na prompt", "shards", "size", "still to\nwrite", "device\ntime"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in model.datasets:
            numbers = f"{one.n_rows}", f"{one.n_tokens / one.n_rows:.0f}", f"{one.n_shards}"
            sizes = in_binary_units(one.n_bytes), in_binary_units(one.n_bytes_left)
            time = duration(one.operations / rates[model.name]) if model.name in rates else "unknown"
            table.add_row(escape(printable(f"{short(one.name)} {one.way}".rstrip())), *numbers, *sizes, time)
        yield table


def forecast_lines(models: Sequence[ModelForecast], rates: Rates, rooms: Sequence[Room]) -> Iterator[str]:
    """What models and workers need, what is there, and the time."""
    for model in models:
        yield f"{printable(model.name)}: {_model(model)}"
        yield f"{printable(model.name)}: {_time(model, rates.get(model.name))}"
    for room in rooms:
        there = "unknown here" if room.there_bytes is None else f"{in_binary_units(room.there_bytes)} there"
        yield f"{room.what}: {in_binary_units(room.needed_bytes)} needed, {there}"


def _model(model: ModelForecast) -> str:
    size = f"{model.size.n_parameters / 1e6:.1f} M parameters, {model.n_layers} x {model.n_neurons} neurons"
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
