"""The audit counts what splits share and repeat, fits floors that see no question, and asks a model for label mass."""

import json

import numpy as np
import pytest
from support import save_tiny_model

from negcore.datasets import PromptSettings, load_dataset
from negcore.errors import NegError
from negcore.measure.label_probs import label_probs
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import neurgrad
from negcore.model.language_model import describe_model
from tasks.audit import audit_dataset


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture
def card(model):
    return describe_model(model)


def questions(split, n, **more):
    return [
        {"prompt": f"{split} {i}? Answer:", "labels": ["A", "B"], "answer": i % 2, "split": split} | more
        for i in range(n)
    ]


@pytest.fixture
def audit(tmp_path, card):
    """Audits rows of a file, without asking the model."""

    def make(rows, lm=None, **options):
        file = tmp_path / "mine.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return audit_dataset(str(file), card, lm, settings=PromptSettings(), **options)

    return make


def test_every_kind_of_row_is_counted_by_split(audit):
    train, valid, test = questions("train", 30), questions("valid", 10), questions("test", 10)
    test += [test[0], test[0], {**test[1], "answer": 0}]  # two doubles of one text, one double with another answer
    valid += [{**test[2], "split": "valid"}]
    train += [{**test[3], "split": "train"}, {**valid[4], "split": "train"}, train[0]]
    found = audit(train + valid + test)
    assert (found.dataset, found.genre, found.n_options) == ("local/mine", "local", 2)
    assert (found.released_train, found.released_valid, found.released_test) == (33, 11, 13)
    assert (found.doubles_train, found.doubles_valid, found.doubles_test) == (1, 0, 3)
    assert (found.contradictory_train, found.contradictory_valid, found.contradictory_test) == (0, 0, 1)
    assert (found.test_in_train, found.valid_in_test, found.valid_in_train) == (1, 1, 1)
    assert (found.clean_train, found.clean_valid, found.clean_test) == (30, 10, 9)
    assert (found.random, found.majority, found.label_mass, found.n_asked) == (0.5, 5 / 9, None, 0)


def test_shared_units_are_counted_where_rows_alone_are_compared(audit):
    rows = questions("train", 20, unit="one") + questions("train", 0) + questions("valid", 6) + questions("test", 5)
    rows += [{**row, "prompt": f"other {row['prompt']}", "unit": "one"} for row in questions("test", 3)]
    rows += [{**row, "prompt": f"more {row['prompt']}"} for row in questions("train", 20)]
    found = audit(rows)
    assert (found.units_in_train, found.test_in_train) == (3, 0)
    assert (found.clean_train, found.clean_test) == (20, 8)


def test_what_needs_no_question_is_told(audit):
    """The group gives nine answers of ten away."""
    rows = [row for split, n in (("train", 200), ("valid", 20), ("test", 60)) for row in questions(split, n)]
    told = audit([row | {"group": "xy"[row["answer"] ^ (i % 10 == 9)]} for i, row in enumerate(rows)])
    assert told.low > 0.7 and told.options_only == pytest.approx(0.9, abs=0.05)
    plain = audit(rows)
    assert plain.low <= 0.5 <= plain.high and plain.majority == 0.5


def test_the_label_mass_is_the_mean_sum_of_the_options_probabilities(audit, model, card, tmp_path):
    lm = load_model(model)
    found = audit(questions("train", 10) + questions("valid", 4) + questions("test", 6), lm, n_asked=4)
    dataset = load_dataset(str(tmp_path / "mine.jsonl"), card.tokenizer, settings=PromptSettings())
    asked = dataset.splits["test"][:4]
    probs_PO = neurgrad(lm, [one.prompt for one in asked], [one.labels for one in asked]).probs_PO
    assert found.n_asked == 4 and found.label_mass == pytest.approx(probs_PO.sum(axis=1).mean(), rel=1e-4)
    assert audit(questions("train", 10) + questions("valid", 4) + questions("test", 6), lm).n_asked == 6


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_label_probabilities_are_those_of_neurgrad_whatever_the_batch(model, batch_size):
    lm = load_model(model)
    prompts = [f"Question {'and so on ' * (i % 3)}{i}? Answer:" for i in range(7)]
    expected = neurgrad(lm, prompts, [" A", " B"]).probs_PO
    np.testing.assert_allclose(label_probs(lm, prompts, [" A", " B"], batch_size=batch_size), expected, rtol=1e-4)


def test_label_probabilities_of_a_masked_model_are_those_of_neurgrad(tmp_path):
    lm = load_model(str(save_tiny_model("bert", tmp_path / "tiny-bert")))
    prompts = [f"Question {i}? Answer:{lm.tokenizer.mask_token}" for i in range(3)]
    expected = neurgrad(lm, prompts, [" A", " B"]).probs_PO
    np.testing.assert_allclose(label_probs(lm, prompts, [" A", " B"]), expected, rtol=1e-4)


def test_absent_files_and_groups_that_say_nothing_are_noted(audit):
    rows = questions("valid", 20) + questions("test", 8)
    rows = [row | {"group": f"g{row['answer']}"} for row in rows]
    found = audit(rows)
    assert found.notes == "no train file; train drawn from valid; each group has one answer"
    assert (found.released_train, found.clean_train, found.clean_valid) == (0, 16, 4)


def test_rows_with_other_numbers_of_options_are_an_error(audit):
    rows = questions("train", 9) + questions("valid", 4) + questions("test", 4)
    rows[0]["labels"] = ["A", "B", "C"]
    with pytest.raises(NegError, match="has 3 labels, but most rows have 2"):
        audit(rows)
