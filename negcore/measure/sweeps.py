"""Sweeps: the neuron empirical gradient (NEG), measured from predictions with one neuron shifted step by step.

Shapes: P prompts, K chosen neurons, S shifts, L layers, N neurons a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.measure.neurgrad import away_from_zero
from negcore.measure.quadrature import NodeGrid, node_grid, range_masks, within_range
from negcore.measure.question import Question, asked
from negcore.measure.spread import checked_spreads
from negcore.measure.virtual_tokens import Method, ShiftedPrompt, Shifts, shifted_prompts
from negcore.model.encoding import EncodedPrompts, Labels
from negcore.model.language_model import LanguageModel
from negcore.model.layer_shapes import LayerShape
from negcore.model.precision import in_float32
from negcore.targets import DEFAULT_TARGET, Target, check_probabilities, checked_target

Neurons = Literal["all"] | int | Sequence[tuple[int, int]] | Ints

LINEAR_PEARSON = 0.95
"""A neuron is linear where |Pearson r| between shift and change is at least this."""

LARGEST_TAIL = 0.01
"""Largest share of a curve's variation in its last coefficients with which nodes stand for the whole grid."""

# Most rows whose sizes are held at once, so that memory does not grow with the number of neurons.
_PLANNED_ROWS = 2**16


def shift_grid(largest: float, step: float = 0.2) -> Floats:
    """Return the shifts from -largest to largest without zero, rounded to 12 decimals."""
    positive = np.round(np.arange(1, round(largest / step) + 1) * step, 12)
    return np.concatenate([-positive[::-1], positive])


DEFAULT_SHIFTS = shift_grid(2)
"""-2 to 2 by 0.2 without zero: the range of most figures of the paper."""
PAPER_SHIFTS = shift_grid(10)
"""-10 to 10 by 0.2 without zero: the paper's whole grid."""


class LineFit(NamedTuple):
    """Lines through the origin; `...` stands for all axes of the changes but the last."""

    slopes: Floats
    """Shape (...): sum(d * dp) / sum(d * d)."""
    pearson: Floats
    """Shape (...): Pearson r between d and dp; NaN where either is constant."""
    r2: Floats
    """Shape (...): 1 - sum((dp - slope * d)^2) / sum(dp^2); NaN where nothing changes. A line without intercept is
    compared with no change at all, so the mean is not subtracted."""

    @property
    def linear(self) -> NDArray[np.bool_]:
        """Shape (...): |r| >= 0.95; a constant change is not linear."""
        return np.abs(self.pearson) >= LINEAR_PEARSON


def fit_lines(shifts_S: ArrayLike, changes: ArrayLike) -> LineFit:
    """Fit least-squares lines without intercept, in float64.

    Parameters
    ----------
    shifts_S : float array of shape (S,)
    changes : float array of shape (..., S)
        Change p(d) - p(0) of the target under each shift.

    References
    ----------
    Zhao, Jiang, Yoshinaga (ACL 2025), arXiv 2412.18053: NEG as a zero-intercept regression, linearity as Pearson r.
    """
    d, dp = np.asarray(shifts_S, np.float64), np.asarray(changes, np.float64)
    slopes = dp @ d / (d @ d)
    residuals = dp - slopes[..., None] * d
    total = (dp**2).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return LineFit(slopes, _pearson(d, dp), np.where(total > 0, 1 - (residuals**2).sum(-1) / total, np.nan))


def _pearson(d: Floats, dp: Floats) -> Floats:
    centred_d, centred_dp = d - d.mean(), dp - dp.mean(-1, keepdims=True)
    norms = np.linalg.norm(centred_d) * np.linalg.norm(centred_dp, axis=-1)
    varies = (np.ptp(dp, axis=-1) > 0) & (np.ptp(d) > 0)  # exact, while the mean of equal numbers may be rounded
    return np.where(varies, np.clip(centred_dp @ centred_d / norms, -1, 1), np.nan)


