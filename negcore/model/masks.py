"""Attention masks: always the model's own rule (full, sliding, chunked), asked about positions instead of slots.

A model builds its masks with the mask functions of transformers, which take the index of a key for its position. In a
batch of prompts of different lengths the newest token's slot in the cache is not its position. So a pass may be laid
out: the rule is the model's, the positions are ours. No window or type of a layer is read from a configuration.

Shapes: B rows of a batch, T queries, K keys.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from negcore.errors import ModelError


class Layout(NamedTuple):
    """Positions of the tokens of one pass of a causal model."""

    queries_BT: Tensor
    """Position of each query."""
    keys_BK: Tensor
    """Position of each key."""
    visible_BTK: Tensor
    """False where a query must not look at a key whatever the model's rule: padding, or another row's slot."""


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Let the masks of every pass inside be made for these positions."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def mask_by_position(*, mask_function: Callable[..., Tensor], **size: Any) -> Tensor | None:
    """Make a boolean mask (B, 1, T, K) by the model's rule; without a layout, as transformers does.

    Raises
    ------
    ModelError
        If the rule of a pass that is laid out lets a token see a later one.
    """
    layout = _layout.get()
    if layout is None:
        mask: Tensor | None = sdpa_mask(mask_function=mask_function, **size)
        return mask
    zero = torch.tensor(0)
    refuse_lookahead(bool(mask_function(zero, zero, zero, zero + 1)))
    rows_B = torch.arange(len(layout.queries_BT), device=layout.queries_BT.device)[:, None, None, None]
    queries_B1T1, keys_B11K = layout.queries_BT[:, None, :, None], layout.keys_BK[:, None, None, :]
    rule_B1TK = mask_function(rows_B, torch.zeros_like(rows_B), queries_B1T1, keys_B11K)
    visible_B1TK = rule_B1TK & layout.visible_BTK[:, None]
    if layout.queries_BT.shape[1] > 1:
        visible_B1TK.looks_back = bool((rule_B1TK == (keys_B11K <= queries_B1T1)).all())  # type: ignore[attr-defined]
    return visible_B1TK


def looks_back(mask: Tensor | None) -> bool:
    """Tell whether a mask of a pass that is laid out lets every token see all those before it, and nothing else.

    Slots of padding come behind a prompt's own tokens, so that such a mask is causal slot by slot.
    """
    return getattr(mask, "looks_back", False)


def refuse_lookahead(looks_ahead: bool) -> None:
    """Refuse a causal model whose attention sees later tokens: what comes before a prompt's last one is then not fixed.

    Raises
    ------
    ModelError
        If it does.
    """
    if looks_ahead and _layout.get() is not None:
        raise ModelError(
            "this model's attention looks at later tokens too (use_bidirectional_attention, is_causal: false or the "
            "like in its config.json): it predicts no next token, so no label can follow a prompt"
        )
