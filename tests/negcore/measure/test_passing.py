"""Models whose weights pass through their device, from the disk."""

import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from support import LABELS, PROMPTS, REPOSITORY, prompts_for, save_tiny_model

from negcore.measure.forward import PassingBatch, probed_batches
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import label_gradients, neurgrad
from negcore.model.encoding import encode


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("llama") / "tiny"))


@pytest.fixture
def reads(monkeypatch):
    """How often each weight is read from its file."""
    counted, read = Counter(), OffloadedWeightsLoader.__getitem__

    def counting(self, name):
        counted[name] += 1
        return read(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counting)
    return counted


def test_each_weight_is_read_twice_a_batch_of_prompts_whatever_their_number_and_labels(llama, reads):
    lm = load_model(llama, device_map="disk")
    encoded = encode(lm.card, PROMPTS, LABELS)
    assert lm.layer_width  # reads a weight once
    for size in (2, len(PROMPTS)):
        reads.clear()
        batches = probed_batches(lm, encoded.ids, batch_size=size, n_shared=0)
        n_batches = 0
        for batch in batches:
            assert isinstance(batch, PassingBatch)
            label_gradients(batch, torch.from_numpy(encoded.label_ids_PO[batch.rows]))
            n_batches += 1
        assert n_batches == -(-len(PROMPTS) // size)
        n_blocks = len(lm.model.get_submodule("model.layers"))
        assert len(reads) == 9 * n_blocks and set(reads.values()) == {2 * n_batches}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "phi3", "opt", "granite", "starcoder2"])
def test_gradients_taken_block_by_block_are_those_of_the_whole_graph(tmp_path, family):
    ref = str(save_tiny_model(family, tmp_path / "tiny"))
    passing, whole = load_model(ref, dtype="float64", device_map="disk"), load_model(ref, dtype="float64", device="cpu")
    assert passing.check.passed and passing.way == whole.way
    prompts = prompts_for(whole)
    for size in (None, 2):
        ours, theirs = (neurgrad(lm, prompts, LABELS, batch_size=size) for lm in (passing, whole))
        for name in ("negs_POLN", "activations_PLN", "probs_PO"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-12)


def test_a_model_is_as_it_was_after_a_batch_even_one_that_failed(llama):
    lm = load_model(llama, device_map="disk")
    forwards = [module.forward for module in lm.layers]
    (batch,) = probed_batches(lm, encode(lm.card, PROMPTS[:2], LABELS).ids)
    with pytest.raises(RuntimeError):
        label_gradients(batch, torch.full((2, 1), 10**6))
    assert [module.forward for module in lm.layers] == forwards
    assert all(parameter.is_meta for parameter in lm.layers[0].parameters())


@pytest.mark.slow
def test_a_real_model_is_measured_in_less_memory_than_its_weights_take():
    figures = {}
    for place in ("disk", "here"):
        command = [sys.executable, REPOSITORY / "tests" / "passing_memory.py", "--weights", place, "--prompts", "6"]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        figures[place] = json.loads(ran.stdout.splitlines()[-1])
    assert figures["disk"]["peak_bytes"] < 0.7 * figures["disk"]["weight_bytes"]
    assert figures["here"]["peak_bytes"] > figures["here"]["weight_bytes"]
    np.testing.assert_allclose(figures["disk"]["probs"], figures["here"]["probs"], rtol=1e-4)
    np.testing.assert_allclose(figures["disk"]["norm"], figures["here"]["norm"], rtol=1e-4)
