import json
import os
from collections import Counter
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from support import SHARED, tiny_tokenizer

from negcore.datasets import SPLITS, PromptSettings, Wording, list_datasets, load_dataset, load_facts
from negcore.datasets.mceval8k import SPECS, read_mceval8k
from negcore.datasets.mini import MINI_SPECS, read_mini
from negcore.datasets.splits import cut_splits
from negcore.errors import DatasetError

MCEVAL8K = SHARED / "mceval8k"
MYRIADLAMA = SHARED / "myriadlama"
needs_mceval8k = pytest.mark.skipif(not MCEVAL8K.is_dir(), reason="MCEval8K is not at ../shared/mceval8k")
needs_myriadlama = pytest.mark.skipif(not MYRIADLAMA.is_dir(), reason="MyriadLAMA is not at ../shared/myriadlama")
# Its training file is absent, and its validation rows are its test rows: test itself is cut in three.
CUT_FROM_TEST = "mceval8k/chunking"


# Test rows that the policy clean leaves out.
FEWER_TEST_ROWS = {
    "mceval8k/fever": 66,
    "mceval8k/mlama": 20 + 15,
    "mceval8k/amazon-review-multi": 5 + 3,
    "mceval8k/ner": 3,
    "mceval8k/lti": 3,
    "mceval8k/postag": 2,
}


def load(name, *, root=None, masked=False, words=False, **settings):
    """Load with the tiny tokenizer, or one for which every word is a token."""
    tokenizer = tiny_letters() if words else tiny_tokenizer()
    return load_dataset(str(name), tokenizer, settings=PromptSettings(**settings), root=root, masked=masked)


