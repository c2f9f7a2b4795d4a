from itertools import product

import numpy as np
import pytest
import torch
import transformers
from support import CAUSAL, CONFIGS, LABELS, MASKED, PROMPTS, prompts_for, tiny_model, tiny_tokenizer

from negcore.errors import LabelError, ModelError, NegError
from negcore.measure import interventions, sweeps, virtual_tokens
from negcore.measure.estimators import estimate
from negcore.measure.interventions import intervene, random_sets
from negcore.measure.loading import as_language_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.quadrature import gauss_rule, node_grid
from negcore.measure.sweeps import (
    DEFAULT_SHIFTS,
    PAPER_SHIFTS,
    SweepResult,
    choose_neurons,
    draw_neurons,
    fit_lines,
    sweep,
)
from negcore.model.encoding import encode, encode_prompts
from negcore.model.layer_shapes import LayerShape

FEW = [-2.0, -0.2, 0.2, 2.0]
# Of different lengths, with and without a common beginning, one of them a single token.
MIXED = [PROMPTS[0], PROMPTS[3], "B", "the best of times"]
GATED = [family for family in CAUSAL if tiny_model(family).arch.gated]


def shifted_probability(lm, prompt, label, steps):
    """The slow, obvious twin: one prompt, one forward pass, the given steps added to the given (layer, neuron)."""
    tokens = encode_prompts(lm.card, [prompt])[0]
    position = tokens.index(lm.tokenizer.mask_token_id) if lm.arch.masked else len(tokens) - 1
    before = {}

    def change(layer, values):
        values = values.clone()
        row = values.view(len(tokens), -1)[position]
        row = row[len(row) - lm.layer_width :]
        before[layer] = row.clone()
        for (where, neuron), step in steps.items():
            if where == layer:
                row[neuron] += step
        return values

    handles = []
    for layer in range(lm.n_layers):
        module = lm.site_module(layer)
        if lm.site == "act":
            hook = lambda _, args, layer=layer: (change(layer, args[0]), *args[1:])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        else:
            hook = lambda _, args, output, layer=layer: change(layer, output)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        probs = lm.model(input_ids=torch.tensor([tokens])).logits[0, position].softmax(-1)
    for handle in handles:
        handle.remove()
    label_id = encode(lm.card, [prompt], [label]).label_ids_PO[0, 0]
    return float(probs[label_id]), before


def away(activation):
    return 1.0 if activation > 0 else -1.0


def both_ways(lm, prompts, **settings):
    fast = sweep(lm, prompts, " A", shifts=FEW, method="virtual", **settings)
    slow = sweep(lm, prompts, " A", shifts=FEW, method="hooks", **settings)
    return fast, slow


def assert_same(fast, slow, tolerance):
    assert np.ptp(slow.probs_PKS, axis=-1).max() > 10 * tolerance
    np.testing.assert_allclose(fast.probs_PKS, slow.probs_PKS, rtol=0, atol=tolerance)
    np.testing.assert_allclose(fast.base_probs_P, slow.base_probs_P, rtol=0, atol=tolerance)
    np.testing.assert_allclose(fast.activations_PK, slow.activations_PK, rtol=1e-4, atol=tolerance)
    assert np.array_equal(fast.label_ids_P, slow.label_ids_P)


def no_hooks(lm):
    modules = list(lm.model.modules())
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_a_line_through_the_origin_is_recovered_with_a_pencil():
    fit = fit_lines([-1, 1, 2], [[-3, 3, 6], [1, 1, 1], [0, 0, 0], [-1, 1, 8]])
    np.testing.assert_allclose(fit.slopes, [3, 2 / 6, 0, 18 / 6])
    assert fit.pearson[0] == pytest.approx(1)
    # Row 3: d - mean = (-5, 1, 4) / 3, dp - mean = (-11, -5, 16) / 3: sums 114, 42, 402, over 9 each.
    assert fit.pearson[3] == pytest.approx(114 / np.sqrt(42 * 402))
    assert np.isnan(fit.pearson[[1, 2]]).all()
    # Residuals of row 3: 2, -2, 2 against a sum of squares of 66; of row 1: 4/3, 2/3, 1/3 against 3.
    np.testing.assert_allclose(fit.r2, [1, 1 - (21 / 9) / 3, np.nan, 1 - 12 / 66])
    assert fit.linear.tolist() == [True, False, False, False]


