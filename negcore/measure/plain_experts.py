"""The plain twin of experts: leaves in the untouched model's loop over experts, found by the weights it multiplies.

In its own code a layer's module of experts multiplies the tokens of one expert after the other by slices of its stacked
weights. Nothing there is a module, so products with these slices are watched for. The twin shares no code with
`negcore.model.experts`, but for the names of the weights.

Shapes: T tokens, K experts of a token, R tokens of an expert, U units (neurons) of an expert.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from negcore.errors import ModelError
from negcore.model.experts import up_columns
from negcore.model.language_model import LanguageModel

_PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.addmm)


class _Leaf(NamedTuple):
    zeros_RU: Tensor
    values_RU: Tensor


class Probed(NamedTuple):
    """The neurons of one expert, for the tokens that are routed to it."""

    leaf_RU: Tensor
    """The leaf that they are differentiated by."""
    values_RU: Tensor
    row: int
    """Place of the probed token among these."""


class PlainExperts(TorchFunctionMode):
    """Adds a leaf to the neurons of every expert that runs in a pass of the untouched model."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self._lm = lm
        self._modules = {layer: module for layer in range(lm.n_layers) if (module := lm.experts(layer)) is not None}
        self._name = {"act": "down_proj", "up": "gate_up_proj"}[lm.site] if self._modules else ""
        self._leaves: dict[tuple[int, int], _Leaf] = {}
        self._experts_TK: dict[int, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the passes inside, with the routing held fixed if the model's is."""
        with ExitStack() as stack:
            for layer, module in self._modules.items():
                hook = module.register_forward_pre_hook(self._reader(layer), with_kwargs=True)
                stack.callback(hook.remove)
            if self._modules:
                stack.enter_context(self)
            yield

    def probed(self, layer: int, position: int) -> list[Probed]:
        """Return the neurons of each expert that a token is routed to, by rising number; none in a dense layer.

        Raises
        ------
        ModelError
            If the model's code multiplies by its experts' weights in a way that is not known.
        """
        if layer not in self._modules:
            return []
        experts_TK, found = self._experts_TK[layer], []
        for expert in sorted(experts_TK[position].tolist()):
            if (layer, expert) not in self._leaves:
                raise ModelError("its own loop over experts is not known, so that nothing plain can be compared with")
            tokens = (expert == experts_TK.T).nonzero()[:, 1].tolist()  # an expert's tokens come choice by choice
            found.append(Probed(*self._leaves[layer, expert], tokens.index(position)))
        return found

    def _reader(self, layer: int) -> Any:
        def read(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, experts_TK, weights_TK = (*args, *kwargs.values())
            self._experts_TK[layer] = experts_TK
            is_fixed = self._lm.router == "fixed"
            return (hidden, experts_TK, weights_TK.detach() if is_fixed else weights_TK), {}

        return read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight: Any = args[1] if func in _PRODUCTS and len(args) > 1 else None
        known = self._stacked(weight) if isinstance(weight, Tensor) else None
        if known is None:
            return func(*args, **kwargs)
        layer, stacked = known
        expert = (weight.storage_offset() - stacked.storage_offset()) // stacked.stride(0)
        if self._lm.site == "act":
            return func(self._with_leaf(layer, expert, args[0]), *args[1:], **kwargs)
        product = func(*args, **kwargs)
        module = self._modules[layer]
        columns = up_columns(module)
        # Some add their bias behind the product.
        later = module.gate_up_proj_bias[expert] if module.has_bias and len(args) + len(kwargs) < 3 else 0
        changed = torch.zeros_like(product)
        changed[..., columns] = self._with_leaf(layer, expert, (product + later)[..., columns], zero=True)
        return product + changed

    def _stacked(self, weight: Tensor) -> tuple[int, Tensor] | None:
        """Return the weights of all experts that one's are a part of, if any; those that wait on disk come and go."""
        place = weight.untyped_storage().data_ptr()
        here = ((layer, getattr(module, self._name)) for layer, module in self._modules.items())
        return next((one for one in here if place and one[1].untyped_storage().data_ptr() == place), None)

    def _with_leaf(self, layer: int, expert: int, values: Tensor, *, zero: bool = False) -> Tensor:
        leaf = torch.zeros_like(values, requires_grad=True)
        self._leaves[layer, expert] = _Leaf(leaf, values.detach())
        return leaf if zero else values + leaf