@dataclass(frozen=True)
class SweepResult:
    """The target of each prompt's label under every shift; float32, or float64 from a float64 model."""

    neurons_K2: Ints
    """Layer and neuron."""
    shifts_S: Floats
    """Size of each shift in units of activation, or of `spreads_K`; positive is away from zero."""
    base_P: Floats
    """Target of the label without a shift: its probability, softmax over the whole vocabulary, or another."""
    activations_PK: Floats
    """Activations without a shift."""
    values_PKS: Floats
    """Target of the label: `base_P` plus the change by the shift. The change is taken within one pass, so that a shift
    without effect has a change of exactly zero."""
    label_ids_P: Ints
    """Token id that each label became."""
    by_nodes_PK: NDArray[np.bool_] | None = None
    """True where only nodes were measured, and probabilities lie on the polynomials through them; None: all shifts."""
    ranges: tuple[float, ...] = ()
    """Ranges whose sums nodes give, beside the whole grid."""
    active_PK: NDArray[np.bool_] | None = None
    """False where a prompt does not have a neuron of a mixture of experts, as it is not routed to its expert: slopes
    and r are masked there, and there are neither shifts nor changes. None for models without experts."""
    target: Target = DEFAULT_TARGET
    """The number that the values are."""
    spreads_K: Floats | None = None
    """Units of activation in a shift of 1, for each neuron; None if they are one. Neurons without any are masked."""

    @property
    def base_probs_P(self) -> Floats:
        """Probability of the label without a shift; `NegError` if the target is another."""
        check_probabilities(self.target)
        return self.base_P

    @property
    def probs_PKS(self) -> Floats:
        """Probability of the label under each shift; `NegError` if the target is another."""
        check_probabilities(self.target)
        return self.values_PKS

    @cached_property
    def changes_PKS(self) -> Floats:
        """p(d) - p(0) of the target."""
        return self.values_PKS.astype(np.float64) - self.base_P.astype(np.float64)[:, None, None]

    @cached_property
    def fit(self) -> LineFit:
        """Lines of all neurons: see `fit_lines`."""
        return fit_lines(self.shifts_S, self.changes_PKS)

    @property
    def negs_PK(self) -> Floats:
        """Measured NEG: target per unit of shifts; masked where a prompt does not have the neuron, or it no spread."""
        return self._masked(self.fit.slopes)

    @property
    def pearson_PK(self) -> Floats:
        """Pearson r between shift and change; NaN where the change is constant, masked as `negs_PK`."""
        return self._masked(self.fit.pearson)

    @property
    def linear_PK(self) -> NDArray[np.bool_]:
        """True where |r| >= 0.95."""
        return self.fit.linear

    def _masked(self, values_PK: Floats) -> Floats:
        return values_PK if self.active_PK is None else np.ma.masked_array(values_PK, ~self.active_PK)

    def with_spread(self) -> "SweepResult":
        """Return the neurons that have a spread: all, if shifts are in units of activation.

        Raises
        ------
        NegError
            If none has.
        """
        if self.spreads_K is None:
            return self
        kept_K = self.spreads_K > 0
        if not kept_K.any():
            raise NegError("no swept neuron has another activation in another prompt, so none could be shifted")
        names = ("activations_PK", "values_PKS", "by_nodes_PK", "active_PK")
        chosen: dict[str, Any] = {
            name: None if (own := getattr(self, name)) is None else own[:, kept_K] for name in names
        }
        if chosen["active_PK"] is not None and chosen["active_PK"].all():
            chosen["active_PK"] = None
        return replace(self, neurons_K2=self.neurons_K2[kept_K], spreads_K=self.spreads_K[kept_K], **chosen)

    def within(self, max_shift: float) -> "SweepResult":
        """Return the part of the sweep with shifts up to a size, whose lines are those of that range.

        Raises
        ------
        NegError
            If no shift is that small, or the range was not named to a sweep by nodes.
        """
        kept_S = within_range(self.shifts_S, max_shift)
        if not kept_S.any():
            smallest = np.abs(self.shifts_S).min()
            raise NegError(f"range {max_shift} holds no shift; the smallest of this sweep is {smallest}")
        if self.by_nodes_PK is not None and not (range_masks(self.shifts_S, self.ranges) == kept_S).all(1).any():
            known = ", ".join(f"{size:g}" for size in sorted({*self.ranges, float(np.abs(self.shifts_S).max())}))
            raise NegError(
                f"range {max_shift} is none that this sweep's nodes were chosen for ({known}); sweep with it"
            )
        return replace(self, shifts_S=self.shifts_S[kept_S], values_PKS=self.values_PKS[..., kept_S])


