"""`neg models REF`: what a model is, and what its check finds."""

from rich.markup import escape

from flows.show.check_tables import check_table, facts_table
from flows.show.console import console
from negcore.datasets.files import read_json_lines
from negcore.datasets.mini import MINI_ROWS
from negcore.measure.loading import accept, settled
from negcore.model.architectures import Dtype, SiteChoice
from negcore.model.language_model import read_model
from negcore.model.tokenizer_file import SAMPLE, tokenizer_warning

_OTHER_TEXT = "In 1923, 45 of 678 people didn't know it:\n  the share is 9.5 %, or \u4e5d\u5206\u306e\u4e00."
"""Numbers, contractions, spaces and another script: what tokenizers cut in their own ways."""


def show_model(ref: str, *, dtype: Dtype, device: str | None, site: SiteChoice) -> None:
    """Show a model's facts and its check, also where the check refuses it.

    Raises
    ------
    ModelError
        If it cannot be loaded, or its check refuses it.
    """
    lm = settled(read_model(ref, dtype=dtype, device=device, site=site))
    check = lm.check
    assert check is not None
    console.print(facts_table(lm))
    console.print(check_table(check, f"site {lm.site}, {lm.dtype} on {lm.device.type}"))
    facts = (record["prompt"] for _, record in read_json_lines(MINI_ROWS / "facts.jsonl"))
    warning = tokenizer_warning(lm.card, [_OTHER_TEXT, *facts][:SAMPLE])
    for line in (*check.replaced, *([warning] if warning else ())):
        console.print(escape(line), style="yellow", highlight=False, soft_wrap=True)
    accept(lm)
