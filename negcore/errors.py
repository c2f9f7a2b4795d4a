"""The errors a user can cause: one tree, each message one line with the value, what is allowed and what to do."""


class NegError(ValueError):
    """Base of every error that the user's input, files or machine can cause."""


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
    return " ".join(str(error).split()) or type(error).__name__


def typed_line(error: BaseException) -> str:
    """Return the type and the message of an exception on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def first_line(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
