"""Targets: the number of each option whose slope a NEG is, made from the log-probabilities of the prompt's options.

A target is a function of these alone, so that whatever shifts neurons measures it, and autograd makes its cotangents.

Shapes: R rows, O options (labels) of a row's prompt, B prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from negcore.errors import LabelError, NegError

if TYPE_CHECKING:
    from torch import Tensor

Target = Literal["probability", "log-probability", "logit-difference"]

DEFAULT_TARGET: Target = "probability"
"""The paper's target; runs from before there was a choice do not name it."""

TARGET_UNITS: Mapping[Target, str] = MappingProxyType(
    {"probability": "probability", "log-probability": "log-probability (nats)", "logit-difference": "logit difference"}
)
"""Unit of each target, for captions and titles."""


ShiftUnit = Literal["activation", "sd"]
"""Unit of shifts: one of activation, or each neuron's own standard deviation over the run's prompts."""

DEFAULT_SHIFT_UNIT: ShiftUnit = "activation"

_PER: Mapping[ShiftUnit, str] = MappingProxyType(
    {"activation": "unit of activation", "sd": "standard deviation of the activation"}
)


def neg_unit(target: str, shift_unit: ShiftUnit = DEFAULT_SHIFT_UNIT) -> str:
    """Return the unit of NEGs of a target, for captions: ``probability per unit of activation``."""
    return f"{TARGET_UNITS[checked_target(target)]} per {_PER[shift_unit]}"


def checked_target(name: str) -> Target:
    """Return a target by its name, which earlier versions wrote with an underscore.

    Raises
    ------
    NegError
        If there is no such target.
    """
    for target in get_args(Target):
        if name.replace("_", "-") == target:
            return target  # type: ignore[no-any-return]
    raise NegError(f"target {name!r} is not known; choose one of {', '.join(get_args(Target))}")


def check_probabilities(target: Target) -> None:
    """Refuse to call the values of another target probabilities.

    Raises
    ------
    NegError
    """
    if target != "probability":
        raise NegError(
            f"these are values of the target {target!r}, no probabilities; read base_P and values_... instead"
        )


def check_options(target: Target, n_options: int, what: str = "give at least two labels") -> None:
    """Refuse a target that compares options where there is one.

    Raises
    ------
    LabelError
    """
    if target == "logit-difference" and n_options < 2:
        raise LabelError(f"target 'logit-difference' needs another label to differ from; {what}")


def target_values(target: Target, log_probs_RO: Tensor) -> Tensor:
    """Return the target of every option: shape (R, O).

    Of option o with probability p_o and logit l_o it is p_o, log p_o, or l_o less the largest logit of the prompt's
    other options. Log-probabilities of one prompt differ from its logits by a constant, which cancels in the last one;
    where other options are equally large, its gradient is the mean of theirs.

    Parameters
    ----------
    log_probs_RO : Tensor of shape (R, O)
        Of all of a prompt's options where the target compares them.
    """
    if target == "probability":
        return log_probs_RO.exp()
    if target == "log-probability":
        return log_probs_RO
    import torch  # the command line starts without, and knows the targets' names

    own_OO = torch.eye(log_probs_RO.shape[1], dtype=torch.bool, device=log_probs_RO.device)
    return log_probs_RO - log_probs_RO[:, None].masked_fill(own_OO, -torch.inf).amax(-1)


def own_values(values_RO: Tensor) -> Tensor:
    """Return the value of option o in row b*O + o, where every prompt is repeated for each of its options: (R,)."""
    n_rows, n_options = values_RO.shape
    return values_RO.view(-1, n_options, n_options).diagonal(dim1=1, dim2=2).reshape(n_rows)