def write_lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def questions(n: int, **more: object) -> list[dict[str, object]]:
    return [{"prompt": f"Question {i}? Answer:", "labels": ["A", "B"], "answer": i * 2 // n, **more} for i in range(n)]


# MCEval8K


def test_the_list_has_22_datasets_of_mceval8k_and_one_mini_set_per_genre():
    found = list_datasets()
    mceval8k = [info for info in found if info.name.startswith("mceval8k/")]
    assert len(mceval8k) == 22
    assert {info.name for info in found} - {info.name for info in mceval8k} == {
        f"mini/{genre}" for genre in {info.genre for info in mceval8k}
    }
    assert all(len(info.wordings) >= 2 and 2 <= info.n_options <= 5 for info in found)


@needs_mceval8k
@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize("name", SPECS)
def test_every_dataset_loads_with_balanced_samples(name, shots):
    dataset = load(name, root=MCEVAL8K, shots=shots, limit=20)
    spec = SPECS[name]
    assert set(dataset.splits) == set(SPLITS)
    for examples in dataset.splits.values():
        sizes = Counter(e.answer for e in examples)
        assert len(examples) == 20 and len(sizes) == spec.n_options
        assert all(e.labels == (" A", " B", " C", " D", " E")[: spec.n_options] for e in examples)
        assert all(e.prompt == e.prompt.rstrip() for e in examples)
        assert all(bool(e.group) == (spec.genre == "multilingual" and name != "mceval8k/lti") for e in examples)
    assert len({e.id for examples in dataset.splits.values() for e in examples}) == 60
    assert sorted(d.answer for d in dataset.demonstrations) == list(range(spec.n_options)) * shots
    solved = [line for line in dataset.splits["test"][0].prompt.splitlines() if line.startswith("Answer: ")]
    assert solved == [f"Answer: {'ABCDE'[d.answer]}" for d in dataset.demonstrations]


@needs_mceval8k
@pytest.mark.parametrize("name", SPECS)
def test_clean_splits_share_neither_text_nor_sentence_and_have_no_doubles(name):
    source = read_mceval8k(SPECS[name], MCEVAL8K)
    cut = cut_splits(source.rows, "clean", 0, name)
    texts = {split: [row.content for row in cut.rows[split]] for split in SPLITS}
    assert not any(set(texts[a]) & set(texts[b]) for a, b in combinations(SPLITS, 2))
    units = {split: {row.unit for row in cut.rows[split] if row.unit} for split in SPLITS}
    assert not any(units[a] & units[b] for a, b in combinations(SPLITS, 2))
    assert all(len(set(of_split)) == len(of_split) for of_split in texts.values())
    n_fewer = len(source.rows["test"]) - len(cut.rows["test"])
    assert n_fewer == FEWER_TEST_ROWS.get(name, 0) or name == CUT_FROM_TEST
    assert len(cut.rows["valid"]) >= 190 and len(cut.rows["train"]) >= 600 and len(cut.rows["test"]) >= 200


@needs_mceval8k
def test_where_test_is_all_there_is_clean_cuts_it_in_three_and_released_has_no_training_rows():
    clean = load(CUT_FROM_TEST, root=MCEVAL8K, limit=20).split_report
    assert clean.n_available == {"train": 604, "valid": 194, "test": 202}
    assert {(change.split, change.n_rows, change.reason) for change in clean.drawn} == {
        ("train", 604, "drawn from test"),
        ("valid", 194, "drawn from test"),
    }
    rows = load(CUT_FROM_TEST, root=MCEVAL8K, split_policy="clean-rows", limit=20).split_report
    assert rows.n_available == {"train": 600, "valid": 200, "test": 200}
    assert "22 of a unit in train" in rows.remarks("test")
    released = load(CUT_FROM_TEST, root=MCEVAL8K, split_policy="released", limit=20).split_report
    assert released.n_used == {"train": 0, "valid": 20, "test": 20}
    assert released.is_overlapping


@needs_mceval8k
def test_valid_and_test_can_have_a_limit_of_their_own():
    few, many = (load("mceval8k/ner", root=MCEVAL8K, limit=20, eval_limit=n) for n in (8, None))
    assert few.split_report.n_used == {"train": 20, "valid": 8, "test": 8}
    assert few.splits["train"] == many.splits["train"] and set(few.splits["test"]) < set(many.splits["test"])


@needs_mceval8k
def test_overlaps_are_those_of_the_audit():
    report = load("mceval8k/ner", root=MCEVAL8K, split_policy="released", limit=1).split_report
    audit = {("test", "train"): 998, ("valid", "test"): 998, ("valid", "train"): 998}
    assert {(o.split, o.other): o.n_whole_rows for o in report.overlaps} == pytest.approx(audit, abs=2)
    assert report.n_released == {"train": 6000, "valid": 1000, "test": 1000} and report.is_overlapping


@needs_mceval8k
@pytest.mark.parametrize(
    ("name", "n_doubles", "n_contradictory"),
    [("fever", 66, 0), ("mlama", 20, 15), ("amazon-review-multi", 5, 3), ("ner", 3, 0), ("agnews", 0, 0)],
)
def test_doubles_and_texts_with_two_answers_are_counted_under_every_policy(name, n_doubles, n_contradictory):
    released, clean = (
        load(f"mceval8k/{name}", root=MCEVAL8K, split_policy=policy, limit=5).split_report
        for policy in ("released", "clean")
    )
    for report in (released, clean):
        assert (report.n_doubles["test"], report.n_contradictory["test"]) == (n_doubles, n_contradictory)
    told = [f"{n_doubles} asked before in the split"] * bool(n_doubles)
    told += [f"{n_contradictory} texts with two answers"] * bool(n_contradictory)
    assert released.remarks("test")[: len(told)] == told and not clean.remarks("test")
    dropped = {c.reason: c.n_rows for c in clean.dropped if c.split == "test"}
    assert dropped.get("asked before in the split", 0) == n_doubles
    assert dropped.get("same text with another answer in the split", 0) == n_contradictory


@needs_mceval8k
@pytest.mark.parametrize(
    ("name", "n_shared", "n_test", "n_train"),
    [("ner", 496, 997, 3288), ("mpostag", 570, 1000, 3262), ("postag", 0, 998, 5989)],
)
def test_sentences_are_in_one_split_only_unless_rows_alone_are_compared(name, n_shared, n_test, n_train):
    report = load(f"mceval8k/{name}", root=MCEVAL8K, split_policy="clean-rows", limit=5).split_report
    assert report.n_available["test"] == n_test and not report.is_overlapping
    assert report.remarks("test") == [f"{n_shared} of a unit in train"] * bool(n_shared)
    clean = load(f"mceval8k/{name}", root=MCEVAL8K, limit=5).split_report
    assert clean.n_available["train"] == n_train and not any(clean.remarks(split) for split in SPLITS)


@needs_mceval8k
@pytest.mark.parametrize("policy", ["clean", "released"])
def test_where_the_language_is_the_answer_there_are_no_groups(policy):
    dataset = load("mceval8k/lti", root=MCEVAL8K, split_policy=policy, limit=10)
    assert dataset.split_report.group_is_answer
    assert not any(e.group for examples in dataset.splits.values() for e in examples)
    assert not load("mceval8k/mpostag", root=MCEVAL8K, limit=10).split_report.group_is_answer


@needs_mceval8k
def test_damaged_rows_are_left_out_and_counted():
    report = load("mceval8k/clang8", root=MCEVAL8K).split_report
    assert report.n_damaged == {"train": 21, "valid": 3, "test": 3}
    assert report.n_used["test"] == 997 and not report.is_overlapping


@needs_mceval8k
@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("mceval8k/commensenseqa", "mceval8k/commonsenseqa"),
        ("mceval8k/ged", "mceval8k/clang8"),
        ("MCEval8K/AGNews", "mceval8k/agnews"),
    ],
)
def test_other_spellings_lead_to_the_canonical_name(spelling, name):
    assert load(spelling, root=MCEVAL8K, limit=1).name == name


