"""The command line: `neg`."""

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flows.cli.machine import check_machine
from flows.cli.standard_output import OutputLost, output_kept
from flows.cli.terminal import carry_out, quiet_libraries, reading, show, stop_on_signals
from flows.cli.terminal import repair as repair_shards
from flows.show.console import console, show_all_through_consoles, tell
from negcore import __version__
from negcore.errors import NegError, RunError
from negcore.model.architectures import Dtype, SiteChoice
from negcore.store.files import location
from tasks.config.kinds import RUN_KINDS, RunKind, load
from tasks.config.reading import read_run_file, recorded_run
from tasks.config.run_file import FORMER_KEYS, RunFile

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Neuron empirical gradients at scale: how much every feed-forward neuron of a language model moves the "
    "probability of an answer, and what that says about the model's skills.",
    epilog="Exit codes of runs: 0 whole; 1 something is missing, and named; 2 refused, in one line; 3 whole but for "
    "rows that could not be computed and were set aside; 130 stopped. The same command goes on where a run ended.",
)

Orchestrator = Annotated[
    Literal["prefect", "none"],
    typer.Option(help="prefect: a flow run with its UI; a private server for the run unless PREFECT_API_URL is set."),
]
# Text, not a Path: that would take one of the slashes of s3://.
RunDirectory = Annotated[
    str, typer.Argument(metavar="DIR", help="Run directory, or a part of one; on disk or s3://BUCKET/PREFIX.")
]
RunPath = Annotated[
    str | None, typer.Argument(help="Run file (YAML), or a run directory. Options take precedence over it.")
]


def main() -> None:
    """Run the command line and exit with its code, 1 if its output is lost."""
    show_all_through_consoles()
    stop_on_signals()
    try:
        with output_kept():
            code = _exit_code()
    except OutputLost as error:
        tell("error", str(error))
        code = 1
    sys.exit(code)


def _exit_code() -> int:
    """Run the command line; what the user can correct is a line and exit code 2."""
    try:
        return app(standalone_mode=False) or 0
    except NegError as error:
        tell("error", str(error))
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        tell("error", f"{str(error.filename2 or error.filename)!r} cannot be used: {error.strerror}")
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # of typer, which keeps the class of its errors to itself
            raise
        _tell_usage(error)
        return 2


