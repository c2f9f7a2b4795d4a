"""Generate the rows of the mini datasets from Babel's copy of the Unicode Common Locale Data Repository.

Run `python tests/mini_generator.py negcore/datasets/mini_rows` to write them again. Rows follow the installed version
of Babel, so that only the version in infra/constraints.txt writes the rows that ship.
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from babel import Locale
from babel.core import get_global
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

T = TypeVar("T")
Records = list[dict[str, Any]]

LANGUAGES = ("en", "fr", "de", "es")
CONTINENTS = ("Africa", "America", "Asia", "Europe")
N_PER_LANGUAGE = 55
# Large or well-known countries, so that a small model may have met them.
COUNTRY_CODES = (
    "AR AT AU BD BE BG BO BR CA CH CL CN CO CR CU CZ DE DK DO DZ EC EE EG ES ET FI FR GB GR GT HN HR HU ID "
    "IE IL IN IQ IR IS IT JO JP KE KH KR KW LA LB LT LV LY MA MG MN MX MY NG NI NL NO NP NZ PA PE PK PL PT "
    "PY QA RO RS RU SA SE SI SK SO SV SY TH TN TR TZ UA UG US UY VE VN YE ZM ZW"
)
COUNTRIES = tuple(COUNTRY_CODES.split())
# Currencies change: the answers are those of this day, whenever the set is made.
CURRENCY_DAY = date(2024, 1, 1)
# They lie on two continents, so that a time zone's name does not settle the question.
ON_TWO_CONTINENTS = {"AU", "EG", "ID", "NZ", "RU", "TR"}

TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Sports": (
        (
            "The {} team won the final yesterday.",
            "She trains for {} five times a week.",
            "The {} coach praised his players after the match.",
            "Our club lost its last {} game of the season.",
            "He broke a record at the {} championship.",
            "Thousands of fans watched the {} tournament.",
        ),
        ("football", "hockey", "tennis", "basketball", "rugby", "volleyball", "cricket", "handball", "baseball"),
    ),
    "Food": (
        (
            "Bake the {} for twenty minutes and serve it warm.",
            "My grandmother's {} needs more salt and pepper.",
            "We ordered {} and a glass of juice for lunch.",
            "The recipe for {} calls for butter and onions.",
            "This restaurant is known for its {}.",
            "He ate a large plate of {} for dinner.",
        ),
        ("soup", "pasta", "pizza", "rice", "chicken", "bread", "stew", "salad", "cheese pie"),
    ),
    "Weather": (
        (
            "Heavy {} is expected in the north tonight.",
            "The {} will last until Sunday morning.",
            "Drivers were warned of {} and low clouds.",
            "After a day of {} the sky cleared up.",
            "Forecasters say the {} will move east.",
            "The {} came with a sudden drop in temperature.",
        ),
        ("rain", "snow", "fog", "hail", "wind", "thunder", "drizzle", "sleet", "frost"),
    ),
    "Music": (
        (
            "She played the {} with the city orchestra.",
            "The song begins with a slow {} solo.",
            "He has taken {} lessons since he was six.",
            "The band added a {} to its new album.",
            "A famous composer wrote this {} concerto.",
            "The audience loved the {} melody at the concert.",
        ),
        ("piano", "violin", "guitar", "trumpet", "flute", "cello", "drum", "harp", "clarinet"),
    ),
}

NOUNS = {
    "dog": "dogs",
    "child": "children",
    "teacher": "teachers",
    "woman": "women",
    "bird": "birds",
    "boy": "boys",
    "friend": "friends",
    "man": "men",
    "horse": "horses",
    "student": "students",
}
VERBS = {
    "runs": "run",
    "sleeps": "sleep",
    "eats": "eat",
    "waits": "wait",
    "plays": "play",
    "walks": "walk",
    "drinks": "drink",
    "stands": "stand",
    "sits": "sit",
    "sings": "sing",
}
PLACES = ("in the garden", "at home", "near the river", "in the park", "by the door")

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo")
CITIES = ("Paris", "London", "Rome", "Berlin", "Tokyo", "Madrid", "Vienna", "Lisbon")
JOBS = ("doctor", "teacher", "painter", "farmer", "lawyer", "pilot", "baker", "singer")
THINGS = ("car", "bicycle", "coat", "lamp", "chair", "boat")
COLOURS = ("red", "blue", "green", "black")
ANIMALS = ("cats", "dogs", "horses", "ducks", "goats", "rabbits")


def _mixed(items: Iterable[T], tag: str) -> list[T]:
    """Items in an order that is arbitrary and always the same."""
    return sorted(items, key=lambda item: xxhash.xxh3_128_digest(f"{tag}\n{item!r}".encode()))


def _with_gold_at(gold: str, others: Iterable[str], index: int, n_options: int) -> list[str]:
    options = _mixed(others, gold)[: n_options - 1]
    options.insert(index, gold)
    return options


def _classification() -> Records:
    return [
        {"text": frame.format(word), "label": label}
        for label, (frames, words) in enumerate(TOPICS.values())
        for frame, word in itertools.product(frames, words)
    ]


def _fact() -> Records:
    """Questions on currency, official language and continent, the gold option in each place equally often."""
    questions = _mixed([*_currencies(), *_languages(), *_continents()], "fact")
    n_options = 4
    return [
        {"text": text, "options": _with_gold_at(gold, others, i % n_options, n_options), "label": i % n_options}
        for i, (text, gold, others) in enumerate(questions[: len(questions) // n_options * n_options])
    ]


Question = tuple[str, str, tuple[str, ...]]


def _country(code: str) -> str:
    return str(Locale("en").territories[code])


def _currencies() -> list[Question]:
    names = Locale("en").currencies
    used = {code: get_territory_currencies(code, CURRENCY_DAY, CURRENCY_DAY) for code in COUNTRIES}
    gold = {code: str(names[found[0]]) for code, found in used.items() if len(found) == 1}
    return [
        (f"What is the currency of {_country(code)}?", name, tuple(sorted(set(gold.values()) - {name})))
        for code, name in gold.items()
    ]


def _languages() -> list[Question]:
    gold = _language_of_country()
    return [
        (f"What is the official language of {_country(code)}?", name, _languages_not_in(code, gold.values()))
        for code, name in gold.items()
    ]


def _language_of_country() -> dict[str, str]:
    """Countries whose one official language is also the one most people speak, and its English name."""
    names = Locale("en").languages
    found: dict[str, str] = {}
    for code in COUNTRIES:
        spoken = get_global("territory_languages")[code]
        most = max(spoken, key=lambda language: spoken[language]["population_percent"])
        if get_official_languages(code, regional=True) == (most,):
            found[code] = str(names[most])
    return found


def _languages_not_in(code: str, languages: Iterable[str]) -> tuple[str, ...]:
    names = Locale("en").languages
    spoken = {names.get(language) for language in get_global("territory_languages").get(code, {})}
    return tuple(sorted(set(languages) - spoken))


def _continent_of_country() -> dict[str, str]:
    """Countries whose time zones all have one continent in their names."""
    found: dict[str, set[str]] = {}
    for zone, code in get_global("zone_territories").items():
        found.setdefault(code, set()).add(zone.split("/")[0])
    return {
        code: next(iter(found[code]))
        for code in COUNTRIES
        if len(found[code]) == 1 and found[code] <= set(CONTINENTS) and code not in ON_TWO_CONTINENTS
    }


def _continents() -> list[Question]:
    return [
        (f"On which continent is {_country(code)}?", gold, tuple(c for c in CONTINENTS if c != gold))
        for code, gold in _continent_of_country().items()
    ]


def _linguistic() -> Records:
    """Subject and verb agree in number; subject, number and place of the right form are balanced."""
    records: Records = []
    for i, (noun, verb) in enumerate(itertools.product(NOUNS, VERBS)):
        place = PLACES[(i // len(VERBS) + i) % len(PLACES)]
        forms = [verb, VERBS[verb]]
        for number, subject in enumerate((noun, NOUNS[noun])):
            label = (i // len(VERBS) + i % len(VERBS) + number) % 2
            options = [forms[number], forms[1 - number]]
            records.append(
                {
                    "text": f"The {subject} ___ {place}.",
                    "options": options if label == 0 else options[::-1],
                    "label": label,
                }
            )
    return records


def _multilingual() -> Records:
    """Names of days, months, countries and languages that only one of the languages writes so."""
    words = {language: _words(Locale(language)) for language in LANGUAGES}
    count = Counter(word.casefold() for found in words.values() for word in found)
    return [
        {"text": word, "lang": language}
        for language in LANGUAGES
        for word in _mixed((w for w in words[language] if count[w.casefold()] == 1), language)[:N_PER_LANGUAGE]
    ]


def _words(locale: Locale) -> Sequence[str]:
    languages = ("ar", "da", "de", "el", "en", "es", "fi", "fr", "it", "ja", "nl", "pl", "pt", "ru", "sv", "tr", "zh")
    found = (
        *locale.days["format"]["wide"].values(),
        *locale.months["format"]["wide"].values(),
        *(locale.territories[code] for code in COUNTRIES),
        *(locale.languages[code] for code in languages),
    )
    return sorted(set(map(str, found)))


def _nli() -> Records:
    """Premises with a hypothesis that follows, one that may be so and one that cannot be."""
    stories = [*_purchases(), *_moves(), *_gardens()]
    return [
        {"premise": premise, "hypothesis": hypothesis, "label": label}
        for premise, *hypotheses in stories
        for label, hypothesis in enumerate(hypotheses)
    ]


Story = tuple[str, str, str, str]
N_STORIES = 24
N_PEOPLE = 50


def _purchases() -> list[Story]:
    colours = list(zip(COLOURS, COLOURS[1:] + COLOURS[:1], strict=True))
    found = _mixed(itertools.product(NAMES, THINGS, colours), "purchases")[:N_STORIES]
    return [
        (
            f"{name} bought a {colour} {thing} last week.",
            f"{name} bought a {thing}.",
            f"{name} paid for the {thing} in cash.",
            f"The {thing} that {name} bought is {other}.",
        )
        for name, thing, (colour, other) in found
    ]


def _moves() -> list[Story]:
    found = _mixed(itertools.product(NAMES, itertools.permutations(CITIES, 2)), "moves")[:N_STORIES]
    return [
        (
            f"{name} was born in {old} and lives in {new} now.",
            f"{name} lives in {new}.",
            f"{name} likes the food in {new}.",
            f"{name} was born in {new}.",
        )
        for name, (old, new) in found
    ]


def _gardens() -> list[Story]:
    found = _mixed(itertools.product(NAMES, itertools.permutations(ANIMALS, 2)), "gardens")[:N_STORIES]
    return [
        (
            f"There are {some} but no {others} in {name}'s garden.",
            f"{name}'s garden has {some} in it.",
            f"The {some} in {name}'s garden are hungry.",
            f"{name}'s garden has {others} in it.",
        )
        for name, (some, others) in found
    ]


def _self_reflection() -> Records:
    """Replies that a note supports, and replies that contradict it."""
    people = _mixed(itertools.product(NAMES, CITIES, JOBS), "people")[:N_PEOPLE]
    return [
        {"note": f"{name} lives in {city} and works as a {job}.", "question": question, "reply": reply, "label": i}
        for name, city, job in people
        for question, form, gold, values in (
            (f"Where does {name} live?", "In {}.", city, CITIES),
            (f"What does {name} do for a living?", "Works as a {}.", job, JOBS),
        )
        for i, reply in enumerate((form.format(_other(gold, values, name)), form.format(gold)))
    ]


def _other(value: str, values: Sequence[str], tag: str) -> str:
    return next(other for other in _mixed(values, tag) if other != value)


def _facts() -> Records:
    """Single-answer facts in MyriadLAMA's form: languages and continents of countries in several templates."""
    relations = {
        "language": (_language_of_country(), ("The official language of {} is", "In {}, most people speak")),
        "continent": (_continent_of_country(), ("{} is a country on the continent of", "{} is located in")),
    }
    return [
        {
            "uuid": f"{relation}-{code}",
            "prompt": template.format(_country(code)),
            "tpl": f"{relation}-{number}",
            "answer": answer,
        }
        for relation, (answers, templates) in relations.items()
        for number, template in enumerate(templates)
        for code, answer in answers.items()
    ]


MAKERS = {
    "classification": _classification,
    "fact": _fact,
    "facts": _facts,
    "linguistic": _linguistic,
    "multilingual": _multilingual,
    "nli": _nli,
    "self-reflection": _self_reflection,
}


def write_rows(directory: Path) -> None:
    """Write one JSONL file a dataset."""
    for name, make in MAKERS.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in make()]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]))
