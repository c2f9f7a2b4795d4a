import numpy as np
import pytest
from support import LABELS, prompts_for, tiny_model

from negcore.analysis.causal import SkillSet, shift_sets
from negcore.errors import LabelError, PromptError
from negcore.measure.estimators import estimate
from negcore.measure.interventions import intervene, random_sets
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import sweep
from negcore.model.encoding import encode, encode_targets

OPTIONS = LABELS[:3]
SET = SkillSet("top", 2, 0, np.array([3, 40]), np.array([1, -1]))
CAUSAL = {"gold_P": [0, 1], "gold_negs_PK": np.ones((2, 2)), "sets": [SET], "shifts": [1.0]}


@pytest.fixture(params=["llama", "bert"])
def lm(request):
    return tiny_model(request.param)


@pytest.mark.parametrize(
    ("measure", "result"),
    [
        (neurgrad, "negs_POLN"),
        (lambda *given: estimate(*given, estimator="gradient", answers=[0, 1]), None),
        (lambda *given: shift_sets(*given, **CAUSAL), "probs_PMO"),
    ],
)
def test_encoded_prompts_are_measured_as_their_texts_and_not_tokenised_again(lm, measure, result, monkeypatch):
    prompts = prompts_for(lm)[:2]
    from_text, encoded = measure(lm, prompts, OPTIONS), encode(lm.card, prompts, OPTIONS)
    monkeypatch.setattr(type(lm.tokenizer), "__call__", None)
    from_ids = measure(lm, encoded)
    if result is not None:
        from_text, from_ids = getattr(from_text, result), getattr(from_ids, result)
    np.testing.assert_array_equal(from_ids, from_text)


def test_encoded_targets_are_swept_and_shifted_without_tokenising_again(lm, monkeypatch):
    prompts, targets, sets = prompts_for(lm)[:2], [" A", " C"], random_sets(lm, [1, 8])
    encoded = encode_targets(lm.card, prompts, targets)
    swept, shifted = sweep(lm, prompts, targets), intervene(lm, prompts, targets, sets=sets, shifts=[1])
    monkeypatch.setattr(type(lm.tokenizer), "__call__", None)
    np.testing.assert_array_equal(sweep(lm, encoded).probs_PKS, swept.probs_PKS)
    np.testing.assert_array_equal(intervene(lm, encoded, sets=sets, shifts=[1]).probs_PDM, shifted.probs_PDM)


def test_a_sweep_refuses_encoded_prompts_with_several_labels(lm):
    encoded = encode(lm.card, prompts_for(lm)[:2], OPTIONS)
    with pytest.raises(LabelError, match="encoded prompts have 3 labels each; give one target a prompt"):
        sweep(lm, encoded)


def test_labels_beside_encoded_prompts_are_refused(lm):
    encoded = encode(lm.card, prompts_for(lm)[:2], OPTIONS)
    with pytest.raises(LabelError, match=r"labels \[' A', ' B', ' C'\] were given beside encoded prompts"):
        neurgrad(lm, encoded, OPTIONS)


def test_texts_need_labels(lm):
    with pytest.raises(LabelError, match="give a list of strings"):
        neurgrad(lm, prompts_for(lm))
    with pytest.raises(LabelError, match="0 labels were given for 7 prompts"):
        sweep(lm, prompts_for(lm))
    with pytest.raises(PromptError, match="no prompts were given"):
        neurgrad(lm, [], OPTIONS)


@pytest.mark.parametrize(
    "prompts", ["Answer:", [None], [3], [["Answer:"]], [b"Answer:"], ["\ud800 Answer:"]], ids=ascii
)
def test_prompts_that_are_no_list_of_texts_are_refused_in_one_line(lm, prompts):
    with pytest.raises(PromptError, match="give a list of strings|the tokenizer fails on a text") as error:
        neurgrad(lm, prompts, LABELS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [[3], [" A", 3], [[" A"], None], [[3, 4]], [[b" A"]]], ids=str)
def test_labels_that_are_no_texts_are_refused_in_one_line(lm, labels):
    with pytest.raises(LabelError, match="was given for labels; labels are strings"):
        neurgrad(lm, prompts_for(lm)[:1], labels)
