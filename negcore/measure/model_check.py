"""Check a loaded model on one prompt before it measures anything: each fast path against a slow, obvious twin.

Nothing is assumed of the tokenizer's language: prompts are token ids, drawn at random but always the same for a model.

Shapes: B rows of a batch, T tokens, O options (labels), L layers, N neurons a layer, C compared tokens of the
vocabulary, R shifted rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from negcore.errors import ModelError, NegError, first_line
from negcore.measure.forward import (
    CausalBatch,
    ProbedBatch,
    WholeBatch,
    causal_batch,
    label_probabilities,
    probed_position,
    run_prefix,
    stacked_layers,
)
from negcore.measure.hooks import hook_site, zero_shifts
from negcore.measure.memory import BatchLimit
from negcore.measure.neurgrad import label_gradients
from negcore.measure.passing import passes, recomputed
from negcore.measure.plain_experts import PlainExperts
from negcore.measure.virtual_tokens import HookedPrompt, Shifts, VirtualPrompt
from negcore.model.attention import ATTENTION_NAME
from negcore.model.check import COMPARED, TOLERANCES, Compared, Comparison, ModelCheck
from negcore.model.experts import EXPERTS_NAME
from negcore.model.language_model import LanguageModel
from negcore.model.precision import in_float32
from negcore.model.quantised import storage_note

_TOKENS = 12
# Longest prompt that is made in order to reach beyond a sliding window, and by how much it does.
_MOST_TOKENS, _BEYOND = 96, 8
_LABELS = 2


def check_model(lm: LanguageModel) -> ModelCheck:
    """Compare each way to measure a model with a plain twin, on two prompts of random tokens.

    Parameters
    ----------
    lm : LanguageModel

    Returns
    -------
    ModelCheck
        One comparison each of last-token logits with the untouched model, NeurGrad with plain autograd, a batch of two
        prompts with one, a shared prefix with none, and virtual tokens with hooks. A way that ends in an error failed.

    Raises
    ------
    ModelError
        If the model's attention looks ahead, or a masked model's tokenizer has no mask token.
    RuntimeError
        If memory does not suffice (for CUDA, `torch.OutOfMemoryError`).
    """
    if lm.arch.masked and lm.tokenizer.mask_token_id is None:
        raise ModelError(f"model {lm.card.name!r}: it predicts masks, and its tokenizer has no mask token")
    trial = _Trial(lm)
    comparisons = tuple(_compare(trial, name) for name in COMPARED)
    runs = comparisons[0].difference is not None
    return ModelCheck(comparisons, tuple(_notes(trial)) if runs else ())


class _Gradients(NamedTuple):
    grads_OLN: Tensor
    activations_LN: Tensor
    probs_O: Tensor


class _Plain:
    """One prompt in the untouched model: whole, without a cache, and one backward pass for each label."""

    def __init__(self, lm: LanguageModel, tokens: Sequence[int], compared_C: Tensor) -> None:
        self._lm, self._position = lm, probed_position(lm, tokens)
        self._ids_1T = torch.tensor([list(tokens)], device=lm.device)
        with torch.no_grad(), _untouched(lm):
            logits_V = self._logits()
        # Probabilities are finite only if all logits are, but for those that rule a token out.
        self.logits_C = logits_V[compared_C] + 0 * logits_V.logsumexp(0)
        self.label_ids_O = compared_C[_telling_labels(self.logits_C)]

    def _logits(self) -> Tensor:
        # A block that runs again would add its keys to a cache once more.
        options = {"use_cache": False} if passes(self._lm) and not self._lm.arch.masked else {}
        logits: Tensor = self._lm.model(input_ids=self._ids_1T, **options).logits[0, self._position]
        return logits

    @cached_property
    def gradients(self) -> _Gradients:
        lm, activations = self._lm, dict[int, Tensor]()
        leaves: dict[int, Tensor] = {}

        def add_leaf(layer: int, values: Tensor) -> Tensor:
            activations[layer] = values.detach()
            leaves.setdefault(layer, torch.zeros_like(values, requires_grad=True))
            return values + leaves[layer]

        experts = PlainExperts(lm)
        with torch.enable_grad(), _untouched(lm), recomputed(lm), ExitStack() as hooks:
            hooks.enter_context(experts.attached())
            for layer, shape in enumerate(lm.layer_shapes):
                if shape.n_dense:
                    hooks.callback(hook_site(lm, layer, partial(add_leaf, layer)).remove)
            logits_1V = self._logits()[None]
            probs_O = label_probabilities(logits_1V, self.label_ids_O[None])[0]
            parts = [
                _Part(layer, one.leaf_RU, one.values_RU[one.row], one.row)
                for layer in range(lm.n_layers)
                for one in experts.probed(layer, self._position)
            ]
            parts += [_Part(layer, leaf, self._probed(activations[layer], layer)) for layer, leaf in leaves.items()]
            grads_OLN = []
            for prob in probs_O:
                grads = torch.autograd.grad(prob, [part.leaf for part in parts], retain_graph=True)
                probed = [
                    grad[part.row] if part.row is not None else self._probed(grad, part.layer)
                    for part, grad in zip(parts, grads, strict=True)
                ]
                grads_OLN.append(self._by_layer(parts, probed))
        activations_LN = self._by_layer(parts, [part.values_U for part in parts])
        return _Gradients(torch.stack(grads_OLN), activations_LN, probs_O.detach())

    def _by_layer(self, parts: "Sequence[_Part]", values: Sequence[Tensor]) -> Tensor:
        """Return the values of the neurons of all layers: shape (L, N)."""
        by_layer: dict[int, list[Tensor]] = {}
        for part, values_U in zip(parts, values, strict=True):
            by_layer.setdefault(part.layer, []).append(values_U)
        return stacked_layers(self._lm, [torch.cat(by_layer[layer]) for layer in range(self._lm.n_layers)], dim=0)

    def _probed(self, values: Tensor, layer: int) -> Tensor:
        """Return the site of a layer's dense neurons at the probed token: shape (N,)."""
        return values.reshape(-1, values.shape[-1])[self._position, -self._lm.layer_shapes[layer].n_dense :]


