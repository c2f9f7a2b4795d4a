"""The audit of datasets in front of a person: `neg datasets --audit`."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import typer
from rich.markup import escape

from flows.show.audit_tables import audit_tables, check_audit_file, write_audit
from flows.show.console import console, tell
from negcore.datasets import PromptSettings
from negcore.errors import NegError
from negcore.measure.loading import load_model
from negcore.model.language_model import describe_model
from tasks.audit import DatasetAudit, audit_dataset


def show_audit(
    names: Sequence[str], ref: str, settings: PromptSettings, root: Path | None, n_asked: int, out: Path | None
) -> None:
    """Audit datasets with a model, show the tables and write them if asked to.

    Datasets that cannot be audited are named at the end, and the exit code is then 1.
    """
    if out is not None:
        check_audit_file(out)
    card = describe_model(ref)
    lm = load_model(ref) if n_asked else None
    audits: list[DatasetAudit] = []
    problems: list[str] = []
    for name in dict.fromkeys(names):
        try:
            with console.status(f"auditing {escape(name)}") if console.is_terminal else nullcontext():
                audits.append(audit_dataset(name, card, lm, settings=settings, root=root, n_asked=n_asked))
            if not console.is_terminal:
                console.print(f"audited {escape(name)}", highlight=False, soft_wrap=True)
        except NegError as error:
            problems.append(f"{error}")
    tables = audit_tables(audits, settings) if audits else []
    for table in tables:
        console.print(table)
    if out is not None and audits:
        write_audit(out, audits, tables, shlex.join(["neg", *sys.argv[1:]]))
        console.print(f"written to {escape(str(out))}", highlight=False, soft_wrap=True)
    for problem in problems:
        tell("left out", problem)
    if problems:
        raise typer.Exit(1)
