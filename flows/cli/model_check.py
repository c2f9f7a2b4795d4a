"""`neg models REF`: what a model is, and what its check finds."""

from rich.markup import escape

from flows.cli.terminal import console
from flows.show.check_tables import check_table, facts_table
from negcore.measure.loading import accept, settled
from negcore.model.architectures import Dtype, SiteChoice
from negcore.model.language_model import read_model


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
    for line in check.replaced:
        console.print(escape(line), style="yellow", highlight=False, soft_wrap=True)
    accept(lm)
