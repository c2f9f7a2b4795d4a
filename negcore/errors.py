"""The errors a user can cause: one tree, each message one line with the value, what is allowed and what to do."""

from negcore.texts import plain, private


class NegError(ValueError):
    """Base of every error that the user's input, files or machine can cause.

    As text (`str`) it is for the terminal. As part of another message (``f"{error}"``) the texts of rows that it quotes
    stay marked, so that `negcore.texts.public` can keep them back.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message)

    def __str__(self) -> str:
        return plain(super().__str__())

    def __format__(self, spec: str) -> str:
        return format(super().__str__(), spec)


class ModelError(NegError):
    """The model cannot be found, loaded, or measured."""


class LabelError(NegError):
    """A label is not exactly one token of this model, or two labels share a token."""


class PromptError(NegError):
    """A prompt cannot be measured: empty, too long for the model, or without its mask."""


class DatasetError(NegError):
    """A dataset is unknown, empty or malformed."""


class ShardError(NegError):
    """Stored shards are damaged, missing, or belong to another run."""


class ProbeError(NegError):
    """A stored probe is damaged, or was fitted on another model, site or label set."""


class RunError(NegError):
    """A run cannot start or did not finish whole: configuration, resources, or lost rows."""


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or its type's name if it has none."""
    return " ".join(f"{error}".split()) or type(error).__name__


def typed_line(error: BaseException) -> str:
    """Return the type and the message of an exception on one line; that of a library may quote a row, and is marked."""
    message = " ".join(f"{error}".split())
    return f"{type(error).__name__}: {message if isinstance(error, (NegError, OSError)) else private(message)}"


def first_line(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    lines = f"{error}".strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
