"""The question that estimators answer: prompts, a target, and the prompts from which neurons take another value.

Shapes: P prompts, O options (labels), K chosen neurons, L layers, N neurons a layer (with experts: those of a prompt),
B rows of a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from negcore.arrays import Floats, Ints
from negcore.errors import LabelError
from negcore.measure.active import Chosen, empty_values, experts_of
from negcore.measure.forward import ProbedBatch, measure_batches, stacked_layers
from negcore.measure.hooks import zero_shifts
from negcore.measure.memory import BatchLimit
from negcore.measure.virtual_tokens import Shifts, label_log_probs, shifted_prompts
from negcore.model.encoding import EncodedPrompts, Labels, encode, encode_targets
from negcore.model.experts import Routing
from negcore.model.language_model import LanguageModel
from negcore.model.precision import in_float32
from negcore.targets import Target, check_options, target_values

# Most bytes of the logits of a batch with gradients.
_BATCH_LOGIT_BYTES = 2**28
# Most prompts whose activations are read side by side.
_READ_ROWS = 128


@dataclass(frozen=True, slots=True)
class Question:
    """Prompts with the target that is explained: a value of each prompt's right label."""

    prompts: EncodedPrompts
    answers_P: Ints
    """Index of the right label."""
    target: Target
    references: Sequence[list[int]] = ()
    """Token ids of the prompts whose activations take the place of these prompts', as estimators need them."""

    @property
    def ids(self) -> list[list[int]]:
        return self.prompts.ids

    @property
    def answer_ids_P(self) -> Ints:
        """Token id of each prompt's right label."""
        return self.prompts.label_ids_PO[np.arange(len(self.ids)), self.answers_P]

    def labels(self, rows: Sequence[int], lm: LanguageModel) -> Tensor:
        """Return the token ids of some prompts' labels: shape (B, O)."""
        return torch.from_numpy(self.prompts.label_ids_PO[rows]).to(lm.device)

    def values(self, log_probs_BO: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the target of some prompts from the log-probabilities of their labels: shape (B,)."""
        right_B1 = torch.from_numpy(self.answers_P[rows]).to(log_probs_BO.device)[:, None]
        return target_values(self.target, log_probs_BO).gather(1, right_B1)[:, 0]


def asked(
    lm: LanguageModel,
    prompts: Sequence[str] | EncodedPrompts,
    labels: str | Labels | None,
    answers: Sequence[int] | Ints | None,
    target: Target,
) -> Question:
    """Return the question of a target, checked.

    Parameters
    ----------
    labels : str, or as for `neurgrad`
        Without answers there is one label for each prompt: a string for all prompts, or one for each.
    answers : sequence of int, length P, optional
        Index of each prompt's right label.

    Raises
    ------
    PromptError, LabelError
        As for `neurgrad`; LabelError too if the answers do not fit.
    """
    if answers is None:
        check_options(target, 1, "give every prompt's labels, and by answers which of them is right")
        encoded = encode_targets(lm.card, prompts, labels)  # type: ignore[arg-type]  # refuses what is no such label
        return Question(encoded, np.zeros(len(encoded.ids), np.int64), target)
    if isinstance(labels, str):
        raise LabelError(f"labels {labels!r:.80}: beside answers, give a list of labels, or one for each prompt")
    encoded = encode(lm.card, prompts, labels)
    return Question(encoded, checked_answers(answers, encoded.label_ids_PO, target), target)


def checked_answers(answers: Sequence[int] | Ints | None, label_ids_PO: Ints, target: Target) -> Ints:
    """Return the index of each prompt's right label, shape (P,); without answers there has to be one label.

    Raises
    ------
    LabelError
        If they do not fit the labels, or the target compares labels and there is one.
    """
    n_prompts, n_options = label_ids_PO.shape
    check_options(target, n_options)
    if answers is None and n_options > 1:
        raise LabelError(f"{n_options} labels were given without answers; say which label is right for each prompt")
    answers_P = np.zeros(n_prompts, np.int64) if answers is None else np.asarray(answers)
    if answers_P.shape != (n_prompts,) or not np.issubdtype(answers_P.dtype, np.integer):
        raise LabelError(f"answers of shape {answers_P.shape} do not fit {n_prompts} prompts; give one index for each")
    for index in np.flatnonzero((answers_P < 0) | (answers_P >= n_options)):
        raise LabelError(f"answer {answers_P[index]} of prompt {index} is no label; give 0 to {n_options - 1}")
    return answers_P.astype(np.int64)


class RowGradients(NamedTuple):
    """Gradient of each row's target by each layer's shift, with activations and experts."""

    gradients: tuple[Tensor, ...]
    """One tensor (B, N) for each layer that was shifted."""
    activations_BLN: Tensor
    routings: Mapping[int, Routing]

    def chosen(self, lm: LanguageModel, neurons_K2: Ints) -> Chosen:
        """Find neurons in the rows."""
        return Chosen.of(lm, experts_of(self.routings), neurons_K2, len(self.activations_BLN))


def row_gradients(
    batch: ProbedBatch, question: Question, prompts: Sequence[int], shifts: dict[int, Tensor]
) -> RowGradients:
    """Differentiate each row's target by each layer's shift.

    `prompts` names the prompt of each row.

    Raises
    ------
    ModelError
        If the model's gradients failed its check at load.
    """
    batch.lm.require("neurgrad")
    with torch.enable_grad():
        logits_BV, activations_BLN, routings = batch.predict(shifts)
        log_probs_BO = label_log_probs(logits_BV, question.labels(prompts, batch.lm))
        # Rows do not see each other, so the gradient of their sum is each row's own.
        total = question.values(log_probs_BO, prompts).sum()
        return RowGradients(torch.autograd.grad(total, list(shifts.values())), activations_BLN, routings)


def score_gradients(
    lm: LanguageModel, question: Question, neurons_K2: Ints, score: Callable[[Tensor, Tensor], Tensor]
) -> Floats:
    """Score neurons by a function of gradient and activation, both of shape (B, K)."""
    return score_rows(lm, question, neurons_K2, lambda gradient, a, prompts: score(gradient, a))


def score_rows(
    lm: LanguageModel, question: Question, neurons_K2: Ints, score: Callable[[Tensor, Tensor, list[int]], Tensor]
) -> Floats:
    """Score neurons by a function of gradient, activation and the prompts of their rows.

    Of a mixture of experts, the scores of neurons that a prompt does not have are masked.
    """
    result_PK = empty_values(lm, len(question.ids), len(neurons_K2))

    def measure(batch: ProbedBatch, prompts: list[int]) -> None:
        found = row_gradients(batch, question, prompts, zero_shifts(lm, len(prompts)))
        chosen = found.chosen(lm, neurons_K2)
        gradient_BK = chosen.values(stacked_layers(lm, found.gradients, dim=1))
        scores_BK = score(gradient_BK, chosen.values(found.activations_BLN), prompts)
        result_PK[prompts] = chosen.masked(scores_BK.double().cpu().numpy())

    max_rows = _BATCH_LOGIT_BYTES // (4 * lm.card.vocab_size)
    measure_batches(lm, question.ids, measure, BatchLimit("prompts"), max_rows=max_rows)
    return result_PK


def read_activations(lm: LanguageModel, ids: Sequence[list[int]], neurons_K2: Ints) -> Floats:
    """Return some neurons' activations at the probed token of some prompts: shape (P, K), float64.

    Of a mixture of experts, those that a prompt does not have are masked.
    """
    result_PK = empty_values(lm, len(ids), len(neurons_K2), np.float64)

    def measure(batch: ProbedBatch, prompts: list[int]) -> None:
        _, activations_BLN, routings = batch.predict()
        chosen = Chosen.of(lm, experts_of(routings), neurons_K2, len(prompts))
        result_PK[prompts] = chosen.masked(chosen.values(activations_BLN).double().cpu().numpy())

    with torch.no_grad():
        measure_batches(lm, ids, measure, BatchLimit("prompts"), max_rows=_READ_ROWS)
    return result_PK


def score_replacement(
    lm: LanguageModel, question: Question, neurons_K2: Ints, replace: Callable[[], Floats | float]
) -> Floats:
    """Measure what each neuron loses by another value: f(a) - f(a').

    Parameters
    ----------
    replace : callable
        Returns a', of shape (P, K) or for all; called while half types compute in float32, as the measurement does.
    """
    result_PK = empty_values(lm, len(question.ids), len(neurons_K2))
    with in_float32(lm):
        replaced_PK = np.broadcast_to(np.float64(replace()), result_PK.shape)
        for index, prompt in shifted_prompts(lm, question.prompts):
            layers_K, places_K = neurons_K2[:, 0], prompt.places_of(*neurons_K2.T)
            there_K = np.flatnonzero(places_K >= 0)
            if not there_K.size:
                continue
            layers_K, places_K = layers_K[there_K], places_K[there_K]
            sizes_K = replaced_PK[index, there_K] - prompt.activations_LN[layers_K, places_K].double().cpu().numpy()
            measured = prompt.measure(Shifts(layers_K, places_K, sizes_K))
            with_K, whole_K = (question.values(log_probs_KO, [index] * len(sizes_K)) for log_probs_KO in measured)
            result_PK[index, there_K] = whole_K - with_K
    return result_PK
