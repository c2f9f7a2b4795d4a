"""Run prompts in batches up to their probed token, so that only the probed token's own path is left to measure.

Causal models: only the last token's own path leads from its activations to its prediction. So every earlier token runs
without a graph into a key/value cache, and the tokens that all prompts begin with run once. The gradient is that of a
full pass, not an approximation. Masked models see both sides of their mask and run whole.

Shapes: B rows of a batch, T tokens, L layers, N neurons a layer, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from negcore.measure.hooks import Readings, tapped
from negcore.measure.memory import BatchLimit
from negcore.measure.passing import passes, recorded, replayed
from negcore.model.experts import Routing
from negcore.model.language_model import LanguageModel, ModelCard
from negcore.model.masks import Layout, laid_out
from negcore.model.past import Filled, KeysValues, PartsCache, PromptTokens
from negcore.model.placement import weights_pass

TOKEN_BUDGET = 8192
"""Most tokens of a batch that runs whole: 16 prompts of 512 tokens."""

LAST_ROWS = 128
"""Most last tokens that run side by side, with their gradients, if no other number is asked for."""

_CACHE_BYTES: Mapping[str, int] = MappingProxyType({"cpu": 2**29, "cuda": 3 * 2**31})
"""Most bytes of the keys and values before them, those of shared tokens not counted, by type of device."""

_OWN_TOKENS: Mapping[str, int] = MappingProxyType({"cpu": 512, "cuda": 8192})
"""Most tokens that run side by side before the last ones, padding included, by type of device.

A processor gains nothing beyond a few hundred, and pays for padding; a GPU needs thousands to be busy.
"""


# Fewer shared tokens are not worth a part of their own.
_LEAST_SHARED = 8


class Prediction(NamedTuple):
    """Result of one forward pass of the probed tokens."""

    logits_BV: Tensor
    activations_BLN: Tensor
    """Before any shift, detached; in layers with fewer neurons than others, zeros behind them."""
    routings: Mapping[int, Routing]
    """Experts of the probed tokens, by layer of experts, detached."""


class ProbedBatch(ABC):
    """Some prompts, run up to their probed tokens.

    Attributes
    ----------
    rows : indices of these prompts in the sequence that was given
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[int]) -> None:
        self.lm, self.rows = lm, list(rows)

    def predict(
        self, shifts: Mapping[int, Tensor] | None = None, shifted: Mapping[int, Routing] | None = None
    ) -> Prediction:
        """Predict from the probed tokens with their neurons shifted.

        Parameters
        ----------
        shifts : mapping of layer to Tensor of shape (B, N), in units of activation, optional
        shifted : mapping of layer to Routing, optional
            Experts whose neurons the shifts are of: see `tapped`.

        Returns
        -------
        Prediction
            With a graph from the shifts to the logits where gradients are enabled.
        """
        routings = self._routings() if shifts and self.lm.has_experts and self.lm.router == "fixed" else None
        with tapped(self.lm, self.positions_B, shifts, routings=routings, shifted=shifted) as activations:
            logits_BV = self._logits()
        stacked = stacked_layers(self.lm, [activations[layer] for layer in range(self.lm.n_layers)], dim=1)
        return Prediction(logits_BV, stacked, activations.probed)

    def _routings(self) -> Mapping[int, Routing]:
        """Return the routing of all tokens that `_logits` runs, without a shift."""
        with torch.no_grad(), tapped(self.lm, self.positions_B) as readings:
            self._logits()
        return readings.routings

    @property
    @abstractmethod
    def positions_B(self) -> Tensor:
        """Index of each row's probed token among the tokens that `_logits` runs."""

    @abstractmethod
    def _logits(self) -> Tensor: ...


def stacked_layers(lm: LanguageModel, by_layer: Sequence[Tensor], dim: int) -> Tensor:
    """Stack values of every layer's active neurons, the last axis; zeros stand for neurons that others have more."""
    widths = (lm.active_width - values.shape[-1] for values in by_layer)
    return torch.stack([pad(one, (0, n)) if n else one for one, n in zip(by_layer, widths, strict=True)], dim)


