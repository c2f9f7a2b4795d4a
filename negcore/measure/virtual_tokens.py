"""Measure a prompt with single neurons shifted: fast with virtual tokens, or plainly with hooked passes.

Fast path (causal models): a shift at one layer changes neither the layers before it nor earlier tokens. So all shifted
copies of the last token go side by side through one forward pass, as virtual tokens at the same position that see only
the prompt's cache and themselves. A copy joins at the layer of its neuron, where it still equals the unshifted token,
which is row 0 of every pass: what a shift changes is the difference between two rows of one pass.
The cost grows with the number of copies; of the prompt's length, only the attention to it depends.

Shapes: R shifted rows, O options (labels), L layers, N neurons a layer, T tokens, V vocabulary, H hidden width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from negcore.arrays import Floats, Ints
from negcore.errors import ModelError
from negcore.measure.active import active_places, experts_of, held_routings
from negcore.measure.answers import AnswerPrediction, AnswerRow, WholeAnswers, answer_rows, refuse_unfit
from negcore.measure.forward import CausalBatch, probed_batches, probed_position, stacked_layers
from negcore.measure.hooks import Readings, hook_site, tapped
from negcore.measure.memory import BatchLimit
from negcore.model.attention import side_by_side
from negcore.model.encoding import EncodedPrompts
from negcore.model.experts import Routing, Tap, tapped_experts
from negcore.model.language_model import LanguageModel
from negcore.model.placement import running

Method = Literal["auto", "virtual", "hooks"]

# Most virtual tokens of one forward pass.
_VIRTUAL_ROWS = 1024
# Most tokens of one hooked forward pass, in which each row is a whole prompt.
_HOOKED_TOKENS = 2048
# Most bytes of logits that are held at once.
_LOGIT_BYTES = 2**25


class Shifts(NamedTuple):
    """Rows to measure, each with one neuron shifted."""

    layers_R: Ints
    neurons_R: Ints
    """Places of neurons that the prompt has: see `ShiftedPrompt.places_of`."""
    sizes_R: Floats
    """Added to the neuron, in units of activation, sign included."""

    def rows(self, which: Any) -> "Shifts":
        """Return some of the rows."""
        return Shifts(self.layers_R[which], self.neurons_R[which], self.sizes_R[which])


class Measured(NamedTuple):
    """Log-probabilities of the labels in shifted rows, on the CPU: at least float32.

    Passes of different shapes round differently, so a row is compared with the unshifted row of its own pass: a neuron
    that writes nothing changes nothing, exactly. (Where a layer's width is no multiple of 32, PyTorch may compute the
    activation function of the last few numbers of a pass another way on a CPU: then, to its last digit.)
    """

    shifted_RO: Tensor
    """With each row's neuron shifted."""
    unshifted_RO: Tensor
    """Without a shift, in the same pass as the row."""


def label_log_probs(logits_RV: Tensor, label_ids_RO: Tensor) -> Tensor:
    """Return the log-probability of each label, softmax over the whole vocabulary: shape (R, O), at least float32."""
    kind = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32
    # The fused kernel is several times faster than a log-sum-exp, though most of what it writes is thrown away.
    return logits_RV.log_softmax(1, dtype=kind).gather(1, label_ids_RO)


