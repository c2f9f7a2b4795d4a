"""Random weights: those of a new model of the configuration, the same for a seed, and a model that can be measured."""

import numpy as np
import pytest
import torch
from support import LABELS, prompts_for, tiny_config, tiny_model

from negcore.measure.neurgrad import neurgrad
from negcore.measure.random_weights import randomise_weights
from negcore.model.architectures import ARCHITECTURES
from negcore.model.language_model import DTYPES
from negcore.model.skeleton import auto_class


def weights(lm):
    return {name: weight.detach().clone() for name, weight in lm.model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_weights_are_those_of_a_new_model(family):
    config = tiny_config(family)
    torch.manual_seed(3)
    twin = auto_class(config, masked=ARCHITECTURES[family].masked).from_config(config)
    found = weights(randomise_weights(tiny_model(family), 3))
    for name, weight in twin.named_parameters():
        assert torch.equal(weight.double(), found[name]), name


def test_weights_depend_on_the_seed_alone_and_leave_others_their_chance():
    found = [weights(randomise_weights(tiny_model("llama", dtype=DTYPES["float32"]), seed)) for seed in (7, 8)]
    half = weights(randomise_weights(tiny_model("llama", dtype=DTYPES["bfloat16"]), 7))
    for name, weight in found[0].items():
        assert torch.equal(weight.bfloat16(), half[name]), name
        if weight.ndim > 1:
            assert not torch.equal(weight, found[1][name]), name
    lm = tiny_model("llama")
    state = torch.get_rng_state()
    randomise_weights(lm, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_model_is_another_revision_that_passed_its_check_and_has_other_negs():
    plain = tiny_model("llama")
    prompts = prompts_for(plain)
    before = neurgrad(plain, prompts, LABELS).negs_POLN
    lm = randomise_weights(plain, 1)
    assert lm.revision == "memory+random-1" and lm.check is not None and lm.check.passed
    after = neurgrad(lm, prompts, LABELS).negs_POLN
    assert np.isfinite(after).all() and np.abs(after - before).max() > 1e-7
