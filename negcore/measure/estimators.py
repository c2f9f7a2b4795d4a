"""Estimators of a neuron's effect on a target, under one interface, to compare with each other and with sweeps.

Every estimator scores each neuron of each prompt for the prompt's right label. `f` below is the target as a function
of the neuron's activation `a`, with everything else unchanged. It is the label's probability, its log-probability, or
its logit minus the largest logit among the prompt's other labels.

NeurGrad and the plain gradient are in target per unit of activation. The others are in target: they approximate the
activation's contribution f(a) - f(0), which the ablation measures exactly, or f(a) - f(a'), see
`negcore.measure.patching`.

Of a mixture of experts, a score is that of a neuron that the prompt has; those of others are masked.

Shapes: P prompts, O options (labels), K chosen neurons, L layers, N neurons a layer (with experts: those of a prompt),
B rows of a batch, R rows of a head, H hidden width.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from negcore.arrays import Floats, Ints
from negcore.errors import NegError, PromptError, first_line
from negcore.measure.active import Chosen, active_places, empty_values, experts_of
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
        In target, or target per unit of activation; float32, or float64 from a float64 model. Of a mixture of experts
        N counts all neurons of the widest layer, and what a prompt does not have is masked.

    Raises
    ------
    PromptError, LabelError
        As for `neurgrad`; LabelError too if the answers do not fit, or "logit-difference" is asked of one label;
        PromptError if references do not fit.
    NegError
        If the estimator or target is unknown, a neuron does not exist, or references are missing or not wanted;
        ModelError if the estimator needs gradients and the model's failed its check at load, or takes activations from
        other prompts and the model has experts.
    """
    if estimator not in ESTIMATORS:
        raise NegError(f"estimator {estimator!r} is not known; choose one of {', '.join(ESTIMATORS)}")
    if estimator in WITH_REFERENCES:
        lm.refuse_experts(f"{estimator} and other estimators that take activations from other prompts")
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
    return scores_PK if neurons is not None else _by_layer(lm, scores_PK, neurons_K2)


def _by_layer(lm: LanguageModel, scores_PM: Floats, neurons_M2: Ints) -> Floats:
    """Return the scores of all neurons as an array of shape (P, L, N)."""
    if not lm.has_experts:
        return scores_PM.reshape(-1, lm.n_layers, lm.layer_width)
    shape = len(scores_PM), lm.n_layers, lm.layer_width
    scores_PLN: Floats = np.ma.masked_array(np.zeros(shape, scores_PM.dtype), np.ones(shape, np.bool_))
    scores_PLN[:, *neurons_M2.T] = scores_PM
    return scores_PLN


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
    result_PK = empty_values(lm, len(question.ids), len(neurons_K2))
    limit = BatchLimit("steps of a path")
    for prompt in range(len(question.ids)):
        result_PK[prompt] = _path_scores(lm, question, prompt, neurons_K2, limit)
    return result_PK


def log_probability_increase_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return the log-probability increase: f(unembed(h + a * v)) - f(unembed(h)).

    `h` is the residual stream that the feed-forward's output joins: its layer's input plus its attention output, also
    where attention runs beside the feed-forward (GPT-NeoX, Phi). `a` is the activation that enters the down projection
    (whatever the model's site), `v` the neuron's row of that projection, and `unembed` the model's own final
    normalisation and head. In a layer of experts, `v` is times the router's weight, or the gate of shared experts.

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
    result_PK = empty_values(lm, len(question.ids), len(neurons_K2))
    limit = BatchLimit("neurons")
    with torch.no_grad(), in_float32(lm):
        for batch in probed_batches(lm, question.ids, batch_size=1):
            (prompt,) = batch.rows
            of_layers = _known_streams(batch, question.ids[prompt])
            experts = experts_of(batch.predict().routings) if lm.has_experts else {}
            (places_K,) = active_places(lm, experts, *neurons_K2.T)
            for layer in np.unique(neurons_K2[places_K >= 0, 0]).tolist():
                chosen_K = (neurons_K2[:, 0] == layer) & (places_K >= 0)
                places = torch.from_numpy(places_K[chosen_K]).to(lm.device)
                increases_K = _increases(lm, question, prompt, layer, places, of_layers[layer], limit)
                result_PK[prompt, chosen_K] = increases_K.cpu().numpy()
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


def _path_scores(lm: LanguageModel, question: Question, prompt: int, neurons_K2: Ints, limit: BatchLimit) -> Floats:
    """Return the integrated gradients of one prompt: shape (K,)."""
    parts: list[Floats] = []

    def measure(batch: ProbedBatch, steps: list[int]) -> None:
        parts.append(_path_part(batch, steps, question, prompt, neurons_K2))

    # Every row is the same prompt, so a causal model runs all its tokens but the last once.
    measure_batches(lm, [question.ids[prompt]] * PATH_STEPS, measure, limit, max_rows=PATH_STEPS)
    return sum(parts, start=np.zeros(len(neurons_K2)))


def _path_part(batch: ProbedBatch, steps: Sequence[int], question: Question, prompt: int, neurons_K2: Ints) -> Floats:
    """Sum the terms of the integrated gradients over some steps of one prompt's path: shape (K,)."""
    lm = batch.lm
    scores_1LN = torch.zeros(1, lm.n_layers, lm.active_width, dtype=torch.float64)
    scales_B1 = (torch.tensor(steps, dtype=torch.float64, device=lm.device)[:, None] + 0.5) / PATH_STEPS
    with torch.no_grad():
        _, activations_BLN, routings = batch.predict()
    for layer in np.unique(neurons_K2[:, 0]).tolist():
        activations_N = activations_BLN[0, layer, : lm.layer_shapes[layer].n_active]
        shift_BN = ((scales_B1 - 1) * activations_N).to(lm.model.dtype).requires_grad_()
        (gradient_BN,), *_ = row_gradients(batch, question, [prompt] * len(steps), {layer: shift_BN})
        scores_1LN[0, layer, : len(activations_N)] = (gradient_BN.sum(0) * activations_N / PATH_STEPS).double().cpu()
    first = {layer: routing.rows(slice(1)) for layer, routing in routings.items()}
    chosen = Chosen.of(lm, experts_of(first), neurons_K2, 1)
    scores_K: Floats = chosen.masked(chosen.values(scores_1LN).numpy())[0]
    return scores_K


def _increases(
    lm: LanguageModel,
    question: Question,
    prompt: int,
    layer: int,
    places_K: Tensor,
    stream: Stream,
    limit: BatchLimit,
) -> Tensor:
    """Return the log-probability increases of some neurons of one layer: shape (K,)."""
    rows_NH = (lm.down_rows(layer) if stream.rows_NH is None else stream.rows_NH).to(stream.acts_N)
    places_K = places_K.to(rows_NH.device)  # a layer may be on another device

    def part_increases(indices: list[int]) -> Tensor:
        part = places_K[indices]
        written_RH = stream.acts_N[part, None] * rows_NH[part]
        logits_RV = unembed(lm, stream.join(nn.functional.pad(written_RH, (0, 0, 1, 0))))  # row 0 writes nothing
        log_probs_RO = label_log_probs(logits_RV, question.labels([prompt] * len(logits_RV), lm))
        targets_R = question.values(log_probs_RO, [prompt] * len(logits_RV))
        return targets_R[1:] - targets_R[0]

    return torch.cat(limit.compute(len(places_K), head_rows(lm), part_increases))