@needs_mceval8k
def test_the_root_can_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("NEG_MCEVAL8K", str(MCEVAL8K))
    assert len(load("mceval8k/imdb", limit=4).splits["train"]) == 4


@needs_mceval8k
def test_the_stereotype_is_the_gold_option():
    rows = read_mceval8k(SPECS["mceval8k/stereoset"], MCEVAL8K).rows["test"]
    (russian,) = [row for row in rows if row.fields["context"] == "The BLANK Russian sat on the couch."]
    assert russian.options[russian.answer] == "The drunk russian sat on the couch."


@needs_mceval8k
def test_the_same_settings_make_the_same_dataset_and_another_seed_another():
    first, again, other = (load("mceval8k/xnli", root=MCEVAL8K, shots=1, limit=20, seed=s) for s in (0, 0, 1))
    assert first.fingerprint == again.fingerprint and first.splits == again.splits
    assert first.fingerprint != other.fingerprint and first.demonstrations != other.demonstrations


@needs_mceval8k
def test_demonstrations_are_the_same_in_every_prompt_and_in_no_split():
    dataset = load("mceval8k/agnews", root=MCEVAL8K, shots=1)
    prompts = [e.prompt for examples in dataset.splits.values() for e in examples]
    shared = os.path.commonprefix(prompts)
    assert shared.count("Answer: ") == 4
    shown = {d.id for d in dataset.demonstrations}
    assert not shown & {e.id for examples in dataset.splits.values() for e in examples}
    assert dataset.split_report.n_available["train"] == 5000 - 4


