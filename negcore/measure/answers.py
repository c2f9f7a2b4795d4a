"""Answers that follow a prompt token by token, and neurons that are read at a token before its end.

The usual prediction leads from the prompt's last token to one token behind it, see `negcore.measure.forward`. Here a
row is a prompt with one of its options under teacher forcing: the option's tokens stand behind the prompt, but for the
last, and each is predicted from those before it. The probability of the option is the product of theirs. The graph
leads from the probed token over all tokens behind it; keys and values of those before it are constants.

Shapes: B prompts of a batch, O options, R rows (B * O, the options of a prompt side by side), T tokens of a pass,
A tokens of the longest option, K tokens of a pass that predict one, N neurons a layer, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from negcore.errors import ModelError
from negcore.measure.forward import (
    LAST_ROWS,
    TOKEN_BUDGET,
    CausalBatch,
    common_prefix_length,
    on_device,
    shared_tokens,
    stacked_layers,
)
from negcore.measure.hooks import Readings, tapped
from negcore.measure.memory import BatchLimit
from negcore.measure.passing import passes
from negcore.model.encoding import EncodedPrompts
from negcore.model.language_model import LanguageModel
from negcore.model.past import KeysValues

# Most bytes of the logits of a pass with a graph: rows x tokens x vocabulary.
_LOGIT_BYTES = 2**28


class AnswerRow(NamedTuple):
    """A prompt with one of its options."""

    tokens: list[int]
    """The prompt's, and the option's but the last, from which nothing is predicted."""
    probed: int
    """Place of the probed token."""
    answer: list[int]
    """The option's tokens."""

    @property
    def n_with_graph(self) -> int:
        """Tokens from the probed one on."""
        return len(self.tokens) - self.probed


def answer_rows(encoded: EncodedPrompts, prompt: int) -> list[AnswerRow]:
    """Return one prompt with each of its options."""
    tokens = encoded.ids[prompt]
    probed = len(tokens) - 1 if encoded.probed_P is None else int(encoded.probed_P[prompt])
    if encoded.label_tokens_PO is not None:
        answers = encoded.label_tokens_PO[prompt]
    else:
        answers = [[label] for label in encoded.label_ids_PO[prompt].tolist()]
    return [AnswerRow([*tokens, *answer[:-1]], probed, answer) for answer in answers]


class AnswerPrediction(NamedTuple):
    """Result of one pass of rows."""

    log_probs_R: Tensor
    """Of each row's option: the sum over its tokens, softmax over the whole vocabulary; at least float32."""
    activations_RLN: Tensor
    """At the probed tokens, before any shift, detached."""


