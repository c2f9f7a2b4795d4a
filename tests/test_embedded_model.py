"""The real language model that ships as a package: what is claimed of tiny random models holds for it too."""

import numpy as np
import pytest
import torch

from negcore.datasets import PromptSettings, load_dataset
from negcore.errors import ModelError
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import sweep
from negcore.model.language_model import describe_model

FACTS = {
    "The capital of France is": " Paris",
    "The capital of Germany is": " Berlin",
    "Water is made of hydrogen and": " oxygen",
    "The opposite of hot is": " cold",
}


@pytest.fixture(scope="module")
def lm():
    return load_model("smollm2-135m")


def test_it_knows_capitals_and_has_the_published_shape(lm):
    assert (lm.n_layers, lm.layer_width, lm.site) == (30, 1536, "up")
    batch = neurgrad(lm, list(FACTS)[:2], [" Paris", " Berlin"])
    assert batch.probs_PO.argmax(1).tolist() == [0, 1]


def test_its_weights_are_converted_once(lm):
    assert describe_model("smollm2-135m").source == lm.card.source


def test_neurgrad_is_the_gradient_of_a_full_pass(lm):
    prompts = [*FACTS, "It is the capital of Italy and its name is"]
    batch = neurgrad(lm, prompts, [" Paris"])
    tokens = torch.tensor(lm.tokenizer([prompts[-1]])["input_ids"])
    kept = []
    handles = [
        lm.site_module(layer).register_forward_hook(lambda module, args, output: kept.append(output))
        for layer in range(lm.n_layers)
    ]
    try:
        embedded = lm.model.get_input_embeddings()(tokens).requires_grad_()
        prob = lm.model(inputs_embeds=embedded).logits[0, -1].softmax(-1)[batch.label_ids_PO[-1, 0]]
        grads = torch.stack([grad[0, -1] for grad in torch.autograd.grad(prob, kept)])
    finally:
        for handle in handles:
            handle.remove()
    acts = torch.stack([values[0, -1] for values in kept])
    expected = (grads * torch.where(acts > 0, 1.0, -1.0)).numpy()
    error = np.linalg.norm(batch.negs_POLN[-1, 0] - expected) / np.linalg.norm(expected)
    assert error < 1e-4


def test_the_estimate_agrees_with_the_sweep_within_two_units(lm):
    result = sweep(lm, list(FACTS), list(FACTS.values()), neurons=2)
    estimates_PLN = neurgrad(lm, list(FACTS), [[label] for label in FACTS.values()]).negs_POLN[:, 0]
    layers_K, neurons_K = result.neurons_K2.T
    estimates_PK = estimates_PLN[:, layers_K, neurons_K]
    assert np.corrcoef(estimates_PK.ravel(), result.negs_PK.ravel())[0, 1] > 0.99
    assert result.linear_PK.mean() > 0.8


@pytest.mark.parametrize("genre", ["classification", "fact", "linguistic", "multilingual", "nli", "self-reflection"])
def test_every_offline_dataset_fits_its_tokenizer(lm, genre):
    dataset = load_dataset(f"mini/{genre}", lm.tokenizer, settings=PromptSettings(shots=1))
    assert min(map(len, dataset.splits.values())) >= 30
    assert dataset.label_rule.startswith("labels begin with a space")


def test_gemma_is_joined_from_its_packages_and_knows_capitals():
    try:
        lm = load_model("gemma3-270m")
    except ModelError as error:
        pytest.skip(f"{error} (or: make gemma)")
    assert (lm.n_layers, lm.layer_width, lm.site) == (18, 2048, "up")
    batch = neurgrad(lm, list(FACTS)[:2], [" Paris", " Berlin"])
    assert batch.probs_PO.argmax(1).tolist() == [0, 1]
