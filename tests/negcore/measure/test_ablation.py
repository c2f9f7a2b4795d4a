"""Silent neurons: against a model whose weights are cut, one set at a time, on every way through the model."""

import numpy as np
import pytest
import torch
from support import LABELS, prompts_for, tiny_model

from negcore.errors import NegError
from negcore.measure.ablation import silence_sets
from negcore.model.encoding import encode


def random_sets(lm, n_sets=5):
    shares = np.array([0, 0.1, 0.5, 0.9, 1])[:n_sets, None]
    return np.random.default_rng(0).random((n_sets, lm.n_layers * lm.layer_width)) < shares


def twin(lm, tokens, label_ids_O, silent_M):
    """Run a whole prompt, and set the last token's (or the mask's) neurons to zero by hooks of its own."""
    position = tokens.index(lm.tokenizer.mask_token_id) if lm.arch.masked else len(tokens) - 1
    silent_LN = torch.from_numpy(silent_M.reshape(lm.n_layers, lm.layer_width))
    handles = []
    for layer in range(lm.n_layers):

        def cut(values, silent_N=silent_LN[layer]):
            changed = values.clone().view(1, len(tokens), -1)
            own = changed[0, position, changed.shape[2] - lm.layer_width :]
            own[silent_N] = 0
            return changed.view_as(values)

        module = lm.site_module(layer)
        if lm.site == "act":
            handles.append(module.register_forward_pre_hook(lambda _, args, cut=cut: (cut(args[0]), *args[1:])))
        else:
            handles.append(module.register_forward_hook(lambda _, args, output, cut=cut: cut(output)))
    with torch.no_grad():
        logits_V = lm.model(input_ids=torch.tensor([tokens])).logits[0, position]
    for handle in handles:
        handle.remove()
    return logits_V.log_softmax(0).numpy()


@pytest.mark.parametrize(
    ("family", "site"), [("llama", "up"), ("gpt2", "act"), ("phi3", "up"), ("opt", "act"), ("bert", "act")]
)
def test_predictions_are_those_of_prompts_run_one_by_one_with_their_neurons_cut(family, site):
    lm = tiny_model(family, site=site)
    prompts = prompts_for(lm)[:3]
    silent_RM = random_sets(lm)
    result = silence_sets(lm, prompts, LABELS[:3], silent_RM=silent_RM)
    encoded = encode(lm.card, prompts, LABELS[:3])
    for p, tokens in enumerate(encoded.ids):
        labels = encoded.label_ids_PO[p]
        base_V = twin(lm, tokens, labels, np.zeros(silent_RM.shape[1], bool))
        np.testing.assert_allclose(result.base_log_probs_PO[p], base_V[labels], atol=1e-9)
        for r, silent_M in enumerate(silent_RM):
            found_V = twin(lm, tokens, labels, silent_M)
            np.testing.assert_allclose(result.log_probs_PRO[p, r], found_V[labels], atol=1e-9)
            assert result.kl_PR[p, r] == pytest.approx((np.exp(base_V) * (base_V - found_V)).sum(), abs=1e-9)


def test_an_empty_set_changes_nothing_and_no_hook_remains():
    lm = tiny_model("llama")
    before = {name: len(module._forward_hooks) for name, module in lm.model.named_modules()}
    result = silence_sets(lm, prompts_for(lm), LABELS, silent_RM=random_sets(lm))
    assert (result.log_probs_PRO[:, 0] == result.base_log_probs_PO).all() and (result.kl_PR[:, 0] == 0).all()
    assert (result.kl_PR[:, 1:] > 0).all()
    assert before == {name: len(module._forward_hooks) for name, module in lm.model.named_modules()}


@pytest.mark.parametrize(
    "sets", [np.zeros((0, 72), bool), np.zeros((2, 71), bool), np.zeros(72, bool), np.zeros((1, 72))]
)
def test_sets_of_other_neurons_are_refused(sets):
    with pytest.raises(NegError, match="has 72 neurons"):
        silence_sets(tiny_model("llama"), ["x"], [" A"], silent_RM=sets)