class AnswerBatch(ABC):
    """Some prompts with their options, a row for each.

    Parameters
    ----------
    rows_BO : sequence of B sequences of O AnswerRows
        As many options for every prompt.
    """

    def __init__(self, lm: LanguageModel, rows_BO: Sequence[Sequence[AnswerRow]]) -> None:
        self.lm, self.n_options = lm, len(rows_BO[0])
        rows = [row for of_prompt in rows_BO for row in of_prompt]
        self.n_rows = len(rows)
        longest = max(len(row.answer) for row in rows)
        self._targets_RA = on_device(lm, [[*row.answer, *[0] * (longest - len(row.answer))] for row in rows])
        # A place behind the option's own predicts nothing that counts.
        at = [[start + min(step, len(row.answer) - 1) for step in range(longest)] for row, start in self._starts(rows)]
        places = sorted({place for of_row in at for place in of_row})
        self._places_K = on_device(lm, places)
        self._at_RA = on_device(lm, [[places.index(place) for place in of_row] for of_row in at])
        lengths_R = on_device(lm, [len(row.answer) for row in rows])
        self._is_there_RA = torch.arange(longest, device=lm.device) < lengths_R[:, None]

    def _starts(self, rows: Sequence[AnswerRow]) -> list[tuple[AnswerRow, int]]:
        """Return rows with the place in the pass that predicts the first token of the option."""
        return [(row, len(row.tokens) - len(row.answer) - self._first(row)) for row in rows]

    def predict(self, shifts: Mapping[int, Tensor] | None = None) -> AnswerPrediction:
        """Predict the options with the neurons of the probed tokens shifted.

        Parameters
        ----------
        shifts : mapping of layer to Tensor of shape (R, N), in units of activation, optional

        Returns
        -------
        AnswerPrediction
            With a graph from the shifts where gradients are enabled.
        """
        # Most models can leave out the logits of tokens that predict nothing here, which is most of the work of some.
        can_leave_out = "logits_to_keep" in signature(self.lm.model.forward).parameters
        with tapped(self.lm, self._positions_R(), shifts) as readings:
            logits = self._logits(**({"logits_to_keep": self._places_K} if can_leave_out else {}))
        logits_RKV = logits if can_leave_out else logits[:, self._places_K]
        return AnswerPrediction(self._log_probs(logits_RKV), _stacked(self.lm, readings))

    def _log_probs(self, logits_RKV: Tensor) -> Tensor:
        rows_R1 = torch.arange(self.n_rows, device=logits_RKV.device)[:, None]
        logits_RAV = logits_RKV[rows_R1, self._at_RA.to(logits_RKV.device)]
        kind = torch.float64 if logits_RAV.dtype == torch.float64 else torch.float32
        log_probs_RA = logits_RAV.log_softmax(-1, dtype=kind).gather(-1, self._targets_RA[..., None])[..., 0]
        return log_probs_RA.where(self._is_there_RA, 0.0).sum(1)

    @abstractmethod
    def _first(self, row: AnswerRow) -> int:
        """Return the place in the row of the first token of the pass."""

    @abstractmethod
    def _positions_R(self) -> Tensor:
        """Return the place of each row's probed token in the pass."""

    @abstractmethod
    def _logits(self, **options: Any) -> Tensor:
        """Return the logits of all tokens of the pass, (R, T, V), or of those that the options ask for."""


class WholeAnswers(AnswerBatch):
    """Rows that run whole, padded at their ends, where no token that counts sees the padding."""

    def __init__(self, lm: LanguageModel, rows_BO: Sequence[Sequence[AnswerRow]]) -> None:
        super().__init__(lm, rows_BO)
        rows = [row for of_prompt in rows_BO for row in of_prompt]
        self._ids_RT = on_device(lm, _padded([row.tokens for row in rows]))
        self._probed_R = on_device(lm, [row.probed for row in rows])

    def _first(self, row: AnswerRow) -> int:
        return 0

    def _positions_R(self) -> Tensor:
        return self._probed_R

    def _logits(self, **options: Any) -> Tensor:
        logits: Tensor = self.lm.model(input_ids=self._ids_RT, use_cache=False, **options).logits
        return logits


class CachedAnswers(AnswerBatch):
    """Rows of which only the tokens from the probed one on run: what comes before it is kept, once for all options.

    Parameters
    ----------
    shared : sequence of KeysValues, one a layer
        Of the tokens that all prompts begin with, before their probed tokens.
    """

    def __init__(self, lm: LanguageModel, rows_BO: Sequence[Sequence[AnswerRow]], shared: Sequence[KeysValues]) -> None:
        super().__init__(lm, rows_BO)
        rows = [row for of_prompt in rows_BO for row in of_prompt]
        before = [of_prompt[0].tokens[: of_prompt[0].probed + 1] for of_prompt in rows_BO]
        self._batch = CausalBatch(lm, range(len(rows_BO)), before, shared).repeated(self.n_options)
        self._ids_RT = on_device(lm, _padded([row.tokens[row.probed :] for row in rows]))
        self._counts_R = on_device(lm, [row.n_with_graph for row in rows])

    def _first(self, row: AnswerRow) -> int:
        return row.probed

    def _positions_R(self) -> Tensor:
        return self._batch.positions_B

    def _logits(self, **options: Any) -> Tensor:
        logits: Tensor = self._batch.run_on(self.lm.model, self._ids_RT, self._counts_R, **options).logits
        return logits


