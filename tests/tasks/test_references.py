"""Which prompt each prompt of a study is patched from."""

from dataclasses import replace

import numpy as np
import pytest
from support import PROMPTS, prompts_for, tiny_model

from negcore.datasets import Example
from negcore.errors import DatasetError, NegError
from negcore.measure.spread import activation_spreads
from negcore.model.encoding import encode_prompts
from tasks.measure import references
from tasks.measure.examples import encode_examples
from tasks.measure.references import References, all_prompts, partners


def examples_of(lm, counterfactuals=None):
    rows = [
        Example(f"rows/{number}", prompt, (" A",), 0, "", (), f"rows.jsonl:{number}")
        for number, prompt in enumerate(prompts_for(lm)[:5])
    ]
    if counterfactuals is not None:
        rows = [replace(row, counterfactual=text) for row, text in zip(rows, counterfactuals, strict=True)]
    return encode_examples(lm.card, "rows", rows)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_without_counterfactuals_every_prompt_is_the_reference_of_one_other(family):
    lm = tiny_model(family)
    examples = examples_of(lm)
    for seed in range(3):
        found = partners(lm.card, "rows", examples, seed)
        assert found.kind == "drawn" and list(found.ids) == [example.id for example in examples]
        assert sorted(found.ids.values()) == sorted(example.token_ids.tolist() for example in examples)
        assert all(found.ids[example.id] != example.token_ids.tolist() for example in examples)
        assert found.of(examples[1:3]) == [found.ids["rows/1"], found.ids["rows/2"]]
    drawn = {str(partners(lm.card, "rows", examples, seed).ids) for seed in range(9)}
    assert len(drawn) > 3
    assert partners(lm.card, "rows", examples, 7).ids == partners(lm.card, "rows", examples, 7).ids


def test_means_are_over_every_prompt_whichever_shard_is_measured():
    lm = tiny_model("llama")
    examples = examples_of(lm)
    assert all_prompts(examples).of(examples[:1]) == [example.token_ids.tolist() for example in examples]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_counterfactuals_are_the_references_where_the_dataset_gives_them(family):
    lm = tiny_model(family)
    texts = [prompt.replace("Question", "Answer").replace("fits", "is") for prompt in prompts_for(lm)[:5]]
    assert np.all(list(map(len, encode_prompts(lm.card, texts))) == [len(e.token_ids) for e in examples_of(lm)])
    found = partners(lm.card, "rows", examples_of(lm, texts), 0)
    assert found.kind == "counterfactual"
    assert list(found.ids.values()) == encode_prompts(lm.card, texts)


OTHERS = [prompt.replace("Question", "Answer").replace("fits", "is") for prompt in PROMPTS[:5]]


@pytest.mark.parametrize(
    ("third", "message"),
    [
        ("", r"^rows: row 'rows/2' \(rows.jsonl:2\) has no counterfactual, and 4 of 5 rows have one; give every row"),
        (PROMPTS[2], r"^rows, model tiny-llama: the counterfactual of row 'rows/2' .* is its prompt itself"),
        (PROMPTS[3], r"the counterfactual of row 'rows/2' \(rows.jsonl:2\) has \d+ tokens and its prompt \d+; a pair"),
        ("A" * 900, r"the counterfactual of row 'rows/2' \(rows.jsonl:2\) has \d+ tokens, but tiny-llama reads at"),
    ],
)
def test_a_counterfactual_that_does_not_fit_is_refused_with_its_row_and_place(third, message):
    lm = tiny_model("llama")
    with pytest.raises(DatasetError, match=message) as caught:
        partners(lm.card, "rows", examples_of(lm, [*OTHERS[:2], third, *OTHERS[3:]]), 0)
    assert "\n" not in str(caught.value) and "the best of times" not in str(caught.value)


def test_one_prompt_alone_has_nobody_to_draw_from():
    lm = tiny_model("llama")
    with pytest.raises(NegError, match="one prompt has no other from which activations could be drawn; measure more"):
        partners(lm.card, "rows", examples_of(lm)[:1], 0)


def test_spreads_are_read_once_for_a_model_whatever_the_number_of_shards(monkeypatch):
    read = []

    def reading(lm, ids, neurons_K2):
        read.append((lm, ids, neurons_K2.tolist()))
        return activation_spreads(lm, ids, neurons_K2)

    monkeypatch.setattr(references, "activation_spreads", reading)
    two, other = np.array([[0, 1], [2, 5]]), np.array([[1, 1]])
    of_all, of_some = References("all", {"a": [1, 2, 3], "b": [3, 2]}), References("all", {"a": [1, 2, 3], "b": [3, 4]})
    asked = [
        (lm, of, neurons)
        for lm in (tiny_model("llama"), tiny_model("gpt2"))
        for of in (of_all, of_some)
        for neurons in (two, other)
    ]
    for lm, of, neurons in (*asked, *asked):
        np.testing.assert_array_equal(of.spreads(lm, neurons), activation_spreads(lm, list(of.ids.values()), neurons))
    assert len(read) == len(asked)
