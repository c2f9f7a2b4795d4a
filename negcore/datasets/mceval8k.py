"""MCEval8K as data: the place, fields and wordings of each of its 22 datasets.

Zhao, Jiang and Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053); the files are theirs
(CC-BY-4.0), the wordings are ours.

Differs from the paper: every option has its own letter; codes such as `ADP` or `SBAR` are spelled out; and the gold
option of StereoSet, whose released index fields for stereotype and anti-stereotype are swapped, is the sentence that
repeats the stereotype.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from negcore.datasets.base import SPLITS
from negcore.datasets.files import hub_file, read_json_array
from negcore.datasets.rows import OptionsField, Source, Spec, rows_of_records, two_wordings
from negcore.errors import DatasetError

HUB_REPOSITORY = "iszhaoxin/MCEval8K"
ROOT_VARIABLE = "NEG_MCEVAL8K"
PREFIX = "mceval8k/"


LANGUAGES = ("en", "fr", "de", "zh", "es")
STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")

# Tags of Universal Dependencies; "_" marks a contraction that is written as one word.
PARTS_OF_SPEECH = {
    "ADJ": "adjective",
    "ADP": "adposition",
    "ADV": "adverb",
    "AUX": "auxiliary verb",
    "CCONJ": "coordinating conjunction",
    "DET": "determiner",
    "INTJ": "interjection",
    "NOUN": "common noun",
    "NUM": "number",
    "PART": "particle",
    "PRON": "pronoun",
    "PROPN": "proper noun",
    "PUNCT": "punctuation mark",
    "SCONJ": "subordinating conjunction",
    "SYM": "symbol",
    "VERB": "verb",
    "X": "other",
    "_": "contraction",
}
CHUNKS = {
    "ADJP": "adjective phrase",
    "ADVP": "adverb phrase",
    "CONJP": "conjunction phrase",
    "INTJ": "interjection",
    "LST": "list marker",
    "NP": "noun phrase",
    "PP": "prepositional phrase",
    "PRT": "verb particle",
    "SBAR": "subordinating conjunction",
    "UCP": "coordination of unlike phrases",
    "VP": "verb phrase",
}
ENTITIES = {"LOC": "location", "MISC": "other name", "ORG": "organisation", "PER": "person"}

CLASSIFICATION = (
    Spec(
        name="agnews",
        genre="classification",
        fields=("text",),
        options=("World", "Sports", "Business", "Science and technology"),
        wordings=two_wordings(
            "Decide which section of a newspaper each article belongs to.",
            "Article: {text}\nSection:",
            "Read the news text and name its topic.",
            "What is this text about?\n{text}",
        ),
    ),
    Spec(
        name="amazon-reviews",
        genre="classification",
        fields=("text",),
        options=STARS,
        answer_values=(1, 2, 3, 4, 5),
        aliases=("amazon",),
        wordings=two_wordings(
            "Guess how many stars the customer gave together with each review.",
            "Review: {text}\nRating:",
            "A buyer wrote the text. Pick the rating that goes with it.",
            "How satisfied was the writer?\n{text}",
        ),
    ),
    Spec(
        name="imdb",
        genre="classification",
        fields=("text",),
        options=("Negative", "Positive"),
        wordings=two_wordings(
            "Decide whether each film review is negative or positive.",
            "Review: {text}\nSentiment:",
            "Tell from the review whether its writer liked the film.",
            "What does the writer think of the film?\n{text}",
        ),
    ),
)

MYRIADLAMA = Spec(
    name="myriadlama",
    genre="fact",
    fields=("text",),
    options=OptionsField("options", 4),
    wordings=two_wordings(
        "Choose what fills the gap, written [Y], so that each sentence becomes a fact.",
        "Sentence: {text}",
        "In the sentence, [Y] stands for a missing piece. Find it.",
        "What does [Y] stand for?\n{text}",
    ),
)
FACT = (
    Spec(
        name="commonsenseqa",
        genre="fact",
        fields=("text",),
        options=OptionsField("options", 5),
        aliases=("commensenseqa", "csqa"),
        wordings=two_wordings(
            "Answer each question with common sense.",
            "Question: {text}",
            "Pick the most sensible answer.",
            "{text}",
        ),
    ),
    Spec(
        name="fever",
        genre="fact",
        fields=("claim",),
        options=("False", "True"),
        wordings=two_wordings(
            "Decide whether each claim is true or false.",
            "Claim: {claim}",
            "Check the statement against what you know about the world.",
            "Does this hold?\n{claim}",
        ),
    ),
    MYRIADLAMA,
    Spec(
        name="templama",
        genre="fact",
        fields=("text",),
        options=OptionsField("options", 4),
        wordings=two_wordings(
            "Choose the year in which each statement was true.",
            "Statement: {text}\nYear:",
            "Facts change with time. Find the year that goes with the fact.",
            "When was this so?\n{text}",
        ),
    ),
)

POSTAG = Spec(
    name="postag",
    genre="linguistic",
    fields=("text", "target_token"),
    options=OptionsField("options", 4),
    option_names=PARTS_OF_SPEECH,
    aliases=("pos",),
    wordings=two_wordings(
        "Name the part of speech of one word in each sentence.",
        "Sentence: {text}\nWord: {target_token}",
        "Which class of words does the given word belong to where it stands?",
        '"{target_token}" is used in this sentence:\n{text}',
    ),
)
LINGUISTIC = (
    Spec(
        name="chunking",
        genre="linguistic",
        fields=("text", "target_chunk"),
        options=OptionsField("options", 4),
        option_names=CHUNKS,
        wordings=two_wordings(
            "Name the kind of phrase that the marked words form in each sentence.",
            "Sentence: {text}\nWords: {target_chunk}",
            "Which phrase type fits the words as they are used?",
            'The words "{target_chunk}" are taken from this sentence:\n{text}',
        ),
    ),
    # `acceptable` is the index of the sentence without the mistake. A few records are damaged: their columns are
    # shifted and sentence1 is null.
    Spec(
        name="clang8",
        genre="linguistic",
        fields=("sentence1", "sentence2"),
        options=("The first sentence", "The second sentence"),
        answer="acceptable",
        aliases=("ged",),
        wordings=two_wordings(
            "Of each two sentences, choose the one that is better English.",
            "First: {sentence1}\nSecond: {sentence2}",
            "One of the sentences has a grammatical mistake. Point out the other one.",
            "Which sentence is free of mistakes?\n2: {sentence2}\n1: {sentence1}",
        ),
    ),
    Spec(
        name="ner",
        genre="linguistic",
        fields=("text", "target_chunk"),
        options=OptionsField("options", 4),
        option_names=ENTITIES,
        wordings=two_wordings(
            "Say what kind of thing the name in each sentence stands for.",
            "Sentence: {text}\nName: {target_chunk}",
            "Which type of entity is meant?",
            '"{target_chunk}" occurs in this text:\n{text}',
        ),
    ),
    POSTAG,
)

MNLI = Spec(
    name="mnli",
    genre="nli",
    fields=("premise", "hypothesis"),
    options=("It follows", "It may or may not be so", "It is ruled out"),
    wordings=two_wordings(
        "Given the premise, say what becomes of each hypothesis.",
        "Premise: {premise}\nHypothesis: {hypothesis}",
        "Suppose the text is true. What does that mean for the conclusion?",
        "Conclusion: {hypothesis}\nText: {premise}",
    ),
)
NLI = (
    MNLI,
    Spec(
        name="paws",
        genre="nli",
        fields=("sentence1", "sentence2"),
        options=("Different meaning", "Same meaning"),
        wordings=two_wordings(
            "Decide whether two sentences say the same thing.",
            "First: {sentence1}\nSecond: {sentence2}",
            "Is either sentence a paraphrase of the other?",
            "Compare them.\n- {sentence2}\n- {sentence1}",
        ),
    ),
    Spec(
        name="swag",
        genre="nli",
        fields=("text",),
        options=OptionsField("options", 4),
        wordings=two_wordings(
            "Choose how each scene most likely goes on.",
            "Scene: {text}",
            "Pick the continuation that makes sense.",
            "What comes next?\n{text}",
        ),
    ),
)

MULTILINGUAL = (
    Spec(
        name="amazon-review-multi",
        genre="multilingual",
        fields=("review",),
        options=STARS,
        answer_values=(1, 2, 3, 4, 5),
        group="lang",
        aliases=("amazon-reviews-multi", "amazon-multi"),
        wordings=two_wordings(
            "Guess how many stars the customer gave together with each review, whatever its language.",
            "Review: {review}\nRating:",
            "A buyer wrote the text. Pick the rating that goes with it.",
            "How satisfied was the writer?\n{review}",
        ),
    ),
    Spec(
        name="lti",
        genre="multilingual",
        fields=("text",),
        options=("English", "French", "German", "Chinese", "Spanish"),
        answer="lang",
        answer_values=LANGUAGES,
        group="lang",
        wordings=two_wordings(
            "Recognise the language of each text.",
            "Text: {text}\nLanguage:",
            "Tell in which language the passage is written.",
            "Which language is this?\n{text}",
        ),
    ),
    replace(MYRIADLAMA, name="mlama", genre="multilingual", group="lang"),
    replace(POSTAG, name="mpostag", genre="multilingual", group="lang", aliases=("mpos",)),
    replace(MNLI, name="xnli", genre="multilingual", group="lang"),
)

SELF_REFLECTION = (
    Spec(
        name="halueval",
        genre="self-reflection",
        fields=("knowledge", "dialogue", "response"),
        options=("No", "Yes"),
        answer="hallucination",
        wordings=two_wordings(
            "Decide whether the response makes something up that the knowledge does not support.",
            "Knowledge: {knowledge}\nDialogue: {dialogue}\nResponse: {response}\nIs anything made up?",
            "Someone talks with an assistant. Does its last reply contain an invented fact?",
            "{dialogue}\nReply: {response}\nWhat is known: {knowledge}",
        ),
    ),
    # The task is to find the stereotype among a stereotypical, an anti-stereotypical and an unrelated sentence.
    # Two index fields of the released files are swapped: `stereotype` points at the sentence that goes against
    # the stereotype ("The moral russian sat on the couch."), `anti-stereotype` at the one that repeats it
    # ("The drunk russian ..."). The gold option is the sentence that repeats it, so the field has a surprising name.
    Spec(
        name="stereoset",
        genre="self-reflection",
        fields=("context",),
        options=OptionsField("sentences", 3),
        options_are_content=True,
        answer="anti-stereotype",
        wordings=two_wordings(
            "For each context, find the sentence that repeats a stereotype.",
            "Context: {context}",
            "One sentence shows a prejudice about a group of people. Which one?",
            "{context}",
        ),
    ),
    Spec(
        name="toxicity",
        genre="self-reflection",
        fields=("text",),
        options=("Harmless", "Toxic"),
        answer="toxic",
        wordings=two_wordings(
            "Decide whether each comment is toxic.",
            "Comment: {text}",
            "Would this message hurt or insult its reader?",
            "Judge the message.\n{text}",
        ),
    ),
)

SPECS = {
    PREFIX + spec.name: spec for spec in (*CLASSIFICATION, *FACT, *LINGUISTIC, *MULTILINGUAL, *NLI, *SELF_REFLECTION)
}


def read_mceval8k(spec: Spec, root: Path | None) -> Source:
    """Read a dataset's files: from `root`, else the folder in NEG_MCEVAL8K, else the Hugging Face hub.

    Raises
    ------
    DatasetError
        If the test file is missing, or a file is malformed.
    """
    local = root or (Path(os.environ[ROOT_VARIABLE]) if os.environ.get(ROOT_VARIABLE) else None)
    find = _in_folder(local) if local else _on_hub
    paths = {split: _find_file(spec, split, find) for split in SPLITS}
    if paths["test"] is None:
        where = f"folder {str(local)!r}" if local else f"Hugging Face dataset {HUB_REPOSITORY!r}"
        raise DatasetError(
            f"{PREFIX}{spec.name}: no {spec.genre}/{spec.name}/test.json in {where}; "
            "a root holds <genre>/<dataset>/{train,valid,test}.json"
        )
    records = {split: list(read_json_array(path)) for split, path in paths.items() if path}
    return rows_of_records(spec, records, {split: str(path) for split, path in paths.items()})


def _find_file(spec: Spec, split: str, find: Callable[[str], Path | None]) -> Path | None:
    candidates = (find(f"{spec.genre}/{folder}/{split}.json") for folder in spec.folders)
    return next((path for path in candidates if path), None)


def _in_folder(root: Path) -> Callable[[str], Path | None]:
    if not root.is_dir():
        raise DatasetError(f"MCEval8K root {str(root)!r} is not a folder; give the one that holds its genres")
    return lambda name: root / name if (root / name).is_file() else None


def _on_hub(name: str) -> Path | None:
    advice = f"give a local folder: root=, or the environment variable {ROOT_VARIABLE}"
    return hub_file(HUB_REPOSITORY, name, otherwise=advice)
