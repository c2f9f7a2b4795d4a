"""Attention of measured models: exact in any dtype, differentiable under vmap, and open to virtual tokens.

Shapes: B batch, H heads, G key/value heads, Q queries, K keys, D head width.

The implementations of transformers do not fit: `eager` rounds its softmax to float32 even in a float64 model, and the
fused kernels have no rule for a batched backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from negcore.model.masks import looks_back, mask_by_position, refuse_lookahead
from negcore.model.past import KeysValues, Past, past_of

ATTENTION_NAME = "negcore"


_side_by_side: ContextVar[bool] = ContextVar("side_by_side", default=False)


@contextmanager
def side_by_side() -> Iterator[None]:
    """Make the newest tokens of every pass inside virtual: at one position, each sees only the prompt and itself."""
    token = _side_by_side.set(True)
    try:
        yield
    finally:
        _side_by_side.reset(token)


def register_attention() -> None:
    """Register the attention in transformers as `ATTENTION_NAME`; a second call changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, mask_by_position)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention with grouped heads, boolean masks, logit soft-capping and sinks.

    Parameters
    ----------
    query : Tensor of shape (B, H, Q, D)
    key, value : Tensor of shape (B, G, K, D)
        From a `PartsCache`: of the newest tokens alone; the keys tell what comes before them.
    attention_mask : bool Tensor of shape (B or 1, 1, Q, K), or None
        True where a query may look at a token, those before the newest counted. Without a mask, causal modules look
        back and the others look everywhere. Inside `side_by_side` it is the mask of one token after the prompt's, and
        the newest tokens are virtual.
    s_aux : Tensor of shape (H,), optional
        Sinks: a score of each head that takes its share of the softmax and has no value (gpt-oss).

    Returns
    -------
    Tensor of shape (B, Q, H, D), None

    Raises
    ------
    ModelError
        If a causal model's module looks at later tokens too.
    """
    refuse_lookahead(not _looks_back_only(module, is_causal))
    past, newest = past_of(key), KeysValues(key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _side_by_side.get():
        assert attention_mask is not None
        return _virtual(query * scale, newest, past, attention_mask[0, 0, 0, :-1], softcap, s_aux), None
    if past is not None and query.shape[2] == 1:
        assert attention_mask is not None
        wide = torch.promote_types(query.dtype, torch.float32)
        return _last(query.to(wide) * scale, newest, past, attention_mask, softcap, s_aux).to(query.dtype), None
    is_plain = softcap is None and s_aux is None
    # Between own tokens and several newest ones there may be slots of padding, which the mask alone knows.
    shared = past.shared if past is not None and past.own is None else None
    if shared is not None and is_plain and _may_merge(query, value, attention_mask):
        return _merged(query, newest, shared, scale), None
    if past is not None:
        key, value = past.joined(newest)
        if past.own is None and shared is None and looks_back(attention_mask):
            attention_mask, is_causal = None, True
    if is_plain and not torch.is_grad_enabled():
        # Without a graph, the fused kernel serves: it is exact and needs no (Q, K) matrix.
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return output, None
    if attention_mask is None and query.shape[2] > 1 and _looks_back_only(module, is_causal):
        attention_mask = _causal_mask(query.shape[2], key.shape[2], query.device)
    # As the fused kernels do inside, and as gpt2's reorder_and_upcast_attn asks: half types would round every score.
    wide = torch.promote_types(query.dtype, torch.float32)
    output = _explicit(query.to(wide), key.to(wide), value.to(wide), attention_mask, scaling, softcap, s_aux)
    return output.to(query.dtype), None


def grouped(query: Tensor, n_groups: int) -> Tensor:
    """Fold query heads that share a key/value head into the query axis: (B, H, Q, D) -> (B, G, H/G * Q, D)."""
    batch, n_heads, n_queries, width = query.shape
    return query.reshape(batch, n_groups, n_heads // n_groups * n_queries, width)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Soft-cap attention logits (Gemma 2)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    batch, n_heads, n_queries, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    n_groups = key.shape[1]
    scores = capped(grouped(query, n_groups) @ key.transpose(-1, -2) * scale, softcap)
    if mask is not None:
        per_head = scores.view(batch, n_groups, n_heads // n_groups, n_queries, -1)
        # The lowest finite number, not -inf: a padding token that sees nothing at all must not become NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = per_head.masked_fill(~mask[:, :, None], lowest).view_as(scores)
    output = _weights(scores, sinks) @ value
    return output.reshape(batch, n_heads, n_queries, -1).transpose(1, 2)


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax of grouped scores (B, G, H/G * Q, K); what the sinks of the heads take of it is left out."""
    if sinks is None:
        return scores.softmax(-1)
    n_rows, n_groups, n_queries, _ = scores.shape
    per_query = sinks.to(scores.dtype).repeat_interleave(n_groups * n_queries // len(sinks))
    column = per_query.view(1, n_groups, n_queries, 1).expand(n_rows, -1, -1, -1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]


def _last(
    query: Tensor, newest: KeysValues, past: Past, mask: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Let the last token of each row attend to the tokens before it and to itself, part by part.

    Query, newest keys and values carry the graph; what comes before takes no gradient, stays in its own number type and
    is not copied for every row. Queries are scaled.
    """
    batch, n_heads, _, _ = query.shape
    n_groups = newest.keys.shape[1]
    grouped_query = grouped(query, n_groups)
    own_scores = (grouped_query * newest.keys).sum(-1, keepdim=True)
    parts = [part for part in past if part is not None]
    scores = torch.cat([*(_product(grouped_query, part.keys.mT) for part in parts), own_scores], dim=-1)
    # The lowest finite number, not -inf: a padding token that sees nothing at all must not become NaN.
    scores = capped(scores, softcap).masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.split(_weights(scores, sinks), [*(part.keys.shape[2] for part in parts), 1], dim=-1)
    output = weights[-1] * newest.values.to(scores.dtype)
    for weight, part in zip(weights[:-1], parts, strict=True):
        output = output + _product(weight, part.values)
    return output.reshape(batch, n_heads, 1, -1).transpose(1, 2)


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply (B, G, Q, K) by (C, G, K, D), where each of the C serves B / C rows side by side and is not repeated."""
    n_rows, n_groups, _, _ = rows.shape
    if len(matrix) == n_rows:
        return _multiplied(rows, matrix)
    together = rows.reshape(len(matrix), -1, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)
    product = _multiplied(together, matrix)
    apart = product.view(len(matrix), n_groups, n_rows // len(matrix), -1, product.shape[-1])
    return apart.transpose(1, 2).flatten(0, 1)


def _multiplied(rows: Tensor, matrix: Tensor) -> Tensor:
    product: Tensor = _Product.apply(rows, matrix)  # type: ignore[no-untyped-call]
    return product


class _Product(torch.autograd.Function):
    """Product (B, G, Q, K) @ (B, G, K, D) with a matrix that takes no gradient, in the number type of the rows.

    In a batched backward pass the options join the rows. PyTorch's own rule would copy the matrix for each option.
    """

    @staticmethod
    def forward(rows: Tensor, matrix: Tensor) -> Tensor:
        is_bfloat16 = rows.is_cuda and matrix.dtype == torch.bfloat16
        return _in_halves(rows, matrix) if is_bfloat16 else rows @ matrix.to(rows.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        return _multiplied(gradient, matrix.mT), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], rows: Tensor, matrix: Tensor) -> tuple[Tensor, int]:
        assert in_dims[0] is not None and in_dims[1] is None
        together = rows.movedim(in_dims[0], 2).flatten(2, 3)
        product = _multiplied(together, matrix)
        return product.view(*product.shape[:2], info.batch_size, -1, product.shape[-1]), 2


def _in_halves(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply float32 rows by a bfloat16 matrix, which is not widened: by the upper and the lower half of the rows.

    Both products are summed in float32: of each row's number 16 binary digits count, of the matrix's all.
    """
    upper = rows.to(matrix.dtype)
    lower = (rows - upper).to(matrix.dtype)
    flat = matrix.flatten(0, 1)
    of_upper, of_lower = (torch.bmm(half.flatten(0, 1), flat, out_dtype=torch.float32) for half in (upper, lower))
    return (of_upper + of_lower).view(*rows.shape[:-1], -1)


def _virtual(
    query: Tensor,
    given: KeysValues,
    past: Past | None,
    visible_K: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Let each query attend to the visible keys of the prompt and its own.

    Its own key is one more column of scores; a mask over all virtual tokens would cost queries squared. Queries are
    scaled.
    """
    _, n_heads, n_queries, width = query.shape
    n_groups = given.keys.shape[1]
    together = given if past is None else past.joined(given)
    prompt_keys, prompt_values = (one[:, :, :-n_queries][:, :, visible_K] for one in together)
    own_keys, own_values = (one[:, :, None, -n_queries:] for one in together)
    folded = grouped(query, n_groups)
    per_head = folded.view(1, n_groups, -1, n_queries, width)
    own_scores = (per_head * own_keys).sum(-1).view(1, n_groups, -1, 1)
    scores = torch.cat([folded @ prompt_keys.transpose(-1, -2), own_scores], dim=-1)
    weights = _weights(capped(scores, softcap), sinks)
    own_weights = weights[..., -1].view(1, n_groups, -1, n_queries, 1)
    from_prompt = (weights[..., :-1] @ prompt_values).view(1, n_groups, -1, n_queries, own_values.shape[-1])
    output = from_prompt + own_weights * own_values
    return output.reshape(1, n_heads, n_queries, -1).transpose(1, 2)


def _may_merge(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Tell whether the fused kernel of GPUs, which knows no masks, can take two parts that are merged behind it."""
    width, is_half = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
    fits = width == value.shape[-1] and width % 8 == 0 and width <= 256
    return query.is_cuda and is_half and fits and not torch.is_grad_enabled() and looks_back(mask)


def _merged(query: Tensor, newest: KeysValues, shared: KeysValues, scale: float) -> Tensor:
    """Attend to what all rows share, all rows' queries together, and to a row's own tokens; merge by log-sum-exp.

    The shared keys and values are not copied for every row.
    """
    n_rows, n_heads, n_queries, _ = query.shape
    together = query.transpose(0, 1).reshape(1, n_heads, n_rows * n_queries, -1)
    flash = partial(torch.ops.aten._scaled_dot_product_flash_attention, scale=scale)
    of_shared, shared_lse, *_ = flash(together, *shared)
    of_own, own_lse, *_ = flash(query, *newest, is_causal=True)
    of_shared = of_shared.view(n_heads, n_rows, n_queries, -1).transpose(0, 1)
    shared_lse = shared_lse.view(n_heads, n_rows, n_queries).transpose(0, 1)
    weight = torch.sigmoid(shared_lse - own_lse)[..., None]
    of_own, of_shared = (part.to(weight.dtype) for part in (of_own, of_shared))
    output: Tensor = of_own + weight * (of_shared - of_own)
    return output.to(query.dtype).transpose(1, 2)


def _looks_back_only(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Return a mask of shape (1, 1, Q, K) for queries that are the last of the keys."""
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return mask.tril(n_keys - n_queries)[None, None]
