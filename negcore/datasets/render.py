"""Turn rows into prompts, and decide whether labels begin with a space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from negcore.datasets.base import Example, Tokenizer, Wording
from negcore.datasets.chat import Chat, Turn
from negcore.datasets.rows import Row
from negcore.errors import LabelError, PromptError
from negcore.model.prompt_ids import AnswerKind, PromptReader, end_of_piece
from negcore.orders import LETTERS
from negcore.texts import row_text


def label_token(tokenizer: Tokenizer, prompt: str, label: str, *, masked: bool = False) -> int | None:
    """Return the token id of a label in its place, or None if it is not exactly one known token there.

    The place is behind the prompt or, for masked models, that of the prompt's mask. The rule is the one that
    measurements go by, see `negcore.model.prompt_ids`.
    """
    reader = PromptReader(tokenizer, masked=masked)
    ((found,),) = reader.label_ids([prompt], reader.read([prompt]), [[label]])
    return found if isinstance(found, int) else None


def choose_label_prefix(tokenizer: Tokenizer, prompt: str, labels: Sequence[str], *, masked: bool = False) -> str:
    """Decide whether labels begin with a space, by what the tokenizer makes of them in their place.

    Parameters
    ----------
    tokenizer : Tokenizer
    prompt : str
        Text that ends where the labels follow; for a masked model, text with its mask.
    labels : sequence of str
        Without leading space.
    masked : bool
        True if the label takes the place of a mask instead of following the prompt.

    Returns
    -------
    str
        A space if with it every label is one token of its own; else the empty string, if that holds without it. The
        empty string is tried first where the label begins anew: behind a line break, a space or a special token.

    Raises
    ------
    LabelError
        If neither holds.
    """
    return common_label_prefix(PromptReader(tokenizer, masked=masked), {"the prompt": (prompt, tuple(labels))})


def common_label_prefix(
    reader: PromptReader,
    asked: Mapping[str, tuple[str, tuple[str, ...]]],
    likely: str | None = None,
    answers: AnswerKind = "token",
) -> str:
    """Decide whether the labels of several prompts begin with a space.

    Parameters
    ----------
    reader : PromptReader
    asked : mapping
        Prompt and labels by the prompt's name.
    likely : str, optional
        Prefix to try first. By default as for `choose_label_prefix`.
    answers : {"token", "sequence"}
        With "sequence", labels of several tokens fit too.

    Raises
    ------
    LabelError
        If the labels of a prompt fit with neither, or prompts want different ones.
    """
    prompts, labels = [prompt for prompt, _ in asked.values()], [of_prompt for _, of_prompt in asked.values()]
    ids = reader.read(prompts)
    wrong: dict[str, dict[str, str]] = {}
    for prefix in label_prefixes(reader, prompts, ids, likely):
        prefixed = [[prefix + label for label in of_prompt] for of_prompt in labels]
        found = (reader.label_ids if answers == "token" else reader.label_tokens)(prompts, ids, prefixed)
        misfits = map(_misfit, labels, found)
        wrong[prefix] = {name: misfit for name, misfit in zip(asked, misfits, strict=True) if misfit}
        if not wrong[prefix]:
            return prefix
    for name in asked:
        if name in wrong[" "] and name in wrong[""]:
            raise LabelError(
                f"labels of {name}, which ends in {row_text(prompt_end(asked[name][0]))}, fit neither with a space "
                f"before them ({wrong[' '][name]}) nor without ({wrong[''][name]})"
            )
    raise LabelError(
        f"labels of {next(iter(wrong['']))} need a leading space and those of {next(iter(wrong[' ']))} must not "
        "have one; choose labels, or prompt endings, that are alike"
    )


def label_prefixes(
    reader: PromptReader, prompts: Sequence[str], ids: Sequence[list[int]], likely: str | None = None
) -> tuple[str, str]:
    """Return the prefixes to try, best first; arguments as of `common_label_prefix`, and the prompts' ids."""
    begins_new = likely == "" if likely is not None else reader.begins_new(prompts, ids)
    return ("", " ") if begins_new else (" ", "")


