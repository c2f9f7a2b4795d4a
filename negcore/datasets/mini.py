"""Six small datasets, one for each genre of MCEval8K, and a set of facts, that need no download.

Their rows ship in `mini_rows/`, so that a fingerprint never changes. They were generated from templates and from the
Unicode Common Locale Data Repository. They are for trying the software out, not for conclusions about models.
"""

from pathlib import Path

from negcore.datasets.files import read_json_lines
from negcore.datasets.rows import OptionsField, Source, Spec, rows_of_records, two_wordings
from negcore.datasets.splits import split_rows

MINI_ROWS = Path(__file__).with_name("mini_rows")
"""Folder with the rows of every mini dataset, one JSONL file each."""

MINI_SPECS = {
    f"mini/{spec.genre}": spec
    for spec in (
        Spec(
            name="mini-classification",
            genre="classification",
            fields=("text",),
            options=("Sports", "Food", "Weather", "Music"),
            wordings=two_wordings(
                "Name the topic of each sentence.",
                "Sentence: {text}\nTopic:",
                "Sort the sentence into one of the subjects.",
                "What is this about?\n{text}",
            ),
        ),
        Spec(
            name="mini-fact",
            genre="fact",
            fields=("text",),
            options=OptionsField("options", 4),
            wordings=two_wordings(
                "Answer each question about the world.",
                "Question: {text}",
                "Pick the correct answer.",
                "{text}",
            ),
        ),
        Spec(
            name="mini-linguistic",
            genre="linguistic",
            fields=("text",),
            options=OptionsField("options", 2),
            options_are_content=True,
            wordings=two_wordings(
                "Choose the verb form that fits the gap.",
                "Sentence: {text}",
                "Which form makes the sentence correct English?",
                "Fill in: {text}",
            ),
        ),
        Spec(
            name="mini-multilingual",
            genre="multilingual",
            fields=("text",),
            options=("English", "French", "German", "Spanish"),
            answer="lang",
            answer_values=("en", "fr", "de", "es"),
            group="lang",
            wordings=two_wordings(
                "Recognise the language of each word.",
                "Word: {text}\nLanguage:",
                "Tell in which language the word is written.",
                "Which language is this?\n{text}",
            ),
        ),
        Spec(
            name="mini-nli",
            genre="nli",
            fields=("premise", "hypothesis"),
            options=("Yes", "Maybe", "No"),
            wordings=two_wordings(
                "Given the premise, is the hypothesis true?",
                "Premise: {premise}\nHypothesis: {hypothesis}",
                "Suppose the text is true. Does the conclusion hold?",
                "Conclusion: {hypothesis}\nText: {premise}",
            ),
        ),
        Spec(
            name="mini-self-reflection",
            genre="self-reflection",
            fields=("note", "question", "reply"),
            options=("No", "Yes"),
            wordings=two_wordings(
                "Is the reply supported by the note, or is it made up? Yes means supported.",
                "Note: {note}\nQuestion: {question}\nReply: {reply}\nSupported:",
                "Compare the reply with what is known. Does it agree?",
                "{question} {reply}\nKnown: {note}",
            ),
        ),
    )
}


def read_mini(name: str) -> Source:
    """Read the rows of a mini dataset and cut them 60/20/20 in a fixed way."""
    spec = MINI_SPECS[name]
    records = [record for _, record in read_json_lines(MINI_ROWS / f"{spec.genre}.jsonl")]
    source = rows_of_records(spec, {"all": records}, {"all": name})
    rows = {split: list(part) for split, part in split_rows(source.rows["all"], name).items()}
    return Source(spec.genre, rows, dict.fromkeys(rows, 0), spec.wordings)