def measure_answers(
    lm: LanguageModel,
    encoded: EncodedPrompts,
    measure: Callable[[AnswerBatch, list[int]], None],
    limit: BatchLimit,
    *,
    batch_size: int | None = None,
) -> None:
    """Run prompts with their options in batches of similar length; they are halved where memory runs out.

    Parameters
    ----------
    measure : callable
        Takes a batch and the indices of its prompts.
    batch_size : int, optional
        Most prompts of a batch; by default as many as fit in a budget of tokens and of logits.

    Raises
    ------
    ModelError
        If the model has experts, or weights that pass through its device.
    """
    refuse_unfit(lm)
    rows_PO = [answer_rows(encoded, prompt) for prompt in range(len(encoded.ids))]
    shared = _shared(lm, encoded, rows_PO)

    def work(todo: list[int], size: int) -> Iterator[list[int]]:
        for prompts in _by_length(lm, rows_PO, todo, size, is_fixed=batch_size is not None):
            rows_BO = [rows_PO[prompt] for prompt in prompts]
            measure(WholeAnswers(lm, rows_BO) if _runs_whole(lm) else CachedAnswers(lm, rows_BO, shared), prompts)
            yield prompts

    limit.run(len(rows_PO), batch_size or LAST_ROWS, work)


def refuse_unfit(lm: LanguageModel) -> None:
    """Refuse models whose answers cannot be followed over several tokens.

    Raises
    ------
    ModelError
    """
    lm.refuse_experts("answers of several tokens and probed tokens before a prompt's end")
    if passes(lm):
        raise ModelError(
            f"{lm.card.name}: weights that wait on cpu or disk pass for the last token of a prompt alone; for "
            "probe_at and answers: sequence leave out device_map, or spread the model with gpus"
        )


def _runs_whole(lm: LanguageModel) -> bool:
    """Tell whether rows run whole: also those of a type that was searched, as no check at load is of several tokens."""
    return lm.way == "whole" or lm.arch.discovered


def _shared(lm: LanguageModel, encoded: EncodedPrompts, rows_PO: Sequence[Sequence[AnswerRow]]) -> list[KeysValues]:
    """Return the keys and values of what all prompts begin with, up to the first probed token."""
    if _runs_whole(lm):
        return []
    before = [rows[0].tokens[: rows[0].probed + 1] for rows in rows_PO]
    n_shared = common_prefix_length(before)
    if encoded.n_shared is not None:
        n_shared = min(n_shared, encoded.n_shared)
    return shared_tokens(lm, before[0], n_shared)


def _by_length(
    lm: LanguageModel, rows_PO: Sequence[Sequence[AnswerRow]], todo: Sequence[int], size: int, *, is_fixed: bool
) -> list[list[int]]:
    """Part prompts into batches of similar length, none larger than `size` or, unless that is fixed, the budget."""

    def length(prompt: int) -> tuple[int, int]:
        rows = rows_PO[prompt]
        longest = max(len(row.tokens) for row in rows)
        return (longest if _runs_whole(lm) else max(row.n_with_graph for row in rows)), longest

    budget = max(1, min(TOKEN_BUDGET, _LOGIT_BYTES // (4 * lm.card.vocab_size)))
    groups: list[list[int]] = []
    for prompt in sorted(todo, key=lambda prompt: (*length(prompt), prompt)):
        most = size if is_fixed else min(size, budget // (length(prompt)[0] * len(rows_PO[prompt])))
        if not groups or len(groups[-1]) >= max(1, most):
            groups.append([])
        groups[-1].append(prompt)
    return groups


def _padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    longest = max(map(len, rows))
    return [[*row, *[0] * (longest - len(row))] for row in rows]


def _stacked(lm: LanguageModel, readings: Readings) -> Tensor:
    return stacked_layers(lm, [readings[layer] for layer in range(lm.n_layers)], dim=1)
