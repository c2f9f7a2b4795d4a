"""Probabilities of labels, by one forward pass of each prompt without gradients.

Shapes: P prompts, O options (labels).
"""

from collections.abc import Sequence

import numpy as np
import torch

from negcore.arrays import Floats
from negcore.measure.answers import AnswerBatch, measure_answers
from negcore.measure.forward import ProbedBatch, label_probabilities, measure_batches
from negcore.measure.memory import BatchLimit
from negcore.model.encoding import EncodedPrompts, Labels, encode
from negcore.model.language_model import LanguageModel

# Most bytes of a batch's logits: rows x vocabulary.
_LOGIT_BYTES = 2**28


def label_probs(
    lm: LanguageModel,
    prompts: Sequence[str] | EncodedPrompts,
    labels: Labels | None = None,
    *,
    batch_size: int | None = None,
) -> Floats:
    """Return the probability of every label after its prompt, softmax over the whole vocabulary.

    Parameters
    ----------
    lm, prompts, labels, batch_size
        As for `neurgrad`.

    Returns
    -------
    array of shape (P, O)
        A row's sum is the prompt's label mass.

    Raises
    ------
    PromptError, LabelError, RuntimeError
        As for `neurgrad`.
    """
    encoded = encode(lm.card, prompts, labels)
    label_ids_PO = torch.from_numpy(encoded.label_ids_PO)
    probs_PO = np.empty(encoded.label_ids_PO.shape, lm.result_type)

    def measure(batch: ProbedBatch, rows: list[int]) -> None:
        with torch.no_grad():
            logits_BV = batch.predict().logits_BV
            probs_PO[rows] = label_probabilities(logits_BV, label_ids_PO[rows].to(lm.device)).cpu().numpy()

    def measure_answer(batch: AnswerBatch, rows: list[int]) -> None:
        with torch.no_grad():
            log_probs_R = batch.predict().log_probs_R
            probs_PO[rows] = log_probs_R.exp().view(len(rows), -1).cpu().numpy()

    if not encoded.is_usual:
        measure_answers(lm, encoded, measure_answer, BatchLimit("prompts"), batch_size=batch_size)
        return probs_PO
    max_rows = max(1, _LOGIT_BYTES // (4 * lm.card.vocab_size))
    measure_batches(lm, encoded.ids, measure, BatchLimit("prompts"), batch_size=batch_size, max_rows=max_rows)
    return probs_PO