def sweep(
    lm: LanguageModel,
    prompts: Sequence[str] | EncodedPrompts,
    labels: str | Labels | None = None,
    *,
    answers: Sequence[int] | Ints | None = None,
    target: Target = DEFAULT_TARGET,
    neurons: Neurons = 8,
    shifts: ArrayLike | None = None,
    spreads: ArrayLike | None = None,
    nodes: int | None = None,
    ranges: Sequence[float] = (),
    method: Method = "auto",
    seed: int = 0,
    max_rows: int | None = None,
) -> SweepResult:
    """Measure a label's probability, or another target, under shifts of single neurons.

    A shift of size d moves a neuron's activation a to a + d * s(a), with s(a) = +1 where a > 0 and -1 elsewhere.

    Parameters
    ----------
    lm : LanguageModel
    prompts : sequence of str, length P, or EncodedPrompts
        Encoded prompts bring their labels; without answers, one each.
    labels : str, or sequence of str, length P
        The label of all prompts or of each; encoded exactly as given. With answers, labels as for `neurgrad`.
    answers : sequence of int, length P, optional
        Index of the label of each prompt that is measured; the target "logit-difference" needs the others too.
    target : {"probability", "log-probability", "logit-difference"}
        As for `neurgrad`.
    neurons : "all", int, or sequence of (layer, neuron)
        All neurons, that many of each layer at random (the same for all prompts), or the listed ones.
    shifts : float array of shape (S,), optional
        Sizes other than zero in units of activation; by default `DEFAULT_SHIFTS`.
    spreads : float array of shape (K,), optional
        Units of activation in a shift of 1, for each neuron: see `negcore.measure.spread.activation_spreads`. By
        default 1. A neuron with a spread of zero is not shifted, and masked in the result.
    nodes : int, optional
        Measure that many Gauss nodes of the grid in place of its shifts, at least 4; zero, one of an odd number on a
        symmetric grid, costs nothing. Slopes are then those of the grid for curves that are polynomials up to degree
        2 nodes - 2, r and R^2 up to nodes - 1. The notes tell which neurons are measured at every shift all the same.
    ranges : sequence of float
        With nodes: ranges that `SweepResult.within` will be asked for. Each ring between two has nodes of its own.
    method : {"auto", "virtual", "hooks"}
        `virtual` runs shifted copies of the last token side by side, `hooks` runs the whole prompt for each shift;
        `auto` is `virtual` for causal models and `hooks` for masked ones. They agree to rounding.
    seed : int
        Seed of the random choice of neurons.
    max_rows : int, optional
        Most shifted rows of one forward pass, beside its unshifted one; halved where memory runs out. It changes memory
        and speed, and the result only by rounding.

    Returns
    -------
    SweepResult
        Rows in the order of `prompts`.

    Raises
    ------
    PromptError, LabelError
        As for `neurgrad`.
    ModelError
        If virtual tokens are asked of a masked model, or the method is unknown.
    NegError
        If the shifts are empty, hold zero or are not finite, a neuron does not exist, or there are fewer than 4 nodes.

    Notes
    -----
    With nodes, let t be the energy of the last two coefficients (one even, one odd) of the polynomials through them,
    orthonormal over the grid, as a share of the sum of squares of the changes about their mean. A neuron of a prompt is
    measured at every shift if, in any range, nothing varies at the nodes, t is above 0.01, or |r| is within t of 0.95.

    References
    ----------
    Zhao, Jiang, Yoshinaga (ACL 2025), arXiv 2412.18053: neuron intervention experiment.
    Golub, Welsch (1969), Calculation of Gauss quadrature rules.

    Differs from the paper: a neuron whose activation is exactly zero moves in the negative direction, as in NeurGrad;
    the released sweep never moves it.
    """
    shifts_S = checked_shifts(DEFAULT_SHIFTS if shifts is None else shifts)
    neurons_K2 = choose_neurons(lm, neurons, seed=seed)
    if max_rows is not None and max_rows < 1:
        raise NegError(f"max_rows {max_rows} leaves no row; give at least 1, or leave it out")
    spreads_K = None if spreads is None else checked_spreads(spreads, len(neurons_K2))
    question = asked(lm, prompts, labels, answers, checked_target(target))
    with in_float32(lm):
        return measured(
            lm, question, neurons_K2, shifts_S, spreads_K, nodes=nodes, ranges=ranges, method=method, max_rows=max_rows
        )


