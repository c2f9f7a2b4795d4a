from dataclasses import replace

import numpy as np
import pytest
import torch
from support import CAUSAL, CORE, LABELS, MASKED, PROMPTS, prompts_for, tiny_model
from torch import nn

from negcore.errors import LabelError, PromptError
from negcore.measure import forward
from negcore.measure import neurgrad as gradients
from negcore.measure.forward import common_prefix_length, probed_batches
from negcore.measure.neurgrad import NeurGradBatch, Nonfinite, neurgrad
from negcore.model.encoding import encode, encode_prompts
from negcore.model.past import Prefixes

OPTIONS = LABELS[:3]


def site_values(lm, layer, module, args, output):
    return args[0] if lm.site == "act" else output


def plain_autograd(lm, prompt, labels):
    """The slow, obvious twin: one prompt, the whole sequence with a graph, one backward pass a label."""
    tokens = encode_prompts(lm.card, [prompt])[0]
    position = tokens.index(lm.tokenizer.mask_token_id) if lm.arch.masked else len(tokens) - 1
    kept = {}

    def keep(layer):
        def hook(module, args, output=None):
            kept[layer] = site_values(lm, layer, module, args, output)

        return hook

    handles = []
    for layer in range(lm.n_layers):
        module = lm.site_module(layer)
        attach = module.register_forward_pre_hook if lm.site == "act" else module.register_forward_hook
        handles.append(attach(keep(layer)))
    lm.model.requires_grad_(True)
    logits = lm.model(input_ids=torch.tensor([tokens])).logits[0, position]
    probs = logits.softmax(-1)
    ids = encode(lm.card, [prompt], labels).label_ids_PO[0]
    layers = [kept[layer] for layer in range(lm.n_layers)]
    first = layers[0].shape[-1] - lm.layer_width
    acts = torch.stack([values.view(len(tokens), -1)[position, first:] for values in layers])
    negs = []
    for label in ids:
        grads = torch.autograd.grad(probs[int(label)], layers, retain_graph=True)
        rows = torch.stack([grad.view(len(tokens), -1)[position, first:] for grad in grads])
        negs.append(rows * torch.where(acts > 0, 1.0, -1.0))
    lm.model.requires_grad_(False)
    for handle in handles:
        handle.remove()
    return torch.stack(negs).detach().numpy(), acts.detach().numpy(), probs[ids].detach().numpy()


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_neurgrad_is_plain_autograd_times_direction(family, batch_size):
    lm = tiny_model(family)
    prompts = prompts_for(lm)
    batch = neurgrad(lm, prompts, OPTIONS, batch_size=batch_size)
    for row, prompt in enumerate(prompts):
        negs, acts, probs = plain_autograd(lm, prompt, OPTIONS)
        assert np.abs(negs).max() > 1e-6
        assert_close(batch.negs_POLN[row], negs)
        assert_close(batch.activations_PLN[row], acts)
        assert_close(batch.probs_PO[row], probs)


@pytest.mark.parametrize("site", ["up", "act", "gate"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "modernbert"])
def test_every_site_is_plain_autograd_at_that_site(family, site):
    lm = tiny_model(family, site=site)
    prompts = prompts_for(lm)[:3]
    batch = neurgrad(lm, prompts, OPTIONS)
    for row, prompt in enumerate(prompts):
        negs, acts, _ = plain_autograd(lm, prompt, OPTIONS)
        assert_close(batch.negs_POLN[row], negs)
        assert_close(batch.activations_PLN[row], acts)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "bert"])
