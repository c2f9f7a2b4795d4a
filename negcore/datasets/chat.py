"""Prompts in the form of a chat, written by the model's own chat template.

A question is one message of the user, and the label follows where the template lets the assistant begin. Solved
questions are earlier turns: the assistant's answer stands where the label is read, in the form that is asked for.

Templates are files of the model and are rendered by transformers in its sandbox. The same text must come out on every
day, so a template that asks for the date is told 26 July 2024. Templates that let a model think first are asked not
to (`enable_thinking` is false), because the next token is to be the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from negcore.datasets.markup import special_token_pattern
from negcore.errors import PromptError, one_line
from negcore.texts import private, row_text

_DAY = datetime(2024, 7, 26)
_DIRECTIVES = ("%d", "%-d", "%e", "%a", "%A", "%b", "%B", "%m", "%y", "%Y", "%H", "%I", "%p", "%M", "%S", "%j")
_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{directive}', '{_DAY.strftime(directive)}')" for directive in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)
"""Beginning of a template that asks for the date: transformers lets no function of ours in, but a macro is text."""
_PROBE, _ANSWER = "Question 1", "Answer 1"


class Turn(NamedTuple):
    """A question of the user and the assistant's answer."""

    question: str
    answer: str


def chat_prompts(tokenizer: Any, texts: Sequence[str], *, system: str | None = None) -> list[str]:
    """Return texts as prompts in the form of the model's chat template: one message of the user each.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        With a chat template.
    texts : sequence of str
    system : str, optional
        System text in front of each.

    Raises
    ------
    PromptError
        If there is no template, it refuses or leaves out what it is given or does not say where the assistant begins,
        or a text holds a special token.
    """
    if isinstance(texts, str):
        raise PromptError(f"{row_text(texts)} was given for texts; give a list of strings")
    chat = Chat(tokenizer, system)
    prompts = [chat.prompt(text) for text in texts]
    _ = chat.label_prefix
    return prompts


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template and the system text."""

    tokenizer: Any
    system: str | None = None

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise PromptError("the model has no chat template; use prompt_format 'plain'")
        self._refuse_markup(self.system or "", "the system prompt")

    def prompt(self, question: str, solved: Sequence[Turn] = (), instruction: str = "") -> str:
        """Return a chat that ends where the assistant answers a question.

        Parameters
        ----------
        question : str
        solved : sequence of Turn, optional
            Earlier turns.
        instruction : str, optional
            Text in front of the first message of the user.
        """
        turns = [*solved, Turn(question, "")]
        turns[0] = turns[0]._replace(question="\n\n".join(filter(None, (instruction, turns[0].question))))
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        for turn in turns:
            self._refuse_markup(turn.question, "a prompt")
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        prompt = self._render(messages[:-1])
        for message in messages[:-1]:
            if message["content"].strip() not in prompt:
                raise PromptError(f"the model's chat template leaves out the text of the {message['role']}")
        return prompt

    @cached_property
    def label_prefix(self) -> str | None:
        """Text that the template writes in front of an answer: a space or nothing; None if it cannot be told.

        Raises
        ------
        PromptError
            If the template writes more, so that a prompt ends elsewhere.
        """
        asked = [{"role": "user", "content": _PROBE}]
        prompt, answered = (
            self._render(messages) for messages in (asked, [*asked, {"role": "assistant", "content": _ANSWER}])
        )
        header, is_there, _ = answered.removeprefix(prompt).partition(_ANSWER)
        if not is_there or not answered.startswith(prompt):
            return None
        if header not in ("", " "):
            raise PromptError(
                f"the model's chat template does not say where the assistant begins: it writes {header!r} in front of "
                "an answer, but not when it is asked for the prompt of one; use prompt_format 'plain'"
            )
        return header

    @cached_property
    def _in_parts(self) -> bool:
        """True if the template reads no plain text, but a list of parts, as those of models that also see do."""
        asked = [{"role": "user", "content": _PROBE}]
        with suppress(PromptError):
            return _PROBE not in self._rendered(asked) and _PROBE in self._rendered(_parted(asked))
        return False

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self._rendered(_parted(messages) if self._in_parts else messages)

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            template = self.tokenizer.get_chat_template()
            rendered = self.tokenizer.apply_chat_template(
                messages,
                chat_template=_CLOCK + template if "strftime_now" in template else template,
                tokenize=False,
                add_generation_prompt=messages[-1]["role"] == "user",
                enable_thinking=False,
            )
        except Exception as error:  # a template is a program, and raises what it likes
            hint = "; leave system_prompt out, if that is what it refuses" if self.system is not None else ""
            reason = private(f"{one_line(error):.200}")
            raise PromptError(f"the model's chat template fails: {reason}{hint}") from None
        if not isinstance(rendered, str):
            raise PromptError(f"the model's chat template gives {type(rendered).__name__}, not a text")
        return rendered

    def _refuse_markup(self, text: str, what: str) -> None:
        found = self._special_tokens.search(text) if self._special_tokens else None
        if found:
            raise PromptError(
                f"{what} holds {found.group()!r}, a special token of the model, which the chat template is to write; "
                "use prompt_format 'plain' for prompts that are chats already"
            )

    @cached_property
    def _special_tokens(self) -> re.Pattern[str] | None:
        return special_token_pattern(self.tokenizer)


def _parted(messages: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
