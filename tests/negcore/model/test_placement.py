"""Models on several devices: on a machine without a GPU these are the processor and the disk."""

import gc
import tempfile

import numpy as np
import pytest
import torch
from support import LABELS, PROMPTS, by_turns, prompts_for, save_tiny_model

from negcore.analysis.causal import SkillSet, shift_sets
from negcore.analysis.logit_lens import logit_lens
from negcore.errors import ModelError
from negcore.measure.estimators import ESTIMATORS, WITH_REFERENCES, estimate
from negcore.measure.interventions import intervene
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import sweep
from negcore.model.language_model import describe_model
from negcore.model.placement import even_map, main_device, map_bytes, weights_pass
from negcore.model.skeleton import skeleton

FAMILIES = ["llama", "gemma3_text", "gpt2", "bert", "gpt_neox", "mixtral"]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: cuda:0 + cpu is not tried")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = str(save_tiny_model(family, tmp_path_factory.mktemp(family) / "tiny"))
        return made[family]

    return of


def measured(lm):
    """Everything that runs on a model, as arrays."""
    prompts = prompts_for(lm)
    negs = neurgrad(lm, prompts, LABELS)
    found = {"negs": negs.negs_POLN, "activations": negs.activations_PLN, "probs": negs.probs_PO}
    if lm.has_experts:
        return found
    found["sweep"] = sweep(lm, prompts[:2], [" A"] * 2, neurons=[(0, 1), (1, 3), (2, 5)]).negs_PK
    for name in ESTIMATORS:
        some = {"answers": [0, 1], "neurons": [(0, 1), (2, 5)], "estimator": name}
        some |= {"references": prompts[4:6]} if name in WITH_REFERENCES else {}
        found[name] = estimate(lm, prompts[:2], LABELS[:2], **some)
    shifts = intervene(lm, prompts[:2], " A", sets=[[(0, 1), (1, 3)], [(2, 5)]], shifts=[0.5, -0.5])
    found["interventions"] = shifts.probs_PDM
    best = SkillSet("best", 2, 0, np.array([1, lm.layer_width + 3]), np.array([1, -1], np.int8))
    of_first_PK = negs.negs_POLN[:, 0].reshape(len(prompts), -1)[:, best.neurons_K]
    gold = {"gold_P": [0] * len(prompts), "gold_negs_PK": of_first_PK}
    found["causal check"] = shift_sets(lm, prompts, LABELS, sets=[best], shifts=[2.0], **gold).probs_PMO
    found["rows"] = torch.stack([lm.down_rows(layer) for layer in range(lm.n_layers)]).float().cpu().numpy()
    return found


def as_on_one_device(ref, **options):
    """Check that a model measures the same where it is as on one device."""
    one, several = load_model(ref, device="cpu"), load_model(ref, **options)
    expected, found = measured(one), measured(several)
    for name, numbers in expected.items():
        worst = np.abs(found[name] - numbers).max()
        assert worst <= 2e-5 * np.abs(numbers).max() + 1e-8, f"{name}: {worst}"
    return several


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_processor_and_the_disk_measures_what_it_does_on_the_processor(folder, family):
    ref = folder(family)
    lm = as_on_one_device(ref, device_map=by_turns(ref, "cpu", "disk"))
    assert weights_pass(lm.model) and main_device(lm.model).type == "cpu" and lm.check.passed


@GPU
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_a_gpu_and_the_processor_measures_what_it_does_on_the_processor(folder, family):
    ref = folder(family)
    lm = as_on_one_device(ref, device_map=by_turns(ref, "cuda:0", "cpu"))
    assert lm.device == torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_weights_that_wait_on_disk_are_read_in_the_type_that_is_computed_in(folder, dtype):
    ref = folder("llama")
    one, passing = load_model(ref, dtype=dtype, device="cpu"), load_model(ref, dtype=dtype, device_map="disk")
    for prompts in (PROMPTS[:2], PROMPTS[:2]):
        swept, expected = (sweep(lm, prompts, [" A"] * 2, neurons=[(0, 1), (2, 5)]).negs_PK for lm in (passing, one))
        np.testing.assert_allclose(swept, expected, rtol=1e-2 if dtype == "bfloat16" else 1e-4)
        ours, theirs = (neurgrad(lm, prompts, LABELS).negs_POLN for lm in (passing, one))
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < (0.1 if dtype == "bfloat16" else 1e-6)


def test_the_folder_for_waiting_weights_goes_with_its_model_or_its_process(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lm = load_model(folder("llama"), device_map={"": "disk"})
    assert list(tmp_path.glob("neg-*/in-use"))  # which lets the next process tell that this one lives
    del lm
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_the_logit_lens_reads_weights_that_wait_on_disk(folder):
    one, passing = load_model(folder("llama"), device="cpu"), load_model(folder("llama"), device_map={"": "disk"})
    assert logit_lens(passing, 1, 3) == logit_lens(one, 1, 3)


# The map


def test_every_gpu_takes_about_the_same_share_and_no_block_is_split(folder):
    card = describe_model(folder("llama"))
    model = skeleton(card.config, masked=False)
    found = even_map(model, "model.layers", torch.float32, 2)
    sizes = map_bytes(model, found, torch.float32)
    assert set(found.values()) == {0, 1} and sum(sizes.values()) >= sum(4 * p.numel() for p in model.parameters())
    assert not any("mlp" in path or "self_attn" in path for path in found)
    assert max(sizes.values()) < 0.75 * sum(sizes.values())


@pytest.mark.parametrize(
    ("device_map", "says"),
    [
        ("auto", "there is none here"),
        ({"model": "cpu"}, "says nothing of 'lm_head.weight'"),
        ({"": "cpu", "model.nothing": "disk"}, "names 'model.nothing', which the model does not have"),
        ({"": "gpu"}, "says 'gpu' for ''; allowed are cuda:0, cuda:1 ..., cpu and disk"),
        ({"": "cuda:64"}, "names GPU 64, and there are"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_in_one_line(folder, device_map, says):
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("there are GPUs")
    with pytest.raises(ModelError, match=says):
        load_model(folder("llama"), device_map=device_map)


def test_folders_of_weights_on_disk_go_with_their_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lm = load_model(folder("mixtral"), device_map="disk")
    assert len(list(tmp_path.iterdir())) == 1
    del lm
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_weights_that_wait_are_never_taken_for_tied_ones_whose_address_they_got(folder):
    """accelerate knows tied weights by their address, which is free for others once a weight was copied."""
    lm = load_model(folder("gpt2"), device_map="disk")
    hooks = [module._hf_hook for module in lm.model.modules() if hasattr(module, "_hf_hook")]
    assert hooks and not any(getattr(hook, "tied_params_map", None) for hook in hooks)
