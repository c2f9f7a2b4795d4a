"""Estimators of what a neuron contributes beyond its value in another prompt: patching, measured and estimated.

`f` is the target as a function of the neuron's activation `a`, `a'` the activation that takes its place: that of the
same neuron at the probed token of another prompt, the prompt's reference. A reference may be a counterfactual (the same
prompt but for what is asked), or any other prompt, whose value is then a resample. All scores are in target and have
the sign of f(a) - f(a'): what the prompt's own value adds.

Shapes: P prompts, K chosen neurons, B rows of a batch, R rows of one prompt.
"""

import numpy as np
import torch
from torch import Tensor

from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.measure.dropped_layers import dropping, n_blocks
from negcore.measure.forward import ProbedBatch, measure_batches, stacked_layers
from negcore.measure.hooks import zero_shifts
from negcore.measure.memory import BatchLimit
from negcore.measure.question import Question, read_activations, row_gradients, score_replacement, score_rows
from negcore.measure.relevance import propagation_rules
from negcore.model.language_model import LanguageModel


def attribution_patching_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return attribution patching: f'(a) * (a - a'), the first-order estimate of f(a) - f(a').

    Source: Nanda (2023), "Attribution patching"; Kramar et al., arXiv 2403.00745, equation 4, whose sign is that of
    f(a') - f(a). Cost: two forward passes (prompt and reference) and one backward pass.
    """
    replaced_PK = torch.from_numpy(read_activations(lm, question.references, neurons_K2)).to(lm.device)

    def score(gradient_BK: Tensor, activations_BK: Tensor, prompts: list[int]) -> Tensor:
        return gradient_BK.double() * (activations_BK.double() - replaced_PK[prompts])

    return score_rows(lm, question, neurons_K2, score)


def atp_star_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return AtP* of feed-forward neurons: sgn(f'(a) * (a - a')) * sum over layers l of |f_l'(a) * (a - a')| / (L - 1).

    f_l' is the gradient where nothing flows back through what layer l adds to the residual stream (GradDrop), so that
    a direct effect and one through a later layer which cancel each other are not lost. The neuron's own layer gives a
    term of zero, hence L - 1.

    AtP*'s other change, the QK fix, recomputes the softmax where queries and keys are patched. It is for these nodes
    alone: feed-forward neurons take GradDrop and nothing else, in the source too.

    Where layers normalise the sum that they write to (BERT), f_l' flows through these normalisations and nothing else.

    Differs from the source: it has no sign, and averages sizes over pairs of prompts; the sign of attribution patching
    is kept here. Source: Kramar et al., arXiv 2403.00745, equation 11.
    Cost: two forward passes, of which that of the probed token has L + 1 rows, and one backward pass of these rows.

    Raises
    ------
    NegError
        If the model has one layer, or layers that write to more than one stream (Gemma 3n).
    """
    if n_blocks(lm) == 1:
        raise NegError(f"AtP* drops one layer after the other, and {lm.card.name} has one; leave this estimator out")
    replaced_PK = read_activations(lm, question.references, neurons_K2)
    result_PK = np.empty((len(question.ids), len(neurons_K2)), lm.result_type)
    limit = BatchLimit("dropped layers")
    for prompt in range(len(question.ids)):
        gradients_RK, activations_K = _dropped_gradients(lm, question, prompt, neurons_K2, limit)
        effects_RK = gradients_RK * (activations_K - replaced_PK[prompt])
        result_PK[prompt] = np.sign(effects_RK[-1]) * np.abs(effects_RK[:-1]).sum(0) / (n_blocks(lm) - 1)
    return result_PK


def relevance_patching_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return relevance patching (RelP): attribution patching, f'(a) * (a - a'), with LRP's coefficients for f'(a).

    They are gradients of the model with each of these replaced by a linear map that has the same value here:
    normalisations keep their scale (LN-rule), an activation function z(x) is x * z/x (Identity-rule), and each factor
    of gate times up gets half of the product's gradient (Half-rule). These three are those of the authors' released
    example; their rule for attention (AH-rule, fixed attention weights) is not among them. So at the site `up`, which
    is such a factor, coefficients are half as large as at `act`.

    Source: Jafari et al., arXiv 2508.21258. Cost: two forward passes and one backward pass, as attribution patching.
    """
    with propagation_rules(lm):
        return attribution_patching_scores(lm, question, neurons_K2)


def mean_ablation_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return the mean ablation, measured: f(a) - f(m), m the neuron's mean activation over all references.

    Source: Wang et al., arXiv 2211.00593. Cost: a forward pass of each reference; for each neuron of each prompt one
    virtual token (causal models) or one forward pass (masked models).
    """

    def replace() -> Floats:
        mean_K: Floats = read_activations(lm, question.references, neurons_K2).mean(0)
        return mean_K

    return score_replacement(lm, question, neurons_K2, replace)


def resample_ablation_scores(lm: LanguageModel, question: Question, neurons_K2: Ints) -> Floats:
    """Return the resample ablation, measured: f(a) - f(a'). With counterfactual references it is activation patching.

    Source: Chan et al. (2022), "Causal scrubbing"; Vig et al., arXiv 2004.12265. Cost: a forward pass of each
    reference; for each neuron of each prompt one virtual token (causal models) or one forward pass (masked models).
    """
    return score_replacement(lm, question, neurons_K2, lambda: read_activations(lm, question.references, neurons_K2))


def _dropped_gradients(
    lm: LanguageModel, question: Question, prompt: int, neurons_K2: Ints, limit: BatchLimit
) -> tuple[Floats, Floats]:
    """Return one prompt's gradients (R, K), with each layer dropped and, last, with none; and activations (K,)."""
    n_rows = n_blocks(lm) + 1
    gradients_RK, activations_RK = np.empty((2, n_rows, len(neurons_K2)))

    def measure(batch: ProbedBatch, rows: list[int]) -> None:
        shifts = zero_shifts(lm, len(rows))
        with dropping(lm, rows):
            found = row_gradients(batch, question, [prompt] * len(rows), shifts)
        chosen = found.chosen(lm, neurons_K2)
        gradients_RK[rows] = chosen.values(stacked_layers(lm, found.gradients, dim=1)).double().cpu().numpy()
        activations_RK[rows] = chosen.values(found.activations_BLN).double().cpu().numpy()

    # Every row is the same prompt, so a causal model runs all its tokens but the last once.
    measure_batches(lm, [question.ids[prompt]] * n_rows, measure, limit, max_rows=n_rows)
    return gradients_RK, activations_RK[-1]
