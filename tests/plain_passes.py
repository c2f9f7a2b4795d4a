"""Slow, obvious twins of what estimators do: one whole pass of one prompt, hooks and autograd, nothing kept.

Prompts are those of `prompts_for`, the first two of them with three options.
"""

import torch
from support import LABELS, prompts_for

from negcore.model.encoding import encode, encode_prompts

OPTIONS = LABELS[:3]
ANSWERS = [1, 0]


def target_of(lm, logits_V, row, target):
    """The target, written out."""
    ids = encode(lm.card, prompts_for(lm)[:1], OPTIONS).label_ids_PO[0].tolist()
    right = logits_V[ids[ANSWERS[row]]]
    if target == "logit-difference":
        return right - max(logits_V[label] for index, label in enumerate(ids) if index != ANSWERS[row])
    log_prob = right - logits_V.logsumexp(0)
    return log_prob.exp() if target == "probability" else log_prob


def whole_pass(lm, prompt, change=lambda layer, values_N: values_N):
    """One full forward pass, the probed token's site changed layer by layer: its logits and its activations."""
    tokens = encode_prompts(lm.card, [prompt])[0]
    position = tokens.index(lm.tokenizer.mask_token_id) if lm.arch.masked else len(tokens) - 1
    logits_TV, activations_LN = hooked_pass(lm, tokens, position, change)
    return logits_TV[position], activations_LN


def hooked_pass(lm, tokens, position, change):
    """One full forward pass, one token's site changed layer by layer: logits of all tokens, that one's activations."""
    seen, handles = {}, []

    def replaced(layer, values):
        rows = list(values.reshape(len(tokens), -1))  # OPT drops the axis of the batch
        seen[layer] = rows[position].detach()
        rows[position] = change(layer, rows[position])
        return torch.stack(rows).view_as(values)

    for layer in range(lm.n_layers):
        module = lm.site_module(layer)
        if lm.site == "act":
            hook = lambda _, args, layer=layer: (replaced(layer, args[0]), *args[1:])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        else:
            hook = lambda _, args, output, layer=layer: replaced(layer, output)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    logits_TV = lm.model(input_ids=torch.tensor([tokens])).logits[0]
    for handle in handles:
        handle.remove()
    return logits_TV, torch.stack([seen[layer] for layer in range(lm.n_layers)])


def gradient_at(lm, prompt, row, target, layer, values_N=None):
    """Gradient of the target by one layer's activations, those replaced by the given values."""
    leaves = []

    def change(where, current_N):
        if where != layer:
            return current_N
        leaves.append((current_N if values_N is None else values_N).detach().requires_grad_())
        return leaves[0]

    logits_V, _ = whole_pass(lm, prompt, change)
    unreached = 0 * leaves[0].sum()  # so that the gradient is zero where nothing leads from the layer to the target
    return torch.autograd.grad(target_of(lm, logits_V, row, target) + unreached, leaves[0])[0]