class CausalBatch(ProbedBatch):
    """Prompts of a causal model; keys and values of everything before their last tokens are kept.

    Slot p holds position p; shorter prompts leave the slots after their own tokens unused. Masks are made from
    positions, so padding never changes a distance, whatever the window of an attention layer.

    Parameters
    ----------
    ids : token ids of every row
    shared : sequence of KeysValues, one a layer
        Of the tokens that all rows begin with, see `run_prefix`.
    """

    def __init__(
        self, lm: LanguageModel, rows: Sequence[int], ids: Sequence[Sequence[int]], shared: Sequence[KeysValues]
    ) -> None:
        super().__init__(lm, rows)
        n_shared = shared[0].keys.shape[2] if shared else 0
        own = [tokens[n_shared:-1] for tokens in ids]
        self._last_B1 = on_device(lm, [[tokens[-1]] for tokens in ids])
        self._lengths_B = on_device(lm, [len(tokens) - 1 for tokens in ids])
        self._tokens = PromptTokens(shared, len(own), max(map(len, own)))
        # Weights that pass are to leave the device again: then a pass runs to its end.
        last_layer = None if weights_pass(lm.model) else lm.card.text_config.num_hidden_layers - 1
        for part in _runs(list(map(len, own)), lm.device.type):
            self._run_own(own, part, last_layer)

    @property
    def positions_B(self) -> Tensor:
        return torch.zeros(len(self.rows), dtype=torch.long, device=self.lm.device)

    def copies(self, tokens: Sequence[int], n_rows: int) -> "CausalBatch":
        """Repeat the one prompt of this batch, whose tokens are given, in rows; only its last token is run again."""
        return CausalBatch(self.lm, range(n_rows), [tokens] * n_rows, self._tokens.joined())

    def repeated(self, count: int) -> "CausalBatch":
        """Return the batch with every row repeated, copies side by side; keys and values are held once."""
        batch = copy(self)
        batch.rows = [row for row in self.rows for _ in range(count)]
        batch._last_B1 = self._last_B1.repeat_interleave(count, 0)
        batch._lengths_B = self._lengths_B.repeat_interleave(count)
        return batch

    def _run_own(self, own: Sequence[Sequence[int]], rows: slice, last_layer: int | None = None) -> None:
        """Run the own tokens of some rows side by side, up to the keys and values of a last layer if one is given."""
        chosen, n_shared = own[rows], self._tokens.n_shared
        n_slots = max(map(len, chosen))
        slots_K = torch.arange(n_shared + n_slots, device=self.lm.device)
        with torch.no_grad(), suppress(Filled):
            self._run(
                self.lm.body,
                on_device(self.lm, [[*tokens, *[0] * (n_slots - len(tokens))] for tokens in chosen]),
                slots_K[n_shared:].expand(len(chosen), -1),
                slots_K < self._lengths_B[rows, None],
                PartsCache(self._tokens, rows, joined=self.lm.joined, last_layer=last_layer),
            )

    def run_last(self, module: nn.Module) -> Any:
        """Run the last tokens, at their positions after the others, through the model or its part without a head."""
        n_slots = self._tokens.n_shared + self._tokens.n_slots
        slots_K = torch.arange(n_slots + 1, device=self.lm.device)
        used_BK = (slots_K < self._lengths_B[:, None]) | (slots_K == n_slots)
        cache = PartsCache(self._tokens, joined=self.lm.joined)
        return self._run(module, self._last_B1, self._lengths_B[:, None], used_BK, cache)

    def run_on(self, module: nn.Module, ids_BT: Tensor, counts_B: Tensor, **options: Any) -> Any:
        """Run several tokens of each row, from its last one on: so many as counted, and padding behind them.

        Options go to the model.
        """
        n_slots = self._tokens.n_shared + self._tokens.n_slots
        steps_T = torch.arange(ids_BT.shape[1], device=self.lm.device)
        is_before_BK = torch.arange(n_slots, device=self.lm.device) < self._lengths_B[:, None]
        used_BK = torch.cat([is_before_BK, steps_T < counts_B[:, None]], dim=1)
        # Padding has positions that the model knows.
        furthest = (self._lengths_B + counts_B - 1).max()
        positions_BT = torch.minimum(self._lengths_B[:, None] + steps_T, furthest)
        cache = PartsCache(self._tokens, joined=self.lm.joined)
        return self._run(module, ids_BT, positions_BT, used_BK, cache, **options)

    def _logits(self) -> Tensor:
        logits: Tensor = self.run_last(self.lm.model).logits[:, -1]
        return logits

    def _run(
        self,
        module: nn.Module,
        ids_BT: Tensor,
        positions_BT: Tensor,
        used_BK: Tensor,
        cache: PartsCache,
        **options: Any,
    ) -> Any:
        """Run tokens in the newest slots; each sees used slots as the model lets it, and itself, padding or not."""
        n_keys, n_queries = used_BK.shape[1], ids_BT.shape[1]
        slots_K = torch.arange(n_keys, device=self.lm.device)
        keys_BK = torch.cat([slots_K[:-n_queries].expand(len(ids_BT), -1), positions_BT], dim=1)
        itself_TK = slots_K == slots_K[-n_queries:, None]
        with laid_out(Layout(positions_BT, keys_BK, used_BK[:, None] | itself_TK)):
            # Masks come from the layout; some models count positions by the tokens that are no padding.
            return module(
                input_ids=ids_BT,
                attention_mask=used_BK.long(),
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                **options,
            )


