"""Tables of `neg steer`: the answers side by side, and what the shifts do to the run's datasets."""

from collections.abc import Sequence

from flows.show.table import Cell, Number, Table, Words, interval, numbers, texts
from flows.show.text import change, share
from negcore.measure.steering import Answer, SteeredAnswer
from tasks.steer import Asked, SideEffect

_END_CHARACTERS = 160
"""A prompt is shown by its end: what is asked stands there."""


def answers_table(asked: Sequence[Asked], answers: Sequence[SteeredAnswer], about: str) -> Table:
    """Return the answers to every prompt before and after; `about` says what was shifted."""
    blocks: list[list[list[Cell]]] = [
        [[_row(of), _end(one.prompt), _answer(one.before), _answer(one.after, one.before)]]
        for of, one in zip(asked, answers, strict=True)
    ]
    caption = (
        "The likeliest token is written each time; under an answer, the mean probability of its tokens. Shifted at the "
        "prompt's last token and at every written one; '...': the most tokens were written."
    )
    columns = texts("row", "prompt", "before", "after")
    return Table("answers", f"Answers of {about}", columns, blocks, caption)


def _row(asked: Asked) -> Cell:
    return (asked.row, Words(f"\ngold: {asked.gold.strip()}", "dim")) if asked.row else "by hand"


def _end(prompt: str) -> str:
    return prompt if len(prompt) <= _END_CHARACTERS else f"... {prompt[-_END_CHARACTERS:]}"


def _answer(answer: Answer, other: Answer | None = None) -> Cell:
    if other is not None and other.ids == answer.ids:
        return Words("the same", "dim")
    if not answer.ids:
        return Words("(ends at once)", "dim")
    text = answer.text + ("" if answer.is_ended else " ...")
    return (text, Words(f"\n{share(sum(answer.probs) / len(answer.probs))}", "dim"))


def effects_table(effects: Sequence[SideEffect], chosen_on: str | None) -> Table:
    """Return the accuracies before and after on each dataset.

    Parameters
    ----------
    chosen_on : str, optional
        The dataset that the neurons were chosen on.
    """
    rows: list[list[Cell]] = [
        [
            (one.dataset, Words("\nneurons chosen here", "dim")) if one.dataset == chosen_on else one.dataset,
            Number(one.effect.n_prompts),
            Number(one.effect.base_accuracy, share),
            Number(one.effect.accuracy, share),
            (
                Number(one.effect.accuracy_change, change),
                Words(interval(one.effect.change_low, one.effect.change_high, change, ", "), "dim"),
            ),
            (
                Number(one.effect.prob_change, change),
                Words(interval(one.effect.prob_low, one.effect.prob_high, change, ", "), "dim"),
            ),
        ]
        for one in effects
    ]
    caption = (
        "Test rows of the run's datasets; the answer is the most probable option. Shifted at the prompt's last token. "
        "Below a change: 95 % bootstrap interval over rows."
    )
    columns = [*texts("dataset"), *numbers("rows", "before", "after", "change", "p(right option)")]
    return Table("side-effects", "Accuracy before and after, by dataset", columns, [rows], caption)