def test_the_order_of_prompts_does_not_matter(family):
    lm = tiny_model(family)
    prompts = prompts_for(lm)
    order = [3, 0, 6, 1, 5, 2, 4]
    straight = neurgrad(lm, prompts, OPTIONS)
    shuffled = neurgrad(lm, [prompts[row] for row in order], OPTIONS)
    assert_close(shuffled.negs_POLN, straight.negs_POLN[order])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompts_without_a_common_beginning_are_measured_alike(family):
    lm = tiny_model(family)
    batch = neurgrad(lm, [*PROMPTS[:2], "B", "the best of times"], OPTIONS)
    for row, prompt in ((2, "B"), (3, "the best of times")):
        assert_close(batch.negs_POLN[row], plain_autograd(lm, prompt, OPTIONS)[0])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_labels_may_differ_between_prompts(family):
    lm = tiny_model(family)
    prompts = prompts_for(lm)[:2]
    batch = neurgrad(lm, prompts, [[" A", " B"], [" C", " D"]])
    assert_close(batch.negs_POLN[1], plain_autograd(lm, prompts[1], [" C", " D"])[0])


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bert"])
def test_neither_parameters_nor_hooks_change(family):
    lm = tiny_model(family)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    neurgrad(lm, prompts_for(lm), OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert no_hooks(lm)


def test_no_hook_survives_an_exception(monkeypatch):
    lm = tiny_model("llama")

    def broken(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(lm.model.lm_head, "forward", broken)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        neurgrad(lm, PROMPTS, OPTIONS)
    assert no_hooks(lm)


def no_hooks(lm):
    modules: list[nn.Module] = list(lm.model.modules())
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_neg_of_a_one_neuron_step_matches_the_finite_difference():
    lm = tiny_model("gpt2")  # its normalisation keeps float64; RMSNorm rounds to float32, too coarse for a difference
    batch = neurgrad(lm, PROMPTS[:1], OPTIONS)
    layer, neuron, step = 1, 5, 1e-6
    direction = 1.0 if batch.activations_PLN[0, layer, neuron] > 0 else -1.0

    def prob(shift):
        def hook(module, args):
            values = args[0].clone()
            values[0, -1, neuron] += shift * direction
            return (values,)

        with_hook = lm.site_module(layer).register_forward_pre_hook(hook)
        tokens = encode_prompts(lm.card, PROMPTS[:1])
        probs = lm.model(input_ids=torch.tensor(tokens)).logits[0, -1].softmax(-1)
        with_hook.remove()
        return float(probs[batch.label_ids_PO[0, 0]])

    slope = (prob(step) - prob(-step)) / (2 * step)
    assert slope == pytest.approx(batch.negs_POLN[0, 0, layer, neuron], rel=1e-5)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2], [1, 2]], 1),
        ([[5], [1, 2]], 0),
        ([[1, 2, 3]], 2),
        ([[1], [1, 2]], 0),
    ],
)
def test_the_common_prefix_leaves_every_prompt_its_last_token(ids, expected):
    assert common_prefix_length(ids) == expected


def test_a_label_of_two_tokens_is_refused_with_its_ids():
    with pytest.raises(LabelError, match=r"' Berlin in' is \d tokens of this model \(ids \["):
        neurgrad(tiny_model("llama"), PROMPTS, [" A", " Berlin in"])


def test_two_labels_with_one_id_are_refused():
    with pytest.raises(LabelError, match=r"labels ' A' and ' A' are the same token \(id \d+\)"):
        neurgrad(tiny_model("llama"), PROMPTS, [" A", " A"])


def test_label_lists_of_different_sizes_are_refused():
    with pytest.raises(LabelError, match="same number of labels"):
        neurgrad(tiny_model("llama"), PROMPTS[:2], [[" A"], [" B", " C"]])


@pytest.mark.parametrize("prompt", ["", "the best of times " * 40])
def test_an_empty_or_too_long_prompt_is_refused(prompt):
    with pytest.raises(PromptError, match="prompt 1") as refused:
        neurgrad(tiny_model("llama"), [PROMPTS[0], prompt], OPTIONS)
    assert "best of times" not in str(refused.value)


@pytest.mark.parametrize("suffix", ["", "<mask><mask>"])
def test_a_masked_model_needs_exactly_one_mask(suffix):
    with pytest.raises(PromptError, match="needs exactly one <mask>"):
        neurgrad(tiny_model(MASKED[0]), [PROMPTS[0] + suffix], OPTIONS)


@pytest.mark.parametrize("family", CAUSAL)
def test_float32_results_are_close_to_float64(family):
    exact = neurgrad(tiny_model(family), PROMPTS[:2], OPTIONS)
    single = neurgrad(tiny_model(family, dtype=torch.float32), PROMPTS[:2], OPTIONS)
    assert single.negs_POLN.dtype == np.float32
    np.testing.assert_allclose(single.negs_POLN, exact.negs_POLN, atol=1e-4 * np.abs(exact.negs_POLN).max())


@pytest.mark.parametrize("family", CORE)
def test_a_prediction_is_the_same_with_and_without_a_graph(family):
    lm = tiny_model(family)
    for batch in probed_batches(lm, encode_prompts(lm.card, prompts_for(lm)), batch_size=7):
        plain = batch.predict()
        with torch.enable_grad():
            traced = batch.predict()
        assert_close(plain.logits_BV.numpy(), traced.logits_BV.detach().numpy())


# Memory