class PassingBatch(CausalBatch):
    """Prompts of a causal model whose weights pass through its device, see `negcore.measure.passing`.

    All their tokens run at once, the last ones too, and what every block makes of these is kept.
    """

    def __init__(
        self, lm: LanguageModel, rows: Sequence[int], ids: Sequence[Sequence[int]], shared: Sequence[KeysValues]
    ) -> None:
        ProbedBatch.__init__(self, lm, rows)
        n_shared = shared[0].keys.shape[2] if shared else 0
        own = [tokens[n_shared:] for tokens in ids]
        self._last_B1 = on_device(lm, [[tokens[-1]] for tokens in ids])
        # The slots of last tokens, which run again, are seen by none but themselves.
        self._lengths_B = on_device(lm, [len(tokens) - 1 for tokens in ids])
        self._tokens = PromptTokens(shared, len(own), max(map(len, own)))
        with recorded(lm, on_device(lm, [len(tokens) - 1 for tokens in own])) as self._made:
            self._run_own(own, slice(0, len(own)))

    def copies(self, tokens: Sequence[int], n_rows: int) -> CausalBatch:
        """Repeat the one prompt of this batch, whose tokens are given, in rows."""
        return type(self)(self.lm, range(n_rows), [tokens] * n_rows, self._tokens.shared)

    def repeated(self, count: int) -> "PassingBatch":
        """Return the batch with every row repeated, copies side by side; keys and values are held once."""
        batch = super().repeated(count)
        assert isinstance(batch, PassingBatch)
        batch._made = {block: values.repeat_interleave(count, 0) for block, values in self._made.items()}
        return batch

    @contextmanager
    def with_graph(self, shifts: dict[int, Tensor]) -> Iterator[tuple[Tensor, Readings]]:
        """Give the logits with a graph from the shifts; readings are there when the gradient was taken, inside."""
        with replayed(self.lm, self._made, shifts), tapped(self.lm, self.positions_B, shifts) as readings:
            yield self._logits(), readings


def causal_batch(
    lm: LanguageModel, rows: Sequence[int], ids: Sequence[Sequence[int]], shared: Sequence[KeysValues]
) -> CausalBatch:
    """Run prompts of a causal model up to their last tokens, as its weights are placed."""
    return (PassingBatch if passes(lm) else CausalBatch)(lm, rows, ids, shared)


