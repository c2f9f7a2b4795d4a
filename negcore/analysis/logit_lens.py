"""The logit lens on one neuron: the tokens that the row which it writes to the residual stream promotes.

The row is read as if it were the last hidden state: the final normalisation (its scale and centring, without its bias)
and the unembedding are applied to it. Nothing of the prompt enters, and layers between the neuron and the end are left
out, so this is the neuron's direct effect alone; the order of tokens does not depend on the size of the row.

References
----------
nostalgebraist, "interpreting GPT: the logit lens" (2020); Geva et al., "Transformer Feed-Forward Layers Build
Predictions by Promoting Concepts in the Vocabulary Space", EMNLP 2022, which leaves out the normalisation.

Shapes: H hidden size, V vocabulary, T tokens of the output layer's input.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from negcore.errors import ModelError, NegError
from negcore.model.language_model import LanguageModel
from negcore.model.placement import with_weights

_ROWS = 2**14
"""Rows of the unembedding that are taken as float32 at once."""


class TokenWrite(NamedTuple):
    """A token, and its logit where the normalised row is all that the output layer reads, without its bias."""

    token: str
    logit: float


@dataclass(frozen=True)
class LensTokens:
    """The tokens that a neuron's row promotes and suppresses; where its output is negative they change places."""

    promoted: list[TokenWrite]
    """Largest logit first."""
    suppressed: list[TokenWrite]
    """Smallest logit first."""


def logit_lens(lm: LanguageModel, layer: int, neuron: int, *, n_tokens: int = 10) -> LensTokens:
    """Return the tokens that a neuron's output row promotes and suppresses most.

    Parameters
    ----------
    lm : LanguageModel
    layer, neuron : int
    n_tokens : int
        Tokens of each list.

    Raises
    ------
    NegError
        If the neuron does not exist.
    ModelError
        If more than a normalisation stands between the last layer and the output layer, as in BERT: then a row is not
        what the output layer reads. Also if it has experts and no row names it: a normalisation may follow these.
    """
    if lm.arch.discovered:
        lm.refuse_experts("logit lenses of a family in no row")
    if not (0 <= layer < lm.n_layers and 0 <= neuron < lm.layer_shapes[layer].n_neurons):
        raise NegError(
            f"neuron {layer}.{neuron} does not exist; {lm.card.name} has layers 0..{lm.n_layers - 1} with neurons "
            f"0..{lm.layer_width - 1}"
        )
    logits_V = _logits(lm, written_row(lm, layer, neuron))[: len(lm.tokenizer)]
    order = logits_V.argsort(descending=True, stable=True).tolist()
    return LensTokens(*([_token(lm, logits_V, at) for at in ids[:n_tokens]] for ids in (order, order[::-1])))


def _token(lm: LanguageModel, logits_V: Tensor, at: int) -> TokenWrite:
    return TokenWrite(lm.tokenizer.decode([at]), float(logits_V[at]))


@torch.no_grad()
def written_row(lm: LanguageModel, layer: int, neuron: int) -> Tensor:
    """Return what a neuron writes to the residual stream, up to a positive factor: shape (H,)."""
    row_H = lm.down_row(layer, neuron)
    norm = lm.arch.post_norm
    return row_H if norm is None else _without_bias(lm.layers[layer].get_submodule(norm), row_H)


@torch.no_grad()
def _logits(lm: LanguageModel, row_H: Tensor) -> Tensor:
    """Return the logits of a row as the last hidden state, without biases: float32, shape (V,)."""
    norm = final_norm(lm)
    state_H = (row_H if norm is None else _without_bias(norm, row_H)).float()
    head = lm.model.get_output_embeddings()
    with with_weights(head):
        weights_VH = head.weight
    state_H = state_H.to(weights_VH.device)
    return torch.cat([weights_RH.float() @ state_H for weights_RH in weights_VH.split(_ROWS)]).cpu()


def _without_bias(norm: nn.Module, row_H: Tensor) -> Tensor:
    """Return a normalised row; a bias would add the same to every neuron."""
    normed: Tensor = norm(row_H[None, None])[0, 0] - norm(torch.zeros_like(row_H)[None, None])[0, 0]
    return normed


@torch.no_grad()
def final_norm(lm: LanguageModel) -> Any:
    """Return the normalisation between the last layer and the output layer, found by a pass of one token, if any.

    Raises
    ------
    ModelError
        If something else stands there.
    """
    head = lm.model.get_output_embeddings()
    within = {module for layer in lm.model.get_submodule(lm.arch.layers) for module in layer.modules()}
    outside = (module for module in lm.model.modules() if module not in within)
    norms = [module for module in outside if "norm" in type(module).__name__.lower()]  # BERT's transform is none
    token = torch.tensor([lm.tokenizer("A", add_special_tokens=False)["input_ids"][:1]], device=lm.device)
    with _traced([lm.last_block, *norms, head]) as traced:
        lm.model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
    read_H, state_H = traced[head].read, traced[lm.last_block].made
    if read_H is not None and _same(read_H, state_H):
        return None
    for norm in norms:
        passed = traced.get(norm)
        if passed and _same(passed.read, state_H) and _same(passed.made, read_H):
            return norm
    raise ModelError(
        f"{lm.card.name} has more than a normalisation between its last layer and its output layer, so the tokens that "
        "a neuron's row writes cannot be read off"
    )


class _Passed(NamedTuple):
    """The last token's vectors before and behind a module; None for what is no vector."""

    read: Tensor | None
    made: Tensor | None


@contextmanager
def _traced(modules: list[nn.Module]) -> Iterator[dict[nn.Module, _Passed]]:
    """Record what passes through modules, inside the block."""
    traced: dict[nn.Module, _Passed] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        traced[module] = _Passed(_last_token(args), _last_token(output))

    hooks: list[Callable[[], None]] = [module.register_forward_hook(note).remove for module in modules]
    try:
        yield traced
    finally:
        for remove in hooks:
            remove()


def _last_token(values: Any) -> Tensor | None:
    first = values[0] if isinstance(values, tuple) and values else values
    is_vector = isinstance(first, Tensor) and first.is_floating_point() and first.ndim > 0
    return first.reshape(-1, first.shape[-1])[-1].clone().cpu() if is_vector else None


def _same(one_H: Tensor | None, other_H: Tensor | None) -> bool:
    return one_H is not None and other_H is not None and torch.equal(one_H, other_H)
