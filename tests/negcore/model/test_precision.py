import copy

import numpy as np
import pytest
import torch
from support import CORE, LABELS, prompts_for, tiny_model, tiny_tokenizer

from negcore.analysis.causal import SkillSet, shift_sets
from negcore.measure.estimators import estimate
from negcore.measure.interventions import intervene, random_sets
from negcore.measure.loading import as_language_model
from negcore.measure.sweeps import sweep
from negcore.model.precision import in_float32

FEW = [-2.0, -0.2, 0.2, 2.0]


def both(family, dtype=torch.bfloat16):
    """A model of a half type, and the same weights in float32."""
    half = tiny_model(family, dtype=dtype)
    return half, as_language_model(copy.deepcopy(half.model).float(), tiny_tokenizer(), name="wide")


@pytest.mark.parametrize("method", ["auto", "hooks"])
@pytest.mark.parametrize("family", [*CORE, "deberta", "deberta-v2", "lfm2"])
def test_a_sweep_of_half_weights_is_that_of_the_same_weights_in_float32(family, method):
    half, wide = both(family)
    results = [sweep(lm, prompts_for(lm)[:3], " A", neurons=2, shifts=FEW, method=method) for lm in (half, wide)]
    for name in ("probs_PKS", "base_probs_P", "activations_PK"):
        assert np.array_equal(*(getattr(one, name) for one in results)), name
    assert np.abs(results[0].changes_PKS).max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_whatever_takes_differences_of_predictions_computes_in_float32(family, dtype):
    half, wide = both(family, dtype)
    prompts, sets, ones = prompts_for(half)[:2], random_sets(half, [1, 9]), np.ones((2, 3, 24))
    skills = [SkillSet("top", 2, 0, np.array([3, 40]), np.array([1, -1], np.int8))]
    measures = [
        lambda lm: estimate(lm, prompts, [" A"], estimator="ablation", neurons=2),
        lambda lm: estimate(lm, prompts, [" A"], estimator="log_probability_increase", neurons=2),
        lambda lm: intervene(lm, prompts, " A", sets=sets, shifts=[1.0], negs_PLN=ones).probs_PDM,
        lambda lm: (
            shift_sets(
                lm, prompts, LABELS[:2], gold_P=[0, 1], gold_negs_PK=[[1, 2], [2, 1]], sets=skills, shifts=[1.0]
            ).probs_PMO
        ),
    ]
    for measure in measures:
        assert np.array_equal(measure(half), measure(wide))


def test_the_weights_are_the_same_tensors_afterwards_even_after_an_exception(monkeypatch):
    lm = tiny_model("gemma2", dtype=torch.bfloat16)
    before = {name: (value.data_ptr(), value.dtype) for name, value in lm.model.state_dict().items()}

    def broken(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    sweep(lm, prompts_for(lm)[:1], " A", neurons=1, shifts=FEW)
    monkeypatch.setattr(lm.layers[1].mlp.act_fn, "forward", broken)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        sweep(lm, prompts_for(lm)[:1], " A", neurons=1, shifts=FEW)
    assert {name: (value.data_ptr(), value.dtype) for name, value in lm.model.state_dict().items()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_one_layer_at_a_time_is_wide():
    lm, wide_at_once = tiny_model("llama", dtype=torch.bfloat16), []

    def count(*_):
        wide_at_once.append([parameter.dtype for layer in lm.layers for parameter in layer.parameters()])

    handles = [layer.mlp.act_fn.register_forward_pre_hook(count) for layer in lm.layers]
    with in_float32(lm), torch.no_grad():
        lm.model(input_ids=torch.tensor([[5, 6, 7]]))
    for handle in handles:
        handle.remove()
    a_layer = len(list(lm.layers[0].parameters()))
    assert [types.count(torch.float32) for types in wide_at_once] == [a_layer] * 3


def test_other_types_are_left_as_they_are():
    lm = tiny_model("llama", dtype=torch.float64)
    with in_float32(lm):
        assert not any(module._forward_pre_hooks for module in lm.model.modules())
