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