def measured(
    lm: LanguageModel,
    question: Question,
    neurons_K2: Ints,
    shifts_S: Floats,
    spreads_K: Floats | None = None,
    *,
    nodes: int | None = None,
    ranges: Sequence[float] = (),
    method: Method = "auto",
    max_rows: int | None = None,
) -> SweepResult:
    """Measure a checked sweep in the model's own number type, which is too coarse if it is a half type."""
    grid = None if nodes is None else node_grid(shifts_S, nodes, ranges)
    n_prompts, n_chosen = len(question.ids), len(neurons_K2)
    result = SweepResult(
        neurons_K2=neurons_K2,
        shifts_S=shifts_S,
        base_P=np.empty(n_prompts, lm.result_type),
        activations_PK=np.empty((n_prompts, n_chosen), lm.result_type),
        values_PKS=np.empty((n_prompts, n_chosen, len(shifts_S)), lm.result_type),
        label_ids_P=question.answer_ids_P,
        by_nodes_PK=None if grid is None else np.zeros((n_prompts, n_chosen), np.bool_),
        ranges=() if grid is None else tuple(ranges),
        active_PK=None if spreads_K is None and not lm.has_experts else np.ones((n_prompts, n_chosen), np.bool_),
        target=question.target,
        spreads_K=spreads_K,
    )
    for index, prompt in shifted_prompts(lm, question.prompts, method=method, max_rows=max_rows):
        _fill(result, question, index, prompt, grid)
    return result


def choose_neurons(lm: LanguageModel, neurons: Neurons, *, seed: int = 0) -> Ints:
    """Return layer and neuron of a selection: shape (K, 2).

    Raises
    ------
    NegError
        If a neuron does not exist or is named twice, or the selection is empty.
    """
    layer_width = min(shape.n_neurons for shape in lm.layer_shapes)
    if isinstance(neurons, str):
        if neurons != "all":
            raise NegError(f"neurons {neurons!r} is not known; give 'all', a number a layer or (layer, neuron) pairs")
        return every_neuron(lm.layer_shapes)
    if isinstance(neurons, int):
        if not 1 <= neurons <= layer_width:
            raise NegError(f"{neurons} neurons a layer cannot be chosen; {lm.card.name} has 1 to {layer_width}")
        random = np.random.default_rng(seed)
        chosen_LK = [np.sort(random.choice(one.n_neurons, neurons, replace=False)) for one in lm.layer_shapes]
        return np.array([(layer, neuron) for layer, row in enumerate(chosen_LK) for neuron in row], np.int64)
    return _checked_neurons(lm, np.asarray(neurons))


def every_neuron(shapes: Sequence[LayerShape]) -> Ints:
    """Return layer and neuron of all neurons of a model's layers, in their order: shape (K, 2)."""
    widths_L = [shape.n_neurons for shape in shapes]
    return np.stack([np.repeat(np.arange(len(shapes)), widths_L), np.concatenate([*map(np.arange, widths_L)])], axis=1)


