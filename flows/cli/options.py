"""Arguments and options that commands share, and those that the fields of run files are."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from flows.cli.completion import complete_dataset, complete_model, complete_run
from tasks.config.run_file import FORMER_KEYS, RunFile

Orchestrator = Annotated[
    Literal["prefect", "none"],
    typer.Option(help="prefect: a flow run with its UI; a private server for the run unless PREFECT_API_URL is set."),
]
# Text, not a Path: that would take one of the slashes of s3://.
RunDirectory = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="Run directory, or a part of one; on disk or s3://BUCKET/PREFIX.",
        autocompletion=complete_run,
    ),
]
RunPath = Annotated[
    str | None,
    typer.Argument(
        help="Run file (YAML), or a run directory. Options take precedence over it.", autocompletion=complete_run
    ),
]

Command = Callable[..., None]

_COMPLETED = {"model": complete_model, "dataset": complete_dataset}
"""Values that a shell completes behind options, by the name of the field."""


def run_options(run_class: type[RunFile]) -> Callable[[Command], Command]:
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
    elif Path in get_args(kind) or _has_several_forms(kind):
        kind = str  # it may be a URL, a number or "all", a word or a mapping
    has_default = not field.is_required() and field.default is not None and field.default_factory is None
    if has_default and name not in ("dataset", "confusion"):  # a long list, and a switch
        default = field.default
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        help_text += f" [default: {shown}]"
    keys = [name, FORMER_KEYS[name]] if name in FORMER_KEYS else [name]
    names = (f"--{key.replace('_', '-')}" for key in keys)
    option = typer.Option(*names, help=help_text, show_default=False, autocompletion=_COMPLETED.get(name))
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _has_several_forms(kind: Any) -> bool:
    forms = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    return bool(forms) and (NoneType not in forms or any(get_origin(one) is dict for one in forms))
