"""Estimators of what a neuron does to a target, under one interface, to be compared with each other and with sweeps.

Every estimator scores each neuron of each prompt for the prompt's right label. `f` below is the target as a function
of the neuron's activation `a`, all else as it was: the label's probability, its log-probability, or its logit minus
the largest logit among the prompt's other labels.

NeurGrad and the plain gradient are in target per unit of activation. The others are in target: what the activation
contributes, so that f(a) - f(0) of the ablation is what each of them approximates.

Shapes: P prompts, O options (labels), K chosen neurons, L layers, N neurons a layer, B rows of a batch, H hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from negcore.errors import LabelError, NegError
from negcore.measure.forward import ProbedBatch, probed_batches
from negcore.measure.neurgrad import away_from_zero
from negcore.measure.sweeps import Neurons, choose_neurons
from negcore.measure.virtual_tokens import Shifts, head_rows, label_log_probs, shifted_prompts
from negcore.model.encoding import Labels, encode_labels, encode_prompts
from negcore.model.language_model import LanguageModel

Array = NDArray[Any]
Target = Literal["probability", "log_probability", "logit_difference"]

PATH_STEPS = 20
"""Steps of the integrated gradients' path."""

# Bytes that the logits of a batch with gradients may take.
_BATCH_LOGIT_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Question:
    """Encoded prompts, their labels, and which value of the right label is asked for."""

    ids: list[list[int]]
    """Token ids of every prompt."""
    label_ids_PO: NDArray[np.int64]
    answers_P: NDArray[np.int64]
    """Index of the right label."""
    target: Target

    def labels(self, rows: Sequence[int], lm: LanguageModel) -> Tensor:
        """Token ids of some prompts' labels: shape (B, O)."""
        return torch.from_numpy(self.label_ids_PO[rows]).to(lm.device)

    def values(self, log_probs_BO: Tensor, rows: Sequence[int]) -> Tensor:
        """The target of some prompts, from the log-probabilities of their labels: shape (B,)."""
        right_B1 = torch.from_numpy(self.answers_P[rows]).to(log_probs_BO.device)[:, None]
        right_B = log_probs_BO.gather(1, right_B1)[:, 0]
        if self.target == "probability":
            return right_B.exp()
        if self.target == "log_probability":
            return right_B
        # Log-probabilities of one prompt differ from its logits by a constant, which the difference loses.
        others_BO = log_probs_BO.scatter(1, right_B1, -torch.inf)
        return right_B - others_BO.amax(1)


Function = Callable[[LanguageModel, Question, NDArray[np.int64]], Array]


@dataclass(frozen=True, slots=True)
class Estimator:
    """One way to score neurons."""

    name: str
    function: Function
    """Takes the model, the question and neurons_K2; gives scores of shape (P, K)."""
    formula: str
    cost: str
    """For one prompt."""


def estimate(
    lm: LanguageModel,
    prompts: Sequence[str],
    labels: Labels,
    *,
    estimator: str,
    answers: Sequence[int] | None = None,
    target: Target = "probability",
    neurons: Neurons | None = None,
) -> Array:
    """Score neurons with one of the `ESTIMATORS`.

    Parameters
    ----------
    lm : LanguageModel
    prompts : sequence of str, length P
    labels : sequence of str, or one such sequence for each prompt
        Encoded exactly as given.
    estimator : str
        Its name in `ESTIMATORS`.
    answers : sequence of int, length P, optional
        Index of each prompt's right label; may be left out where there is one label only.
    target : {"probability", "log_probability", "logit_difference"}
        What is explained; the last is the right label's logit minus the largest of the other labels.
    neurons : "all", int, or sequence of (layer, neuron), optional
        As for `sweep`; a selection saves time with the estimators that measure each neuron by itself.

    Returns
    -------
    float array of shape (P, L, N), or (P, K) where `neurons` is given
        In target, or target per unit of activation; float32, or float64 from a float64 model.

    Raises
    ------
    PromptError, LabelError
        As for `neurgrad`; LabelError too if the answers do not fit, or one label has no other to differ from.
    NegError
        If the estimator or target is unknown, or a neuron does not exist.
    """
    if estimator not in ESTIMATORS:
        raise NegError(f"estimator {estimator!r} is not known; choose one of {', '.join(ESTIMATORS)}")
    if target not in get_args(Target):
        raise NegError(f"target {target!r} is not known; choose one of {', '.join(get_args(Target))}")
    neurons_K2 = choose_neurons(lm, "all" if neurons is None else neurons)
    ids = encode_prompts(lm.card, prompts)
    label_ids_PO = encode_labels(lm.tokenizer, labels, len(prompts))
    question = Question(ids, label_ids_PO, _checked_answers(answers, label_ids_PO, target), target)
    scores_PK = ESTIMATORS[estimator].function(lm, question, neurons_K2)
    return scores_PK if neurons is not None else scores_PK.reshape(len(ids), lm.n_layers, lm.n_neurons)


