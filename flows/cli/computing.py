"""Commands that compute: a run of every kind, the demo, what a run will need, and how fast the paths are."""

from functools import partial
from typing import Annotated, Any

import typer
from rich.markup import escape

from flows.cli.machine import check_machine
from flows.cli.options import Command, Orchestrator, RunPath, run_options
from flows.cli.terminal import carry_out, doing, quiet_libraries, reading, show
from flows.show.console import console
from negcore.model.architectures import Dtype
from tasks.config.kinds import RUN_KINDS, RunKind, load
from tasks.config.reading import read_run_file, recorded_run
from tasks.config.run_file import RunFile


def run_command(name: str, kind: RunKind) -> Command:
    """Return the command of a run kind."""

    @run_options(kind.run_class)
    def command(run_file: RunPath = None, orchestrator: Orchestrator = "prefect", **overrides: Any) -> None:
        execute(name, read_run_file(kind.run_class, run_file, overrides), orchestrator)

    command.__doc__ = kind.full_help
    return command


def demo(
    out: Annotated[str, typer.Option(help="Run directory, or s3://BUCKET/PREFIX.")] = "runs/demo",
    orchestrator: Orchestrator = "prefect",
) -> None:
    """Measure the embedded model on six small datasets and probe it: a first real result, without network.

    Example: `neg demo`
    """
    from negcore.datasets import list_datasets

    names = [info.name for info in list_datasets() if info.name.startswith("mini/")]
    values = {
        "model": ["smollm2-135m"],
        "dataset": names,
        "shots": 1,
        "probe": ["polar", "magn", "tree"],
        "out": out,
        "limit": 60,
    }
    execute("pipeline", read_run_file(RUN_KINDS["pipeline"].run_class, None, values), orchestrator)


@run_options(RUN_KINDS["pipeline"].run_class)
def plan(
    run_file: RunPath = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the rate of a worker: load each model, run a few prompts.")
    ] = False,
    gflops: Annotated[
        float | None, typer.Option(min=0.001, help="Rate of one worker, in 10^9 operations a second.")
    ] = None,
    weights_gbs: Annotated[
        float | None, typer.Option(min=0.001, help="Rate of weights that pass (--device-map), in 10^9 bytes a second.")
    ] = None,
    **overrides: Any,
) -> None:
    """Foresee what a run will need: prompts, shards, bytes, memory, time; nothing is computed or written.

    Example: `neg plan --model smollm2-135m --dataset mceval8k/agnews --limit 200 --calibrate`

    Takes the options of `neg pipeline`, or the run file of any run on datasets. Shards that are already in the run
    directory are not counted again. A run that does not fit this machine's disk, memory or GPU is refused with exit
    code 2; a model or dataset that cannot be used is named, and the exit code is then 1, as the run's would be. Memory
    is an estimate; time is operations (2 a parameter and token, and 2 for each option's gradient) over a rate. Weights
    that pass through the device (--device-map) are read twice a batch of prompts, which takes their bytes over a rate.
    """
    quiet_libraries()
    from flows.show.forecast_tables import forecast_lines, forecast_tables
    from tasks.forecast.capacity import requirements
    from tasks.forecast.needs import Rate, forecast, measured_rate, skill_runs, worker_needs
    from tasks.forecast.workers import choose_workers, is_here
    from tasks.model_plans import all_problems
    from tasks.plan import plan as plan_run

    options_of = RUN_KINDS["pipeline"].run_class
    run = recorded_run(run_file, overrides) if run_file else read_run_file(options_of, None, overrides)
    with reading():
        planned = [(one, plan_run(one, tolerant=run.skips_unusable_datasets)) for one in skill_runs(run)]
        chosen = choose_workers(planned[0][0], partial(worker_needs, planned)) if is_here(run) else None
        if chosen:
            planned = [(one.model_copy(update=chosen.fields), of_run) for one, of_run in planned]
        models = forecast(planned)
    first, of_first = planned[0]
    rates = {model.card.name: measured_rate(first, model) for model in of_first} if calibrate else {}
    weight_rate = weights_gbs * 1e9 if weights_gbs else None
    rates |= {model.name: Rate(gflops * 1e9, weight_rate) for model in models} if gflops else {}
    needed = requirements(first, models)
    for table in forecast_tables(models, rates):
        console.print(table)
    problems = (problem for _, of_run in planned for model in of_run for problem in model.problems)
    warnings = {
        f"warning: {warning}"
        for _, of_run in planned
        for model in of_run
        for dataset in model.datasets
        for warning in dataset.warnings
    }
    left_out = {f"left out: {problem}" for problem in (*problems, *all_problems(of_run for _, of_run in planned))}
    workers = [chosen.line if chosen else "workers: chosen in the cluster where they are not given"]
    for line in (*sorted(left_out), *sorted(warnings), *forecast_lines(models, rates, needed), *workers):
        console.print(escape(line), soft_wrap=True, highlight=False)
    for requirement in needed:
        requirement.check()
    if left_out:
        raise typer.Exit(1)  # as the run would end