class _Part(NamedTuple):
    """Neurons of one layer that have a leaf of their own: those of an expert, or the dense ones."""

    layer: int
    leaf: Tensor
    values_U: Tensor
    row: int | None = None
    """Place of the probed token in the leaf, for an expert."""


class _Trial:
    """Two prompts of random tokens, and what several comparisons need of them."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        ordinary = _ordinary_ids(lm)
        self.ids, self.n_prefix = _prompts(lm, ordinary)
        # Only these: some models give the placeholders of images no logit at all.
        self.compared_C = torch.tensor(ordinary, device=lm.device)

    @cached_property
    def plain(self) -> _Plain:
        """The first prompt, in the untouched model."""
        return _Plain(self.lm, self.ids[0], self.compared_C)

    @cached_property
    def alone(self) -> ProbedBatch:
        """The first prompt."""
        return self.batch([0])

    @cached_property
    def alone_logits_BC(self) -> Tensor:
        """Logits of the prompts one by one."""
        return torch.cat([self._logits(self.alone), self._logits(self.batch([1]))])

    @cached_property
    def together_logits_BC(self) -> Tensor:
        """Logits of both prompts side by side."""
        return self._logits(self.batch([0, 1]))

    @cached_property
    def shared_logits_BC(self) -> Tensor:
        """Logits of both prompts after the tokens they share."""
        return self._logits(self.batch([0, 1], self.n_prefix))

    def batch(self, rows: Sequence[int], n_prefix: int = 0) -> ProbedBatch:
        """Run some of the prompts up to their probed tokens, with or without a cache of the tokens they share."""
        ids = [self.ids[row] for row in rows]
        if self.lm.way == "whole":
            return WholeBatch(self.lm, rows, ids)
        return causal_batch(self.lm, rows, ids, run_prefix(self.lm, ids[0][:n_prefix]))

    def _logits(self, batch: ProbedBatch) -> Tensor:
        with torch.no_grad():
            return batch.predict().logits_BV[:, self.compared_C]


def _compare(trial: _Trial, name: Compared) -> Comparison:
    tolerance = TOLERANCES[trial.lm.dtype][name]
    absent = _absent(trial.lm, name)
    if absent:
        return Comparison(name, tolerance, note=absent, applies=False)
    try:
        difference = _DIFFERENCES[name](trial)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except ModelError as error:  # such a model cannot be measured in any way
        raise ModelError(f"model {trial.lm.card.name!r}: {error}") from error
    except Exception as error:  # an unknown model can fail in any way, and that is what is asked here
        return Comparison(name, tolerance, note=f"{_reason(error):.200}")
    if not np.isfinite(difference):
        return Comparison(name, tolerance, note="numbers that are not finite")
    return Comparison(name, tolerance, difference)


def _reason(error: Exception) -> str:
    return f"{error}" if isinstance(error, NegError) else first_line(error)


def _absent(lm: LanguageModel, name: Compared) -> str:
    """Tell why a model has no such way, if it has none."""
    if name == "prefix" and lm.way == "whole" or name == "virtual" and lm.way != "virtual":
        way = "runs whole prompts" if lm.way == "whole" else "runs no virtual tokens"
        return "a masked model sees both sides of its mask" if lm.arch.masked else f"this family {way}"
    return ""


def _logits_differ(trial: _Trial) -> float:
    """Compare both forms of the attention, without a graph and with one, with the model as it came."""
    if passes(trial.lm):  # a graph of the whole model would hold all of its weights
        return _logit_difference(trial.alone_logits_BC[:1], trial.plain.logits_C[None])
    with torch.enable_grad():
        with_graph_1V = trial.alone.predict(zero_shifts(trial.lm, 1)).logits_BV.detach()
    logits_FC = torch.cat([trial.alone_logits_BC[:1], with_graph_1V[:, trial.compared_C]])
    return _logit_difference(logits_FC, trial.plain.logits_C.expand(2, -1))


def _neurgrad_differs(trial: _Trial) -> float:
    """Compare gradients and activations layer by layer."""
    fast, plain = label_gradients(trial.alone, trial.plain.label_ids_O[None]), trial.plain.gradients
    by_layer_LON = stacked_layers(trial.lm, [grad_OBN[:, 0] for grad_OBN in fast.grads_LOBN], dim=0)
    plain_LON = plain.grads_OLN.transpose(0, 1)
    return max(
        _difference(by_layer_LON - plain_LON, plain_LON),
        _difference(fast.activations_BLN[0] - plain.activations_LN, plain.activations_LN),
    )


def _batch_differs(trial: _Trial) -> float:
    return _logit_difference(trial.together_logits_BC, trial.alone_logits_BC)


def _prefix_differs(trial: _Trial) -> float:
    return _logit_difference(trial.shared_logits_BC, trial.together_logits_BC)


def _virtual_differs(trial: _Trial) -> float:
    """Compare the labels' log-probabilities under shifts, relative to what the shifts change; as sweeps, in float32."""
    label_ids_O = trial.plain.label_ids_O.cpu().numpy()
    limit, shifts = BatchLimit("shifted rows"), _telling_shifts(trial.lm, trial.plain.gradients)
    with in_float32(trial.lm):
        batch = trial.batch([0])
        assert isinstance(batch, CausalBatch)
        virtual_RO = VirtualPrompt(batch, label_ids_O, None, limit).measure(shifts).shifted_RO
        hooked = HookedPrompt(trial.lm, trial.ids[0], label_ids_O, None, limit)
        hooked_RO, unshifted_RO = hooked.measure(shifts)
    return _difference((virtual_RO - hooked_RO)[None], (hooked_RO - unshifted_RO)[None])


