"""The command line: `neg`."""

import inspect
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from negcore.errors import NegError
from tasks.runfile import EvaluationRun, LinearityRun, RunFile, SkillRun, read_run_file, write_run_file

if TYPE_CHECKING:
    from flows.linearity import LinearityResults
    from flows.pipeline import Results
    from flows.stages import Stages

R = TypeVar("R", bound=RunFile)
T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Neuron empirical gradients at scale: how much every feed-forward neuron of a language model moves the "
    "probability of an answer, and what that says about the model's skills.",
)
_out = Console()
_err = Console(stderr=True)

Orchestrator = Annotated[
    Literal["prefect", "none"],
    typer.Option(help="prefect: a flow run with its UI; a private server for the run unless PREFECT_API_URL is set."),
]
RunPath = Annotated[
    Path | None, typer.Argument(help="Run file (YAML), or a run directory. Options take precedence over it.")
]


def main() -> None:
    """Run the command line; errors that the user can mend are one line and exit code 2."""
    try:
        app()
    except NegError as error:
        _err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)


Command = Callable[..., None]


def _run_options(kind: type[RunFile]) -> Callable[[Command], Command]:
    """Give a command every field of a kind of run file as an option, so that each is written down once."""

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [_option(name, field) for name, field in kind.model_fields.items()]

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
    elif get_origin(kind) is Union and NoneType not in get_args(kind):  # of several forms, like a number or "all"
        kind = str
    has_default = not field.is_required() and field.default is not None and field.default_factory is None
    if has_default and name not in ("dataset", "confusion"):  # a long list, and a switch
        default = field.default
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        help_text += f" [default: {shown}]"
    option = typer.Option(f"--{name.replace('_', '-')}", help=help_text, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


@app.command()
@_run_options(SkillRun)
def pipeline(run_file: RunPath = None, orchestrator: Orchestrator = "prefect", **overrides: Any) -> None:
    """Extract NEGs and probe them.

    Example: `neg pipeline --model smollm2-135m --dataset mceval8k/agnews --limit 200 --shots 1`

    The run directory holds run.yaml; `neg pipeline DIR/run.yaml` repeats the run and computes only what is missing.
    """
    _execute("pipeline", read_run_file(SkillRun, run_file, overrides), orchestrator)


@app.command()
@_run_options(SkillRun)
def extract(run_file: RunPath = None, orchestrator: Orchestrator = "prefect", **overrides: Any) -> None:
    """Compute the NEG of every neuron for every option and write Arrow shards.

    Example: `neg extract --model smollm2-135m --dataset mini/fact --out runs/facts`
    """
    _execute("extract", read_run_file(SkillRun, run_file, overrides), orchestrator)


@app.command()
@_run_options(SkillRun)
def probe(run_file: RunPath = None, orchestrator: Orchestrator = "prefect", **overrides: Any) -> None:
    """Fit and score probes on shards that `neg extract` wrote.

    Example: `neg probe runs/facts --probe magn`
    """
    _execute("probe", read_run_file(SkillRun, run_file, overrides), orchestrator)


@app.command()
@_run_options(EvaluationRun)
def mceval8k(run_file: RunPath = None, orchestrator: Orchestrator = "prefect", **overrides: Any) -> None:
    """Evaluate probes on all 22 datasets of MCEval8K, without demonstrations and with one of each class.

    Example: `neg mceval8k --model smollm2-135m --mceval8k data/MCEval8K --limit 200 --out runs/mceval8k`

    DIR holds the tables (accuracy, averages, splits) as Arrow files, DIR/shots-0 and DIR/shots-1 the NEGs and the
    fitted probes. A dataset that cannot be used is left out and named at the end; the exit code is then 1.
    `neg mceval8k DIR/run.yaml` repeats the run and computes only what is missing.
    """
    _quiet_libraries()
    run = read_run_file(EvaluationRun, run_file, overrides)
    from flows import pipeline as flows
    from tasks.plan import plan

    with _reading():
        n_parts = sum(flows.n_parts(settings, plan(settings, tolerant=True)) for settings in run.settings)
    write_run_file(run)  # before anything is started: the directory may not be writable
    try:
        results = _carry_out(run, orchestrator, "mceval8k", n_parts, flows.run_mceval8k, flows.mceval8k)
    except flows.IncompleteRun as incomplete:
        results = incomplete.results
    _show(results)


@app.command()
@_run_options(LinearityRun)
def linearity(run_file: RunPath = None, orchestrator: Orchestrator = "prefect", **overrides: Any) -> None:
    """Measure NEGs by shifting neurons step by step, and compare every estimator with them.

    Example: `neg linearity --model smollm2-135m --prompts 10 --neurons 60 --out runs/linearity`

    Tables and figures are in DIR/linearity. `neg linearity DIR/run.yaml` repeats the run and measures only what is
    missing.
    """
    _quiet_libraries()
    run = read_run_file(LinearityRun, run_file, overrides)
    from flows import linearity as flows
    from flows.pipeline import IncompleteRun
    from tasks.sweeps import plan_linearity

    with _reading():
        n_shards = sum(study.n_shards for study in plan_linearity(run))
    write_run_file(run)  # before anything is started: the directory may not be writable
    try:
        results = _carry_out(run, orchestrator, "linearity", n_shards, flows.run_linearity, flows.linearity)
    except IncompleteRun as incomplete:
        results = incomplete.results
    _show_linearity(results)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    orchestrator: Orchestrator = "prefect",
) -> None:
    """Measure the embedded model on six small datasets and probe it: a first real result, without network.

    Example: `neg demo`
    """
    from negcore.datasets import list_datasets

    names = [info.name for info in list_datasets() if info.name.startswith("mini/")]
    values = {"model": ["smollm2-135m"], "dataset": names, "shots": 1, "out": out, "limit": 60}
    _execute("pipeline", read_run_file(SkillRun, None, values), orchestrator)