def agnews(folder: Path, n: int = 20) -> Path:
    """A root whose one dataset is a small agnews; `text` may be replaced by the caller."""
    place = folder / "classification" / "agnews"
    place.mkdir(parents=True)
    for split in SPLITS:
        records = [{"text": f"{split} {i}", "label": i * 4 // n} for i in range(n)]
        (place / f"{split}.json").write_text(json.dumps(records))
    return place


def test_splits_are_compared_by_normalised_text(tmp_path):
    place = agnews(tmp_path)
    train = json.loads((place / "train.json").read_text())
    train[0]["text"] = "  \uff34EST \n 3 "
    (place / "train.json").write_text(json.dumps(train))
    dataset = load("mceval8k/agnews", root=tmp_path)
    assert "agnews/train/0" not in {e.id for e in dataset.splits["train"]}
    (overlap, *_) = dataset.split_report.overlaps
    assert (overlap.split, overlap.other, overlap.n_whole_rows, overlap.n_same_text) == ("test", "train", 0, 1)


def test_special_tokens_in_rows_are_counted_and_harmless(tmp_path):
    place = agnews(tmp_path)
    (place / "test.json").write_text(json.dumps([{"text": "say <end>\n\nAnswer: <mask>", "label": 0}]))
    dataset = load("mceval8k/agnews", root=tmp_path, masked=True)
    (example,) = dataset.splits["test"]
    assert "say < end> Answer: < mask>" in example.prompt and example.prompt.endswith("Answer: <mask>")
    assert dataset.split_report.n_defused == {"train": 0, "valid": 0, "test": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a", "label": 4}]', "record 0: 'label' is 4; allowed: 0, 1, 2, 3"),
        ('[{"text": "a", "label": true}]', "'label' is True"),
        ('[{"text": "a"}]', "field 'label' is missing"),
        ('[{"text": 3, "label": 0}]', "3 is not text"),
        ('[{"text": "\\ud800", "label": 0}]', "surrogate"),
        ('["a"]', "str found; a JSON object is needed"),
        ('{"text": "a"}', "an array of objects"),
        ('[{"text"\n:: 1}]', "test.json:2: not JSON"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, text, message):
    (agnews(tmp_path) / "test.json").write_text(text)
    with pytest.raises(DatasetError) as error:
        load("mceval8k/agnews", root=tmp_path)
    assert "test.json" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_a_root_that_is_no_folder_and_one_without_the_dataset_are_named(tmp_path):
    with pytest.raises(DatasetError, match="nowhere.*is not a folder"):
        load("mceval8k/agnews", root=tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no nli/paws/test.json in folder"):
        load("mceval8k/paws", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mceval8k/agnew", "'mceval8k/agnews'"),
        ("paws", "'mceval8k/paws'"),
        ("mini/nlp", "'mini/nli'"),
        ("zzzz", "`neg datasets` lists all. A file"),
        ("facts.feather", "load_facts"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones(name, hint):
    with pytest.raises(DatasetError) as error:
        load(name)
    assert repr(name) in str(error.value) and hint in str(error.value)


# Settings


@pytest.mark.parametrize("wrong", [{"shots": 2}, {"limit": 0}, {"eval_limit": 0}, {"split_policy": "dirty"}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(DatasetError, match="allowed"):
        PromptSettings(**wrong)


def test_wordings_change_the_prompts_and_nothing_else():
    default, inline = load("mini/nli"), load("mini/nli", wording="inline")
    assert [e.id for e in default.splits["test"]] == [e.id for e in inline.splits["test"]]
    assert not {e.prompt for e in default.splits["test"]} & {e.prompt for e in inline.splits["test"]}


@pytest.mark.parametrize("wording", ["default", "inline"])
def test_an_example_carries_the_texts_of_its_options_as_the_prompt_shows_them(wording):
    for example in load("mini/fact", wording=wording).splits["test"]:
        assert len(example.options) == len(set(example.options)) == len(example.labels)
        places = [
            example.prompt.index(text, example.prompt.index("(A)" if wording == "inline" else "\nA."))
            for text in example.options
        ]
        assert places == sorted(places)


def test_ready_made_prompts_have_no_options_but_their_labels(tmp_path):
    dataset = load(write_lines(tmp_path / "mine.jsonl", questions(10)))
    assert {example.options for examples in dataset.splits.values() for example in examples} == {()}


def test_a_wording_of_your_own_is_used():
    wording = Wording(name="mine", instruction="", question="{hypothesis} ({premise})", cue="So:")
    example = load("mini/nli", wording=wording).splits["test"][0]
    assert example.prompt.endswith("\nSo:") and not example.prompt.startswith("\n")


def test_an_unknown_wording_and_an_unknown_field_are_refused():
    with pytest.raises(DatasetError, match="unknown wording 'wordy'; allowed: 'default', 'inline'"):
        load("mini/nli", wording="wordy")
    with pytest.raises(DatasetError, match="asks for 'text'; allowed: premise, hypothesis"):
        load("mini/nli", wording=Wording(name="mine", instruction="", question="{text}"))


# Mini datasets


# Runs rest on them: a change of rows or wordings must be meant.
MINI_FINGERPRINTS = {
    "mini/classification": "ff0a32480ed0858a43f6aaea65228fb1",
    "mini/fact": "0d24cc57340da08798df8befaab99454",
    "mini/linguistic": "567a8028bf64fb1bae3426acd733714b",
    "mini/multilingual": "dffc38f56888760d5e0f011228f9bff7",
    "mini/nli": "e914b592fbdb02128522cbc17d82b54e",
    "mini/self-reflection": "849689a7d861b8f4d62f2d316ca792ce",
}
MINI_FACTS_FINGERPRINT = "47dbbd3fe4f709169627b7fcdde5e630"


def test_mini_datasets_never_change():
    assert {name: load(name).fingerprint for name in MINI_SPECS} == MINI_FINGERPRINTS
    assert load_facts("mini/facts", tiny_letters()).fingerprint == MINI_FACTS_FINGERPRINT


def test_mini_answers_are_right():
    rows = [row for split in read_mini("mini/fact").rows.values() for row in split]
    gold = {row.fields["text"]: row.options[row.answer] for row in rows}
    assert gold["What is the capital of Japan?"] == "Tokyo"
    assert gold["In which part of the world is Kenya?"] == "Africa"
    assert gold["In which part of the world is the Netherlands?"] == "Europe"


# Files of one's own


def test_a_file_is_cut_into_stratified_splits(tmp_path):
    dataset = load(write_lines(tmp_path / "mine.jsonl", questions(20)))
    sizes = {split: Counter(e.answer for e in examples) for split, examples in dataset.splits.items()}
    assert sizes == {"train": {0: 6, 1: 6}, "valid": {0: 2, 1: 2}, "test": {0: 2, 1: 2}}
    assert dataset.name == "local/mine" and dataset.label_rule == "labels begin with a space: ' A' ' B'"


def test_a_file_can_name_its_splits_ids_groups_and_answers(tmp_path):
    records = [
        {
            "prompt": f"{split} {i}:",
            "labels": ["A", " B"],
            "answer": "B",
            "split": split,
            "id": f"{split}-{i}",
            "group": "g",
        }
        for split in SPLITS
        for i in range(3)
    ]
    dataset = load(write_lines(tmp_path / "mine.jsonl", records))
    example = min(dataset.splits["valid"], key=lambda e: e.id)
    assert (example.id, example.prompt, example.labels) == ("valid-0", "valid 0:", (" A", " B"))
    assert (example.answer, example.group) == (1, "g")


def test_rows_of_a_file_stay_with_those_of_their_unit_and_of_their_text(tmp_path):
    units = [
        {"prompt": f"Word {i} of it? Answer:", "labels": ["A", "B"], "answer": i % 2, "unit": f" Story  {i // 4}"}
        for i in range(60)
    ]
    twins = [{"prompt": f"Twin {i // 2}? Answer:", "labels": ["A", "B"], "answer": i % 2} for i in range(40)]
    dataset = load(write_lines(tmp_path / "mine.jsonl", units + twins))
    report = dataset.split_report
    assert sum(report.n_doubles.values()) == sum(report.n_contradictory.values()) == 20
    assert {c.reason for c in report.dropped} == {
        "asked before in the split",
        "same text with another answer in the split",
    }
    stories = {
        split: {int(e.id.split("/")[1]) - 1 for e in examples if "of it" in e.prompt}
        for split, examples in dataset.splits.items()
    }
    assert sum(map(len, stories.values())) == 60
    assert not any({i // 4 for i in stories[a]} & {i // 4 for i in stories[b]} for a, b in combinations(SPLITS, 2))


def test_units_too_few_to_cut_are_named(tmp_path):
    with pytest.raises(DatasetError, match="rows of 2 texts or units cannot be cut into splits; give a split field"):
        load(write_lines(tmp_path / "mine.jsonl", [*questions(9, unit="a"), *questions(9, unit="b")]))


@pytest.mark.parametrize("labels", [["en", "de", "fr"], ["fr", "de", "en"]])
def test_groups_that_give_the_answer_away_are_no_groups(tmp_path, labels):
    """Dialects count too: each has one answer. So do options in another order, which hold the same answer."""
    langs = [("en-GB", "en"), ("en-US", "en"), ("de", "de"), ("fr", "fr")]
    records = [
        {"prompt": f"Text {i}:", "labels": labels if i % 8 else labels[::-1], "answer": langs[i % 4][1]}
        | {"group": langs[i % 4][0]}
        for i in range(40)
    ]
    told = load(write_lines(tmp_path / "mine.jsonl", records), words=True)
    assert told.split_report.group_is_answer and not any(e.group for e in told.splits["train"])
    records[0]["answer"] = "de"
    kept = load(write_lines(tmp_path / "mine.jsonl", records), words=True)
    assert not kept.split_report.group_is_answer and all(e.group for e in kept.splits["train"])


@pytest.mark.parametrize("groups", [["one"] * 20, [f"row {i}" for i in range(20)]])
def test_one_group_for_all_rows_or_for_each_is_kept(tmp_path, groups):
    records = [record | {"group": group} for record, group in zip(questions(20), groups, strict=True)]
    assert load(write_lines(tmp_path / "mine.jsonl", records)).splits["train"][0].group


def test_a_file_can_be_demonstrated_too(tmp_path):
    dataset = load(write_lines(tmp_path / "mine.jsonl", questions(20)), shots=1)
    assert dataset.splits["test"][0].prompt.count("Answer: ") == 2


GOOD = {"prompt": "Q:", "labels": ["A", "B"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "list found"),
        (b"\xff{}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({"prompt": "Q:", "answer": 0}), "'labels' is missing"),
        (json.dumps({**GOOD, "prompt": " "}), "prompt is ' '"),
        (json.dumps({**GOOD, "labels": ["A"]}), "a list of two or more"),
        (json.dumps({**GOOD, "labels": ["A", " A"]}), "repeat"),
        (json.dumps({**GOOD, "labels": ["A", 1]}), "label is 1"),
        (json.dumps({**GOOD, "answer": 2}), "answer is 2; allowed: 0 to 1"),
        (json.dumps({**GOOD, "answer": -1}), "answer is -1"),
        (json.dumps({**GOOD, "answer": "C"}), "answer is 'C'"),
        (json.dumps({**GOOD, "split": "dev"}), "split is 'dev'; allowed: 'train'"),
        (json.dumps({**GOOD, "split": ["dev"]}), "split is ['dev']"),
        (json.dumps({**GOOD, "id": "first"}), "id 'first' occurs twice"),
        (json.dumps({**GOOD, "prompt": "\ud800"}), "surrogate"),
        (json.dumps({**GOOD, "unit": [3]}), "unit is [3]"),
    ],
)
def test_a_malformed_line_is_named_with_what_is_allowed(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    first = json.dumps({**GOOD, "id": "first"}).encode()
    path.write_bytes(first + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(DatasetError) as error:
        load(path)
    assert f"{path}:3: " in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_files_that_are_empty_too_short_or_half_split_are_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n \n")
    with pytest.raises(DatasetError, match="no rows"):
        load(path)
    with pytest.raises(DatasetError, match="4 rows cannot be cut"):
        load(write_lines(path, questions(4)))
    with pytest.raises(DatasetError, match="some rows have a split"):
        load(write_lines(path, [*questions(9), *questions(1, split="test")]))
    with pytest.raises(DatasetError, match="cannot be read"):
        load(tmp_path / "absent.jsonl")


# Facts

FACTS = [
    {"uuid": f"u{i}", "prompt": f"Fact {i} is", "tpl": f"t{i % 2}", "answer": "A" if i % 3 else "Xylophone"}
    for i in range(9)
]


@pytest.mark.parametrize("suffix", [".feather", ".parquet", ".jsonl"])
def test_facts_keep_single_token_answers_and_count_the_rest(tmp_path, suffix):
    path = tmp_path / f"facts{suffix}"
    table = pa.Table.from_pylist(FACTS)
    if suffix == ".feather":
        pyarrow.feather.write_feather(table, path)
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        write_lines(path, FACTS)
    facts = load_facts(path, tiny_tokenizer())
    assert (facts.n_rows, facts.n_multi_token, len(facts.examples)) == (9, 3, 6)
    example = min(facts.examples, key=lambda e: e.id)
    assert (example.id, example.prompt, example.labels) == ("facts/1/u1", "Fact 1 is", (" A",))
    assert (example.answer, example.group) == (0, "t1")
    assert "begin with a space" in facts.label_rule


@pytest.mark.parametrize("source", ["hf://datasets/org", "hf://datasets/org/name", "hf://datasets/org/name/"])
def test_facts_on_the_hub_need_a_file(source):
    with pytest.raises(DatasetError, match="no such file; allowed: hf://datasets/ORGANISATION/DATASET/FILE"):
        load_facts(source, tiny_tokenizer())


def test_a_sample_of_facts_depends_on_the_seed():
    whole, some, again = (load_facts("mini/facts", tiny_letters(), limit=n) for n in (None, 10, 10))
    assert some.fingerprint == again.fingerprint and some.examples == whole.examples[:10]
    assert load_facts("mini/facts", tiny_letters(), limit=10, seed=1).examples != some.examples


def tiny_letters():
    """A tokenizer for which every word is one token."""

    class Words:
        mask_token = None
        all_special_tokens: list[str] = []

        def __call__(self, text, *, add_special_tokens):
            return {"input_ids": [[hash(word) for word in one.split()] for one in text]}

    return Words()


def test_facts_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "facts.feather"
    path.write_bytes(b"not a table")
    with pytest.raises(DatasetError, match="cannot be read"):
        load_facts(path, tiny_tokenizer())
    pyarrow.feather.write_feather(pa.table({"uuid": ["u"]}), path)
    with pytest.raises(DatasetError, match="no column 'prompt'"):
        load_facts(path, tiny_tokenizer())
    with pytest.raises(DatasetError, match="jsonl:1: tpl is None"):
        load_facts(write_lines(tmp_path / "f.jsonl", [{**FACTS[0], "tpl": None}]), tiny_tokenizer())
    with pytest.raises(DatasetError, match="none of the 1 answers is one token"):
        load_facts(write_lines(tmp_path / "f.jsonl", FACTS[:1]), tiny_tokenizer())
    with pytest.raises(DatasetError, match=r"\.feather, \.parquet or \.jsonl"):
        load_facts("myriadlama", tiny_tokenizer())


@needs_myriadlama
def test_myriadlama_loads_for_masked_models_with_its_gap_marks_broken():
    facts = load_facts(MYRIADLAMA / "llama2-7b-it.feather", tiny_tokenizer(), masked=True)
    assert facts.n_rows == 1000 == facts.n_multi_token + len(facts.examples)
    assert all(e.prompt.count("<mask>") == 1 and e.prompt.endswith("A: <mask>") for e in facts.examples)
