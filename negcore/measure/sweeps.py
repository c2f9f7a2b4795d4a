"""Sweeps: the measured neuron empirical gradient (NEG), from predictions with a neuron shifted step by step.

Shapes: P prompts, K chosen neurons, S shifts, L layers, N neurons a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from negcore.errors import LabelError, NegError
from negcore.measure.neurgrad import away_from_zero
from negcore.measure.virtual_tokens import Method, ShiftedPrompt, Shifts, shifted_prompts
from negcore.model.encoding import encode_labels, encode_prompts
from negcore.model.language_model import LanguageModel

Array = NDArray[Any]
Floats = NDArray[np.float64]
Neurons = Literal["all"] | int | Sequence[tuple[int, int]] | NDArray[np.int64]

LINEAR_PEARSON = 0.95
"""A neuron is linear where |Pearson r| between shift and change is at least this."""

# Rows whose sizes are laid out at once, so that memory does not grow with the number of neurons.
_PLANNED_ROWS = 2**16


def shift_grid(largest: float, step: float = 0.2) -> Floats:
    """Shifts from -largest to largest without zero, rounded to 12 decimals."""
    positive = np.round(np.arange(1, round(largest / step) + 1) * step, 12)
    return np.concatenate([-positive[::-1], positive])


DEFAULT_SHIFTS = shift_grid(2)
"""-2 to 2 by 0.2 without zero: the range of most figures of the paper."""
PAPER_SHIFTS = shift_grid(10)
"""-10 to 10 by 0.2 without zero: the paper's whole grid."""


class LineFit(NamedTuple):
    """Lines through the origin; `...` are the axes of the changes before the last."""

    slopes: Floats
    """Shape (...): sum(d * dp) / sum(d * d)."""
    pearson: Floats
    """Shape (...): Pearson r between d and dp; NaN where either is constant, for then it has no value."""
    r2: Floats
    """Shape (...): 1 - sum((dp - slope * d)^2) / sum(dp^2), that is, against no change at all, which is the
    reference of a line without intercept; NaN where nothing changes."""

    @property
    def linear(self) -> NDArray[np.bool_]:
        """Shape (...): |r| >= 0.95; a constant change is not linear."""
        return np.abs(self.pearson) >= LINEAR_PEARSON


def fit_lines(shifts_S: ArrayLike, changes: ArrayLike) -> LineFit:
    """Least-squares lines without intercept, in float64.

    Parameters
    ----------
    shifts_S : float array of shape (S,)
    changes : float array of shape (..., S)
        What each shift changed, p(d) - p(0).

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
    varies = (np.ptp(dp, axis=-1) > 0) & (np.ptp(d) > 0)  # exactly: the mean of equal numbers may differ from them
    return np.where(varies, np.clip(centred_dp @ centred_d / norms, -1, 1), np.nan)


@dataclass(frozen=True)
class SweepResult:
    """Probabilities of each prompt's label under every shift; float32, or float64 from a float64 model."""

    neurons_K2: NDArray[np.int64]
    """Layer and neuron."""
    shifts_S: Floats
    """Size of each shift in units of activation; positive is away from zero."""
    base_probs_P: Array
    """Probability of the label without a shift."""
    activations_PK: Array
    """Activations without a shift."""
    probs_PKS: Array
    """Probability of the label, softmax over the whole vocabulary."""
    label_ids_P: NDArray[np.int64]
    """Token id that each label became."""

    @cached_property
    def changes_PKS(self) -> Floats:
        """p(d) - p(0)."""
        return self.probs_PKS.astype(np.float64) - self.base_probs_P.astype(np.float64)[:, None, None]

    @cached_property
    def fit(self) -> LineFit:
        """The lines of all neurons: see `fit_lines`."""
        return fit_lines(self.shifts_S, self.changes_PKS)

    @property
    def negs_PK(self) -> Floats:
        """Measured NEG: probability per unit of activation."""
        return self.fit.slopes

    @property
    def pearson_PK(self) -> Floats:
        """Pearson r between shift and change; NaN where the change is constant."""
        return self.fit.pearson

    @property
    def r2_PK(self) -> Floats:
        """Share of the changes' sum of squares that the line explains: see `LineFit.r2`."""
        return self.fit.r2

    @property
    def linear_PK(self) -> NDArray[np.bool_]:
        """Whether |r| >= 0.95."""
        return self.fit.linear

    def within(self, max_shift: float) -> "SweepResult":
        """The part of the sweep with shifts up to a size, and so the lines of that range.

        Raises
        ------
        NegError
            If no shift is that small.
        """
        kept_S = np.abs(self.shifts_S) <= max_shift * (1 + 1e-9)
        if not kept_S.any():
            smallest = np.abs(self.shifts_S).min()
            raise NegError(f"range {max_shift} holds no shift; the smallest of this sweep is {smallest}")
        return replace(self, shifts_S=self.shifts_S[kept_S], probs_PKS=self.probs_PKS[..., kept_S])


