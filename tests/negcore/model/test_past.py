import pytest
import torch
from torch import Tensor

from negcore.model import attention
from negcore.model.past import KeysValues, Past, Prefixes, PromptTokens

B, H, G, P, S, D = 3, 4, 2, 7, 5, 8
"""Rows, heads, key/value heads, shared tokens, own tokens, head width."""


def random_tokens(rows: int, count: int) -> KeysValues:
    return KeysValues(torch.randn(rows, G, count, D, dtype=torch.float64), torch.randn(rows, G, count, D).double())


def explicit(query: Tensor, tokens: KeysValues, mask: Tensor, scale: float = 1.0) -> Tensor:
    return attention._explicit(query, *tokens, mask, scale, None, None)


@pytest.mark.parametrize("copies", [1, 3])
def test_the_last_token_attends_to_parts_as_to_the_whole_in_values_and_gradients(copies):
    torch.manual_seed(0)
    past = Past(random_tokens(1, P), random_tokens(B, S))
    newest = random_tokens(B * copies, 1)
    query = torch.randn(B * copies, H, 1, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(B * copies, 1, 1, P + S + 1) > 0.3
    mask[..., -1] = True
    whole = explicit(query, past.joined(newest), mask)
    parts = attention._last(query, newest, past, mask, None, None)
    torch.testing.assert_close(parts, whole)
    direction = torch.randn_like(whole)
    torch.testing.assert_close(*(torch.autograd.grad((one * direction).sum(), query)[0] for one in (parts, whole)))


def test_a_batched_backward_pass_through_parts_is_one_for_each_option():
    torch.manual_seed(0)
    past, newest = Past(random_tokens(1, P), random_tokens(B, S)), random_tokens(B, 1)
    query = torch.randn(B, H, 1, D, dtype=torch.float64, requires_grad=True)
    output = attention._last(query, newest, past, torch.ones(B, 1, 1, P + S + 1, dtype=torch.bool), None, None)
    directions = torch.randn(4, *output.shape, dtype=torch.float64)
    together = torch.autograd.grad(output, query, directions, is_grads_batched=True, retain_graph=True)[0]
    alone = [torch.autograd.grad(output, query, one, retain_graph=True)[0] for one in directions]
    torch.testing.assert_close(together, torch.stack(alone))


def flash(query, key, value, *, scale, is_causal=False):
    """The fused kernel of GPUs, plainly: output and log-sum-exp."""
    copies = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(copies, 1).mT * scale
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ value.repeat_interleave(copies, 1), scores.logsumexp(-1)


def test_parts_merged_by_log_sum_exp_are_the_whole(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    shared, own, query = random_tokens(1, P), random_tokens(B, S), torch.randn(B, H, S, D, dtype=torch.float64)
    looks_back = torch.cat([torch.ones(S, P), torch.ones(S, S).tril()], dim=1).bool()[None, None]
    whole = explicit(query, Past(shared, None).joined(own), looks_back, 0.3)
    torch.testing.assert_close(attention._merged(query, own, shared, 0.3), whole, rtol=1e-6, atol=1e-6)


def test_rows_times_a_bfloat16_matrix_lose_nothing_but_their_last_digits(monkeypatch):
    torch.manual_seed(0)
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: bmm(a.to(out_dtype), b.to(out_dtype)))
    rows, matrix = torch.randn(B, G, S, D), torch.randn(B, G, D, P).bfloat16()
    exact = rows.double() @ matrix.double()
    torch.testing.assert_close(attention._in_halves(rows, matrix).double(), exact, rtol=0, atol=1e-4)
    assert (rows.bfloat16().double() @ matrix.double() - exact).abs().max() > 1e-3  # by the upper half alone


def test_written_tokens_come_back_in_their_rows_and_unused_slots_hold_zeros():
    tokens = PromptTokens([], 3, 4)
    one, two = random_tokens(2, 4), random_tokens(1, 3)
    tokens.write(0, slice(0, 2), one)
    tokens.write(0, slice(2, 3), two)
    for slots, first, last in zip(tokens.own[0], one, two, strict=True):
        assert slots[:2].equal(first) and slots[2:, :, :3].equal(last) and not slots[2, :, 3].any()


def test_prefixes_are_made_once_and_the_least_recently_used_is_dropped():
    made, prefixes = [], Prefixes()

    def get(*tokens: int) -> None:
        prefixes.get(torch.float32, tokens, lambda: made.append(tokens) or [])

    for first in (0, 1, 2, 3, 0, 4, 0, 1):
        get(first, 9)
    assert [first for first, _ in made] == [0, 1, 2, 3, 4, 1]
    prefixes.get(torch.bfloat16, (0, 9), lambda: made.append("in another type") or [])
    assert made[-1] == "in another type"
