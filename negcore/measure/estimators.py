"""Estimators of a neuron's effect on a target, under one interface, to compare with each other and with sweeps.

Every estimator scores each neuron of each prompt for the prompt's right label. `f` below is the target as a function
of the neuron's activation `a`, with everything else unchanged. It is the label's probability, its log-probability, or
its logit minus the largest logit among the prompt's other labels.

NeurGrad and the plain gradient are in target per unit of activation. The others are in target: they approximate the
activation's contribution f(a) - f(0), which the ablation measures exactly, or f(a) - f(a'), see
`negcore.measure.patching`.

Shapes: P prompts, O options (labels), K chosen neurons, L layers, N neurons a layer, B rows of a batch, H hidden width.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from negcore.arrays import Floats, Ints
from negcore.errors import NegError, PromptError, first_line
from negcore.measure.forward import ProbedBatch, measure_batches, probed_batches
from negcore.measure.memory import BatchLimit, is_out_of_memory
from negcore.measure.neurgrad import away_from_zero
from negcore.measure.patching import (
    atp_star_scores,
    attribution_patching_scores,
    mean_ablation_scores,
    relevance_patching_scores,
    resample_ablation_scores,
)
from negcore.measure.question import Question, checked_answers, row_gradients, score_gradients, score_replacement
from negcore.measure.streams import Stream, streams
from negcore.measure.sweeps import Neurons, choose_neurons
from negcore.measure.virtual_tokens import head_rows, label_log_probs
from negcore.model.encoding import EncodedPrompts, Labels, encode, encode_prompts
from negcore.model.language_model import LanguageModel
from negcore.model.precision import in_float32
from negcore.targets import DEFAULT_TARGET, Target, checked_target

PATH_STEPS = 20
"""Steps of the path of integrated gradients."""

Estimator = Callable[[LanguageModel, Question, Ints], Floats]
"""Takes the model, the question and neurons_K2; returns scores of shape (P, K)."""


def estimate(
    lm: LanguageModel,
    prompts: Sequence[str] | EncodedPrompts,
    labels: Labels | None = None,
    *,
    estimator: str,
    answers: Sequence[int] | Ints | None = None,
    target: Target = DEFAULT_TARGET,
    neurons: Neurons | None = None,
    references: Sequence[str] | EncodedPrompts | None = None,
) -> Floats:
    """Score neurons with one of the `ESTIMATORS`.

    Parameters
    ----------
    lm : LanguageModel
    prompts : sequence of str, length P, or EncodedPrompts
        Encoded prompts bring their labels.
    labels : sequence of str, or one such sequence for each prompt
        Encoded exactly as given.
    estimator : str
        A name in `ESTIMATORS`.
    answers : sequence of int, length P, optional
        Index of each prompt's right label; not needed where there is only one label.
    target : {"probability", "log-probability", "logit-difference"}
        Explained value; the last is the right label's logit minus the largest of the other labels.
    neurons : "all", int, or sequence of (layer, neuron), optional
        As for `sweep`; a selection saves time in the estimators that measure each neuron by itself.
    references : sequence of str, or EncodedPrompts, optional
        For the estimators in `WITH_REFERENCES`, and only for them: the prompts whose activations take the place of the
        prompts'. One for each prompt, such as its counterfactual; any number for "mean_ablation".

    Returns
    -------
    float array of shape (P, L, N), or (P, K) where `neurons` is given
        In target, or target per unit of activation; float32, or float64 from a float64 model.

    Raises
    ------
    PromptError, LabelError
        As for `neurgrad`; LabelError too if the answers do not fit, or "logit-difference" is asked of one label;
        PromptError if references do not fit.
    NegError
        If the estimator or target is unknown, a neuron does not exist, or references are missing or not wanted;
        ModelError if the estimator needs gradients and the model's failed its check at load.
    """
    if estimator not in ESTIMATORS:
        raise NegError(f"estimator {estimator!r} is not known; choose one of {', '.join(ESTIMATORS)}")
    lm.refuse_experts("estimators other than `negcore.neurgrad`")
    target = checked_target(target)
    if (references is not None) != (estimator in WITH_REFERENCES):
        wants = "needs references, prompts that it takes activations from" if references is None else "takes none"
        raise NegError(f"references: estimator {estimator!r} {wants}; {', '.join(WITH_REFERENCES)} take them")
    neurons_K2 = choose_neurons(lm, "all" if neurons is None else neurons)
    encoded = encode(lm.card, prompts, labels)
    encoded.refuse_unusual("estimators other than `negcore.neurgrad`")
    answers_P = checked_answers(answers, encoded.label_ids_PO, target)
    reference_ids = () if references is None else _reference_ids(lm, references, estimator, len(encoded.ids))
    question = Question(encoded, answers_P, target, reference_ids)
    scores_PK = ESTIMATORS[estimator](lm, question, neurons_K2)
    return scores_PK if neurons is not None else scores_PK.reshape(-1, lm.n_layers, lm.layer_width)


def neurgrad_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return NeurGrad: f'(a) * s(a), the slope of f away from zero; s(a) = +1 where a > 0, else -1.

    Source: Zhao, Jiang, Yoshinaga (ACL 2025), arXiv 2412.18053. Cost: one forward and one backward pass.
    """
    return score_gradients(lm, question, neurons_K2, lambda gradient, a: gradient * away_from_zero(a))


