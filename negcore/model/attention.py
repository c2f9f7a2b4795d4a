"""Attention of measured models: exact in any dtype, differentiable under vmap, and open to virtual tokens.

Shapes: B batch, H heads, G key/value heads, Q queries, K keys, D head width.

The implementations of transformers do not fit: `eager` rounds its softmax to float32 even in a float64 model, and the
fused kernels have no rule for a batched backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from negcore.model.masks import mask_by_position, refuse_lookahead

ATTENTION_NAME = "negcore"


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
    virtual_prompt: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention with grouped heads, boolean masks and logit soft-capping.

    Parameters
    ----------
    query : Tensor of shape (B, H, Q, D)
    key, value : Tensor of shape (B, G, K, D)
    attention_mask : bool Tensor of shape (B or 1, 1, Q, K), or None
        True where a query may look. Without a mask, causal modules look back and the others look everywhere.
    virtual_prompt : cache of one prompt, optional
        An argument of the model's forward pass that makes the Q tokens virtual: all stand at the position after this
        prompt, and each looks only at the prompt and itself. The mask is then that of this position, (1, 1, 1, K + 1).

    Returns
    -------
    Tensor of shape (B, Q, H, D), None

    Raises
    ------
    ModelError
        If a causal model's module looks at later tokens too.
    """
    refuse_lookahead(not _looks_back_only(module, is_causal))
    if virtual_prompt is not None:
        assert attention_mask is not None
        visible_K = attention_mask[0, 0, 0, :-1]
        keys, values = _prompt_keys(module, virtual_prompt, key, value)
        prompt = keys[:, :, visible_K], values[:, :, visible_K]
        return _virtual(query, key, value, *prompt, scaling, softcap), None
    if softcap is None and not torch.is_grad_enabled():
        # Without a graph, the fused kernel serves: it is exact and needs no (Q, K) matrix.
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return output, None
    if attention_mask is None and query.shape[2] > 1 and _looks_back_only(module, is_causal):
        attention_mask = _causal_mask(query.shape[2], key.shape[2], query.device)
    return _explicit(query, key, value, attention_mask, scaling, softcap), None


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
    output = scores.softmax(-1) @ value
    return output.reshape(batch, n_heads, n_queries, -1).transpose(1, 2)


def _virtual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Let each query attend to the prompt's keys and its own.

    Its own key is one more column of scores; a mask over all virtual tokens would cost queries squared.
    """
    _, n_heads, n_queries, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    n_groups = key.shape[1]
    folded = grouped(query * scale, n_groups)
    per_head = folded.view(1, n_groups, -1, n_queries, width)
    own_scores = (per_head * key[:, :, None]).sum(-1).view(1, n_groups, -1, 1)
    scores = torch.cat([folded @ prompt_keys.transpose(-1, -2), own_scores], dim=-1)
    weights = capped(scores, softcap).softmax(-1)
    own_weights = weights[..., -1].view(1, n_groups, -1, n_queries, 1)
    output = (weights[..., :-1] @ prompt_values).view_as(per_head) + own_weights * value[:, :, None]
    return output.reshape(1, n_heads, n_queries, -1).transpose(1, 2)


def _prompt_keys(module: nn.Module, cache: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if cache.get_seq_length() == 0:  # a prompt of one token has no earlier ones
        return key[:, :, :0], value[:, :, :0]
    layer = cache.layers[module.layer_idx]
    return layer.keys, layer.values


def _looks_back_only(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Return a mask of shape (1, 1, Q, K) for queries that are the last of the keys."""
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return mask.tril(n_keys - n_queries)[None, None]
