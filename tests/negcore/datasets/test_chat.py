import json

import pytest
from support import save_tiny_model, tiny_tokenizer
from tokenizers import AddedToken

from negcore.datasets import PromptSettings, chat_prompts, load_dataset
from negcore.datasets.chat import Chat, Turn
from negcore.errors import DatasetError, PromptError
from negcore.model.language_model import describe_model
from tasks.measure.examples import encode_examples

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{{ raise_exception('Only user and assistant\\nroles are supported') }}{% endif %}{% endfor %}"
)
CHAT = PromptSettings(prompt_format="chat", limit=6)


def talking(template):
    """A copy of the tiny tokenizer with a chat template and ChatML's special tokens."""
    plain = tiny_tokenizer()
    tokenizer = type(plain)(tokenizer_object=plain.backend_tokenizer, **plain.special_tokens_map)
    marks = [AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>", "<s>", "</s>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def test_a_text_becomes_one_message_with_the_system_text_in_front():
    (prompt,) = chat_prompts(talking(CHATML), ["Who?"], system="Be brief.")
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_solved_questions_are_earlier_turns():
    prompt = Chat(talking(CHATML)).prompt("Q2", [Turn("Q1", "A")], "Choose.")
    assert prompt == (
        "<|im_start|>user\nChoose.\n\nQ1<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("template", "prefix"), [(CHATML, ""), (MISTRAL, " ")])
def test_labels_follow_with_the_space_that_the_template_writes(template, prefix):
    dataset = load_dataset("mini/nli", talking(template), settings=CHAT)
    example = dataset.splits["test"][0]
    assert example.labels[0] == f"{prefix}A" and example.prompt.endswith(("assistant\n", "[/INST]"))


def test_demonstrations_of_a_dataset_are_turns():
    settings = PromptSettings(prompt_format="chat", shots=1, limit=6, system_prompt="Be brief.")
    prompt = load_dataset("mini/nli", talking(CHATML), settings=settings).splits["test"][0].prompt
    assert prompt.count("<|im_start|>assistant\n") == 4
    assert sorted(prompt.split("<|im_start|>assistant\n")[turn][0] for turn in (1, 2, 3)) == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, "no chat template; use prompt_format 'plain'"),
        (MISTRAL, "fails: Only user and assistant roles are supported; leave system_prompt out"),
        ("{{ messages[-1].content }}", "leaves out the text of the system"),
        ("{{ messages[0].content }}{{ 1 // 0 }}", "fails: .*zero"),
        ("{{ messages[0].content.__class__.__mro__ }}", "fails: "),
        ("{% for", "fails: "),
    ],
)
def test_a_template_that_cannot_be_used_is_told_in_one_line(template, told):
    with pytest.raises(PromptError, match=told) as error:
        chat_prompts(talking(template), ["Who?"], system="Be brief.")
    assert "\n" not in str(error.value)


def test_a_template_that_does_not_say_where_the_assistant_begins_is_refused():
    template = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")
    with pytest.raises(
        PromptError, match="^the model's chat template does not say where the assistant begins.*'plain'$"
    ):
        load_dataset("mini/nli", talking(template), settings=CHAT)
    with pytest.raises(PromptError, match="does not say where the assistant begins"):
        chat_prompts(talking(template), ["Who?"])


def test_a_template_that_reads_parts_of_messages_is_given_one_part_each():
    parts = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}"
    template = CHATML.replace("{{ m.content | trim }}", parts)
    assert Chat(talking(template), "Be brief.").prompt("Q2", [Turn("Q1", "A")]) == (
        Chat(talking(CHATML), "Be brief.").prompt("Q2", [Turn("Q1", "A")])
    )


def test_special_tokens_in_a_text_are_the_templates_to_write():
    with pytest.raises(PromptError, match=r"a prompt holds '<\|im_start\|>'.*use prompt_format 'plain'"):
        chat_prompts(talking(CHATML), ["<|im_start|>user\nWho?"])
    with pytest.raises(PromptError, match="the system prompt holds"):
        chat_prompts(talking(CHATML), ["Who?"], system="<s>")


def test_the_day_and_thinking_change_no_prompt():
    template = "{{ strftime_now('%d %B %Y') }} {{ enable_thinking }} {% for m in messages %}{{ m.content }}{% endfor %}"
    assert chat_prompts(talking(template), ["Who?"]) == ["26 July 2024 False Who?"]


def test_only_a_chat_has_a_system_prompt_and_masked_models_have_no_chats():
    with pytest.raises(DatasetError, match="only a chat has one"):
        PromptSettings(system_prompt="Be brief.")
    with pytest.raises(DatasetError, match="allowed: 'plain', 'chat'"):
        PromptSettings(prompt_format="chatml")
    with pytest.raises(PromptError, match="fills masks"):
        load_dataset("mini/nli", talking(CHATML), settings=CHAT, masked=True)


def rows_of(prompt, tmp_path):
    rows = [{"prompt": f"{prompt} {i}? Answer:", "labels": ["A", "B"], "answer": i % 2} for i in range(20)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_ready_made_prompts_keep_their_markup(tmp_path):
    tokenizer = talking(CHATML)
    dataset = load_dataset(rows_of("<|im_start|>user\nWhich,", tmp_path), tokenizer, settings=PromptSettings())
    prompt = dataset.splits["test"][0].prompt
    assert prompt.startswith("<|im_start|>user\n")
    assert tokenizer(prompt)["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert set(dataset.split_report.n_defused.values()) == {0}


def test_a_ready_made_prompt_may_hold_the_mask_itself(tmp_path):
    masked = load_dataset(
        rows_of("It is<mask> for", tmp_path), tiny_tokenizer(), settings=PromptSettings(), masked=True
    )
    assert all(e.prompt.count("<mask>") == 1 for e in masked.splits["test"])


def test_a_chat_of_the_embedded_model_is_what_its_template_makes():
    card = describe_model("smollm2-135m")
    (prompt,) = chat_prompts(card.tokenizer, ["Who?"], system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    rendered = card.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    dataset = load_dataset("mini/nli", card.tokenizer, settings=PromptSettings(prompt_format="chat", shots=1, limit=6))
    assert card.tokenizer(prompt)["input_ids"] == rendered
    assert encode_examples(card, "mini/nli", dataset.splits["test"])[0].label_ids.tolist() == (
        card.tokenizer.convert_tokens_to_ids(["A", "B", "C"])
    )


def test_a_saved_model_brings_its_template(tmp_path):
    save_tiny_model("llama", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    (prompt,) = chat_prompts(describe_model(str(tmp_path)).tokenizer, ["Who?"])
    assert prompt.endswith("<|im_start|>assistant\n")
