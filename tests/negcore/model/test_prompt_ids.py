import random

import pytest
from support import LABELS, prompts_for, tiny_model, tiny_tokenizer
from tokenizers_of import REAL, TINY, real_tokenizer, tiny, with_template, word_piece

from negcore import as_language_model
from negcore.errors import LabelError, PromptError
from negcore.model.encoding import encode, encode_prompts
from negcore.model.prompt_ids import PromptReader, end_of_piece

ENDINGS = ["Answer:", "Answer: ", "Answer:\n", "答え：", "答え", "is", "3", "(", "<|turn|>", "Answer: \n\n"]
OPTIONS = ["A", " A", "B", " B", "1", " 1", "  A", "A\n", "yes", " yes", "Paris", " Paris", "答", ":", "."]
WORDS = [
    "Question:",
    "which",
    "A.",
    "B.",
    "cat",
    "don't",
    "123",
    "3.14",
    "質問",
    "東京",
    "naïve\n\n",
    "\n,",
    "the",
    "is",
]


def texts():
    """Prompts of all lengths and endings, with everything that tokenizers treat in their own ways."""
    rng = random.Random(0)
    starts = [" ".join(rng.choices(WORDS, k=rng.randint(0, 60))) for _ in range(6)]
    return [f"{start} {end}" if start else end for start in starts for end in ENDINGS]


@pytest.fixture(scope="module", params=[*REAL, *TINY])
def tokenizer(request):
    return tiny(request.param) if request.param in TINY else real_tokenizer(request.param)


def slow_label_id(tokenizer, prompt, label):
    """The rule, written out: the one id that the whole text has beside those of the prompt."""
    alone, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + label))
    is_one = whole[:-1] == alone and whole[-1] != tokenizer.unk_token_id
    return whole[-1] if is_one else None


def found(reader, prompts, labels):
    ids = reader.read(prompts)
    per_prompt = reader.label_ids(prompts, ids, [labels] * len(prompts))
    return [[one if isinstance(one, int) else None for one in of_prompt] for of_prompt in per_prompt]


def test_a_labels_id_is_what_the_tokenizer_adds_to_the_whole_prompt(tokenizer):
    expected = [[slow_label_id(tokenizer, prompt, label) for label in OPTIONS] for prompt in texts()]
    assert found(PromptReader(tokenizer), texts(), OPTIONS) == expected
    assert any(token is not None for of_prompt in expected for token in of_prompt)


def test_the_end_of_a_long_prompt_stands_for_it(tokenizer):
    reader, prompt = (
        PromptReader(tokenizer),
        "The capital of France is Paris. " * 20 + "Question: which one fits? Answer:",
    )
    (tail,) = reader._tails([prompt], reader.read([prompt]))
    is_unigram = type(tokenizer.backend_tokenizer.model).__name__ == "Unigram"
    assert tail is None if is_unigram else len(tail.before) < 200


@pytest.mark.parametrize("name", [name for name in REAL if name not in ("Mistral tekken", "GPT-2's kind")])
def test_letters_are_one_token_behind_a_prompt_for_real_models(name):
    tokenizer = real_tokenizer(name)
    (ids,) = found(PromptReader(tokenizer), ["Which one? A. one B. two\nAnswer:"], [" A", " B"])
    assert tokenizer.convert_ids_to_tokens(ids) in (["▁A", "▁B"], ["ĠA", "ĠB"])


def test_a_label_that_is_two_tokens_alone_is_one_behind_a_prompt():
    tokenizer = tiny("older Llama")
    assert len(tokenizer(" A", add_special_tokens=False)["input_ids"]) == 2
    assert tokenizer.convert_ids_to_tokens(found(PromptReader(tokenizer), ["Answer:"], [" A"])[0]) == ["▁A"]


def test_a_label_may_be_another_token_behind_another_prompt():
    tokenizer = tiny("tokens that swallow spaces")
    behind = found(PromptReader(tokenizer), ["Which one? Answer:", "Which one?<|turn|>"], [" A"])
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in behind] == [["ĠA"], ["A"]]


def test_a_label_that_joins_the_prompts_end_is_refused_with_both_encodings():
    reader = PromptReader(tiny_tokenizer())
    ((error,),) = reader.label_ids(["Answer: "], reader.read(["Answer: "]), [["A"]])
    assert isinstance(error, LabelError)
    alone, whole = (reader.read([text])[0] for text in ("Answer: ", "Answer: A"))
    assert alone != whole[: len(alone)]
    assert "label 'A' joins" in str(error)
    assert f"['Ġ'] (ids {alone[-1:]}) without it and in ['ĠA'] (ids {whole[-1:]}) with it" in str(error)


