"""Warnings of prompts that a model can read, and a reader of the results must know of."""

from collections.abc import Sequence

from negcore.datasets import Dataset, Example
from negcore.datasets.orders import refers_to_options
from negcore.model.language_model import ModelCard
from negcore.model.tokenizer_file import tokenizer_warning
from negcore.texts import row_text


def prompt_warnings(card: ModelCard, dataset: Dataset) -> tuple[str, ...]:
    """Return what must be read with care of a dataset's prompts, a line each."""
    examples = [example for examples in dataset.splits.values() for example in examples]
    found = (
        tokenizer_warning(card, [example.prompt for example in examples]),
        _referring(dataset, examples),
        _beginning_alike(dataset, examples),
        _mixed_places(examples),
    )
    return tuple(f"{dataset.name}: {warning}" for warning in found if warning)


def _beginning_alike(dataset: Dataset, examples: Sequence[Example]) -> str:
    """Return a warning of answers of several tokens that others go on from: these are never more likely."""
    if dataset.settings.answers == "token":
        return ""
    rows = [one.id for one in examples if any(_goes_on(a, b) for a in one.labels for b in one.labels)]
    if not rows:
        return ""
    where = f"in {len(rows)} of {len(examples)} prompts, such as {row_text(rows[0])}"
    return f"{where}, a label begins with the words of another: it is never more probable than that one"


def _goes_on(shorter: str, longer: str) -> bool:
    return longer.startswith(shorter) and not longer[len(shorter) :][:1].isalnum() and longer != shorter


def _mixed_places(examples: Sequence[Example]) -> str:
    """Return a warning of prompts that are read at their ends beside prompts that name another token."""
    n_named = sum(one.probe_end is not None for one in examples)
    if n_named in (0, len(examples)):
        return ""
    return f"{n_named} of {len(examples)} prompts are read at a token that probe_at names, the others at their ends"


def _referring(dataset: Dataset, examples: Sequence[Example]) -> str:
    """Return a warning of rows in which an option speaks of others, if their order is changed; else nothing."""
    if dataset.settings.permutations == 1:
        return ""
    referring = [(one.id, option) for one in examples for option in one.options if refers_to_options(option)]
    if not referring:
        return ""
    n_rows, first = len({dataset.settings.row_of(id_) for id_, _ in referring}), referring[0][1]
    return (
        f"options that seem to speak of other options, such as {row_text(first)}, stand in {n_rows} of the rows: in "
        "another order they can mean something else"
    )