def benchmark(
    model: Annotated[str, typer.Option(help="Model, as for `neg pipeline`.")] = "smollm2-135m",
    device: Annotated[str | None, typer.Option(help="Torch device. By default the first GPU, else the CPU.")] = None,
    neurons: Annotated[int, typer.Option(min=1, help="Neurons that are swept.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; medians are shown.")] = 3,
    cpus: Annotated[int, typer.Option(min=1, max=1024, help="Threads, as of a worker.")] = 1,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Compare NEGs in this number type with those in float32, on three questions.")
    ] = None,
) -> None:
    """Time the fast paths beside their plain twins, and checks of shards, in turns; or compare number types.

    Example: `neg benchmark --repeats 5`
    """
    quiet_libraries()
    with reading():
        import torch

        from flows.show.linearity_tables import benchmark_table, types_table
        from negcore.datasets import PromptSettings, load_dataset
        from negcore.measure.benchmark import benchmark as compare
        from negcore.measure.benchmark import compare_types
        from negcore.measure.loading import load_model
        from negcore.model.encoding import encode_prompts
        from negcore.model.language_model import describe_model
        from negcore.probing.checking_cost import time_checks
        from negcore.store.temporary import temporary_directory

        card = describe_model(model)
        dataset = load_dataset("mini/fact", card.tokenizer, settings=PromptSettings(limit=8), masked=card.arch.masked)
        examples = dataset.splits["test"][:3]
        example = examples[0]
        n_tokens = len(encode_prompts(card, [example.prompt])[0])
    torch.set_num_threads(cpus)
    if dtype:
        with doing("loading the model") as watch:
            rows = compare_types(
                lambda one: load_model(card, dtype=one, device=device),
                dtype,
                [one.prompt for one in examples],
                [one.labels[one.answer] for one in examples],
                neurons=neurons,
                watch=watch,
            )
        console.print(types_table(rows, f"{card.name}, {len(examples)} prompts, {neurons} swept neurons"))
        return
    with doing("loading the model") as watch, temporary_directory() as folder:
        lm = load_model(model, device=device)
        comparisons = compare(lm, example.prompt, example.labels, neurons=neurons, repeats=repeats, watch=watch)
        comparisons.append(time_checks(folder, repeats=repeats, watch=watch))
    console.print(benchmark_table(comparisons, f"{card.name}, prompt {example.id} of {n_tokens} tokens"))


def execute(name: str, run: RunFile, orchestrator: str) -> None:
    """Carry out a run of a kind and show its results."""
    quiet_libraries()
    check_machine()
    if not console.is_terminal:
        console.print("reading tokenizers and datasets ...")
    with reading():
        from tasks.steps import handing_over

    kind = RUN_KINDS[name]
    with handing_over() as given:
        with reading():
            n_steps = kind.n_steps(run)
        from flows.prefect_flows import prefect_flow

        flow = prefect_flow(name) if orchestrator == "prefect" else None
        results = carry_out(given, run, name, n_steps, load(kind.work), flow)
    show(results)