def test_equal_changes_have_no_correlation_even_where_their_mean_is_rounded():
    assert np.isnan(fit_lines([-0.3, 0.1, 0.2], [0.1, 0.1, 0.1]).pearson)
    assert np.isnan(fit_lines([2.0], [0.5]).pearson)


def test_a_falling_line_is_linear_too():
    assert fit_lines([-1, 1], [2, -2]).linear


def test_a_part_of_a_sweep_has_the_lines_of_its_range():
    shifts = np.array([-2.0, -0.6, 0.6, 2.0])
    probs_11S = np.array([[[0.1, 0.4, 0.6, 0.7]]])
    whole = SweepResult(np.array([[0, 0]]), shifts, np.array([0.5]), np.array([[1.0]]), probs_11S, np.array([7]))
    assert whole.negs_PK[0, 0] == pytest.approx((0.8 + 0.06 + 0.06 + 0.4) / (2 * 4 + 2 * 0.36))
    part = whole.within(0.6)
    assert part.shifts_S.tolist() == [-0.6, 0.6]
    assert part.negs_PK[0, 0] == pytest.approx(0.1 / 0.6)
    assert part.pearson_PK[0, 0] == pytest.approx(1) and part.fit.r2[0, 0] == pytest.approx(1)
    with pytest.raises(NegError, match=r"range 0.5 holds no shift; the smallest of this sweep is 0.6"):
        whole.within(0.5)


def test_the_grids_are_clean_symmetric_and_without_zero():
    assert DEFAULT_SHIFTS.tolist()[:2] + DEFAULT_SHIFTS.tolist()[-2:] == [-2.0, -1.8, 1.8, 2.0]
    assert (len(DEFAULT_SHIFTS), len(PAPER_SHIFTS)) == (20, 100)
    assert 0.6 in DEFAULT_SHIFTS and 9.4 in PAPER_SHIFTS
    np.testing.assert_array_equal(PAPER_SHIFTS, -PAPER_SHIFTS[::-1])


@pytest.mark.parametrize("family", CAUSAL)
def test_virtual_tokens_are_hooked_passes_of_the_whole_prompt(family):
    fast, slow = both_ways(tiny_model(family), MIXED, neurons=3)
    assert_same(fast, slow, 1e-10)


@pytest.mark.parametrize("site", ["act", "gate"])
@pytest.mark.parametrize("family", GATED)
def test_virtual_tokens_are_hooked_passes_at_every_site(family, site):
    fast, slow = both_ways(tiny_model(family, site=site), MIXED[:2], neurons=2)
    assert_same(fast, slow, 1e-10)


@pytest.mark.parametrize("family", CAUSAL)
def test_virtual_tokens_are_hooked_passes_in_float32(family):
    fast, slow = both_ways(tiny_model(family, dtype=torch.float32), MIXED[:2], neurons=2)
    assert fast.probs_PKS.dtype == np.float32
    assert_same(fast, slow, 1e-6)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 8}),
        ("opt", {"_remove_final_layer_norm": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gemma3_text", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}),
    ],
    ids=str,
)
def test_virtual_tokens_follow_the_variants_of_a_family(family, change):
    torch.manual_seed(0)
    settings = {**CONFIGS[family], "initializer_range": 0.5, "init_std": 0.5, "pad_token_id": 0, **change}
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float64)
    fast, slow = both_ways(as_language_model(model, tiny_tokenizer(), name="variant"), MIXED, neurons=3)
    assert_same(fast, slow, 1e-10)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_the_window_is_shorter_than_the_prompts(family):
    lm = tiny_model(family)
    assert len(encode_prompts(lm.card, MIXED)[1]) > 2 * lm.card.text_config.sliding_window


@pytest.mark.parametrize("family", ["llama", "phi3", *MASKED])
def test_hooked_passes_are_a_loop_over_neurons_and_shifts(family):
    lm = tiny_model(family)
    prompts = prompts_for(lm)[2:4]
    neurons = [(0, 3), (2, 23), (1, 0)]
    result = sweep(lm, prompts, [" A", " C"], neurons=neurons, shifts=FEW, method="hooks")
    for row, (prompt, label) in enumerate(zip(prompts, [" A", " C"], strict=True)):
        base, activations = shifted_probability(lm, prompt, label, {})
        assert result.base_probs_P[row] == pytest.approx(base, rel=1e-10)
        for column, (layer, neuron) in enumerate(neurons):
            assert result.activations_PK[row, column] == pytest.approx(float(activations[layer][neuron]), rel=1e-10)
            steps = [size * away(activations[layer][neuron]) for size in FEW]
            expected = [shifted_probability(lm, prompt, label, {(layer, neuron): step})[0] for step in steps]
            np.testing.assert_allclose(result.probs_PKS[row, column], expected, rtol=1e-9)
            assert np.ptp(expected) > 0