def model_with(tokenizer, family="llama"):
    return as_language_model(tiny_model(family).model, tokenizer, name="mine")


def test_a_prompt_that_begins_with_bos_gets_no_second_one():
    tokenizer = with_template(tiny("Metaspace first"), "<s> $A")
    bos, lm = tokenizer.bos_token_id, model_with(tokenizer)
    plain, written = encode_prompts(lm.card, ["Answer:", "<s>Answer:"])
    assert plain.count(bos) == written.count(bos) == 1 and plain[0] == written[0] == bos


def test_a_prompt_of_nothing_but_bos_takes_it_from_no_other_prompt():
    lm = model_with(with_template(tiny("Metaspace first"), "<s> $A"))
    alone, together = encode_prompts(lm.card, ["Answer:"]), encode_prompts(lm.card, ["<s>", "Answer:"])
    assert together == [[lm.tokenizer.bos_token_id], *alone]
    assert encode_prompts(lm.card, ["<s>"]) == together[:1]


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>"])
def test_an_eos_that_a_tokenizer_appends_is_never_the_probed_token(template):
    plain = tiny("Metaspace first")
    lm, tokenizer = model_with(with_template(plain, template)), plain
    (ids,) = encode_prompts(lm.card, ["Which one? Answer:"])
    assert ids[-1] == tokenizer("Which one? Answer:", add_special_tokens=False)["input_ids"][-1]
    assert ids[0] == (tokenizer.bos_token_id if "<s>" in template else ids[0])
    found = encode(lm.card, ["Which one? Answer:"], [" A", " B"]).label_ids_PO[0]
    assert tokenizer.convert_ids_to_tokens(found) == ["▁A", "▁B"]