def gradient_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return the plain ("computational") gradient: f'(a).

    Source: the baseline CG of arXiv 2412.18053. Cost: one forward and one backward pass.
    """
    return score_gradients(lm, question, neurons_K2, lambda gradient, a: gradient)


def gradient_times_activation_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return gradient times activation: f'(a) * a, the first-order estimate of f(a) - f(0).

    Source: Shrikumar et al., arXiv 1605.01713. Cost: one forward and one backward pass.
    """
    return score_gradients(lm, question, neurons_K2, lambda gradient, a: gradient * a)


def integrated_gradients_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return integrated gradients: a / m * sum over k = 1..m of f'(a * (k - 1/2) / m), m = 20: the midpoint rule.

    All activations of a layer are scaled together while the other layers run unchanged: one path for each layer.
    Gradients are taken in the middle of each step; at its end, as in the source, the sum is further from the integral.
    Where a family normalises the feed-forward's output (Gemma 2, OLMo 2), the path says little: its scale is undone.

    Source: Sundararajan et al., arXiv 1703.01365, along the scaled activation of Dai et al., arXiv 2104.08696.
    Cost: 20 forward and backward passes a layer.
    """
    result_PK = np.empty((len(question.ids), len(neurons_K2)), lm.result_type)
    layers, limit = np.unique(neurons_K2[:, 0]).tolist(), BatchLimit("steps of a path")
    for prompt in range(len(question.ids)):
        result_PK[prompt] = _path_scores(lm, question, prompt, layers, limit)[tuple(neurons_K2.T)]
    return result_PK


def log_probability_increase_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return the log-probability increase: f(unembed(h + a * v)) - f(unembed(h)).

    `h` is the residual stream that the feed-forward's output joins: its layer's input plus its attention output, also
    where attention runs beside the feed-forward (GPT-NeoX, Phi). `a` is the activation that enters the down projection
    (whatever the model's site), `v` the neuron's row of that projection, and `unembed` the model's own final
    normalisation and head.

    Normalisations: where a family normalises the feed-forward's output before adding it (Gemma 2, OLMo 2), that one is
    frozen: a * v is scaled as it scaled the whole output. Where a layer normalises the sum (BERT), this is computed
    anew for each neuron, and so is the final normalisation. The authors' code freezes the final one instead, at the
    scale that it has behind the last layer.

    With the target `log-probability` this is the method of the source; other targets take the same difference.

    Source: Yu and Ananiadou, arXiv 2312.12141. Cost: a forward pass with a row for each layer, and one row of the head
    for each neuron.

    Raises
    ------
    NegError
        If the model has no such stream (Gemma 3n has several), or its head takes no rows that are not tokens (GPT
        BigCode).
    """
    result_PK = np.empty((len(question.ids), len(neurons_K2)), lm.result_type)
    limit = BatchLimit("neurons")
    with torch.no_grad(), in_float32(lm):
        for batch in probed_batches(lm, question.ids, batch_size=1):
            (prompt,) = batch.rows
            of_layers = _known_streams(batch, question.ids[prompt])
            for layer in np.unique(neurons_K2[:, 0]).tolist():
                chosen_K = neurons_K2[:, 0] == layer
                neurons = torch.from_numpy(neurons_K2[chosen_K, 1]).to(lm.device)
                increases_K = _increases(lm, question, prompt, layer, neurons, of_layers[layer], limit)
                result_PK[prompt, chosen_K] = increases_K.cpu()
    return result_PK


def _known_streams(batch: ProbedBatch, tokens: Sequence[int]) -> list[Stream]:
    """Return the stream of every layer, after a try of what is to be done with it."""
    try:
        of_layers = streams(batch, tokens)
        unembed(batch.lm, of_layers[-1].joined_H.expand(2, -1))
    except Exception as error:  # a model's own code can fail in any way
        if is_out_of_memory(error):
            raise
        raise NegError(
            f"log-probability increase does not exist for {batch.lm.card.name}, whose layers write to no single stream "
            f"that its head reads row by row ({first_line(error):.100}); leave this estimator out"
        ) from error
    return of_layers