def head_rows(lm: LanguageModel) -> int:
    """Return how many rows of logits are held at once."""
    return max(1, _LOGIT_BYTES // (4 * lm.card.vocab_size))


def head_logits(lm: LanguageModel, output: Any, hidden_RH: Tensor) -> Tensor:
    """Return the logits (R, V) that the model's own code makes of hidden values, whatever it does beside its head.

    Parameters
    ----------
    output : result of a pass of the model without its head, from which the rest is taken
    hidden_RH : Tensor of shape (R, H), normalised as in `output`
    """
    answer = type(output)(**{**output, "last_hidden_state": hidden_RH[None]})
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
    # The whole model runs, but for its body, which answers at once: the part that its head asks, whichever that is.
    with ExitStack() as answering:
        for part in lm.body_parts:
            answering.enter_context(running(part, lambda *_, **__: answer))
        logits: Tensor = lm.model(input_ids=token_11, use_cache=False).logits[0]
    return logits


class ShiftedPrompt(ABC):
    """Prompt whose neurons can be shifted, one neuron a row."""

    activations_LN: Tensor
    """At the probed token, unshifted: shape (L, N); of a mixture of experts, of the neurons that the prompt has."""
    log_probs_O: Tensor
    """Log-probabilities of the labels, unshifted: shape (O,)."""

    def __init__(self, lm: LanguageModel, label_ids_O: Ints, max_rows: int, limit: BatchLimit) -> None:
        self.lm, self.max_rows, self._limit = lm, max_rows, limit
        self.label_ids_O = torch.from_numpy(label_ids_O).to(lm.device)

    def places_of(self, layers_K: Ints, neurons_K: Ints) -> Ints:
        """Return where neurons are among the prompt's own in their layers; -1 for those that it does not have."""
        return neurons_K

    def measure(self, shifts: Shifts) -> Measured:
        """Measure the labels with each row's neuron shifted, and without."""
        order = np.argsort(shifts.layers_R, kind="stable")
        with torch.no_grad():
            passes = self._limit.compute(
                len(order), self.max_rows, lambda rows: self._measure(shifts.rows(order[rows]))
            )
        back = np.argsort(order)
        return Measured(*(torch.cat(parts)[back] for parts in zip(*passes, strict=True)))

    def _log_probs(self, logits_RV: Tensor) -> Tensor:
        return label_log_probs(logits_RV, self.label_ids_O.expand(len(logits_RV), -1))

    def _compared(self, logits_RV: Tensor) -> Measured:
        """Compare the rows of logits with the first of them, which is unshifted."""
        log_probs_RO = self._log_probs(logits_RV).cpu()
        return Measured(log_probs_RO[1:], log_probs_RO[:1].expand(len(log_probs_RO) - 1, -1))

    @abstractmethod
    def _measure(self, shifts: Shifts) -> Measured:
        """Measure at most `max_rows` rows, which are in the order of their layers, beside an unshifted one."""


class VirtualPrompt(ShiftedPrompt):
    """Fast path: rows are virtual tokens after the prompt's cache."""

    def __init__(self, batch: CausalBatch, label_ids_O: Ints, max_rows: int | None, limit: BatchLimit) -> None:
        super().__init__(batch.lm, label_ids_O, max_rows or _VIRTUAL_ROWS, limit)
        assert len(batch.rows) == 1
        self._batch = batch
        with torch.no_grad():
            predicted = batch.predict()
        self.activations_LN = predicted.activations_BLN[0]
        self.log_probs_O = self._log_probs(predicted.logits_BV)[0]
        self._experts = experts_of(predicted.routings)

    def places_of(self, layers_K: Ints, neurons_K: Ints) -> Ints:
        places_1K = active_places(self.lm, self._experts, layers_K, neurons_K)
        return np.asarray(places_1K[0])

    def _measure(self, shifts: Shifts) -> Measured:
        with _joining(self.lm, shifts), side_by_side():
            output = self._batch.run_last(self.lm.body)
        hidden_RH = output.last_hidden_state.reshape(-1, output.last_hidden_state.shape[-1])
        parts = hidden_RH[1:].split(head_rows(self.lm))
        passes = [self._compared(head_logits(self.lm, output, torch.cat([hidden_RH[:1], part]))) for part in parts]
        return Measured(*map(torch.cat, zip(*passes, strict=True)))


class HookedPrompt(ShiftedPrompt):
    """Plain path, for every model: each row runs the whole prompt, without any cache."""

    def __init__(
        self, lm: LanguageModel, tokens: Sequence[int], label_ids_O: Ints, max_rows: int | None, limit: BatchLimit
    ) -> None:
        super().__init__(lm, label_ids_O, max_rows or max(1, _HOOKED_TOKENS // len(tokens) - 1), limit)
        self._tokens_T = torch.tensor(tokens, device=lm.device)
        self._position = probed_position(lm, tokens)
        with torch.no_grad():
            logits_1V, self._unshifted = self._run(1, {})
            self.log_probs_O = self._log_probs(logits_1V)[0]
        self.activations_LN = stacked_layers(lm, [self._unshifted[layer][0] for layer in range(lm.n_layers)], dim=0)

    def places_of(self, layers_K: Ints, neurons_K: Ints) -> Ints:
        places_1K = active_places(self.lm, experts_of(self._unshifted.probed), layers_K, neurons_K)
        return np.asarray(places_1K[0])

    def _measure(self, shifts: Shifts) -> Measured:
        return self._compared(self._run(1 + len(shifts.layers_R), _steps(self.lm, shifts))[0])

    def _run(self, n_rows: int, steps_LRN: dict[int, Tensor]) -> tuple[Tensor, Readings]:
        """Run the prompt in several rows: logits (R, V) at the probed token, and activations by layer."""
        positions_R = torch.full((n_rows,), self._position, device=self.lm.device)
        routings = held_routings(self.lm, self._unshifted, n_rows) if steps_LRN else None
        with tapped(self.lm, positions_R, steps_LRN, routings=routings) as activations:
            output = self.lm.model(input_ids=self._tokens_T.expand(n_rows, -1))
        return output.logits[:, self._position], activations


class HookedAnswers(ShiftedPrompt):
    """Plain path for a probed token before the prompt's end, and answers of several tokens: rows run whole."""

    def __init__(
        self, lm: LanguageModel, prompts: EncodedPrompts, index: int, max_rows: int | None, limit: BatchLimit
    ) -> None:
        refuse_unfit(lm)
        self._rows_O = answer_rows(prompts, index)
        longest, n_predicted = max(len(r.tokens) for r in self._rows_O), max(len(r.answer) for r in self._rows_O)
        most = min(_HOOKED_TOKENS // longest, head_rows(lm) // n_predicted)
        super().__init__(lm, prompts.label_ids_PO[index], max_rows or max(1, most - 1), limit)
        with torch.no_grad():
            predicted = [self._run(row, 1) for row in self._rows_O]
        self.log_probs_O = torch.cat([one.log_probs_R for one in predicted])
        self.activations_LN = predicted[0].activations_RLN[0]

    def shifted(self, steps_LRN: Mapping[int, Tensor], n_rows: int) -> Tensor:
        """Return the log-probabilities of the options in rows with any neurons shifted: shape (R, O)."""
        return torch.stack([self._run(row, n_rows, steps_LRN).log_probs_R for row in self._rows_O], dim=1)

    def _measure(self, shifts: Shifts) -> Measured:
        n_rows = 1 + len(shifts.layers_R)
        log_probs_RO = self.shifted(_steps(self.lm, shifts), n_rows).cpu()
        return Measured(log_probs_RO[1:], log_probs_RO[:1].expand(n_rows - 1, -1))

    def _run(self, row: AnswerRow, n_rows: int, steps_LRN: Mapping[int, Tensor] | None = None) -> AnswerPrediction:
        return WholeAnswers(self.lm, [[row]] * n_rows).predict(steps_LRN)


def _steps(lm: LanguageModel, shifts: Shifts) -> dict[int, Tensor]:
    """Return shifts as they are added to each layer, (R, N), below a row without any."""
    steps_LRN = {}
    for layer in np.unique(shifts.layers_R).tolist():
        chosen = np.flatnonzero(shifts.layers_R == layer)
        steps_RN = np.zeros((1 + len(shifts.layers_R), lm.layer_shapes[layer].n_active), lm.result_type)
        steps_RN[1 + chosen, shifts.neurons_R[chosen]] = shifts.sizes_R[chosen]
        steps_LRN[layer] = torch.from_numpy(steps_RN).to(lm.device)
    return steps_LRN


def shifted_prompts(
    lm: LanguageModel,
    prompts: EncodedPrompts,
    *,
    method: Method = "auto",
    max_rows: int | None = None,
) -> Iterator[tuple[int, ShiftedPrompt]]:
    """Prepare prompts for shifts, one at a time; tokens that all prompts begin with run once.

    Parameters
    ----------
    prompts : EncodedPrompts
    method : {"auto", "virtual", "hooks"}
        `auto` uses virtual tokens where the family's row says that they are right and the check at load agrees, and
        the answer is one token behind the probed one.
    max_rows : int, optional
        Most shifted rows of one forward pass, beside its unshifted one; halved where memory runs out.

    Yields
    ------
    int, ShiftedPrompt
        Index of the prompt, in no particular order, and the prompt.

    Raises
    ------
    ModelError
        If the method is unknown, or virtual tokens are asked of a model that has none or whose check they failed.
    """
    if method not in ("auto", "virtual", "hooks"):
        raise ModelError(f"method {method!r} is not known; choose one of auto, virtual, hooks")
    if method == "virtual" and lm.arch.masked:
        raise ModelError(f"method 'virtual' needs a causal model and {lm.card.name} is masked; choose auto or hooks")
    if method == "virtual" and lm.way != "virtual":
        lm.require("virtual")
        family = lm.card.config.model_type
        raise ModelError(
            f"method 'virtual' is not right for {lm.card.name}, a {family} on the way {lm.way!r}; choose auto or hooks"
        )
    limit = BatchLimit("shifted rows")
    if not prompts.is_usual:
        if method == "virtual":
            raise ModelError(
                "method 'virtual' is for one token behind the probed one, a prompt's last; for probe_at and answers of "
                "several tokens choose auto or hooks"
            )
        for index in range(len(prompts.ids)):
            yield index, HookedAnswers(lm, prompts, index, max_rows, limit)
        return
    if method == "hooks" or lm.way != "virtual":
        for index, (tokens, label_ids_O) in enumerate(zip(prompts.ids, prompts.label_ids_PO, strict=True)):
            yield index, HookedPrompt(lm, tokens, label_ids_O, max_rows, limit)
        return
    for batch in probed_batches(lm, prompts.ids, batch_size=1):
        assert isinstance(batch, CausalBatch)
        (index,) = batch.rows
        yield index, VirtualPrompt(batch, prompts.label_ids_PO[index], max_rows, limit)


@contextmanager
def _joining(lm: LanguageModel, shifts: Shifts) -> Iterator[None]:
    """Let each row join the unshifted token, which stays row 0, at the layer where the row is shifted."""
    joinings = {}
    for layer in np.unique(shifts.layers_R).tolist():
        first_row = 1 + int(np.searchsorted(shifts.layers_R, layer))
        joinings[layer] = _Joining(lm, layer, first_row, shifts.rows(shifts.layers_R == layer))
    with ExitStack() as hooks:
        for joining in joinings.values():
            for handle in joining.attach():
                hooks.callback(handle.remove)
        hooks.enter_context(tapped_experts(_taps(lm, joinings)))
        yield


def _taps(lm: LanguageModel, joinings: Mapping[int, "_Joining"]) -> dict[nn.Module, Tap]:
    """Return the part of rows at the experts of every layer."""

    def route(routing: Routing) -> Routing:
        """Let all rows go where the unshifted one does, if the router is not to see shifts."""
        return routing if lm.router == "through" else Routing(*(one[:1].expand_as(one) for one in routing))

    modules = ((layer, lm.experts(layer)) for layer in range(lm.n_layers))
    return {
        module: Tap(lm.site, route, joinings[layer].shift_routed if layer in joinings else _unchanged)
        for layer, module in modules
        if module is not None
    }


def _unchanged(values: Tensor) -> Tensor:
    return values


class _Shifted(NamedTuple):
    """Rows whose neuron is at one site of a layer: its experts', or its dense one."""

    rows_R: Tensor
    neurons_R: Tensor
    sizes_R: Tensor

    def added_to(self, values_RN: Tensor, first: int) -> Tensor:
        """Shift the rows' neurons, which begin at a column."""
        places = self.rows_R.to(values_RN.device), self.neurons_R.to(values_RN.device) + first
        return values_RN.index_put(places, self.sizes_R.to(values_RN), accumulate=True)


class _Joining:
    """Hooks of one layer: rows join at its input and are shifted at its sites."""

    def __init__(self, lm: LanguageModel, layer: int, first_row: int, shifts: Shifts) -> None:
        self.lm, self.layer, self.shape, self.n_rows = lm, layer, lm.layer_shapes[layer], len(shifts.neurons_R)

        def part(is_chosen_R: NDArray[np.bool_]) -> _Shifted:
            rows_R, sizes_R = first_row + np.flatnonzero(is_chosen_R), shifts.sizes_R[is_chosen_R]
            arrays = rows_R, shifts.neurons_R[is_chosen_R], sizes_R.astype(lm.result_type)
            return _Shifted(*(torch.from_numpy(array).to(lm.device) for array in arrays))

        is_routed_R = shifts.neurons_R < self.shape.n_routed
        self._routed, self._dense = part(is_routed_R), part(~is_routed_R)

    def attach(self) -> list[RemovableHandle]:
        handles = [self.lm.layers[self.layer].register_forward_pre_hook(self._join)]
        return [*handles, *([hook_site(self.lm, self.layer, self._shift_dense)] if self.shape.n_dense else [])]

    def shift_routed(self, values_RN: Tensor) -> Tensor:
        """Shift the neurons of routed experts."""
        return self._routed.added_to(values_RN, 0)

    def _join(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_1RH = args[0]
        return (torch.cat([hidden_1RH, hidden_1RH[:, :1].expand(-1, self.n_rows, -1)], dim=1), *args[1:])

    def _shift_dense(self, values: Tensor) -> Tensor:
        flat_RN = values.reshape(-1, values.shape[-1])  # some layers (OPT) drop the batch axis
        first = flat_RN.shape[1] - self.shape.n_active  # a fused projection holds `up` last, and experts come before
        return self._dense.added_to(flat_RN, first).view_as(values)