@app.command()
def benchmark(
    model: Annotated[str, typer.Option(help="Model, as for `neg pipeline`.")] = "smollm2-135m",
    device: Annotated[str | None, typer.Option(help="Torch device. By default the first GPU, else the CPU.")] = None,
    neurons: Annotated[int, typer.Option(min=1, help="Neurons that are swept.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; medians are shown.")] = 3,
    cpus: Annotated[int, typer.Option(min=1, help="Threads, as of a worker.")] = 1,
) -> None:
    """Time the fast paths beside their plain twins, in turns, on one question.

    Example: `neg benchmark --repeats 5`
    """
    _quiet_libraries()
    import torch

    from flows.linearity_tables import benchmark_table
    from negcore.benchmark import benchmark as compare
    from negcore.datasets import PromptSettings, load_dataset
    from negcore.encoding import encode_prompts
    from negcore.models import describe_model, load_model

    card = describe_model(model)
    with _reading():
        dataset = load_dataset("mini/fact", card.tokenizer, settings=PromptSettings(limit=8), masked=card.arch.masked)
        example = dataset.splits["test"][0]
        n_tokens = len(encode_prompts(card, [example.prompt])[0])
    torch.set_num_threads(cpus)
    comparisons = compare(
        load_model(model, device=device), example.prompt, example.labels, neurons=neurons, repeats=repeats
    )
    _out.print(benchmark_table(comparisons, f"{card.name}, prompt {example.id} of {n_tokens} tokens"))


@app.command()
def models() -> None:
    """List the models that ship as packages and the model families that can be measured.

    Example: `neg models`
    """
    from negcore.architectures import ARCHITECTURES
    from negcore.models import EMBEDDED

    for alias, (_, _, command) in EMBEDDED.items():
        _out.print(f"[bold]{alias}[/bold]  embedded: {command}", highlight=False)
    table = Table(
        "family", "prediction", "sites (paper = first)", title="Families: any safetensors model of these types"
    )
    for name, arch in sorted(ARCHITECTURES.items()):
        sites = "up, act, gate" if arch.gated else "act"
        table.add_row(name, "masked token" if arch.masked else "next token", sites)
    _out.print(table)


@app.command()
def datasets(
    name: Annotated[str | None, typer.Argument(help="A dataset to look at more closely; needs --model.")] = None,
    model: Annotated[str, typer.Option(help="Model whose tokenizer makes the prompts.")] = "smollm2-135m",
    shots: Annotated[Literal["0", "1"], typer.Option(help="Demonstrations of each class.")] = "0",
    wording: Annotated[str, typer.Option(help="Name of one of the dataset's wordings.")] = "default",
    mceval8k: Annotated[Path | None, typer.Option(help="Folder with MCEval8K.")] = None,
) -> None:
    """List the datasets, or show one as a model will read it: rows of its splits, label rule, a prompt.

    Examples: `neg datasets`, `neg datasets mini/fact --shots 1`
    """
    _quiet_libraries()
    from flows.display import dataset_table, describe_dataset
    from negcore.datasets import PromptSettings, list_datasets, load_dataset

    if name is None:
        _out.print(dataset_table(list_datasets()))
        return
    from negcore.models import describe_model

    card = describe_model(model)
    settings = PromptSettings(shots=1 if shots == "1" else 0, wording=wording)
    dataset = load_dataset(name, card.tokenizer, settings=settings, root=mceval8k, masked=card.arch.masked)
    describe_dataset(_out, dataset)