def silenced(family, dtype, *neurons):
    """A tiny model in which some neurons write nothing."""
    # Widths are multiples of a processor's vectors, as in real models: the kernels treat what is left over differently.
    lm = tiny_model(family, dtype=dtype, intermediate_size=64, n_inner=64)
    for layer, neuron in neurons:
        lm.down_rows(layer)[neuron] = 0
    return lm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["auto", "hooks"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert"])
def test_a_neuron_that_writes_nothing_changes_nothing_in_any_pass(family, method, dtype, monkeypatch):
    lm, silent = silenced(family, dtype, (0, 3), (2, 7)), [(0, 3), (2, 7)]
    monkeypatch.setattr(virtual_tokens, "_LOGIT_BYTES", 4 * 400 * 5)  # the head takes 5 rows at once
    for rows in (None, 1, 7):
        result = sweep(
            lm, prompts_for(lm)[:2], " A", neurons=[*silent, (1, 1)], shifts=FEW, method=method, max_rows=rows
        )
        assert (result.changes_PKS[:, :2] == 0).all() and (result.changes_PKS[:, 2] != 0).all()
        assert np.array_equal(result.probs_PKS[:, 0], np.broadcast_to(result.base_probs_P[:, None], (2, len(FEW))))
    scores_PK = estimate(lm, prompts_for(lm)[:2], [" A"], estimator="ablation", neurons=[*silent, (1, 1)])
    assert (scores_PK[:, :2] == 0).all() and (scores_PK[:, 2] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert"])
def test_a_set_of_neurons_that_write_nothing_changes_nothing_in_any_pass(family, dtype, monkeypatch):
    lm, silent = silenced(family, dtype, (0, 3), (2, 7)), [(0, 3), (2, 7)]
    for budget in (2**28, 3 * 4 * (3 * 64 + 400)):  # all rows in one pass, two shifted rows a pass
        monkeypatch.setattr(interventions, "_ROW_BYTES", budget)
        negs_PLN = np.ones((2, 3, 64))
        result = intervene(
            lm, prompts_for(lm)[:2], " A", sets=[silent, silent[:1], [(1, 1)]], shifts=[1.0, -2.0], negs_PLN=negs_PLN
        )
        assert (result.changes_PDM[:, :, :2] == 0).all() and (result.changes_PDM[:, :, 2] != 0).all()


@pytest.mark.parametrize("family", ["gemma2", "opt", "bert"])
def test_the_row_budget_does_not_change_the_result(family):
    lm = tiny_model(family)
    prompts = prompts_for(lm)[:2]
    results = [sweep(lm, prompts, " B", neurons=3, shifts=FEW, max_rows=rows) for rows in (1, 7, 1000)]
    for other in results[1:]:
        np.testing.assert_allclose(other.probs_PKS, results[0].probs_PKS, rtol=0, atol=1e-10)


def test_a_pass_holds_no_more_rows_than_its_budget(monkeypatch):
    lm = tiny_model("llama")
    widths = []
    handle = lm.layers[-1].register_forward_hook(lambda _, args, output: widths.append(output.shape[1]))
    sweep(lm, PROMPTS[:1], " B", neurons="all", shifts=[-1, 1], max_rows=10)
    handle.remove()
    assert max(widths[2:]) == 10 + 1  # behind the prompt and its last token; the unshifted token is one more
    assert sum(width - 1 for width in widths[2:]) == 3 * 24 * 2


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bert", "distilbert"])
def test_the_slope_of_a_tiny_sweep_is_neurgrad(family):
    lm = tiny_model(family)  # their normalisations keep float64, which a tiny step needs
    prompts = prompts_for(lm)[:2]
    result = sweep(lm, prompts, " A", neurons="all", shifts=[-1e-5, 1e-5])
    negs_PLN = neurgrad(lm, prompts, [" A"]).negs_POLN[:, 0]
    np.testing.assert_allclose(result.negs_PK, negs_PLN.reshape(2, -1), rtol=1e-5, atol=1e-6 * np.abs(negs_PLN).max())


def test_a_positive_shift_moves_away_from_zero_and_a_zero_moves_down():
    lm = tiny_model("opt")  # ReLU: some activations are exactly zero
    result = sweep(lm, PROMPTS[:1], " A", neurons="all", shifts=[0.5])
    activations = result.activations_PK[0]
    assert np.abs(activations).min() == 0
    for index, step in ((int(np.argmax(activations)), 0.5), (int(np.argmin(np.abs(activations))), -0.5)):
        layer, neuron = result.neurons_K2[index].tolist()
        moved, _ = shifted_probability(lm, PROMPTS[0], " A", {(layer, neuron): step})
        assert result.probs_PKS[0, index, 0] == pytest.approx(moved, rel=1e-9)


def test_neurons_are_chosen_once_for_all_prompts_and_again_by_the_same_seed():
    lm = tiny_model("llama")
    first, again, other = (choose_neurons(lm, 5, seed=seed) for seed in (1, 1, 2))
    assert first.shape == (3 * 5, 2) and np.bincount(first[:, 0]).tolist() == [5, 5, 5]
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(np.unique(first, axis=0)) == 15
    assert len(choose_neurons(lm, "all")) == 3 * 24


def test_neurons_are_drawn_from_all_layers_alike_and_never_twice():
    drawn = draw_neurons((LayerShape(10),) * 4, 11, seed=3)
    assert sorted(np.bincount(drawn[:, 0])) == [2, 3, 3, 3]
    assert len(np.unique(drawn, axis=0)) == 11
    assert drawn.tolist() == sorted(drawn.tolist())
    assert np.array_equal(drawn, draw_neurons((LayerShape(10),) * 4, 11, seed=3))
    assert not np.array_equal(drawn, draw_neurons((LayerShape(10),) * 4, 11, seed=4))


def test_all_neurons_can_be_drawn_and_not_one_more():
    assert draw_neurons((LayerShape(2),) * 2, 4).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    with pytest.raises(NegError, match="5 neurons cannot be drawn; the model has 1 to 4"):
        draw_neurons((LayerShape(2),) * 2, 5)


def test_listed_neurons_keep_their_order():
    lm = tiny_model("llama")
    mixed = sweep(lm, PROMPTS[:1], " A", neurons=[(2, 1), (0, 7), (2, 0)], shifts=FEW)
    sorted_ = sweep(lm, PROMPTS[:1], " A", neurons=[(0, 7), (2, 0), (2, 1)], shifts=FEW)
    assert mixed.neurons_K2.tolist() == [[2, 1], [0, 7], [2, 0]]
    np.testing.assert_allclose(mixed.probs_PKS[:, [1, 2, 0]], sorted_.probs_PKS, rtol=1e-10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shifts": [-1, 0, 1]}, "shift 0.0 cannot be measured"),
        ({"shifts": [1, float("nan")]}, "shift nan cannot be measured"),
        ({"shifts": []}, r"shifts of shape \(0,\) are no grid"),
        ({"shifts": [[1, 2]]}, r"shifts of shape \(1, 2\) are no grid"),
        ({"neurons": [(3, 0)]}, "neuron 0 of layer 3 does not exist; tiny-llama has layers 0 to 2 and neurons 0 to 23"),
        ({"neurons": [(0, -1)]}, "neuron -1 of layer 0 does not exist"),
        ({"neurons": [(0, 1), (0, 1)]}, "given twice"),
        ({"neurons": []}, "are no list of"),
        ({"neurons": 0}, "0 neurons a layer cannot be chosen"),
        ({"neurons": 25}, "25 neurons a layer cannot be chosen; tiny-llama has 1 to 24"),
        ({"neurons": "some"}, "neurons 'some' is not known"),
        ({"max_rows": 0}, "max_rows 0"),
        ({"method": "fast"}, "method 'fast' is not known"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(NegError, match=message) as error:
        sweep(tiny_model("llama"), PROMPTS[:1], " A", **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [[" A", " B", " C"], [[" A", " B"], [" A", " B"]], []])
def test_a_sweep_has_one_target_a_prompt(labels):
    with pytest.raises(LabelError, match="one"):
        sweep(tiny_model("llama"), PROMPTS[:2], labels)


def test_virtual_tokens_of_a_masked_model_are_refused():
    lm = tiny_model("bert")
    with pytest.raises(ModelError, match="needs a causal model"):
        sweep(lm, prompts_for(lm), " A", method="virtual")


@pytest.mark.parametrize("method", ["virtual", "hooks"])
def test_nothing_is_left_behind_by_an_exception(method, monkeypatch):
    lm = tiny_model("llama")
    implementation = lm.model.config._attn_implementation
    before = sweep(lm, PROMPTS[:1], " A", neurons=1, shifts=FEW)
    whole_head, calls = lm.model.lm_head.forward, []

    def breaks_later(hidden):
        calls.append(hidden.shape)
        if len(calls) > 1:
            raise RuntimeError("broken on purpose")
        return whole_head(hidden)

    monkeypatch.setattr(lm.model.lm_head, "forward", breaks_later)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        sweep(lm, PROMPTS[:1], " A", neurons=1, shifts=FEW, method=method)
    monkeypatch.undo()
    assert no_hooks(lm) and lm.model.config._attn_implementation == implementation
    after = sweep(lm, PROMPTS[:1], " A", neurons=1, shifts=FEW)
    assert np.array_equal(before.probs_PKS, after.probs_PKS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_sets_of_neurons_are_shifted_together_in_the_direction_of_their_gradient(family):
    lm = tiny_model(family)
    prompts = prompts_for(lm)[:2]
    sets = random_sets(lm, [1, 4, 16], seed=3)
    result = intervene(lm, prompts, " A", sets=sets, shifts=[0.5, -1])
    negs_PLN = neurgrad(lm, prompts, [" A"]).negs_POLN[:, 0]
    assert result.sizes_M.tolist() == [1, 4, 16] and result.shifts_D.tolist() == [0.5, -1]
    for row, prompt in enumerate(prompts):
        base, before = shifted_probability(lm, prompt, " A", {})
        assert result.base_probs_P[row] == pytest.approx(base, rel=1e-10)
        for (index, size), (column, neurons) in product(enumerate([0.5, -1]), enumerate(sets)):
            shifts = {(la, n): size * np.sign(negs_PLN[row, la, n]) for la, n in neurons.tolist()}
            steps = {(la, n): shift * away(before[la][n]) for (la, n), shift in shifts.items()}
            assert result.probs_PDM[row, index, column] == pytest.approx(
                shifted_probability(lm, prompt, " A", steps)[0], rel=1e-9
            )
            predicted = sum(negs_PLN[row, la, n] * shifts[la, n] for la, n in neurons.tolist())
            assert result.predicted_PDM[row, index, column] == pytest.approx(predicted, rel=1e-9)


def test_small_shifts_of_many_neurons_add_up():
    lm = tiny_model("gpt2")
    result = intervene(lm, PROMPTS, LABELS[0], sets=random_sets(lm, [64]), shifts=[1e-5])
    np.testing.assert_allclose(result.changes_PDM, result.predicted_PDM, rtol=1e-2)
    assert np.corrcoef(result.changes_PDM.ravel(), result.predicted_PDM.ravel())[0, 1] > 0.999


def test_larger_random_sets_hold_the_smaller_ones():
    small, large = random_sets(tiny_model("llama"), [4, 72], seed=1)
    assert small.tolist() == large[:4].tolist()
    assert len(np.unique(large, axis=0)) == 72


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shifts": [0.0]}, "shift 0.0 cannot be measured"),
        ({"sets": []}, "no sets were given"),
        ({"sets": [[(9, 9)]]}, "neuron 9 of layer 9 does not exist"),
        ({"negs_PLN": np.ones((1, 2, 3))}, r"NEGs of shape \(1, 2, 3\) do not fit"),
    ],
)
def test_bad_interventions_are_refused(settings, message):
    with pytest.raises(NegError, match=message):
        intervene(tiny_model("llama"), PROMPTS[:2], " A", **{"sets": [[(0, 0)]], "shifts": [1.0], **settings})


def test_more_neurons_than_the_model_has_are_refused():
    with pytest.raises(NegError, match="a set of 73 neurons cannot be drawn; tiny-llama has 1 to 72"):
        random_sets(tiny_model("llama"), [73])


def by_nodes(lm, shifts, **settings):
    """A sweep of all neurons by nodes, and its slow twin: the whole grid."""
    both = [sweep(lm, prompts_for(lm)[:2], " A", shifts=shifts, neurons="all", **one) for one in (settings, {})]
    assert both[0].shifts_S.tolist() == both[1].shifts_S.tolist()
    return both


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("nodes", "ranges"), [(5, ()), (7, (1, 0.4))])
def test_a_sweep_by_nodes_has_the_lines_of_the_whole_grid(family, nodes, ranges):
    few, whole = by_nodes(tiny_model(family), DEFAULT_SHIFTS, nodes=nodes, ranges=ranges)
    assert whole.by_nodes_PK is None and few.by_nodes_PK.mean() > 0.5
    for largest in (*ranges, 2):
        nearly, exactly = few.within(largest), whole.within(largest)
        np.testing.assert_allclose(nearly.negs_PK, exactly.negs_PK, atol=5e-3 * np.abs(exactly.negs_PK).max())
        np.testing.assert_array_equal(nearly.linear_PK, exactly.linear_PK)
        np.testing.assert_allclose(nearly.pearson_PK, exactly.pearson_PK, atol=1e-2)


def test_neurons_that_nodes_say_too_little_of_are_measured_at_every_shift():
    few, whole = by_nodes(tiny_model("bert"), DEFAULT_SHIFTS, nodes=4)
    assert 0 < few.by_nodes_PK.mean() < 1
    full_PK = ~few.by_nodes_PK
    np.testing.assert_allclose(few.probs_PKS[full_PK], whole.probs_PKS[full_PK], rtol=1e-12)
    assert np.abs(few.probs_PKS - whole.probs_PKS)[few.by_nodes_PK].max() > 1e-12


@pytest.mark.parametrize(
    ("pearson", "tail", "unsettled"),
    [(0.9, 0, False), (0.9, 0.009, False), (0.9, 0.011, True), (0.97, 0.009, False), (0.97, 0.011, True)]
    + [
        (sign * (0.95 + off), 0.009, abs(off) < 0.009) for sign in (1, -1) for off in (-0.0095, -0.0085, 0.0085, 0.0095)
    ],
)
def test_a_bend_at_the_nodes_end_or_a_flag_that_it_could_turn_asks_for_every_shift(pearson, tail, unsettled):
    rule, grid = gauss_rule(DEFAULT_SHIFTS, 5), node_grid(DEFAULT_SHIFTS, 5)
    coefficients = [0, pearson, np.sqrt(1 - pearson**2 - tail), 0, np.sqrt(tail)]
    changes = np.linalg.solve(rule.coefficients_NN, coefficients)
    changes_1M = (changes - changes[2])[rule.nodes_N != 0][None]
    assert fit_lines(DEFAULT_SHIFTS, grid.on_grid(changes_1M)).pearson[0] == pytest.approx(pearson)
    assert sweeps._unsettled(grid, changes_1M).tolist() == [unsettled]


def test_a_neuron_that_moves_nothing_at_the_nodes_of_a_range_is_measured_at_every_shift():
    grid = node_grid(DEFAULT_SHIFTS, 4, [1])
    moving = np.stack([0 * grid.shifts_M, grid.shifts_M, np.where(np.abs(grid.shifts_M) > 1, grid.shifts_M, 0)])
    assert sweeps._unsettled(grid, moving).tolist() == [True, False, True]


def test_a_sweep_by_nodes_runs_only_the_nodes_of_smooth_neurons(monkeypatch):
    lm, rows, measure = tiny_model("llama"), [], virtual_tokens.VirtualPrompt._measure
    monkeypatch.setattr(
        virtual_tokens.VirtualPrompt,
        "_measure",
        lambda self, shifts: rows.append(len(shifts.sizes_R)) or measure(self, shifts),
    )
    result = sweep(lm, PROMPTS[:1], " A", neurons="all", nodes=5)
    n_neurons, n_whole = result.by_nodes_PK.size, int((~result.by_nodes_PK).sum())
    assert sum(rows) == 4 * n_neurons + 20 * n_whole < 8 * n_neurons


def test_a_range_that_cuts_a_piece_is_refused():
    result = sweep(tiny_model("llama"), PROMPTS[:1], " A", neurons=1, nodes=4, ranges=[1])
    assert result.within(1.1).shifts_S.tolist() == result.within(1).shifts_S.tolist()
    with pytest.raises(NegError, match=r"range 1.5 is none .* chosen for \(1, 2\); sweep with it"):
        result.within(1.5)


def test_too_few_nodes_for_a_sweep_are_refused():
    with pytest.raises(NegError, match=r"nodes 2 is too few"):
        sweep(tiny_model("llama"), PROMPTS[:1], " A", neurons=1, nodes=2)
