"""Time each fast path beside its plain twin, and compare number types, on the same prompts and neurons.

Shapes: B rows of the batch, N neurons a layer.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from negcore.arrays import Floats, Ints
from negcore.measure.active import held_routings
from negcore.measure.forward import probed_position, stacked_layers
from negcore.measure.hooks import tapped, zero_shifts
from negcore.measure.neurgrad import neurgrad
from negcore.measure.question import asked
from negcore.measure.sweeps import DEFAULT_SHIFTS, SweepResult, draw_neurons, measured, shift_grid, sweep
from negcore.measure.virtual_tokens import Method
from negcore.model.architectures import Dtype
from negcore.model.encoding import EncodedPrompts, encode
from negcore.model.language_model import LanguageModel
from negcore.model.layer_shapes import LayerShape
from negcore.model.precision import HALF_TYPES
from negcore.targets import DEFAULT_TARGET

N_SHIFTS = 20
"""Shifts of a neuron in the timed sweeps: -2 to 2 by 0.2."""


Watch = Callable[[str], object]
"""Somebody who is told what goes on."""


def unseen(text: str) -> None:
    """Watch nothing."""


@dataclass(frozen=True)
class Timing:
    """Times of a fast path and its plain twin, one for each repeat."""

    what: str
    fast_s: list[float]
    plain_s: list[float]

    @property
    def ratio(self) -> float:
        """Median time of the plain way over that of the fast one."""
        return median(self.plain_s) / median(self.fast_s)


def benchmark(
    lm: LanguageModel,
    prompt: str,
    labels: Sequence[str],
    *,
    neurons: int = 16,
    repeats: int = 3,
    watch: Watch = unseen,
) -> list[Timing]:
    """Time sweeps and gradients both ways.

    Parameters
    ----------
    labels : sequence of str
        The first is the sweep's target; gradients are taken for all.
    neurons : int
        Neurons that are swept, the same both ways; of a mixture of experts, some of those that the prompt has. The time
        includes the prompt's own pass, so each neuron costs the fast path less the more there are.
    watch : callable
        Told what is timed, as it begins.
    """
    chosen_K2 = _drawn_of(lm, prompt, labels, neurons)
    shifts = shift_grid(2)
    assert len(shifts) == N_SHIFTS

    def swept(method: Method) -> float:
        return _time(lambda: sweep(lm, [prompt], labels[0], neurons=chosen_K2, shifts=shifts, method=method))

    return [
        _compare(
            f"sweep of {N_SHIFTS} shifts, s a neuron",
            lambda: swept("auto") / neurons,
            lambda: swept("hooks") / neurons,
            repeats,
            watch,
        ),
        _compare(
            f"gradients for {len(labels)} labels, s a prompt",
            lambda: _time(lambda: neurgrad(lm, [prompt], labels)),
            lambda: _time(lambda: plain_gradients(lm, prompt, labels)),
            repeats,
            watch,
        ),
    ]


def _drawn_of(lm: LanguageModel, prompt: str, labels: Sequence[str], count: int) -> Ints:
    """Draw neurons, evenly from all layers, among those that a prompt has: shape (K, 2)."""
    active_K2 = draw_neurons([LayerShape(shape.n_active) for shape in lm.layer_shapes], count)
    if lm.has_experts:
        experts = neurgrad(lm, [prompt], labels[:1]).experts(lm.layer_shapes)
        for layer, experts_1K in experts.items():
            at = active_K2[:, 0] == layer
            active_K2[at, 1] = lm.layer_shapes[layer].active_neurons(experts_1K)[0][active_K2[at, 1]]
    return active_K2


@dataclass(frozen=True)
class TypeRow:
    """Numbers of one number type beside those of a float32 model, for the same prompts and neurons."""

    dtype: Dtype
    what: str
    linear_share: float | None
    """Share of neurons and prompts where |Pearson r| >= 0.95 between shift and change; None for gradients."""
    signs: float
    """Share of NEGs with the sign that they have in float32."""
    pearson: float
    """r between the NEGs and those in float32."""
    seconds: float


def compare_types(
    load: Callable[[Dtype], LanguageModel],
    dtype: Dtype,
    prompts: Sequence[str],
    labels: Sequence[str],
    *,
    neurons: int,
    watch: Watch = unseen,
) -> list[TypeRow]:
    """Compare NeurGrad and sweeps of a number type with those of float32.

    Parameters
    ----------
    load : callable
        Returns the model in a number type.
    labels : sequence of str, length P
        Target of each prompt.
    neurons : int
        Neurons that are swept, the same in every type. Gradients are compared for all neurons.
    watch : callable
        Told which type is measured, as it begins.

    Returns
    -------
    list of TypeRow
        Float32 first. A half type has a row more: its sweep as `sweep` does it, in float32, and in the type itself.
    """
    rows: list[TypeRow] = []
    exact: dict[str, Floats] = {}
    for type_ in ("float32", dtype):
        watch(f"NeurGrad and sweeps of {neurons} neurons in {type_}")
        for what, one in _measured_in(load(type_), prompts, labels, neurons):
            truth = exact.setdefault(what.partition(",")[0], one.negs)
            signs = float((np.sign(one.negs) == np.sign(truth)).mean())
            pearson = float(np.corrcoef(one.negs.ravel(), truth.ravel())[0, 1])
            rows.append(TypeRow(type_, what, one.linear_share, signs, pearson, one.seconds))
    return rows


class _Measured(NamedTuple):
    negs: Floats
    linear_share: float | None
    seconds: float


def _measured_in(
    lm: LanguageModel, prompts: Sequence[str], labels: Sequence[str], neurons: int
) -> Iterator[tuple[str, _Measured]]:
    lm.refuse_experts("comparisons of number types by sweeps")
    question = asked(lm, prompts, labels, None, DEFAULT_TARGET)
    chosen_K2 = draw_neurons(lm.layer_shapes, neurons)
    sweeps: dict[str, Callable[[], SweepResult]] = {"sweep": lambda: sweep(lm, question.prompts, neurons=chosen_K2)}
    if lm.dtype in HALF_TYPES:
        sweeps["sweep, in the type itself"] = lambda: measured(lm, question, chosen_K2, DEFAULT_SHIFTS)
    started = time.perf_counter()
    negs_POLN = neurgrad(lm, question.prompts).negs_POLN.astype(np.float64)
    yield "NeurGrad", _Measured(negs_POLN, None, time.perf_counter() - started)
    for what, take in sweeps.items():
        started = time.perf_counter()
        result = take()
        yield what, _Measured(result.negs_PK, float(result.linear_PK.mean()), time.perf_counter() - started)


def plain_gradients(
    lm: LanguageModel, prompt: str | EncodedPrompts, labels: Sequence[str] | None = None
) -> torch.Tensor:
    """Take the gradients of each label's probability by every neuron, with a pass over the whole prompt for each label.

    Parameters
    ----------
    prompt : str or EncodedPrompts
        One prompt. An encoded one brings its labels.

    Returns
    -------
    Tensor of shape (O, L, N)
    """
    encoded = encode(lm.card, [prompt] if isinstance(prompt, str) else prompt, labels)
    assert len(encoded.ids) == 1 and encoded.is_usual, "one prompt at a time, of the usual kind"
    position = probed_position(lm, encoded.ids[0])
    ids_1T = torch.tensor(encoded.ids, device=lm.device)
    positions_1 = torch.tensor([position], device=lm.device)
    gradients, routings = [], None
    if lm.has_experts and lm.router == "fixed":
        with torch.no_grad(), tapped(lm, positions_1) as unshifted:
            lm.model(input_ids=ids_1T)
        routings = held_routings(lm, unshifted, 1)
    for label_id in encoded.label_ids_PO[0].tolist():
        shifts = zero_shifts(lm, 1)
        with torch.enable_grad(), tapped(lm, positions_1, shifts, routings=routings):
            probability = lm.model(input_ids=ids_1T).logits[0, position].softmax(0)[label_id]
            by_layer = torch.autograd.grad(probability, list(shifts.values()))
            gradients.append(stacked_layers(lm, [one[0] for one in by_layer], dim=0))
    return torch.stack(gradients)


def _compare(what: str, fast: Callable[[], float], plain: Callable[[], float], repeats: int, watch: Watch) -> Timing:
    watch(f"{what}: the first call")  # which allocates
    fast()
    times = []
    for repeat in range(repeats):
        watch(f"{what}: repeat {repeat + 1} of {repeats}")
        times.append((fast(), plain()))
    return Timing(what, [a for a, _ in times], [b for _, b in times])


def _time(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
