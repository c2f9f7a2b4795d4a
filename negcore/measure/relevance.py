"""Propagation rules of layer-wise relevance propagation (LRP), written as gradients: those that RelP is made of.

Each rule replaces a step of the model by a linear map with the same value at this very input, so that predictions stay
as they are and gradients become LRP's coefficients.

Shapes: `...` any axes, H a normalisation's width.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from negcore.model.language_model import LanguageModel

_ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")


@contextmanager
def propagation_rules(lm: LanguageModel) -> Iterator[None]:
    """Let gradients follow LRP's rules; no hook remains on leaving, even after an exception.

    LN-rule in normalisations, Identity-rule in activation functions, Half-rule where gate times up enters the down
    projection. Sums and linear maps need no rule (their 0-rule is the gradient), attention keeps its gradient. A
    normalisation or activation that a model's code computes outside of a module keeps its gradient too.

    References
    ----------
    Jafari et al., arXiv 2508.21258; Ali et al. (ICML 2022), arXiv 2202.07304 (LN-rule).
    """
    with ExitStack() as hooks:
        for module in lm.model.modules():
            if is_norm(module):
                hooks.callback(module.register_forward_hook(_keep_scale).remove)
            elif type(module).__module__ in _ACTIVATION_MODULES:
                hooks.callback(module.register_forward_hook(_keep_ratio).remove)
        for layer in range(lm.n_layers if lm.arch.gated else 0):
            hooks.callback(lm.down(layer).register_forward_pre_hook(_halve).remove)
        yield


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a normalisation: LayerNorm or RMSNorm, under whatever name."""
    return "Norm" in type(module).__name__ and not list(module.children())


def _keep_scale(norm: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Let gradients see the normalisation's scale as constant: k * (x - mean) + b, or k * x + b."""
    if len(args) != 1:  # a normalisation with a gate of its own keeps its gradient
        return output
    (x,) = args
    with torch.no_grad():
        sign_H = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) % 2 * 2 - 1
        bias, of_ones, of_signs = (norm.forward(one) for one in (0 * sign_H, torch.ones_like(sign_H), sign_H))
        # A constant vector is zero once its mean is gone: LayerNorm makes its bias of it, RMSNorm its weights.
        centred = bool((of_ones - bias).abs().max() < 1e-3 * (of_signs - bias).abs().max())
        weights = (of_signs - bias) / _less_mean(sign_H, centred)  # up to a factor, which the fit finds
        weighted, made = weights * _less_mean(x, centred), output - bias
        scale = (made * weighted).sum(-1, keepdim=True) / weighted.square().sum(-1, keepdim=True)
        slope = weights * scale.nan_to_num()
    linear = slope * _less_mean(x, centred)
    return output.detach() + (linear - linear.detach())


def _less_mean(x: Tensor, centred: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centred else x


def _keep_ratio(activation: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Let gradients see an activation function z(x) as x * (z / x), the ratio constant; it is 0 where x is 0."""
    x = args[0]
    ratio = torch.where(x == 0, 0, output / x).detach()
    return output.detach() + ratio * (x - x.detach())


def _halve(down: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Halve the gradient of what enters the down projection."""
    half = args[0] / 2
    return (half + half.detach(), *args[1:])