def test_a_masked_prompt_keeps_its_special_tokens_once():
    tokenizer = word_piece()
    lm = model_with(tokenizer, "bert")
    plain, written = encode_prompts(lm.card, ["the capital is [MASK].", "[CLS] the capital is [MASK]. [SEP]"])
    assert plain == written
    assert (plain[0], plain[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


@pytest.mark.parametrize("prompt", ["the capital of italy is [MASK].", "[MASK] is the capital of italy, it is said."])
def test_a_masked_models_label_takes_the_place_of_the_mask(prompt):
    tokenizer = word_piece()
    encoded = encode(model_with(tokenizer, "bert").card, [prompt], ["Rome", "Paris"])
    assert tokenizer.convert_ids_to_tokens(encoded.label_ids_PO[0]) == ["rome", "paris"]


def test_a_mask_that_swallows_spaces_gives_its_place_to_a_label_with_its_space():
    tokenizer = tiny("Unigram")
    reader = PromptReader(tokenizer, masked=True)
    prompt = "The capital of France is <mask>."
    ((spaced,),) = found(reader, [prompt], [" A"])
    whole = tokenizer("The capital of France is A.", add_special_tokens=False)["input_ids"]
    assert spaced in whole and tokenizer.convert_ids_to_tokens(spaced) == "▁A"


@pytest.mark.parametrize("what", ["label", "prompt"])
def test_a_token_that_the_model_lacks_is_refused(what):
    tokenizer = tiny("Metaspace never")
    lm = tiny_model("llama")
    tokenizer = with_template(tokenizer, "$A")
    tokenizer.add_tokens([f"<filler {n}>" for n in range(lm.card.vocab_size - len(tokenizer))] + [" Positive"])
    lm = model_with(tokenizer)
    prompt, label = ("Is it?", " Positive") if what == "label" else ("Is it Positive? Answer:", " A")
    error = LabelError if what == "label" else PromptError
    with pytest.raises(
        error, match=r"prompt 0: .*token ' Positive' \(id 400\), but mine has 400 tokens \(ids to 399\)"
    ):
        encode(lm.card, [prompt], [label])


def test_batches_and_repeats_of_prompts_change_no_id():
    lm = tiny_model("llama")
    together = encode(lm.card, prompts_for(lm), LABELS)
    for index, prompt in enumerate(prompts_for(lm)):
        alone = encode(lm.card, [prompt], LABELS)
        assert alone.ids == together.ids[index : index + 1]
        assert (alone.label_ids_PO == together.label_ids_PO[index]).all()


SEVERAL = [*OPTIONS, " New York", "New York", " the Battle of Hastings in 1066", " naïve 東京", "\n\nA B", "🦙 don't"]


def test_the_tokens_of_a_label_are_what_the_tokenizer_adds_to_the_whole_prompt(tokenizer):
    reader, prompts = PromptReader(tokenizer), texts()[::7]
    ids = reader.read(prompts)
    found = reader.label_tokens(prompts, ids, [SEVERAL] * len(prompts))
    n_several = 0
    for prompt, before, of_prompt in zip(prompts, ids, found, strict=True):
        for label, tokens in zip(SEVERAL, of_prompt, strict=True):
            whole = tokenizer(prompt + label, add_special_tokens=False)["input_ids"]
            added = whole[len(before) :]
            is_right = whole[: len(before)] == before and added and tokenizer.unk_token_id not in added
            assert tokens == added if is_right else isinstance(tokens, LabelError), (prompt, label)
            n_several += bool(is_right) and len(added) > 1
    assert n_several > 5


def test_a_piece_of_a_prompt_is_probed_at_the_token_that_holds_its_last_character(tokenizer):
    reader, text = PromptReader(tokenizer), " ".join(WORDS) + " Answer:"
    ends = [place + 1 for place, character in enumerate(text) if character.isalpha()]
    (tokens,) = reader.read([text])
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    places = reader.probed_tokens([text] * len(ends), [tokens] * len(ends), ends)
    for end, found in zip(ends, places, strict=True):
        assert (found.start, found.stop) == tuple(offsets[found.place]) and found.start < end <= found.stop
        assert all(start >= end for start, stop in offsets[found.place + 1 :] if start < stop)
        known = tokenizer.decode(tokens[found.place]).casefold()
        assert (
            not text[end - 1].isascii()
            or text[end - 1].casefold() in known
            or tokens[found.place] == reader._unknown_id
        )


@pytest.mark.parametrize(
    ("text", "piece", "end"),
    [("The Eiffel Tower is in", "Eiffel Tower", 16), ("aXa", "Xa", 3), ("one two ", "two  ", 7), ("a b a", "b a", 5)],
)
def test_a_piece_ends_behind_its_last_character_that_is_no_space(text, piece, end):
    assert end_of_piece(text, piece) == end


@pytest.mark.parametrize(
    ("piece", "said"),
    [("Paris", "nowhere"), ("the", "several places .* longer"), ("oo", "several places"), ("  ", "give a piece")],
)
def test_a_piece_that_says_no_single_place_is_refused(piece, said):
    with pytest.raises(PromptError, match=said):
        end_of_piece("the cat ooo the dog", piece)


def test_labels_of_several_tokens_need_to_be_asked_for_and_have_tokens_of_their_own():
    lm = tiny_model("llama")
    with pytest.raises(LabelError, match="is 2 tokens .*answers: sequence allows several"):
        encode(lm.card, ["Answer:"], [" A B"])
    encoded = encode(lm.card, ["Answer:"], [" A B", " A"], answers="sequence")
    ((longer, shorter),) = encoded.label_tokens_PO
    assert len(longer) == 2 and longer[:1] == shorter and (encoded.label_ids_PO == shorter).all()
    with pytest.raises(LabelError, match="are the same tokens"):
        encode(lm.card, ["Answer:"], [" A B", " A B"], answers="sequence")
    with pytest.raises(LabelError, match="more than tiny-llama reads, 128"):
        encode(lm.card, ["Answer:"], [" A" * 128, " B"], answers="sequence")
    with pytest.raises(LabelError, match="choose one of token, sequence"):
        encode(lm.card, ["Answer:"], [" A"], answers="text")


def test_a_probed_token_counts_special_tokens_in_front_of_the_prompt():
    lm = model_with(with_template(tiny("Metaspace first"), "<s> $A"))
    encoded = encode(lm.card, ["Which cat? Answer:"], [" A"], probe_at=["ich cat"])
    (probed,) = encoded.probed_P
    assert probed >= 1 and lm.tokenizer.decode(encoded.ids[0][: probed + 1]).replace(" ", "").endswith("cat")
    by_characters = encode(lm.card, ["Which cat? Answer:"], [" A"], probe_at=[len("Which cat")])
    assert by_characters.probed_P.tolist() == [probed]
    assert encode(lm.card, ["Which cat? Answer:"], [" A"], probe_at=[None]).probed_P is None
    with pytest.raises(PromptError, match="prompt 0: probe_at 0 is none of its 18 characters"):
        encode(lm.card, ["Which cat? Answer:"], [" A"], probe_at=[0])