def _execute(flow_name: str, run: SkillRun, orchestrator: str) -> None:
    """Run one of the pipeline's flows and show its results."""
    _quiet_libraries()
    from flows import pipeline as flows
    from tasks.plan import plan

    with _reading():
        n_parts = flows.n_parts(run, plan(run), extract=flow_name != "probe", probe=flow_name != "extract")
    if flow_name != "probe":
        write_run_file(run)  # before anything is started: the directory may not be writable
    plain = {"extract": flows.run_extract, "probe": flows.run_probe, "pipeline": flows.run_pipeline}[flow_name]
    prefect_flow = {"extract": flows.extract, "probe": flows.probe, "pipeline": flows.pipeline}[flow_name]
    try:
        results = _carry_out(run, orchestrator, flow_name, n_parts, plain, prefect_flow)
    except flows.IncompleteRun as incomplete:
        results = incomplete.results
    _show(results)


def _carry_out(
    run: R,
    orchestrator: str,
    title: str,
    n_parts: int,
    plain: Callable[[R, "Stages"], T],
    prefect_flow: Callable[[R], T],
) -> T:
    """Run a flow with its progress on screen: plainly, or under the Prefect server that is configured or private."""
    from flows.display import Display
    from flows.stages import PlainStages, current_watcher
    from tasks.server import prefect_api

    signal.signal(signal.SIGTERM, _terminated)
    _out.print(f"run directory: {escape(str(run.directory))}", highlight=False, soft_wrap=True)
    try:
        with Display(_out, title, n_parts) as display:
            current_watcher.set(display)
            if orchestrator == "none":
                return plain(run, PlainStages())
            with prefect_api(run.directory / "prefect") as api:
                api.wait_ready()
                page = api.url.removesuffix("/api")
                hint = f" (password: {run.directory / 'prefect' / 'password'})" if api.private else ""
                _out.print(f"watch it at {escape(page + hint)}", highlight=False, soft_wrap=True)
                return prefect_flow(run)
    except KeyboardInterrupt:
        _err.print("stopped; finished shards are kept, and the same command goes on from them")
        raise typer.Exit(130) from None


def _show(results: "Results") -> None:
    from flows.accuracy_tables import confusion_tables, result_tables, rows_table

    for table in confusion_tables(results.confusion):
        _out.print(table)
    if results.scores:
        _out.print(rows_table(results.splits))
    for table in result_tables(results.scores, results.averages, results.n_datasets):
        _out.print(table)
    rows = sum(part.n_rows for part in results.extracted)
    if results.extracted:
        size = sum(part.n_bytes for part in results.extracted) / 2**20
        reused = sum(part.n_reused for part in results.extracted)
        shards = reused + sum(part.n_computed for part in results.extracted)
        _out.print(f"{rows} prompts in {shards} shards ({reused} were there already), {size:.0f} MiB", highlight=False)
    _end(results.directory, results.problems)


def _show_linearity(results: "LinearityResults") -> None:
    from flows.linearity_tables import linearity_tables, summary

    for findings in results.findings:
        _out.print(escape(summary(findings)), highlight=False, soft_wrap=True)
        for table in linearity_tables(findings):
            _out.print(table)
    _end(results.directory, results.problems)


def _end(directory: Path, problems: Sequence[str]) -> None:
    """Say where everything is, and what is missing."""
    from flows.display import printable

    _out.print(f"written to {escape(str(directory))}", highlight=False, soft_wrap=True)
    for problem in problems:
        _err.print(f"[red]missing:[/red] {escape(printable(problem))}", soft_wrap=True, highlight=False)
    if problems:
        raise typer.Exit(1)


def _reading() -> AbstractContextManager[object]:
    return _out.status("reading tokenizers and datasets") if _out.is_terminal else nullcontext()


def _terminated(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _quiet_libraries() -> None:
    """The terminal belongs to our own progress. Set before the libraries are imported: they read these only then."""
    for name, value in {
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