def neurgrad_scores(lm: LanguageModel, question: Question, neurons_K2: NDArray[np.int64]) -> Array:
    """NeurGrad: f'(a) * s(a), the slope of f away from zero; s(a) = +1 where a > 0, else -1.

    Source: Zhao, Jiang, Yoshinaga (ACL 2025), arXiv 2412.18053. Cost: one forward and one backward pass.
    """
    return _gradient_scores(lm, question, neurons_K2, lambda gradient, a: gradient * away_from_zero(a))


def gradient_scores(lm: LanguageModel, question: Question, neurons_K2: NDArray[np.int64]) -> Array:
    """Plain ("computational") gradient: f'(a).

    Source: the baseline CG of arXiv 2412.18053. Cost: one forward and one backward pass.
    """
    return _gradient_scores(lm, question, neurons_K2, lambda gradient, a: gradient)


def gradient_times_activation_scores(lm: LanguageModel, question: Question, neurons_K2: NDArray[np.int64]) -> Array:
    """Gradient times activation: f'(a) * a, the first-order estimate of f(a) - f(0).

    Source: Shrikumar et al., arXiv 1605.01713. Cost: one forward and one backward pass.
    """
    return _gradient_scores(lm, question, neurons_K2, lambda gradient, a: gradient * a)


def integrated_gradients_scores(lm: LanguageModel, question: Question, neurons_K2: NDArray[np.int64]) -> Array:
    """Integrated gradients: a / m * sum over k = 1..m of f'(a * k / m), m = 20.

    All activations of a layer are scaled together, the other layers run as they do: one path a layer.

    Source: Sundararajan et al., arXiv 1703.01365, along the scaled activation of Dai et al., arXiv 2104.08696.
    Cost: 20 forward and backward passes a layer.
    """
    result_PK = np.empty((len(question.ids), len(neurons_K2)), _kind(lm))
    for prompt, tokens in enumerate(question.ids):
        scores_LN = torch.zeros(lm.n_layers, lm.n_neurons, dtype=torch.float64)
        # Every row is the same prompt, so a causal model runs all its tokens but the last once.
        for batch in probed_batches(lm, [tokens] * PATH_STEPS):
            scales_B1 = (torch.tensor(batch.rows, dtype=torch.float64, device=lm.device)[:, None] + 1) / PATH_STEPS
            with torch.no_grad():
                activations_LN = batch.predict().activations_BLN[0]
            for layer in np.unique(neurons_K2[:, 0]).tolist():
                shift_BN = ((scales_B1 - 1) * activations_LN[layer]).to(lm.model.dtype).requires_grad_()
                (gradient_BN,), _ = _gradients(batch, question, [prompt] * len(batch.rows), {layer: shift_BN})
                scores_LN[layer] += (gradient_BN.sum(0) * activations_LN[layer] / PATH_STEPS).double().cpu()
        result_PK[prompt] = scores_LN[tuple(neurons_K2.T)]
    return result_PK


def log_probability_increase_scores(lm: LanguageModel, question: Question, neurons_K2: NDArray[np.int64]) -> Array:
    """Log-probability increase: f(unembed(h + a * v)) - f(unembed(h)).

    `h` is the residual stream that enters the neuron's layer (the layer before it writes it), `a` the activation that
    enters the down projection whatever the model's site, `v` the neuron's row of that projection, and `unembed` the
    model's own final normalisation and head. Where a family normalises the feed-forward's output before adding it,
    a * v is scaled as that normalisation scaled the whole output. With the target `log_probability` this is the
    method of the source; other targets apply the same difference.

    Source: Yu and Ananiadou, arXiv 2312.12141. Cost: one forward pass, and one row of the head a neuron.
    """
    result_PK = np.empty((len(question.ids), len(neurons_K2)), _kind(lm))
    for batch in probed_batches(lm, question.ids, batch_size=1):
        prompt = batch.rows[0]
        with torch.no_grad():
            streams = _streams(batch)
            for layer in np.unique(neurons_K2[:, 0]).tolist():
                chosen_K = neurons_K2[:, 0] == layer
                neurons = torch.from_numpy(neurons_K2[chosen_K, 1]).to(lm.device)
                result_PK[prompt, chosen_K] = _increases(lm, question, prompt, layer, neurons, streams).cpu()
    return result_PK


