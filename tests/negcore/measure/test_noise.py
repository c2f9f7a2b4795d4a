"""The noise in a model's numbers: distances that a pencil can check, and findings about models that are well or not."""

import json
import shutil

import numpy as np
import pytest
import torch
from support import save_tiny_model, tiny_model
from tokenizers import processors

from negcore.errors import ModelError
from negcore.measure import noise
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import NeurGradBatch
from negcore.measure.noise import Distance, distance, examine_model
from negcore.model.language_model import describe_model


def batch(negs, probs=(0.25,)):
    negs_POLN = np.array(negs, float).reshape(1, 1, 1, -1)
    return NeurGradBatch(negs_POLN, negs_POLN[:, 0], np.array([probs]), np.array([[1]]))


def test_the_distance_of_two_measurements_is_that_of_a_pencil():
    apart = distance(batch([3.0, 4.0, -1e-9, 0.0], [0.5]), batch([3.0, 4.0, 0.0, 0.0], [0.25]))
    assert (apart.signs, apart.shift) == (0.75, 0.25)
    assert apart.error == pytest.approx(2e-10)
    assert distance(batch([3.0, 0.0]), batch([0.0, 4.0])).error == pytest.approx(5 / 4)


@pytest.mark.parametrize(
    ("apart", "judgement"),
    [
        (Distance(1.0, 1e-6, 0.0), "good"),
        (Distance(0.98, 1e-6, 0.0), "look"),
        (Distance(1.0, 0.1, 0.0), "look"),
        (Distance(0.6, 0.1, 0.0), "bad"),
        (Distance(1.0, float("nan"), 0.0), "bad"),
    ],
)
def test_distances_are_judged(apart, judgement):
    assert apart.judgement == judgement
    assert ("not finite" in str(apart)) == np.isnan(apart.error)


def test_a_share_that_is_not_all_is_never_shown_as_all():
    assert "99.99 % of NEGs" in str(Distance(1 - 1e-7, 0.0, 0.0))
    assert "all NEGs" in str(Distance(1.0, 0.0, 0.0))


# Whole models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", n_positions=4096)


def findings(card, **options):
    return {finding.what: finding for finding in examine_model(card, **options)}


@pytest.fixture(scope="module")
def found(folder):
    return findings(describe_model(str(folder)))


def test_a_model_that_is_well_is_told_part_by_part(found):
    judged = {what: finding.judgement for what, finding in found.items()}
    assert judged["tokenizer"] == judged["batch and padding"] == judged["float32 against float64"] == "good"
    assert [judgement for what, judgement in judged.items() if what.startswith("check: ")] == ["good"] * 5
    assert {"BOS", "label mass", "bfloat16 against float64", "float16 against float64"} <= judged.keys()
    assert "bad" not in judged.values()


def test_more_exact_types_are_nearer_to_float64(found):
    def error(dtype):
        return float(found[f"{dtype} against float64"].found.split("off by ")[1].split()[0])

    assert error("float32") < 1e-4 < error("float16") < error("bfloat16")


def test_a_model_that_spreads_its_probability_lacks_label_mass(found):
    assert found["label mass"].judgement == "look" and "--shots 1" in found["label mass"].advice


def test_noise_of_the_type_that_is_asked_for_is_judged_in_full(folder, monkeypatch):
    monkeypatch.setattr(noise, "_USABLE", (1.0, 1e-9))
    card = describe_model(str(folder))
    assert findings(card)["bfloat16 against float64"].judgement == "look"
    asked = findings(card, dtype="bfloat16", exact="float32")
    assert asked["bfloat16 against float32"].judgement == "bad"
    assert asked["bfloat16 against float32"].advice == "--dtype float32"
    assert "float32 against float32" not in asked


def test_a_model_that_fails_its_check_is_bad_and_not_measured(folder, monkeypatch):
    def refuse(lm):
        raise ModelError("measured wrongly")

    monkeypatch.setattr(noise, "accept", refuse)
    found = findings(describe_model(str(folder)))
    assert "batch and padding" not in found and "float32 against float64" not in found


def test_labels_that_cannot_be_asked_end_the_examination(tmp_path):
    card = describe_model(str(save_tiny_model("llama", tmp_path / "short")))
    (finding,) = examine_model(card)
    assert finding.judgement == "bad" and finding.found.startswith("mini/fact cannot be asked: ")


# BOS


def begin_with(folder, target, template):
    """Copy a model with a tokenizer that puts tokens in front of a text."""
    shutil.copytree(folder, target)
    file = target / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    post = processors.TemplateProcessing(single=template, special_tokens=[("<end>", 0)])
    tokenizer["post_processor"] = json.loads(post.__getstate__())
    file.write_text(json.dumps(tokenizer))
    settings = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<end>"}))
    return describe_model(str(target))


@pytest.mark.parametrize(
    ("template", "judgement", "says"),
    [
        ("<end> $A", "good", "every prompt begins with '<end>', once"),
        ("<end> <end> $A", "bad", "prompts begin with '<end>' 2 times"),
    ],
)
def test_bos_is_there_once_or_too_often(folder, tmp_path, template, judgement, says):
    card = begin_with(folder, tmp_path / "other", template)
    front = next(finding for finding in examine_model(card) if finding.what == "BOS")
    assert (front.judgement, front.found) == (judgement, says)


def test_a_missing_bos_is_judged_by_what_it_would_change(folder, tmp_path, monkeypatch):
    lm = load_model(begin_with(folder, tmp_path / "other", "$A"))
    example = noise._example(lm.card)
    front = noise._front(lm, example)
    assert front.judgement == "good" and "puts no '<end>' in front" in front.found
    monkeypatch.setattr(noise, "_gain", lambda lm, texts, first: 2.0)
    front = noise._front(lm, example)
    assert front.judgement == "look" and "+2.00 each" in front.found and "begin prompts with '<end>'" in front.advice


def test_the_gain_of_a_token_in_front_is_that_of_the_plain_model():
    lm = tiny_model("llama")
    (ids,) = lm.tokenizer(["the best of times"], add_special_tokens=False)["input_ids"]

    def log_probs(tokens):
        logits = lm.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        return [float(logits[at - 1, tokens[at]]) for at in range(len(tokens) - len(ids) + 1, len(tokens))]

    expected = np.mean(log_probs([0, *ids])) - np.mean(log_probs(list(ids)))
    assert noise._gain(lm, ["the best of times"], 0) == pytest.approx(expected, rel=1e-9)