def sweep(
    lm: LanguageModel,
    prompts: Sequence[str],
    labels: str | Sequence[str],
    *,
    neurons: Neurons = 8,
    shifts: ArrayLike | None = None,
    method: Method = "auto",
    seed: int = 0,
    max_rows: int | None = None,
) -> SweepResult:
    """Measure how a label's probability answers to shifts of single neurons.

    A shift of size d moves a neuron's activation a to a + d * s(a), with s(a) = +1 where a > 0 and -1 elsewhere.

    Parameters
    ----------
    lm : LanguageModel
    prompts : sequence of str, length P
    labels : str, or sequence of str, length P
        The target of all prompts or of each; encoded exactly as given.
    neurons : "all", int, or sequence of (layer, neuron)
        All of them, that many a layer at random (the same for all prompts), or those.
    shifts : float array of shape (S,), optional
        Sizes other than zero in units of activation; by default `DEFAULT_SHIFTS`.
    method : {"auto", "virtual", "hooks"}
        `virtual` runs shifted copies of the last token side by side, `hooks` a forward pass of the whole prompt for
        each shift; `auto` takes the first where the model is causal. They agree to rounding.
    seed : int
        Of the random choice of neurons.
    max_rows : int, optional
        Shifted rows of one forward pass. It changes memory and speed, not the result.

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
        If the shifts are empty, hold zero or are not finite, or a neuron does not exist.

    References
    ----------
    Zhao, Jiang, Yoshinaga (ACL 2025), arXiv 2412.18053: neuron intervention experiment.

    Differs from the paper: a neuron whose activation is exactly zero moves in the negative direction, as in NeurGrad;
    the released sweep never moves it.
    """
    shifts_S = _checked_shifts(DEFAULT_SHIFTS if shifts is None else shifts)
    neurons_K2 = choose_neurons(lm, neurons, seed=seed)
    if max_rows is not None and max_rows < 1:
        raise NegError(f"max_rows {max_rows} leaves no row; give at least 1, or nothing")
    ids = encode_prompts(lm.card, prompts)
    label_ids_P1 = encode_labels(lm.tokenizer, one_label_each(labels, len(prompts)), len(prompts))
    kind = np.float64 if lm.dtype == "float64" else np.float32
    result = SweepResult(
        neurons_K2=neurons_K2,
        shifts_S=shifts_S,
        base_probs_P=np.empty(len(ids), kind),
        activations_PK=np.empty((len(ids), len(neurons_K2)), kind),
        probs_PKS=np.empty((len(ids), len(neurons_K2), len(shifts_S)), kind),
        label_ids_P=label_ids_P1[:, 0],
    )
    for index, prompt in shifted_prompts(lm, ids, label_ids_P1, method=method, max_rows=max_rows):
        _fill(result, index, prompt)
    return result