def ablation_scores(lm: LanguageModel, question: Question, neurons_K2: NDArray[np.int64]) -> Array:
    """Exact ablation: f(a) - f(0), each neuron set to zero by itself.

    Source: zero ablation, the definition itself. Cost: one virtual token a neuron (causal models), or one forward
    pass a neuron (masked ones).
    """
    result_PK = np.empty((len(question.ids), len(neurons_K2)), _kind(lm))
    layers_K, chosen_K = neurons_K2.T
    for index, prompt in shifted_prompts(lm, question.ids, question.label_ids_PO):
        sizes_K = -prompt.activations_LN[layers_K, chosen_K].double().cpu().numpy()
        without_K = question.values(prompt.measure(Shifts(layers_K, chosen_K, sizes_K)), [index] * len(sizes_K))
        whole_1 = question.values(prompt.log_probs_O[None].cpu(), [index])
        result_PK[index] = whole_1 - without_K
    return result_PK


_GRADIENT_COST = "1 forward and backward pass"
_ALL = (
    Estimator("neurgrad", neurgrad_scores, "f'(a) * s(a)", _GRADIENT_COST),
    Estimator("gradient", gradient_scores, "f'(a)", _GRADIENT_COST),
    Estimator("gradient_x_activation", gradient_times_activation_scores, "f'(a) * a", _GRADIENT_COST),
    Estimator(
        "integrated_gradients",
        integrated_gradients_scores,
        "a / 20 * sum over k = 1..20 of f'(a * k / 20)",
        "20 forward and backward passes a layer",
    ),
    Estimator(
        "log_probability_increase",
        log_probability_increase_scores,
        "f(unembed(h + a * v)) - f(unembed(h))",
        "1 forward pass, 1 row of the head a neuron",
    ),
    Estimator("ablation", ablation_scores, "f(a) - f(0)", "1 virtual token (masked models: forward pass) a neuron"),
)
ESTIMATORS: MappingProxyType[str, Estimator] = MappingProxyType({estimator.name: estimator for estimator in _ALL})
"""Estimators by name."""


def unembed(lm: LanguageModel, hidden_RH: Tensor) -> Tensor:
    """Logits (R, V) of residual streams as if each left the last layer: the model's own final norm and head."""

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        return (hidden_RH[None], *output[1:]) if isinstance(output, tuple) else hidden_RH[None]

    # Everything behind the layers treats tokens alike, so one token's pass serves, its last stream replaced.
    handle = lm.layers[-1].register_forward_hook(replace)
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
        output = lm.model(input_ids=token, attention_mask=torch.ones_like(token))
    finally:
        handle.remove()
    return output.logits.reshape(len(hidden_RH), -1)  # type: ignore[no-any-return]


class _Streams(NamedTuple):
    """What the probed token of one prompt carries."""

    entering_LH: Tensor
    """Residual stream at each layer's input."""
    acts_LN: Tensor
    """Input of each down projection."""


def _streams(batch: ProbedBatch) -> _Streams:
    with _recorded(batch, list(batch.lm.layers)) as entering, _recorded(batch, _downs(batch.lm)) as acts:
        batch.predict()
    return _Streams(torch.stack(entering), torch.stack(acts))


def _downs(lm: LanguageModel) -> list[nn.Module]:
    return [lm.down(layer) for layer in range(lm.n_layers)]