class WholeBatch(ProbedBatch):
    """Whole prompts, padded at their ends, where the probed token of a causal model does not see the padding."""

    def __init__(self, lm: LanguageModel, rows: Sequence[int], ids: Sequence[Sequence[int]]) -> None:
        super().__init__(lm, rows)
        # Any will do where there is none, as no token sees it.
        filler = (lm.tokenizer.pad_token_id if lm.arch.masked else None) or 0
        longest = max(map(len, ids))
        padded_BT = torch.tensor([[*tokens, *[filler] * (longest - len(tokens))] for tokens in ids])
        lengths_B = torch.tensor([len(tokens) for tokens in ids])
        self._ids_BT = padded_BT.to(lm.device)
        self._used_BT = (torch.arange(longest) < lengths_B[:, None]).long().to(lm.device)
        self._positions_B = torch.tensor([probed_position(lm, tokens) for tokens in ids], device=lm.device)

    @property
    def positions_B(self) -> Tensor:
        return self._positions_B

    def _logits(self) -> Tensor:
        options = {"attention_mask": self._used_BT} if self.lm.arch.masked else {"use_cache": False}
        output = self.lm.model(input_ids=self._ids_BT, **options)
        logits: Tensor = output.logits[torch.arange(len(self.rows)), self._positions_B]
        return logits


def probed_batches(
    lm: LanguageModel,
    ids: Sequence[Sequence[int]],
    *,
    batch_size: int | None = None,
    max_rows: int | None = None,
    n_shared: int | None = None,
) -> Iterator[ProbedBatch]:
    """Run prompts up to their probed tokens, in batches of similar length.

    Parameters
    ----------
    ids : token ids of every prompt
    batch_size : int, optional
        Prompts whose probed tokens run side by side; by default as many as `largest_batch` says.
    max_rows : int, optional
        Most prompts of a batch of default size, for callers whose own memory grows with rows.
    n_shared : int, optional
        Tokens that all prompts begin with, which run once; by default as many as these prompts do.
    """
    n_shared = common_prefix_length(ids) if n_shared is None else n_shared
    n_shared = n_shared if n_shared >= _LEAST_SHARED else 0
    if lm.way == "whole":
        for rows in _by_length(lm, ids, 0, batch_size, max_rows):
            yield WholeBatch(lm, rows, [ids[row] for row in rows])
        return
    shared = shared_tokens(lm, ids[0], n_shared)
    for rows in _by_length(lm, ids, n_shared, batch_size, max_rows):
        yield causal_batch(lm, rows, [ids[row] for row in rows], shared)


