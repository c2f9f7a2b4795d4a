"""Tables of a model: its facts, and the findings of its check at load."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from flows.show.model_names import shown_model
from flows.show.report import Section
from flows.show.table import Cell, Number, Style, Table, Words, numbers, texts
from negcore.model.architectures import WAYS
from negcore.model.check import COMPARED, Comparison, ModelCheck, Verdict
from negcore.model.language_model import LanguageModel
from negcore.model.layer_shapes import experts_in_words
from tasks.rundir.checks import NotedCheck

_STYLES: Mapping[Verdict, Style] = MappingProxyType({"passed": "green", "failed": "red", "absent": "dim"})


def check_table(check: ModelCheck, about: str, key: str = "check") -> Table:
    """Return a row for every comparison: what was compared, how far apart it was, and how far it may be."""
    columns = [*texts("compared"), *numbers("difference", "tolerance"), *texts("verdict")]
    rows = [_row(one) for one in check.comparisons]
    return Table(key, f"Check at load, {about}", columns, [rows], "\n".join(check.notes))


def _row(one: Comparison) -> list[Cell]:
    difference: Cell = "" if one.difference is None else Number(one.difference, "{:.1e}".format)
    verdict = Words(f"{one.verdict}: {one.note}" if one.note else one.verdict, _STYLES[one.verdict])
    return [COMPARED[one.name], difference, Number(one.tolerance, "{:.0e}".format), verdict]


def facts_table(lm: LanguageModel) -> Table:
    """Return what a loaded model is."""
    card = lm.card
    rows: list[list[Cell]] = [
        ["revision", card.revision],
        ["family", card.config.model_type + (" (discovered)" if lm.arch.discovered else "")],
        ["predicts", "a masked token" if lm.arch.masked else "the next token"],
        ["neurons", f"{lm.n_layers} layers x {lm.layer_width}"],
        ["sites", f"{', '.join(lm.arch.sites)} (paper: {lm.arch.site('paper')})"],
        ["way", f"{lm.way}: {WAYS[lm.way]}"],
        ["longest prompt", f"{card.context_tokens} tokens"],
        ["vocabulary", f"{card.vocab_size} tokens"],
    ]
    if lm.has_experts:
        rows.insert(4, ["experts", experts_in_words(lm.layer_shapes)])
    return Table("model", shown_model(card.name), texts("", ""), [rows])


def check_section(noted: Sequence[NotedCheck]) -> Section:
    """Return the checks of a run's models, for its page."""
    tables = [
        check_table(
            one.check, f"{shown_model(one.model)}: site {one.site}, {one.dtype} on {one.device}", f"check-{one.model}"
        )
        for one in noted
    ]
    return Section("", tables)


def check_warnings(noted: Sequence[NotedCheck]) -> Iterator[str]:
    """Return a line for every way to measure that failed a model's check and was done without."""
    for one in noted:
        yield from (f"{shown_model(one.model)}: {line}" for line in one.check.replaced)
