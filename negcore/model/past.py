"""Keys and values of the tokens before the newest ones, kept in parts, so that no row holds what all rows share.

The cache gives a layer's attention its newest keys and values alone; the older ones come along in two parts. The first
belongs to the tokens that all prompts begin with and is held once; the second to each prompt's own tokens.

Shapes: B rows of a batch, G key/value heads, P shared tokens, S slots for own tokens, T newest tokens, D head width.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

_MOST_PREFIXES = 4


class KeysValues(NamedTuple):
    """Keys and values of some tokens in one layer."""

    keys: Tensor
    values: Tensor

    def joined(self, later: "KeysValues") -> "KeysValues":
        """Return these tokens and then later ones, whose rows may be several for each row of these."""
        copies = len(later.keys) // len(self.keys)
        return KeysValues(
            *(
                torch.cat([early.repeat_interleave(copies, 0) if copies > 1 else early, late], dim=2)
                for early, late in zip(self, later, strict=True)
            )
        )


class Past(NamedTuple):
    """Keys and values of the tokens before the newest ones, in one layer; a part without tokens is None."""

    shared: KeysValues | None
    """(1, G, P, D)."""
    own: KeysValues | None
    """(B, G, S, D). A prompt that is shorter than others leaves the slots behind its own tokens unused."""

    def joined(self, newest: KeysValues) -> KeysValues:
        """Return all tokens, the newest last."""
        for part in (self.own, self.shared):
            newest = part.joined(newest) if part is not None else newest
        return newest


def past_of(keys: Tensor) -> Past | None:
    """Return what comes before the keys that a `PartsCache` gave to an attention; None for those of whole prompts."""
    return getattr(keys, "past", None)


class PromptTokens:
    """Keys and values of some prompts' tokens but their last, in every layer.

    Parameters
    ----------
    shared : sequence of KeysValues, one a layer, shape (1, G, P, D)
        Empty if the prompts share no token.
    n_rows, n_slots : int
        Prompts, and the most own tokens that one has before its last.
    """

    def __init__(self, shared: Sequence[KeysValues], n_rows: int, n_slots: int) -> None:
        self.shared, self.own = shared, list[KeysValues]()
        self.n_shared = shared[0].keys.shape[2] if shared else 0
        self._n_rows, self.n_slots = n_rows, n_slots

    def write(self, layer: int, rows: slice, newest: KeysValues) -> None:
        """Keep keys and values of some rows' own tokens, shape (rows, G, T, D)."""
        if layer == len(self.own):
            # Zeros, as a slot that is not used must hold a number all the same.
            self.own.append(KeysValues(*(self._slots(one) for one in newest)))
        for slots, one in zip(self.own[layer], newest, strict=True):
            _wide(slots)[rows, :, : one.shape[2]] = _wide(one)

    def _slots(self, like: Tensor) -> Tensor:
        return like.new_zeros(self._n_rows, like.shape[1], self.n_slots, like.shape[3])

    def part(self, layer: int, parts: Sequence[KeysValues]) -> KeysValues | None:
        return parts[layer] if layer < len(parts) else None

    def joined(self) -> list[KeysValues]:
        """Return the tokens of all layers with those that are shared in every row."""
        if not self.own:
            return list(self.shared)
        return [Past(self.part(layer, self.shared), None).joined(own) for layer, own in enumerate(self.own)]


def _wide(tensor: Tensor) -> Tensor:
    """View numbers in eights of bytes where they lie so: a GPU copies as many of those in a second as of small ones."""
    ratio = 8 // tensor.itemsize
    places = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return tensor.view(torch.int64) if tensor.stride(-1) == 1 and not any(n % ratio for n in places) else tensor


class Prefixes:
    """Keys and values of what prompts began with lately, of a model that nobody changes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[torch.dtype, tuple[int, ...]], list[KeysValues]] = OrderedDict()

    def get(self, dtype: torch.dtype, tokens: Sequence[int], make: Callable[[], list[KeysValues]]) -> list[KeysValues]:
        """Return the keys and values of some tokens in a number type, made now or earlier.

        The least recently used are dropped.
        """
        kept, key = self._kept, (dtype, tuple(tokens))
        if key not in kept:
            kept[key] = make()
        kept.move_to_end(key)
        if len(kept) > _MOST_PREFIXES:
            kept.popitem(last=False)
        return kept[key]


class Filled(Exception):  # noqa: N818
    """Ends a pass: the keys and values of its last layer are there."""


class PartsCache(DynamicCache):  # type: ignore[misc]
    """Cache of one pass, as a model of transformers knows it.

    Parameters
    ----------
    tokens : PromptTokens
        What comes before the newest tokens.
    rows : slice, optional
        Rows for whose own tokens the newest are kept; without it, they come behind the own tokens of all rows.
    joined : bool
        Give the model all keys and values at once, for code that works on them before its attention does.
    last_layer : int, optional
        Layer whose keys and values are the last that a pass is run for: it ends there, with `Filled`.
    """

    def __init__(
        self, tokens: PromptTokens, rows: slice | None = None, *, joined: bool = False, last_layer: int | None = None
    ) -> None:
        super().__init__()
        self._tokens, self._rows, self._joined, self._last_layer = tokens, rows, joined, last_layer
        self._newest: dict[int, KeysValues] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the newest keys and values, the keys with a note of what comes before them; or all, joined."""
        tokens, newest, past = self._tokens, KeysValues(key_states, value_states), self._past(layer_idx)
        if self._rows is not None:
            tokens.write(layer_idx, self._rows, newest)
        if layer_idx == self._last_layer:
            raise Filled
        self._newest[layer_idx] = newest
        if self._joined:
            return past.joined(newest)
        newest.keys.past = past  # type: ignore[attr-defined]
        return newest

    def _past(self, layer: int) -> Past:
        tokens = self._tokens
        own = tokens.part(layer, tokens.own) if self._rows is None else None
        return Past(tokens.part(layer, tokens.shared), own)

    def grown(self) -> list[KeysValues]:
        """Return all tokens after a pass, the newest too, as those that a next pass shares."""
        return [self._past(layer).joined(newest) for layer, newest in sorted(self._newest.items())]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of slots before the newest tokens."""
        return self._tokens.n_shared + (self._tokens.n_slots if self._rows is None else 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys of a pass, and that none is left out before them."""
        return self.get_seq_length() + query_length, 0
