import numpy as np
import pytest
from support import LABELS, prompts_for, tiny_model

from negcore.measure.benchmark import Timing, benchmark, compare_types, plain_gradients
from negcore.measure.neurgrad import neurgrad
from negcore.model.language_model import DTYPES


@pytest.mark.parametrize(
    ("family", "router"),
    [("llama", "through"), ("bert", "through"), ("opt", "through"), ("qwen2_moe", "through"), ("qwen2_moe", "fixed")],
)
def test_the_plain_gradients_are_those_of_neurgrad_but_for_the_direction(family, router):
    lm = tiny_model(family, router=router)
    prompt = prompts_for(lm)[3]
    batch = neurgrad(lm, [prompt], LABELS)
    signs_LN = np.where(batch.activations_PLN[0] > 0, 1, -1)
    plain_OLN = plain_gradients(lm, prompt, LABELS).numpy()
    assert np.abs(plain_OLN).max() > 0
    np.testing.assert_allclose(plain_OLN * signs_LN, batch.negs_POLN[0], atol=1e-12)


def test_the_ratio_is_that_of_the_medians():
    assert Timing("it", [1.0, 2.0, 9.0], [8.0, 6.0, 90.0]).ratio == 4.0


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe"])
def test_every_repeat_of_both_ways_is_timed(family):
    lm = tiny_model(family)
    told = []
    compared = benchmark(lm, prompts_for(lm)[0], LABELS, neurons=2, repeats=2, watch=told.append)
    assert [line.partition(": ")[2] for line in told] == ["the first call", "repeat 1 of 2", "repeat 2 of 2"] * 2
    assert [len(one.fast_s) + len(one.plain_s) for one in compared] == [4, 4]
    assert all(seconds > 0 for one in compared for seconds in one.fast_s + one.plain_s)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_half_types_are_compared_with_float32_in_the_sweeps_own_way_and_in_the_type_itself(family):
    rows = compare_types(
        lambda dtype: tiny_model(family, dtype=DTYPES[dtype]),
        "bfloat16",
        prompts_for(tiny_model(family))[:3],
        LABELS[:3],
        neurons=9,
    )
    shown = {(row.dtype, row.what): row for row in rows}
    assert list(shown) == [
        *(("float32", what) for what in ("NeurGrad", "sweep")),
        *(("bfloat16", what) for what in ("NeurGrad", "sweep", "sweep, in the type itself")),
    ]
    for exact in ("NeurGrad", "sweep"):
        assert shown["float32", exact].signs == 1 and shown["float32", exact].pearson == pytest.approx(1)
    ours, naive = shown["bfloat16", "sweep"], shown["bfloat16", "sweep, in the type itself"]
    assert ours.linear_share > naive.linear_share + 0.05
    assert shown["bfloat16", "NeurGrad"].linear_share is None