def largest_batch(card: ModelCard, itemsize: int, device: str, n_tokens: int, *, whole: bool) -> int:
    """Return how many prompts a batch holds by default.

    Parameters
    ----------
    itemsize : int
        Bytes of a number of the model.
    device : str
        Type of the model's device.
    n_tokens : int
        Own tokens of the longest prompt; where prompts run whole, all of its tokens.
    whole : bool
        True if prompts run whole: a graph then leads through all of their tokens.
    """
    if whole:
        return max(1, TOKEN_BUDGET // n_tokens)
    budget = _CACHE_BYTES.get(device, _CACHE_BYTES["cuda"])
    return max(1, min(LAST_ROWS, budget // max(1, n_tokens * card.cached_numbers * itemsize)))


def own_tokens(device: str) -> int:
    """Return how many tokens run side by side before the last ones, at most and padded, on a type of device."""
    return _OWN_TOKENS.get(device, _OWN_TOKENS["cuda"])


def copies(prompt: ProbedBatch, tokens: Sequence[int], n_rows: int) -> ProbedBatch:
    """Repeat the one prompt of a batch in rows; a causal model does not run the tokens before the probed one again."""
    if isinstance(prompt, CausalBatch):
        return prompt.copies(tokens, n_rows)
    return WholeBatch(prompt.lm, range(n_rows), [tokens] * n_rows)


def measure_batches(
    lm: LanguageModel,
    ids: Sequence[Sequence[int]],
    measure: Callable[[ProbedBatch, list[int]], None],
    limit: BatchLimit,
    *,
    batch_size: int | None = None,
    max_rows: int,
    n_shared: int | None = None,
) -> None:
    """Run prompts as `probed_batches` does and measure each batch; batches are halved where memory runs out.

    Parameters
    ----------
    measure : callable
        Takes a batch and the indices of its prompts in `ids`.
    """

    def work(todo: list[int], size: int) -> Iterator[list[int]]:
        sizes = {"batch_size": size} if batch_size else {"max_rows": size}
        for batch in probed_batches(lm, [ids[row] for row in todo], n_shared=n_shared, **sizes):
            rows = [todo[index] for index in batch.rows]
            measure(batch, rows)
            yield rows

    limit.run(len(ids), batch_size or max_rows, work)


def probed_position(lm: LanguageModel, tokens: Sequence[int]) -> int:
    """Return the index of a whole prompt's probed token: its mask, or its last token."""
    return tokens.index(lm.tokenizer.mask_token_id) if lm.arch.masked else len(tokens) - 1


def common_prefix_length(ids: Sequence[Sequence[int] | NDArray[Any]]) -> int:
    """Count the token ids that all prompts begin with, leaving each at least its last token."""
    shortest = min(map(len, ids)) - 1
    first, last = min(map(list, ids)), max(map(list, ids))  # in lexicographic order these two differ first
    return next((n for n in range(shortest) if first[n] != last[n]), shortest)


def label_probabilities(logits_BV: Tensor, label_ids_BO: Tensor) -> Tensor:
    """Return the probability of each label, softmax over the whole vocabulary: shape (B, O), at least float32."""
    return label_log_probabilities(logits_BV, label_ids_BO).exp()


def label_log_probabilities(logits_BV: Tensor, label_ids_BO: Tensor) -> Tensor:
    """Return the logarithms of `label_probabilities`."""
    logits = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    return logits.gather(1, label_ids_BO) - logits.logsumexp(1, keepdim=True)


def _by_length(
    lm: LanguageModel,
    ids: Sequence[Sequence[int]],
    n_shared: int,
    batch_size: int | None,
    max_rows: int | None,
) -> list[list[int]]:
    lengths = [len(tokens) - n_shared for tokens in ids]
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    of_length = partial(largest_batch, lm.card, lm.model.dtype.itemsize, lm.device.type, whole=lm.way == "whole")
    groups: list[list[int]] = []
    for row in order:  # ascending, so the newest row is the longest of its group
        limit = batch_size or min(of_length(lengths[row]), max_rows or len(order))
        if not groups or len(groups[-1]) >= limit:
            groups.append([])
        groups[-1].append(row)
    return groups


def shared_tokens(lm: LanguageModel, tokens: Sequence[int], n_shared: int) -> list[KeysValues]:
    """Return keys and values of the first tokens of a prompt, made now or earlier; none where these are too few."""
    prefix = tokens[: n_shared if n_shared >= _LEAST_SHARED else 0]
    make = partial(run_prefix, lm, prefix)
    # A model of a half type may compute in float32 for a while, see `in_float32`: its embeddings tell.
    dtype = lm.model.get_input_embeddings().weight.dtype
    return make() if lm.prefixes is None else lm.prefixes.get(dtype, prefix, make)


def run_prefix(lm: LanguageModel, tokens: Sequence[int]) -> list[KeysValues]:
    """Return the keys and values, layer by layer, of the tokens that prompts begin with; there may be none."""
    if not tokens:
        return []
    cache = DynamicCache()
    with torch.no_grad():
        lm.body(input_ids=on_device(lm, [list(tokens)]), past_key_values=cache, use_cache=True)
    return [KeysValues(layer.keys, layer.values) for layer in cache.layers]


def on_device(lm: LanguageModel, numbers: Any) -> Tensor:
    """Return numbers as a tensor on the model's device; a GPU gets them without waiting for what it is doing."""
    tensor = torch.as_tensor(numbers)
    return tensor.pin_memory().to(lm.device, non_blocking=True) if lm.device.type == "cuda" else tensor.to(lm.device)


def _runs(lengths: Sequence[int], device: str) -> Iterator[slice]:
    """Part rows into those whose own tokens run side by side: as many as fit in the device's budget, padded."""
    start, budget = 0, own_tokens(device)
    while start < len(lengths):
        stop = start + 1
        while stop < len(lengths) and (stop + 1 - start) * max(lengths[start : stop + 1]) <= budget:
            stop += 1
        if any(lengths[start:stop]):
            yield slice(start, stop)
        start = stop
