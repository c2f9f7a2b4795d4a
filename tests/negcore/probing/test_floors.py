"""Floors: chance where there is no shortcut, right where one was planted, and never fitted on what they answer."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks
from support import SHARED, tiny_tokenizer

from negcore.datasets import Example, PromptSettings, load_dataset
from negcore.errors import NegError
from negcore.probing.evaluation import Accuracy, accuracy
from negcore.probing.floors import CalibratedLMProbe, OptionsFloor, _gold_shares, _held_out_shares

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
LABELS = (" A", " B", " C", " D")


def made(n, *, seed=0, group=""):
    """Prompts whose gold option has nothing to do with their lengths, options or group."""
    rng = np.random.default_rng(seed)
    return [
        Example(
            id=f"made/{seed}/{number}",
            prompt=" ".join(rng.choice(WORDS, rng.integers(3, 12))),
            labels=LABELS,
            answer=int(rng.integers(4)),
            group=group or str(rng.choice(["en", "de"])),
            options=tuple(rng.choice(WORDS, 4, replace=False)),
        )
        for number in range(n)
    ]


def gold(examples):
    return np.array([one.answer for one in examples])


def floor(train, test, **parameters):
    return accuracy(gold(test), OptionsFloor(**parameters).fit(train, gold(train)).predict(test))


def alphabetical(one):
    """The gold option is the first in the alphabet."""
    return replace(one, answer=int(np.argmin(one.options)))


def longest(one):
    options = tuple(text + "ly" * (place == one.answer) for place, text in enumerate(one.options))
    return replace(one, options=options)


def wordy(one):
    options = tuple(text + " so" * (place == one.answer) for place, text in enumerate(one.options))
    return replace(one, options=options)


def popular(one):
    """A text that begins with b is gold wherever it is an option."""
    options = tuple(text.replace("b", "d") for text in one.options)
    return replace(one, options=(*options[: one.answer], "b" + options[one.answer][1:], *options[one.answer + 1 :]))


def lengthened(one):
    return replace(one, prompt=one.prompt + " so" * 9 * one.answer)


def grouped(one):
    return replace(one, group="abcd"[one.answer])


@pytest.mark.parametrize("shortcut", [alphabetical, longest, wordy, popular, lengthened, grouped])
def test_a_planted_shortcut_is_found(shortcut):
    train, test = (list(map(shortcut, made(n, seed=n))) for n in (600, 200))
    assert floor(train, test).interval.low > 0.6


def test_without_a_shortcut_the_floor_is_chance():
    results = [floor(made(300, seed=seed), made(500, seed=seed + 1)) for seed in (10, 20, 30)]
    together = sum(results[1:], results[0])
    assert together.interval.low < 0.25 < together.interval.high


def test_the_words_of_the_question_are_not_seen():
    told, silent = (
        [[replace(one, prompt=f"{words[one.answer]} {one.prompt}") for one in made(n, seed=n)] for n in (300, 200)]
        for words in (("aaa", "bbb", "ccc", "ddd"), ("xyz",) * 4)
    )
    assert floor(*told) == floor(*silent)


def test_test_rows_and_their_answers_change_nothing_in_a_fitted_floor():
    train, test = made(200, seed=1), made(50, seed=2)
    fitted = OptionsFloor().fit(train, gold(train))
    together = fitted.predict(test)
    assert together.tolist() == [int(fitted.predict([one])[0]) for one in test]
    assert together.tolist() == fitted.predict([replace(one, answer=0, id="x") for one in test]).tolist()


def test_how_often_a_text_is_gold_is_counted_without_the_row_itself():
    """Every text occurs once, so that a count with the row itself would be the answer."""
    texts_PO = np.array([[f"{row}{place}" for place in "abcd"] for row in range(50)], object)
    gold_P = np.arange(50) % 4
    assert set(_gold_shares(texts_PO, gold_P).values()) == {1 / 5, 2 / 5}
    assert set(_held_out_shares(texts_PO, gold_P, seed=0).flat) == {1 / 4}


def test_how_often_a_text_is_gold_is_counted_over_the_other_folds():
    texts_PO = np.array([["a", "b"]] * 10, object)
    gold_P = np.zeros(10, int)
    assert _gold_shares(texts_PO, gold_P) == {"a": 11 / 12, "b": 1 / 12}
    np.testing.assert_allclose(_held_out_shares(texts_PO, gold_P, seed=0), [[9 / 10, 1 / 10]] * 10)


def test_without_texts_the_labels_are_the_options():
    def bare(one):
        order = np.roll(LABELS, one.answer)
        return replace(one, options=(), labels=tuple(order.tolist()))

    train, test = (list(map(bare, made(n, seed=n))) for n in (300, 100))
    assert floor(train, test) == Accuracy(100, 100)


def test_the_same_seed_gives_the_same_answers_and_the_estimator_is_scikit_learns():
    train, test = made(150, seed=5), made(150, seed=6)
    first, same, other = (
        clone(OptionsFloor(random_state=seed)).fit(train, gold(train)).predict(test).tolist() for seed in (1, 1, 2)
    )
    assert first == same != other
    assert OptionsFloor(random_state=3).get_params() == {"random_state": 3}


@pytest.mark.parametrize("n", [1, 4])
def test_few_training_rows_are_enough_for_an_answer(n):
    train = made(n)
    assert set(OptionsFloor().fit(train, gold(train)).predict(made(9, seed=3))) <= set(gold(train))


@pytest.mark.parametrize(
    ("train", "answers", "message"),
    [
        ([], [], "at least one"),
        ([*made(2), replace(made(1)[0], options=("a", "b"))], [0, 0, 0], r"\[2, 4\] options"),
        (made(2), [0], "1 gold options for 2 prompts"),
        (made(2), [0, 4], "row 1: gold option 4"),
    ],
)
def test_prompts_that_cannot_be_compared_are_refused(train, answers, message):
    with pytest.raises(NegError, match=message):
        OptionsFloor().fit(train, np.array(answers, int))


def test_prompts_with_another_number_of_options_are_refused():
    train = made(10)
    with pytest.raises(NegError, match="have 2 options: this floor was fitted on 4"):
        OptionsFloor().fit(train, gold(train)).predict([replace(train[0], options=("a", "b"))])


@pytest.mark.skipif(not (SHARED / "mceval8k").is_dir(), reason="MCEval8K is not beside the repository")
def test_templama_gives_half_of_its_answers_away():
    settings = PromptSettings(limit=1500, eval_limit=500, split_policy="clean")
    dataset = load_dataset("mceval8k/templama", tiny_tokenizer(), settings=settings, root=SHARED / "mceval8k")
    assert floor(dataset.splits["train"], dataset.splits["test"]).interval.low > 0.45


# Calibrated LM-Prob


@parametrize_with_checks([CalibratedLMProbe()])
def test_calibrated_lm_prob_keeps_the_contract_of_scikit_learn(estimator, check):
    check(estimator)


def preferring(n, seed):
    """Probabilities that tell the answer behind a strong preference for option 0, which LM-Prob always gives."""
    rng = np.random.default_rng(seed)
    answers = rng.integers(3, size=n)
    logits = rng.normal(size=(n, 3)) * 0.3 + 2 * (np.arange(3) == answers[:, None]) + [9, 0, -3]
    return np.exp(logits - 20), answers


def test_calibration_takes_a_preference_for_a_letter_away():
    (probs, answers), (test_probs, test_answers) = preferring(300, 0), preferring(300, 1)
    assert (test_probs.argmax(1) == 0).all()
    assert accuracy(test_answers, CalibratedLMProbe().fit(probs, answers).predict(test_probs)).value > 0.95


def test_calibration_is_the_regression_on_standardised_logarithms():
    (probs, answers), (test_probs, _) = preferring(60, 2), preferring(40, 3)
    mean, scale = np.log(probs).mean(0), np.log(probs).std(0)
    slow = LogisticRegression(max_iter=1000).fit((np.log(probs) - mean) / scale, answers)
    expected = slow.predict((np.log(test_probs) - mean) / scale)
    assert CalibratedLMProbe().fit(probs, answers).predict(test_probs).tolist() == expected.tolist()


def test_calibration_of_meaningless_probabilities_is_chance():
    rng = np.random.default_rng(4)
    probs, answers = rng.dirichlet(np.ones(4), 3000) * 0.1, rng.integers(4, size=3000)
    result = accuracy(answers[1000:], CalibratedLMProbe().fit(probs[:1000], answers[:1000]).predict(probs[1000:]))
    assert result.interval.low < 0.25 < result.interval.high


def test_probabilities_of_zero_are_calibrated_and_one_answer_is_always_given():
    probs = np.array([[0.0, 1.0], [1.0, 0.0]] * 10)
    assert CalibratedLMProbe().fit(probs, [1, 0] * 10).predict(probs).tolist() == [1, 0] * 10
    assert CalibratedLMProbe().fit(probs, [1] * 20).predict(probs).tolist() == [1] * 20


def test_a_probability_that_is_no_number_is_refused_with_its_place():
    with pytest.raises(NegError, match="probability of row 1, option 0 is nan"):
        CalibratedLMProbe().fit([[0.5, 0.5], [np.nan, 0.5]], [0, 1])