def draw_neurons(shapes: Sequence[LayerShape], n_chosen: int, *, seed: int = 0) -> Ints:
    """Draw neurons at random without repetition: shape (K, 2).

    They are evenly from all layers, up to one neuron; all of a layer with fewer, and then more of the others.

    Parameters
    ----------
    shapes : sequence of LayerShape
        Of all layers.

    Raises
    ------
    NegError
        If ``n_chosen`` is below 1, or the model has fewer neurons.
    """
    widths_L = [shape.n_neurons for shape in shapes]
    if not 1 <= n_chosen <= sum(widths_L):
        raise NegError(f"{n_chosen} neurons cannot be drawn; the model has 1 to {sum(widths_L)}")
    random = np.random.default_rng(seed)
    counts_L = np.zeros(len(widths_L), np.int64)
    while n_missing := n_chosen - int(counts_L.sum()):
        (open_J,) = np.nonzero(counts_L < widths_L)
        if n_missing < len(open_J):
            counts_L[random.choice(open_J, n_missing, replace=False)] += 1
        else:
            counts_L[open_J] = np.minimum(counts_L + n_missing // len(open_J), widths_L)[open_J]
    drawn = [
        np.sort(random.choice(width, count, replace=False)) for width, count in zip(widths_L, counts_L, strict=True)
    ]
    return np.stack([np.repeat(np.arange(len(widths_L)), counts_L), np.concatenate(drawn)], axis=1)


def checked_shifts(shifts: ArrayLike) -> Floats:
    """Return sizes of shifts as an array.

    Raises
    ------
    NegError
        If there is none, or one is zero or not finite.
    """
    shifts_S = np.asarray(shifts, np.float64)
    if shifts_S.ndim != 1 or shifts_S.size == 0:
        raise NegError(f"shifts of shape {shifts_S.shape} are no grid; give a list of one size or more")
    for size in shifts_S[~np.isfinite(shifts_S) | (shifts_S == 0)]:
        raise NegError(f"shift {size} cannot be measured; give finite sizes other than zero")
    return shifts_S


def _checked_neurons(lm: LanguageModel, neurons: NDArray[Any]) -> Ints:
    if neurons.ndim != 2 or neurons.shape[1] != 2 or not len(neurons) or not np.issubdtype(neurons.dtype, np.integer):
        raise NegError(f"neurons of shape {neurons.shape} ({neurons.dtype}) are no list of (layer, neuron) pairs")
    widths_L = np.array([shape.n_neurons for shape in lm.layer_shapes])
    widths_K = widths_L[np.clip(neurons[:, 0], 0, lm.n_layers - 1)]
    inside = (neurons >= 0).all(axis=1) & (neurons[:, 0] < lm.n_layers) & (neurons[:, 1] < widths_K)
    for (layer, neuron), width in zip(neurons[~inside].tolist(), widths_K[~inside], strict=True):
        allowed = f"layers 0 to {lm.n_layers - 1} and neurons 0 to {width - 1}"
        raise NegError(f"neuron {neuron} of layer {layer} does not exist; {lm.card.name} has {allowed}")
    if len(np.unique(neurons, axis=0)) != len(neurons):
        raise NegError("a (layer, neuron) pair is given twice; name each neuron once")
    return neurons.astype(np.int64)


def _fill(result: SweepResult, question: Question, index: int, prompt: ShiftedPrompt, grid: NodeGrid | None) -> None:
    result.base_P[index] = question.values(prompt.log_probs_O[None], [index]).item()
    layers_K, neurons_K = result.neurons_K2.T
    neurons_K = prompt.places_of(layers_K, neurons_K)
    if result.active_PK is not None:
        result.active_PK[index] = (neurons_K >= 0) & (True if result.spreads_K is None else result.spreads_K > 0)
        result.values_PKS[index] = result.base_P[index]
    activations_K = prompt.activations_LN[layers_K, neurons_K]
    signs_K = away_from_zero(activations_K).double().cpu().numpy()
    result.activations_PK[index] = np.where(neurons_K >= 0, activations_K.double().cpu().numpy(), 0)

    def changes_at(part: Ints, shifts_S: Floats) -> Floats:
        """Measure some of the neurons at each of some shifts."""
        sizes_KS = signs_K[part, None] * shifts_S
        if result.spreads_K is not None:
            sizes_KS *= result.spreads_K[part, None]
        layers_R, neurons_R = (values[part].repeat(len(shifts_S)) for values in (layers_K, neurons_K))
        measured = prompt.measure(Shifts(layers_R, neurons_R, sizes_KS.ravel()))
        rows_R = [index] * len(layers_R)
        shifted_R, unshifted_R = (question.values(log_probs_RO.double(), rows_R) for log_probs_RO in measured)
        return (shifted_R - unshifted_R).numpy().reshape(sizes_KS.shape)

    order = np.argsort(layers_K, kind="stable")
    if result.active_PK is not None:
        order = order[result.active_PK[index, order]]
    for start in range(0, len(order), step := max(1, _PLANNED_ROWS // len(result.shifts_S))):
        part = order[start : start + step]
        if grid is None or result.by_nodes_PK is None:
            changes_KS = changes_at(part, result.shifts_S)
        else:
            changes_KM = changes_at(part, grid.shifts_M)
            changes_KS, unsettled_K = grid.on_grid(changes_KM), _unsettled(grid, changes_KM)
            if unsettled_K.any():
                changes_KS[unsettled_K] = changes_at(part[unsettled_K], result.shifts_S)
            result.by_nodes_PK[index, part] = ~unsettled_K
        result.values_PKS[index, part] = result.base_P[index].astype(np.float64) + changes_KS


def _unsettled(grid: NodeGrid, changes_KM: Floats) -> NDArray[np.bool_]:
    """Tell which neurons the nodes say too little of, by the rule in the notes of `sweep`."""
    shifts_S, changes_KS = grid.shifts_S, grid.on_grid(changes_KM)
    unsettled_K = np.zeros(len(changes_KM), np.bool_)
    for within_S, tails_K in zip(grid.ranges_RS, grid.tail_energies(changes_KM).T, strict=True):
        energies_K = changes_KS[:, within_S].var(-1) * within_S.sum()
        shares_K = np.divide(tails_K, energies_K, out=np.full_like(tails_K, np.inf), where=energies_K > 0)
        near_K = np.abs(np.abs(fit_lines(shifts_S[within_S], changes_KS[:, within_S]).pearson) - LINEAR_PEARSON)
        unsettled_K |= (shares_K > LARGEST_TAIL) | ~(near_K > shares_K)
    return unsettled_K