def _misfit(labels: Sequence[str], found: Sequence[int | list[int] | LabelError]) -> str:
    """Return why labels do not fit; empty if they do."""
    seen: dict[str, str] = {}
    for label, tokens in zip(labels, found, strict=True):
        if isinstance(tokens, LabelError):
            return f"{tokens}"
        shared = f"tokens {tokens}" if isinstance(tokens, list) else f"token {tokens}"
        if shared in seen:
            return f"labels {row_text(seen[shared])} and {row_text(label)} share {shared}; each needs its own"
        seen[shared] = label
    return ""


def prompt_end(prompt: str) -> str:
    """Return the last word of a prompt and the spaces after it, which decide how a tokenizer continues."""
    words = prompt.rsplit(maxsplit=1)
    trailing = prompt[len(prompt.rstrip()) :]
    return words[-1].rstrip() + trailing if words else prompt


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Wording, label prefix and demonstrations that turn rows into examples."""

    wording: Wording | None
    """None for ready-made prompts: the field `prompt` is the question, and the options are the labels."""
    label_prefix: str = ""
    """Space or empty string."""
    mask: str | None = None
    """Mask token of a masked model."""
    chat: Chat | None = None
    """The model's chat template, if prompts are chats: demonstrations are turns of it."""
    demonstrations: tuple[Turn, ...] = ()
    """Solved questions, if any."""

    def example(self, row: Row) -> Example:
        """Return the row as a prompt with its labels."""
        labels = tuple(self.label_prefix + label for label in self.labels(row))
        shown = row.options if self.wording else ()
        prompt = self._prompt(self._question(row))
        probe_end = self._probe_end(row, prompt) if row.probe_at else None
        return Example(
            row.id, prompt, labels, row.answer, row.group, shown, row.place, probe_end=probe_end, unit=row.unit
        )

    def with_demonstrations(self, rows: Iterable[Row]) -> Renderer:
        """Return a renderer that puts these rows, solved, into every prompt."""
        solved = (Turn(self._question(row), self.labels(row)[row.answer]) for row in rows)
        return replace(self, demonstrations=tuple(solved))

    def labels(self, row: Row) -> tuple[str, ...]:
        """Return the row's labels without prefix: one letter for each option, or the options themselves."""
        return tuple(LETTERS[: len(row.options)]) if self.wording else row.options

    def _probe_end(self, row: Row, prompt: str) -> int:
        """Return where the row's `probe_at` ends in its prompt: in its own question, behind solved ones."""
        question = self._question(row)
        end = end_of_piece(question, row.probe_at) - (len(question) - len(question.lstrip()))
        return prompt.rindex(question.strip()) + end  # chat templates cut spaces around a message

    def _prompt(self, question: str) -> str:
        instruction = self.wording.instruction if self.wording else ""
        if self.chat is not None:
            return self.chat.prompt(question, self.demonstrations, instruction)
        prefix = " " if self.mask else self.label_prefix
        solved = [f"{turn.question}{prefix}{turn.answer}" for turn in self.demonstrations]
        prompt = "\n\n".join(part for part in (instruction, *solved, question) if part)
        if self.mask is None or (self.wording is None and self.mask in question):  # a prompt with a mask of its own
            return prompt
        return f"{prompt} {self.mask}"

    def _question(self, row: Row) -> str:
        if self.wording is None:
            return row.fields["prompt"]
        wording = self.wording
        options = (wording.option.format(letter=a, text=b) for a, b in zip(LETTERS, row.options, strict=False))
        return f"{wording.question.format_map(row.fields)}\n{wording.separator.join(options)}\n{wording.cue}"


def mask_of(tokenizer: Tokenizer, *, masked: bool) -> str | None:
    """Return the mask token that ends a prompt, or None for a causal model.

    Raises
    ------
    PromptError
        If a masked model's tokenizer has no mask token.
    """
    if masked and not tokenizer.mask_token:
        raise PromptError("the tokenizer has no mask token; prompts for a masked model need one")
    return tokenizer.mask_token if masked else None