@pytest.mark.parametrize("family", [*CAUSAL, "deepseek_v3", "gpt_bigcode"])
def test_a_row_for_each_option_gives_the_gradients_of_a_batched_backward_pass(family, monkeypatch):
    lm = tiny_model(family)
    batched = neurgrad(lm, PROMPTS, OPTIONS)
    monkeypatch.setattr(gradients, "computes_by_row", lambda device: False)
    by_row = neurgrad(lm, PROMPTS, OPTIONS)
    for name in ("negs_POLN", "activations_PLN", "probs_PO"):
        assert_close(getattr(by_row, name), getattr(batched, name))


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize("most", [1, 9, 40])
def test_own_tokens_may_run_in_any_number_of_batches(family, most, monkeypatch):
    lm = tiny_model(family)
    together = neurgrad(lm, PROMPTS, OPTIONS)
    monkeypatch.setattr(forward, "_OWN_TOKENS", {"cuda": most})
    assert_close(neurgrad(lm, PROMPTS, OPTIONS).negs_POLN, together.negs_POLN)


@pytest.mark.parametrize("n_shared", [0, 8, 10])
def test_fewer_tokens_than_all_prompts_begin_with_may_be_shared_and_kept(n_shared):
    lm = replace(tiny_model("llama"), prefixes=Prefixes())
    encoded = encode(lm.card, [PROMPTS[3] + " " + prompt for prompt in PROMPTS], OPTIONS)
    assert common_prefix_length(encoded.ids) > n_shared
    plain = neurgrad(tiny_model("llama"), encoded).negs_POLN
    for _ in range(2):  # the second time, they are there
        assert_close(neurgrad(lm, replace(encoded, n_shared=n_shared)).negs_POLN, plain)


def scarce_memory(monkeypatch, most, error=None):
    """Memory suffices for batches of so many prompts; returns the sizes that were tried."""
    tried, fill = [], gradients._fill

    def limited(results, rows, *others):
        tried.append(len(rows))
        if len(rows) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        fill(results, rows, *others)

    monkeypatch.setattr(gradients, "_fill", limited)
    return tried


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("batch_size", [None, 6])
def test_a_batch_for_which_memory_does_not_suffice_is_halved_and_so_are_all_after_it(
    family, batch_size, monkeypatch, caplog
):
    lm = tiny_model(family)
    prompts = prompts_for(lm)
    undisturbed = neurgrad(lm, prompts, OPTIONS)
    tried = scarce_memory(monkeypatch, 3)
    result = neurgrad(lm, prompts, OPTIONS, batch_size=batch_size)
    assert tried == [6 if batch_size else 7, 3, 3, 1]
    for name in ("negs_POLN", "activations_PLN", "probs_PO"):
        assert_close(getattr(result, name), getattr(undisturbed, name))
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: batches were halved until they fit, to 3 prompts"
    ]


def test_a_prompt_for_which_memory_does_not_suffice_is_an_error(monkeypatch):
    tried = scarce_memory(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        neurgrad(tiny_model("gpt2"), PROMPTS, OPTIONS)
    assert tried == [7, 3, 1]


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("CUDA out of memory")])
def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch, error):
    tried = scarce_memory(monkeypatch, 0, error)
    with pytest.raises(type(error), match=str(error)):
        neurgrad(tiny_model("gpt2"), PROMPTS, OPTIONS)
    assert tried == [7]


# Numbers that are not finite


def test_numbers_that_are_not_finite_are_counted_by_prompt_and_located_by_layer():
    shape_POLN = (3, 2, 4, 5)
    batch = NeurGradBatch(
        negs_POLN=np.zeros(shape_POLN),
        activations_PLN=np.zeros((3, 4, 5)),
        probs_PO=np.zeros((3, 2)),
        label_ids_PO=np.arange(6).reshape(3, 2),
    )
    assert batch.nonfinite() == []
    batch.negs_POLN[0, 1, 2, 3:] = np.nan
    batch.negs_POLN[0, 0, 0, 0] = 1e300  # too large for a shard's float32
    batch.activations_PLN[0, 3, 0] = -np.inf
    batch.probs_PO[2, 1] = np.nan
    assert batch.nonfinite() == [Nonfinite(0, (0, 2, 3), 4), Nonfinite(2, (), 1)]


def test_earlier_tokens_do_not_run_through_the_last_feed_forward(monkeypatch):
    lm, n_tokens = tiny_model("llama"), []
    lm.layers[-1].mlp.register_forward_hook(lambda module, args, output: n_tokens.append(output.shape[1]))
    short = neurgrad(lm, PROMPTS, OPTIONS)
    assert set(n_tokens) == {1}
    n_tokens.clear()
    monkeypatch.setattr(forward, "weights_pass", lambda model: True)
    whole = neurgrad(lm, PROMPTS, OPTIONS)
    assert max(n_tokens) > 1
    np.testing.assert_array_equal(short.negs_POLN, whole.negs_POLN)
    np.testing.assert_array_equal(short.probs_PO, whole.probs_PO)