@contextmanager
def _recorded(batch: ProbedBatch, modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Record what enters modules, in the order of their calls, at the probed token of a batch of one prompt."""
    inputs: list[Tensor] = []
    position = int(batch.positions_B[0])

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].reshape(-1, args[0].shape[-1])[position])

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(record).remove)
        yield inputs


def _increases(
    lm: LanguageModel, question: Question, prompt: int, layer: int, neurons_K: Tensor, streams: _Streams
) -> Tensor:
    """Log-probability increases of some neurons of one layer: shape (K,)."""
    acts_N, entering_H, rows_NH = streams.acts_LN[layer], streams.entering_LH[layer], lm.down_rows(layer)
    scale_H = _post_norm_scale(lm, layer, acts_N @ rows_NH)
    values = []
    for start in range(0, len(neurons_K), n_rows := head_rows(lm)):
        part = neurons_K[start : start + n_rows]
        written_RH = acts_N[part, None] * rows_NH[part] * scale_H
        logits_RV = unembed(lm, torch.cat([entering_H[None], entering_H + written_RH]))
        log_probs_RO = label_log_probs(logits_RV, question.labels([prompt] * len(logits_RV), lm))
        targets_R = question.values(log_probs_RO, [prompt] * len(logits_RV))
        values.append(targets_R[1:] - targets_R[0])
    return torch.cat(values)


def _post_norm_scale(lm: LanguageModel, layer: int, output_H: Tensor) -> Tensor:
    """By how much the normalisation of a feed-forward's output scaled each of its coordinates."""
    if lm.arch.post_norm is None:
        return torch.ones_like(output_H)
    normalised_H: Tensor = lm.layers[layer].get_submodule(lm.arch.post_norm)(output_H)
    return torch.where(output_H == 0, 0, normalised_H / output_H)


def _gradient_scores(
    lm: LanguageModel,
    question: Question,
    neurons_K2: NDArray[np.int64],
    score: Callable[[Tensor, Tensor], Tensor],
) -> Array:
    """Scores made of the gradient and the activation."""
    result_PK = np.empty((len(question.ids), len(neurons_K2)), _kind(lm))
    layers_K, chosen_K = neurons_K2.T
    max_rows = max(1, _BATCH_LOGIT_BYTES // (4 * int(lm.card.text_config.vocab_size)))
    for batch in probed_batches(lm, question.ids, max_rows=max_rows):
        shape = (len(batch.rows), lm.n_neurons)
        shifts = {
            layer: torch.zeros(shape, dtype=lm.model.dtype, device=lm.device, requires_grad=True)
            for layer in range(lm.n_layers)
        }
        gradients, activations_BLN = _gradients(batch, question, batch.rows, shifts)
        scores_BLN = score(torch.stack(gradients, dim=1), activations_BLN)
        result_PK[batch.rows] = scores_BLN[:, layers_K, chosen_K].double().cpu().numpy()
    return result_PK


def _gradients(
    batch: ProbedBatch, question: Question, prompts: Sequence[int], shifts: dict[int, Tensor]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradient of each row's target by each layer's shift, and the activations; `prompts` says whose a row is."""
    with torch.enable_grad():
        logits_BV, activations_BLN = batch.predict(shifts)
        log_probs_BO = label_log_probs(logits_BV, question.labels(prompts, batch.lm))
        # Rows do not see each other, so the gradient of their sum is each row's own.
        total = question.values(log_probs_BO, prompts).sum()
        return torch.autograd.grad(total, list(shifts.values())), activations_BLN


def _checked_answers(
    answers: Sequence[int] | None, label_ids_PO: NDArray[np.int64], target: Target
) -> NDArray[np.int64]:
    n_prompts, n_options = label_ids_PO.shape
    if target == "logit_difference" and n_options == 1:
        raise LabelError("target 'logit_difference' needs another label to differ from; give at least two labels")
    if answers is None and n_options > 1:
        raise LabelError(f"{n_options} labels were given without answers; say which label is right for each prompt")
    answers_P = np.zeros(n_prompts, np.int64) if answers is None else np.asarray(answers)
    if answers_P.shape != (n_prompts,) or not np.issubdtype(answers_P.dtype, np.integer):
        raise LabelError(f"answers of shape {answers_P.shape} do not fit {n_prompts} prompts; give one index for each")
    for index in np.flatnonzero((answers_P < 0) | (answers_P >= n_options)):
        raise LabelError(f"answer {answers_P[index]} of prompt {index} is no label; give 0 to {n_options - 1}")
    return answers_P.astype(np.int64)


def _kind(lm: LanguageModel) -> type[np.floating[Any]]:
    return np.float64 if lm.dtype == "float64" else np.float32