def _telling_shifts(lm: LanguageModel, plain: _Gradients) -> Shifts:
    """Shift the strongest neuron up and a middling one down, in the first, the middle and the last layer.

    A shift is so large that the label's log-probability changes by about one, or less where that asks for more than a
    thousand units.
    """
    slopes_LN = (plain.grads_OLN[0] / plain.probs_O[0]).abs().double().cpu()
    rows = []
    for layer in sorted({0, lm.n_layers // 2, lm.n_layers - 1}):
        order_N = slopes_LN[layer, : lm.layer_shapes[layer].n_active].argsort(descending=True, stable=True)
        for neuron, sign in ((int(order_N[0]), 1), (int(order_N[len(order_N) // 2]), -1)):
            rows.append((layer, neuron, sign / max(float(slopes_LN[layer, neuron]), 1e-3)))
    layers, neurons, sizes = zip(*rows, strict=True)
    return Shifts(np.array(layers), np.array(neurons), np.array(sizes))


_DIFFERENCES: Mapping[Compared, Callable[[_Trial], float]] = MappingProxyType(
    {
        "logits": _logits_differ,
        "neurgrad": _neurgrad_differs,
        "batch": _batch_differs,
        "prefix": _prefix_differs,
        "virtual": _virtual_differs,
    }
)


def _difference(errors: Tensor, scale: Tensor) -> float:
    """Return the largest norm of the first-axis entries of some errors, relative to those of a scale.

    An entry that is next to nothing beside the largest is measured by a thousandth of that one's norm.
    """
    errors, scale = (tensor.double().flatten(1).norm(dim=1).cpu() for tensor in (errors, scale))
    return float((errors / scale.clamp(min=scale.max().clamp(min=1e-30) * 1e-3)).max())


def _logit_difference(one_BC: Tensor, other_BC: Tensor) -> float:
    """Compare logits but for a constant, which changes no probability."""
    one_BC, other_BC = (logits.double() - logits.double().mean(1, keepdim=True) for logits in (one_BC, other_BC))
    return _difference(one_BC - other_BC, other_BC)


def _telling_labels(logits_C: Tensor) -> Tensor:
    """Return the places of the most probable tokens; one near certainty is left out, as rounding hides its gradient."""
    order = logits_C.argsort(descending=True, stable=True)[: _LABELS + 1]
    certain = bool(logits_C.float().softmax(0)[order[0]] > 0.5)
    return order[1:] if certain else order[:_LABELS]


@contextmanager
def _untouched(lm: LanguageModel) -> Iterator[None]:
    """Give the model the attention and the experts of transformers' own reference implementation."""
    with ExitStack() as back:
        if lm.takes_attention:
            lm.model.set_attn_implementation("eager")
            back.callback(lm.model.set_attn_implementation, ATTENTION_NAME)
        if lm.has_experts:
            lm.model.set_experts_implementation("eager")
            back.callback(lm.model.set_experts_implementation, EXPERTS_NAME)
        yield


def _ordinary_ids(lm: LanguageModel) -> list[int]:
    """Return the ids of all tokens that stand for text."""
    special = set(lm.tokenizer.all_special_ids) | _named_ids(lm.card.config.to_dict())
    known = min(len(lm.tokenizer), lm.card.vocab_size)
    return [token for token in range(known) if token not in special] or list(range(known))


def _named_ids(settings: Mapping[str, Any]) -> set[int]:
    """Return the ids that a configuration names, such as the placeholder of an image."""
    found: set[int] = set()
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _named_ids(value)
        elif str(key).endswith(("_token_id", "_token_index")):
            found |= {one for one in np.ravel(value).tolist() if isinstance(one, int)}
    return found


def _prompts(lm: LanguageModel, ordinary: Sequence[int]) -> tuple[list[list[int]], int]:
    """Return a long and a short prompt, and the count of tokens that both begin with."""
    random = np.random.default_rng(0)
    tokenizer = lm.tokenizer
    n_long = min(max(_TOKENS, _reach(lm)), lm.card.context_tokens)
    n_short = max(1, n_long * 2 // 3)
    n_prefix = min(n_long * 2 // 5, n_short - 1)
    shared = random.choice(ordinary, n_prefix).tolist()
    prompts = [[*shared, *random.choice(ordinary, length - n_prefix).tolist()] for length in (n_long, n_short)]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    for tokens in prompts:
        if first is not None and first < lm.card.vocab_size and n_prefix:
            tokens[0] = first
        if lm.arch.masked:
            tokens[-2:-1] = [tokenizer.mask_token_id]
    return prompts, n_prefix


def _windows(lm: LanguageModel) -> set[int]:
    config = lm.card.text_config
    names = ("sliding_window", "local_attention", "attention_chunk_size")
    # A stray key in a file is an attribute of the configuration, too, but not of its class.
    sizes: set[Any] = set()
    for name in names:
        with suppress(Exception):  # some configurations raise errors of their own where layers differ
            sizes.add(getattr(config, name) if hasattr(type(config), name) else None)
    return {size for size in sizes if isinstance(size, int) and size > 0}


def _reach(lm: LanguageModel) -> int:
    """Return the tokens of a prompt that is longer than every window but the very long ones."""
    return max((size + _BEYOND for size in _windows(lm) if size + _BEYOND <= _MOST_TOKENS), default=0)


def _notes(trial: _Trial) -> Iterator[str]:
    n_tokens, lm = len(trial.ids[0]), trial.lm
    if lm.arch.discovered:
        yield f"discovered: its type is in no row, and a search found its feed-forward layers ({lm.arch.found})"
    if storage_note(lm.card.config):
        yield (
            f"stored otherwise{storage_note(lm.card.config)}: measured are the numbers that these weights stand for, "
            f"in {lm.dtype}, and nothing else is rounded"
        )
    n_blocks = len(lm.model.get_submodule(lm.arch.layers))
    if lm.n_layers < n_blocks:
        places = ", ".join(map(str, lm.card.places))
        yield f"its layers with neurons, numbered from 0, are layers {places} of {n_blocks}; the others have none"
    for size in sorted(_windows(trial.lm)):
        if size >= n_tokens:
            yield f"the check's prompt of {n_tokens} tokens does not reach beyond the attention window of {size}"
    if trial.lm.dtype == "float64" and _rounds(trial):
        yield "parts of this model round to float32 although it is float64: differences below 1e-7 are noise"


def _rounds(trial: _Trial) -> bool:
    """Tell whether the model turns float64 values into float32 on the way from its neurons to its logits."""
    watch = _RoundingWatch()
    with torch.enable_grad(), watch:
        trial.alone.predict(zero_shifts(trial.lm, 1))
    return watch.n_seen > 0


class _RoundingWatch(TorchFunctionMode):
    """Counts the operations that make float32 of float64 values that depend on a neuron."""

    n_seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            given = (value for value in args if isinstance(value, Tensor))
            self.n_seen += any(value.dtype == torch.float64 and value.requires_grad for value in given)
        return result
