import numpy as np
import pytest
from support import LABELS, prompts_for, tiny_model

from negcore.measure.benchmark import Timing, benchmark, plain_gradients
from negcore.measure.neurgrad import neurgrad


@pytest.mark.parametrize("family", ["llama", "bert", "opt"])
def test_the_plain_gradients_are_those_of_neurgrad_but_for_the_direction(family):
    lm = tiny_model(family)
    prompt = prompts_for(lm)[3]
    batch = neurgrad(lm, [prompt], LABELS)
    signs_LN = np.where(batch.activations_PLN[0] > 0, 1, -1)
    plain_OLN = plain_gradients(lm, prompt, LABELS).numpy()
    assert np.abs(plain_OLN).max() > 0
    np.testing.assert_allclose(plain_OLN * signs_LN, batch.negs_POLN[0], atol=1e-12)


def test_the_ratio_is_that_of_the_medians():
    assert Timing("it", [1.0, 2.0, 9.0], [8.0, 6.0, 90.0]).ratio == 4.0


def test_every_repeat_of_both_ways_is_timed():
    lm = tiny_model("gpt2")
    compared = benchmark(lm, prompts_for(lm)[0], LABELS, neurons=2, repeats=2)
    assert [len(one.fast_s) + len(one.plain_s) for one in compared] == [4, 4]
    assert all(seconds > 0 for one in compared for seconds in one.fast_s + one.plain_s)