def ablation_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return the exact ablation: f(a) - f(0), each neuron set to zero by itself.

    Source: the definition of zero ablation. Cost: for each neuron, one virtual token (causal models) or one forward
    pass (masked models).
    """
    return score_replacement(lm, question, neurons_K2, lambda: 0.0)


ESTIMATORS: MappingProxyType[str, Estimator] = MappingProxyType(
    {
        "neurgrad": neurgrad_scores,
        "gradient": gradient_scores,
        "gradient_x_activation": gradient_times_activation_scores,
        "integrated_gradients": integrated_gradients_scores,
        "log_probability_increase": log_probability_increase_scores,
        "ablation": ablation_scores,
        "attribution_patching": attribution_patching_scores,
        "atp_star": atp_star_scores,
        "relp": relevance_patching_scores,
        "mean_ablation": mean_ablation_scores,
        "resample_ablation": resample_ablation_scores,
    }
)
"""Estimators by name."""

WITH_REFERENCES: MappingProxyType[str, Literal["each", "any"]] = MappingProxyType(
    {
        "attribution_patching": "each",
        "atp_star": "each",
        "relp": "each",
        "mean_ablation": "any",
        "resample_ablation": "each",
    }
)
"""Estimators that take activations from other prompts: from one for each prompt, or from any number for all."""


def _reference_ids(
    lm: LanguageModel, references: Sequence[str] | EncodedPrompts, estimator: str, n_prompts: int
) -> Sequence[list[int]]:
    try:
        ids = references.ids if isinstance(references, EncodedPrompts) else encode_prompts(lm.card, references)
    except PromptError as error:
        raise PromptError(f"references: {error}") from None
    if WITH_REFERENCES[estimator] == "each" and len(ids) != n_prompts:
        raise PromptError(f"{len(ids)} references were given for {n_prompts} prompts; give one for each")
    return ids


def unembed(lm: LanguageModel, hidden_RH: Tensor) -> Tensor:
    """Return the logits (R, V) that the model's own final norm and head give residual streams of the last layer."""

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        return (hidden_RH[None], *output[1:]) if isinstance(output, tuple) else hidden_RH[None]

    # Everything after the layers treats tokens alike, so the pass of one token is enough: its last stream is replaced.
    handle = lm.last_block.register_forward_hook(replace)
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
        output = lm.model(input_ids=token, attention_mask=torch.ones_like(token))
    finally:
        handle.remove()
    return output.logits.reshape(len(hidden_RH), -1)  # type: ignore[no-any-return]


def _path_scores(
    lm: LanguageModel, question: Question, prompt: int, layers: Sequence[int], limit: BatchLimit
) -> Tensor:
    """Return the integrated gradients of one prompt: shape (L, N)."""
    parts: list[Tensor] = []

    def measure(batch: ProbedBatch, steps: list[int]) -> None:
        parts.append(_path_part(batch, steps, question, prompt, layers))

    # Every row is the same prompt, so a causal model runs all its tokens but the last once.
    measure_batches(lm, [question.ids[prompt]] * PATH_STEPS, measure, limit, max_rows=PATH_STEPS)
    return sum(parts, start=torch.zeros(()))


def _path_part(
    batch: ProbedBatch, steps: Sequence[int], question: Question, prompt: int, layers: Sequence[int]
) -> Tensor:
    """Sum the terms of the integrated gradients over some steps of one prompt's path: shape (L, N)."""
    lm = batch.lm
    scores_LN = torch.zeros(lm.n_layers, lm.layer_width, dtype=torch.float64)
    scales_B1 = (torch.tensor(steps, dtype=torch.float64, device=lm.device)[:, None] + 0.5) / PATH_STEPS
    with torch.no_grad():
        activations_LN = batch.predict().activations_BLN[0]
    for layer in layers:
        shift_BN = ((scales_B1 - 1) * activations_LN[layer]).to(lm.model.dtype).requires_grad_()
        (gradient_BN,), _ = row_gradients(batch, question, [prompt] * len(steps), {layer: shift_BN})
        scores_LN[layer] = (gradient_BN.sum(0) * activations_LN[layer] / PATH_STEPS).double().cpu()
    return scores_LN


def _increases(
    lm: LanguageModel,
    question: Question,
    prompt: int,
    layer: int,
    neurons_K: Tensor,
    stream: Stream,
    limit: BatchLimit,
) -> Tensor:
    """Return the log-probability increases of some neurons of one layer: shape (K,)."""
    rows_NH = lm.down_rows(layer).to(stream.acts_N)
    neurons_K = neurons_K.to(rows_NH.device)  # a layer may be on another device

    def part_increases(indices: list[int]) -> Tensor:
        part = neurons_K[indices]
        written_RH = stream.acts_N[part, None] * rows_NH[part]
        logits_RV = unembed(lm, stream.join(nn.functional.pad(written_RH, (0, 0, 1, 0))))  # row 0 writes nothing
        log_probs_RO = label_log_probs(logits_RV, question.labels([prompt] * len(logits_RV), lm))
        targets_R = question.values(log_probs_RO, [prompt] * len(logits_RV))
        return targets_R[1:] - targets_R[0]

    return torch.cat(limit.compute(len(neurons_K), head_rows(lm), part_increases))
