from functools import cache
from typing import Any

import pytest
import transformers
from support import tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from negcore.datasets import Wording, choose_label_prefix, label_token
from negcore.datasets.markup import Defuser, special_token_pattern
from negcore.datasets.render import Renderer, mask_of, prompt_end
from negcore.datasets.rows import Row
from negcore.errors import DatasetError, LabelError, PromptError

WORDING = Wording(name="mine", instruction="Choose.", question="Text: {text}")
ROW = Row("1", {"text": "a cat"}, ("animal", "plant"), 0, "", "", "")


@cache
def word_tokenizer(*words: str) -> Any:
    """Splits at spaces and punctuation and lowers case, like an uncased BERT: a word has no memory of its space."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[MASK]", "answer", ":", *words])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]", add_prefix_space=False
    )


class LetterTokenizer:
    """One token a character, spaces included."""

    mask_token = None
    all_special_tokens: list[str] = []

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in one] for one in text]}


def test_labels_begin_with_a_space_where_that_makes_them_one_token():
    assert choose_label_prefix(tiny_tokenizer(), "Answer:", ["A", "B"]) == " "


def test_labels_have_no_space_where_the_space_is_a_token_of_its_own():
    assert choose_label_prefix(LetterTokenizer(), "Answer:", ["A", "B"]) == ""


def test_a_label_that_joins_the_prompts_last_token_is_refused():
    # " A" after "Answer: " makes two spaces, "A" alone would be written with the space already there
    assert label_token(tiny_tokenizer(), "Answer: ", "A") is None


def test_the_label_token_is_the_one_that_follows_the_prompt():
    tokenizer = tiny_tokenizer()
    token = label_token(tokenizer, "Answer:", " B")
    assert tokenizer("Answer: B", add_special_tokens=False)["input_ids"][-1] == token


def test_a_label_of_several_tokens_is_named_with_its_ids():
    tokenizer = tiny_tokenizer()
    prompt, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Answer:", "Answer: Zyx"))
    ids = whole[len(prompt) :]
    with pytest.raises(LabelError) as error:
        choose_label_prefix(tokenizer, "Answer:", ["A", "Zyx"])
    assert "'Zyx'" in str(error.value) and str(ids) in str(error.value) and "\n" not in str(error.value)


def test_labels_that_share_a_token_are_refused():
    with pytest.raises(LabelError, match="'a' and 'A' share token"):
        choose_label_prefix(word_tokenizer("a", "b"), "Answer: [MASK]", ["a", "A"], masked=True)


def test_an_unknown_token_is_no_label():
    with pytest.raises(LabelError, match="'c'"):
        choose_label_prefix(word_tokenizer("a", "b"), "Answer: [MASK]", ["a", "c"], masked=True)


def test_masked_labels_begin_with_a_space_only_for_byte_level_tokenizers():
    assert choose_label_prefix(word_tokenizer("a", "b"), "Answer: [MASK]", ["A", "B"], masked=True) == ""
    assert choose_label_prefix(tiny_tokenizer(), "Answer:<mask>", ["A", "B"], masked=True) == " "


@pytest.mark.parametrize(
    ("prompt", "end"), [("One two:", "two:"), ("a\n\nAnswer:", "Answer:"), ("is \n", "is \n"), ("", ""), (" ", " ")]
)
def test_the_prompts_end_is_its_last_word_with_what_follows(prompt, end):
    assert prompt_end(prompt) == end


def test_a_prompt_is_instruction_question_options_and_cue():
    example = Renderer(wording=WORDING, label_prefix=" ").example(ROW)
    assert example.prompt == "Choose.\n\nText: a cat\nA. animal\nB. plant\nAnswer:"
    assert example.labels == (" A", " B")


def test_demonstrations_stand_solved_between_instruction_and_question():
    shot = Row("2", {"text": "moss"}, ("animal", "plant"), 1, "", "", "")
    example = Renderer(wording=WORDING, label_prefix=" ").with_demonstrations([shot]).example(ROW)
    assert example.prompt == (
        "Choose.\n\nText: moss\nA. animal\nB. plant\nAnswer: B\n\nText: a cat\nA. animal\nB. plant\nAnswer:"
    )


def test_a_masked_prompt_ends_in_one_mask():
    tokenizer = word_tokenizer("a", "b")
    renderer = Renderer(wording=WORDING, mask=mask_of(tokenizer, masked=True)).with_demonstrations([ROW])
    prompt = renderer.example(ROW).prompt
    assert prompt.endswith("Answer: [MASK]") and prompt.count("[MASK]") == 1 and "Answer: A\n" in prompt


def test_a_masked_prompt_needs_a_tokenizer_with_a_mask():
    with pytest.raises(PromptError, match="no mask token"):
        mask_of(LetterTokenizer(), masked=True)


def test_braces_in_a_dataset_are_text():
    row = Row("1", {"text": "{cue} {0} %s"}, ("{letter}", "{"), 0, "", "", "")
    assert "Text: {cue} {0} %s\nA. {letter}\nB. {\n" in Renderer(wording=WORDING, label_prefix=" ").example(row).prompt


def test_special_tokens_in_a_dataset_are_broken():
    tokenizer = tiny_tokenizer()
    defuser = Defuser(special_token_pattern(tokenizer))
    row = Row("1", {"text": "x <end> y<mask>"}, ("<end>", "plain"), 0, "", "", "")
    harmless = defuser.row(row)
    assert harmless.fields["text"] == "x < end> y< mask>" and harmless.options == ("< end>", "plain")
    prompt = Renderer(wording=WORDING, label_prefix=" ").example(harmless).prompt
    assert not set(tokenizer(prompt)["input_ids"]) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("cue", ["", "Answer: ", "Answer:\n"])
def test_a_cue_may_not_end_in_a_space(cue):
    with pytest.raises(DatasetError, match="cue"):
        Wording(name="mine", instruction="", question="{text}", cue=cue)


@pytest.mark.parametrize("option", ["{letter.__class__}", "{nothing}", "{", "{0}"])
def test_an_option_template_knows_letter_and_text_alone(option):
    with pytest.raises(DatasetError, match="wording template"):
        Wording(name="mine", instruction="", question="{text}", option=option)