def _tell_usage(error: Any) -> None:
    """Tell what is wrong with the command line; a command without arguments shows its help."""
    context = error.ctx
    if context is not None and type(error).__name__ == "NoArgsIsHelpError":
        console.print(Text(context.get_help()))
        return
    advice = f"; see {context.command_path} --help" if context is not None else ""
    tell("error", f"{error.format_message().rstrip('.')}{advice}")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        console.print(f"neg-at-scale {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None: ...


Command = Callable[..., None]


def _run_options(run_class: type[RunFile]) -> Callable[[Command], Command]:
    """Give a command every field of a class of run files as an option, so that each is written down once."""

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = run_class.model_fields.items()
        options = [_option(field.alias or name, field) for name, field in fields if name not in ("kind", "format")]

        def wrapped(**values: Any) -> None:
            command(**{name: value for name, value in values.items() if value is not None})

        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        wrapped.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        return wrapped

    return decorate


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    kind: Any = field.annotation
    help_text = field.description or ""
    if get_origin(kind) is tuple:  # several values; the run file checks each
        kind = list[str]
    elif Path in get_args(kind) or (get_origin(kind) is Union and NoneType not in get_args(kind)):
        kind = str  # it may be a URL; or it has several forms, like a number or "all"
    has_default = not field.is_required() and field.default is not None and field.default_factory is None
    if has_default and name not in ("dataset", "confusion"):  # a long list, and a switch
        default = field.default
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        help_text += f" [default: {shown}]"
    keys = [name, FORMER_KEYS[name]] if name in FORMER_KEYS else [name]
    option = typer.Option(*(f"--{key.replace('_', '-')}" for key in keys), help=help_text, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _add_command(name: str, kind: RunKind) -> None:
    """Add the command of a run kind."""

    @app.command(name, help=kind.full_help)
    @_run_options(kind.run_class)
    def command(run_file: RunPath = None, orchestrator: Orchestrator = "prefect", **overrides: Any) -> None:
        _execute(name, read_run_file(kind.run_class, run_file, overrides), orchestrator)


for _name, _kind in RUN_KINDS.items():
    _add_command(_name, _kind)


@app.command()
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
    _execute("pipeline", read_run_file(RUN_KINDS["pipeline"].run_class, None, values), orchestrator)


@app.command()
def serve(
    run_files: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run files (YAML), or run directories.")],
    flow: Annotated[
        str | None,
        typer.Option(
            help=f"Command that carries the run files out: {', '.join(RUN_KINDS)}. By default the kind of each file.",
        ),
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option(help="When runs are due, in UTC: minute hour day month weekday. By default on request."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the deployment. By default the run directory's.")] = None,
) -> None:
    """Run run files on a schedule, or when asked to in the Prefect UI, one at a time, on this machine.

    Example: `neg serve runs/NAME --cron "0 2 * * *"`

    Needs a Prefect server that stays (`prefect server start`) and its address in PREFECT_API_URL. A run that is due
    while the one before still goes on is dropped. Ctrl-C cancels the run under way and pauses the schedules.
    """
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")  # the log is all there is to see here
    quiet_libraries()
    check_machine()
    from flows.serve import deployments, serve_runs

    serve_runs(deployments(run_files, flow, cron=cron, name=name))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run directories of `neg pipeline`, `probe` or `mceval8k`.")],
) -> None:
    """Show the accuracies of several runs side by side: other split policies, wordings, sites, seeds.

    Example: `neg compare runs/clean runs/released`

    Every dataset that two of the runs have is shown, with a line for each run.
    """
    from flows.show.accuracy_tables import comparison_table
    from tasks.probe import AccuracyRow
    from tasks.rundir.manifest import check_result
    from tasks.rundir.tables import read_table

    if len(set(runs)) < 2:
        raise RunError("name at least two run directories: there is nothing to compare one with")
    places = [location(run) for run in runs]
    names = [place.name for place in places]
    for warning in filter(None, (check_result(place / "accuracy.arrow") for place in places)):
        tell("warning", warning)
    scores = {
        place.name if names.count(place.name) == 1 else str(place): read_table(place / "accuracy.arrow", AccuracyRow)
        for place in places
    }
    table = comparison_table(scores)
    if not table.blocks:
        raise RunError(f"no dataset is in two of the runs {', '.join(runs)}, asked of the same model")
    console.print(table)


@app.command()
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
    with reading():
        dataset = load_dataset("mini/fact", card.tokenizer, settings=PromptSettings(limit=8), masked=card.arch.masked)
        examples = dataset.splits["test"][:3]
        example = examples[0]
        n_tokens = len(encode_prompts(card, [example.prompt])[0])
    torch.set_num_threads(cpus)
    if dtype:
        rows = compare_types(
            lambda one: load_model(card, dtype=one, device=device),
            dtype,
            [one.prompt for one in examples],
            [one.labels[one.answer] for one in examples],
            neurons=neurons,
        )
        console.print(types_table(rows, f"{card.name}, {len(examples)} prompts, {neurons} swept neurons"))
        return
    comparisons = compare(
        load_model(model, device=device), example.prompt, example.labels, neurons=neurons, repeats=repeats
    )
    with temporary_directory() as folder:
        comparisons.append(time_checks(folder, repeats=repeats))
    console.print(benchmark_table(comparisons, f"{card.name}, prompt {example.id} of {n_tokens} tokens"))


@app.command()
def models(
    ref: Annotated[str | None, typer.Argument(help="A model to load, describe and check.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number type to check it in.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Torch device. By default the first GPU, else the CPU.")] = None,
    site: Annotated[SiteChoice, typer.Option(help="Site of the neurons to check.")] = "paper",
) -> None:
    """List the models that ship as packages and the families that can be measured, or load one model and check it.

    Examples: `neg models`, `neg models smollm2-135m`, `neg models org/name --dtype bfloat16`

    A model that cannot be measured rightly is refused in its last line.
    """
    quiet_libraries()
    if ref is not None:
        from flows.cli.model_check import show_model

        show_model(ref, dtype=dtype, device=device, site=site)
        return
    from negcore.model.architectures import ARCHITECTURES
    from negcore.model.gguf_cache import EMBEDDED

    for alias, embedded in EMBEDDED.items():
        console.print(f"[bold]{alias}[/bold]  embedded: {embedded.command}", highlight=False)
    table = Table(
        "family", "prediction", "sites (paper = first)", "way", title="Families: any safetensors model of these types"
    )
    for name, arch in sorted(ARCHITECTURES.items()):
        way = "whole" if arch.whole else arch.way
        table.add_row(name, "masked token" if arch.masked else "next token", ", ".join(arch.sites), way)
    console.print(table)
    console.print("A type that is not listed is searched for its feed-forward layers when a model of it is described.")


@app.command()
def datasets(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Datasets to look at more closely, by name or file.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model whose tokenizer makes the prompts.")] = "smollm2-135m",
    shots: Annotated[Literal["0", "1"], typer.Option(help="Demonstrations of each class.")] = "0",
    wording: Annotated[str, typer.Option(help="Name of one of the dataset's wordings.")] = "default",
    prompt_format: Annotated[Literal["plain", "chat"], typer.Option(help="chat: by the model's template.")] = "plain",
    system_prompt: Annotated[str | None, typer.Option(help="System text in front of a chat.")] = None,
    mceval8k: Annotated[Path | None, typer.Option(help="Folder with MCEval8K.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Audit the named datasets, or all: shared rows, floors, label mass.")
    ] = False,
    rows: Annotated[
        int, typer.Option(min=0, help="For --audit: test prompts of each dataset that the model is asked; 0 for none.")
    ] = 100,
    out: Annotated[Path | None, typer.Option(help="For --audit: file to write, .md or .arrow.")] = None,
) -> None:
    """List the datasets, or show some as a model will read them: rows of their splits, label rule, a prompt.

    Examples: `neg datasets`, `neg datasets mini/fact --shots 1`, `neg datasets --audit --out audit.md`

    All prompts and labels of a dataset go through the checks of a run.

    An audit needs no run: it counts what splits share and repeat, fits floors that see no question, and asks the model
    how much of its probability lies on the options at all. A dataset that cannot be read is named at the end; the
    others go on, and the exit code is 1.
    """
    quiet_libraries()
    from flows.show.display import dataset_table, describe_dataset
    from negcore.datasets import PromptSettings, list_datasets

    settings = PromptSettings(
        shots=1 if shots == "1" else 0, wording=wording, prompt_format=prompt_format, system_prompt=system_prompt
    )
    if audit:
        from flows.cli.audit import show_audit

        show_audit(names or [info.name for info in list_datasets()], model, settings, mceval8k, rows, out)
        return
    if out is not None:
        raise RunError("--out is for --audit: add it")
    if not names:
        console.print(dataset_table(list_datasets()))
        return
    from negcore.model.language_model import describe_model
    from tasks.plan import prompt_warnings, read_dataset

    card = describe_model(model)
    for name in names:
        dataset, _ = read_dataset(card, name, settings, mceval8k)
        describe_dataset(console, dataset)
        for warning in prompt_warnings(card, dataset):
            tell("warning", warning, "yellow")


@app.command()
def verify(
    directory: RunDirectory,
    repair: Annotated[bool, typer.Option("--repair", help="Compute what is damaged or missing again.")] = False,
) -> None:
    """Check every shard against its receipt (size, checksum, place, columns, row ids), and results against the shards.

    Examples: `neg verify runs/NAME`, `neg verify runs/NAME --repair`

    Reads every byte and changes nothing. The exit code is 1 if a shard is damaged or missing, lies in the wrong place
    or belongs to another run, or if a table, probe or report is not what the finished run made of these shards. With
    --repair, the receipts of damaged shards are removed, never those of good ones, and the run of DIR/run.yaml is
    started again: it computes exactly what has no receipt. Then everything is checked again.
    """
    quiet_libraries()
    from flows.show.inspect_tables import checked, manifest_lines, verified_lines, verified_tables

    place = location(directory).absolute()
    found = checked(place, console)
    if repair and any(one.faults for one in found):
        repair_shards(found)
        found = checked(place, console)
    for table in verified_tables(found, place):
        console.print(table)
    of_results, warnings = manifest_lines(place)
    problems = verified_lines(found, place) + of_results
    for problem in problems:
        tell("wrong", problem)
    for warning in warnings:
        tell("warning", warning)
    if problems:
        raise typer.Exit(1)


@app.command()
def status(directory: RunDirectory) -> None:
    """Tell what a run has done, what is missing or set aside, how fast it is, and the time left.

    Example: `neg status runs/NAME`

    Reads receipts alone and loads no model, so it can be asked at any time, also while the run goes on. Shards are
    not opened: `neg verify` does that. The pace is that of the present session: every shard counts with the time since
    the one before it, and where that is a pause of the run, neither counts.
    """
    from flows.show.inspect_tables import status_lines, status_tables
    from tasks.rundir.status import run_status

    place = location(directory).absolute()
    found = run_status(place)
    for table in status_tables(found, place):
        console.print(table)
    for line in status_lines(found, place):
        console.print(escape(line), soft_wrap=True, highlight=False)


@app.command()
@_run_options(RUN_KINDS["pipeline"].run_class)
def plan(
    run_file: RunPath = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the rate of a worker: load each model, run a few prompts.")
    ] = False,
    gflops: Annotated[
        float | None, typer.Option(min=0.001, help="Rate of one worker, in 10^9 operations a second.")
    ] = None,
    **overrides: Any,
) -> None:
    """Foresee what a run will need: prompts, shards, bytes, memory, time; nothing is computed or written.

    Example: `neg plan --model smollm2-135m --dataset mceval8k/agnews --limit 200 --calibrate`

    Takes the options of `neg pipeline`, or the run file of any run on datasets. Shards that are already in the run
    directory are not counted again. A run that does not fit this machine's disk, memory or GPU is refused with exit
    code 2; a model or dataset that cannot be used is named, and the exit code is then 1, as the run's would be. Memory
    is an estimate; time is operations (2 a parameter and token, and 2 for each option's gradient) over a rate.
    """
    quiet_libraries()
    from flows.show.forecast_tables import forecast_lines, forecast_tables
    from tasks.forecast.capacity import requirements
    from tasks.forecast.needs import forecast, measured_rate, skill_runs
    from tasks.model_plans import all_problems
    from tasks.plan import plan as plan_run

    options_of = RUN_KINDS["pipeline"].run_class
    run = recorded_run(run_file, overrides) if run_file else read_run_file(options_of, None, overrides)
    with reading():
        planned = [(one, plan_run(one, tolerant=run.skips_unusable_datasets)) for one in skill_runs(run)]
        models = forecast(planned)
    first, of_first = planned[0]
    rates = {model.card.name: measured_rate(first, model) for model in of_first} if calibrate else {}
    rates |= {model.name: gflops * 1e9 for model in models} if gflops else {}
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
    for line in (*sorted(left_out), *sorted(warnings), *forecast_lines(models, rates, needed)):
        console.print(escape(line), soft_wrap=True, highlight=False)
    for requirement in needed:
        requirement.check()
    if left_out:
        raise typer.Exit(1)  # as the run would end


def _execute(name: str, run: RunFile, orchestrator: str) -> None:
    """Carry out a run of a kind and show its results."""
    quiet_libraries()
    check_machine()
    from tasks.steps import handing_over

    kind = RUN_KINDS[name]
    with handing_over() as given:
        with reading():
            n_steps = kind.n_steps(run)
        from flows.prefect_flows import prefect_flow

        flow = prefect_flow(name) if orchestrator == "prefect" else None
        results = carry_out(given, run, name, n_steps, load(kind.work), flow)
    show(results)