def choose_neurons(lm: LanguageModel, neurons: Neurons, *, seed: int = 0) -> NDArray[np.int64]:
    """Layer and neuron of a selection: shape (K, 2).

    Raises
    ------
    NegError
        If a neuron does not exist or is named twice, or the selection is empty.
    """
    n_layers, n_neurons = lm.n_layers, lm.n_neurons
    if isinstance(neurons, str):
        if neurons != "all":
            raise NegError(f"neurons {neurons!r} is not known; give 'all', a number a layer or (layer, neuron) pairs")
        neurons = n_neurons
    if isinstance(neurons, int):
        if not 1 <= neurons <= n_neurons:
            raise NegError(f"{neurons} neurons a layer cannot be chosen; {lm.card.name} has 1 to {n_neurons}")
        random = np.random.default_rng(seed)
        chosen_LK = [np.sort(random.choice(n_neurons, neurons, replace=False)) for _ in range(n_layers)]
        return np.array([(layer, neuron) for layer, row in enumerate(chosen_LK) for neuron in row], np.int64)
    return _checked_neurons(lm, np.asarray(neurons))


def one_label_each(labels: str | Sequence[str], n_prompts: int) -> list[list[str]]:
    """One target label a prompt, in the form that `encode_labels` takes.

    Raises
    ------
    LabelError
        If there is not one string for each prompt.
    """
    each = [labels] * n_prompts if isinstance(labels, str) else list(labels)
    if len(each) != n_prompts:
        raise LabelError(f"{len(each)} labels were given for {n_prompts} prompts; give one string, or one for each")
    for index, label in enumerate(each):
        if not isinstance(label, str):
            raise LabelError(f"label {label!r} of prompt {index} is not a string; a sweep has one target a prompt")
    return [[label] for label in each]


def _checked_shifts(shifts: ArrayLike) -> Floats:
    shifts_S = np.asarray(shifts, np.float64)
    if shifts_S.ndim != 1 or shifts_S.size == 0:
        raise NegError(f"shifts of shape {shifts_S.shape} are no grid; give a list of at least one size")
    for size in shifts_S[~np.isfinite(shifts_S) | (shifts_S == 0)]:
        raise NegError(f"shift {size} cannot be measured; give finite sizes other than zero")
    return shifts_S


def _checked_neurons(lm: LanguageModel, neurons: Array) -> NDArray[np.int64]:
    if neurons.ndim != 2 or neurons.shape[1] != 2 or not len(neurons) or not np.issubdtype(neurons.dtype, np.integer):
        raise NegError(f"neurons of shape {neurons.shape} ({neurons.dtype}) are no list of (layer, neuron) pairs")
    inside = ((neurons >= 0) & (neurons < (lm.n_layers, lm.n_neurons))).all(axis=1)
    for layer, neuron in neurons[~inside].tolist():
        allowed = f"layers 0 to {lm.n_layers - 1} and neurons 0 to {lm.n_neurons - 1}"
        raise NegError(f"neuron {neuron} of layer {layer} does not exist; {lm.card.name} has {allowed}")
    if len(np.unique(neurons, axis=0)) != len(neurons):
        raise NegError("a (layer, neuron) pair is given twice; name each neuron once")
    return neurons.astype(np.int64)


def _fill(result: SweepResult, index: int, prompt: ShiftedPrompt) -> None:
    layers_K, neurons_K = result.neurons_K2.T
    n_shifts = len(result.shifts_S)
    activations_K = prompt.activations_LN[layers_K, neurons_K]
    signs_K = away_from_zero(activations_K).double().cpu().numpy()
    result.activations_PK[index] = activations_K.double().cpu().numpy()
    result.base_probs_P[index] = prompt.log_probs_O[0].exp().item()
    order = np.argsort(layers_K, kind="stable")
    for start in range(0, len(order), step := max(1, _PLANNED_ROWS // n_shifts)):
        part = order[start : start + step]
        sizes_KS = signs_K[part, None] * result.shifts_S
        shifts = Shifts(layers_K[part].repeat(n_shifts), neurons_K[part].repeat(n_shifts), sizes_KS.ravel())
        probs = prompt.measure(shifts)[:, 0].exp()
        result.probs_PKS[index, part] = probs.numpy().reshape(sizes_KS.shape)
