"""The slow, obvious twin of mixtures of experts: each token, each of its experts, one product at a time."""

from typing import Any, NamedTuple

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "token-by-token"


class TokenByToken:
    """Experts as a loop, with a leaf at the neurons of every token and expert: zero, or shifts.

    Parameters
    ----------
    shifts : mapping of (layer, token, neuron) to number
        Added where the token is routed to the neuron's expert.
    held : mapping of module to (experts_TK, weights_TK), optional
        Routing to go by, in place of the router's.
    """

    def __init__(self, lm, shifts=None, held=None):
        self.lm, self.shifts, self.held = lm, shifts or {}, held
        self.layers = {lm.experts(layer): layer for layer in range(lm.n_layers)}
        self.leaves, self.values, self.experts, self.routings = {}, {}, {}, {}

    def __call__(self, module, hidden, experts_TK, weights_TK):
        if self.held is not None:
            experts_TK, weights_TK = self.held[module]
        self.routings[module] = experts_TK, weights_TK
        weights_TK = weights_TK.detach() if self.lm.router == "fixed" else weights_TK
        return torch.stack(
            [
                sum(
                    weight * self.expert(module, token, int(expert), hidden[token])
                    for expert, weight in zip(experts_TK[token], weights_TK[token], strict=True)
                )
                for token in range(len(hidden))
            ]
        )

    def expert(self, module, token, expert, hidden_H):
        """Run one expert for one token."""

        def product(name, values):
            weight = getattr(module, name)[expert]
            made = values @ weight if module.is_transposed else weight @ values
            return made + getattr(module, f"{name}_bias")[expert] if module.has_bias else made

        both = product("gate_up_proj", hidden_H)
        width = len(both) // 2
        columns = torch.arange(width, 2 * width) if module.is_concatenated else torch.arange(1, 2 * width, 2)
        if self.lm.site == "up":
            both = both.index_add(0, columns, self.leaf(module, token, expert, both[columns]))
        act = module._apply_gate(both[None])[0]
        return product("down_proj", act + self.leaf(module, token, expert, act) if self.lm.site == "act" else act)

    def leaf(self, module, token, expert, values):
        self.values[module, token, expert] = values.detach()
        self.experts.setdefault((module, token), []).append(expert)
        leaf = torch.zeros_like(values)
        for (layer, shifted_token, neuron), size in self.shifts.items():
            if (layer, shifted_token, neuron // len(values)) == (self.layers[module], token, expert):
                leaf[neuron % len(values)] = size
        return self.leaves.setdefault((module, token, expert), leaf.requires_grad_())


class Ran(NamedTuple):
    """A pass of one text through the twin."""

    logits_TV: Any
    twin: TokenByToken
    dense: dict[int, Any]
    """Values of the site of dense and shared neurons before a shift, (T, N), by layer."""

    def activation(self, layer, token, neuron):
        """The activation of a neuron, by its number; None if the token does not have it."""
        lm = self.twin.lm
        shape, module = lm.layer_shapes[layer], lm.experts(layer)
        first_dense = shape.n_experts * shape.n_units
        if neuron >= first_dense:
            return float(self.dense[layer][token, neuron - first_dense])
        values = self.twin.values.get((module, token, neuron // shape.n_units))
        return None if values is None else float(values[neuron % shape.n_units])


def run(lm, tokens, shifts=None, held=None):
    """Run a text through the twin, with neurons shifted: parameters as of `TokenByToken`."""
    twin, dense, handles = TokenByToken(lm, shifts, held), {}, []
    ALL_EXPERTS_FUNCTIONS.register(NAME, twin)

    def change(layer, values):
        shape, flat_TN = lm.layer_shapes[layer], values.reshape(len(tokens), -1)
        dense[layer] = flat_TN
        steps_TN = torch.zeros_like(flat_TN)
        for (shifted_layer, token, neuron), size in twin.shifts.items():
            if shifted_layer == layer and neuron >= shape.n_experts * shape.n_units:
                steps_TN[token, neuron - shape.n_experts * shape.n_units] = size
        return (flat_TN + steps_TN).view_as(values)

    for layer in range(lm.n_layers):
        module = lm.site_module(layer)
        if module is not None and lm.site == "act":
            hook = module.register_forward_pre_hook(lambda _, args, layer=layer: (change(layer, args[0]),))
            handles.append(hook)
        elif module is not None:
            handles.append(module.register_forward_hook(lambda _, args, output, layer=layer: change(layer, output)))
    lm.model.set_experts_implementation(NAME)
    try:
        logits_TV = lm.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        lm.model.set_experts_implementation("negcore")
        for handle in handles:
            handle.remove()
    return Ran(logits_TV, twin, dense)
